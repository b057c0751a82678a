"""The pixels of a shard: what one generation actor does, without knowing of Ray.

Pixels are quantised here, once; everything after handles integers.

An image that the judges refuse is drawn again from the noise of its next attempt, at once, in the running engine. What
comes of an image depends on (plan, index) alone, but for one rule within a shard: see `give_up_after`.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from scanloom.errors import ArtefactError
from scanloom.heap import keep_freed_memory
from scanloom.models.attribute_probe import Probe, load_probe
from scanloom.models.generator import load_generator
from scanloom.models.privacy_gate import PrivacyGate, load_gate
from scanloom.recipe import Quality
from scanloom.sampling.dataset import Pixels, rows_from_bytes
from scanloom.sampling.decoding import NotNumbers
from scanloom.sampling.draw import CELL_PREFIX
from scanloom.sampling.engine import Engine, ImageRequest, is_batch_invariant
from scanloom.sampling.gate import Privacy
from scanloom.sampling.plan import PlanSpec
from scanloom.sampling.quality import Agreement, Appearance, Judge, Verdict, verdicts

HOPELESS_DRAWS = 32
"""Refusals in a row after which, with 95 % confidence, fewer than one draw in eleven would pass."""
_LEAST_IMAGES = 4


@dataclass(frozen=True)
class Produced:
    """What came of a shard's rows."""

    pixels: Pixels
    """[N, H, W] of the N images that entered, in the rows' order; [0, 0, 0] where none did."""
    attempts: list[int]
    """Which attempt of each entered."""
    rejects: list[dict[str, Any]]
    """`index`, `attempt`, `reason` and `figures` of every refusal, by index and attempt. An image that was not made
    ends with `infeasible` and the number of its attempts, 0 where its cell was given up before it was tried."""


