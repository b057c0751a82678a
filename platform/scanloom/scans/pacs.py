"""A connection to a PACS that speaks DICOMweb (PS3.18): searches by QIDO-RS, instances by WADO-RS.

Searches go through dicomweb-client. Instances are fetched beside it, over the same connection: it hands out datasets
where the bytes as stored are wanted, reads a body of any length, and takes a body without its last boundary for whole.
No log and no error holds a UID, a filter, or the Authorization header.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import requests
import urllib3
from dicomweb_client.web import DICOMwebClient
from requests.auth import AuthBase

from scanloom.errors import RecipeError, ScanError, StoreError
from scanloom.scans.decode import MAX_FILE_BYTES
from scanloom.scans.quarantine import reject

AUTHORIZATION_VARIABLE = "SCANLOOM_DICOMWEB_AUTHORIZATION"
PAGE = 500
"""Results asked for at a time; a server may give fewer."""
FIRST_WAIT_S = 0.25
STUDY_UID, SERIES_UID, INSTANCE_UID = "0020000D", "0020000E", "00080018"
INSTANCES_IN_SERIES, PATIENT_ID = "00201209", "00100020"

_TIMEOUTS_S = (10.0, 60.0)
"""To connect, and of silence."""
_SLOWEST_BYTES_S = 16 << 10
_ATTEMPTS = 6
_LONGEST_WAIT_S = 30.0
_REDIRECTS = 5
_PIECE = 1 << 20
_BUSY = frozenset({429, 502, 503, 504})
_NOT_GIVEN = frozenset({404, 406, 410})
_UNKNOWN = frozenset({400, 404, 405, 501})
_KEYS_OF_SERIES = frozenset({"Modality", "BodyPartExamined", "Laterality", "ProtocolName"})
_AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_WORDS_OF_A_PATH = frozenset({"studies", "series", "instances"})
# Wider than PS3.5 9.1, to which archives do not keep, and nothing that means something in a URL.
_LONGEST_UID = 128
_UID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]*(\.[0-9A-Za-z_-]+)*")

LOG = logging.getLogger("scanloom.scans")

Result = Mapping[str, Any]
"""One study, series or instance in the DICOM JSON model: tag -> vr and Value."""
_T = TypeVar("_T")

# They write URLs, which name patients' studies, and tracebacks.
for _name in ("dicomweb_client", "retrying", "urllib3"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class Pacs:
    """Every method raises StoreError where the server refuses or, after several attempts, does not answer well.

    RecipeError for a root that is no URL, or one that holds a user's name or password.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        if "@" in urlsplit(self.root).netloc:
            raise RecipeError(
                "prepare.source.uri: holds a user name or password, which would be stored with the corpus; "
                f"put the value of an Authorization header into {AUTHORIZATION_VARIABLE}"
            )
        self._connection = _Connection(self.root)
        try:
            self._client = DICOMwebClient(
                self.root, session=cast(requests.Session, self._connection), permissive_uid=True
            )
        except ValueError:
            raise RecipeError(f"prepare.source.uri {self.root}: is no URL of a server") from None
        self._client.set_http_retry_params(retry=False)

    def series(self, filters: Mapping[str, str]) -> list[Result]:
        """Every series that the filters (by DICOM keyword) find.

        A server need not search the series of all studies at once (PS3.18 10.6.1); then they are found study by study.
        """
        try:
            return list(self._series(None, filters))
        except _NotRelationalError:
            LOG.info("the server does not search the series of all studies at once; asking study by study")
        of_series = {keyword: value for keyword, value in filters.items() if _is_of_series(keyword)}
        of_study = {keyword: value for keyword, value in filters.items() if keyword not in of_series}
        studies = self._results(
            lambda offset: self._client.search_for_studies(limit=PAGE, offset=offset, search_filters=of_study),
            (STUDY_UID,),
        )
        return [
            {**result, STUDY_UID: study[STUDY_UID], PATIENT_ID: study.get(PATIENT_ID)}
            for study in studies
            for result in self._series(text(study, STUDY_UID), of_series)
        ]

    def _series(self, study: str | None, filters: Mapping[str, str]) -> Iterator[Result]:
        given = dict(filters)
        return self._results(
            lambda offset: self._client.search_for_series(
                study, limit=PAGE, offset=offset, fields=["NumberOfSeriesRelatedInstances"], search_filters=given
            ),
            (STUDY_UID, SERIES_UID) if study is None else (SERIES_UID,),
        )

    def instances(self, study: str, series: str) -> list[str]:
        """The UIDs of the instances of a series, sorted."""
        found = self._results(
            lambda offset: self._client.search_for_instances(study, series, limit=PAGE, offset=offset), (INSTANCE_UID,)
        )
        return sorted(text(result, INSTANCE_UID) for result in found)

    def instance(self, study: str, series: str, instance: str) -> bytes:
        """The DICOM file as the server has it. Raises ScanError: not-delivered, too-large."""
        return self._connection.file(f"{self.root}/studies/{study}/series/{series}/instances/{instance}")

    def _results(self, search: Callable[[int], list[Any]], uids: tuple[str, ...]) -> Iterator[Result]:
        """The results of all pages, each once.

        A short page does not say that it is the last: servers cap the limit. Some do not know the offset and give
        their first page again; then a page as long as was asked for cannot be all.
        """
        seen: set[tuple[str, ...]] = set()
        offset = 0
        while True:
            page = self._page(search, offset)
            keyed = {tuple(self._uid(result, tag) for tag in uids): result for result in page}
            new = {key: result for key, result in keyed.items() if key not in seen}
            if page and not new:
                self._require_all(len(seen))
            if not new:
                return
            seen |= new.keys()
            yield from new.values()
            offset += len(page)

    def _require_all(self, found: int) -> None:
        if found == PAGE:
            raise StoreError(
                f"{self.root}: gives {PAGE} results and no more, whatever offset is asked for; narrow "
                "prepare.source.query"
            )
        LOG.warning("the server knows no offset: if it caps its results below %d, some are missing", found + 1)

    def _page(self, search: Callable[[int], list[Any]], offset: int) -> list[Any]:
        try:
            page = search(offset)
        except ValueError:
            raise StoreError(
                f"{self.root}: answered a search with what is no DICOM JSON, perhaps a page to log in"
            ) from None
        except ScanError:
            raise StoreError(f"{self.root}: the answer to a search is too long; narrow prepare.source.query") from None
        if not isinstance(page, list) or not all(isinstance(result, dict) for result in page):
            raise StoreError(f"{self.root}: answered a search with what is no DICOM JSON")
        return page

    def _uid(self, result: Result, tag: str) -> str:
        uid = text(result, tag)
        if tag == STUDY_UID and not uid:
            raise _NotRelationalError(f"{self.root}: names series without their studies, or studies by nothing")
        if len(uid) > _LONGEST_UID or not _UID.fullmatch(uid):
            raise StoreError(f"{self.root}: names a study, a series or an instance by what is no UID, or not at all")
        return uid


