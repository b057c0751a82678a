"""The engine: images at their own places of their own trajectories share one denoiser batch.

A slot is one row of the denoiser's batch. An image without guidance takes one slot, a guided image two (conditional
and unconditional), so that guidance 1.0 costs half. `step()` is one denoiser call for all that is running; an image
that finishes leaves its slots to the next in line, which starts at the following step (step-level continuous batching).

Denoiser and decoder always see the same batch shape, idle slots padded, and conditions are made one image at a time:
on one configuration of device, threads and slots an image's bits do not depend on who shares the batch. That needs
kernels that treat all rows of a batch alike, which CPU kernels on one thread do; `is_batch_invariant` finds out for
others (MKL's, on several threads, differ in the last bit for some batch sizes).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from scanloom.attributes import Attributes
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.noise_schedule import NoiseSchedule
from scanloom.sampling.noise import gaussian_noise
from scanloom.sampling.solvers import SolverName, Trajectory, advance, trajectory

DECODE_BATCH = 8


class Denoiser(Protocol):
    """All that the engine knows of a generator. [B, ...] is a batch of latents; everything lives on one device."""

    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    @property
    def schedule(self) -> NoiseSchedule: ...

    def condition(self, attributes: Sequence[Attributes], /) -> torch.Tensor:
        """float32 [B, ...]: what `denoise` takes as its third argument."""
        ...

    def null_condition(self, batch: int, /) -> torch.Tensor: ...
    def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor, /) -> torch.Tensor: ...
    def decode(self, latents: torch.Tensor, /) -> torch.Tensor:
        """float32 [B, *image axes] in [0, 1]."""
        ...


@dataclass(frozen=True)
class ImageRequest:
    """One image to make; seed, index and attempt name its starting noise, `index` also names it in the answer."""

    index: int
    seed: int
    attributes: Attributes
    steps: int
    guidance_scale: float = 1.0
    attempt: int = 0


@dataclass(frozen=True)
class FinishedImage:
    request: ImageRequest
    image: NDArray[np.float32]
    """[*image axes] (2-D: [1, H, W]) in [0, 1]."""


@dataclass
class _Running:
    request: ImageRequest
    trajectory: Trajectory
    slot: int
    twin: int
    """Slot of the unconditional half; its own slot where there is none."""
    position: int = 0


class Engine:
    """One generator on one device with a fixed number of slots."""

    def __init__(
        self, generator: Denoiser, slots: int, solver: SolverName = "dpmpp-2m", decode_batch: int = DECODE_BATCH
    ) -> None:
        if slots < 1:
            raise RecipeError(f"slots={slots}: an engine needs at least one")
        self._generator = generator
        self._solver: SolverName = solver
        self._decode_batch = decode_batch
        self._trajectories: dict[int, Trajectory] = {}
        self._null = generator.null_condition(1).detach()
        self._device = self._null.device
        self._condition = self._null.repeat_interleave(slots, dim=0)
        self._latents = torch.zeros((slots, *generator.latent_shape), device=self._device)
        self._predicted = torch.zeros_like(self._latents)
        self._free = list(range(slots))
        self._running: list[_Running] = []
        self._waiting: deque[ImageRequest] = deque()
        self.denoiser_calls = 0

    @property
    def slots(self) -> int:
        return len(self._latents)

    @property
    def running(self) -> int:
        """Images between their first and last step."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Images submitted and not started."""
        return len(self._waiting)

    def submit(self, request: ImageRequest) -> None:
        """Queue an image; it starts at the next step that has room for it, first come first served.

        Raises RecipeError where it could never start: steps outside the schedule, guidance with a single slot.
        """
        self._trajectory(request.steps)
        if _width(request) > self.slots:
            raise RecipeError(
                f"guidance_scale={request.guidance_scale:g} takes two slots an image and the engine has {self.slots}; "
                "set slots to 2 or more"
            )
        self._waiting.append(request)

    @torch.inference_mode()
    def step(self) -> list[FinishedImage]:
        """Advance every running image by one denoiser call; the images that this finished, decoded."""
        self._admit()
        if not self._running:
            return []
        self._denoise()
        return self._decode(self._take_finished())

    def run(self, requests: Iterable[ImageRequest]) -> Iterator[FinishedImage]:
        """Every requested image in order of completion; requests are drawn as slots become free."""
        source = iter(requests)
        exhausted = False
        while not exhausted or self._waiting or self._running:
            while not exhausted and len(self._waiting) < max(len(self._free), 1):
                request = next(source, None)
                exhausted = request is None
                if request is not None:
                    self.submit(request)
            yield from self.step()

    def _trajectory(self, steps: int) -> Trajectory:
        if steps not in self._trajectories:
            self._trajectories[steps] = trajectory(self._solver, self._generator.schedule, steps)
        return self._trajectories[steps]

    def _admit(self) -> None:
        while self._waiting and _width(self._waiting[0]) <= len(self._free):
            request = self._waiting.popleft()
            # Before a slot is taken: a request that fails here must not keep one.
            condition = self._generator.condition([request.attributes])[0]
            noise = gaussian_noise(request.seed, request.index, self._generator.latent_shape, request.attempt)
            slot = self._free.pop(0)
            twin = self._free.pop(0) if _width(request) == 2 else slot
            self._condition[twin] = self._null[0]
            self._condition[slot] = condition
            self._latents[slot] = torch.from_numpy(noise).to(self._device)
            self._predicted[slot] = 0.0
            self._running.append(_Running(request, self._trajectory(request.steps), slot, twin))

    def _denoise(self) -> None:
        source, twin = np.arange(self.slots), np.arange(self.slots)
        timesteps = np.zeros(self.slots, dtype=np.int64)
        scale = np.ones(self.slots)
        coefficients = np.zeros((self.slots, 5))
        for image in self._running:
            place = [image.slot, image.twin]
            source[place], timesteps[place] = image.slot, image.trajectory.timesteps[image.position]
            twin[image.slot], scale[image.slot] = image.twin, image.request.guidance_scale
            coefficients[image.slot] = image.trajectory.coefficients[image.position]
            image.position += 1
        outputs = self._generator.denoise(self._latents[self._on(source)], self._on(timesteps), self._condition)
        self.denoiser_calls += 1
        outputs = _guided(outputs.float(), self._on(twin), self._on(scale))
        self._latents, self._predicted = advance(self._latents, outputs, self._predicted, self._on(coefficients))

    def _take_finished(self) -> list[_Running]:
        done = [image for image in self._running if image.position == image.trajectory.steps]
        self._running = [image for image in self._running if image.position < image.trajectory.steps]
        for image in done:
            self._free = sorted({*self._free, image.slot, image.twin})
        return done

    def _decode(self, done: Sequence[_Running]) -> list[FinishedImage]:
        finished = []
        for start in range(0, len(done), self._decode_batch):
            chunk = done[start : start + self._decode_batch]
            latents = torch.zeros((self._decode_batch, *self._latents.shape[1:]), device=self._device)
            latents[: len(chunk)] = self._latents[[image.slot for image in chunk]]
            images = self._generator.decode(latents)[: len(chunk)].float().cpu().numpy()
            finished += [_checked(image.request, pixels) for image, pixels in zip(chunk, images, strict=True)]
        return finished

    def _on(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


@torch.inference_mode()
def is_batch_invariant(generator: Denoiser, slots: int, decode_batch: int = DECODE_BATCH) -> bool:
    """Whether rows keep their bits when they change places, in this process, with this network and these shapes."""
    null = generator.null_condition(1)
    condition = null.repeat_interleave(slots, dim=0)
    timesteps = torch.linspace(0, len(generator.schedule.alphas_T) - 1, slots, device=null.device).long()

    def denoise(rows: torch.Tensor) -> torch.Tensor:
        return generator.denoise(_probe(generator, slots, null.device)[rows], timesteps[rows], condition)

    def decode(rows: torch.Tensor) -> torch.Tensor:
        return generator.decode(_probe(generator, decode_batch, null.device)[rows])

    return _ignores_order(denoise, slots) and _ignores_order(decode, decode_batch)


def _ignores_order(network: Callable[[torch.Tensor], torch.Tensor], rows: int) -> bool:
    order = torch.arange(rows)
    straight = network(order)
    return all(torch.equal(network(moved), straight[moved]) for moved in (order.flip(0), order.roll(1)))


def _probe(generator: Denoiser, rows: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(gaussian_noise(0, 0, (rows, *generator.latent_shape))).to(device)


def _width(request: ImageRequest) -> int:
    return 1 if request.guidance_scale == 1.0 else 2


def _guided(outputs: torch.Tensor, twin: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2021); a slot that is its own twin keeps its output bit for bit."""
    unconditional = outputs[twin]
    wide = scale.to(outputs.dtype).reshape(-1, *(1,) * (outputs.dim() - 1))
    return unconditional + wide * (outputs - unconditional)


def _checked(request: ImageRequest, image: NDArray[np.float32]) -> FinishedImage:
    if not np.isfinite(image).all():
        raise ArtefactError(
            f"the generator made pixels that are not numbers for image {request.index} (seed {request.seed}, "
            f"{request.steps} steps, guidance {request.guidance_scale:g}); its weights are damaged or diverged"
        )
    return FinishedImage(request, image)
