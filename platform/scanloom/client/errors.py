"""What can go wrong when the service is asked, named by what the caller does about it.

ServiceError
├── RequestRefused   the request cannot work as it is: change it; `fields` and `envelope` say where
│   └── NotFound     there is nothing of this name or id, for this key
├── NotAllowed       the key is missing, unknown, expired or lacks the scope: use another
├── Busy             no room now, after all retries: ask again after `retry_after_s`, or with a later deadline
├── ServiceDown      no answer, or none that can be used, after all retries: ask whoever runs the service
├── JobFailed        a dataset ended without a result; `job` says why
├── StillRunning     a dataset takes longer than one wanted to wait; it goes on
└── DamagedDownload  a file is not what the dataset's manifest says, however often it is fetched
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scanloom.api import DatasetJob, FieldProblem, Problem
from scanloom.errors import ScanloomError


class ServiceError(ScanloomError):
    """Root of the client's errors; `problem` is what the service said, where it said something."""

    def __init__(self, message: str, problem: Problem | None = None) -> None:
        super().__init__(message, problem)
        self.problem = problem

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def request(self) -> str | None:
        """Id under which the service's logs have the request."""
        return self.problem.instance if self.problem else None


class RequestRefused(ServiceError):
    """The request cannot work as it is; change it."""

    @property
    def fields(self) -> Sequence[FieldProblem]:
        """What is wrong, field by field."""
        return self.problem.errors if self.problem else ()

    @property
    def envelope(self) -> Mapping[str, Any] | None:
        """What the generator was trained on, where the request is outside of that."""
        return self.problem.envelope if self.problem else None


class NotFound(RequestRefused):
    """There is nothing of this name or id, for this key."""


class NotAllowed(ServiceError):
    """The key is missing, unknown, expired or lacks the scope; use another."""


class Busy(ServiceError):
    """The service has no room for the request now, or not in time."""

    @property
    def retry_after_s(self) -> float:
        """When asking again may help."""
        return (self.problem.retry_after_s if self.problem else None) or 1.0


class ServiceDown(ServiceError):
    """The service does not answer, or fails."""


class DamagedDownload(ServiceError):
    """A file is not what the dataset's manifest says."""


class _OfJob(ServiceError):
    def __init__(self, message: str, job: DatasetJob) -> None:
        super().__init__(message)
        self.args = (message, job)
        self.job = job


class JobFailed(_OfJob):
    """A dataset failed or was cancelled; `job.problem` says why."""


class StillRunning(_OfJob):
    """A dataset has not ended in the time one wanted to wait; it goes on."""