class _NotRelationalError(StoreError):
    """The server does not search the series of all studies, or does not say of which study each of them is."""


def _is_of_series(keyword: str) -> bool:
    """Whether it is a key of the series level (PS3.18 10.6.1), not of the study's or the patient's."""
    return keyword.startswith(("Series", "PerformedProcedureStep")) or keyword in _KEYS_OF_SERIES


def text(result: Result, tag: str) -> str:
    """The first value of an element as text; empty where there is none."""
    element = result.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return str(values[0]).strip() if isinstance(values, list) and values else ""


# --- HTTP -----------------------------------------------------------------------------------------------------


class _AgainError(Exception):
    """The next attempt may succeed; the text says what happened, without a URL."""

    def __init__(self, what: str, wait_s: float = 0.0) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class _Authorization(AuthBase):
    """The header of this process's environment. requests drops it where a redirect leads to another host."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = self._value
        return request


class _Connection:
    """What dicomweb-client needs of a session: answers come whole, of bounded length, after several attempts."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._session = requests.Session()
        self._session.max_redirects = _REDIRECTS
        value = os.environ.get(AUTHORIZATION_VARIABLE, "").strip()
        if not (value.isascii() and value.isprintable()):
            # Later errors would quote it.
            raise RecipeError(f"{AUTHORIZATION_VARIABLE}: holds a character that no HTTP header can")
        if value:
            self._session.auth = _Authorization(value)

    def get(self, url: str, headers: Mapping[str, str], **_: object) -> requests.Response:
        """A response that holds its body. Raises StoreError, ScanError too-large."""
        # The client's Host lacks the port, and would go along to another host.
        sent = {name: value for name, value in headers.items() if name != "Host"}

        def attempt() -> requests.Response:
            response, body = self._answer(url, sent)
            if body and "json" in response.headers.get("Content-Type", ""):
                _require_whole_json(body)
            return response

        return self._retried(url, attempt)

    def file(self, url: str) -> bytes:
        """The one DICOM file that this URL stands for. Raises StoreError, ScanError not-delivered, too-large."""

        def attempt() -> bytes:
            response, body = self._answer(url, {"Accept": _AS_STORED})
            return _only_part(response.headers.get("Content-Type", ""), body, self._place(url))

        return self._retried(url, attempt)

    def _retried(self, url: str, attempt: Callable[[], _T]) -> _T:
        wait = FIRST_WAIT_S
        for left in reversed(range(_ATTEMPTS)):
            try:
                return attempt()
            except _AgainError as error:
                if not left:
                    raise StoreError(f"{self._place(url)}: {error}, {_ATTEMPTS} times", retryable=True) from None
                time.sleep(max(wait, error.wait_s))
                wait *= 2
            except requests.RequestException as error:
                # Its text holds the URL, or the header.
                raise StoreError(
                    f"{self._place(url)}: {type(error).__name__}; check prepare.source.uri and {AUTHORIZATION_VARIABLE}"
                ) from None
        raise AssertionError("unreachable")

    def _answer(self, url: str, headers: Mapping[str, str]) -> tuple[requests.Response, bytearray]:
        """One attempt: the response, and its body, which the response holds too."""
        try:
            with self._session.get(url, headers=dict(headers), stream=True, timeout=_TIMEOUTS_S) as response:
                self._require_success(response, url)
                body = _body(response)
        except requests.exceptions.SSLError:
            raise
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise _AgainError(f"no whole answer ({type(error).__name__})") from None
        response.raw = io.BytesIO(body)
        return response, body

    def _require_success(self, response: requests.Response, url: str) -> None:
        status = response.status_code
        if status in _BUSY:
            raise _AgainError(f"is overloaded or failing (HTTP {status})", _asked_wait(response))
        if status in (401, 403):
            raise StoreError(f"{self._place(url)}: refused (HTTP {status}); check {AUTHORIZATION_VARIABLE}")
        if status in _NOT_GIVEN and url.rpartition("/")[0].endswith("/instances"):
            raise reject("not-delivered")
        if status in _UNKNOWN and url.partition("?")[0] == f"{self._root}/series":
            raise _NotRelationalError(f"{self._place(url)}: refused (HTTP {status})")
        if not 200 <= status < 300:
            raise StoreError(f"{self._place(url)}: refused (HTTP {status})")

    def _place(self, url: str) -> str:
        """The URL without its query, and without what names a study."""
        path = url.removeprefix(self._root).partition("?")[0].split("/")
        return self._root + "/".join(part if part in _WORDS_OF_A_PATH or not part else "..." for part in path)


