"""From finished latents to images: a stage of its own, in batches of one shape, beside the denoiser where that helps.

On a GPU a batch is decoded on a second stream and copied to the host from there, while the denoiser goes on. A CPU's
threads are all at work already, and a batch is decoded when it is started.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scanloom.errors import ArtefactError
from scanloom.sampling.batch import ImageRequest, Shape

AHEAD = 2
"""Batches under way at most: more would wait in the GPU's memory for no gain."""


@dataclass(frozen=True)
class FinishedImage:
    request: ImageRequest
    image: NDArray[np.float32]
    """[*image axes] (2-D: [1, H, W]) in [0, 1]."""


class NotNumbers(ArtefactError):
    """The pixels of an image are not numbers."""

    request: ImageRequest


@dataclass(frozen=True)
class _UnderWay:
    requests: Sequence[ImageRequest]
    images: Tensor
    """[N, *image axes] on the host, complete once `copied` is."""
    copied: torch.cuda.Event | None


class Decoder:
    """Latents that wait for companions of their shape, and batches of them under way."""

    def __init__(self, decode: Callable[[Tensor], Tensor], batch: int, device: torch.device) -> None:
        self._decode = decode
        self._batch = batch
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queues: dict[Shape, list[tuple[ImageRequest, Tensor]]] = {}
        self._under_way: deque[_UnderWay] = deque()
        self._decoded: deque[FinishedImage] = deque()

    @property
    def pending(self) -> int:
        """Images put here and not handed out."""
        under_way = sum(len(batch.requests) for batch in self._under_way)
        return sum(len(queue) for queue in self._queues.values()) + under_way + len(self._decoded)

    @property
    def shapes(self) -> list[Shape]:
        """Of the latents that no batch has been started for."""
        return list(self._queues)

    def put(self, request: ImageRequest, latent: Tensor) -> None:
        self._queues.setdefault(tuple(latent.shape), []).append((request, latent))

    def cancel(self, request: ImageRequest) -> bool:
        """Forget an image whose decoding has not been started; whether it was here."""
        for shape, queue in self._queues.items():
            kept = [entry for entry in queue if entry[0] is not request]
            if len(kept) < len(queue):
                self._queues[shape] = kept
                return True
        return False

    def start(self, shape: Shape, *, partial: bool) -> None:
        """Decode all full batches of a shape, and what is left of them if `partial`, idle rows padded."""
        queue = self._queues.pop(shape)
        while len(queue) >= self._batch or (partial and queue):
            self._launch(queue[: self._batch])
            queue = queue[self._batch :]
        if queue:
            self._queues[shape] = queue

    def take(self, *, wait: bool) -> list[FinishedImage]:
        """The images that are decoded, after waiting for a batch under way if `wait` and there is one.

        Raises NotNumbers for one whose pixels are not numbers; the others come with the next call.
        """
        self._collect(at_least=1 if wait and not self._decoded else 0)
        taken: list[FinishedImage] = []
        while self._decoded:
            finite = np.isfinite(self._decoded[0].image).all()
            if not finite and taken:
                break
            finished = self._decoded.popleft()
            if not finite:
                raise _not_numbers(finished.request)
            taken.append(finished)
        return taken

    def _launch(self, entries: Sequence[tuple[ImageRequest, Tensor]]) -> None:
        self._collect(at_least=len(self._under_way) - AHEAD + 1)
        latents = torch.stack([latent for _, latent in entries])
        idle = self._batch - len(entries)
        latents = torch.cat([latents, latents[:1].expand(idle, *latents.shape[1:])]) if idle else latents
        if self._stream is not None:
            # The latents come from the denoiser's stream, whose allocator must not reuse them before they are read.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            images = self._decode(latents)[: len(entries)].float().to("cpu", non_blocking=True)
        self._under_way.append(_UnderWay([request for request, _ in entries], images, self._copied()))

    def _copied(self) -> torch.cuda.Event | None:
        """Done once all is that the stream has been given so far; None: it is already."""
        if self._stream is None:
            return None
        copied = torch.cuda.Event()
        copied.record(self._stream)
        return copied

    def _collect(self, at_least: int) -> None:
        """Move what is decoded out of what is under way, in order; wait for the first `at_least` batches."""
        while self._under_way:
            copied = self._under_way[0].copied
            if copied is not None and not copied.query():
                if at_least <= 0:
                    return
                copied.synchronize()
            batch = self._under_way.popleft()
            at_least -= 1
            images = zip(batch.requests, batch.images.numpy(), strict=True)
            self._decoded.extend(FinishedImage(request, image) for request, image in images)


def _not_numbers(request: ImageRequest) -> NotNumbers:
    error = NotNumbers(
        f"the generator made pixels that are not numbers for image {request.index} (seed {request.seed}, "
        f"{request.steps} steps, guidance {request.guidance_scale:g}); its weights are damaged or diverged, or "
        "they overflow fp16 where that is its precision"
    )
    error.request = request
    return error
