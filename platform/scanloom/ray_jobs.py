"""Jobs on a Ray cluster, by its Jobs API: what `scanloom submit` and the service's dispatcher both know of it.

What Ray keeps of a job (entrypoint, runtime environment, metadata) stands in its logs and its dashboard: no secret may
be among it. A driver inherits the environment of the node that it runs on, with the credentials that the node was
started with, and passes them to its workers itself.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from scanloom.errors import BusyError

LOG = logging.getLogger("scanloom.jobs")
REQUEST_S = 30.0
LOST_S = 300.0
"""For so long a cluster may be silent before `follow` gives up: a head that is moved is back within it."""
_AGAIN_S = 2.0
_NOT_STARTED = ("JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")
_LIVE = (JobStatus.PENDING, JobStatus.RUNNING)
_FAILED = (RuntimeError, OSError, ValueError, requests.RequestException, aiohttp.ClientError, AuthenticationError)


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
    stopped: bool = False
    """Somebody had it stopped."""


@dataclass(frozen=True)
class Job:
    """One that was submitted at some time."""

    name: str
    state: JobState
    metadata: Mapping[str, str] = field(default_factory=dict)
    begun: float | None = None
    """Seconds since 1970."""


class JobsUnavailable(BusyError):
    """The cluster's Jobs API does not answer, or not now, or not to us."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_s=REQUEST_S)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self),))


class JobsRefused(JobsUnavailable):
    """It answers, and takes the token for none of its own: asking again changes nothing."""


class _Client(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        # Without a limit, a lost head node would hold the caller for ever.
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_S, **options})


class JobsApi:
    """Every method raises JobsUnavailable where the cluster does not answer, JobsRefused where it knows no such token.

    `address`: of the dashboard (`http://head:8265`) or the cluster; None: of the cluster that this process is part of.
    `token`: sent with each request; None: what Ray itself finds, where its RAY_AUTH_MODE says so.
    """

    def __init__(self, address: str | None = None, token: str | None = None) -> None:
        self._address = address
        self._headers = {"Authorization": f"Bearer {token}"} if token else None
        self._client: _Client | None = None

    def state(self, name: str) -> JobState | None:
        """The job of that name; None where this cluster has never heard of it."""
        try:
            return _state(self._connected().get_job_info(name))
        except _FAILED as error:
            if "status code 404" in str(error):
                return None
            raise self._lost(error) from error

    def jobs(self) -> list[Job]:
        """All that were ever submitted, as far as the cluster remembers, the latest first."""
        try:
            found = [told for told in self._connected().list_jobs() if told.submission_id]
        except _FAILED as error:
            raise self._lost(error) from error
        found.sort(key=lambda told: told.start_time or 0, reverse=True)
        return [
            Job(str(told.submission_id), _state(told), told.metadata or {}, _seconds(told.start_time)) for told in found
        ]

    def submit(
        self, name: str, entrypoint: str, *, resources: Mapping[str, float] | None = None,
        runtime_env: dict[str, Any] | None = None, metadata: Mapping[str, str] | None = None,
    ) -> bool:  # fmt: skip
        """Start the job, unless there is one of that name already, whatever has become of it; whether this call did."""
        try:
            self._connected().submit_job(
                submission_id=name,
                entrypoint=entrypoint,
                entrypoint_resources=dict(resources) if resources else None,
                runtime_env=runtime_env,
                metadata=dict(metadata) if metadata else None,
            )
        except _FAILED as error:
            # Of the answer to a name that is taken only the text is told apart: ask instead.
            if self.state(name) is None:
                raise self._lost(error) from error
            return False
        return True

    def stop(self, name: str) -> None:
        """Have the job stopped, if it is there; its `state` tells when it is."""
        try:
            self._connected().stop_job(name)
        except _FAILED as error:
            if "status code 404" not in str(error):
                raise self._lost(error) from error

    def follow(self, name: str, write: Callable[[str], object]) -> JobState | None:
        """Where the job has ended; its log goes to `write` as it comes. None where the cluster has forgotten the job.

        A connection that breaks is made again, and nothing is written twice. A cluster that is silent for LOST_S
        ends it with JobsUnavailable; the job may go on all the same.
        """
        told, silent_since = 0, None
        while True:
            try:
                told = asyncio.run(self._tail(name, told, write))
                state = self.state(name)
            except JobsRefused:
                raise
            except JobsUnavailable:
                now = time.monotonic()
                if silent_since is None:
                    LOG.warning("%s: the cluster does not answer; the job may go on, asking again", name)
                    silent_since = now
                if now - silent_since > LOST_S:
                    raise
            else:
                silent_since = None
                if state is None or not state.live:
                    return state
            threading.Event().wait(_AGAIN_S)

    async def _tail(self, name: str, told: int, write: Callable[[str], object]) -> int:
        """How many characters of the log have been written, `told` of them before, when it ended or was cut off."""
        seen = 0
        try:
            async for text in self._connected().tail_job_logs(name):
                seen += len(text)
                fresh = text[max(0, len(text) - (seen - told)) :] if seen > told else ""
                if fresh:
                    write(fresh)
                    told = seen
        except _FAILED as error:
            LOG.debug("%s: log cut off (%s)", name, error)
        return told

    def _connected(self) -> _Client:
        if self._client is None:
            own = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
            try:
                self._client = _Client(self._address or own, headers=self._headers)
            except (*_FAILED, KeyError, TypeError) as error:  # the last two of an answer that is no dashboard's
                raise self._lost(error) from error
        return self._client

    def _lost(self, error: BaseException) -> JobsUnavailable:
        self._client = None  # the head may come back at another address
        text = " ".join(str(error).split())
        if isinstance(error, AuthenticationError):
            told = str(error).strip().partition("\n")[0]
            return JobsRefused(f"Ray's Jobs API refuses us ({told}); set RAY_AUTH_TOKEN to the cluster's token")
        return JobsUnavailable(f"Ray's Jobs API does not answer ({text[:300]}); wait until it does")


def _state(told: JobDetails) -> JobState:
    if told.status in _LIVE:
        return JobState(live=True, running=told.status == JobStatus.RUNNING)
    return JobState(
        live=False,
        exit_code=told.driver_exit_code,
        ended=_seconds(told.end_time),
        message=told.message or "",
        started=told.error_type not in _NOT_STARTED,
        stopped=told.status == JobStatus.STOPPED,
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
