"""A PACS over DICOMweb: every instance comes out once, whatever the network does, and nothing of it is told."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless, generate_uid

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError, StoreError
from scanloom.recipe import CategoryAttribute, Decode, DicomWebSource
from scanloom.scans import pacs
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.dicomweb import list_files, names, read_files
from scanloom.scans.scan import Context, Scan, SourceFile
from tests.dicomweb_server import DicomWebServer, Fault
from tests.made_dicom import CANARY, KEY, UID_ROOT, file, radiograph

SCHEMA = AttributeSchema(declarations=(CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),))
PSEUDONYMS = Pseudonyms(KEY.encode())
CONTEXT = Context(SCHEMA, PSEUDONYMS, Decode(), seed=0, size_px=32)
SECRET = "Bearer a-token-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs, "FIRST_WAIT_S", 0.001)


def uid() -> str:
    return str(generate_uid(UID_ROOT))


def series(count: int, patient: str = "MRN-1", **elements: Any) -> list[bytes]:
    """The files of one series of a study of its own."""
    study, own = uid(), uid()
    return [
        file(radiograph(seed=i), PatientID=patient, StudyInstanceUID=study, SeriesInstanceUID=own, **elements)
        for i in range(count)
    ]


def source(server: DicomWebServer, **query: str) -> DicomWebSource:
    return DicomWebSource(uri=server.url, query=query)


def found(source: DicomWebSource, listed: SourceFile) -> list[Any]:
    """Scan or refusal code of each instance; members must be numbered without a gap."""
    results = list(read_files(source, [listed], CONTEXT))
    assert [member for member, _, _ in results] == list(range(len(results)))
    return [result.code if isinstance(result, ScanError) else result for _, _, result in results]


def ids(results: list[Any]) -> list[str]:
    assert all(isinstance(result, Scan) for result in results), results
    return [result.subject.id for result in results]


# --- listing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_cap, knows_offset", [(1000, True), (1, True), (3, True), (1000, False)])
def test_every_series_is_listed_once_however_the_server_pages(page_cap: int, knows_offset: bool) -> None:
    files = [data for i in range(7) for data in series(2, f"MRN-{i}")]
    with DicomWebServer(files, page_cap=page_cap, knows_offset=knows_offset) as server:
        listed = list_files(source(server), SCHEMA)
    assert len({file_.key for file_ in listed}) == 7
    assert listed == sorted(listed, key=lambda file_: file_.key)
    assert all(file_.alone and file_.version.startswith("2-") for file_ in listed)


def test_a_server_that_gives_one_full_page_again_and_again_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacs, "PAGE", 3)
    files = [data for _ in range(5) for data in series(1)]
    with (
        DicomWebServer(files, knows_offset=False) as server,
        pytest.raises(StoreError, match="gives 3 results and no more"),
    ):
        list_files(source(server), SCHEMA)


@pytest.mark.parametrize("relational", [False, "without studies"])
def test_a_server_that_does_not_search_all_series_at_once_is_asked_study_by_study(
    relational: Literal[False, "without studies"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs, "PAGE", 2)
    files = [data for i in range(5) for data in series(2, f"MRN-{i % 2}", Modality="CT" if i == 4 else "CR")]
    with DicomWebServer(files) as server:
        wanted = [file_.key for file_ in list_files(source(server), SCHEMA)]
        server.relational = relational
        listed = list_files(source(server), SCHEMA)
        assert [file_.key for file_ in listed] == wanted
        assert list_files(source(server), SCHEMA) == listed
        assert len(ids(found(source(server), listed[0]))) == 2
        assert len(list_files(source(server, Modality="CR", PatientID="MRN-0"), SCHEMA)) == 2


def test_filters_go_to_the_server_and_must_be_keywords() -> None:
    files = series(1, "MRN-1") + series(1, "MRN-2") + series(1, "MRN-3", Modality="CT")
    with DicomWebServer(files) as server:
        assert len(list_files(source(server, Modality="CR"), SCHEMA)) == 2
        assert len(list_files(source(server, Modality="CR", PatientID="MRN-2"), SCHEMA)) == 1
        with pytest.raises(RecipeError, match="no series there, or none that passes"):
            list_files(source(server, Modality="US"), SCHEMA)
        with pytest.raises(RecipeError, match="'Modalty' is no DICOM keyword"):
            list_files(source(server, Modalty="CR"), SCHEMA)
        with pytest.raises(RecipeError, match="can identify a patient"):
            list_files(source(server), AttributeSchema(declarations=(
                CategoryAttribute(name="name", source="PatientName", values=("x",)),)))  # fmt: skip


def test_a_series_has_another_version_when_it_grows_or_is_given_to_another_patient() -> None:
    files = series(3)
    with DicomWebServer(files[:2]) as server:
        before = list_files(source(server), SCHEMA)
        assert list_files(source(server), SCHEMA) == before
    with DicomWebServer(files) as server:
        grown = list_files(source(server), SCHEMA)
    assert grown[0].key == before[0].key
    assert grown[0].version != before[0].version
    with DicomWebServer([data.replace(b"MRN-1 ", b"MRN-2 ") for data in files]) as server:
        merged = list_files(source(server), SCHEMA)
    assert merged[0].key == grown[0].key
    assert merged[0].version != grown[0].version


def test_a_root_that_would_store_a_password_or_is_no_url_is_refused() -> None:
    with pytest.raises(RecipeError, match="user name or password") as caught:
        list_files(DicomWebSource(uri="http://me:secret@127.0.0.1/dicom-web"), SCHEMA)
    assert "secret" not in str(caught.value)
    with pytest.raises(RecipeError, match="is no URL"):
        list_files(DicomWebSource(uri="http://"), SCHEMA)


# --- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
def test_instances_are_read_as_stored_in_the_order_of_their_uids(bare: bool) -> None:
    study, own = uid(), uid()
    uids = sorted(uid() for _ in range(4))
    files = {
        name: file(radiograph(seed=i), syntax=JPEG2000Lossless if i % 2 else "1.2.840.10008.1.2.1",
                   StudyInstanceUID=study, SeriesInstanceUID=own, SOPInstanceUID=name)
        for i, name in enumerate(uids)
    }  # fmt: skip
    with DicomWebServer([files[uids[i]] for i in (2, 0, 3, 1)]) as server:
        server.bare = bare
        (listed,) = list_files(source(server), SCHEMA)
        scans = found(source(server), listed)
        assert names(source(server), [listed]) == [f"{server.url}/{listed.key}/instances/{name}" for name in uids]
    assert ids(scans) == [PSEUDONYMS.of("instance", name) for name in uids]
    for i, scan in enumerate(scans):
        assert isinstance(scan, Scan)
        assert scan.image.pixels.shape == radiograph(seed=i).shape
        order = np.argsort(radiograph(seed=i).reshape(-1), kind="stable")
        assert (np.diff(scan.image.pixels.reshape(-1)[order].astype(int)) >= 0).all()


def test_frames_and_refusals_come_with_the_number_of_their_instance() -> None:
    study, own = uid(), uid()
    uids = sorted(uid() for _ in range(4))
    many = np.stack([radiograph(seed=i) for i in range(3)])
    common: dict[str, Any] = {"StudyInstanceUID": study, "SeriesInstanceUID": own}
    files = [
        file(SOPInstanceUID=uids[0], **common),
        file(many[0], NumberOfFrames=3, PixelData=many.tobytes(), SOPInstanceUID=uids[1],
             SOPClassUID="1.2.840.10008.5.1.4.1.1.7.3", **common),
        file(BurnedInAnnotation="YES", SOPInstanceUID=uids[2], **common),
        file(SOPInstanceUID=uids[3], **common),
    ]  # fmt: skip
    with DicomWebServer(files) as server:
        server.inject("404", uids[3], times=99)
        (listed,) = list_files(source(server), SCHEMA)
        results = list(read_files(source(server), [listed], CONTEXT))
    assert [(member, frame) for member, frame, _ in results] == [
        (0, None), (1, 0), (1, 1), (1, 2), (2, None), (3, None)
    ]  # fmt: skip
    refused = [result.code for _, _, result in results if isinstance(result, ScanError)]
    assert refused == ["burned-in-text", "not-delivered"]


def test_a_series_that_has_become_empty_is_refused() -> None:
    with DicomWebServer(series(1)) as server:
        assert found(source(server), SourceFile("studies/1.2.3/series/1.2.4", 0)) == ["empty-series"]


def test_a_body_over_the_limit_is_refused_and_the_next_instance_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = series(2)
    large = file(np.zeros((2000, 2000), np.uint16) + radiograph(shape=(2000, 2000)))
    monkeypatch.setattr(pacs, "MAX_FILE_BYTES", 1 << 20)
    with DicomWebServer([*files, large]) as server:
        results = [found(source(server), listed) for listed in list_files(source(server), SCHEMA)]
    flat = [result if isinstance(result, str) else "scan" for listed in results for result in listed]
    assert sorted(flat) == ["scan", "scan", "too-large"]


# --- faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["503", "429", "reset", "truncate", "no-boundary"])
def test_what_the_network_breaks_is_fetched_again(fault: Fault) -> None:
    files = series(4)
    with DicomWebServer(files) as server:
        chosen = source(server)
        wanted = ids(found(chosen, list_files(chosen, SCHEMA)[0]))
        before = len(server.requests)
        server.inject(fault if fault != "no-boundary" else "reset", r"/series\?", times=2)
        server.inject(fault if fault != "no-boundary" else "reset", r"/instances\?", times=3)
        server.inject(fault, r"/instances/", times=5)
        assert ids(found(chosen, list_files(chosen, SCHEMA)[0])) == wanted
        # Two pages a search, four instances, and every fault once more.
        assert len(server.requests) - before == 2 + 2 + 4 + 10


def test_a_search_that_is_cut_where_its_length_does_not_tell_is_made_again() -> None:
    with DicomWebServer(series(2)) as server:
        server.inject("cut-json", r"/series\?", times=2)
        assert len(list_files(source(server), SCHEMA)) == 1


@pytest.mark.parametrize("fault", ["stall", "drip"])
def test_a_server_that_falls_silent_or_nearly_so_is_given_up_on_after_a_while(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacs, "_TIMEOUTS_S", (1.0, 0.2))
    with DicomWebServer(series(1)) as server:
        server.inject(fault, r"/series\?", times=2)
        assert len(list_files(source(server), SCHEMA)) == 1


@pytest.mark.parametrize(
    "fault, path, retryable",
    [
        ("503", r"/series\?", True),
        ("reset", r"/instances/", True),
        ("truncate", r"/instances/", True),
        ("no-boundary", r"/instances/", True),
        ("401", r"/series\?", False),
        ("500", r"/instances\?", False),
        ("404", r"/series\?", False),
        ("404", r"/instances\?", False),
        ("html", r"/series\?", False),
        ("html", r"/instances/", False),
    ],
)
def test_a_failure_for_good_is_an_error_that_says_nothing_of_anybody(fault: Fault, path: str, retryable: bool) -> None:
    with DicomWebServer(series(1, "MRN-1")) as server:
        chosen = source(server, PatientID="MRN-1")
        (listed,) = list_files(chosen, SCHEMA)
        server.inject(fault, path, times=99)
        with pytest.raises(StoreError) as caught:
            _ = list_files(chosen, SCHEMA), list(read_files(chosen, [listed], CONTEXT))
        assert caught.value.retryable == retryable
        told = str(caught.value)
        assert server.url in told
        assert not any(word in told for word in ("MRN", UID_ROOT, "?", CANARY))
        # Nor does a traceback: what lies under it holds URLs.
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_nobody_at_the_address_is_an_error_that_may_pass() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(StoreError, match="no whole answer") as caught:
            list_files(DicomWebSource(uri=f"http://127.0.0.1:{taken.getsockname()[1]}/dicom-web"), SCHEMA)
    assert caught.value.retryable


# --- secrets --------------------------------------------------------------------------------------------------


def test_the_authorization_goes_to_the_server_and_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pacs.AUTHORIZATION_VARIABLE, SECRET)
    with DicomWebServer(series(2)) as behind, DicomWebServer([]) as front:
        chosen = source(behind)
        found(chosen, list_files(chosen, SCHEMA)[0])
        assert {headers.get("Authorization") for _, headers in behind.requests} == {SECRET}
        behind.requests.clear()
        front.redirect = behind.url.replace("127.0.0.1", "localhost")
        assert len(found(source(front), list_files(source(front), SCHEMA)[0])) == 2
        assert {headers.get("Authorization") for _, headers in front.requests} == {SECRET}
        assert len(behind.requests) == len(front.requests) > 4
        assert {headers.get("Authorization") for _, headers in behind.requests} == {None}
        assert all("localhost:" in headers["Host"] for _, headers in behind.requests)


def test_logs_and_errors_hold_no_secret_no_uid_and_no_filter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(pacs.AUTHORIZATION_VARIABLE, SECRET)
    caplog.set_level(logging.DEBUG)
    with DicomWebServer(series(2)) as server:
        chosen = source(server, PatientID="MRN-1")
        (listed,) = list_files(chosen, SCHEMA)
        assert len(found(chosen, listed)) == 2
        server.inject("503", r"/instances/", times=99)
        with pytest.raises(StoreError) as caught:
            found(chosen, listed)
    told = caplog.text + str(caught.value)
    assert not any(word in told for word in ("Bearer", "MRN", UID_ROOT, "a-token"))


@pytest.mark.parametrize("secret", ["Bearer broken\nline", "Bearer \u2603", "Bearer \u00e9"])
def test_an_authorization_that_no_header_can_hold_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv(pacs.AUTHORIZATION_VARIABLE, secret)
    with DicomWebServer([]) as server, pytest.raises(RecipeError, match="no HTTP header can") as caught:
        list_files(source(server), SCHEMA)
    assert "Bearer" not in str(caught.value)


def test_a_server_that_loops_is_left() -> None:
    with DicomWebServer([]) as server:
        server.redirect = server.url
        with pytest.raises(StoreError, match="TooManyRedirects"):
            list_files(source(server), SCHEMA)
        assert len(server.requests) < 10


@pytest.mark.parametrize("name", ["../../admin", "1.2?x=1", "", "a b", "1." * 100])
def test_a_server_that_names_series_by_no_uid_is_not_followed(name: str) -> None:
    with DicomWebServer(series(1)) as server:
        result = server.search("/series", {})
        result[0]["0020000E"] = {"vr": "UI", "Value": [name]}
        server.search = lambda path, query: result  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="by what is no UID"):
            list_files(source(server), SCHEMA)


# --- a real PACS ----------------------------------------------------------------------------------------------

ORTHANC = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an Orthanc with its DICOMweb plugin, empty, on loopback."""
    if not (Path(ORTHANC).exists() and PLUGIN.exists()):
        pytest.skip("no Orthanc with its DICOMweb plugin (Debian: orthanc, orthanc-dicomweb)")
    folder = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "orthanc.json").write_text(
        f'{{"Name": "test", "HttpPort": {port}, "RemoteAccessAllowed": false, "AuthenticationEnabled": false,'
        f' "DicomServerEnabled": false, "StorageDirectory": "{folder}/db", "IndexDirectory": "{folder}/db",'
        f' "Plugins": ["{PLUGIN}"], "DicomWeb": {{"Enable": true, "Root": "/dicom-web/"}}}}'
    )
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/system", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        if server.poll() is not None:
            pytest.fail("Orthanc ended while it was started")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("Orthanc does not answer")


