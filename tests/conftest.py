"""What the whole session shares: one embedded S3 server, one Ray, the real scans where they are at hand."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from scanloom.embedded_s3 import EmbeddedS3

ROOT = Path(__file__).resolve().parents[1]

# Ray reads these once, while it is imported: before any test module imports it.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.25"
os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"
# Ray's own defaults: what one test has started, the next one need not.
os.environ.update({"RAY_num_workers_soft_limit": "-1", "RAY_idle_worker_killing_time_threshold_ms": "1000"})


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    """A running S3 server; the AWS_* variables of this process point to it for the rest of the session."""
    with EmbeddedS3(tmp_path_factory.mktemp("s3")) as server:
        before = dict(os.environ)
        os.environ.update(server.environment)
        yield server
        for name in server.environment:
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


@pytest.fixture(scope="session")
def bucket(s3: EmbeddedS3) -> str:
    """The name of the session's bucket."""
    s3.create_bucket("scanloom-tests")
    return "scanloom-tests"


@pytest.fixture
def store_uri(bucket: str) -> str:
    """A fresh prefix in the bucket, `s3://...`."""
    return f"s3://{bucket}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def ray_cluster(s3: EmbeddedS3) -> Iterator[None]:
    """One local Ray of two CPUs, and two for I/O as jobs have; its workers know the S3 server and a key."""
    import ray

    os.environ["SCANLOOM_PSEUDONYM_KEY"] = "0123456789abcdef" * 4
    known = s3.environment | {"SCANLOOM_PSEUDONYM_KEY": os.environ["SCANLOOM_PSEUDONYM_KEY"]}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": known})
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def bare_generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a generator that holds what an order of a dataset looks at."""
    from tests.served_datasets import publish_bare_generator

    return publish_bare_generator(str(tmp_path_factory.mktemp("generator"))).uri


@pytest.fixture(scope="session")
def nih_dicom() -> Path:
    """Real chest X-rays as DICOM tar shards."""
    return _real_scans("nih-cxr-dicom")


@pytest.fixture(scope="session")
def nih_png() -> Path:
    """Real chest X-rays as PNG files and labels.csv."""
    return _real_scans("nih-cxr")


def _real_scans(name: str) -> Path:
    for place in (ROOT.parent / "shared" / "data" / name, ROOT / "shared" / "data" / name):
        if place.is_dir():
            return place
    pytest.skip(f"real scans {name} are not in a folder shared/data beside the checkout")
