"""The desk: images to order in one thread, whoever asks; the same images as those of a dataset."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from scanloom.artefact import open_artefact
from scanloom.errors import BusyError, DeadlineError, DeadlineTooShort
from scanloom.recipe import CellsCohort, Generate, Quality
from scanloom.sampling.admission import Pace
from scanloom.sampling.bookings import MARGIN
from scanloom.sampling.desk import Desk
from scanloom.sampling.engine import ImageRequest
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.sampling.plan import Plan, compile_plan, specify
from scanloom.sampling.production import Produced, ShardEngine, produce, quantise
from scanloom.sampling.quality import Appearance
from scanloom.sampling.workbench import Workbench, open_workbench
from tests.desks import Clock, desks, gated, order, result, settled
from tests.gated_generator import PATIENCE_S, GatedGenerator, bench_of
from tests.tiny_generator import STATISTICS, publish_generator

ANYTHING = Quality(least_contrast=0.0, most_white=1.0, most_black=1.0)


@pytest.fixture
def opened() -> Iterator[Callable[..., Desk]]:
    with desks() as open_desk:
        yield open_desk


# --- the same images as a dataset's -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("tiny"))).uri


def dataset(uri: str, slots: int, quality: Quality = ANYTHING, **changes: Any) -> tuple[Plan, Produced]:
    """The rows of a dataset of one shard, and what production makes of them."""
    section = Generate(
        images=12, images_per_shard=12, slots=slots, steps=3, seed=11, quality=quality,
        cohort=CellsCohort(cells=({"sex": "F", "view": "PA", "share": 1}, {"age": 70, "findings": [], "share": 2})),
        **changes,
    )  # fmt: skip
    digest = open_artefact(uri, "generator").digest
    plan = compile_plan(specify(section, "tiny", digest, STATISTICS))
    engine = ShardEngine(plan.spec, uri, "cpu", 1)
    made = produce(engine._engine, plan.spec, plan.rows(0), [Appearance(quality, plan.spec.bits_stored)])
    return plan, made


def asked_like(plan: Plan, **changes: Any) -> list[ImageOrder]:
    """Orders for the images of a dataset, one each, in another order."""
    spec = plan.spec
    told = {"seed": spec.seed, "steps": spec.steps, "guidance_scale": spec.guidance_scale} | changes
    rows = plan.rows(0).to_pylist()[::-1]
    return [order(attributes=spec.attributes.from_row(row), first_index=row["index"], **told) for row in rows]


@pytest.mark.parametrize("bits_stored", [8, 16])
def test_an_image_is_bit_for_bit_that_of_a_dataset_where_the_rows_of_a_call_are_equal(
    tiny: str, bits_stored: Any, opened: Callable[..., Desk]
) -> None:
    plan, made = dataset(tiny, slots=4, bits_stored=bits_stored)
    desk = opened(lambda _: open_workbench(tiny, slots=8, rows=4, quality=ANYTHING))
    futures = [desk.take(each) for each in asked_like(plan, bits_stored=bits_stored)]
    for row, pixels in zip(plan.rows(0).to_pylist(), made.pixels, strict=True):
        [image] = result(futures[len(futures) - 1 - row["index"]]).pixels
        assert image.dtype == pixels.dtype
        np.testing.assert_array_equal(image, pixels)
    assert len(np.unique(made.pixels.reshape(12, -1), axis=0)) == 12


def test_with_other_rows_an_image_is_that_of_a_dataset_but_for_rounding(tiny: str, opened: Callable[..., Desk]) -> None:
    """Rows of a call change the last bits of the network's answers: a level of 8 bits, here and there."""
    plan, made = dataset(tiny, slots=32)
    desk = opened(lambda _: open_workbench(tiny, slots=8, rows=2, quality=ANYTHING))
    images = np.concatenate([result(desk.take(each)).pixels for each in asked_like(plan)])[::-1]
    differences = np.abs(images.astype(int) - made.pixels.astype(int))
    assert differences.max() <= 1
    assert np.count_nonzero(differences) <= 0.001 * differences.size


def test_what_is_refused_is_drawn_again_as_in_a_dataset(tiny: str, opened: Callable[..., Desk]) -> None:
    _, free = dataset(tiny, slots=4)
    contrasts = [np.ptp(np.percentile(pixels, [2, 98])) / 255 for pixels in free.pixels]
    picky = ANYTHING.model_copy(update={"least_contrast": float(np.median(contrasts)), "attempts": 40})
    plan, made = dataset(tiny, slots=4, quality=picky)
    assert any(made.attempts)
    desk = opened(lambda _: open_workbench(tiny, slots=8, rows=4, quality=picky))
    futures = [desk.take(each) for each in asked_like(plan)][::-1]
    assert [result(future).attempts for future in futures] == [[attempt] for attempt in made.attempts]
    for future, pixels in zip(futures, made.pixels, strict=True):
        np.testing.assert_array_equal(result(future).pixels[0], pixels)
    counted = sum(result(future).rejects.get("blank", 0) for future in futures)
    assert desk.status().rejects == {"blank": counted}
    assert counted == sum(made.attempts)