def test_a_real_pacs_gives_what_was_put_into_it(orthanc: str) -> None:
    files = [
        *series(3, "MRN-1"),
        *series(2, "MRN-2", PatientSex="M"),
        *series(1, "MRN-3", Modality="CT"),
    ]
    packed = file(radiograph(), syntax=JPEG2000Lossless, PatientID="MRN-4")
    for data in (*files, packed):
        upload = urllib.request.Request(f"{orthanc}/instances", data=data, method="POST")
        with urllib.request.urlopen(upload, timeout=10) as answer:
            assert answer.status == 200
    chosen = DicomWebSource(uri=f"{orthanc}/dicom-web/")
    listed = list_files(chosen, SCHEMA)
    assert [file_.version.split("-")[0] for file_ in listed].count("1") == 2
    assert list_files(chosen, SCHEMA) == listed
    scans = [scan for file_ in listed for scan in found(chosen, file_)]
    with DicomWebServer([*files, packed]) as small:
        wanted = [scan for file_ in list_files(source(small), SCHEMA) for scan in found(source(small), file_)]
    assert ids(scans) == ids(wanted)
    for scan, right in zip(scans, wanted, strict=True):
        assert scan.subject == right.subject
        np.testing.assert_array_equal(scan.image.pixels, right.image.pixels)
    assert len(list_files(DicomWebSource(uri=chosen.uri, query={"Modality": "CT"}), SCHEMA)) == 1
    assert len(list_files(DicomWebSource(uri=chosen.uri, query={"PatientID": "MRN-2"}), SCHEMA)) == 1


def test_a_real_pacs_is_paged(orthanc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list_files(DicomWebSource(uri=f"{orthanc}/dicom-web"), SCHEMA)
    monkeypatch.setattr(pacs, "PAGE", 1)
    assert list_files(DicomWebSource(uri=f"{orthanc}/dicom-web"), SCHEMA) == whole
    assert len(whole) == 4
