"""The client against the gateway as it is, over loopback, with datasets in a real S3 store that fails at times."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scanloom.api import BitsStored
from scanloom.artefact import open_artefact, verify
from scanloom.client import AsyncClient, Client, JobFailed, NotAllowed, NotFound, RequestRefused, session
from scanloom.client.images import Format
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import RecipeError
from scanloom.sampling.image_order import ImageOrder
from scanloom.store import Store
from serve.orders import Orders, Ticket
from tests.fault_proxy import FaultProxy
from tests.served_gateway import FILES, TENANT, Served, pixels_of
from tests.served_gateway import served as run_service
from tests.served_images import KEYS
from tests.tiny_generator import SIZE, publish_generator

pytestmark = pytest.mark.s3
BALANCED = {"kind": "balanced", "over": ["sex"]}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("generator") / "tiny")).uri


@pytest.fixture(scope="module")
def served(bucket: str, generator: str) -> Iterator[Served]:
    with run_service(generator, f"s3://{bucket}/client-tests", limits={"images": 8}) as found:
        yield found


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.url, served.key, patience_s=30.0) as found:
        yield found


def expected(seed: int, count: int, first_index: int = 0, bits_stored: BitsStored = 8) -> Any:
    order = ImageOrder("r", "tiny", {}, seed, 0.0, first_index, count, bits_stored=bits_stored)
    return pixels_of(order)


# --- images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits_stored", [8, 12, 16])
@pytest.mark.parametrize("format", ["png", "dicom", "parquet"])
def test_images_are_the_same_in_every_format(
    client: Client, served: Served, format: Format, bits_stored: BitsStored
) -> None:
    made = client.images.generate(
        {"sex": "F", "age": 61},
        count=3,
        seed=9,
        first_index=4,
        bits_stored=bits_stored,
        format=format,
    )
    pixels = made.numpy()
    assert pixels.dtype == (np.uint8 if bits_stored == 8 else np.uint16)
    np.testing.assert_array_equal(pixels, expected(9, 3, 4, bits_stored))
    assert (made.generator, made.generator_digest, made.seed, made.first_index) == ("tiny", served.digest, 9, 4)
    assert made.gate == "ungated"
    assert made.request
    pictures = made.pil()
    assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * 3
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]), pixels)


def test_dicom_instances_and_tables_say_what_the_images_are_of(client: Client) -> None:
    instances = client.images.generate({"sex": "F", "age": 61}, count=2, seed=9, format="dicom").dicom()
    assert [instance.PatientSex for instance in instances] == ["F", "F"]
    assert len({instance.SOPInstanceUID for instance in instances}) == 2
    again = client.images.generate({"sex": "F", "age": 61}, count=2, seed=9, format="dicom").dicom()
    assert [i.SOPInstanceUID for i in again] == [i.SOPInstanceUID for i in instances]
    table = client.images.generate({"sex": "F", "age": 61}, count=2, seed=9, format="parquet").table()
    assert table.column("sex").to_pylist() == ["F", "F"]
    assert table.column("sop_instance_uid").to_pylist() == [i.SOPInstanceUID for i in instances]
    answer = client.images.generate({"sex": "F", "age": 61}, count=2, seed=9).answer
    assert answer is not None
    assert [image.id for image in answer.images] == table.column("id").to_pylist()
    assert answer.attributes["view"] is None


def test_images_without_a_seed_are_others_each_time_and_can_be_made_again(client: Client) -> None:
    first, second = client.images.generate(), client.images.generate()
    assert first.seed != second.seed
    np.testing.assert_array_equal(client.images.generate(seed=first.seed).numpy(), first.numpy())


@pytest.mark.parametrize("format, suffix", [("png", "png"), ("dicom", "dcm")])
def test_images_are_saved_as_they_came(client: Client, tmp_path: Path, format: Format, suffix: str) -> None:
    made = client.images.generate(count=2, seed=3, first_index=7, format=format)
    written = made.save(tmp_path / "new" / "folder")
    assert [path.name for path in written] == [f"tiny-3-7.{suffix}", f"tiny-3-8.{suffix}"]
    assert [path.read_bytes() for path in written] == list(made.files)


def test_what_the_format_does_not_hold_is_told(client: Client) -> None:
    made = client.images.generate()
    with pytest.raises(RecipeError, match="format='dicom'"):
        made.dicom()
    with pytest.raises(RecipeError, match="format='parquet'"):
        made.table()


def test_a_refusal_names_field_and_envelope(client: Client) -> None:
    with pytest.raises(RequestRefused) as outside:
        client.images.generate({"age": 119})
    assert [fault.field for fault in outside.value.fields] == ["attributes.age"]
    assert outside.value.envelope is not None
    assert outside.value.envelope["ranges"]["age"]["high"] == 88.0
    with pytest.raises(RequestRefused) as many:
        client.images.generate(count=9)
    assert [fault.field for fault in many.value.fields] == ["count"]


def test_a_key_that_is_unknown_or_may_not_is_told_apart_from_a_bad_request(served: Served) -> None:
    for key, said in (
        (None, "unauthenticated"),
        ("scanloom_x_y", "unauthenticated"),
        (KEYS["orderer"], "forbidden"),
    ):
        with Client(served.url, key) as client, pytest.raises(NotAllowed, match=said) as error:
            client.images.generate()
        assert error.value.request


# --- generators -----------------------------------------------------------------------------------------------


def test_generators_say_what_may_be_asked_of_them(client: Client, served: Served) -> None:
    (listed,) = client.generators.list()
    assert client.generators.get("tiny") == listed
    assert (listed.digest, listed.width, listed.height) == (served.digest, SIZE, SIZE)
    with pytest.raises(NotFound):
        client.generators.get("large")


# --- datasets -------------------------------------------------------------------------------------------------


def test_a_dataset_is_ordered_followed_and_downloaded_whole(client: Client, served: Served, tmp_path: Path) -> None:
    dataset = client.datasets.create(10, cohort=BALANCED, seed=5, steps=2)
    assert (dataset.state, dataset.job.images, dataset.job.seed) == ("accepted", 10, 5)
    assert client.datasets.get(dataset.id).job.plan == dataset.job.plan
    assert dataset.id in [found.id for found in client.datasets.list()]
    with pytest.raises(RequestRefused, match="conflict"):
        dataset.result()
    served.finish(dataset.id)
    place = dataset.wait(progress=True, timeout_s=20).download(tmp_path / "dataset", progress=True)
    artefact = open_artefact(str(place), "dataset")
    assert artefact.digest == dataset.result().digest
    assert list(verify(artefact)) == []
    assert {file.path for file in artefact.manifest.files} == set(FILES)


def test_a_cancelled_dataset_is_no_success(client: Client, served: Served) -> None:
    dataset = client.datasets.create(10, cohort=BALANCED)
    dataset.cancel()
    dataset.cancel()
    with pytest.raises(JobFailed, match="was cancelled"):
        dataset.wait()
    assert dataset.state == "cancelled"
    finished = client.datasets.create(10, cohort=BALANCED)
    served.finish(finished.id)
    with pytest.raises(RequestRefused, match="conflict"):
        finished.cancel()


def test_the_same_key_of_ones_own_is_the_same_dataset(client: Client) -> None:
    first = client.datasets.create(10, cohort=BALANCED, idempotency_key="trial-7")
    assert client.datasets.create(10, cohort=BALANCED, idempotency_key="trial-7").id == first.id
    with pytest.raises(RequestRefused, match="conflict"):
        client.datasets.create(11, cohort=BALANCED, idempotency_key="trial-7")
    with pytest.raises(NotFound):
        client.datasets.get("nothing")


def test_a_download_is_whole_whatever_the_store_does(
    client: Client, served: Served, s3: EmbeddedS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = client.datasets.create(10, cohort=BALANCED)
    served.finish(dataset.id)
    with FaultProxy(s3.endpoint) as proxy:
        # Links are signed for the host that they lead to.
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr(session, "_FIRST_PAUSE_S", 0.02)
        at = "shard-000000.*parquet"
        proxy.inject("truncate", at=70_000, times=1, path=at)
        proxy.inject("reset", times=1, path=at)
        proxy.inject("503", times=1, path=at)
        proxy.inject("truncate", at=300_000, times=1, path=at)
        proxy.inject("corrupt", at=10, path="shard-000001.*parquet")
        dataset.wait().download(tmp_path)
        monkeypatch.undo()
    assert list(verify(open_artefact(str(tmp_path), "dataset"))) == []
    assert sorted(proxy.injected) == ["503", "corrupt", "reset", "truncate", "truncate"]
    assert not list(tmp_path.rglob("*.part"))


def test_a_dataset_in_a_local_store_comes_through_the_service(generator: str, tmp_path: Path) -> None:
    with run_service(generator, str(tmp_path / "store")) as served, Client(served.url, served.key) as client:
        with served.finishing():
            client.datasets.create(10, cohort=BALANCED).wait().download(tmp_path / "copy")
        with Client(served.url, KEYS["rival"]) as other:
            assert other.datasets.list() == []
            with pytest.raises(NotFound):
                other.datasets.get(client.datasets.list()[0].id)
    assert list(verify(open_artefact(str(tmp_path / "copy"), "dataset"))) == []


# --- in an event loop -----------------------------------------------------------------------------------------


def test_the_same_works_in_an_event_loop(served: Served, tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncClient(served.url, served.key) as client:
            made = await asyncio.gather(*(client.images.generate(seed=n) for n in range(4)))
            for n, found in enumerate(made):
                np.testing.assert_array_equal(found.numpy(), expected(n, 1))
            with pytest.raises(RequestRefused):
                await client.images.generate({"age": 119})
            assert [found.name for found in await client.generators.list()] == ["tiny"]
            dataset = await client.datasets.create(10, cohort=BALANCED)
            served.finish(dataset.id)
            place = await (await dataset.wait(timeout_s=20)).download(tmp_path, at_once=2)
            assert list(verify(open_artefact(str(place), "dataset"))) == []
            assert dataset.state == "finished"
            assert (await client.datasets.get(dataset.id)).job == dataset.job
            cancelled = await client.datasets.create(10, cohort=BALANCED)
            assert (await cancelled.cancel()).id == cancelled.id
            assert cancelled.id in [found.id for found in await client.datasets.list(limit=3)]

    asyncio.run(run())


def test_waiting_for_a_dataset_that_fails_says_why(client: Client, served: Served) -> None:
    dataset = client.datasets.create(10, cohort=BALANCED)
    assert served.service.datasets is not None
    Orders(Store(served.service.datasets.store)).failed(Ticket(TENANT, dataset.id), "the disk is full")
    with pytest.raises(JobFailed, match="the disk is full"):
        dataset.wait()
