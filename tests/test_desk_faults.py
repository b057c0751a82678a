"""What goes wrong at the desk: one order's fault is its own, and a fault of the desk is told as one that passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from scanloom.errors import BusyError, QualityError, RecipeError
from scanloom.recipe import Quality
from scanloom.sampling.desk import Desk
from scanloom.sampling.quality import Appearance
from tests.desks import desks, gated, order, result, settled
from tests.faulty_generator import FaultyGenerator
from tests.gated_generator import PATIENCE_S, GatedGenerator, bench_of


@pytest.fixture
def opened() -> Iterator[Callable[..., Desk]]:
    with desks() as open_desk:
        yield open_desk


def test_what_no_attempt_could_make_fails_its_own_order_only(opened: Callable[..., Desk]) -> None:
    judges = [Appearance(Quality(), 8)]
    desk = opened(lambda _: bench_of(FaultyGenerator(), slots=4, judges=judges, attempts=4))
    hopeless = desk.take(order(attributes={"findings": ("Cardiomegaly",)}, steps=1, count=2))
    fine = desk.take(order(attributes={"findings": ()}, steps=1, count=3))
    with pytest.raises(QualityError, match=r"image [01] of seed 5: none of 4 attempts .*blank"):
        result(hopeless)
    assert list(result(fine).attempts) == [0, 0, 0]
    settled(desk)
    assert desk.status().rejects["blank"] >= 4


class _Overflowing(FaultyGenerator):
    """What it makes for `Effusion` are no numbers."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        broken = (latents[:, 1:, :1, :1] == 0.0).expand(-1, 1, 8, 8)
        return super().decode(latents).masked_fill(broken, torch.nan)


def test_pixels_that_are_no_numbers_fail_their_own_order_only(opened: Callable[..., Desk]) -> None:
    desk = opened(lambda _: bench_of(_Overflowing(), slots=8, attempts=3))
    broken = desk.take(order(attributes={"findings": ("Effusion",)}, steps=1, count=3))
    others = [desk.take(order(attributes={"findings": ()}, steps=1, seed=seed, count=3)) for seed in range(3)]
    with pytest.raises(QualityError, match="not-numbers"):
        result(broken)
    for other in others:
        assert np.isfinite(result(other).pixels).all()
    assert desk.healthy


def test_attributes_that_a_generator_does_not_know_fail_their_own_order_only(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a")
    other = desk.take(order(count=2))
    generator.until_shut()
    wrong = desk.take(order(attributes={"unheard of": 1.0}, count=2))
    too_many = desk.take(order(steps=100_000))
    generator.let(None)
    with pytest.raises(RecipeError, match="attributes"):
        result(wrong)
    with pytest.raises(RecipeError, match="steps"):
        result(too_many)
    result(other)
    settled(desk)


def test_an_unexpected_error_ends_all_orders_and_the_desk_says_that_it_is_ill(opened: Callable[..., Desk]) -> None:
    class Broken(GatedGenerator):
        def denoise(self, latents: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            super().denoise(latents, timesteps, condition)
            if len(self.log) > 30:
                raise RuntimeError("the device is lost")
            return -latents

    generator = Broken()
    desk = opened(lambda _: bench_of(generator, slots=2))
    futures = [desk.take(order(steps=50, seed=seed)) for seed in range(4)]
    for future in futures:
        with pytest.raises(BusyError, match="another one takes its place") as error:
            result(future)
        assert error.value.retry_after_s > 0.0
        assert "device is lost" in str(error.value.__cause__)
    assert not desk.healthy
    assert not desk.status().healthy
    with pytest.raises(BusyError):
        desk.take(order())
    with pytest.raises(BusyError):
        desk.open("b")


def test_a_step_that_hangs_makes_the_desk_ill_and_one_that_ends_makes_it_well(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", stuck_s=0.01)
    future = desk.take(order())
    deadline = time.monotonic() + PATIENCE_S
    while desk.healthy:
        assert time.monotonic() < deadline
    with pytest.raises(BusyError):
        desk.take(order())
    generator.let(None)
    result(future)
    assert desk.healthy
