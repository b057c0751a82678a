"""Jobs of datasets on a Ray cluster, by its Jobs API.

A job gets no secret from here: what Ray keeps of a job (entrypoint, runtime environment, metadata) stands in its logs
and its dashboard. The driver inherits the environment of the node that it runs on, with the credentials that the node
was started with, and passes them to its workers itself (`jobs.cluster`).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import requests
from ray.job_submission import JobStatus, JobSubmissionClient

from scanloom.errors import BusyError
from serve.config import Datasets

REQUEST_S = 30.0
_NOT_STARTED = ("JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")
# Of the service's own runtime environment: where its code comes from.
_CODE = ("working_dir", "py_modules", "pip", "uv", "conda", "container", "image_uri", "py_executable")


@dataclass(frozen=True)
class JobState:
    """Where a submitted job stands."""

    live: bool
    """Waiting or running; or else it has ended."""
    running: bool = False
    """Of a live job: its driver was started."""
    exit_code: int | None = None
    """Of its driver; None where that was killed, or never started."""
    ended: float | None = None
    """Seconds since 1970."""
    message: str = ""
    """What Ray says of the end, with the last lines of the job's log."""
    started: bool = True
    """False where the cluster had no room for it in time."""


class JobsUnavailable(BusyError):
    """The cluster's Jobs API does not answer, or not now."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=REQUEST_S)

    def __reduce__(self) -> tuple[object, ...]:
        return (JobsUnavailable, (str(self),))


class _Client(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        # Without a limit, a lost head node would hold the caller for ever.
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_S, **options})


class RayJobs:
    """Submits `python -m PROGRAM RECIPE`. Every method raises JobsUnavailable where the cluster does not answer.

    `address`: of the Ray cluster or its dashboard; None: of the cluster that this process is part of.
    """

    def __init__(self, datasets: Datasets, address: str | None = None, program: str = "jobs.generate") -> None:
        self._datasets = datasets
        self._address = address
        self._program = program
        self._client: _Client | None = None

    def state(self, name: str) -> JobState | None:
        """The job of that name; None where this cluster has never heard of it."""
        try:
            told = self._connected().get_job_info(name)
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise self._lost(error) from error
        except (OSError, requests.RequestException) as error:
            raise self._lost(error) from error
        if told.status in (JobStatus.PENDING, JobStatus.RUNNING):
            return JobState(live=True, running=told.status == JobStatus.RUNNING)
        return JobState(
            live=False,
            exit_code=told.driver_exit_code,
            ended=told.end_time / 1000 if told.end_time else None,
            message=told.message or "",
            started=told.error_type not in _NOT_STARTED,
        )

    def submit(self, name: str, recipe: str) -> None:
        """Start the job, unless there is one of that name already, whatever has become of it."""
        try:
            self._connected().submit_job(
                submission_id=name,
                entrypoint=self.entrypoint(recipe),
                entrypoint_resources=dict(self._datasets.resources) or None,
                runtime_env=_code(),
            )
        except (RuntimeError, OSError, requests.RequestException) as error:
            # Of the answer to a name that is taken only the text is told apart: ask instead.
            if self.state(name) is None:
                raise self._lost(error) from error

    def stop(self, name: str) -> None:
        """Have the job stopped, if it is there; its `state` tells when it is."""
        try:
            self._connected().stop_job(name)
        except (RuntimeError, OSError, requests.RequestException) as error:
            if "status code 404" not in str(error):
                raise self._lost(error) from error

    def entrypoint(self, recipe: str) -> str:
        """The shell command of a job."""
        path = f"{shlex.quote(str(_root()))}${{PYTHONPATH:+:$PYTHONPATH}}"
        command = [sys.executable, "-m", self._program, recipe]
        # `exec`, so that the exit code is the driver's and a signal reaches it.
        return f"PYTHONPATH={path} exec nice -n {self._datasets.niceness} {shlex.join(command)}"

    def _connected(self) -> _Client:
        if self._client is None:
            own = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
            try:
                self._client = _Client(self._address or own)
            except (RuntimeError, OSError, ValueError, requests.RequestException) as error:
                raise self._lost(error) from error
        return self._client

    def _lost(self, error: BaseException) -> JobsUnavailable:
        self._client = None  # the head may come back at another address
        text = " ".join(str(error).split())[:300]
        return JobsUnavailable(f"Ray's Jobs API does not answer ({text}); datasets wait until it does")


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
