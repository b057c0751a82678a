"""Which generators are in memory: who is loaded next, and who makes room. No clock, no thread.

Of those that are idle, the one that was used least recently makes room. Where none ever is, and somebody has waited for
WAITS_S, the one that was loaded longest ago takes no more orders until it is idle: no generator keeps another away for
ever. One that could not be loaded is not tried again for FAILED_S, and the one that made room for it comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from scanloom.errors import BusyError

WAITS_S = 5.0
STAYS_S = 30.0
"""At least, once it is loaded, before it is made to leave: loading takes time as well."""
FAILED_S = 30.0
_RETRY_S = 5.0


class Shelf:
    """Times are seconds since 1970."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._loaded: OrderedDict[str, float] = OrderedDict()
        """Since when, by their last use, the latest at the end."""
        self._waits: dict[str, float] = {}
        """Since when somebody has waited for them."""
        self._failed: dict[str, tuple[float, Exception]] = {}
        self.leaving: str | None = None
        """The generator that is to make room."""
        self._made_room: str | None = None
        """The generator that was closed for the one that is being loaded."""

    def require(self, generator: str, now: float) -> None:
        """Raise what it failed by, if it could not be loaded a moment ago; BusyError if it is to make room."""
        if generator in self._failed:
            until, error = self._failed[generator]
            if now < until:
                raise error.with_traceback(None)
            del self._failed[generator]
        if generator == self.leaving:
            raise BusyError(
                f"generator {generator}: makes room for another one that was asked for; ask again", _RETRY_S
            )

    def used(self, generator: str) -> None:
        self._loaded.move_to_end(generator)

    def loaded(self, generator: str, now: float) -> None:
        self._loaded[generator] = now
        self._made_room = None

    def first(self, wanted: Sequence[str], now: float) -> str | None:
        """The generator that is to be loaded next, if another must make room for it: only then can it do harm."""
        missing = next((name for name in wanted if name not in self._loaded), None)
        if missing is None or len(self._loaded) < self._most:
            return None
        self._waits.setdefault(missing, now)
        return missing

    def failed(self, generator: str, error: Exception, now: float) -> None:
        """A generator could not be loaded, or would not be."""
        self._failed = {name: (until, e) for name, (until, e) in self._failed.items() if now < until}
        self._failed[generator] = now + FAILED_S, error

    def next(self, wanted: Sequence[str], is_idle: Callable[[str], bool], now: float) -> tuple[str, str | None] | None:
        """Which of the generators that are wanted and not loaded is to be loaded now, and which is to be closed for it.

        The one that is closed is forgotten here, but comes back where the other cannot be loaded and nobody else is
        wanted. None: nobody is wanted, or nobody can make room yet.
        """
        missing = [name for name in wanted if name not in self._loaded]
        if not missing and self._made_room is not None:
            missing = [self._made_room]
        self._waits = {name: self._waits.get(name, now) for name in missing}
        if not missing:
            self.leaving = None
            return None
        if len(self._loaded) < self._most:
            self._made_room = None
            return missing[0], None
        first = [self.leaving] if self.leaving is not None else []
        gone = next((name for name in [*first, *self._loaded] if is_idle(name)), None)
        if gone is not None:
            del self._loaded[gone]
            self.leaving, self._made_room = None, gone
            return missing[0], gone
        oldest = min(self._loaded, key=lambda name: self._loaded[name])
        if self.leaving is None and now >= max(self._waits[missing[0]] + WAITS_S, self._loaded[oldest] + STAYS_S):
            self.leaving = oldest
        return None
