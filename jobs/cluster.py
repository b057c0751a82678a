"""How every job joins Ray: the cluster named by RAY_ADDRESS, or a new local one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.data import DataContext

# Credentials and endpoints that workers on other hosts need too.
FORWARDED = ("AWS_", "SCANLOOM_")


@contextmanager
def connected() -> Iterator[None]:
    """A Ray session for the length of a job; a local cluster that it started ends with it."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    env = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    already = ray.is_initialized()
    if not already:
        ray.init(
            runtime_env={"env_vars": env}, log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING
        )
    DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        if not already:
            ray.shutdown()
