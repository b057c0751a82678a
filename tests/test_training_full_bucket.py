"""A bucket that fills up while a denoiser trains: one clear line, and nothing of what was saved is lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.encode import encode
from jobs.finetune import finetune
from scanloom.artefact import open_artefact
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import ArtefactError
from scanloom.store import Store
from tests.fault_proxy import FaultProxy
from tests.phantom_corpus import publish_corpus
from tests.test_job_finetune import recipe

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]


def test_a_bucket_that_fills_up_ends_training_in_one_line_and_keeps_the_last_checkpoint(
    ray_cluster: None, s3: EmbeddedS3, store_uri: str, tmp_path: Path
) -> None:
    publish_corpus(f"{store_uri}/corpus")
    wanted = recipe(store_uri, checkpoint_every_steps=2, log_every_steps=1, max_failures=0)
    encode(wanted)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(wanted.model_dump(mode="json", exclude_none=True)))
    with FaultProxy(s3.endpoint) as proxy:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.finetune", str(file)],
            env=os.environ | {"AWS_ENDPOINT_URL": proxy.url}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        # The first is whole once there is something of the second.
        while len(_checkpoints(store_uri)) < 2 and job.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(timeout=0.1)
        proxy.inject("507", method="PUT|POST", path="checkpoint_", times=10**6)
        said, _ = job.communicate(timeout=600)
        assert "507" in proxy.injected
    assert job.returncode == 2, said[-2000:]
    told = [line for line in said.splitlines() if "cannot be written" in line]
    assert len(told) == 1, said[-2000:]
    assert "check the store's room" in told[0]
    assert "Traceback" not in said
    with pytest.raises(ArtefactError):
        open_artefact(f"{store_uri}/generator")
    kept = _checkpoints(store_uri)
    assert kept
    finetune(wanted)
    assert open_artefact(f"{store_uri}/generator").manifest.statistics["training"]["step"] == 8


def _checkpoints(store: str) -> set[str]:
    keys = (found.key for found in Store(f"{store}/runs").list())
    return {part for key in keys for part in key.split("/") if part.startswith("checkpoint_2")}
