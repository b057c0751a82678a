"""The audit log: every line in the log at once, and in the store once, whatever the store does meanwhile."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import StoreError
from scanloom.store import Store
from serve import audit_log
from serve.audit_log import AuditLog, Entry
from tests.fault_proxy import FaultProxy

pytestmark = pytest.mark.s3
KEY = re.compile(r"audit/\d{4}/\d{2}/\d{2}/\d{6}-[0-9a-f]{16}\.jsonl")


def entry(request: str = "r-1", **more: Any) -> Entry:
    return Entry(request, "clinic-a", "lab", "images", "done", **more)


def kept(store: Store) -> list[dict[str, Any]]:
    """All lines in the store, object by object."""
    return [json.loads(line) for found in store.list("audit") for line in store.read(found.key).splitlines()]


def until(condition: Callable[[], object]) -> None:
    """Look again and again until it holds, at most 30 s."""
    end = time.monotonic() + 30
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end
        pause.wait(0.01)


@pytest.fixture
def proxied(s3: EmbeddedS3, bucket: str, store_uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A proxy before the store, and the store through it."""
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy, Store(store_uri)


def test_a_line_says_who_asked_for_what_and_nothing_else(store_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    at = datetime(2026, 3, 4, 23, 30, 1, 234567, timezone(timedelta(hours=-5)))
    log = AuditLog(Store(store_uri))
    with caplog.at_level(logging.INFO, "scanloom.audit"):
        log.note(entry(generator="chest", generator_digest="ab", seed=7, first_index=3, count=2, time=at))
    told = {
        "time": "2026-03-05T04:30:01.234+00:00",
        "request": "r-1", "tenant": "clinic-a", "who": "lab", "action": "images", "outcome": "done",
        "generator": "chest", "generator_digest": "ab", "seed": 7, "first_index": 3, "count": 2,
    }  # fmt: skip
    assert [json.loads(record.getMessage()) for record in caplog.records] == [told]
    assert log.close()
    assert kept(Store(store_uri)) == [told]


def test_what_a_caller_chose_cannot_make_a_line_of_its_own(store_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "scanloom.audit"):
        log = AuditLog(Store(store_uri))
        log.note(entry('x"}\n{"tenant": "clinic-b", "request": "\u2028\x1b[2J'))
        log.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.isascii()
    assert line.isprintable()
    assert [found["tenant"] for found in kept(Store(store_uri))] == ["clinic-a"]


def test_lines_are_gathered_by_day_in_objects_of_their_own(store_uri: str) -> None:
    store = Store(store_uri)
    first = AuditLog(store)
    evening = datetime(2026, 3, 4, 23, 59, 59, tzinfo=UTC)
    for n in range(6):
        first.note(entry(f"r-{n}", time=evening + timedelta(seconds=n // 3)))
    assert first.close()
    keys = [found.key for found in store.list()]
    assert all(KEY.fullmatch(key) for key in keys)
    assert [key[:16] for key in keys] == ["audit/2026/03/04", "audit/2026/03/05"]
    assert [found["request"] for found in kept(store)] == [f"r-{n}" for n in range(6)]


def test_lines_come_to_the_store_without_a_close(store_uri: str) -> None:
    log = AuditLog(Store(store_uri), every_s=0.01)
    log.note(entry("r-1"))
    until(lambda: kept(Store(store_uri)))
    log.note(entry("r-2"))
    until(lambda: len(kept(Store(store_uri))) == 2)
    assert log.close()


def test_a_full_object_is_written_before_its_time(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MOST_LINES", 10)
    log = AuditLog(Store(store_uri), every_s=3600)
    for n in range(25):
        log.note(entry(f"r-{n}"))
    until(lambda: len(kept(Store(store_uri))) == 20)
    assert log.close()
    assert sorted(int(found["request"][2:]) for found in kept(Store(store_uri))) == list(range(25))


def test_many_threads_and_logs_lose_nothing_and_write_nothing_twice(store_uri: str) -> None:
    logs = [AuditLog(Store(store_uri), every_s=0.01) for _ in range(3)]

    def work(number: int) -> None:
        for n in range(200):
            logs[number % 3].note(entry(f"{number}-{n}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        assert log.close()
    assert sorted(found["request"] for found in kept(Store(store_uri))) == sorted(
        f"{number}-{n}" for number in range(6) for n in range(200)
    )


@pytest.mark.parametrize("fault", ["503", "403", "reset", "lost_ack"])
def test_a_store_that_fails_holds_up_nobody_and_gets_every_line_once(
    proxied: tuple[FaultProxy, Store], fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    proxy, store = proxied
    proxy.inject(fault, method="PUT", times=10_000)
    log = AuditLog(store, every_s=0.01, retry_s=(0.01,))
    log.note(entry("r-0"))
    until(lambda: len(proxy.injected) > 1)
    for n in range(1, 50):
        log.note(entry(f"r-{n}"))
    proxy.heal()
    assert log.close(60)
    assert [found["request"] for found in sorted(kept(store), key=lambda f: int(f["request"][2:]))] == [
        f"r-{n}" for n in range(50)
    ]
    assert caplog.text.count("lines wait") == caplog.text.count("answers again") <= 1
    assert fault != "403" or "answers again" in caplog.text


def test_noting_never_waits_for_the_store(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = threading.Event(), threading.Event()
    create = Store.create

    def held_up(self: Store, key: str, data: bytes) -> bool:
        writing.set()
        assert go_on.wait(30)
        return create(self, key, data)

    monkeypatch.setattr(Store, "create", held_up)
    log = AuditLog(Store(store_uri), every_s=0.0)
    log.note(entry("r-0"))
    assert writing.wait(30)
    for n in range(1, 2000):
        log.note(entry(f"r-{n}"))
    assert not go_on.is_set()
    go_on.set()
    assert log.close()
    assert len(kept(Store(store_uri))) == 2000


def test_a_backlog_is_bounded_and_the_store_learns_how_much_it_misses(
    store_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = Store.create
    down = threading.Event()
    down.set()

    def failing(self: Store, key: str, data: bytes) -> bool:
        if down.is_set():
            raise StoreError("s3://x: no answer", retryable=True)
        return create(self, key, data)

    monkeypatch.setattr(Store, "create", failing)
    log = AuditLog(Store(store_uri), every_s=0.01, most_waiting=20, retry_s=(0.01,))
    with caplog.at_level(logging.INFO):
        for n in range(50):
            log.note(entry(f"r-{n}"))
    assert sum(record.name == "scanloom.audit" for record in caplog.records) == 50
    assert caplog.text.count("further ones are here alone") == 1
    down.clear()
    until(lambda: len(kept(Store(store_uri))) == 21)
    assert log.close()
    found = kept(Store(store_uri))
    assert [line.get("request") for line in found if "request" in line] == [f"r-{n}" for n in range(20)]
    assert [(line["action"], line["count"]) for line in found if "request" not in line] == [("lost", 30)]


def test_closing_while_the_store_is_down_ends_in_time_and_says_what_is_missing(
    proxied: tuple[FaultProxy, Store], caplog: pytest.LogCaptureFixture
) -> None:
    proxy, store = proxied
    proxy.inject("403", method="PUT", times=10_000)
    log = AuditLog(store, every_s=0.01, retry_s=(3600.0,))
    log.note(entry())
    until(lambda: "lines wait" in caplog.text)
    assert not log.close()
    assert "1 lines are in the log alone" in caplog.text
    proxy.heal()
    assert kept(store) == []


def test_closing_tries_once_more_where_an_attempt_was_under_way(
    store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Store.create
    writing, go_on = threading.Event(), threading.Event()

    def failing_once(self: Store, key: str, data: bytes) -> bool:
        if not writing.is_set():
            writing.set()
            assert go_on.wait(30)
            raise StoreError("s3://x: no answer", retryable=True)
        return create(self, key, data)

    monkeypatch.setattr(Store, "create", failing_once)
    log = AuditLog(Store(store_uri), every_s=0.0, retry_s=(3600.0,))
    log.note(entry())
    assert writing.wait(30)
    assert not log.close(0.0)
    go_on.set()
    assert log.close()
    assert len(kept(Store(store_uri))) == 1


def test_without_a_store_lines_are_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(None)
    with caplog.at_level(logging.INFO, "scanloom.audit"):
        log.note(entry())
    assert len(caplog.records) == 1
    assert log.close()
