"""Sees to it that every accepted dataset is made: what the orders say is compared with the jobs that run, again and
again.

Nothing is remembered that must not be forgotten: a new dispatcher, on a new cluster too, goes on where the former
ended. Two of them at once submit no job twice, since a job's name is made of order and attempt, and a cluster takes
each name once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from scanloom.errors import RecipeError, ScanloomError, StoreError
from scanloom.store import Store
from serve.config import Service
from serve.logs import log_to_stderr
from serve.orders import Attempt, Orders, Ticket
from serve.ray_jobs import JobState, JobsUnavailable, RayJobs

LOG = logging.getLogger("scanloom.serve")
LONGEST_PASS_S = 600.0
"""A pass that takes longer hangs, and the dispatcher with it."""
FINAL_EXIT_CODE = 2
"""Of a job that would fail the same way again: `scanloom.console.run`."""
MOST_LOSSES = 5
"""Clusters in a row that an order may lose without an image made: it may be the order that takes them down."""
_LONGEST_PROBLEM = 600
_LONGEST_DELAY_S = 300.0
_ERROR = "error: "

Outcome = Literal["ended", "live", "waiting", "blocked"]


class Jobs(Protocol):
    """What is needed of a cluster; see `RayJobs`."""

    def state(self, name: str) -> JobState | None: ...
    def submit(self, name: str, recipe: str) -> None: ...
    def stop(self, name: str) -> None: ...


@dataclass(frozen=True)
class Pass:
    """What one look at all open orders found and did."""

    live: int
    """Orders with a job."""
    waiting: int
    """Orders that wait for their turn or for another attempt."""
    submitted: int
    ended: int


def job_name(ticket: Ticket, attempt: int) -> str:
    """The name of an attempt's job on every cluster."""
    return f"dataset-{ticket.id}-{attempt:04d}"


