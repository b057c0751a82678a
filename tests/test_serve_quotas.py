"""Limits of tenants: what they let through, what they refuse and for how long, and that nothing leaks."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scanloom.errors import BusyError, DeadlineError, DeadlineTooShort, QualityError
from serve import quotas as module
from serve.access import Caller
from serve.config import ServedGenerator, Service
from serve.quotas import DAY_S, AboveQuota, Held, QuotaError, Quotas

CALLER = Caller("clinic-a", "lab", frozenset({"generate"}))
OTHER = Caller("clinic-b", "lab", frozenset({"generate"}))
MIDNIGHT = 20_000 * DAY_S


class Clock:
    def __init__(self, now: float = MIDNIGHT + 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def quotas(clock: Clock, tenants: Mapping[str, Any] | None = None, **everyone: Any) -> Quotas:
    generators = (ServedGenerator(name="g", uri="x"),)
    return Quotas(
        Service.model_validate({"generators": generators, "tenants": tenants or {}, "everyone": everyone}), clock
    )


def take(limits: Quotas, images: int, made: int | None = None, caller: Caller = CALLER) -> None:
    with limits.reserve(caller, images) as held:
        held.made(images if made is None else made)


def refused(limit: str, held: AbstractContextManager[Held]) -> float:
    """Seconds after which a request may come again that is refused for this limit."""
    with pytest.raises(QuotaError) as error, held:
        pytest.fail("was let through")
    assert error.value.limit == limit
    assert limit in str(error.value)
    return error.value.retry_after_s


def test_a_minutes_images_go_at_once_and_the_next_after_exactly_the_told_wait() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=30)
    take(limits, 20)
    take(limits, 10)
    assert refused("images_per_minute", limits.reserve(CALLER, 5)) == pytest.approx(10.0)
    clock.now += 9.9
    assert refused("images_per_minute", limits.reserve(CALLER, 5)) == pytest.approx(0.1, abs=1e-5)
    clock.now += 0.1
    take(limits, 5)
    assert refused("images_per_minute", limits.reserve(CALLER, 1)) == pytest.approx(2.0)


def test_a_bucket_that_nobody_used_for_long_holds_no_more_than_a_minutes_images() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=30)
    take(limits, 30)
    clock.now += 3600
    take(limits, 30)
    assert refused("images_per_minute", limits.reserve(CALLER, 1)) == pytest.approx(2.0)


@given(
    st.floats(0.5, 1000.0),
    st.lists(st.tuples(st.floats(0.0, 90.0), st.integers(1, 40), st.floats(0.0, 1.0)), max_size=60),
)
def test_in_no_span_of_time_more_is_made_than_the_rate_and_a_minutes_stock(
    rate: float, asked: list[tuple[float, int, float]]
) -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=rate)
    made: list[tuple[float, int]] = []
    for wait_s, images, share in asked:
        clock.now += wait_s
        try:
            with limits.reserve(CALLER, images) as held:
                held.made(done := round(images * share))
        except AboveQuota:
            assert images > rate
        except QuotaError as error:
            # There is room then, and not before.
            clock.now += error.retry_after_s * 0.999 - 0.002
            if error.retry_after_s > 0.01:
                refused("images_per_minute", limits.reserve(CALLER, images))
            clock.now += error.retry_after_s * 0.001 + 0.002
            take(limits, images)
            made.append((clock.now, images))
        else:
            made.append((clock.now, done))
    assert _within(made, rate)


def _within(made: list[tuple[float, int]], rate: float) -> bool:
    """Whether in every span of time no more is made than the rate and a minute's stock."""
    for first, (start, _) in enumerate(made):
        count = 0
        for end, images in made[first:]:
            count += images
            if count > rate + (end - start) * rate / 60 + 1e-3 * rate + 1e-6:
                return False
    return True


@given(
    st.floats(5.0, 500.0),
    st.lists(
        st.tuples(st.floats(0.0, 40.0), st.sampled_from(["ask", "end"]), st.integers(1, 40), st.floats(0.0, 1.0)),
        max_size=80,
    ),
)
def test_requests_that_overlap_and_fail_in_part_make_no_more_than_that_either(
    rate: float, events: list[tuple[float, str, int, float]]
) -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=rate)
    running: list[tuple[AbstractContextManager[Held], Held]] = []
    made: list[tuple[float, int]] = []
    for wait_s, what, images, share in events:
        clock.now += wait_s
        if what == "ask":
            context: AbstractContextManager[Held] = limits.reserve(CALLER, images)
            with suppress(QuotaError, AboveQuota):
                running.append((context, context.__enter__()))
        elif running:
            context, held = running.pop(images % len(running))
            held.made(round(held.images * share))
            made.append((clock.now, round(held.images * share)))
            context.__exit__(None, None, None)
    assert _within(made, rate)


