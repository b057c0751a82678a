"""Desks as tests have them: opened and closed, asked for images, their generators behind gates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from scanloom.sampling.desk import Desk
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.sampling.workbench import Workbench
from tests.gated_generator import PATIENCE_S, GatedGenerator, bench_of


@contextmanager
def desks() -> Iterator[Callable[..., Desk]]:
    """Opens desks, and closes them in the end."""
    with ExitStack() as opened:

        def open_desk(load: Callable[[str], Workbench], **settings: Any) -> Desk:
            return opened.enter_context(closing(Desk(load, **settings)))

        yield open_desk


def order(generator: str = "a", *, within_s: float = PATIENCE_S, **changes: Any) -> ImageOrder:
    """Of one image, unless told otherwise."""
    told: dict[str, Any] = {"attributes": {}, "seed": 5, "steps": 3, "guidance_scale": 1.0} | changes
    return ImageOrder(request="r", generator=generator, due=time.time() + within_s, **told)


def result(future: Future[MadeImages]) -> MadeImages:
    return future.result(PATIENCE_S)


def settled(desk: Desk) -> None:
    """Wait until nothing is in the desk's slots any more."""
    deadline = time.monotonic() + PATIENCE_S
    with desk._changed:
        while desk.status().slots_used + desk.status().waiting:
            assert time.monotonic() < deadline, desk.status()
            # Not every freed slot is told, so a wait ends by itself, too.
            desk._changed.wait(0.01)


def gated(
    opened: Callable[..., Desk], *names: str, slots: int = 4, **settings: Any
) -> tuple[Desk, list[GatedGenerator]]:
    """A desk with generators that are loaded and whose gates are shut, and share a log."""
    log: list[str] = []
    generators = {name: GatedGenerator(name, log) for name in names}
    desk = opened(lambda name: bench_of(generators[name], slots=slots), loaded=len(names), **settings)
    for name in names:
        desk.open(name).result(PATIENCE_S)
        generators[name].shut()
    log.clear()
    return desk, list(generators.values())


class Clock:
    """Seconds since 1970, as the test has it."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now
