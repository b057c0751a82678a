"""The artefacts that images are made with and judged by: a generator, and what its recipe names. torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scanloom.artefact import Artefact, open_artefact
from scanloom.errors import ArtefactError, RecipeError
from scanloom.recipe_generate import Generate, Quality
from scanloom.sampling.gate import open_gate
from scanloom.sampling.plan import Order, PlanSpec, order, specify

_SCHEDULER = "scheduler/scheduler_config.json"
_TIMESTEPS = 1000
"""Of a scheduler of diffusers that does not say how many."""


@dataclass(frozen=True)
class Inputs:
    """A generator with its judges."""

    generator: Artefact
    probe: Artefact | None = None
    gate: Artefact | None = None
    most_steps: int | None = None
    """Of an image: the timesteps of the generator's noise schedule; None where its artefact has no schedule."""

    @property
    def artefacts(self) -> list[Artefact]:
        """Those that there are, as a manifest names them."""
        return [one for one in (self.generator, self.probe, self.gate) if one is not None]

    @property
    def uris(self) -> tuple[str | None, str | None]:
        """Where probe and gate lie; local ones absolute, as workers need them."""
        return self.probe.uri if self.probe else None, self.gate.uri if self.gate else None

    def order(self, section: Generate) -> Order:
        """What a recipe's `generate` section orders; see `plan.order`. RecipeError for more steps than there are."""
        self._require_steps(section)
        return order(section, *self._known)

    def specify(self, section: Generate) -> PlanSpec:
        """The plan of a recipe's `generate` section; see `plan.specify`. Raises as `order`."""
        self._require_steps(section)
        return specify(section, *self._known)

    def require_whole(self) -> None:
        """Raise ArtefactError where a file is missing or of another size; what is in them is not read."""
        for artefact in self.artefacts:
            there = {found.key: found.bytes for found in artefact.store.list()}
            for file in artefact.manifest.files:
                if there.get(file.path) != file.bytes:
                    raise ArtefactError(
                        f"{artefact.store.uri_of(file.path)}: "
                        + ("has another size than when it was written" if file.path in there else "is not there")
                        + "; make the artefact again"
                    )

    def _require_steps(self, section: Generate) -> None:
        if self.most_steps is not None and section.steps > self.most_steps:
            raise RecipeError(
                f"generate.steps={section.steps}: generator {self.generator.manifest.name} was trained on a schedule "
                f"of {self.most_steps} timesteps; set {self.most_steps} at most"
            )

    @property
    def _known(self) -> tuple[str, str, Mapping[str, Any], str | None, str | None]:
        manifest = self.generator.manifest
        return (
            manifest.name, self.generator.digest, manifest.statistics, self.probe.digest if self.probe else None,
            self.gate.digest if self.gate else None,
        )  # fmt: skip


def open_inputs(generator_uri: str, quality: Quality) -> Inputs:
    """The generator at a URI, and probe and gate that `quality` names.

    Raises ArtefactError where one is missing or damaged, or the gate is none of the generator's corpus; StoreError
    where it cannot be read.
    """
    generator = open_artefact(generator_uri, "generator")
    probe = open_artefact(quality.probe, "probe") if quality.probe is not None else None
    gate = open_gate(quality.gate, generator) if quality.gate is not None else None
    return Inputs(generator, probe, gate, _timesteps(generator))


def _timesteps(generator: Artefact) -> int | None:
    if all(file.path != _SCHEDULER for file in generator.manifest.files):
        return None
    try:
        timesteps = json.loads(generator.store.read(_SCHEDULER)).get("num_train_timesteps", _TIMESTEPS)
        if isinstance(timesteps, int) and timesteps > 0:
            return timesteps
    except (ValueError, AttributeError):
        pass
    raise ArtefactError(f"{generator.uri}: {_SCHEDULER} says not how many timesteps there are; publish it again")
