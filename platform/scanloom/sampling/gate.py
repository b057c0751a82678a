"""The judge of copies, and which gate may judge a generator: one of scans that it learned from. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom.artefact import Artefact, Lineage, open_artefact
from scanloom.attributes import Attributes
from scanloom.errors import ArtefactError, ScanloomError
from scanloom.sampling.quality import PASSES, Verdict

UNGATED = "ungated"
"""What images say of themselves that no gate looked at; else the gate's digest."""


@dataclass(frozen=True)
class Privacy:
    """The judge of images that are too alike to a training scan, as a gate sees them.

    `likeness` gives the cosine [N] of each image and the training scan that is nearest to it.
    """

    tau: float
    likeness: Callable[[NDArray[Any]], NDArray[np.float64]]

    def __call__(self, pixels_NHW: NDArray[Any], requested: Sequence[Attributes]) -> list[Verdict]:
        return [
            Verdict("gate", {"likeness": alike, "most": self.tau}) if alike > self.tau else PASSES
            for alike in self.likeness(pixels_NHW).tolist()
        ]


def open_gate(uri: str, generator: Artefact) -> Artefact:
    """The gate artefact at a URI, made of a corpus that the generator learned from.

    Raises ArtefactError where there is none, where it is of another corpus, or where the generator's lineage cannot be
    followed.
    """
    gate = open_artefact(uri, "gate")
    known = {entry.digest for entry in gate.manifest.inputs if entry.kind == "corpus"}
    learned_from = set(_corpora(generator))
    if not known & learned_from:
        raise ArtefactError(
            f"{gate.uri}: is a gate of corpus {_short(known)}, and generator {generator.uri} learned from "
            f"{_short(learned_from)}: it would miss every copy; make the gate of the generator's corpus"
        )
    return gate


def _corpora(artefact: Artefact) -> Iterator[str]:
    """The digests of the corpora that an artefact was made from, by following its lineage."""
    seen: set[str] = set()
    waiting = [(artefact, entry) for entry in artefact.manifest.inputs]
    while waiting:
        child, entry = waiting.pop()
        if entry.digest in seen:
            continue
        seen.add(entry.digest)
        if entry.kind == "corpus":
            yield entry.digest
            continue
        parent = _parent(child, entry)
        waiting += [(parent, one) for one in parent.manifest.inputs]


def _parent(child: Artefact, entry: Lineage) -> Artefact:
    try:
        parent = open_artefact(entry.uri)
    except ScanloomError as error:
        raise ArtefactError(
            f"{child.uri}: its {entry.role} cannot be looked at ({error}), so that nobody knows which corpus it was "
            "made from, and whether the gate is of that; restore it"
        ) from error
    if parent.digest != entry.digest:
        raise ArtefactError(
            f"{child.uri}: its {entry.role} at {entry.uri} is {parent.digest[:12]} by now, not {entry.digest[:12]}; "
            "restore that one"
        )
    return parent


def _short(digests: set[str]) -> str:
    return ", ".join(sorted(digest[:12] for digest in digests)) or "none"
