"""The judge of copies, and which gate may judge a generator: one of all scans that it learned from. torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom import base
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
        # What is no number does not pass either.
        return [
            PASSES if alike <= self.tau else Verdict("gate", {"likeness": alike, "most": self.tau})
            for alike in self.likeness(pixels_NHW).tolist()
        ]


def open_gate(uri: str, generator: Artefact) -> Artefact:
    """The gate artefact at a URI, made of all that the generator learned from.

    Raises ArtefactError where there is none, where the generator learned from a corpus that it does not know, or
    where its lineage cannot be followed.
    """
    gate = open_artefact(uri, "gate")
    known = {entry.digest for entry in gate.manifest.inputs if entry.kind == "corpus"}
    learned_from = corpora_of(generator)
    if not learned_from or not learned_from <= known:
        raise ArtefactError(
            f"{gate.uri}: is a gate of corpus {_short(known)}, and generator {generator.uri} learned from "
            f"{_short(learned_from)}: it would miss copies; make the gate of what the generator learned from"
        )
    return gate


def corpora_of(artefact: Artefact) -> set[str]:
    """The digests of the corpora that an artefact learned from: as it says itself, else by following its lineage, also
    to the generator from which it was continued.

    The embedded base generator learned from nobody's scans. ArtefactError where the lineage cannot be followed.
    """
    statistics = artefact.manifest.statistics
    if "corpora" in statistics:
        return set(statistics["corpora"])
    if artefact.manifest.kind == "corpus":
        return {artefact.digest}
    if artefact.uri == base.URI:
        return set()
    found = {entry.digest for entry in artefact.manifest.inputs if entry.kind == "corpus"}
    for entry in artefact.manifest.inputs:
        if entry.kind != "corpus":
            found |= corpora_of(_parent(artefact, entry))
    if artefact.manifest.kind == "generator" and (start := continued_from(artefact.manifest.recipe)):
        found |= corpora_of(_opened(artefact, start, "start"))
    return found


def continued_from(recipe: Mapping[str, Any]) -> str | None:
    """URI of the generator from which a recipe's was continued."""
    start: str | None = (recipe.get("finetune") or {}).get("start_from")
    return start


def _parent(child: Artefact, entry: Lineage) -> Artefact:
    parent = _opened(child, entry.uri, entry.role)
    if parent.digest != entry.digest:
        raise ArtefactError(
            f"{child.uri}: its {entry.role} at {entry.uri} is {parent.digest[:12]} by now, not {entry.digest[:12]}; "
            "restore that one"
        )
    return parent


def _opened(child: Artefact, uri: str, role: str) -> Artefact:
    try:
        return open_artefact(uri)
    except ScanloomError as error:
        raise ArtefactError(
            f"{child.uri}: its {role} cannot be looked at ({error}), so that nobody knows which corpus it was "
            "made from, and whether the gate is of that; restore it"
        ) from error


def _short(digests: set[str]) -> str:
    return ", ".join(sorted(digest[:12] for digest in digests)) or "none"
