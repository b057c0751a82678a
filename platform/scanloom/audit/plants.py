"""Planted copies: training scans changed as a copy may be, slightly or strongly, to see how many are found.

Made by other means than the views that the encoder learned from, and applied to images as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Squares = NDArray[np.float32]
Change = Callable[[Squares], Squares]
Strength = Literal["slight", "strong"]


@dataclass(frozen=True)
class Plant:
    """A way to change images [N, S, S] in [0, 1]; `slight` ones are those that must be found."""

    name: str
    strength: Strength
    change: Change


def shifted(images_NSS: Squares, share: float) -> Squares:
    """Moved down and to the right by a share of the side, edges continued; by whole pixels, at least 1."""
    pixels = max(1, round(share * images_NSS.shape[-1]))
    padded = np.pad(images_NSS, ((0, 0), (pixels, 0), (pixels, 0)), mode="edge")
    return np.ascontiguousarray(padded[:, :-pixels, :-pixels])


def mirrored(images_NSS: Squares) -> Squares:
    """Left and right exchanged."""
    return np.ascontiguousarray(images_NSS[:, :, ::-1])


def rotated(images_NSS: Squares, degrees: float) -> Squares:
    """Turned about the centre, edges continued."""
    turned = ndimage.rotate(images_NSS, degrees, axes=(1, 2), reshape=False, order=1, mode="nearest")
    return np.asarray(turned, dtype=np.float32)


def blurred(images_NSS: Squares, share: float) -> Squares:
    """Blurred by a Gaussian whose deviation is a share of the side."""
    deviation = share * images_NSS.shape[-1]
    return np.asarray(ndimage.gaussian_filter(images_NSS, (0, deviation, deviation), mode="nearest"), np.float32)


def contrast(images_NSS: Squares, factor: float) -> Squares:
    """Contrast about mid-grey multiplied, clipped to [0, 1]."""
    return np.asarray(np.clip((images_NSS - 0.5) * factor + 0.5, 0.0, 1.0), dtype=np.float32)


def noisy(images_NSS: Squares, deviation: float) -> Squares:
    """With Gaussian noise, clipped to [0, 1]."""
    noise = np.random.default_rng(7).standard_normal(images_NSS.shape, dtype=np.float32)
    return np.asarray(np.clip(images_NSS + np.float32(deviation) * noise, 0.0, 1.0), dtype=np.float32)


def cropped(images_NSS: Squares, share: float) -> Squares:
    """The middle `share` of the side, enlarged to the whole."""
    count, side = images_NSS.shape[:2]
    at = (np.arange(side) + 0.5 - side / 2.0) * share + side / 2.0 - 0.5
    rows, columns = np.meshgrid(at, at, indexing="ij")
    out = np.empty_like(images_NSS)
    for number in range(count):
        out[number] = ndimage.map_coordinates(images_NSS[number], [rows, columns], order=1, mode="nearest")
    return out


def _all_of(*changes: Change) -> Change:
    def change(images_NSS: Squares) -> Squares:
        for one in changes:
            images_NSS = one(images_NSS)
        return images_NSS

    return change


# 2 px of 128.
_SHIFT, _ROTATION, _BLUR = partial(shifted, share=1 / 64), partial(rotated, degrees=3.0), partial(blurred, share=0.008)
_CONTRAST = partial(contrast, factor=1.2)

SLIGHT: tuple[Plant, ...] = tuple(
    Plant(name, "slight", change)
    for name, change in (
        ("as it is", lambda images: images),
        ("shifted by 1.6 %", _SHIFT),
        ("mirrored", mirrored),
        ("rotated by 3 degrees", _ROTATION),
        ("blurred by 0.8 %", _BLUR),
        ("contrast x 1.2", _CONTRAST),
        ("contrast x 0.7", partial(contrast, factor=0.7)),
        ("shifted and mirrored", _all_of(_SHIFT, mirrored)),
        ("rotated and blurred", _all_of(_ROTATION, _BLUR)),
        ("mirrored, rotated, contrast", _all_of(mirrored, _ROTATION, _CONTRAST)),
        ("all of these", _all_of(mirrored, _SHIFT, _ROTATION, _BLUR, _CONTRAST)),
    )
)
"""What must be found."""
STRONG: tuple[Plant, ...] = tuple(
    Plant(name, "strong", change)
    for name, change in (
        ("shifted by 6 %", partial(shifted, share=0.06)),
        ("rotated by 8 degrees", partial(rotated, degrees=8.0)),
        ("blurred by 1.6 %", partial(blurred, share=0.016)),
        ("contrast x 0.4", partial(contrast, factor=0.4)),
        ("noise of 0.08", partial(noisy, deviation=0.08)),
        ("cropped to 90 %", partial(cropped, share=0.9)),
        ("cropped, mirrored, noise", _all_of(partial(cropped, share=0.9), mirrored, partial(noisy, deviation=0.05))),
    )
)
"""How far it sees."""
