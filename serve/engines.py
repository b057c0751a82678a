"""The engines as the gateway sees them: an order goes to a replica, and is tried on another where that one dies.

Images are functions of their order, so that making them twice is safe: nobody can tell.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Protocol

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from scanloom.errors import BusyError, DeadlineError, ScanloomError
from scanloom.sampling.image_order import ImageOrder, MadeImages

TRIES = 2
RETRY_AFTER_S = 1.0
"""Told to clients when every replica is full, or one died."""
LOST = (
    RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, ReplicaUnavailableError,
    DeploymentUnavailableError,
)  # fmt: skip
"""What Ray raises where a replica, its host or its answer is gone."""


class UnavailableError(BusyError):
    """The engines that were asked died, or there is none; another may be there soon."""

    def __reduce__(self) -> tuple[object, ...]:
        return (UnavailableError, (str(self), self.retry_after_s))


class Method(Protocol):
    """What is used of a method of a Serve deployment handle."""

    def remote(self, order: ImageOrder, /) -> Any:
        """What can be awaited and cancelled."""


class Engines:
    """`await Engines(handle.make).make(order)` for the images; cancelling it frees the slots."""

    def __init__(self, method: Method) -> None:
        self._method = method

    async def make(self, order: ImageOrder) -> MadeImages:
        """Made by the first replica that lives long enough.

        Raises BusyError where the queue before the replicas is full, DeadlineError where the order is not made when it
        is due, UnavailableError where TRIES replicas died over it, and what the replica raises of scanloom's errors.
        """
        lost: BaseException | None = None
        for _ in range(TRIES):
            left_s = order.due - time.time()
            if left_s <= 0:
                break
            try:
                async with asyncio.timeout(left_s):
                    return await self._ask(order)
            except TimeoutError:
                break
            except LOST as error:
                lost = error
        else:
            raise UnavailableError(f"{TRIES} engines were lost over these images; ask again", RETRY_AFTER_S) from lost
        raise DeadlineError("the images were not made by their deadline; ask for a later one", RETRY_AFTER_S) from lost

    async def _ask(self, order: ImageOrder) -> MadeImages:
        answer = self._method.remote(order)
        try:
            made: MadeImages = await answer
        except asyncio.CancelledError:
            # Serve passes on that a client is gone, but not that a deadline is over.
            answer.cancel()
            raise
        except BackPressureError as error:
            raise BusyError("more requests wait for an engine than may; ask again", RETRY_AFTER_S) from error
        except RayTaskError as error:
            # As Ray raises it, it is of both classes, and its text is a traceback.
            if isinstance(error.cause, (ScanloomError, *LOST)):
                raise error.cause from None
            raise
        return made
