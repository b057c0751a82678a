"""The copy encoder's training: contrastive, on the train split of a corpus alone; in one process or under Ray Train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from scanloom.artefact import Artefact, plan_digest
from scanloom.errors import ArtefactError, RecipeError
from scanloom.heap import keep_freed_memory
from scanloom.models.copy_encoder import CopyEncoder, levels, nt_xent, square_of, weights_of
from scanloom.recipe import Recipe
from scanloom.recipe_audit import CopyDetection
from scanloom.shards.writer import png_pixels
from scanloom.store import Store
from scanloom.training.copy_views import changed
from scanloom.training.data_parallel import Length, Run, report_checkpoint, run_steps
from scanloom.training.draws import positions, rows_at

CHECKPOINT = "copy-encoder.pt"
# What does not change the network: where it is trained, apart from `workers`, see `advance`, and how it is judged.
_PLACE = {
    "cpus_per_worker", "use_gpu", "max_failures", "checkpoint_every_steps", "false_positive_share", "planted_scans",
}  # fmt: skip


class CopyEncoderJob(BaseModel):
    """What a worker is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: CopyDetection
    section: str = "audit.copies"
    """Where the recipe says them."""
    seed: int
    size_px: int
    weights_uri: str
    """Where the trained network is written: a folder and the file's name."""
    weights_key: str

    @classmethod
    def of(cls, recipe: Recipe, corpus: Artefact, weights: Store, key: str) -> Self:
        """The job of a recipe on a corpus."""
        settings = recipe.audit.copies
        return cls(
            settings=settings, seed=recipe.seed, size_px=min(settings.size_px, corpus.manifest.statistics["size_px"]),
            weights_uri=weights.uri, weights_key=key,
        )  # fmt: skip


def plan_copy_encoder(recipe: Recipe, corpus: Artefact) -> str:
    """The digest of what decides an encoder."""
    settings = recipe.audit.copies.model_dump(mode="json", exclude=_PLACE)
    return plan_digest("copy-encoder", corpus.digest, recipe.seed, settings)


def initial(
    settings: CopyDetection, size_px: int, seed: int, prepare: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Run:
    """A network at its start, drawn by `seed`; `prepare` places and wraps it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = CopyEncoder(levels(settings.channels, size_px), settings.width)
    model = prepare(network)
    return Run(model, torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01))


def advance(
    state: Run, settings: CopyDetection, squares_R1SS: Tensor, seed: int, rank: int = 0, workers: int = 1
) -> Tensor:
    """Train one step on squares in [-1, 1], on any device; the loss, a scalar.

    Both views of a scan follow from (seed, position). A worker tells its own part of the batch apart, so that another
    number of workers trains another network.
    """
    where = positions(state.step, settings.batch_size, rank, workers)
    rows = torch.from_numpy(rows_at(where, len(squares_R1SS), seed))
    device = next(state.model.parameters()).device
    images = squares_R1SS[rows].float().to(device)
    views = [changed(images, [2 * position + view for position in where], seed) for view in (0, 1)]
    for group in state.optimizer.param_groups:
        group["lr"] = settings.learning_rate * _rate_factor(state.step, settings.steps)
    first, second = state.model(torch.cat(views)).chunk(2)
    loss = nt_xent(first, second, settings.temperature)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.step += 1
    return loss.detach()


def fit(settings: CopyDetection, squares_R1SS: Tensor, seed: int = 0) -> CopyEncoder:
    """The network trained on squares in [-1, 1], in this process."""
    state = initial(settings, squares_R1SS.shape[-1], seed)
    while state.step < settings.steps:
        advance(state, settings, squares_R1SS, seed)
    network: CopyEncoder = state.network
    return network.eval()


def train_copy_encoder(config: dict[str, Any]) -> dict[str, Any]:
    """Train an encoder under Ray Train and write its weights into the store.

    `config` is a CopyEncoderJob as a dict; the Ray Train dataset `train` holds corpus rows. Returns the last metrics,
    or as `refused` that the loss is no number, before a checkpoint is overwritten.
    """
    try:
        return _train(CopyEncoderJob.model_validate(config))
    except RecipeError as error:
        return {"refused": str(error)}


def _train(job: CopyEncoderJob) -> dict[str, Any]:
    settings = job.settings
    torch.set_num_threads(settings.cpus_per_worker)
    if not settings.use_gpu:
        keep_freed_memory()
    squares = _squares(job)
    state = initial(settings, job.size_px, job.seed, ray.train.torch.prepare_model)

    def step(rank: int, workers: int) -> Tensor:
        return advance(state, settings, squares, job.seed, rank, workers)

    length = Length(settings.steps, settings.batch_size, settings.checkpoint_every_steps)
    metrics = run_steps(state, CHECKPOINT, length, step, f"{job.section}.learning_rate")
    rank = ray.train.get_context().get_world_rank()
    if rank == 0:
        # Also where a resumed run finds all its steps done: what it had written may be gone.
        Store(job.weights_uri).write(job.weights_key, weights_of(state.network))
    report_checkpoint(CHECKPOINT, state.parts, metrics, rank)
    return metrics


def _rate_factor(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.02 + 0.49 * (1.0 + math.cos(math.pi * step / steps)))


def _squares(job: CopyEncoderJob) -> Tensor:
    """The train split [R, 1, S, S] float16 in [-1, 1], in the order of its ids."""
    shard = ray.train.get_dataset_shard("train")
    if shard is None:
        raise ArtefactError("training was given no 'train' scans")
    batches: Iterable[Any] = shard.iter_batches(batch_size=256, batch_format="pyarrow")
    found: list[tuple[str, Tensor]] = []
    for batch in batches:
        for row in pa.Table.to_pylist(batch):
            pixels = png_pixels(row["image"]["bytes"])
            # A corpus uses the whole range of the type.
            square = square_of(pixels, 8 * pixels.itemsize, job.size_px)
            found.append((row["id"], torch.from_numpy(square * 2.0 - 1.0).half()))
    if len(found) < 4:
        raise ArtefactError(f"the corpus holds {len(found)} train scans; an encoder needs at least 4")
    found.sort(key=lambda scan: scan[0])
    return torch.stack([square for _, square in found[: job.settings.max_scans]])[:, None]
