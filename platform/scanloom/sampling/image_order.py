"""A few images that somebody waits for: what is asked of an engine's desk, and what comes back. torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from numpy.typing import NDArray

from scanloom.attributes import Attributes
from scanloom.sampling.gate import UNGATED

Priority = Literal["interactive", "bulk"]


@dataclass(frozen=True)
class ImageOrder:
    """`count` images for the same attributes, of one generator; image n has index `first_index + n`."""

    request: str
    """Id of the request, for logs."""
    generator: str
    """The name under which it is served."""
    attributes: Attributes
    """Canonical and within the envelope."""
    seed: int
    due: float
    """Seconds since 1970 by when all of it must be made."""
    first_index: int = 0
    count: int = 1
    steps: int = 20
    guidance_scale: float = 2.0
    latent_shape: tuple[int, ...] | None = None
    """None: the generator's own."""
    bits_stored: Literal[8, 12, 16] = 8
    priority: Priority = "interactive"
    asked: float | None = None
    """Seconds since 1970 when it was asked for, from which `due` was reckoned; None: when the desk takes it."""


@dataclass(frozen=True)
class MadeImages:
    """What came of an order, images by index."""

    pixels: NDArray[Any]
    """[N, H, W], uint8 for 8 bits stored, uint16 for more."""
    attempts: Sequence[int]
    """Which attempt of each image passed the checks."""
    digest: str
    """Of the generator that made them."""
    rejects: Mapping[str, int] = field(default_factory=dict)
    """Draws that were refused, by reason."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """What the pixels depend on in their last bits."""
    gate: str = UNGATED
    """Digest of the privacy gate that let them out."""
