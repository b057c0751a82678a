"""The client without a network: what is sent, what is sent again, when, and what is told."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import scanloom.client
from scanloom.client import (
    AsyncClient,
    Busy,
    Client,
    NotAllowed,
    NotFound,
    RequestRefused,
    ServiceDown,
    ServiceError,
    datasets,
    generators,
    images,
)
from scanloom.client.flow import Flow, NoAnswer, Reply
from scanloom.client.session import Session, wait_of
from scanloom.errors import RecipeError
from tests.scripted_service import GENERATORS, JOB, KEY, URL, Script, reply

# --- requests -------------------------------------------------------------------------------------------------


def problem(status: int, kind: str, **more: Any) -> dict[str, Any]:
    return {
        "type": f"urn:scanloom:problem:{kind}",
        "title": "t",
        "status": status,
        "detail": "so it is",
        "instance": "r-9",
    } | more


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
