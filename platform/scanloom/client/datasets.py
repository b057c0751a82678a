"""Datasets: ordered, followed, cancelled, found again."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from scanloom import console
from scanloom.api import BitsStored, DatasetJob, DatasetJobs, DatasetRequest, DatasetResult, OrderedCohort
from scanloom.client.errors import JobFailed, RequestRefused, StillRunning
from scanloom.client.flow import Flow, Pause
from scanloom.client.session import Session, checked, get, parser, post
from scanloom.recipe_generate import Dicom, ImageFormat

_PATH = "/v1/datasets"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_PAGE = 100
_LEAST_POLL_S, _MOST_POLL_S = 0.5, 5.0
_ENDED = ("finished", "failed", "cancelled")


@dataclass
class Ordered:
    """A dataset of a service; `job` is what the service said last."""

    session: Session
    job: DatasetJob

    @property
    def path(self) -> str:
        return f"{_PATH}/{quote(self.job.id, safe='')}"


def create(
    session: Session,
    images: int,
    *,
    cohort: OrderedCohort | Mapping[str, Any] | None = None,
    generator: str | None = None,
    seed: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    bits_stored: BitsStored | None = None,
    image_format: ImageFormat | None = None,
    webdataset: bool | None = None,
    dicom: Dicom | Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Flow[Ordered]:
    """Order a dataset of so many images; it is made while nobody waits.

    The cohort is as in a recipe, such as `{"kind": "balanced", "over": ["sex"]}`; None: like the corpus. The same order
    with the same seed (None: 0) is the same dataset. However often the request is sent, one dataset comes of it; with
    an `idempotency_key` of one's own also across programs.

    Raises RequestRefused for what cannot be made, NotAllowed, Busy or ServiceDown.
    """
    body = checked(
        DatasetRequest, images=images, cohort=cohort, generator=generator, seed=seed, steps=steps,
        guidance_scale=guidance_scale, bits_stored=bits_stored, image_format=image_format, webdataset=webdataset,
        dicom=dicom,
    )  # fmt: skip
    key = idempotency_key or secrets.token_hex(16)
    if not _KEY.fullmatch(key):
        raise RequestRefused("idempotency_key: expected 1 to 255 visible ASCII characters; nothing was sent")
    return Ordered(session, (yield from post(session, _PATH, body, parser(DatasetJob), {"Idempotency-Key": key})))


def find(session: Session, id: str) -> Flow[Ordered]:
    """The dataset of this id. Raises NotFound."""
    return Ordered(session, (yield from get(session, f"{_PATH}/{quote(id, safe='')}", DatasetJob)))


def every(session: Session, *, limit: int | None = None) -> Flow[list[Ordered]]:
    """The datasets that were ordered, newest first; at most `limit`, None: all."""
    found: list[Ordered] = []
    after = None
    while limit is None or len(found) < limit:
        wanted = _PAGE if limit is None else min(_PAGE, limit - len(found))
        page = yield from get(session, _PATH, DatasetJobs, {"limit": wanted, "after": after})
        found += [Ordered(session, job) for job in page.datasets]
        after = page.next
        if after is None:
            break
    return found


def refresh(ordered: Ordered) -> Flow[DatasetJob]:
    """Where the dataset stands now."""
    ordered.job = yield from get(ordered.session, ordered.path, DatasetJob)
    return ordered.job


def cancel(ordered: Ordered) -> Flow[DatasetJob]:
    """Make no more of the dataset. RequestRefused where it has ended otherwise."""
    ordered.job = yield from post(ordered.session, f"{ordered.path}/cancel", None, parser(DatasetJob))
    return ordered.job


def result(ordered: Ordered) -> Flow[DatasetResult]:
    """The files of the finished dataset, with links that expire. RequestRefused where it is not finished."""
    return get(ordered.session, f"{ordered.path}/result", DatasetResult)


def wait(ordered: Ordered, *, progress: bool = False, timeout_s: float | None = None) -> Flow[Ordered]:
    """Wait until the dataset is finished, with a progress bar (in the log where there is no terminal) if wanted.

    Raises JobFailed where it fails or is cancelled, StillRunning after `timeout_s`.
    """
    session = ordered.session
    until = float("inf") if timeout_s is None else session.clock() + timeout_s
    with _shown(ordered.job, progress) as show:
        while True:
            job = yield from refresh(ordered)
            show(job)
            if job.state in _ENDED:
                break
            left_s = until - session.clock()
            if left_s <= 0:
                raise StillRunning(f"dataset {job.id} is {job.state} after {timeout_s:g} s; wait for it again", job)
            yield Pause(min(left_s, _poll_s(job)))
    if job.state != "finished":
        raise JobFailed(f"dataset {job.id} {_ending(job)} (request {job.request})", job)
    return ordered


def _ending(job: DatasetJob) -> str:
    return f"failed: {job.problem or 'for a reason that is in the logs'}" if job.state == "failed" else "was cancelled"


def _poll_s(job: DatasetJob) -> float:
    """Often near the end, seldom while it is far."""
    return min(_MOST_POLL_S, max(_LEAST_POLL_S, (job.progress.eta_s or 0.0) / 20))


@contextmanager
def _shown(job: DatasetJob, progress: bool) -> Iterator[Callable[[DatasetJob], None]]:
    if not progress:
        yield lambda now: None
        return
    done = job.progress.images_done
    with console.progress(f"dataset {job.id}", job.images, "images", done=done) as advance:

        def show(now: DatasetJob) -> None:
            nonlocal done
            advance(now.progress.images_done - done)
            done = now.progress.images_done

        yield show
