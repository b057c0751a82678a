"""What was asked of the service, by whom and with what outcome: one line each, kept in the log and in a store.

A line names who, what, when, seed and digests, and holds no image, key or token.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import count, islice, takewhile
from typing import Any, NamedTuple

from scanloom.errors import ScanloomError
from scanloom.store import Store

AUDIT = logging.getLogger("scanloom.audit")
LOG = logging.getLogger("scanloom.serve")
EVERY_S = 5.0
"""Between two objects in the store, unless one is full before."""
MOST_LINES = 1000
"""Of one object."""
MOST_WAITING = 100_000
"""Lines that wait for a store that is down, about 50 MB; what comes on top is in the log alone."""
CLOSE_S = 10.0
_RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


@dataclass(frozen=True)
class Entry:
    """One request; what does not apply is None and not written."""

    request: str
    """Its id."""
    tenant: str
    who: str
    """Id of the API key, or subject of the token."""
    action: str
    """What was asked for, such as `images`, `dataset`, `cancel`, `result`."""
    outcome: str
    """`done`, or the kind of the problem."""
    generator: str | None = None
    generator_digest: str | None = None
    gate: str | None = None
    """Digest of the privacy gate that images passed, or `ungated`."""
    seed: int | None = None
    first_index: int | None = None
    count: int | None = None
    """Images made, or ordered."""
    plan: str | None = None
    """Digest of a dataset's plan."""
    dataset: str | None = None
    """Id of a dataset's job."""
    time: datetime = field(default_factory=lambda: datetime.now(UTC))


class _Line(NamedTuple):
    day: str
    text: str

    @classmethod
    def of(cls, entry: Entry) -> _Line:
        """One line of JSON, ASCII only, so that nothing in it can end the line."""
        told = {name: value for name, value in asdict(entry).items() if name != "time" and value is not None}
        return cls._at(entry.time, told)

    @classmethod
    def of_lost(cls, lines: int) -> _Line:
        """Says that so many lines before it are in the log alone."""
        return cls._at(datetime.now(UTC), {"action": "lost", "count": lines})

    @classmethod
    def _at(cls, time: datetime, told: Mapping[str, Any]) -> _Line:
        utc = time.astimezone(UTC)
        return cls(utc.strftime("%Y/%m/%d"), json.dumps({"time": utc.isoformat(timespec="milliseconds"), **told}))


class AuditLog:
    """Takes entries without ever waiting for the store, which a thread of its own writes to.

    In the store, lines are gathered in objects `audit/YYYY/MM/DD/<time>-<random>.jsonl`, days and times in UTC, each
    created once and never changed. While the store is down up to `most_waiting` lines wait; a line that found no room
    is counted by a line `"action": "lost"` in the store as soon as that is back.
    """

    def __init__(
        self,
        store: Store | None,
        *,
        every_s: float = EVERY_S,
        most_waiting: int = MOST_WAITING,
        retry_s: Sequence[float] = _RETRY_S,
    ) -> None:
        self._every_s = every_s
        self._most_waiting = most_waiting
        self._retry_s = tuple(retry_s)
        self._waiting: deque[_Line] = deque()
        self._lost = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if store is not None:
            self._thread = threading.Thread(target=self._write, args=(store,), name="audit-log", daemon=True)
            self._thread.start()

    def note(self, entry: Entry) -> None:
        """Log the entry now, and keep it for the store."""
        line = _Line.of(entry)
        AUDIT.info("%s", line.text)
        if self._thread is None:
            return
        with self._changed:
            full = len(self._waiting) >= self._most_waiting
            self._lost += full
            first_lost = full and self._lost == 1
            if not full:
                self._waiting.append(line)
            if len(self._waiting) in (1, MOST_LINES):
                self._changed.notify_all()
        if first_lost:
            LOG.error(
                "audit log: %d lines wait for the store, which is the most; further ones are here alone",
                len(self._waiting),
            )

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Write what waits; True when all of it is in the store. False, and said in the log, after `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
        with self._changed:
            left = len(self._waiting) + self._lost
        if left:
            LOG.error("audit log: closed while the store was down; %d lines are in the log alone", left)
        return not left

    # --- the thread -------------------------------------------------------------------------------------------

    def _write(self, store: Store) -> None:
        while (batch := self._next()) and self._keep(store, batch):
            with self._changed:
                for _ in batch:
                    self._waiting.popleft()
                if self._lost:
                    self._waiting.append(_Line.of_lost(self._lost))
                    self._lost = 0

    def _next(self) -> list[_Line]:
        """The next lines, of one day, once there are enough or the first has waited long enough; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting)
            self._changed.wait_for(lambda: self._closing or len(self._waiting) >= MOST_LINES, self._every_s)
            lines = islice(self._waiting, MOST_LINES)
            return list(takewhile(lambda line: line.day == self._waiting[0].day, lines))

    def _keep(self, store: Store, batch: Sequence[_Line]) -> bool:
        """Write the lines as one object, however often it takes; False where the log is closed before that is done."""
        key = f"audit/{batch[0].day}/{datetime.now(UTC):%H%M%S}-{secrets.token_hex(8)}.jsonl"
        body = "".join(f"{line.text}\n" for line in batch).encode()
        for failures in count():
            with self._changed:
                # One attempt more after the log was closed: the store may be back just then.
                is_last = self._closing
            try:
                # The same name each time: an attempt whose acknowledgement was lost is found, not repeated.
                store.create(key, body)
            except ScanloomError as error:
                if failures == 0:
                    LOG.error("audit log: %s; lines wait, and are in this log too", error)
            else:
                if failures:
                    LOG.warning("audit log: the store answers again, after %d attempts", failures)
                return True
            with self._changed:
                if is_last:
                    return False
                self._changed.wait_for(lambda: self._closing, self._retry_s[min(failures, len(self._retry_s) - 1)])
        raise AssertionError("unreachable")