def _asked_wait(response: requests.Response) -> float:
    wait = response.headers.get("Retry-After", "")
    return min(float(wait), _LONGEST_WAIT_S) if wait.isdigit() else 0.0


def _body(response: requests.Response) -> bytearray:
    """The decoded body. Raises ScanError too-large."""
    body = bytearray()
    start = time.monotonic()
    while piece := response.raw.read1(_PIECE, decode_content=True):
        body += piece
        if len(body) > MAX_FILE_BYTES:
            raise reject("too-large")
        # A server that sends a byte now and then is never silent.
        if time.monotonic() - start > _TIMEOUTS_S[1] + len(body) / _SLOWEST_BYTES_S:
            raise _AgainError("an answer too slow to wait for")
    return body


def _require_whole_json(body: bytearray) -> None:
    try:
        json.loads(body)
    except ValueError:
        raise _AgainError("an answer that is cut or damaged") from None


def _only_part(content_type: str, body: bytearray, place: str) -> bytes:
    """The one part of a multipart/related body (RFC 2046), or the body where the server sends the part bare."""
    message = Message()
    message["Content-Type"] = content_type
    if message.get_content_type() == "application/dicom":
        return bytes(body)
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/related" or not boundary:
        raise StoreError(f"{place}: answered with another type than multipart/related of DICOM files")
    line = b"--" + boundary.encode("latin-1", "replace")
    start, end = body.find(line), body.rfind(b"\r\n" + line + b"--")
    if start < 0 or end < 0:
        raise _AgainError("an answer without its last boundary")
    head = body.find(b"\r\n\r\n", start, end)
    if head < 0 or body.find(b"\r\n" + line, head, end) >= 0:
        raise StoreError(f"{place}: answered with several parts, or none, where one instance was asked for")
    return bytes(memoryview(body)[head + 4 : end])
