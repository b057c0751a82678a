"""Views of a scan: the plain one and, by recipe, crops and mirror images, each a training row of its own.

Which square a crop cuts is a function of (seed, image bytes, crop), so that a shard encoded twice is the same shard
and equal images have equal views.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scanloom.recipe import Encode
from scanloom.recipe_train import Canaries


@dataclass(frozen=True)
class View:
    """One way to look at a scan."""

    number: int
    """0: the plain view."""
    crop: int
    """0: the whole scan."""
    mirrored: bool

    def row_id(self, scan: str) -> str:
        """The scan's own id for the plain view, and with its number for the others."""
        return f"{scan}-{self.number}" if self.number else scan


PLAIN = View(0, 0, mirrored=False)


def views(recipe: Encode, split: str) -> tuple[View, ...]:
    """The views of a scan of a split: all of them to train on, the plain one for everything else."""
    if split != "train":
        return (PLAIN,)
    sides = (False, True) if recipe.flips else (False,)
    kinds = [(crop, side) for crop in range(recipe.crops + 1) for side in sides]
    return tuple(View(number, crop, mirrored) for number, (crop, mirrored) in enumerate(kinds))


def times_trained(canaries: Canaries | None, scan: str) -> int:
    """How often each view of a train scan is a row, by its id alone, so that whoever has a scan knows."""
    if canaries is None:
        return 1
    drawn = int.from_bytes(hashlib.sha256(scan.encode()).digest()[:8], "big") / 2**64
    return canaries.times[int(drawn / canaries.share * len(canaries.times))] if drawn < canaries.share else 1


@dataclass(frozen=True)
class Distinct:
    """The different pictures among the views of some scans: each is encoded once, whichever rows show it."""

    pictures: list[tuple[bytes, View]] = field(default_factory=list)
    """PNG bytes and what of them is seen, in the order of first appearance."""
    rows: list[tuple[int, int, View]] = field(default_factory=list)
    """For each row: its scan, its picture, its view."""

    @classmethod
    def of(cls, images: Sequence[bytes], seen: Sequence[View]) -> Distinct:
        """The views `seen` of PNG images."""
        distinct, known = cls(), dict[tuple[bytes, int], int]()
        for scan, image in enumerate(images):
            digest = hashlib.sha256(image).digest()
            for view in seen:
                picture = known.setdefault((digest, view.number), len(known))
                if picture == len(distinct.pictures):
                    distinct.pictures.append((image, view))
                distinct.rows.append((scan, picture, view))
        return distinct


def full_range(pixels: NDArray[np.unsignedinteger]) -> NDArray[np.float32]:
    """Pixels as float32 in [-1, 1], black and white of their type at the ends."""
    scaled: NDArray[np.float32] = (pixels / (np.iinfo(pixels.dtype).max / 2.0) - 1.0).astype(np.float32)
    return scaled


def look(scan: NDArray[np.float32], view: View, draw: tuple[int, ...], crop_share: float) -> NDArray[np.float32]:
    """What a view shows of a scan [H, W] in [-1, 1], in the same shape and range; `draw` seeds its crop."""
    shown = _cut(scan, np.random.default_rng((*draw, view.crop)), crop_share) if view.crop else scan
    return np.ascontiguousarray(shown[:, ::-1]) if view.mirrored else shown


def _cut(scan: NDArray[np.float32], random: np.random.Generator, crop_share: float) -> NDArray[np.float32]:
    height, width = scan.shape
    share = random.uniform(crop_share, 1.0)
    top, left = random.uniform(0.0, 1.0 - share, 2)
    box = (left * width, top * height, (left + share) * width, (top + share) * height)
    resized = Image.fromarray(scan).resize((width, height), Image.Resampling.BICUBIC, box=box)
    cut: NDArray[np.float32] = np.clip(np.asarray(resized, np.float32), -1.0, 1.0)
    return cut