class ShardEngine:
    """Makes the pixels of one shard a call. Raises ArtefactError where an artefact is damaged or not the plan's."""

    def __init__(
        self, spec: PlanSpec, generator_uri: str, device: str, threads: int, probe_uri: str | None = None,
        gate_uri: str | None = None,
    ) -> None:  # fmt: skip
        fix_arithmetic(threads)
        keep_freed_memory()
        generator = load_generator(generator_uri, device, precision=spec.precision, compiled=spec.compiled)
        _require_planned("generator", generator_uri, generator.digest, spec.generator)
        self._spec = spec
        self._engine = Engine(generator, spec.slots, spec.solver)
        self._judges = judges(spec, probe_uri, device, gate_uri)
        invariant = is_batch_invariant(generator, spec.slots)
        self.environment = environment(device) | {"batch_invariant": invariant}

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Of `shard` (int) and `rows` (plan rows as Arrow IPC): these, what `Produced` holds, and how it went."""
        started = time.monotonic()
        made = produce(self._engine, self._spec, rows_from_bytes(shard["rows"]), self._judges)
        return shard | {
            "pixels": made.pixels.tobytes(),
            "height": made.pixels.shape[1],
            "width": made.pixels.shape[2],
            "attempts": made.attempts,
            "rejects": made.rejects,
            "engine_s": time.monotonic() - started,
            "environment": self.environment,
        }

    def again(self, row: Mapping[str, Any]) -> Pixels:
        """[H, W]: one image from the attempt that its row names, unjudged."""
        [made] = self._engine.run([request(self._spec, row)])
        return quantise(made.image, self._spec.bits_stored)


def judges(spec: PlanSpec, probe_uri: str | None, device: str, gate_uri: str | None = None) -> list[Judge]:
    """Who decides what enters a dataset, in the order in which they look.

    Raises ArtefactError where the plan's probe is not at `probe_uri`, or reads what the plan does not know, and where
    its gate is not at `gate_uri`.
    """
    probe = gate = None
    if spec.probe is not None:
        if probe_uri is None:
            raise ArtefactError(f"the plan of {spec.dataset} is checked by probe {spec.probe[:12]}; say where it lies")
        probe = load_probe(probe_uri, device)
        _require_planned("probe", probe_uri, probe.digest, spec.probe)
        probe.card.require_fits(spec.attributes, probe_uri)
    if spec.gate is not None:
        if gate_uri is None:
            raise ArtefactError(f"the plan of {spec.dataset} is judged by gate {spec.gate[:12]}; say where it lies")
        gate = load_gate(gate_uri, device)
        _require_planned("gate", gate_uri, gate.digest, spec.gate)
    return judges_of(spec.quality, spec.bits_stored, probe, gate)


def judges_of(quality: Quality, bits_stored: int, probe: Probe | None, gate: PrivacyGate | None = None) -> list[Judge]:
    """Who judges images of so many bits, in the order in which they look."""
    found: list[Judge] = [Appearance(quality, bits_stored)]
    if probe is not None:
        found.append(Agreement(probe.card, lambda pixels: probe.read(pixels, bits_stored)))
    if gate is not None:
        found.append(Privacy(gate.card.tau, lambda pixels: gate.likeness(pixels, bits_stored)))
    return found


def give_up_after(attempts: int) -> int:
    """Where so many images of a cell, one after the other in a shard's order, could not be made in as many attempts
    each, its later images in that shard are infeasible untried.

    An order of a million must not spend all attempts on what a generator cannot do. At least HOPELESS_DRAWS draws were
    refused by then.
    """
    return max(_LEAST_IMAGES, -(-HOPELESS_DRAWS // attempts))


def produce(engine: Engine, spec: PlanSpec, rows: pa.Table, judges: Sequence[Judge]) -> Produced:
    """Make a shard's images, each as often as it takes, with the engine's slots full while there is work.

    Raises ArtefactError where every draw of a shard, HOPELESS_DRAWS or more, is made of what are no numbers.
    """
    orders = [_Order(place, request(spec, row), _cell(row)) for place, row in enumerate(rows.to_pylist())]
    by_index = {order.wanted.index: order for order in orders}
    line = _Line(orders, spec.quality.attempts)
    broken: NotNumbers | None = None
    while line or engine.busy:
        line.feed(engine)
        try:
            finished = engine.step()
        except NotNumbers as error:
            broken = error
            order = by_index[error.request.index]
            order.take(None, Verdict("not-numbers"))
            line.settle(order, engine)
            continue
        if not finished:
            continue
        images = np.stack([quantise(f.image, spec.bits_stored) for f in finished])
        told = verdicts(judges, images, [f.request.attributes for f in finished])
        for made, image, verdict in zip(finished, images, told, strict=True):
            order = by_index[made.request.index]
            order.take(image, verdict)
            line.settle(order, engine)
    rejects = [reject for order in orders for reject in order.told()]
    entered = [order for order in orders if order.pixels is not None]
    if broken is not None and not entered and _all_broken(rejects):
        raise broken
    pixels = [order.pixels for order in entered if order.pixels is not None]
    return Produced(
        np.stack(pixels) if pixels else np.zeros((0, 0, 0), np.uint8 if spec.bits_stored == 8 else np.uint16),
        [len(order.rejects) for order in entered],
        rejects,
    )


@dataclass
class _Order:
    """One row of a shard, on its way to an image."""

    place: int
    wanted: ImageRequest
    """As it is drawn now, or next."""
    cell: tuple[int, ...]
    rejects: list[dict[str, Any]] = field(default_factory=list)
    pixels: Pixels | None = None
    infeasible: bool = False

    @property
    def settled(self) -> bool:
        return self.infeasible or self.pixels is not None

    def take(self, image: Pixels | None, verdict: Verdict) -> None:
        """What was drawn and what the judges say of it; nobody waits for it where the order was given up."""
        if self.infeasible:
            return
        if verdict.reason is None:
            self.pixels = image
            return
        refused = {"index": self.wanted.index, "attempt": self.wanted.attempt}
        self.rejects.append(refused | {"reason": verdict.reason, "figures": dict(verdict.figures)})
        self.wanted = replace(self.wanted, attempt=self.wanted.attempt + 1)

    def give_up(self) -> None:
        """Forget all that was drawn."""
        self.infeasible, self.pixels, self.rejects = True, None, []

    def told(self) -> list[dict[str, Any]]:
        """The order's part of `Produced.rejects`."""
        if not self.infeasible:
            return self.rejects
        last = {"index": self.wanted.index, "attempt": len(self.rejects), "reason": "infeasible", "figures": {}}
        return [*self.rejects, last]


