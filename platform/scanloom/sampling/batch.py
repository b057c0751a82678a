"""Images of one shape, each at its own place of its own trajectory, that share a denoiser's batch.

A slot is one row of that batch. An image without guidance takes one slot, a guided image two (conditional and
unconditional), so that guidance 1.0 costs half. Legend of shape suffixes: N images, R rows, the latent's axes behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scanloom.attributes import Attributes
from scanloom.models.noise_schedule import NoiseSchedule
from scanloom.sampling.noise import gaussian_noise
from scanloom.sampling.solvers import Trajectory, advance

Shape = tuple[int, ...]
"""Of one latent: its axes without the batch."""


class Denoiser(Protocol):
    """All that the engine knows of a generator. [B, ...] is a batch of latents; everything lives on one device."""

    @property
    def latent_shape(self) -> Shape: ...
    @property
    def schedule(self) -> NoiseSchedule: ...

    def require_shape(self, latent_shape: Shape, /) -> None:
        """Raise RecipeError where it cannot make latents of a shape that is not its own."""
        ...

    def condition(self, attributes: Sequence[Attributes], /) -> Tensor:
        """float32 [B, ...]: what `denoise` takes as its third argument."""
        ...

    def null_condition(self, batch: int, /) -> Tensor: ...
    def denoise(self, latents: Tensor, timesteps: Tensor, condition: Tensor, /) -> Tensor: ...
    def decode(self, latents: Tensor, /) -> Tensor:
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
    latent_shape: Shape | None = None
    """None: the generator's own."""

    @property
    def slots(self) -> int:
        """Rows of the denoiser's batch that the image takes."""
        return 1 if self.guidance_scale == 1.0 else 2


@dataclass
class _Image:
    request: ImageRequest
    trajectory: Trajectory
    position: int = 0


class Batch:
    """What runs in a fixed number of slots, and what waits for them, first come first served."""

    def __init__(self, generator: Denoiser, shape: Shape, slots: int, rows: int) -> None:
        """The denoiser is always called with `rows` rows: idle ones are padded, and more slots take several calls."""
        self._generator = generator
        self._shape = shape
        self._slots = slots
        self._rows = rows
        # Row 0 is the null condition, row n + 1 that of image n.
        self._condition = generator.null_condition(1)
        self._device = self._condition.device
        self._latents = torch.zeros((0, *shape), device=self._device)
        self._predicted = self._latents
        self._running: list[_Image] = []
        self._waiting: deque[_Image] = deque()

    @property
    def running(self) -> int:
        """Images between their first and last step."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free(self) -> int:
        """Slots that nothing runs in."""
        return self._slots - sum(image.request.slots for image in self._running)

    def put(self, request: ImageRequest, trajectory: Trajectory) -> None:
        self._waiting.append(_Image(request, trajectory))

    def step(self) -> list[tuple[ImageRequest, Tensor]]:
        """Let in what waits and has room, advance all by one step, and give what this finished, as latents."""
        self._admit()
        if not self._running:
            return []
        self._advance()
        return self._take_finished()

    def cancel(self, request: ImageRequest) -> bool:
        """Forget an image; whether it was here. It is this very object that counts, not one that is equal."""
        if any(image.request is request for image in self._waiting):
            self._waiting = deque(image for image in self._waiting if image.request is not request)
            return True
        keep = [place for place, image in enumerate(self._running) if image.request is not request]
        found = len(keep) < len(self._running)
        if found:
            self._keep(keep)
        return found

    def _admit(self) -> None:
        while self._waiting and self._waiting[0].request.slots <= self.free:
            image = self._waiting.popleft()
            wanted = image.request
            # Alone, and before a slot is taken: bits must not depend on companions, nor a failure keep a slot.
            condition = self._generator.condition([wanted.attributes])
            noise = gaussian_noise(wanted.seed, wanted.index, self._shape, wanted.attempt)
            self._running.append(image)
            self._condition = torch.cat([self._condition, condition])
            self._latents = torch.cat([self._latents, on(self._device, noise[None])])
            self._predicted = torch.cat([self._predicted, torch.zeros_like(self._latents[:1])])

    def _advance(self) -> None:
        images = len(self._running)
        guided = [place for place, image in enumerate(self._running) if image.request.slots == 2]
        now = [image.trajectory.timesteps[image.position] for image in self._running]
        idle = [0] * (-(images + len(guided)) % self._rows)
        source_R = np.array([*range(images), *guided, *idle])
        told_R = np.array([*range(1, images + 1), *(0 for _ in guided), *idle])
        outputs = self._denoise(source_R, np.array(now, dtype=np.int64)[source_R], told_R)
        # Without guidance an image is its own twin, which keeps its output bit for bit.
        twin_N = np.arange(images)
        twin_N[guided] = images + np.arange(len(guided))
        scale_N = np.array([image.request.guidance_scale for image in self._running], dtype=np.float32)
        coefficients = np.stack([image.trajectory.coefficients[image.position] for image in self._running])
        outputs = _guided(outputs[:images], outputs[on(self._device, twin_N)], on(self._device, scale_N))
        self._latents, self._predicted = advance(
            self._latents, outputs, self._predicted, on(self._device, coefficients)
        )  # fmt: skip
        for image in self._running:
            image.position += 1

    def _denoise(
        self, source_R: NDArray[np.int64], timesteps_R: NDArray[np.int64], told_R: NDArray[np.int64]
    ) -> Tensor:
        source, timesteps, told = (on(self._device, rows) for rows in (source_R, timesteps_R, told_R))
        calls = zip(source.split(self._rows), timesteps.split(self._rows), told.split(self._rows), strict=True)
        outputs = [self._generator.denoise(self._latents[s], t, self._condition[c]) for s, t, c in calls]
        return torch.cat(outputs).float()

    def _take_finished(self) -> list[tuple[ImageRequest, Tensor]]:
        places = range(len(self._running))
        done = [n for n in places if self._running[n].position == self._running[n].trajectory.steps]
        finished = [(self._running[n].request, self._latents[n]) for n in done]
        if done:
            self._keep([n for n in places if n not in done])
        return finished

    def _keep(self, places: Sequence[int]) -> None:
        kept = on(self._device, np.array(places, dtype=np.int64))
        self._running = [self._running[place] for place in places]
        self._latents, self._predicted = self._latents[kept], self._predicted[kept]
        self._condition = torch.cat([self._condition[:1], self._condition[1:][kept]])


def on(device: torch.device, array: NDArray[np.generic]) -> Tensor:
    """The array on a device; the copy to a GPU waits for nothing that the GPU has still to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _guided(conditional: Tensor, unconditional: Tensor, scale_N: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2021)."""
    wide = scale_N.reshape(-1, *(1,) * (conditional.dim() - 1))
    return unconditional + wide * (conditional - unconditional)
