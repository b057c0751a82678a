"""What `/readyz` goes by: asked seldom, and never held up by who does not answer."""

from __future__ import annotations

import asyncio
import threading

import pytest
from ray.exceptions import RayError

from serve.readiness import KEPT_S, Readiness


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_answer_is_kept_for_a_while_and_then_asked_for_again() -> None:
    clock, said = Clock(), iter([True, False])
    ready = Readiness(lambda: next(said), clock)

    async def asked() -> list[bool]:
        found = [await ready(), await ready()]
        clock.now += KEPT_S + 0.1
        return [*found, await ready()]

    assert asyncio.run(asked()) == [True, True, False]


def test_while_the_controller_does_not_answer_its_last_word_holds_and_one_thread_waits() -> None:
    clock, answer, calls = Clock(), threading.Event(), []

    def look() -> bool:
        calls.append(threading.get_ident())
        if len(calls) > 1:
            answer.wait(60)
        return len(calls) == 1

    ready = Readiness(look, clock)

    async def asked() -> tuple[list[bool], bool]:
        assert await ready()
        clock.now += KEPT_S + 0.1
        held = await asyncio.gather(*(ready(0.02) for _ in range(200)))
        # The threads that everybody shares are all free.
        await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(int) for _ in range(64))), 10)
        answer.set()
        return held, await ready(60)

    assert asyncio.run(asked()) == ([True] * 200, False)
    assert len(calls) == 2


def test_a_controller_that_is_away_changes_nothing_and_the_first_word_is_no() -> None:
    def away() -> bool:
        raise RayError

    assert asyncio.run(Readiness(away, Clock())()) is False


def test_a_fault_that_is_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Readiness(lambda: bool(1 // 0), Clock())())
