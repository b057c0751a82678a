"""A small DICOMweb server on loopback: QIDO-RS with paging, WADO-RS multipart, STOW-RS, and the faults of real ones."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

import pydicom
from pydicom.datadict import tag_for_keyword

Fault = Literal[
    "503",
    "500",
    "429",
    "404",
    "401",
    "reset",
    "truncate",
    "stall",
    "drip",
    "no-boundary",
    "html",
    "cut-json",
    "lost-ack",
]
ROOT = "/dicom-web"
_BOUNDARY = "a-boundary"


class DicomWebServer:
    """`with DicomWebServer(files) as server: server.inject("503", "/instances/", times=2)`."""

    def __init__(self, files: Iterable[bytes], *, page_cap: int = 1000, knows_offset: bool = True) -> None:
        self._files = {str(d.SOPInstanceUID): (d, data) for d, data in ((_parsed(data), data) for data in files)}
        self.page_cap = page_cap
        self.knows_offset = knows_offset
        self.relational: bool | Literal["without studies"] = True
        """Whether the series of all studies are searched at once; "without studies": without saying whose they are."""
        self.bare = False
        """Send an instance as application/dicom, without multipart, as some servers do."""
        self.redirect = ""
        """Where every request is sent on to."""
        self.refusals: dict[str, list[int]] = {}
        """SOP instance UID -> the Failure Reasons of its next attempts to be stored, one each."""
        self.warnings: dict[str, int] = {}
        """SOP instance UID -> the Warning Reason with which it is stored."""
        self.largest_request = 1 << 30
        """In bytes; a longer one is answered 413."""
        self.lists_stored = True
        """Whether an answer lists what was stored, beside what was not."""
        self.arrivals: list[tuple[str, ...]] = []
        """Of each request to store that was carried out, the instances in it."""
        self.requests: list[tuple[str, Mapping[str, str]]] = []
        self._faults: list[list[Any]] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}{ROOT}"

    def inject(self, fault: Fault, path: str = "", times: int = 1) -> None:
        """Break the next `times` requests whose path and query match."""
        self._faults.append([fault, path, times])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(5)

    def fault(self, path: str) -> Fault | None:
        with self._lock:
            for rule in self._faults:
                if rule[2] and re.search(rule[1], path):
                    rule[2] -= 1
                    fault: Fault = rule[0]
                    return fault
        return None

    def search(self, path: str, query: Mapping[str, str]) -> list[dict[str, Any]]:
        """The results on the level that the path names, one page of them."""
        level = path.rpartition("/")[2]
        tag = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}[level]
        uids = dict(zip(*[iter(path.strip("/").split("/")[:-1])] * 2, strict=True))
        wanted = {"StudyInstanceUID": uids.get("studies"), "SeriesInstanceUID": uids.get("series")}
        filters = {k: v for k, v in (wanted | dict(query)).items() if v and tag_for_keyword(k)}
        found: dict[str, dict[str, Any]] = {}
        for dataset, _ in self._files.values():
            if all(str(dataset.get(k, "")) == v for k, v in filters.items()):
                result = found.setdefault(str(dataset[tag].value), self._result(dataset, level))
                count = result.setdefault("00201209", {"vr": "IS", "Value": [0]})
                count["Value"][0] += 1
        if self.relational == "without studies" and level == "series":
            for result in found.values():
                del result["0020000D"]
        offset = int(query.get("offset", 0)) if self.knows_offset else 0
        return list(found.values())[offset:][: min(int(query.get("limit", 10**9)), self.page_cap)]

    def _result(self, dataset: pydicom.Dataset, level: str) -> dict[str, Any]:
        keywords = ["StudyInstanceUID", "PatientID"]
        keywords += ["SeriesInstanceUID", "Modality"] if level != "studies" else []
        keywords += ["SOPInstanceUID"] if level == "instances" else []
        result = {
            f"{tag_for_keyword(k):08X}": {"vr": dataset[k].VR, "Value": [str(dataset[k].value)]} for k in keywords
        }
        return result | {"00081190": {"vr": "UR", "Value": [f"{self.url}/{len(self.requests)}"]}}

    def instance(self, path: str) -> bytes | None:
        found = self._files.get(path.rpartition("/")[2])
        return found[1] if found else None

    def store(self, content_type: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Keep the DICOM files of a multipart body (PS3.18 10.5); status and Store Instances Response Module."""
        parts = _parts(content_type, body)
        referenced, failed = [], []
        with self._lock:
            self.arrivals.append(tuple(str(_parsed(part).SOPInstanceUID) for part in parts))
            for part in parts:
                dataset = pydicom.dcmread(io.BytesIO(part))
                uid = str(dataset.SOPInstanceUID)
                item: dict[str, Any] = {
                    "00081150": {"vr": "UI", "Value": [str(dataset.SOPClassUID)]},
                    "00081155": {"vr": "UI", "Value": [uid]},
                }
                if self.refusals.get(uid):
                    failed.append(item | {"00081197": {"vr": "US", "Value": [self.refusals[uid].pop(0)]}})
                    continue
                self._files[uid] = (_parsed(part), part)
                if uid in self.warnings:
                    item["00081196"] = {"vr": "US", "Value": [self.warnings[uid]]}
                referenced.append(item)
        status = (
            409 if failed and not referenced else 202 if failed or any("00081196" in i for i in referenced) else 200
        )
        told = {"00081198": {"vr": "SQ", "Value": failed}} if failed else {}
        return status, told | ({"00081199": {"vr": "SQ", "Value": referenced}} if self.lists_stored else {})

    @property
    def files(self) -> dict[str, bytes]:
        """SOP instance UID -> the file as it was stored."""
        return {uid: data for uid, (_, data) in self._files.items()}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                server.requests.append((self.path, dict(self.headers.items())))
                if server.redirect:
                    self._send(302, "text/plain", b"", {"Location": server.redirect + self.path.removeprefix(ROOT)})
                    return
                fault = server.fault(self.path)
                if fault == "reset":
                    self._reset()
                elif fault == "stall":
                    self.connection.settimeout(5)
                    self.rfile.read(1)  # until the other side gives up
                elif fault in ("503", "500", "429", "404", "401"):
                    self._send(int(fault), "text/plain", b"PHITEST said no", {"Retry-After": "0"})
                elif fault == "html":
                    self._send(200, "text/html", b"<html>Please log in</html>")
                else:
                    self._answer(fault)

            def do_POST(self) -> None:
                server.requests.append((self.path, dict(self.headers.items())))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fault = server.fault(self.path)
                if fault in ("503", "500", "429", "404", "401"):
                    self._send(int(fault), "text/plain", b"PHITEST said no", {"Retry-After": "0"})
                elif len(body) > server.largest_request:
                    self._send(413, "text/plain", b"")
                elif self.path != f"{ROOT}/studies":
                    self._send(404, "text/plain", b"")
                elif fault == "reset":
                    self._reset()
                else:
                    status, told = server.store(self.headers["Content-Type"], body)
                    if fault == "lost-ack":
                        self._reset()
                        return
                    self._send(status, "application/dicom+json", json.dumps(told).encode(), fault=fault)

            def _reset(self) -> None:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                # Beside the files over it, whose references would keep it open.
                socket.close(self.connection.detach())
                self.close_connection = True

            def _answer(self, fault: Fault | None) -> None:
                parts = urlsplit(self.path.removeprefix(ROOT))
                if re.search(r"/instances/[^/]+$", parts.path):
                    self._send_instance(parts.path, fault)
                    return
                if parts.path == "/series" and not server.relational:
                    self._send(400, "text/plain", b"no relational queries here")
                    return
                page = json.dumps(server.search(parts.path, dict(parse_qsl(parts.query)))).encode()
                self._send(200, "application/dicom+json", page[:-5] if fault == "cut-json" else page, fault=fault)

            def _send_instance(self, path: str, fault: Fault | None) -> None:
                data = server.instance(path)
                if data is None:
                    self._send(404, "text/plain", b"")
                elif server.bare:
                    self._send(200, "application/dicom", data, fault=fault)
                else:
                    head = f"--{_BOUNDARY}\r\nContent-Type: application/dicom\r\n\r\n".encode()
                    end = b"" if fault == "no-boundary" else f"\r\n--{_BOUNDARY}--\r\n".encode()
                    kind = f'multipart/related; type="application/dicom"; boundary="{_BOUNDARY}"'
                    self._send(200, kind, head + data + end, fault=fault)

            def _send(
                self,
                status: int,
                kind: str,
                body: bytes,
                headers: Mapping[str, str] | None = None,
                fault: Fault | None = None,
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                if fault == "truncate":
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                elif fault == "drip":
                    with suppress(OSError):  # until the other side gives up
                        for byte in body:
                            self.wfile.write(bytes([byte]))
                            time.sleep(0.05)
                    self.close_connection = True
                else:
                    self.wfile.write(body)

        return Handler


def _parts(content_type: str, body: bytes) -> list[bytes]:
    """The parts of a multipart/related body of DICOM files (RFC 2046 5.1.1), strictly."""
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/related" or message.get_param("type") != "application/dicom":
        raise ValueError(f"{content_type}: is no multipart/related of DICOM files")
    if boundary is None or not re.fullmatch(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]", boundary):
        raise ValueError(f"{boundary!r}: is no boundary")
    first, *rest = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    if first or rest.pop() != b"--\r\n":
        raise ValueError("the body does not begin and end with its boundary")
    parts = []
    for part in rest:
        head, blank, content = part.partition(b"\r\n\r\n")
        if head.strip() != b"Content-Type: application/dicom" or not blank:
            raise ValueError(f"{head!r}: is no head of a DICOM part")
        parts.append(content)
    return parts


def _parsed(data: bytes) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
