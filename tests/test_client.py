"""The client without a network, and against a server that misbehaves: what is sent again, when, and what is told."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scanloom.client
from scanloom.api import DatasetJob
from scanloom.artefact import MANIFEST
from scanloom.client import (
    AsyncClient,
    Busy,
    Client,
    DamagedDownload,
    JobFailed,
    NotAllowed,
    NotFound,
    RequestRefused,
    ServiceDown,
    ServiceError,
    StillRunning,
    datasets,
    download,
    generators,
    images,
)
from scanloom.client import session as session_module
from scanloom.client.flow import Compute, Flow, NoAnswer, Pause, Reply, Send, Together
from scanloom.client.session import Session, wait_of
from scanloom.errors import RecipeError

T = TypeVar("T")
KEY = "scanloom_lab_" + "k" * 40
URL = "http://127.0.0.1:8000"


# --- without a network ----------------------------------------------------------------------------------------


@dataclass
class Script:
    """Carries a flow out with answers that are written down; time passes by its pauses alone."""

    replies: list[Reply | NoAnswer]
    now: float = 0.0
    sent: list[Send] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def session(self, patience_s: float = 300.0, chance: float = 0.0) -> Session:
        return Session(URL, KEY, patience_s, lambda: self.now, lambda: chance)

    def run(self, flow: Flow[T]) -> T:
        result: Any = None
        try:
            step = next(flow)
            while True:
                try:
                    result = self._do(step)
                except NoAnswer as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as done:
            value: T = done.value
            return value

    def _do(self, step: Any) -> Any:
        match step:
            case Pause(seconds):
                self.pauses.append(seconds)
                self.now += seconds
                return None
            case Compute(work):
                return work()
            case Together(flows, _):
                return [self.run(flow) for flow in flows]
            case Send():
                self.sent.append(step)
                reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
                if isinstance(reply, NoAnswer):
                    raise reply
                sink = step.into(reply) if step.into else None
                if sink is not None:
                    sink.write(reply.body)
                    sink.close()
                    return Reply(reply.status, reply.headers)
                return reply


def reply(content: object, status: int = 200, **headers: str) -> Reply:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def problem(status: int, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "type": f"urn:scanloom:problem:{kind}",
        "title": "t",
        "status": status,
        "detail": "so it is",
        "instance": "r-9",
    } | more


GENERATORS: dict[str, Any] = {"generators": []}
JOB: dict[str, Any] = {
    "id": "d-1", "state": "accepted", "generator": "tiny", "generator_digest": "ab", "plan": "cd", "images": 10,
    "seed": 0,
    "created": "2026-01-01T00:00:00+00:00", "request": "r-1",
    "progress": {"images_total": 10, "images_done": 0, "images_per_s": None, "eta_s": None},
}  # fmt: skip


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
@pytest.mark.parametrize(
    "headers, body, told_s",
    [
        ({}, b"<html>", None),
        ({"retry-after": "3"}, b"", 3.0),
        ({"retry-after": "3"}, problem(503, "busy", retry_after_s=2.2), 2.2),
        ({"retry-after": "0"}, b"", 0.0),
        ({"retry-after": "soon"}, b"", None),
    ],
)
def test_what_may_pass_is_asked_for_again_when_the_service_says(
    status: int, headers: Mapping[str, str], body: object, told_s: float | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    script = Script([Reply(status, headers, content), Reply(status, headers, content), reply(GENERATORS)])
    assert script.run(generators.every(script.session(chance=0.5))) == []
    assert len(script.sent) == 3
    for attempt, waited in enumerate(script.pauses):
        if told_s is None:
            assert waited == 0.5 * 2**attempt * 0.75
        else:
            assert told_s <= waited <= told_s * 1.1 + 0.1


def test_a_service_that_does_not_answer_is_asked_ever_more_seldom_and_not_for_longer_than_wanted() -> None:
    script = Script([NoAnswer("refused")])
    with pytest.raises(ServiceDown, match="refused; check the URL"):
        script.run(generators.every(script.session(patience_s=100.0, chance=1.0)))
    assert script.pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert script.now <= 100


def test_one_is_not_kept_waiting_for_what_would_come_too_late() -> None:
    script = Script([reply(problem(429, "quota", retry_after_s=3600.0), 429)])
    with pytest.raises(Busy) as error:
        script.run(generators.every(script.session(patience_s=300.0)))
    assert (len(script.sent), script.pauses, error.value.retry_after_s) == (1, [], 3600.0)


@pytest.mark.parametrize(
    "status, kind, error",
    [
        (400, "bad-request", RequestRefused),
        (401, "unauthenticated", NotAllowed),
        (403, "forbidden", NotAllowed),
        (404, "not-found", NotFound),
        (405, "not-allowed", RequestRefused),
        (406, "unacceptable", RequestRefused),
        (409, "conflict", RequestRefused),
        (413, "too-large", RequestRefused),
        (422, "invalid", RequestRefused),
        (422, "outside-envelope", RequestRefused),
        (500, "internal", ServiceDown),
        (302, "moved", ServiceDown),
    ],
)
def test_what_no_retry_changes_is_told_at_once_by_what_to_do(status: int, kind: str, error: type[ServiceError]) -> None:
    explained = problem(status, kind, errors=[{"field": "age", "message": "m"}], envelope={"a": 1})
    for body in (explained, b"<html>") if status != 500 else (explained,):
        script = Script([reply(body, status)])
        with pytest.raises(ServiceError) as found:
            script.run(generators.every(script.session()))
        assert type(found.value) is error
        assert len(script.sent) == 1
        assert "\n" not in str(found.value)
        copy = pickle.loads(pickle.dumps(found.value))
        assert (str(copy), copy.problem) == (str(found.value), found.value.problem)
        if isinstance(body, dict):
            assert str(found.value) == f"so it is ({kind}, request r-9)"
            assert found.value.request == "r-9"
            if isinstance(found.value, RequestRefused):
                assert (found.value.fields[0].field, found.value.envelope) == ("age", {"a": 1})


def test_a_500_that_the_service_does_not_explain_is_of_a_worker_that_died_and_tried_again() -> None:
    script = Script([reply(b"Internal Server Error", 500), reply(GENERATORS)])
    assert script.run(generators.every(script.session())) == []
    script = Script([reply(b"Internal Server Error", 500)])
    with pytest.raises(ServiceDown, match="HTTP 500 without an explanation"):
        script.run(generators.every(script.session()))
    assert len(script.sent) == 3


@pytest.mark.parametrize("status, kind, error", [(429, "busy", Busy), (503, "deadline", Busy), (503, "x", ServiceDown)])
def test_when_patience_ends_the_last_answer_is_told(status: int, kind: str, error: type[ServiceError]) -> None:
    script = Script([reply(problem(status, kind, retry_after_s=7.0), status)])
    with pytest.raises(error, match="so it is") as found:
        script.run(generators.every(script.session(patience_s=30)))
    assert len(script.sent) == 4
    assert not isinstance(found.value, Busy) or found.value.retry_after_s == 7.0


@pytest.mark.parametrize("body", [b"", b'{"generators": [', b"[]", b"<html>hello</html>", b"\xff"])
def test_a_damaged_answer_is_asked_for_again_and_not_for_ever(body: bytes) -> None:
    script = Script([reply(body), reply(GENERATORS)])
    assert script.run(generators.every(script.session())) == []
    script = Script([reply(body)])
    with pytest.raises(ServiceDown, match="cut or of another kind"):
        script.run(generators.every(script.session()))
    assert len(script.sent) == 3


def test_wait_of_reads_a_date_and_nothing_that_is_no_time() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=20)
    assert wait_of(reply(b"", 503, retry_after=format_datetime(soon, usegmt=True))) == pytest.approx(20, abs=2)
    assert wait_of(reply(b"", 503, retry_after=format_datetime(soon - timedelta(hours=1), usegmt=True))) == 0
    for text in ("", "-5", "1e9", "nan", "Mon", "12:00", "٣"):
        told = wait_of(reply(b"", 503, retry_after=text))
        assert told is None or told >= 0


IMAGES: dict[str, Any] = {
    "request": "r", "generator": "tiny", "generator_digest": "d", "attributes": {}, "seed": 5, "steps": 20,
    "guidance_scale": 2.0, "gate": "ungated", "images": [],
}  # fmt: skip


def test_the_client_draws_the_seed_so_that_a_retry_makes_the_same_images() -> None:
    seeds = set()
    for _ in range(2):
        script = Script([NoAnswer("gone"), reply(b"", 503), reply(IMAGES)])
        with pytest.raises(ServiceDown):  # it holds no image
            script.run(images.generate(script.session(), {"sex": "F"}))
        bodies = [step.body for step in script.sent]
        assert len(bodies) == 5
        assert len(set(bodies)) == 1
        seeds.add(json.loads(bodies[0] or b"")["seed"])
    assert len(seeds) == 2
    script = Script([reply(IMAGES)])
    with pytest.raises(ServiceDown):
        script.run(images.generate(script.session(), seed=5))
    # What is the service's to choose is left to it.
    assert json.loads(script.sent[0].body or b"") == {"count": 1, "seed": 5, "first_index": 0}


def test_an_order_has_one_key_for_all_its_retries_and_another_than_every_other_order() -> None:
    keys: list[str] = []
    for _ in range(2):
        script = Script([NoAnswer("gone"), NoAnswer("gone"), reply(JOB, 202)])
        ordered = script.run(datasets.create(script.session(), 10, cohort={"kind": "balanced", "over": ["sex"]}))
        assert ordered.job.id == "d-1"
        sent = {step.headers["Idempotency-Key"] for step in script.sent}
        assert (len(script.sent), len(sent)) == (3, 1)
        keys += sent
    assert keys[0] != keys[1]
    script = Script([reply(JOB)])
    script.run(datasets.create(script.session(), 10, idempotency_key="mine"))
    assert script.sent[0].headers["Idempotency-Key"] == "mine"


@pytest.mark.parametrize(
    "flow, field",
    [
        (lambda session: images.generate(session, count=0), "count"),
        (lambda session: images.generate(session, seed=-1), "seed"),
        (lambda session: images.generate(session, generator="../x"), "generator"),
        (lambda session: images.generate(session, dicom={"sop_clas": "DX"}), "dicom"),
        (lambda session: datasets.create(session, 0), "images"),
        (lambda session: datasets.create(session, 5, cohort={"kind": "table", "uri": "x"}), "cohort"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_sent(flow: Callable[[Session], Flow[object]], field: str) -> None:
    script = Script([reply({})])
    with pytest.raises(RequestRefused) as error:
        script.run(flow(script.session()))
    assert error.value.fields[0].field.split(".")[0] == field
    assert script.sent == []


@pytest.mark.parametrize("key", ["a\nb", "a b", "schlüssel", "x" * 256])
def test_a_key_of_ones_own_is_checked_before_it_is_sent(key: str) -> None:
    script = Script([reply(JOB)])
    with pytest.raises(RequestRefused, match="idempotency_key"):
        script.run(datasets.create(script.session(), 10, idempotency_key=key))
    assert script.sent == []


def test_a_value_that_json_has_not_is_refused() -> None:
    script = Script([reply({})])
    with pytest.raises(RequestRefused, match="JSON"):
        script.run(images.generate(script.session(), {"age": object()}))
    assert script.sent == []


def test_a_name_cannot_lead_to_another_route() -> None:
    script = Script([reply(JOB)])
    script.run(datasets.find(script.session(), "../generators/x?y#z"))
    assert script.sent[0].url == f"{URL}/v1/datasets/..%2Fgenerators%2Fx%3Fy%23z"


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4), st.sampled_from(["b", "a-b_c", "0" * 70]))
def test_parts_of_a_multipart_body_come_out_as_they_were(files: list[bytes], boundary: str) -> None:
    if any(f"\r\n--{boundary}".encode() in b"\r\n" + file for file in files):
        return
    body = b"".join(b"--%b\r\nContent-Type: x/y\r\n\r\n%b\r\n" % (boundary.encode(), file) for file in files)
    whole = Reply(200, {"content-type": f'multipart/related; boundary="{boundary}"'}, body + f"--{boundary}--".encode())
    assert images.parts(whole) == files
    with pytest.raises(ValueError, match="boundary"):
        images.parts(Reply(200, whole.headers, body))
    with pytest.raises(ValueError, match="no multipart"):
        images.parts(Reply(200, {"content-type": "application/json"}, body))


# --- datasets without a network -------------------------------------------------------------------------------


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


# --- settings -------------------------------------------------------------------------------------------------


def test_url_and_key_come_from_the_environment_or_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCANLOOM_URL", raising=False)
    with pytest.raises(RecipeError, match="SCANLOOM_URL"):
        Client()
    monkeypatch.setenv("SCANLOOM_URL", "https://scanloom.example/api/")
    monkeypatch.setenv("SCANLOOM_API_KEY", KEY)
    with Client() as client:
        assert (client._session.url, client._session.key) == ("https://scanloom.example/api", KEY)
        assert repr(client) == "Client('https://scanloom.example/api')"
    with Client(URL, "other") as client:
        assert (client._session.url, client._session.key) == (URL, "other")


@pytest.mark.parametrize(
    "url", ["scanloom.example", "ftp://x", "http://", "https://u:p@x", "https://x/?a=b", "file:///x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="https://host:port"):
        Client(url, KEY)


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel"])
def test_a_key_that_is_none_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(RecipeError) as error:
        Client(URL, key)
    assert key not in str(error.value)


def test_it_imports_without_the_gpu_stack_and_ray() -> None:
    heavy = "('torch', 'ray', 'diffusers', 'boto3', 'pyarrow', 'fastapi')"
    code = f"import sys, scanloom.client; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_package_names_is_all_there_and_both_clients_have_the_same_methods() -> None:
    public = {
        name
        for name, value in vars(scanloom.client).items()
        if getattr(value, "__module__", "").startswith("scanloom.client")
        and isinstance(value, type)
        and not name.startswith("_")
    }
    internal = {"Blocking", "InLoop", "Later", "Now", "Session"}
    assert set(scanloom.client.__all__) == public - internal
    now, later = Client(URL), AsyncClient(URL)
    for part in ("images", "datasets", "generators"):
        assert {name for name in dir(getattr(now, part)) if name[0] != "_"} == {
            name for name in dir(getattr(later, part)) if name[0] != "_"
        }
    assert {n for n in dir(scanloom.client.Dataset) if n[0] != "_"} == {
        n for n in dir(scanloom.client.AsyncDataset) if n[0] != "_"
    }


# --- against a server that misbehaves -------------------------------------------------------------------------

Behaviour = bytes | str
"""An answer's bytes, or `reset` or `close` before any."""


