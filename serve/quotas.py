"""How much each tenant may ask for: images per minute, per day and at once, datasets at once and their size.

What is counted is work: an image of more than `image_steps` steps counts as several, since it takes as long as several.

Counted in the memory of one gateway: with several, each tenant may have each limit at each of them, and a restart
forgets the day. Nothing is counted for a limit that is not set.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scanloom.errors import BusyError, DeadlineError, QualityError, RecipeError
from serve.access import Caller
from serve.config import Service, Tenant

MOST_TENANTS = 10_000
"""Whose use is remembered; beyond, the one that asked longest ago and waits for nothing is forgotten."""
MINUTE_S, DAY_S = 60.0, 86_400.0
IN_FLIGHT_RETRY_S = 1.0
"""Told where requests of the tenant itself are in the way: nobody knows when they end."""
DATASET_RETRY_S = 60.0
AT_ONCE_S = 1.0
"""Within which engines refuse what they cannot make in time."""
# A time since 1970 as a float has steps of 0.2 microseconds; a wait that was told must suffice all the same.
_TOLERANCE_S = 1e-3


class QuotaError(BusyError):
    """A tenant's limit is reached; `limit` is the setting's name. `retry_after_s` is exact unless others ask too."""

    def __init__(self, message: str, retry_after_s: float, limit: str) -> None:
        super().__init__(message, retry_after_s)
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return (QuotaError, (str(self), self.retry_after_s, self.limit))


class AboveQuota(RecipeError):
    """More in one request than a tenant's limit allows at all, so that waiting is of no use; `limit` is its name."""

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit = limit

    def __reduce__(self) -> tuple[object, ...]:
        return (AboveQuota, (str(self), self.limit))


@dataclass
class Held:
    """What a request has taken of its tenant's limits, until it ends."""

    images: int
    each: int
    """What one of them counts as."""
    _made: int = 0

    @property
    def counted(self) -> int:
        """All that was taken."""
        return self.images * self.each

    def made(self, images: int) -> None:
        """These of the images were made, and stay counted; the others are given back when the request ends."""
        self._made = min(self.images, max(0, images))

    @property
    def unmade(self) -> int:
        """What is to be given back."""
        return (self.images - self._made) * self.each


@dataclass
class _Use:
    """What a tenant has used. `full_at`: when its bucket of images per minute is full again, seconds since 1970."""

    full_at: float = float("-inf")
    day: int = -1
    today: int = 0
    in_flight: int = 0
    placing: int = 0

    @property
    def waits(self) -> bool:
        return self.in_flight > 0 or self.placing > 0


