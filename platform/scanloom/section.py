"""A block of a recipe: a frozen pydantic model that refuses unknown keys by naming the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class UnknownKey(ValueError):
    """A section has no such key; `key` is the one found."""

    def __init__(self, key: str, known: Mapping[str, object]) -> None:
        super().__init__(f"unknown key {key!r}{nearest(key, known)}")
        self.key = key


class Section(BaseModel):
    """A frozen block of a recipe that refuses unknown keys by naming the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_nearest_key(cls, data: object) -> object:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise UnknownKey(str(key), cls.model_fields)
        return data


class DataParallel(Section):
    """How a network is trained on scans by several workers at once, each on a part of every batch."""

    steps: Count
    batch_size: Count
    max_scans: Count
    workers: Count = 1
    cpus_per_worker: Count = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 3
    checkpoint_every_steps: Count = 200

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of workers {self.workers}")
        return self


def nearest(word: str, known: Mapping[str, object] | Sequence[str]) -> str:
    """A hint such as `; did you mean 'steps'?`, or the list of what is known when nothing is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(sorted(known))}"


def first_faults(error: ValidationError) -> str:
    """The first few faults in one line, each with the place of its value."""
    faults = []
    for fault in error.errors(include_url=False)[:4]:
        place = ".".join(str(part) for part in fault["loc"]) or "top level"
        shown = "" if isinstance(fault["input"], (dict, list)) else f" (got {fault['input']!r})"
        faults.append(f"{place}: {fault['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(faults)
