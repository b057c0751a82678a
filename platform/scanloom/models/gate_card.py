"""The card of a privacy gate: from where on an image counts as a copy, and how well that was found to work.

torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

CARD = "gate.json"


class Record(BaseModel):
    """What JSON holds, frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(Record):
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


class Planted(Record):
    """How many training scans, changed in one way, the gate refuses."""

    plant: str
    strength: Literal["slight", "strong"]
    refused: Share
    copies: int


class Calibration(Record):
    """From what likeness on an image counts as a copy, and the held-out patients that tell so."""

    tau: float
    """Likeness, a cosine, above which an image counts as a copy."""
    asked: float
    """Share of further patients of whom a scan may lie above it."""
    promised: float
    """What follows from so many patients; over `asked` where there are too few of them."""
    at_most: float
    """95 % bound of that share, over which patients happened to be held out."""
    calibration_patients: int
    calibration_scans: int


class GateCard(Calibration):
    """What a gate is and what was measured of it, on scans that neither its encoder nor its threshold saw."""

    format: Literal[1] = 1
    name: str
    size_px: int
    """Side of the squares that it looks at."""
    channels: tuple[int, ...]
    width: int
    seed: int
    """Of the encoder; another than that of the recipe's audit, which would else be blind where the gate is."""
    train_scans: int
    """In the index, all of them."""
    held_out: Share
    """Of scans of other held-out patients, refused: what the gate costs a generator that copies nobody."""
    held_out_scans: int
    power: tuple[Planted, ...]

    @property
    def lowest_slight(self) -> float:
        """The smallest share of slight planted copies that is refused, over the ways of planting; 0.0 where none."""
        return min((one.refused.value for one in self.power if one.strength == "slight"), default=0.0)


def blank_card(name: str, size_px: int, channels: Sequence[int], width: int, seed: int, train_scans: int) -> GateCard:
    """The card of a gate that nothing is known of yet: it lets everything through."""
    unknown = Share(value=0.0, low=0.0, high=1.0)
    return GateCard(
        name=name, size_px=size_px, channels=tuple(channels), width=width, seed=seed, train_scans=train_scans,
        tau=2.0, asked=1.0, promised=1.0, at_most=1.0, calibration_patients=0, calibration_scans=0,
        held_out=unknown, held_out_scans=0, power=(),
    )  # fmt: skip
