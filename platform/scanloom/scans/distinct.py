"""How many different ones there are, in memory that does not grow with them.

`Distinct` keeps the smallest hashes (k minimum values: Bar-Yossef et al. 2002, "Counting distinct elements in a data
stream"): the count is exact up to its bound and an estimate beyond. `Seen` counts scans and tells whether they are of a
handful of patients or of more, which decides what of them may be shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BOUND = 1 << 16
"""Counts below it are exact; the standard error of an estimate is 1 / sqrt(BOUND), 0.4 %."""
FEW = 5
"""What fewer patients have in common may point at one of them, and is too little to train on."""

_HASHES = 2.0**64


def _none() -> npt.NDArray[np.uint64]:
    return np.empty(0, np.uint64)


@dataclass(frozen=True, eq=False)
class Distinct:
    """The smallest distinct hashes of a set, at most BOUND of them, sorted."""

    smallest: npt.NDArray[np.uint64] = field(default_factory=_none)

    @classmethod
    def of(cls, pseudonyms: Iterable[str]) -> Distinct:
        """The set of these pseudonyms: 16 hex digits each, evenly spread."""
        hashes = np.fromiter((int(name, 16) for name in pseudonyms), np.uint64)
        return cls(np.unique(hashes)[:BOUND])

    def __or__(self, other: Distinct) -> Distinct:
        return Distinct(np.union1d(self.smallest, other.smallest)[:BOUND])

    @property
    def exact(self) -> bool:
        return len(self.smallest) < BOUND

    @property
    def count(self) -> int:
        """How many there are: exactly, or the estimate from how densely the smallest hashes lie."""
        if self.exact:
            return len(self.smallest)
        return round((BOUND - 1) * _HASHES / float(self.smallest[-1]))

    def __str__(self) -> str:
        if self.exact:
            return f"{self.count:,}"
        digits = len(str(self.count))
        return f"about {round(self.count, 3 - digits):,}"


class Seen(NamedTuple):
    """How many scans, and the smallest pseudonyms of their patients: at most FEW."""

    scans: int = 0
    patients: tuple[str, ...] = ()

    def of(self, patient: str, scans: int = 1) -> Seen:
        """With some scans more of one patient."""
        if patient in self.patients:
            return Seen(self.scans + scans, self.patients)
        return self.joined(Seen(scans, (patient,)))

    def joined(self, other: Seen) -> Seen:
        patients = tuple(sorted({*self.patients, *other.patients})[:FEW])
        return Seen(self.scans + other.scans, patients)

    @property
    def is_common(self) -> bool:
        """Whether at least FEW patients have it."""
        return len(self.patients) == FEW