class Dispatcher:
    """`reconcile()` is one look at everything; `run()` repeats it until `close()`.

    As a Serve deployment of one replica it is started by Serve's first health check. Raises RecipeError where the
    settings have no `datasets`.
    """

    def __init__(self, service: Service, jobs: Jobs | None = None, clock: Callable[[], float] = time.time) -> None:
        if service.datasets is None:
            raise RecipeError("datasets: the service's settings have none; say where datasets are to be kept")
        self._settings = service.datasets
        self._orders = Orders(Store(service.datasets.store))
        self._jobs: Jobs = jobs or RayJobs(service.datasets)
        self._clock = clock
        # Of open orders: those that nobody had submitted when last looked at, and those that have ended though the
        # store refuses to forget them. Either may be forgotten, which costs another look.
        self._unsubmitted: set[Ticket] = set()
        self._ended: set[Ticket] = set()
        self._served: dict[str, float] = {}
        # Of running jobs: the images that were done, and since when it has been so many.
        self._seen: dict[Ticket, tuple[int, float]] = {}
        self._complaints: set[str] = set()
        self._busy_since: float | None = None
        self._loop: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    async def run(self) -> None:
        """Reconcile every `poll_s` seconds until closed; what fails is said once and tried again."""
        while not self._closed.is_set():
            await asyncio.to_thread(self._pass)
            try:
                async with asyncio.timeout(self._settings.poll_s):
                    await self._closed.wait()
            except TimeoutError:
                continue

    async def check_health(self) -> None:
        """Start the loop, if it was not. RuntimeError where it has ended or hangs."""
        if self._loop is None:
            log_to_stderr()
            self._loop = asyncio.create_task(self.run(), name="dispatcher")
        elif self._loop.done() and not self._closed.is_set():
            cause = None if self._loop.cancelled() else self._loop.exception()
            raise RuntimeError("the dispatcher's loop has ended") from cause
        since = self._busy_since
        if since is not None and time.monotonic() - since > LONGEST_PASS_S:
            raise RuntimeError(f"the dispatcher's look at all orders takes over {LONGEST_PASS_S:.0f} s")

    def close(self) -> None:
        """End the loop after the pass that runs; jobs go on."""
        self._closed.set()

    def _pass(self) -> None:
        self._busy_since = time.monotonic()
        before, self._complaints = self._complaints, set()
        try:
            done = self.reconcile()
            if done.submitted or done.ended:
                LOG.info(
                    "datasets: %d running, %d waiting, %d submitted, %d ended",
                    done.live, done.waiting, done.submitted, done.ended,
                )  # fmt: skip
        except ScanloomError as error:
            self._complain(error)
        except Exception:
            LOG.exception("datasets: an error that nobody foresaw; tried again")
        finally:
            self._busy_since = None
        for complaint in sorted(self._complaints - before):
            LOG.warning("datasets: %s", complaint)
        if before and not self._complaints:
            LOG.info("datasets: all is well again")

    # --- one pass ---------------------------------------------------------------------------------------------

    def reconcile(self) -> Pass:
        """Look at every open order once and do what is due.

        Raises StoreError or JobsUnavailable where store or cluster do not answer; what was done until then stands, and
        the next pass does the rest.
        """
        tickets = self._orders.open()
        known = set(tickets)
        self._unsubmitted &= known
        self._ended &= known
        self._seen = {ticket: seen for ticket, seen in self._seen.items() if ticket in known}
        outcomes: dict[Ticket, Outcome] = {}
        submitted = 0
        for ticket in tickets:
            if ticket not in self._unsubmitted and ticket not in self._ended:
                outcomes[ticket] = self._follow(ticket)
        live = Counter(ticket.tenant for ticket, outcome in outcomes.items() if outcome == "live")
        line = [ticket for ticket in tickets if ticket in self._unsubmitted or outcomes.get(ticket) == "waiting"]
        while line and live.total() < self._settings.jobs_at_once:
            ticket = self._next(line, live)
            line.remove(ticket)
            outcomes[ticket] = outcome = self._advance(ticket)
            if outcome == "live":
                submitted += 1
                live[ticket.tenant] += 1
                self._served[ticket.tenant] = self._clock()
        ended = sum(outcome == "ended" for outcome in outcomes.values())
        return Pass(live.total(), len(tickets) - len(self._ended) - live.total(), submitted, ended)

    def _next(self, line: list[Ticket], live: Counter[str]) -> Ticket:
        """Whose turn it is, of a line from old to new.

        What was begun goes first; then the tenant with the fewest jobs, then the one that was served longest ago.
        """

        def turn(ticket: Ticket) -> tuple[bool, int, float]:
            return ticket in self._unsubmitted, live[ticket.tenant], self._served.get(ticket.tenant, 0.0)

        return min(line, key=turn)

    def _follow(self, ticket: Ticket) -> Outcome:
        """What becomes of an order that may have a job, without submitting one. An order's own fault stops no other."""
        try:
            return self._followed(ticket)
        except (StoreError, JobsUnavailable):
            raise
        except ScanloomError as error:
            self._complain(error)
            return "blocked"

    def _followed(self, ticket: Ticket) -> Outcome:
        standing = self._orders.standing(ticket)
        if standing is None:
            # Whoever began to place it may still do so, for a time.
            return "ended" if self._orders.drop(ticket) else "blocked"
        if standing.ended:
            return self._close(ticket)
        attempt = self._orders.last_attempt(ticket)
        if attempt is None and not standing.cancel_asked:
            self._unsubmitted.add(ticket)
            return "waiting"
        job = self._jobs.state(job_name(ticket, attempt.number)) if attempt else None
        if standing.cancel_asked:
            return self._cancel(ticket, attempt, job)
        if job is None:
            return "waiting"  # to be submitted, or once more: on a cluster that is gone
        assert attempt is not None
        if job.live:
            if job.running and self._is_stalled(ticket):
                self._complain(ScanloomError(f"dataset {ticket.id}: its job makes nothing any more; it is stopped"))
                self._jobs.stop(job_name(ticket, attempt.number))
            return "live"
        return self._judge(ticket, attempt, job)

    def _is_stalled(self, ticket: Ticket) -> bool:
        done, now = self._orders.images_done(ticket), self._clock()
        before, since = self._seen.get(ticket, (-1, now))
        self._seen[ticket] = (done, since if done == before else now)
        return now - self._seen[ticket][1] > self._settings.stalled_s

    def _cancel(self, ticket: Ticket, attempt: Attempt | None, job: JobState | None) -> Outcome:
        if attempt is not None and job is not None and job.live:
            self._jobs.stop(job_name(ticket, attempt.number))
            return "live"
        if not self._orders.is_finished(ticket):  # it may have come first
            self._orders.cancelled(ticket)
            LOG.info("dataset %s of %s: cancelled", ticket.id, ticket.tenant)
        return self._close(ticket)

    def _judge(self, ticket: Ticket, attempt: Attempt, job: JobState) -> Outcome:
        """What follows from a job that has ended."""
        if self._orders.is_finished(ticket):
            return self._close(ticket)
        failures = attempt.failures + job.started
        if job.exit_code == FINAL_EXIT_CODE or failures >= self._settings.attempts:
            problem = why(job.message) or "its job ended without a word"
            self._orders.failed(ticket, problem)
            LOG.error("dataset %s of %s: failed for good: %s", ticket.id, ticket.tenant, problem)
            return self._close(ticket)
        delay_s = min(_LONGEST_DELAY_S, self._settings.poll_s * 2 ** (attempt.number - 1))
        return "blocked" if job.ended is not None and self._clock() < job.ended + delay_s else "waiting"

    def _close(self, ticket: Ticket) -> Outcome:
        self._ended.add(ticket)
        try:
            self._orders.close(ticket)
        except StoreError as error:
            self._complain(error)
        return "ended"

    def _advance(self, ticket: Ticket) -> Outcome:
        """Submit what has its turn, after another look: somebody else may have done so."""
        self._unsubmitted.discard(ticket)
        outcome = self._follow(ticket)
        if outcome != "waiting":
            return outcome
        self._unsubmitted.discard(ticket)
        try:
            return self._submit(ticket)
        except (StoreError, JobsUnavailable):
            raise
        except ScanloomError as error:
            # Such as another plan in the dataset's folder: no attempt can mend that.
            self._orders.failed(ticket, " ".join(str(error).split())[:_LONGEST_PROBLEM])
            LOG.error("dataset %s of %s: cannot be submitted: %s", ticket.id, ticket.tenant, error)
            return self._close(ticket)

    def _submit(self, ticket: Ticket) -> Outcome:
        order = self._orders.read(ticket)
        if order is None:
            return "blocked"
        recipe = self._orders.prepare(order)
        attempt = self._due(ticket)
        if attempt.losses > MOST_LOSSES:
            raise ScanloomError(
                f"{attempt.losses} clusters were lost while it ran, and no image was made; ask whoever runs them"
            )
        if not self._orders.begin_attempt(ticket, attempt):
            return "blocked"  # to be cancelled, which the next pass does
        name = job_name(ticket, attempt.number)
        self._seen.pop(ticket, None)
        self._jobs.submit(name, recipe)
        if self._orders.cancel_asked(ticket):
            self._jobs.stop(name)  # another dispatcher may have called it cancelled before the job was there
        LOG.info("dataset %s of %s: job %s submitted", ticket.id, ticket.tenant, name)
        return "live"

    def _due(self, ticket: Ticket) -> Attempt:
        """The attempt to submit: the last again where its job is not known here, else the next."""
        last = self._orders.last_attempt(ticket)
        if last is None:
            return Attempt(1, 0)
        job = self._jobs.state(job_name(ticket, last.number))
        if job is not None and job.live:
            return last
        done = self._orders.images_done(ticket)
        if job is None:
            losses = 0 if done > last.done else last.losses + 1
            return Attempt(last.number, last.failures, last.again + 1, losses, done)
        return Attempt(last.number + 1, last.failures + job.started, done=done)

    def _complain(self, error: ScanloomError) -> None:
        """Have it said after this pass, unless it was after the last one."""
        self._complaints.add(" ".join(str(error).split()))


def why(message: str) -> str:
    """Of what Ray says of a failed job, log and all, what tells why: the error that the job names, or how it ended and
    its last lines."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if named:
        return named[-1][:_LONGEST_PROBLEM]
    how = [lines[0].partition(", last available logs")[0]] if lines else []
    return " / ".join([*how, *lines[1:][-3:]])[:_LONGEST_PROBLEM]