def http(status: str, body: bytes, *headers: str, claimed: int | None = None) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if claimed is None else claimed}", "Connection: close"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


class Misbehaving:
    """A server that does to each connection what the next entry of `script` says, the last to all that follow."""

    def __init__(self) -> None:
        self.script: list[Behaviour] = []
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        behaviour = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        request = b""
        while b"\r\n\r\n" not in request or len(request.partition(b"\r\n\r\n")[2]) < _length(request):
            if not (piece := connection.recv(1 << 16)):
                return
            request += piece
        self.requests.append(request)
        if behaviour == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif isinstance(behaviour, bytes):
            connection.sendall(behaviour)


def _length(request: bytes) -> int:
    lines = request.lower().partition(b"\r\n\r\n")[0].split(b"\r\n")
    return next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), 0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Misbehaving]:
    monkeypatch.setattr(session_module, "_FIRST_PAUSE_S", 0.02)
    found = Misbehaving()
    yield found
    found.close()


def ask_now(url: str, patience_s: float) -> Any:
    with Client(url, KEY, patience_s=patience_s) as client:
        return client.generators.list()


def ask_later(url: str, patience_s: float) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url, KEY, patience_s=patience_s) as client:
            return await client.generators.list()

    return asyncio.run(ask())


OK = http("200 OK", json.dumps(GENERATORS).encode())