def test_what_was_not_made_is_given_back() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=10, images_per_day=10, images_at_once=10)
    take(limits, 10, made=4)
    with pytest.raises(RuntimeError, match="engine"), limits.reserve(CALLER, 6):
        raise RuntimeError("the engine failed")
    take(limits, 6, made=0)
    take(limits, 6)
    assert refused("images_per_minute", limits.reserve(CALLER, 1)) == pytest.approx(6.0)


@pytest.mark.parametrize(
    "error, elapsed_s, charged",
    [
        (asyncio.CancelledError(), 0.1, True),  # the client left, perhaps just before the end
        (QualityError("no attempt passed"), 0.1, True),
        (DeadlineError("late", 1.0), 5.0, True),
        (DeadlineError("cannot be in time", 1.0), 0.1, False),
        (BusyError("full", 1.0), 5.0, False),
        (DeadlineTooShort("too short"), 0.1, False),
        (RuntimeError("a fault of ours"), 5.0, False),
    ],
)
def test_what_engines_have_worked_for_is_charged_and_what_they_refused_is_not(
    error: BaseException, elapsed_s: float, charged: bool
) -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=1000, images_per_day=10, images_at_once=10)
    with suppress(type(error)), limits.reserve(CALLER, 10):
        clock.now += elapsed_s
        raise error
    if charged:
        refused("images_per_day", limits.reserve(CALLER, 1))
    else:
        take(limits, 10)


def test_whoever_leaves_just_before_the_end_again_and_again_gets_no_more_than_others() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=16, images_per_day=100)
    drawn = 0
    for _ in range(1000):
        clock.now += 1.0
        with suppress(asyncio.CancelledError, QuotaError), limits.reserve(CALLER, 16):
            drawn += 16
            raise asyncio.CancelledError
    assert drawn == 96


def test_what_may_yet_be_given_back_does_not_let_the_bucket_overflow() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=30)
    with limits.reserve(CALLER, 30):
        clock.now += 30
        # Half of the bucket would be full again, and with what is given back more than all of it.
        refused("images_per_minute", limits.reserve(CALLER, 15))
    take(limits, 30)
    refused("images_per_minute", limits.reserve(CALLER, 1))


def test_more_than_was_asked_for_is_not_counted() -> None:
    limits = quotas(Clock(), images_per_minute=10)
    take(limits, 5, made=500)
    take(limits, 5)
    refused("images_per_minute", limits.reserve(CALLER, 1))


def test_images_at_once_are_free_again_when_their_requests_end() -> None:
    limits = quotas(Clock(), images_at_once=8)
    with limits.reserve(CALLER, 5):
        assert refused("images_at_once", limits.reserve(CALLER, 4)) == module.IN_FLIGHT_RETRY_S
        with limits.reserve(CALLER, 3), limits.reserve(OTHER, 8):
            refused("images_at_once", limits.reserve(CALLER, 1))
    take(limits, 8)


def test_a_refused_request_takes_nothing_of_any_limit() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=100, images_at_once=8, images_per_day=50)
    for _ in range(6):
        take(limits, 8)
    for _ in range(20):
        assert refused("images_per_day", limits.reserve(CALLER, 3)) == DAY_S - 1000
    with limits.reserve(CALLER, 2) as held:
        for _ in range(20):
            refused("images_at_once", limits.reserve(CALLER, 7))
        held.made(2)
    clock.now = MIDNIGHT + DAY_S
    for _ in range(6):
        take(limits, 8)


def test_a_day_ends_at_midnight_utc_and_counts_images_and_datasets_together() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_day=100)
    take(limits, 30)
    with limits.charge_dataset(CALLER, 60, 0) as charge:
        charge.made(60)
    assert refused("images_per_day", limits.reserve(CALLER, 11)) == DAY_S - 1000.0
    assert refused("images_per_day", limits.charge_dataset(CALLER, 11, 0)) == DAY_S - 1000.0
    take(limits, 100, caller=OTHER)
    clock.now = MIDNIGHT + DAY_S - 0.5
    assert refused("images_per_day", limits.reserve(CALLER, 11)) == 0.5
    clock.now += 0.5
    take(limits, 100)


def test_what_was_asked_yesterday_and_not_made_is_not_given_back_today() -> None:
    clock = Clock(MIDNIGHT - 1)
    limits = quotas(clock, images_per_day=10)
    with limits.reserve(CALLER, 10):
        clock.now = MIDNIGHT
        take(limits, 10)
    refused("images_per_day", limits.reserve(CALLER, 1))


def test_datasets_at_once_count_those_that_are_being_placed() -> None:
    limits = quotas(Clock(), datasets_at_once=3)
    assert refused("datasets_at_once", limits.charge_dataset(CALLER, 1, 3)) == module.DATASET_RETRY_S
    with limits.charge_dataset(CALLER, 1, 1), limits.charge_dataset(CALLER, 1, 1):
        refused("datasets_at_once", limits.charge_dataset(CALLER, 1, 1))
        with limits.charge_dataset(OTHER, 1, 2):
            pass
    with limits.charge_dataset(CALLER, 1, 2):
        pass


