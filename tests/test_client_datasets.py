"""Datasets by the client without a network: how often is looked at them, and how their files come, whatever breaks."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from scanloom.api import DatasetJob
from scanloom.artefact import MANIFEST
from scanloom.client import (
    AsyncClient,
    Client,
    DamagedDownload,
    JobFailed,
    ServiceDown,
    StillRunning,
    datasets,
    download,
)
from scanloom.client.flow import NoAnswer, Reply
from tests.scripted_service import JOB, KEY, URL, Script, reply


def ordered(script: Script, **job: Any) -> datasets.Ordered:
    return datasets.Ordered(script.session(), DatasetJob.model_validate(JOB | job))


def standing(state: str, done: int = 0, eta_s: float | None = None, **more: Any) -> Reply:
    progress = {"images_total": 10, "images_done": done, "images_per_s": None, "eta_s": eta_s}
    return reply(JOB | {"state": state, "progress": progress} | more)


def test_waiting_looks_often_when_the_end_is_near_and_seldom_when_it_is_far() -> None:
    script = Script(
        [standing("accepted"), standing("running", 1, 3600.0), standing("running", 9, 30.0), standing("finished", 10)]
    )
    found = script.run(datasets.wait(ordered(script), progress=True))
    assert found.job.state == "finished"
    assert script.pauses == [0.5, 5.0, 1.5]


@pytest.mark.parametrize(
    "state, problem, said",
    [("failed", "the disk is full", "failed: the disk is full"), ("cancelled", None, "cancelled")],
)
def test_a_dataset_that_ends_otherwise_says_why(state: str, problem: str | None, said: str) -> None:
    script = Script([standing("running"), standing(state, problem=problem)])
    with pytest.raises(JobFailed, match=said) as error:
        script.run(datasets.wait(ordered(script)))
    assert error.value.job.state == state
    assert pickle.loads(pickle.dumps(error.value)).job == error.value.job


def test_waiting_ends_when_one_wanted_and_the_dataset_goes_on() -> None:
    script = Script([standing("running", eta_s=3600.0)])
    with pytest.raises(StillRunning, match="running after 12 s") as error:
        script.run(datasets.wait(ordered(script), timeout_s=12))
    assert sum(script.pauses) == 12
    assert error.value.job.id == "d-1"


def test_the_list_is_read_page_by_page() -> None:
    pages = [{"datasets": [JOB | {"id": f"d-{p}-{n}"} for n in range(100)], "next": f"p{p}"} for p in range(2)]
    script = Script([*map(reply, pages), reply({"datasets": [JOB], "next": None})])
    assert len(script.run(datasets.every(script.session()))) == 201
    assert [step.url.partition("?")[2] for step in script.sent] == [
        "limit=100", "limit=100&after=p0", "limit=100&after=p1",
    ]  # fmt: skip
    script = Script([*map(reply, pages)])
    assert len(script.run(datasets.every(script.session(), limit=100))) == 100
    assert len(script.sent) == 1


DATA = b"0123456789"


def links(*files: tuple[str, bytes, str]) -> Reply:
    listed = [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "url": url}
        for path, data, url in files
    ]
    return reply(
        {"id": "d-1", "digest": "x", "rows": 10, "gate": "ungated", "statistics": {}, "expires": "t", "files": listed}
    )


def test_the_key_goes_to_the_service_alone(tmp_path: Path) -> None:
    script = Script([links(("a", DATA, "https://store/a?sig=1"), ("b", DATA, "/v1/datasets/d-1/files/b")), reply(DATA)])
    script.run(download.download(ordered(script), tmp_path))
    assert [(step.url, step.headers.get("Authorization")) for step in script.sent] == [
        (f"{URL}/v1/datasets/d-1/result", f"Bearer {KEY}"),
        ("https://store/a?sig=1", None),
        (f"{URL}/v1/datasets/d-1/files/b", f"Bearer {KEY}"),
    ]
    assert KEY not in repr(script.sent) + repr(script.session()) + repr(Client(URL, KEY)) + repr(AsyncClient(URL, KEY))


def test_a_cut_file_is_gone_on_with_and_the_manifest_comes_last(tmp_path: Path) -> None:
    assert download._LAST == MANIFEST
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.part").write_bytes(DATA[:4])
    script = Script(
        [
            links((MANIFEST, b"{}", "https://s/m"), ("x/a", DATA, "https://s/a")),
            reply(DATA[4:7], 206, content_range="bytes 4-9/10"),
            NoAnswer("reset"),
            reply(DATA[7:], 206, content_range="bytes 7-9/10"),
            reply(b"{}"),
        ]
    )
    script.run(download.download(ordered(script), tmp_path))
    assert (tmp_path / "x" / "a").read_bytes() == DATA
    assert [(step.url, step.headers.get("Range")) for step in script.sent[1:]] == [
        ("https://s/a", "bytes=4-"),
        ("https://s/a", "bytes=7-"),
        ("https://s/a", "bytes=7-"),
        ("https://s/m", None),
    ]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", MANIFEST]
    # All is there: nothing but the list of files is asked for.
    again = Script([links((MANIFEST, b"{}", "https://s/m"), ("x/a", DATA, "https://s/a"))])
    again.run(download.download(ordered(again), tmp_path))
    assert len(again.sent) == 1


@pytest.mark.parametrize(
    "begun, replies",
    [
        (DATA[:4], [reply(DATA)]),  # a server without ranges
        (DATA[:4], [reply(DATA[2:], 206, content_range="bytes 2-9/10"), reply(DATA)]),  # another part
        (b"x" * 4, [reply(DATA[4:], 206, content_range="bytes 4-9/10"), reply(DATA)]),  # what was there is damaged
        (b"x" * 10, [reply(DATA)]),
        (b"x" * 99, [reply(DATA)]),
        (DATA[:4], [reply(b"", 416), reply(DATA)]),
        (b"", [reply(b"damaged!!!"), reply(DATA)]),
        (b"", [reply(b"", 500), reply(b"", 503), reply(DATA)]),
    ],
)
def test_whatever_is_there_and_whatever_comes_the_file_is_right_in_the_end(
    tmp_path: Path, begun: bytes, replies: list[Reply | NoAnswer]
) -> None:
    (tmp_path / "a.part").write_bytes(begun)
    script = Script([links(("a", DATA, "https://s/a")), *replies])
    script.run(download.download(ordered(script), tmp_path))
    assert (tmp_path / "a").read_bytes() == DATA
    assert not (tmp_path / "a.part").exists()
    assert len(script.sent) == 1 + len(replies)


@pytest.mark.parametrize("body", [b"damaged!!!", DATA + b"more"])
def test_a_file_that_is_never_right_is_told_and_not_kept(tmp_path: Path, body: bytes) -> None:
    script = Script([links(("a", DATA, "https://s/a")), reply(body)])
    with pytest.raises(DamagedDownload, match="manifest says"):
        script.run(download.download(ordered(script), tmp_path))
    assert not (tmp_path / "a").exists()


def test_links_that_have_expired_are_renewed(tmp_path: Path) -> None:
    script = Script(
        [
            links(("a", DATA, "https://s/a?old")),
            reply(b"<Error>Request has expired</Error>", 403),
            links(("a", DATA, "https://s/a?new")),
            reply(DATA),
        ]
    )
    script.run(download.download(ordered(script), tmp_path))
    assert (tmp_path / "a").read_bytes() == DATA
    assert script.sent[-1].url == "https://s/a?new"
    refused = Script([links(("b", DATA, "https://s/b")), reply(b"", 403), links(("b", DATA, "https://s/b"))])
    with pytest.raises(ServiceDown, match="HTTP 403"):
        refused.run(download.download(ordered(refused), tmp_path))


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x", "", ".", "a\\..\\x", "C:x", "a\0"])
def test_no_file_is_written_outside_of_the_folder(tmp_path: Path, path: str) -> None:
    script = Script([links((path, DATA, "https://s/x")), reply(DATA)])
    with pytest.raises(ServiceDown, match="outside"):
        script.run(download.download(ordered(script), tmp_path / "in"))
    assert len(script.sent) == 1
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://s/a", "a"])
def test_a_link_is_http(tmp_path: Path, url: str) -> None:
    script = Script([links(("a", DATA, url)), reply(DATA)])
    with pytest.raises(ServiceDown, match="no URL"):
        script.run(download.download(ordered(script), tmp_path))
