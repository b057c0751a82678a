"""An engine that costs nothing: images made beforehand, one of them stamped with the number of each image.

For the job around the engine, whose speed and whose behaviour when things die are nobody's denoiser's.

python -m tests.free_engine RECIPE runs jobs.generate with it.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scanloom.artefact import Artefact, open_artefact, publish
from scanloom.sampling.dataset import EngineActor, rows_from_bytes
from scanloom.scans.phantoms import phantom
from scanloom.store import Store

DISTINCT = 8
STARTS = "starts"
"""Folder of the generator where each engine notes when its first call came, in seconds since 1970."""
STAMP = 8
"""Pixels at the start of an image that hold its number, four bits each, most significant first."""


def publish_free_generator(uri: str, size_px: int) -> Artefact:
    """What the engine takes for a generator: a manifest that says how large its images are."""
    from tests.tiny_generator import STATISTICS  # with torch, which the driver of a job does not load

    statistics = STATISTICS | {"size_px": size_px}
    return publish(
        Store(uri), kind="generator", name="free", recipe={}, inputs=[], files=[], statistics=statistics
    )  # fmt: skip


def stamped(images: NDArray[Any], indices: NDArray[np.int64]) -> NDArray[Any]:
    """[N, H, W]: of image number i a copy of images[i % len(images)], its first pixels saying i."""
    pixels = images[indices % len(images)]
    pixels[:, 0, :STAMP] = indices[:, None] >> np.arange(4 * (STAMP - 1), -1, -4) & 15
    return pixels


def stamp(pixels: NDArray[Any]) -> int:
    """The number that an image [H, W] says it has."""
    return int(sum(int(digit) << 4 * (STAMP - 1 - place) for place, digit in enumerate(pixels[0, :STAMP])))


class FreeEngine(EngineActor):
    """Takes the place of the actor that owns a generator on a device."""

    @cached_property
    def _engine(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        generator = open_artefact(self._arguments[1], "generator")
        generator.store.write(f"{STARTS}/{uuid.uuid4().hex}", str(time.time()).encode())
        size_px = generator.manifest.statistics["size_px"]
        bits = self._spec.bits_stored
        dtype = np.uint8 if bits == 8 else np.uint16
        # Phantoms of 12 bits with their grain; the lowest of 16 bits stay empty, as they do in detectors of 12.
        drawn: NDArray[Any] = np.stack(
            [phantom(7, number, size_px, bits_stored=12).pixels for number in range(DISTINCT)]
        )
        images = (drawn >> 4 if bits == 8 else drawn << (bits - 12)).astype(dtype)

        def make(shard: dict[str, Any]) -> dict[str, Any]:
            indices = rows_from_bytes(shard["rows"])["index"].to_numpy()
            return shard | {
                "pixels": stamped(images, indices).tobytes(),
                "height": size_px,
                "width": size_px,
                "attempts": [0] * len(indices),
                "rejects": [],
                "engine_s": 0.001 * len(indices),
                "environment": {"device": "cpu", "threads": 1},
            }

        return make


class PickyEngine(FreeEngine):
    """Draws every fifth image a second time, and finds no attempt good enough for those of `INFEASIBLE`."""

    INFEASIBLE = (7, 13)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        made = super().__call__(shard)
        indices = rows_from_bytes(made["rows"])["index"].to_pylist()
        rejects = []
        for index in indices:
            if index in self.INFEASIBLE:
                rejects += [_reject(index, 0, "blank"), _reject(index, 1, "blank"), _reject(index, 2, "infeasible")]
            elif index % 5 == 0:
                rejects.append(_reject(index, 0, "saturated"))
        dtype = np.uint8 if self._spec.bits_stored == 8 else np.uint16
        pixels = np.frombuffer(made["pixels"], dtype).reshape(len(indices), made["height"], made["width"])
        kept = [place for place, index in enumerate(indices) if index not in self.INFEASIBLE]
        return made | {
            "pixels": pixels[kept].tobytes(),
            "attempts": [int(indices[place] % 5 == 0) for place in kept],
            "rejects": rejects,
        }


def _reject(index: int, attempt: int, reason: str) -> dict[str, Any]:
    return {"index": index, "attempt": attempt, "reason": reason, "figures": {"contrast": 0.001}}


def main() -> int:
    # Here, since an actor that is given the class above loads no more than one with a generator does.
    from jobs.cluster import run_recipe
    from jobs.generate import generate
    from tests import free_engine  # a class of `__main__` would travel by value, which its locks cannot

    return run_recipe(partial(generate, engine=free_engine.FreeEngine), "free_engine", __doc__ or "", None)


if __name__ == "__main__":
    sys.exit(main())
