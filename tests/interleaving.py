"""Calls that share a store, run one step of the store at a time, in an order that a test draws, or killed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis import strategies as st

from scanloom.store import Store

STEPS = ("create", "write", "read", "exists", "names", "list", "delete")
LONGEST_S = 60.0
ANY_ORDER = examples(
    max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""How a test of what it draws is run; each example makes a store of its own."""


class Killed(BaseException):
    """The process that made the call is gone."""


class _Runner:
    """A call in a thread of its own, which halts before each step of a store."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self.over = self._killed = False
        self.result: Any = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.runner = self  # type: ignore[attr-defined]
        self._thread.start()
        assert self._halted.acquire(timeout=LONGEST_S)

    def _run(self) -> None:
        try:
            self.halt()
            self.result = self._call()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.result = error
        self.over = True
        self._halted.release()

    def halt(self) -> None:
        self._halted.release()
        assert self._go.acquire(timeout=LONGEST_S)
        if self._killed:
            raise Killed

    def step(self, *, kill: bool = False) -> None:
        """Let the call run to its next step, or die before it."""
        self._killed = kill
        self._go.release()
        assert self._halted.acquire(timeout=LONGEST_S)


def interleaved(data: st.DataObject, calls: Sequence[Callable[[], Any]], kills: int = 0, one_in: int = 1) -> list[Any]:
    """What the calls return or raise, which take their steps in an order that is drawn.

    Up to `kills` of them die, each before about one step in `one_in`.
    """
    left = data.draw(st.integers(0, kills)) if kills else 0
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(Store, name, _halting(getattr(Store, name)))
        runners = [_Runner(call) for call in calls]
        while running := [runner for runner in runners if not runner.over]:
            kill = left > 0 and data.draw(st.integers(0, one_in - 1)) == 0
            left -= kill
            running[data.draw(st.integers(0, len(running) - 1))].step(kill=kill)
    return [runner.result for runner in runners]


def _halting(method: Callable[..., Any]) -> Callable[..., Any]:
    def halting(*arguments: Any, **options: Any) -> Any:
        runner = getattr(threading.current_thread(), "runner", None)
        if runner is not None:
            runner.halt()
        return method(*arguments, **options)

    return halting
