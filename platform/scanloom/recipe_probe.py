"""What a recipe says of the probe: the small network that reads attributes off images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scanloom.section import Count, DataParallel, Positive


class Probe(DataParallel):
    """A classifier trained on the corpus, against which a dataset's images are checked."""

    size_px: Annotated[int, Field(ge=16)] = 128
    """It looks at squares of this side, or of the corpus's where that is smaller."""
    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 32, 64, 64)
    """Each level halves the side; those that would leave fewer than 4 px are left out."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    false_reject_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Of held-out real scans with an attribute, at most so many would be refused for it."""
    steps: Count = 600
    batch_size: Count = 64
    learning_rate: Positive = 2e-3
    shift: Annotated[float, Field(ge=0, le=0.25)] = 0.05
    """Scans are moved by up to this share of the side while it learns."""
    max_scans: Count = 50000
    """Of the train split, and of the validation split, which it is judged by."""
