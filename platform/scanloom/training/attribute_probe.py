"""The probe's training: what a Ray Train worker runs, from corpus rows to the probe's files in the store."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from scanloom.artefact import Artefact, FileEntry, plan_digest
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.errors import ArtefactError, RecipeError
from scanloom.heap import keep_freed_memory
from scanloom.models.attribute_probe import ProbeNetwork, probe_loss, resampled, targets, told
from scanloom.models.probe_card import CARD, WEIGHTS, ProbeCard, outputs_of
from scanloom.recipe import NumberAttribute, Recipe
from scanloom.recipe_probe import Probe
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from scanloom.training.calibration import checks, readings
from scanloom.training.data_parallel import Length, Run, report_checkpoint, run_steps
from scanloom.training.draws import draw, positions, rows_at
from scanloom.training.views import full_range

CHECKPOINT = "probe.pt"
READING_BATCH = 64
_LEAST_PX = 4
_CONTRAST, _BRIGHTNESS = 0.1, 0.1
# Where it is trained does not change what comes out.
_PLACE = {"workers", "cpus_per_worker", "use_gpu", "max_failures", "checkpoint_every_steps"}


class ProbeJob(BaseModel):
    """What a worker is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Probe
    name: str
    seed: int
    attributes: AttributeSchema
    size_px: int
    """Side of the squares that the probe is to look at."""
    probe_uri: str

    @classmethod
    def of(cls, recipe: Recipe, corpus: Artefact) -> Self:
        """The job of a recipe on a corpus."""
        statistics = corpus.manifest.statistics
        return cls(
            recipe=recipe.probe, name=recipe.name, seed=recipe.seed,
            attributes=AttributeSchema.model_validate(statistics["schema"]),
            size_px=min(recipe.probe.size_px, statistics["size_px"]), probe_uri=recipe.uri("probe"),
        )  # fmt: skip

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the levels that leave enough of the square."""
        levels = max(1, int(math.log2(self.size_px / _LEAST_PX)))
        return self.recipe.channels[:levels]


def plan_probe(recipe: Recipe, corpus: Artefact) -> str:
    """The digest of what decides a probe."""
    return plan_digest("probe", corpus.digest, recipe.seed, recipe.probe.model_dump(mode="json", exclude=_PLACE))


@dataclass(frozen=True)
class Scans:
    """A split in memory, in the order of its ids."""

    images_N1SS: Tensor
    """float16 in [-1, 1]."""
    attributes: Sequence[Attributes]

    def __len__(self) -> int:
        return len(self.attributes)


def train_probe(config: dict[str, Any]) -> dict[str, Any]:
    """Train a probe, judge it on held-out scans and write it into the store.

    `config` is a ProbeJob as a dict; the Ray Train datasets `train` and `validation` hold corpus rows. Returns the last
    metrics and, from worker 0, the written files as `files` and the card as `card`; or as `refused` that the loss is no
    number, before a checkpoint is overwritten.
    """
    try:
        return _train(ProbeJob.model_validate(config))
    except RecipeError as error:
        return {"refused": str(error)}


def _train(job: ProbeJob) -> dict[str, Any]:
    recipe = job.recipe
    torch.set_num_threads(recipe.cpus_per_worker)
    if not recipe.use_gpu:
        keep_freed_memory()
    device = ray.train.torch.get_device()
    train, held_out = _scans("train", job), _scans("validation", job)
    card = blank_card(job, train, len(held_out))
    wanted_NO = torch.from_numpy(targets(job.attributes, train.attributes, card.scales))
    run = _initial(job)

    def step(rank: int, workers: int) -> Tensor:
        where = positions(run.step, recipe.batch_size, rank, workers)
        rows = torch.from_numpy(rows_at(where, len(train), job.seed))
        images = moved(train.images_N1SS[rows].float(), where, job)
        loss = _train_step(run, job, images.to(device), wanted_NO[rows].to(device))
        run.step += 1
        return loss

    length = Length(recipe.steps, recipe.batch_size, recipe.checkpoint_every_steps)
    metrics = run_steps(run, CHECKPOINT, length, step, "probe.learning_rate")
    rank = ray.train.get_context().get_world_rank()
    # Also where a resumed run finds all its steps done: what it had written may be gone.
    made: dict[str, Any] = {}
    if rank == 0:
        card = judged(card, run.network, held_out, train)
        made = {"files": _written(job, card, run.network), "card": card.model_dump(mode="json")}
    report_checkpoint(CHECKPOINT, run.parts, metrics, rank)
    return metrics | made


def blank_card(job: ProbeJob, train: Scans, held_out: int) -> ProbeCard:
    """The card before anything is known of how well it reads."""
    scales = {}
    for declaration in job.attributes.declarations:
        if isinstance(declaration, NumberAttribute):
            values = _numbers(train, declaration.name)
            spread = float(np.std(values)) if values else 0.0
            scales[declaration.name] = (float(np.mean(values)) if values else 0.0, spread or 1.0)
    return ProbeCard(
        name=job.name, attributes=job.attributes, size_px=job.size_px, channels=job.channels, scales=scales,
        false_reject_share=job.recipe.false_reject_share, trained_scans=len(train), held_out_scans=held_out,
    )  # fmt: skip


@torch.no_grad()
def judged(card: ProbeCard, network: ProbeNetwork, held_out: Scans, train: Scans) -> ProbeCard:
    """The card with what the network makes of held-out scans, and the limits that follow."""
    device = next(network.parameters()).device
    network.eval()
    parts = [told(card, network(part.float().to(device))).cpu() for part in held_out.images_N1SS.split(READING_BATCH)]
    network.train()
    outputs_NO = torch.cat(parts).numpy()
    medians = {name: float(np.median(_numbers(train, name) or [0.0])) for name in card.scales}
    card = card.model_copy(update={"readings": readings(card, outputs_NO, held_out.attributes, medians)})
    return card.model_copy(update={"checks": checks(card, outputs_NO, held_out.attributes)})


def _numbers(scans: Scans, name: str) -> list[float]:
    """What is known of a number attribute."""
    return [value for row in scans.attributes if isinstance(value := row[name], float)]


def moved(images_B1SS: Tensor, where: Sequence[int], job: ProbeJob) -> Tensor:
    """The images, each shifted and given another contrast and brightness, as its position in the run has it."""
    most = round(job.recipe.shift * job.size_px)
    uniform_BU = draw(where, (1,), 4, job.seed).uniform_BU
    padded = functional.pad(images_B1SS, (most,) * 4, mode="replicate") if most else images_B1SS
    size, seen = job.size_px, []
    for image, (across, down, contrast, brightness) in zip(padded, uniform_BU.tolist(), strict=True):
        left, top = round(across * 2 * most), round(down * 2 * most)
        cut = image[:, top : top + size, left : left + size]
        seen.append(cut * (1.0 + _CONTRAST * (2.0 * contrast - 1.0)) + _BRIGHTNESS * (2.0 * brightness - 1.0))
    return torch.stack(seen)


def _initial(job: ProbeJob) -> Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        network = ProbeNetwork(job.channels, len(outputs_of(job.attributes)), job.recipe.dropout)
    model = ray.train.torch.prepare_model(network)
    return Run(model, torch.optim.AdamW(model.parameters(), job.recipe.learning_rate, weight_decay=0.01))


def _train_step(state: Run, job: ProbeJob, images: Tensor, wanted: Tensor) -> Tensor:
    for group in state.optimizer.param_groups:
        group["lr"] = job.recipe.learning_rate * _rate_factor(state.step, job.recipe.steps)
    # Dropout draws from the process's generator: set by the step, a resumed run draws what it would have drawn.
    torch.manual_seed(job.seed ^ (state.step << 20))
    loss = probe_loss(job.attributes, state.model(images), wanted)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    return loss.detach()


def _rate_factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.02 + 0.49 * (1.0 + math.cos(math.pi * step / steps)))


def _scans(split: str, job: ProbeJob) -> Scans:
    shard = ray.train.get_dataset_shard(split)
    if shard is None:
        raise ArtefactError(f"training was given no {split!r} scans")
    batches: Iterable[Any] = shard.iter_batches(batch_size=1024, batch_format="pyarrow")
    found: list[tuple[str, Tensor, Attributes]] = []
    for batch in batches:
        rows = pa.Table.to_pylist(batch)
        images = torch.stack([_square(row["image"]["bytes"], job.size_px) for row in rows])
        found += [(r["id"], image, job.attributes.from_row(r)) for r, image in zip(rows, images, strict=True)]
    if not found:
        raise ArtefactError(f"the corpus holds no {split} scans; prepare more, or change prepare.split")
    found.sort(key=lambda scan: scan[0])
    found = found[: job.recipe.max_scans]
    return Scans(torch.stack([image for _, image, _ in found]), [attributes for *_, attributes in found])


def _square(png: bytes, size_px: int) -> Tensor:
    return resampled(torch.from_numpy(full_range(png_pixels(png)))[None, None], size_px)[0].half()


def _written(job: ProbeJob, card: ProbeCard, network: ProbeNetwork) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="scanloom-probe-") as folder:
        weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        save_file(weights, Path(folder) / WEIGHTS)
        (Path(folder) / CARD).write_text(card.model_dump_json(indent=1))
        return [FileEntry.of(file).model_dump() for file in Store(job.probe_uri).put_folder(Path(folder))]
