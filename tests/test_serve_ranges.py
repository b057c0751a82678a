"""Parts of a dataset's files over HTTP: the bytes that are asked for, and no others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from serve.config import Service
from serve.problem import Refusal
from serve.ranges import wanted
from tests.served_datasets import finish
from tests.served_images import ORDER, Asked, applications, problem, settings
from tests.tiny_generator import publish_generator

# Over two pieces of the store's.
CONTENT = bytes(range(251)) * 10_000
SIZE, TAG = len(CONTENT), f'"{hashlib.sha256(CONTENT).hexdigest()}"'
NAME = "images/shard-000000-0a1b2c3d4e5f.parquet"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    generator = publish_generator(str(tmp_path_factory.mktemp("generator"))).uri
    return settings(generator, str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="module")
def ask(service: Service) -> Iterator[Asked]:
    with applications(service) as opened:
        yield opened()


@pytest.fixture(scope="module")
def url(ask: Asked, service: Service) -> str:
    id = ask("POST", "/v1/datasets", json=ORDER).json()["id"]
    finish(service, "clinic-a", id, {NAME: CONTENT, "dicom/shard-000000-0a1b2c3d4e5f.tar": b""})
    return f"/v1/datasets/{id}/files"


def got(ask: Asked, url: str, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return ask("GET", f"{url}/{NAME}", headers=named | {"Accept-Encoding": "identity"})


@pytest.mark.parametrize(
    ("sent", "start", "stop"),
    [
        ("bytes=0-0", 0, 1), ("bytes=0-", 0, SIZE), (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=-5", SIZE - 5, SIZE), (f"bytes=-{10 * SIZE}", 0, SIZE), (f"bytes=7-{SIZE + 99}", 7, SIZE),
        ("bytes=1048570-1048590", 1048570, 1048591), ("BYTES = 3-9", 3, 10), ("bytes=3-9,", 3, 10),
    ],
)  # fmt: skip
def test_a_part_is_the_bytes_that_were_asked_for(ask: Asked, url: str, sent: str, start: int, stop: int) -> None:
    answer = got(ask, url, Range=sent)
    assert (answer.status_code, answer.content) == (206, CONTENT[start:stop])
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert (answer.headers["Content-Length"], answer.headers["ETag"]) == (str(stop - start), TAG)


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Range": "pages=1-2"}, {"Range": "bytes=9-3"}, {"Range": "bytes=-"}, {"Range": "bytes=0-1,5-6"},
        {"Range": "bytes=x-"}, {"Range": "0-5"}, {"Range": "bytes=0-5", "If_Range": '"another"'},
        {"Range": "bytes=0-5", "If_Range": f"W/{TAG}"}, {"If_None_Match": '"another"'},
        {"Range": "bytes=0-5", "If_Range": "Wed, 01 Jan 2025 00:00:00 GMT"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_single_part_of_this_content_gets_all_of_it(ask: Asked, url: str, headers: dict[str, str]) -> None:
    answer = got(ask, url, **headers)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert (answer.headers["Content-Length"], answer.headers["Accept-Ranges"]) == (str(SIZE), "bytes")
    assert "Content-Range" not in answer.headers


@pytest.mark.parametrize("sent", ['"another"', f"W/{TAG}"])
def test_who_goes_on_with_a_file_that_was_another_is_told(ask: Asked, url: str, sent: str) -> None:
    assert problem(got(ask, url, Range="bytes=100-", If_Match=sent), 412, "changed").detail
    assert got(ask, url, If_Match=f"{sent}, {TAG}").status_code == got(ask, url, If_Match="*").status_code == 200


def test_a_download_goes_on_where_the_content_is_still_the_same(ask: Asked, url: str) -> None:
    answer = got(ask, url, Range="bytes=100-", If_Range=TAG)
    assert (answer.status_code, answer.content) == (206, CONTENT[100:])


@pytest.mark.parametrize("sent", [TAG, f"W/{TAG}", f'"x", {TAG}', "*"])
def test_what_the_client_has_is_not_sent_again(ask: Asked, url: str, sent: str) -> None:
    answer = got(ask, url, If_None_Match=sent, Range="bytes=0-5")
    assert (answer.status_code, answer.content, answer.headers["ETag"]) == (304, b"", TAG)


@pytest.mark.parametrize("sent", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
def test_a_part_behind_the_end_is_refused_with_the_size(ask: Asked, url: str, sent: str) -> None:
    answer = got(ask, url, Range=sent)
    assert str(SIZE) in problem(answer, 416, "not-satisfiable").detail
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


def test_manifest_and_empty_files_have_parts_too(ask: Asked, url: str) -> None:
    whole = ask("GET", f"{url}/manifest.json")
    part = ask("GET", f"{url}/manifest.json", headers={"Range": "bytes=2-", "If-Range": whole.headers["ETag"]})
    assert (part.status_code, part.content) == (206, whole.content[2:])
    assert whole.headers["ETag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
    empty = f"{url}/dicom/shard-000000-0a1b2c3d4e5f.tar"
    assert ask("GET", empty).content == b""
    problem(ask("GET", empty, headers={"Range": "bytes=0-"}), 416, "not-satisfiable")


@given(st.text(alphabet="bytes=-, 0123456789x", max_size=30), st.integers(0, 300))
def test_whatever_is_asked_for_lies_within_the_file(sent: str, size: int) -> None:
    with suppress(Refusal):
        found = wanted(Headers({"Range": sent}), size, "0" * 64)
        assert 0 <= found.start <= found.stop <= size
        assert (found.status == 206) == ("Content-Range" in found.headers)
        assert found.headers["Content-Length"] == str(found.stop - found.start)
