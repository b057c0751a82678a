"""Jobs of datasets on a Ray cluster: the service's way of starting `python -m jobs.generate`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import ray

from scanloom.ray_jobs import JobsApi, JobState, JobsUnavailable
from serve.config import Datasets

__all__ = ["JobState", "JobsUnavailable", "RayJobs"]
# Of the service's own runtime environment: where its code comes from.
_CODE = ("working_dir", "py_modules", "pip", "uv", "conda", "container", "image_uri", "py_executable")


class RayJobs:
    """Submits `python -m PROGRAM RECIPE`. Every method raises JobsUnavailable where the cluster does not answer.

    `address`: of the Ray cluster or its dashboard; None: of the cluster that this process is part of.
    """

    def __init__(self, datasets: Datasets, address: str | None = None, program: str = "jobs.generate") -> None:
        self._datasets = datasets
        self._api = JobsApi(address)
        self._program = program

    def state(self, name: str) -> JobState | None:
        """The job of that name; None where this cluster has never heard of it."""
        return self._api.state(name)

    def submit(self, name: str, recipe: str) -> None:
        """Start the job, unless there is one of that name already, whatever has become of it."""
        self._api.submit(name, self.entrypoint(recipe), resources=self._datasets.resources, runtime_env=_code())

    def stop(self, name: str) -> None:
        """Have the job stopped, if it is there; its `state` tells when it is."""
        self._api.stop(name)

    def entrypoint(self, recipe: str) -> str:
        """The shell command of a job."""
        path = f"{shlex.quote(str(_root()))}${{PYTHONPATH:+:$PYTHONPATH}}"
        command = [sys.executable, "-m", self._program, recipe]
        # `exec`, so that the exit code is the driver's and a signal reaches it.
        return f"PYTHONPATH={path} exec nice -n {self._datasets.niceness} {shlex.join(command)}"


def _code() -> dict[str, Any] | None:
    """Where the jobs' code comes from, if the service has it of a runtime environment; nothing else of that."""
    if not ray.is_initialized():
        return None
    own = dict(ray.get_runtime_context().runtime_env)
    return {name: own[name] for name in _CODE if own.get(name)} or None


def _root() -> Path:
    """The folder that holds the `jobs` package beside this one: the same on every node of a cluster."""
    found = importlib.util.find_spec("jobs")
    if found is not None and found.origin is not None:
        return Path(found.origin).parents[1]
    return Path(os.path.realpath(__file__)).parents[1]
