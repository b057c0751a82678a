"""How far a job has come, as an object beside what it makes, for programs and for people who are elsewhere.

`progress.json` is replaced every few seconds while a job runs, and once when it ends. It is a report, not a record:
no reader of a dataset needs it, no digest covers it, a rival's may be overwritten. Of a job that was killed it stays
as it was: `state` says running, and `updated` is old.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from scanloom.artefact import MANIFEST, PROGRESS
from scanloom.errors import StoreError
from scanloom.store import Store

EVERY_S = 5.0
"""Between two versions of the object."""
STALE_S = 60.0
"""A running job whose object is older than this was killed, or has lost its store."""
_WINDOW_S = 120.0
_LOG = logging.getLogger(__name__)

State = Literal["running", "finished", "failed"]


class Progress(BaseModel):
    """One version of the object; times in UTC, ISO 8601."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    state: State
    """`failed` also where the job was interrupted: run it again to go on."""
    plan: str
    """Digest of what is being made."""
    images_total: int
    images_done: int
    """Of `images_total`: committed, or declared infeasible."""
    images_made: int
    """Committed."""
    images_per_s: float
    """Of `images_done`, over the last two minutes."""
    eta_s: float | None
    """Seconds until the end at that rate; None where there is no rate yet."""
    rejects: dict[str, int]
    """Draws that did not enter the dataset, by reason; `infeasible` counts images that no attempt could fill."""
    engine_s: float
    """What engines worked on what is committed, over all runs of the plan, in seconds."""
    cost: float | None
    """Of that work at the recipe's `cost_per_hour`; None where the recipe gives none."""
    started: str
    """When this run of the job began."""
    updated: str

    @property
    def age_s(self) -> float:
        """Seconds since this version was written, by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.updated)).total_seconds()


class Meter:
    """Counts that one thread sets and another reads, with the rate and the time left that follow."""

    def __init__(
        self, plan: str, total: int, cost_per_hour: float | None, done: int = 0, clock: float | None = None
    ) -> None:
        self._plan, self._total, self._cost_per_hour = plan, total, cost_per_hour
        self._started = _now()
        self._seen: deque[tuple[float, int]] = deque([(_clock(clock), done)])
        self._counted: tuple[int, int, Mapping[str, int], float] = (done, 0, {}, 0.0)

    def count(self, done: int, made: int, rejects: Mapping[str, int], engine_s: float) -> None:
        """Set the counts, as the fields of `Progress` have them."""
        self._counted = (done, made, dict(rejects), engine_s)

    @property
    def cost(self) -> float | None:
        """Of what is counted; see `Progress.cost`."""
        return None if self._cost_per_hour is None else self._cost_per_hour * self._counted[3] / 3600

    @property
    def figures(self) -> dict[str, float]:
        """What a progress line says beside images and time."""
        cost = {} if self.cost is None else {"cost": self.cost}
        rejects = sum(draws for reason, draws in self._counted[2].items() if reason != "infeasible")
        return {"rejects": rejects} | cost

    def read(self, state: State = "running", clock: float | None = None) -> Progress:
        """Where the run stands; `clock` in monotonic seconds, now by default."""
        done, made, rejects, engine_s = self._counted
        now = _clock(clock)
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = (done - before) / (now - since) if now > since else 0.0
        return Progress(
            state=state,
            plan=self._plan,
            images_total=self._total,
            images_done=done,
            images_made=made,
            images_per_s=rate,
            eta_s=(self._total - done) / rate if rate else None,
            rejects=dict(rejects),
            engine_s=engine_s,
            cost=self.cost,
            started=self._started,
            updated=_now(),
        )


class Reporter:
    """`with Reporter(store, meter):` keeps the object up to date from a thread of its own.

    A store that takes no report ends no job: that is said once, in the log.
    """

    def __init__(self, store: Store, meter: Meter, every_s: float = EVERY_S) -> None:
        self._store, self._meter, self._every_s = store, meter, every_s
        self._over = threading.Event()
        self._refused = False
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._write("failed" if kind else "finished")

    def _run(self) -> None:
        self._write("running")
        while not self._over.wait(self._every_s):
            self._write("running")

    def _write(self, state: State) -> None:
        try:
            self._store.write(PROGRESS, self._meter.read(state).model_dump_json(indent=1).encode())
        except StoreError as error:
            if not self._refused:
                _LOG.warning("no progress object: %s", error)
            self._refused = True


def progress_of_unfinished(uri: str) -> Progress | None:
    """What the job says that makes the artefact at `uri`; None where that is finished, or none says anything."""
    store = Store(uri)
    if store.exists(MANIFEST) or not store.exists(PROGRESS):
        return None
    try:
        return Progress.model_validate_json(store.read(PROGRESS))
    except ValidationError:
        return None


def _clock(given: float | None) -> float:
    return time.monotonic() if given is None else given


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
