"""The card of a probe: what it reads, how well on held-out scans, and from where on an image disagrees. torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from scanloom.attributes import Attributes, AttributeSchema
from scanloom.errors import ArtefactError
from scanloom.recipe import NumberAttribute

CARD = "probe.json"
WEIGHTS = "probe.safetensors"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(_Record):
    """One number that the network says of an image: how likely a value or label is, or the number itself."""

    attribute: str
    value: str | None
    """None: the attribute is a number."""

    @cached_property
    def name(self) -> str:
        return self.attribute if self.value is None else f"{self.attribute}={self.value}"

    def said_by(self, attributes: Attributes) -> float:
        """What they say of it: 0 or 1 of a value or label, a number as it is; NaN where it is not known."""
        value = attributes.get(self.attribute)
        if value is None or isinstance(value, float):
            return math.nan if value is None else value
        return float(self.value in value if isinstance(value, tuple) else self.value == value)


class Reading(_Record):
    """How well one output is read on held-out scans."""

    name: str
    figure: Literal["auc", "mae"]
    """Area under the ROC curve, or mean absolute error in the attribute's unit."""
    estimate: float | None
    """None: the held-out scans have it nowhere or everywhere."""
    low: float | None
    high: float | None
    """Its 95 % interval."""
    chance: float | None
    """What knowing nothing gives: 0.5, or the error of always saying the train split's median."""
    scans: int
    """Held-out scans of which it is known."""
    with_it: int
    """Those of them that have the value or label; all, of a number."""
    better_than_chance: bool


class Check(_Record):
    """From where on an image disagrees with a request, found on held-out scans of which that is true."""

    attribute: str
    value: str | None
    """A category's value or a label; None: the number."""
    present: bool = True
    """False: the request says that the label is not there."""
    scans: int
    """Held-out scans that could be asked so truthfully."""
    limit: float | None
    """Agreement below it is a disagreement. None: not checked, `reason` says why."""
    rejected_share: float | None
    """Share of those scans that it would reject."""
    reason: Literal["", "no better than chance", "too few held-out scans"] = ""

    @cached_property
    def name(self) -> str:
        if self.value is None or self.present:
            return self.reading
        return f"{self.attribute} without {self.value}"

    @cached_property
    def reading(self) -> str:
        """Name of the output that it looks at."""
        return Output(attribute=self.attribute, value=self.value).name

    def concerns(self, asked: Attributes) -> bool:
        """Whether a request says what this check is about."""
        value = asked.get(self.attribute)
        if isinstance(value, tuple):
            return (self.value in value) == self.present
        return value is not None and (self.value is None or value == self.value)


class ProbeCard(_Record):
    """All of a probe but its weights."""

    name: str
    attributes: AttributeSchema
    size_px: int
    """It looks at squares of this side; other images are resampled by area."""
    channels: tuple[int, ...]
    scales: Mapping[str, tuple[float, float]]
    """Mean and deviation of each number in the train split."""
    false_reject_share: float
    """Of held-out scans with an attribute, at most so many would be rejected for it."""
    trained_scans: int
    held_out_scans: int
    readings: tuple[Reading, ...] = ()
    checks: tuple[Check, ...] = ()

    @cached_property
    def outputs(self) -> tuple[Output, ...]:
        """What the network's outputs mean, in their order."""
        return outputs_of(self.attributes)

    @cached_property
    def columns(self) -> Mapping[str, int]:
        """Name of an output -> its place."""
        return {output.name: place for place, output in enumerate(self.outputs)}

    def agreement(self, check: Check, outputs_O: NDArray[np.floating[Any]], asked: Attributes) -> float:
        """How much a reading agrees with a request: a likelihood, or minus the distance of a number."""
        read = float(outputs_O[self.columns[check.reading]])
        if check.value is None:
            wanted = asked[check.attribute]
            assert isinstance(wanted, float)
            return -abs(read - wanted)
        return read if check.present else 1.0 - read

    def require_fits(self, schema: AttributeSchema, where: str) -> None:
        """Raise ArtefactError where a dataset of `schema` has another idea of an attribute that this probe checks."""
        for name in sorted({check.attribute for check in self.checks if check.limit is not None}):
            ours, other = self.attributes[name], schema[name] if name in schema.names else None
            if other is None or (ours.kind, getattr(ours, "values", None)) != (
                other.kind, getattr(other, "values", None),
            ):  # fmt: skip
                raise ArtefactError(
                    f"{where}: reads attribute {name!r}, which the generator does not have, or with other values; "
                    "train the probe on the generator's corpus"
                )


def outputs_of(schema: AttributeSchema) -> tuple[Output, ...]:
    """One output a number, one a value of a category, one a label; in schema order."""
    outputs: list[Output] = []
    for declaration in schema.declarations:
        values: Sequence[str | None] = (None,) if isinstance(declaration, NumberAttribute) else declaration.values
        outputs += [Output(attribute=declaration.name, value=value) for value in values]
    return tuple(outputs)


def said_by(outputs: Sequence[Output], rows: Sequence[Attributes]) -> NDArray[np.float64]:
    """What rows say of each output, float64 [N, O]; NaN where it is not known."""
    said = [[output.said_by(row) for output in outputs] for row in rows]
    return np.array(said, dtype=np.float64).reshape(len(rows), len(outputs))