def test_an_order_that_was_there_before_is_not_charged() -> None:
    limits = quotas(Clock(), images_per_day=100)
    for _ in range(5):
        with limits.charge_dataset(CALLER, 100, 0):
            pass
    with limits.charge_dataset(CALLER, 100, 0) as charge:
        charge.made(100)
    refused("images_per_day", limits.charge_dataset(CALLER, 1, 0))


@pytest.mark.parametrize("limit", ["images_per_minute", "images_at_once", "images_per_day"])
def test_what_no_waiting_makes_possible_is_no_matter_of_waiting(limit: str) -> None:
    everyone: dict[str, Any] = {limit: 4}
    limits = quotas(Clock(), **everyone)
    with pytest.raises(AboveQuota, match=f"{limit} is 4") as error, limits.reserve(CALLER, 5):
        pass
    assert error.value.limit == limit
    take(limits, 4)


def test_a_dataset_may_be_only_so_large() -> None:
    limits = quotas(Clock(), images_per_dataset=1000, images_at_once=1, images_per_minute=1)
    with pytest.raises(AboveQuota, match="images_per_dataset"), limits.charge_dataset(CALLER, 1001, 0):
        pass
    with limits.charge_dataset(CALLER, 1000, 0):
        pass


def test_each_tenant_has_its_own_limits_and_one_without_any_is_never_refused() -> None:
    limits = quotas(Clock(), {"clinic-b": {"datasets_at_once": None}}, images_per_minute=1, images_per_day=1)
    take(limits, 1)
    refused("images_per_minute", limits.reserve(CALLER, 1))
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(limits.reserve(OTHER, 1000)).made(1000)
            stack.enter_context(limits.charge_dataset(OTHER, 10**9, 10**6)).made(10**9)


def test_a_clock_that_is_set_back_neither_blocks_for_long_nor_gives_images_away() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=60)
    take(limits, 30)
    clock.now -= 5
    assert refused("images_per_minute", limits.reserve(CALLER, 30)) == pytest.approx(5.0)


def test_memory_is_bounded_and_whoever_waits_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TENANTS", 50)
    limits = quotas(Clock(), images_at_once=4, images_per_day=4)
    with limits.reserve(CALLER, 4) as held:
        for n in range(500):
            take(limits, 1, caller=Caller(f"t{n}", "w", frozenset()))
        assert len(limits._used) <= 50
        refused("images_at_once", limits.reserve(CALLER, 1))
        held.made(4)
    refused("images_per_day", limits.reserve(CALLER, 4))
    # The one that asked last is still known.
    refused("images_per_day", limits.reserve(Caller("t499", "w", frozenset()), 4))


def test_the_errors_cross_processes_whole() -> None:
    busy = pickle.loads(pickle.dumps(QuotaError("used up", 2.5, "images_per_minute")))
    assert (str(busy), busy.retry_after_s, busy.limit) == ("used up", 2.5, "images_per_minute")
    above = pickle.loads(pickle.dumps(AboveQuota("too many", "images_per_day")))
    assert (str(above), above.limit) == ("too many", "images_per_day")


def test_an_image_of_many_steps_counts_as_several_and_a_dataset_of_them_too() -> None:
    clock = Clock()
    limits = quotas(clock, images_per_minute=40, images_per_day=100, images_at_once=40, images_per_dataset=30)
    for steps, counts in ((1, 1), (50, 1), (51, 2), (1000, 20)):
        with limits.reserve(CALLER, 2, steps) as held:
            assert held.counted == 2 * counts
    # 2 x 20 are all that a minute has, of which nothing was made.
    with limits.reserve(CALLER, 2, 1000) as held:
        refused("images_at_once", limits.reserve(CALLER, 1))
        held.made(1)
    assert refused("images_per_minute", limits.reserve(CALLER, 1, 1000 + 1)) == pytest.approx(1.5)
    clock.now += 60
    with limits.charge_dataset(CALLER, 30, 0, 100) as charge:
        charge.made(30)
    # 20 + 60 of the 100 are used.
    take(limits, 20)
    refused("images_per_day", limits.reserve(CALLER, 1))


def test_what_its_steps_make_too_much_is_told_so() -> None:
    limits = quotas(Clock(), images_per_minute=10, image_steps=20, images_per_day=50)
    with pytest.raises(AboveQuota, match=r"3 images, each of which counts as 4, in one request.*or fewer steps"):
        take_of(limits.reserve(CALLER, 3, 61))
    with pytest.raises(AboveQuota, match="images_per_day"):
        take_of(limits.charge_dataset(CALLER, 26, 0, 40))


def take_of(held: AbstractContextManager[Held]) -> None:
    with held:
        pytest.fail("was let through")
