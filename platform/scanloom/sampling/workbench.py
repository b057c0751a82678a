"""A generator that is ready to make single images: its engine, and who judges what it makes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scanloom.heap import keep_freed_memory
from scanloom.models.attribute_probe import load_probe
from scanloom.models.generator import Precision, load_generator
from scanloom.models.privacy_gate import load_gate
from scanloom.recipe import Quality
from scanloom.sampling.admission import Pace
from scanloom.sampling.batch import Denoiser
from scanloom.sampling.bookings import Capacity
from scanloom.sampling.dataset import Pixels
from scanloom.sampling.decoding import FinishedImage
from scanloom.sampling.engine import GPU_DECODE_ROWS, Engine, ImageRequest
from scanloom.sampling.gate import UNGATED
from scanloom.sampling.inputs import open_inputs
from scanloom.sampling.production import environment, fix_arithmetic, judges_of, quantise
from scanloom.sampling.quality import Judge, Verdict, verdicts
from scanloom.sampling.solvers import SolverName

CPU_ROWS, CPU_DECODE_ROWS = 4, 2
"""Of a call, where somebody waits for the image: idle rows cost as much as others on a CPU."""
_WARM_STEPS, _WARM_ROUNDS = 4, 3


@dataclass(frozen=True)
class Workbench:
    """What a desk makes a generator's images with."""

    generator: Denoiser
    engine: Engine
    digest: str
    """Of the generator artefact."""
    judges: Callable[[int], Sequence[Judge]]
    """Who looks at images of so many bits."""
    attempts: int
    """At one image, at most."""
    environment: Mapping[str, Any]
    gate: str = UNGATED
    """Digest of the privacy gate among the judges."""

    def look(self, finished: Sequence[FinishedImage], bits_stored: int) -> list[tuple[Pixels, Verdict]]:
        """Of images of one size the pixels [H, W] that are handed out, and what the judges say of them."""
        pixels = np.stack([quantise(each.image, bits_stored) for each in finished])
        told = verdicts(self.judges(bits_stored), pixels, [each.request.attributes for each in finished])
        return list(zip(pixels, told, strict=True))

    def warm_up(self) -> Capacity:
        """Make images of nothing in particular; what the engine can take, and how fast it makes images of its own size.

        The first image sees to it that nothing is done for the first time when somebody waits. Raises NotNumbers where
        the generator makes no images.
        """
        self._timed(1)
        # The best of some: the host may stand still for a moment.
        one, more = (min(self._timed(steps) for _ in range(_WARM_ROUNDS)) for steps in (1, _WARM_STEPS))
        call_s = max((more - one) / (_WARM_STEPS - 1), one / 10)
        pace = Pace(call_s, max(one - call_s, 0.0))
        return Capacity(self.engine.slots, self.engine.rows, self.generator.latent_shape, pace)

    def _timed(self, steps: int) -> float:
        started = time.perf_counter()
        self.look(list(self.engine.run([ImageRequest(0, 0, {}, steps)])), 8)
        return time.perf_counter() - started


def open_workbench(
    uri: str,
    *,
    slots: int,
    solver: SolverName = "dpmpp-2m",
    precision: Precision = "fp32",
    compiled: bool = False,
    quality: Quality | None = None,
    rows: int | None = None,
    device: str = "cpu",
    threads: int = 1,
) -> Workbench:
    """The generator at a URI, and probe and gate that `quality` names, loaded.

    `rows` of a call of the denoiser: None is CPU_ROWS on a CPU, on a GPU the slots. Where they are those of a dataset's
    engine, so are the images' bits.

    Raises ArtefactError where one is missing, damaged or does not fit the other; StoreError where it cannot be read.
    """
    fix_arithmetic(threads)
    keep_freed_memory()
    quality = quality or Quality()
    inputs = open_inputs(uri, quality)
    generator = load_generator(uri, device, precision=precision, compiled=compiled)
    probe = load_probe(quality.probe, device) if quality.probe is not None else None
    if probe is not None:
        probe.card.require_fits(generator.schema, str(quality.probe))
    gate = load_gate(inputs.gate.uri, device) if inputs.gate is not None else None
    on_cpu = device == "cpu"
    engine = Engine(
        generator,
        slots,
        solver,
        rows=rows or (min(slots, CPU_ROWS) if on_cpu else None),
        decode_rows=CPU_DECODE_ROWS if on_cpu else None,
        # Many images at once: whoever waits for company to be decoded does not wait long.
        eager_below=max(2, slots // 2) if on_cpu else GPU_DECODE_ROWS,
    )
    told = environment(device) | {"rows": engine.rows}
    return Workbench(
        generator, engine, generator.digest, lambda bits: judges_of(quality, bits, probe, gate), quality.attempts, told,
        gate.digest if gate is not None else UNGATED,
    )  # fmt: skip
