"""The engine: images at their own places of their own trajectories share one denoiser batch.

`step()` is one denoiser call for all that is running; an image that finishes leaves its slots to the next in line,
which starts at the following step (step-level continuous batching). Images of another size have a batch of their own,
and the batches take turns. Decoding is a stage of its own (sampling.decoding).

Denoiser and decoder always see the same batch shape, and conditions are made one image at a time: on one configuration
of device and threads an image's bits do not depend on who shares the batch. That needs kernels that treat all rows of
a batch alike, which CPU kernels on one thread do; `is_batch_invariant` finds out for others. The rows of a
call are the slots, on a CPU CPU_ROWS at most: another number of rows may change the last bits (docs/engine.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from scanloom.errors import RecipeError
from scanloom.sampling.batch import Batch, Shape, on
from scanloom.sampling.batch import Denoiser as Denoiser
from scanloom.sampling.batch import ImageRequest as ImageRequest
from scanloom.sampling.decoding import Decoder
from scanloom.sampling.decoding import FinishedImage as FinishedImage
from scanloom.sampling.noise import gaussian_noise
from scanloom.sampling.solvers import SolverName, Trajectory, trajectory

CPU_ROWS = 32
"""Of a call of the denoiser on a CPU, at most; more slots take several calls, which costs nothing there."""
CPU_DECODE_ROWS, GPU_DECODE_ROWS = 4, 8
"""Of a call of the decoder, which takes much more memory a row."""
AHEAD = 1
"""Steps that the GPU has still to do when another is handed to it: enough that it never waits for the host, and few
enough that a newcomer does not wait for many."""


class Engine:
    """One generator on one device with a fixed number of slots for each size of image."""

    def __init__(
        self,
        generator: Denoiser,
        slots: int,
        solver: SolverName = "dpmpp-2m",
        *,
        rows: int | None = None,
        decode_rows: int | None = None,
        eager_below: int = 0,
    ) -> None:
        """`rows` and `decode_rows` are the batches that denoiser and decoder see; None is best for the device.

        Where fewer images than `eager_below` are on their way, finished ones are decoded at once, in a batch that is
        not full, for latency; with 0, where no other of their size is.
        """
        if slots < 1:
            raise RecipeError(f"slots={slots}: an engine needs at least one")
        self._generator = generator
        self._solver: SolverName = solver
        self._slots = slots
        self._device = generator.null_condition(1).device
        self._rows, decode_rows = _rows(self._device, slots, rows, decode_rows)
        self._eager_below = eager_below
        self._trajectories: dict[int, Trajectory] = {}
        self._batches: dict[Shape, Batch] = {}
        self._decoder = Decoder(generator.decode, decode_rows, self._device)
        self._launched: deque[torch.cuda.Event] = deque()
        self.steps = 0
        """Taken so far."""

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def rows(self) -> int:
        """Of a call of the denoiser."""
        return self._rows

    @property
    def running(self) -> int:
        """Images between their first and last step."""
        return sum(batch.running for batch in self._batches.values())

    @property
    def waiting(self) -> int:
        """Images submitted and not started."""
        return sum(batch.waiting for batch in self._batches.values())

    @property
    def busy(self) -> bool:
        """Whether there is an image submitted and not handed out, be it waiting, running or being decoded."""
        return self.waiting + self.running + self._decoder.pending > 0

    def free_slots(self, latent_shape: Shape | None = None) -> int:
        """Slots that nothing runs in, for images of a size."""
        batch = self._batches.get(latent_shape or self._generator.latent_shape)
        return self._slots if batch is None else batch.free

    def submit(self, request: ImageRequest) -> None:
        """Queue an image; it starts at the next step of its size that has room for it, first come first served.

        Raises RecipeError where it could never start: steps outside the schedule, guidance with a single slot, a size
        that the generator cannot make.
        """
        planned = self._trajectory(request.steps)
        if request.slots > self._slots:
            raise RecipeError(
                f"guidance_scale={request.guidance_scale:g} takes two slots an image and the engine has {self._slots}; "
                "set slots to 2 or more"
            )
        self._batch(request.latent_shape or self._generator.latent_shape).put(request, planned)

    def cancel(self, request: ImageRequest) -> bool:
        """Forget an image, by the very object that was submitted, and free its slots.

        False where it is not known, or so far that it is handed out all the same.
        """
        return self._decoder.cancel(request) or any(batch.cancel(request) for batch in self._batches.values())

    @torch.inference_mode()
    def step(self, latent_shape: Shape | None = None) -> list[FinishedImage]:
        """Advance the images of a size by one denoiser call; the images, of any size, that are decoded by now.

        The size is the one that is named, or where none is, sizes take turns. It waits for no company and no request;
        where nothing but decoding is left, for that.
        """
        batch = self._in_turn(latent_shape)
        if batch is not None:
            for request, latent in batch.step():
                self._decoder.put(request, latent)
            self.steps += 1
        alone = self.running + self.waiting < max(self._eager_below, 1)
        for shape in self._decoder.shapes:
            self._decoder.start(shape, partial=alone or not self._has_more(shape))
        if batch is not None:
            self._keep_pace()
        return self._decoder.take(wait=batch is None)

    def run(self, requests: Iterable[ImageRequest]) -> Iterator[FinishedImage]:
        """Every requested image in order of completion; requests are drawn as slots become free."""
        source = iter(requests)
        exhausted = False
        while not exhausted or self.busy:
            while not exhausted and self.waiting < self._slots:
                request = next(source, None)
                exhausted = request is None
                if request is not None:
                    self.submit(request)
            yield from self.step()

    def _trajectory(self, steps: int) -> Trajectory:
        if steps not in self._trajectories:
            self._trajectories[steps] = trajectory(self._solver, self._generator.schedule, steps)
        return self._trajectories[steps]

    def _batch(self, shape: Shape) -> Batch:
        if shape not in self._batches:
            if shape != self._generator.latent_shape:
                self._generator.require_shape(shape)
            self._batches = {kept: batch for kept, batch in self._batches.items() if _has_work(batch)}
            self._batches[shape] = Batch(self._generator, shape, self._slots, self._rows)
        return self._batches[shape]

    def _in_turn(self, wanted: Shape | None) -> Batch | None:
        for shape, batch in self._batches.items():
            if _has_work(batch) and wanted in (None, shape):
                # Behind the others: next time it is another's turn.
                self._batches[shape] = self._batches.pop(shape)
                return batch
        return None

    def _has_more(self, shape: Shape) -> bool:
        return shape in self._batches and _has_work(self._batches[shape])

    def _keep_pace(self) -> None:
        if self._device.type == "cuda":
            launched = torch.cuda.Event()
            launched.record(torch.cuda.current_stream(self._device))
            self._launched.append(launched)
            if len(self._launched) > AHEAD:
                self._launched.popleft().synchronize()


@torch.inference_mode()
def is_batch_invariant(
    generator: Denoiser, slots: int, *, rows: int | None = None, decode_rows: int | None = None
) -> bool:
    """Whether a row's bits depend neither on its place nor on the others, in this process, for the engine's batches."""
    null = generator.null_condition(1)
    rows, decode_rows = _rows(null.device, slots, rows, decode_rows)
    condition = null.repeat_interleave(rows, dim=0)
    timesteps = torch.linspace(0, len(generator.schedule.alphas_T) - 1, rows, device=null.device).long()

    def denoise(chosen: Tensor) -> Tensor:
        return generator.denoise(_probe(generator, rows, null.device)[chosen], timesteps[chosen], condition)

    def decode(chosen: Tensor) -> Tensor:
        return generator.decode(_probe(generator, decode_rows, null.device)[chosen])

    return _ignores_companions(denoise, rows) and _ignores_companions(decode, decode_rows)


def _rows(device: torch.device, slots: int, rows: int | None, decode_rows: int | None) -> tuple[int, int]:
    """The rows of a call of denoiser and decoder."""
    if device.type == "cuda":
        return rows or slots, decode_rows or GPU_DECODE_ROWS
    return rows or min(slots, CPU_ROWS), decode_rows or CPU_DECODE_ROWS


def _ignores_companions(network: Callable[[Tensor], Tensor], rows: int) -> bool:
    order = torch.arange(rows)
    straight = network(order)
    others = (order.flip(0), order.roll(1), torch.zeros_like(order), torch.full_like(order, rows - 1))
    return all(torch.equal(network(chosen), straight[chosen]) for chosen in others)


def _probe(generator: Denoiser, rows: int, device: torch.device) -> Tensor:
    return on(device, gaussian_noise(0, 0, (rows, *generator.latent_shape)))


def _has_work(batch: Batch) -> bool:
    return batch.running + batch.waiting > 0
