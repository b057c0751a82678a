"""The artefacts that images are made with and judged by: a generator, and what its recipe names. torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scanloom.artefact import Artefact, open_artefact
from scanloom.recipe_generate import Generate, Quality
from scanloom.sampling.gate import open_gate
from scanloom.sampling.plan import Order, PlanSpec, order, specify


@dataclass(frozen=True)
class Inputs:
    """A generator with its judges."""

    generator: Artefact
    probe: Artefact | None = None
    gate: Artefact | None = None

    @property
    def artefacts(self) -> list[Artefact]:
        """Those that there are, as a manifest names them."""
        return [one for one in (self.generator, self.probe, self.gate) if one is not None]

    @property
    def uris(self) -> tuple[str | None, str | None]:
        """Where probe and gate lie; local ones absolute, as workers need them."""
        return self.probe.uri if self.probe else None, self.gate.uri if self.gate else None

    def order(self, section: Generate) -> Order:
        """What a recipe's `generate` section orders; see `plan.order`."""
        return order(section, *self._known)

    def specify(self, section: Generate) -> PlanSpec:
        """The plan of a recipe's `generate` section; see `plan.specify`."""
        return specify(section, *self._known)

    @property
    def _known(self) -> tuple[str, str, Mapping[str, Any], str | None, str | None]:
        manifest = self.generator.manifest
        return (
            manifest.name, self.generator.digest, manifest.statistics, self.probe.digest if self.probe else None,
            self.gate.digest if self.gate else None,
        )  # fmt: skip


def open_inputs(generator_uri: str, quality: Quality) -> Inputs:
    """The generator at a URI, and probe and gate that `quality` names.

    Raises ArtefactError where one is missing or damaged, or the gate is none of the generator's corpus.
    """
    generator = open_artefact(generator_uri, "generator")
    probe = open_artefact(quality.probe, "probe") if quality.probe is not None else None
    gate = open_gate(quality.gate, generator) if quality.gate is not None else None
    return Inputs(generator, probe, gate)
