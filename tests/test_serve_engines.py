"""How the gateway takes what happens to engines: full, late, dead, wrong, cancelled."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError
from ray.serve.exceptions import BackPressureError

from scanloom.errors import BusyError, DeadlineError, RecipeError
from scanloom.sampling.image_order import ImageOrder, MadeImages
from serve.engines import TRIES, Engines, UnavailableError

MADE = MadeImages(np.zeros((1, 4, 4), np.uint8), [0], "d" * 64)


def order(within_s: float = 30.0) -> ImageOrder:
    return ImageOrder(request="r", generator="g", attributes={}, seed=1, due=time.time() + within_s)


class Answer:
    """Takes the place of a DeploymentResponse."""

    def __init__(self, outcome: MadeImages | BaseException | None) -> None:
        self.outcome = outcome
        self.cancelled = False

    def __await__(self) -> Any:
        return self._come().__await__()

    async def _come(self) -> MadeImages:
        if self.outcome is None:
            await asyncio.get_running_loop().create_future()
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """Takes the place of a handle's method: one outcome for each request that it gets; None never comes."""

    def __init__(self, *outcomes: MadeImages | BaseException | None) -> None:
        self._outcomes = list(outcomes)
        self.answers: list[Answer] = []

    def remote(self, order: ImageOrder) -> Answer:
        self.answers.append(Answer(self._outcomes.pop(0)))
        return self.answers[-1]


def raised_in_replica(error: Exception) -> BaseException:
    """As Ray hands over what a replica raised."""
    whole: BaseException = RayTaskError("make", "Traceback: a long one", error).as_instanceof_cause()
    return whole


def lost_answer() -> Exception:
    return ObjectLostError("00" * 28, None, "gone")


@pytest.mark.parametrize("loss", [ActorDiedError, lost_answer], ids=["replica", "answer"])
def test_an_order_whose_replica_dies_is_made_by_another(loss: Callable[[], Exception]) -> None:
    replicas = Replicas(loss(), MADE)
    assert asyncio.run(Engines(replicas).make(order())) is MADE
    assert len(replicas.answers) == 2


def test_when_several_die_over_it_the_client_is_told_to_ask_again() -> None:
    replicas = Replicas(*(ActorDiedError() for _ in range(TRIES)))
    with pytest.raises(UnavailableError, match="ask again") as told:
        asyncio.run(Engines(replicas).make(order()))
    assert told.value.retry_after_s > 0
    assert len(replicas.answers) == TRIES
    again = pickle.loads(pickle.dumps(told.value))
    assert (type(again), str(again), again.retry_after_s) == (
        UnavailableError,
        str(told.value),
        told.value.retry_after_s,
    )


def test_a_full_queue_is_busy() -> None:
    with pytest.raises(BusyError, match="ask again") as told:
        asyncio.run(Engines(Replicas(BackPressureError(64, 64, 429, 1.0))).make(order()))
    assert not isinstance(told.value, (DeadlineError, UnavailableError))


def test_what_is_not_made_in_time_is_late_and_its_slots_are_freed() -> None:
    replicas = Replicas(None)
    with pytest.raises(DeadlineError, match="deadline"):
        asyncio.run(Engines(replicas).make(order(within_s=0.05)))
    assert replicas.answers[0].cancelled


def test_no_replica_is_asked_when_the_deadline_is_over() -> None:
    replicas = Replicas(MADE)
    with pytest.raises(DeadlineError):
        asyncio.run(Engines(replicas).make(order(within_s=-1.0)))
    assert replicas.answers == []


def test_a_client_that_leaves_frees_its_slots() -> None:
    replicas = Replicas(None)

    async def leave() -> None:
        asked = asyncio.create_task(Engines(replicas).make(order()))
        while not replicas.answers:
            await asyncio.sleep(0)
        asked.cancel()
        await asked

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leave())
    assert replicas.answers[0].cancelled


@pytest.mark.parametrize(
    "error", [BusyError("full", 2.0), DeadlineError("late", 3.0), RecipeError("steps=2000: too many")], ids=repr
)
def test_what_a_replica_says_is_said_in_its_own_words(error: Exception) -> None:
    with pytest.raises(type(error)) as told:
        asyncio.run(Engines(Replicas(raised_in_replica(error))).make(order()))
    assert type(told.value) is type(error)
    assert str(told.value) == str(error)


def test_a_mistake_of_the_replica_stays_one() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(Engines(Replicas(raised_in_replica(ZeroDivisionError("in the engine")))).make(order()))
