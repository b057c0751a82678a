"""How a network is trained on a corpus's scans: Ray Train's part of `jobs.encode`, `probe`, `gate` and `audit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray.data
from pydantic import BaseModel
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster import interruptible, require_room
from scanloom import console
from scanloom.artefact import Artefact
from scanloom.section import DataParallel
from scanloom.shards.reader import parquet_paths
from scanloom.store import Store
from scanloom.training.copy_encoder import CopyEncoderJob, train_copy_encoder
from scanloom.training.reports import following
from scanloom.training.runs import outcome, run_config


def require_workers(settings: DataParallel, section: str) -> None:
    """Refuse more workers than there is room for; `section` of the recipe says how many."""
    workers = settings.workers
    require_room(workers * settings.cpus_per_worker, workers * settings.use_gpu, f"{section}.workers")


def scans_of(corpus: Artefact, splits: Sequence[str], columns: Sequence[str], most: int) -> dict[str, ray.data.Dataset]:
    """Some columns of the first shards of each split that hold `most` scans, read as they are asked for."""
    return {
        split: ray.data.read_parquet(
            parquet_paths(corpus, split, most), filesystem=corpus.store.filesystem
        ).select_columns(list(columns))
        for split in splits
    }  # fmt: skip


def train(
    what: str, settings: DataParallel, work: Callable[[dict[str, Any]], Any], job: BaseModel,
    scans: dict[str, ray.data.Dataset], runs: Store, name: str,
) -> dict[str, Any]:  # fmt: skip
    """Train as a section of the recipe says, or what is left of it; what `work` returned on worker 0.

    Every worker does `work` on `job` as a dict. `what` is trained is shown; `name` is that of the run below `runs`.
    """
    with (
        console.progress(what, settings.steps, "steps") as advance,
        following(console.step_follower(advance)) as reports,
    ):
        loop: Any = work  # Checkers see the class of Ray Tune's time, whose loops return nothing,
        datasets: Any = scans  # and whose annotations leave out which datasets there may be.
        trainer = TorchTrainer(
            loop,
            train_loop_config=job.model_dump(mode="json"),
            datasets=datasets,
            # Every worker holds all scans; which ones it trains on follows from the step and its rank.
            dataset_config=DataConfig(datasets_to_split=[]),
            scaling_config=ScalingConfig(
                num_workers=settings.workers, use_gpu=settings.use_gpu,
                resources_per_worker={"CPU": settings.cpus_per_worker},
            ),
            run_config=run_config(runs, name, max_failures=settings.max_failures, keep_checkpoints=1, reports=reports),
        )  # fmt: skip
        return outcome(interruptible(trainer.fit))


def train_encoder(job: CopyEncoderJob, corpus: Artefact, runs: Store, name: str) -> dict[str, Any]:
    """Train a copy encoder on a corpus's train split."""
    require_workers(job.settings, job.section)
    scans = scans_of(corpus, ["train"], ["id", "image"], job.settings.max_scans)
    return train("copy encoder", job.settings, train_copy_encoder, job, scans, runs, name)