def test_images_of_mixed_sizes_steps_and_guidance_are_those_made_alone(tiny: str, opened: Callable[..., Desk]) -> None:
    # Before the desk loads its own: diffusers cannot open two models at once.
    alone = open_workbench(tiny, slots=4, rows=4, quality=ANYTHING)
    desk = opened(lambda _: open_workbench(tiny, slots=6, rows=4, quality=ANYTHING))
    scales, shapes = (1.0, 2.0, 4.5), (None, (4, 8, 16), (4, 8, 8))
    kinds: list[dict[str, Any]] = [
        {"steps": 1 + n % 5, "guidance_scale": scales[n % 3], "latent_shape": shapes[n % 3]} for n in range(12)
    ]
    orders = [order(seed=n, count=1 + n % 2, attributes={"age": 20.0 + n}, **kind) for n, kind in enumerate(kinds)]
    futures = [desk.take(each) for each in orders]
    for each, future in zip(orders, futures, strict=True):
        made = result(future)
        assert made.digest == alone.digest
        for number, image in enumerate(made.pixels):
            [expected] = alone.engine.run([
                ImageRequest(number, each.seed, each.attributes, each.steps, each.guidance_scale, 0, each.latent_shape)
            ])  # fmt: skip
            np.testing.assert_array_equal(image, quantise(expected.image, 8))
    assert desk.status().images == sum(each.count for each in orders)


# --- turns and slots --------------------------------------------------------------------------------------------


