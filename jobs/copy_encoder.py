"""How a copy encoder is trained on the cluster: Ray Train's part of `jobs.audit` and of `jobs.gate`."""

from __future__ import annotations

from typing import Any

import ray.data
from ray.train import DataConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster import interruptible, require_room
from scanloom import console
from scanloom.artefact import Artefact
from scanloom.shards.reader import parquet_paths
from scanloom.store import Store
from scanloom.training.copy_encoder import CopyEncoderJob, train_copy_encoder
from scanloom.training.reports import following
from scanloom.training.runs import outcome, run_config


def train_encoder(job: CopyEncoderJob, corpus: Artefact, runs: Store, name: str) -> dict[str, Any]:
    """Train an encoder on a corpus's train split, or what is left of it; the last metrics.

    `name` is that of the run below `runs`.
    """
    section = job.settings
    require_room(section.workers * section.cpus_per_worker, section.workers * section.use_gpu, f"{job.section}.workers")
    paths = parquet_paths(corpus, "train", section.max_scans)
    scans = ray.data.read_parquet(paths, filesystem=corpus.store.filesystem).select_columns(["id", "image"])
    with (
        console.progress("copy encoder", section.steps, "steps") as advance,
        following(console.step_follower(advance)) as reports,
    ):
        work: Any = train_copy_encoder  # Checkers see the class of Ray Tune's time, whose loops return nothing.
        trainer = TorchTrainer(
            work,
            train_loop_config=job.model_dump(mode="json"),
            datasets={"train": scans},
            # Every worker holds all scans; which ones it trains on follows from the step and its rank.
            dataset_config=DataConfig(datasets_to_split=[]),
            scaling_config=ScalingConfig(
                num_workers=section.workers, use_gpu=section.use_gpu,
                resources_per_worker={"CPU": section.cpus_per_worker},
            ),
            run_config=run_config(runs, name, max_failures=section.max_failures, keep_checkpoints=1, reports=reports),
        )  # fmt: skip
        return outcome(interruptible(trainer.fit))