class _Line:
    """What is to be drawn next: what a cell's verdict hangs on first, then the rest, by the shard's order.

    The order changes what a shard costs and never what it holds: which images are given up follows from the outcomes
    in the shard's order, and what was drawn of them in the meantime is thrown away.
    """

    def __init__(self, orders: Sequence[_Order], attempts: int) -> None:
        self._attempts, self._most = attempts, give_up_after(attempts)
        self._cells: dict[tuple[int, ...], list[_Order]] = {}
        for order in orders:
            self._cells.setdefault(order.cell, []).append(order)
        self._failing: set[tuple[int, ...]] = set()
        self._next = [(0, order.place, order) for order in orders]

    def __bool__(self) -> bool:
        while self._next and self._next[0][2].infeasible:
            heapq.heappop(self._next)
        return bool(self._next)

    def feed(self, engine: Engine) -> None:
        """Submit as much as finds free slots, and no more: what is refused meanwhile may go first."""
        while self and engine.waiting < engine.free_slots() // self._next[0][2].wanted.slots:
            engine.submit(heapq.heappop(self._next)[2].wanted)

    def settle(self, order: _Order, engine: Engine) -> None:
        """Take note of a verdict: line the order up again, or see what its cell comes to."""
        if order.infeasible:
            return
        cell = self._cells[order.cell]
        if order.pixels is None and len(order.rejects) < self._attempts:
            before = sum(1 for other in cell if other.place < order.place and not other.settled)
            heapq.heappush(self._next, (0 if before < self._most else 1, order.place, order))
            return
        if order.pixels is None:
            order.infeasible = True
            self._failing.add(order.cell)
        for lost in _without_hope(cell, self._most) if order.cell in self._failing else ():
            lost.give_up()
            engine.cancel(lost.wanted)


def _without_hope(cell: Sequence[_Order], most: int) -> Iterator[_Order]:
    """Those after the first `most` infeasible ones in a row, as far as is known."""
    in_a_row = 0
    for order in cell:
        if in_a_row >= most:
            yield order
        elif not order.settled:
            return
        else:
            in_a_row = in_a_row + 1 if order.infeasible else 0


def _all_broken(rejects: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nothing else ever came, often enough to blame the weights and not one request."""
    draws = [reject["reason"] for reject in rejects if reject["reason"] != "infeasible"]
    return len(draws) >= HOPELESS_DRAWS and set(draws) == {"not-numbers"}


def _cell(row: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(value for name, value in row.items() if name.startswith(CELL_PREFIX))


def request(spec: PlanSpec, row: Mapping[str, Any]) -> ImageRequest:
    """What the engine is to make for a row of the plan (its first attempt) or of the finished dataset."""
    attributes = spec.attributes.from_row(row)
    return ImageRequest(row["index"], spec.seed, attributes, spec.steps, spec.guidance_scale, row.get("attempt", 0))


def quantise(image: NDArray[np.float32], bits_stored: int) -> Pixels:
    """[H, W] uint8 (8 bits stored) or uint16 of an image [1, H, W] in [0, 1]; the full range of the bits is used."""
    levels: NDArray[np.float64] = np.rint(np.clip(image[0].astype(np.float64), 0.0, 1.0) * (2**bits_stored - 1))
    return levels.astype(np.uint8) if bits_stored == 8 else levels.astype(np.uint16)


def fix_arithmetic(threads: int) -> None:
    """Make this process's arithmetic repeatable: a set number of threads, no choice of kernels by timing."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def environment(device: str) -> dict[str, Any]:
    """What pixels depend on in their last bits, beside the plan."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _require_planned(what: str, uri: str, found: str, planned: str) -> None:
    if found != planned:
        raise ArtefactError(f"{uri}: is {what} {found[:12]}, the plan is for {planned[:12]}; restore that one")