def test_a_newcomer_starts_at_the_next_step_and_leaves_when_it_is_done(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a")
    long = desk.take(order(steps=50))
    generator.until_shut()
    generator.let(10)
    short = desk.take(order(steps=2, seed=6))
    generator.until_shut()
    generator.let(4)
    result(short)
    assert not long.done()
    assert desk.status().generators["a"].running == 1
    generator.let(None)
    result(long)
    # Fifty calls: the short one took none of its own.
    assert len(generator.log) == 50


def test_generators_take_turns_by_step_and_never_share_a_batch(opened: Callable[..., Desk]) -> None:
    desk, [a, b] = gated(opened, "a", "b")
    futures = [desk.take(order("a", steps=9)), desk.take(order("b", steps=9)), desk.take(order("b", steps=9, seed=7))]
    a.until_shut()
    for generator in (a, b):
        generator.let(None)
    for future in futures:
        result(future)
    assert a.log == [*"ab"] * 9
    status = desk.status()
    assert (status.generators["a"].images, status.generators["b"].images) == (1, 2)


def test_bulk_of_one_generator_gives_way_to_what_somebody_waits_for_of_another(opened: Callable[..., Desk]) -> None:
    desk, [a, b] = gated(opened, "a", "b")
    bulk = desk.take(order("a", steps=30, priority="bulk"))
    a.until_shut()
    waited_for = desk.take(order("b", steps=21))
    a.let(None)
    b.let(None)
    result(waited_for)
    result(bulk)
    # The first step was under way; then one of every eight is bulk's until nobody waits.
    assert a.log == [*"a", *[*"bbbbbbba"] * 3, *"a" * 26]


def test_interactive_images_get_slots_before_bulk_ones(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", slots=2)
    running = desk.take(order(count=2, steps=5))
    generator.until_shut()
    ended: list[str] = []
    for name, priority, within_s in (("bulk", "bulk", 50), ("later", "interactive", 60), ("soon", "interactive", 55)):
        future = desk.take(order(count=2, priority=priority, within_s=within_s, seed=1))
        future.add_done_callback(lambda _, name=name: ended.append(name))  # type: ignore[misc]
    generator.let(None)
    result(running)
    settled(desk)
    assert ended == ["soon", "later", "bulk"]


def test_who_withdraws_frees_slots_and_place_at_the_next_step(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", slots=2)
    unwanted = [desk.take(order(count=2, steps=50)), desk.take(order(count=2, steps=50, seed=6))]
    wanted = desk.take(order(count=2, steps=2, seed=7))
    generator.until_shut()
    assert desk.status().generators["a"].waiting == 4
    for future in unwanted:
        assert future.cancel()
    generator.let(1)
    generator.until_shut()
    assert (desk.status().orders, desk.status().slots_used, desk.status().waiting) == (1, 2, 0)
    generator.let(2)
    result(wanted)
    assert len(generator.log) == 3


def test_no_more_orders_are_taken_than_may_be(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", orders=3)
    futures = [desk.take(order(seed=seed)) for seed in range(3)]
    with pytest.raises(BusyError, match="3 orders") as refused:
        desk.take(order())
    assert refused.value.retry_after_s > 0.0
    generator.let(None)
    for future in futures:
        result(future)
    result(desk.take(order()))


def test_the_loop_sleeps_where_nothing_is_to_be_done(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a")
    generator.let(None)
    result(desk.take(order()))
    assert desk._thread.ident is not None
    deadline = time.monotonic() + PATIENCE_S
    while (frame := sys._current_frames()[desk._thread.ident]).f_code.co_name != "wait":
        assert time.monotonic() < deadline
    # Without a time limit: nothing but a notice wakes it.
    assert frame.f_locals["timeout"] is None


def test_many_threads_ask_at_once(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", orders=1000)
    generator.let(None)
    made: dict[int, MadeImages] = {}

    def ask(seed: int) -> None:
        for number in range(5):
            made[10 * seed + number] = result(desk.take(order(seed=seed, first_index=number, steps=1 + number)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(made) == 40
    assert len({each.pixels.tobytes() for each in made.values()}) == 40


# --- deadlines --------------------------------------------------------------------------------------------------


def test_what_turns_out_late_is_dropped_and_its_slots_are_anothers(opened: Callable[..., Desk]) -> None:
    clock = Clock()
    desk, [generator] = gated(opened, "a", slots=2, clock=clock)
    slow = desk.take(order(count=2, steps=50, within_s=30))
    waits = desk.take(order(count=2, steps=2, within_s=50))
    generator.until_shut()
    clock.now += 31
    generator.let(1)
    with pytest.raises(DeadlineError, match="longer than was foreseen") as late:
        result(slow)
    assert late.value.retry_after_s > 0.0
    generator.let(2)
    result(waits)
    assert len(generator.log) == 3


def test_an_order_that_waits_for_its_generator_to_be_loaded_ends_by_its_deadline(opened: Callable[..., Desk]) -> None:
    go_on = threading.Event()

    def load(_: str) -> Workbench:
        assert go_on.wait(PATIENCE_S)
        return bench_of(GatedGenerator())

    desk = opened(load)
    with pytest.raises(DeadlineError):
        result(desk.take(order(within_s=0.05)))
    kept = desk.take(order())
    go_on.set()
    result(kept)


def test_deadlines_that_cannot_be_met_are_refused_at_once(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", slots=1)
    with pytest.raises(DeadlineTooShort, match="deadline_s"):
        desk.take(order(within_s=1e-6))
    running = desk.take(order(steps=1))
    generator.until_shut()
    desk._book._batches["a", (1, 4, 4)].pace = Pace(call_s=1.0, image_s=0.0)
    with pytest.raises(DeadlineError) as refused:
        desk.take(order(steps=1, within_s=1.5))
    assert refused.value.retry_after_s == pytest.approx(2 * MARGIN - 1.5, abs=0.1)
    second = desk.take(order(steps=1, within_s=4.0))
    generator.let(None)
    result(running)
    result(second)


# --- the end ----------------------------------------------------------------------------------------------------


def test_closing_finishes_what_there_is_and_takes_nothing_more(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a")
    futures = [desk.take(order(seed=seed, steps=5)) for seed in range(9)]
    closing = threading.Thread(target=desk.close, args=(PATIENCE_S,))
    generator.until_shut()
    closing.start()
    deadline = time.monotonic() + PATIENCE_S
    while not desk._closing:
        assert time.monotonic() < deadline
    with pytest.raises(BusyError, match="being stopped"):
        desk.take(order())
    generator.let(None)
    closing.join(PATIENCE_S)
    for future in futures:
        assert future.done()
        result(future)


def test_closing_at_once_ends_what_there_is_by_an_error_that_can_be_retried(opened: Callable[..., Desk]) -> None:
    desk, [generator] = gated(opened, "a", slots=1)
    futures = [desk.take(order(seed=seed, steps=50)) for seed in range(3)]
    generator.until_shut()
    closing = threading.Thread(target=desk.close)
    closing.start()
    deadline = time.monotonic() + PATIENCE_S
    while not desk._closed:
        assert time.monotonic() < deadline
    generator.let(1)
    closing.join(PATIENCE_S)
    for future in futures:
        with pytest.raises(BusyError) as error:
            result(future)
        assert error.value.retry_after_s > 0.0
