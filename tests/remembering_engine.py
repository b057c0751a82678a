"""Engines of jobs.generate whose generator remembers scans of the corpus behind its gate: half of its draws, or all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from scanloom.artefact import open_artefact
from scanloom.sampling.dataset import EngineActor, rows_from_bytes
from tests.made_gate import RememberingGenerator, train_scans


class HalfRemembering(EngineActor):
    """Takes the place of the actor that owns a generator."""

    SHARE = 0.5

    @cached_property
    def _engine(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        from scanloom.sampling.engine import Engine
        from scanloom.sampling.production import environment, judges, produce

        spec, _, device, _, probe_uri, gate_uri = self._arguments
        gate = open_artefact(gate_uri, "gate")
        scans = train_scans(open_artefact(gate.manifest.inputs[0].uri, "corpus"))
        engine, looking = Engine(RememberingGenerator(scans, self.SHARE), 4), judges(spec, probe_uri, device, gate_uri)

        def make(shard: dict[str, Any]) -> dict[str, Any]:
            made = produce(engine, spec, rows_from_bytes(shard["rows"]), looking)
            return shard | {
                "pixels": made.pixels.tobytes(), "height": made.pixels.shape[1], "width": made.pixels.shape[2],
                "attempts": made.attempts, "rejects": made.rejects, "engine_s": 0.0, "environment": environment(device),
            }  # fmt: skip

        return make


class AllRemembering(HalfRemembering):
    SHARE = 1.0
