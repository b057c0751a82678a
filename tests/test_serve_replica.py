"""The replica: an engine process of the service, without Ray."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scanloom.errors import ArtefactError, BusyError, DeadlineError, DeadlineTooShort, RecipeError
from scanloom.models.generator import Generator
from scanloom.recipe import Quality
from scanloom.sampling.image_order import ImageOrder
from serve.config import Replicas, ServedGenerator, Service
from serve.replica import Replica
from tests.tiny_generator import SIZE, publish_generator

ANYTHING = Quality(least_contrast=0.0, most_white=1.0, most_black=1.0)


def service(folder: Path, *names: str, **replicas: Any) -> Service:
    for seed, name in enumerate(names):
        if not (folder / name).exists():
            publish_generator(str(folder / name), seed)
    served = tuple(ServedGenerator(name=name, uri=str(folder / name), quality=ANYTHING) for name in names)
    return Service(generators=served, replicas=Replicas(**{"slots": 8, "drain_s": 30.0} | replicas))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def replica(folder: Path) -> Iterator[Replica]:
    """Of three generators, two of them loaded."""
    replica = Replica(service(folder, "first", "second", "third", loaded=2))
    yield replica
    replica.drain(0.0)


def order(generator: str = "first", *, within_s: float = 60.0, **changes: Any) -> ImageOrder:
    told: dict[str, Any] = {"attributes": {"age": 60.0}, "seed": 5, "steps": 3} | changes
    return ImageOrder(request="r", generator=generator, due=time.time() + within_s, **told)


def test_it_is_ready_once_it_is_constructed(folder: Path) -> None:
    replica = Replica(service(folder, "first", "second", "third", loaded=2))
    told = replica.status()
    assert {name for name, status in told.generators.items() if status.loaded} == {"first", "second"}
    assert told.slots == 16
    replica.check_health()
    # The first one to ask waits for nothing that a warm-up could have done.
    with pytest.raises(DeadlineTooShort):
        asyncio.run(replica.make(order(within_s=1e-6)))
    replica.drain(0.0)


def test_it_makes_images_for_many_at_once(replica: Replica) -> None:
    async def ask() -> list[Any]:
        names = ("first", "second", "third")
        wanted = [order(names[n % 3], seed=n, count=1 + n % 2, steps=1 + n) for n in range(9)]
        return await asyncio.gather(*(replica.make(each) for each in wanted))

    made = asyncio.run(ask())
    assert [each.pixels.shape for each in made] == [(1 + n % 2, SIZE, SIZE) for n in range(9)]
    assert len({each.digest for each in made}) == 3
    assert made[0].environment["threads"] == torch.get_num_threads() == 1
    with pytest.raises(RecipeError, match="'fourth' is not served; there are first, second, third"):
        asyncio.run(replica.make(order("fourth")))


def test_a_client_that_goes_leaves_its_slots(replica: Replica) -> None:
    async def ask() -> None:
        task = asyncio.create_task(replica.make(order(count=8, steps=900, within_s=1e5)))
        while not replica.status().slots_used:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await replica.make(order(steps=1))
        assert replica.status().orders == 0
        assert replica.status().slots_used == 0

    asyncio.run(ask())


def test_what_it_answers_and_refuses_travels_between_processes(replica: Replica) -> None:
    made = asyncio.run(replica.make(order(bits_stored=16)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made)).pixels, made.pixels)
    for error in (BusyError("full", 1.5), DeadlineError("late", 2.5)):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.retry_after_s) == (str(error), error.retry_after_s)


def test_a_generator_that_is_not_there_stops_the_replica_from_starting(folder: Path) -> None:
    told = service(folder, "first")
    lost = ServedGenerator(name="lost", uri=str(folder / "nowhere"))
    with pytest.raises(ArtefactError, match="nowhere"):
        Replica(told.model_copy(update={"generators": (*told.generators, lost)}))


def test_draining_finishes_what_there_is(folder: Path) -> None:
    replica = Replica(service(folder, "first"))

    async def ask() -> None:
        tasks = [asyncio.create_task(replica.make(order(seed=seed, steps=30))) for seed in range(6)]
        while replica.status().orders < 6:
            await asyncio.sleep(0)
        await asyncio.to_thread(replica.drain)
        assert [(await task).pixels.shape[0] for task in tasks] == [1] * 6
        with pytest.raises(BusyError, match="being stopped"):
            await replica.make(order())

    asyncio.run(ask())


def test_it_is_ill_when_its_loop_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = Replica(service(folder, "first"))

    def lost(*_: Any) -> torch.Tensor:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(Generator, "denoise", lost)
    with pytest.raises(BusyError) as error:
        asyncio.run(replica.make(order()))
    assert error.value.retry_after_s > 0.0
    with pytest.raises(RuntimeError, match="it is replaced"):
        replica.check_health()
    replica.drain()


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_a_generator_whose_files_are_damaged_takes_no_others_place(tmp_path: Path, fault: str) -> None:
    replica = Replica(service(tmp_path, "first", "second", loaded=1))
    weights = next((tmp_path / "second" / "unet").glob("*.safetensors"))
    if fault == "gone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="is not there" if fault == "gone" else "another size"):
        asyncio.run(replica.make(order("second")))
    assert {name for name, told in replica.status().generators.items() if told.loaded} == {"first"}
    assert asyncio.run(replica.make(order("first"))).pixels.shape == (1, SIZE, SIZE)
    replica.drain(0.0)
