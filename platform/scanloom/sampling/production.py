"""The pixels of a shard: what one generation actor does, without knowing of Ray, and one image made anew.

Pixels are quantised here, once; everything after handles integers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from scanloom.artefact import open_artefact
from scanloom.errors import ArtefactError
from scanloom.models.generator import load_generator
from scanloom.sampling.dataset import Pixels, rows_from_bytes, rows_to_bytes, stored_row
from scanloom.sampling.engine import Engine, ImageRequest, is_batch_invariant
from scanloom.sampling.plan import PlanSpec
from scanloom.shards.writer import png_pixels


class ShardEngine:
    """Makes the pixels of one shard a call. Raises ArtefactError where the generator is damaged or not the plan's."""

    def __init__(self, spec: PlanSpec, generator_uri: str, device: str, threads: int) -> None:
        fix_arithmetic(threads)
        generator = load_generator(generator_uri, device)
        if generator.digest != spec.generator:
            raise ArtefactError(
                f"{generator_uri}: is generator {generator.digest[:12]}, the plan is for {spec.generator[:12]}; "
                "restore that one"
            )
        self._spec = spec
        self._engine = Engine(generator, spec.slots, spec.solver)
        invariant = is_batch_invariant(generator, spec.slots)
        self._environment = environment(device) | {"batch_invariant": invariant}

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Of `shard` (int) and `rows` (plan rows as Arrow IPC): these, pixels [N, H, W] as bytes, and how it went."""
        started = time.monotonic()
        rows = rows_from_bytes(shard["rows"])
        pixels = self._pixels(rows)
        return shard | {
            "pixels": pixels.tobytes(),
            "height": pixels.shape[1],
            "width": pixels.shape[2],
            "engine_s": time.monotonic() - started,
            "environment": self._environment,
        }

    def _pixels(self, rows: pa.Table) -> Pixels:
        wanted = [request(self._spec, row) for row in rows.to_pylist()]
        place = {r.index: n for n, r in enumerate(wanted)}
        made = {place[f.request.index]: quantise(f.image, self._spec.bits_stored) for f in self._engine.run(wanted)}
        return np.stack([made[n] for n in range(len(wanted))])


def regenerate(dataset_uri: str, image_id: str, generator_uri: str | None = None) -> tuple[Pixels, Pixels]:
    """One image made anew from its row, and as it is stored, both [H, W].

    The generator is found by the dataset's lineage, or at `generator_uri` where it has moved. The two are equal on a
    configuration like the one that made it, and otherwise differ by rounding.

    Raises RecipeError for an id that is not in the dataset, ArtefactError where another generator is there.
    """
    dataset = open_artefact(dataset_uri, "dataset")
    statistics = dataset.manifest.statistics
    spec = PlanSpec.model_validate(statistics["spec"])
    stored = stored_row(dataset, spec, image_id)
    home = next(entry.uri for entry in dataset.manifest.inputs if entry.role == "generator")
    maker = statistics["environments"][0]
    device = "cuda" if maker["device"] != "cpu" and torch.cuda.is_available() else "cpu"
    engine = ShardEngine(spec, generator_uri or home, device, maker["threads"])
    row = pa.Table.from_pylist([stored]).drop_columns(["image"])
    made = engine({"shard": 0, "rows": rows_to_bytes(row)})
    kept = png_pixels(stored["image"]["bytes"])
    return np.frombuffer(made["pixels"], kept.dtype).reshape(made["height"], made["width"]), kept


def request(spec: PlanSpec, row: Mapping[str, Any]) -> ImageRequest:
    """What the engine is to make for a row of the plan or of the finished dataset."""
    return ImageRequest(row["index"], spec.seed, spec.attributes.from_row(row), spec.steps, spec.guidance_scale)


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
