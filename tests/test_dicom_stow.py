"""STOW-RS against a server that really parses and stores, and fails as real ones do."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

from scanloom.dicom.stow import Instance, Pace, Stow
from scanloom.dicom.synthetic import InstanceDescription
from scanloom.dicom.template import render
from scanloom.errors import RecipeError, StoreError
from tests.dicomweb_server import DicomWebServer, Fault


@pytest.fixture
def server() -> Iterator[DicomWebServer]:
    with DicomWebServer([]) as running:
        yield running


def instances(count: int, side: int = 8) -> list[Instance]:
    made = []
    for number in range(count):
        told = InstanceDescription(f"{number:04x}", "d", "ab", "g", "cd", 16, 1.0, "20000101")
        # Line ends and hyphens everywhere: what a boundary is made of.
        pixels = np.full((side, side), int.from_bytes(b"\r\n" if number % 2 else b"--", "little"), np.uint16)
        pixels[0, 0] = number
        file = render(pixels, told)
        made.append(Instance(str(dcmread(io.BytesIO(file)).SOPInstanceUID), file))
    return made


def stow(server: DicomWebServer, **options: Any) -> Stow:
    return Stow(server.url, **{"first_wait_s": 0.001, "attempts": 4} | options)


def test_files_arrive_byte_for_byte(server: DicomWebServer) -> None:
    sent = instances(5)
    outcomes = stow(server).store(sent)
    assert [(o.uid, o.state) for o in outcomes] == [(i.uid, "stored") for i in sent]
    assert server.files == {i.uid: i.data for i in sent}
    assert server.arrivals == [tuple(i.uid for i in sent)]


@pytest.mark.parametrize("fault", ["503", "429", "500", "reset", "lost-ack"])
def test_a_failure_that_passes_is_overcome(server: DicomWebServer, fault: Fault) -> None:
    server.inject(fault, "/studies", times=3)
    sent = instances(2)
    assert [o.state for o in stow(server).store(sent)] == ["stored", "stored"]
    assert server.files == {i.uid: i.data for i in sent}
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault, said", [("503", r"HTTP 503\), 4 times"), ("reset", r"ConnectionError\), 4 times")])
def test_a_failure_that_stays_is_told_and_can_be_retried(server: DicomWebServer, fault: Fault, said: str) -> None:
    server.inject(fault, "/studies", times=100)
    with pytest.raises(StoreError, match=said) as told:
        stow(server).store(instances(1))
    assert told.value.retryable
    assert len(server.requests) == 4


@pytest.mark.parametrize("fault, said", [("401", "Authorization"), ("404", "root of a DICOMweb service")])
def test_a_refusal_is_told_at_once(server: DicomWebServer, fault: Fault, said: str) -> None:
    server.inject(fault, "/studies", times=100)
    with pytest.raises(StoreError, match=said) as told:
        stow(server, authorization="Bearer PHITEST-secret").store(instances(1))
    assert len(server.requests) == 1
    assert "PHITEST" not in str(told.value)


def test_the_header_is_sent(server: DicomWebServer) -> None:
    stow(server, authorization="Bearer abc").store(instances(1))
    assert server.requests[0][1]["Authorization"] == "Bearer abc"


def test_a_header_that_is_none_is_refused_without_being_told() -> None:
    with pytest.raises(RecipeError, match="no HTTP header") as told:
        Stow("http://pacs/dicom-web", authorization="PHITEST\n")
    assert "PHITEST" not in str(told.value)


def test_what_a_server_refuses_is_told_by_instance(server: DicomWebServer) -> None:
    sent = instances(6)
    codes = {sent[1].uid: 0xC000, sent[2].uid: 0x0122, sent[3].uid: 0x0111, sent[4].uid: 0xA901}
    server.refusals = {uid: [code] for uid, code in codes.items()}
    server.warnings = {sent[5].uid: 0xB000}
    outcomes = stow(server).store(sent)
    assert [(o.state, o.reason) for o in outcomes] == [
        ("stored", ""),
        ("failed", "cannot be understood (C000)"),
        ("failed", "SOP class is not supported (0122)"),
        ("stored", "was there before"),
        ("failed", "the data set does not match its SOP class (A901)"),
        ("warned", "stored, but elements were coerced (B000)"),
    ]


def test_a_request_of_which_everything_is_refused_is_no_error_of_the_request(server: DicomWebServer) -> None:
    sent = instances(2)
    server.refusals = {i.uid: [0x0110] for i in sent}
    assert [o.reason for o in stow(server).store(sent)] == ["processing failed (0110)"] * 2
    assert len(server.requests) == 1


def test_only_what_found_the_server_out_of_resources_is_sent_again(server: DicomWebServer) -> None:
    sent = instances(3)
    server.refusals = {sent[1].uid: [0xA700, 0xA701]}
    assert [o.state for o in stow(server).store(sent)] == ["stored"] * 3
    assert server.arrivals == [tuple(i.uid for i in sent), (sent[1].uid,), (sent[1].uid,)]
    server.refusals = {sent[1].uid: [0xA700] * 100}
    assert [o.reason for o in stow(server).store(sent)] == ["", "the server stayed out of resources", ""]


def test_a_request_that_is_too_large_is_divided(server: DicomWebServer) -> None:
    sent = [*instances(5), *instances(6, side=64)[5:]]
    server.largest_request = len(sent[0].data) * 2 + 1000
    outcomes = stow(server).store(sent)
    assert [o.state for o in outcomes] == ["stored"] * 5 + ["failed"]
    assert outcomes[5].reason == f"{len(sent[5].data)} bytes are too many for the server"
    assert set(server.files) == {i.uid for i in sent[:5]}


def test_an_answer_that_lists_nothing_means_what_its_status_says(server: DicomWebServer) -> None:
    server.lists_stored = False
    sent = instances(2)
    assert [o.state for o in stow(server).store(sent)] == ["stored", "stored"]
    server.warnings = {sent[0].uid: 0xB000}  # 202, and no word about either
    assert {(o.state, o.reason) for o in stow(server).store(sent)} == {
        ("failed", "the server does not say why (HTTP 202)")
    }


def test_several_threads_share_one(server: DicomWebServer) -> None:
    sent = instances(24)
    server.inject("503", "/studies", times=5)
    one = stow(server, attempts=8)
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda i: one.store([i])[0], sent))
    assert {o.state for o in outcomes} == {"stored"}
    assert server.files == {i.uid: i.data for i in sent}


def test_the_pace_is_kept_over_all_threads(server: DicomWebServer) -> None:
    now = 100.0
    slept: list[float] = []
    pace = Pace(10.0, clock=lambda: now, sleep=slept.append)
    one = stow(server, pace=pace)
    for batch in (instances(5), instances(2), instances(1)):
        one.store(batch)
    assert slept == pytest.approx([0.0, 0.5, 0.7])
    now += 60.0
    one.store(instances(1))
    assert slept[-1] == 0.0


@pytest.mark.parametrize("root", ["pacs.example/dicom-web", "ftp://pacs", "http://", "http://user:pw@pacs/dicom-web"])
def test_a_root_that_cannot_be_one_is_refused(root: str) -> None:
    with pytest.raises(RecipeError) as told:
        Stow(root)
    assert "pw" not in str(told.value)