@dataclass
class Quotas:
    """The limits of `service`, and what is used of them; safe to share between threads. `clock` in s since 1970."""

    service: Service
    clock: Callable[[], float] = time.time
    _used: OrderedDict[str, _Use] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def reserve(self, caller: Caller, images: int, steps: float = 1.0) -> Iterator[Held]:
        """Room for a request of so many images of `steps` steps each, while it is answered.

        Steps are those of an image of the size that the generator was trained on, which take as long.

        What the body does not tell as made is given back when it ends, unless an engine has worked for it all the same:
        where the caller went away, no attempt passed the quality checks, or it was late. QuotaError or AboveQuota:
        nothing was taken.
        """
        limits = self.service.tenant(caller.tenant)
        held = _held(images, steps, limits)
        for limit, most in (("images_at_once", limits.images_at_once), ("images_per_minute", limits.images_per_minute)):
            _require_possible(held, limit, most)
        with self._lock:
            use, now = self._use(caller.tenant), self.clock()
            if limits.images_at_once is not None and use.in_flight + held.counted > limits.images_at_once:
                told = f"{use.in_flight} images of the tenant's images_at_once, {limits.images_at_once}, are being made"
                raise QuotaError(f"{told}; wait for some", IN_FLIGHT_RETRY_S, "images_at_once")
            full_at = _filled(use, limits, held.counted, now)
            self._take_day(use, limits, held, now)
            use.full_at = full_at
            use.in_flight += held.counted
            day = use.day
        try:
            yield held
        except BaseException as error:
            if _has_cost(error, self.clock() - now):
                held.made(images)
            raise
        finally:
            with self._lock:
                use.full_at = _full_at(use, limits, self.clock()) - _filling_s(limits, held.unmade)
                use.in_flight -= held.counted
                _give_back_day(use, day, held)

    @contextmanager
    def charge_dataset(self, caller: Caller, images: int, open_jobs: int, steps: float = 1.0) -> Iterator[Held]:
        """Room for a dataset while it is placed; `open_jobs` of the tenant are accepted and have not ended.

        Its size is limited in images, what it adds to the day is work as everywhere.

        Counts towards the day unless the body does not tell the images as made, as for an order that was there before.
        """
        limits = self.service.tenant(caller.tenant)
        held = _held(images, steps, limits)
        _require_possible(Held(images, 1), "images_per_dataset", limits.images_per_dataset)
        with self._lock:
            use, now = self._use(caller.tenant), self.clock()
            if limits.datasets_at_once is not None and open_jobs + use.placing >= limits.datasets_at_once:
                told = f"the tenant has its datasets_at_once, {limits.datasets_at_once}, already"
                raise QuotaError(f"{told}; wait for one, or cancel it", DATASET_RETRY_S, "datasets_at_once")
            self._take_day(use, limits, held, now)
            use.placing += 1
            day = use.day
        try:
            yield held
        finally:
            with self._lock:
                use.placing -= 1
                _give_back_day(use, day, held)

    def _use(self, tenant: str) -> _Use:
        use = self._used.setdefault(tenant, _Use())
        self._used.move_to_end(tenant)
        if len(self._used) > MOST_TENANTS:
            forgotten = next((name for name, other in self._used.items() if not other.waits and name != tenant), None)
            if forgotten is not None:
                del self._used[forgotten]
        return use

    def _take_day(self, use: _Use, limits: Tenant, held: Held, now: float) -> None:
        """Count towards the UTC day, or raise and count nothing."""
        _require_possible(held, "images_per_day", limits.images_per_day)
        day = int(now // DAY_S)
        today = use.today if use.day == day else 0
        if limits.images_per_day is not None and today + held.counted > limits.images_per_day:
            told = f"{today} of the tenant's images_per_day, {limits.images_per_day}, are used"
            raise QuotaError(f"{told}; ask for fewer, or after midnight UTC", (day + 1) * DAY_S - now, "images_per_day")
        use.day, use.today = day, today + held.counted


def _held(images: int, steps: float, limits: Tenant) -> Held:
    return Held(images, max(1, math.ceil(steps / limits.image_steps)))


def _require_possible(held: Held, limit: str, most: float | None) -> None:
    if most is not None and held.counted > most:
        each, fewer = (f", each of which counts as {held.each},", " or fewer steps") if held.each > 1 else ("", "")
        raise AboveQuota(
            f"{held.images} images{each} in one request; the tenant's {limit} is {most:g}: ask for fewer{fewer}", limit
        )


def _filling_s(limits: Tenant, images: int) -> float:
    """Seconds in which the bucket gains so many images."""
    return images * MINUTE_S / limits.images_per_minute if limits.images_per_minute is not None else 0.0


def _has_cost(error: BaseException, elapsed_s: float) -> bool:
    """Whether an engine has worked for a request that ended by this error.

    If not charged, whoever leaves just before the end, again and again, has the engines to himself. What cannot be
    made in time is refused at once, and only what was begun turns out late.
    """
    if isinstance(error, DeadlineError):
        return elapsed_s > AT_ONCE_S
    return isinstance(error, QualityError) or not isinstance(error, Exception)


def _full_at(use: _Use, limits: Tenant, now: float) -> float:
    # What is being made may yet be given back: until it is settled it keeps its place in the bucket.
    return max(use.full_at, now + _filling_s(limits, use.in_flight))


def _filled(use: _Use, limits: Tenant, images: int, now: float) -> float:
    """When the bucket is full again once the images are taken of it; QuotaError where they are not in it.

    A bucket of one minute's images, by the time at which it is full (the generic cell rate algorithm, ITU-T I.371).
    """
    full_at = _full_at(use, limits, now) + _filling_s(limits, images)
    wait_s = full_at - now - MINUTE_S
    if limits.images_per_minute is not None and wait_s > _TOLERANCE_S:
        told = f"the tenant's images_per_minute, {limits.images_per_minute:g}, are used up"
        raise QuotaError(f"{told}; wait {wait_s:.1f} s", wait_s, "images_per_minute")
    return full_at


def _give_back_day(use: _Use, day: int, held: Held) -> None:
    # What was taken yesterday is no matter of today's.
    if use.day == day:
        use.today -= held.unmade