@pytest.mark.parametrize("ask", [ask_now, ask_later])
@pytest.mark.parametrize(
    "behaviour",
    [
        "reset",
        "close",
        http("429 Too Many Requests", b"", "Retry-After: 0"),
        http("503 Service Unavailable", b"<html>", "Retry-After: 0"),
        http("200 OK", OK[-9:], claimed=5000),  # cut
        http("200 OK", b'{"generators": ['),
        http("200 OK", b"\x1f\x8bno gzip", "Content-Encoding: gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"gen",
        b"SSH-2.0-OpenSSH\r\n",
    ],
)  # fmt: skip
def test_a_network_that_fails_once_goes_unnoticed(
    server: Misbehaving, ask: Callable[[str, float], Any], behaviour: Behaviour
) -> None:
    server.script = [behaviour, OK]
    assert ask(server.url, 60.0) == []
    assert len(server.requests) == 2
    assert all(f"authorization: bearer {KEY}".encode() in request.lower() for request in server.requests)


@pytest.mark.parametrize("ask", [ask_now, ask_later])
def test_a_redirect_does_not_carry_the_key_elsewhere(server: Misbehaving, ask: Callable[[str, float], Any]) -> None:
    server.script = [http("307 Temporary Redirect", b"", f"Location: {server.url}/elsewhere")]
    with pytest.raises(ServiceDown, match="HTTP 307"):
        ask(server.url, 60.0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("ask", [ask_now, ask_later])
def test_a_service_that_is_not_there_is_told_when_patience_ends(ask: Callable[[str, float], Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServiceDown, match=r"check the URL") as error:
        ask(url, 0.5)
    assert KEY not in str(error.value)


def test_a_cancelled_task_ends_its_request(server: Misbehaving) -> None:
    server.script = [http("503 Service Unavailable", b"", "Retry-After: 60")]

    async def run() -> None:
        async with AsyncClient(server.url, KEY) as client:
            asking = asyncio.create_task(client.generators.list())
            while not server.requests:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(asyncio.wait_for(run(), 30))
