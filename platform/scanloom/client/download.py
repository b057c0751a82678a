"""A finished dataset into a local folder: what is there is kept, what was cut is gone on with, every file checked."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from scanloom import console
from scanloom.api import DatasetResult, ResultFile
from scanloom.client.datasets import Ordered, result
from scanloom.client.errors import DamagedDownload, ServiceDown, ServiceError
from scanloom.client.flow import Flow, NoAnswer, Pause, Reply, Send, Sink, compute, send, together
from scanloom.client.session import AGAIN, SILENCE_S, Session, error_of, pause, wait_of

AT_ONCE = 4
_LAST = "manifest.json"
"""Written last, so that a folder that has it has all."""
_HALF = ".part"
_MOST_DAMAGED = 3
_REFUSED = frozenset({400, 401, 403})
"""Of a store: the link has expired."""


def download(ordered: Ordered, folder: str | Path, *, progress: bool = False, at_once: int = AT_ONCE) -> Flow[Path]:
    """Copy the finished dataset into a folder, `at_once` files at a time; the folder.

    Run again it goes on where it was, also within a file. Every file has the SHA-256 that the service says. Raises
    DamagedDownload where one has another however often it is fetched, RequestRefused where the dataset is not finished,
    ServiceDown.
    """
    place = Path(folder)
    links = Links(ordered, (yield from result(ordered)))
    files = links.files()
    shown = console.progress(f"dataset {ordered.job.id}", len(files), "files") if progress else nullcontext(None)
    with shown as advance:
        counted = _counted(advance)
        first = [file for file in files if file.path != _LAST]
        last = [file for file in files if file.path == _LAST]
        yield from together([_fetched(links, file, place, counted) for file in first], at_once)
        yield from together([_fetched(links, file, place, counted) for file in last], at_once)
    return place


def _counted(advance: Callable[..., None] | None) -> Callable[[], None]:
    lock = threading.Lock()

    def count() -> None:
        if advance is not None:
            with lock:
                advance(1)

    return count


@dataclass
class Links:
    """Where the files can be read at present; shared by the downloads of one dataset."""

    ordered: Ordered
    result: DatasetResult
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self) -> list[ResultFile]:
        return list(self.result.files)

    def url(self, path: str) -> str:
        """The link of a file, which may be a path of the service."""
        with self._lock:
            return next(file.url for file in self.result.files if file.path == path)

    def renew(self, path: str, expired: str) -> Flow[None]:
        """Fresh links, unless another download has fetched them meanwhile."""
        if self.url(path) == expired:
            fresh = yield from result(self.ordered)
            with self._lock:
                self.result = fresh


@dataclass
class _Rest:
    """Takes so many bytes more, and no endless body."""

    stream: BinaryIO
    left: int

    def write(self, piece: bytes, /) -> None:
        self.left -= len(piece)
        if self.left < 0:
            raise DamagedDownload(f"{self.stream.name}: the server sends more than the dataset's manifest says")
        self.stream.write(piece)

    def close(self) -> None:
        self.stream.close()


@dataclass
class _Half:
    """A file that is being written."""

    path: Path
    bytes: int

    def got(self) -> int:
        """Bytes that are there; none where they are too many."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size > self.bytes:
            self.path.unlink()
            return 0
        return size

    def sink(self, got: int, reply: Reply) -> _Rest | None:
        """Where the body of a reply goes: behind what is there, in its place, or nowhere."""
        if reply.status == 206 and reply.headers.get("content-range", "").startswith(f"bytes {got}-"):
            return _Rest(self.path.open("ab"), self.bytes - got)
        return _Rest(self.path.open("wb"), self.bytes) if reply.status == 200 else None

    def is_right(self, sha256: str) -> bool:
        return _is_right(self.path, self.bytes, sha256)


def _fetched(links: Links, file: ResultFile, folder: Path, done: Callable[[], None]) -> Flow[None]:
    target = _place(folder, file.path)
    half = _Half(target.with_name(target.name + _HALF), file.bytes)
    if not (yield from compute(functools.partial(_is_right, target, file.bytes, file.sha256))):
        for attempt in range(_MOST_DAMAGED):
            yield from _filled(links, file, half)
            if (yield from compute(functools.partial(half.is_right, file.sha256))):
                break
            half.path.unlink(missing_ok=True)
            if attempt == _MOST_DAMAGED - 1:
                raise DamagedDownload(
                    f"{file.path}: is not what the dataset's manifest says, fetched {attempt + 1} times"
                )
        half.path.replace(target)
    done()


def _filled(links: Links, file: ResultFile, half: _Half) -> Flow[None]:
    """Fetch what is missing of a file, again and again; patience begins anew with every byte that came."""
    session = links.ordered.session
    attempt, until = 0, session.clock() + session.patience_s
    while (got := half.got()) < file.bytes or not half.path.exists():
        failure, told_s = yield from _attempt(links, file, half, got)
        if half.got() > got:
            attempt, until = 0, session.clock() + session.patience_s
        if failure is None:
            continue
        pause_s = pause(session, attempt, told_s)
        if session.clock() + pause_s > until:
            raise failure
        attempt += 1
        yield Pause(pause_s)


def _attempt(links: Links, file: ResultFile, half: _Half, got: int) -> Flow[tuple[ServiceError | None, float | None]]:
    """One request for the rest of a file; what went wrong, and when the server said to ask again."""
    session, url = links.ordered.session, links.url(file.path)
    try:
        reply = yield from send(_asked(session, url, got, functools.partial(half.sink, got)))
    except NoAnswer as error:
        return ServiceDown(f"{file.path}: {error}"), None
    if reply.status in (200, 206) and (half.got() > got or file.bytes == 0):
        return None, None
    failure = (
        error_of(reply) if url.startswith("/") else ServiceDown(f"{file.path}: its store says HTTP {reply.status}")
    )
    if reply.status in (200, 206, 416):
        # Another part than asked for: from the beginning, then.
        half.path.unlink(missing_ok=True)
    elif reply.status in _REFUSED and not url.startswith("/"):
        yield from links.renew(file.path, url)
        if links.url(file.path) == url:
            raise failure
    elif reply.status not in AGAIN and reply.status != 500:
        raise failure
    return failure, wait_of(reply)


def _asked(session: Session, url: str, got: int, into: Callable[[Reply], Sink | None]) -> Send:
    # Bytes as they are: ranges and sizes are of those.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={got}-"} if got else {})
    if url.startswith("/"):
        return Send(
            "GET", session.address(url), session.headers(**headers, Accept="*/*"), silence_s=SILENCE_S, into=into
        )
    if not url.startswith(("https://", "http://")):
        raise ServiceDown("the service names a file's place that is no URL")
    # A store's link carries its own right; the key is nobody's business there.
    return Send("GET", url, headers, silence_s=SILENCE_S, into=into)


def _place(folder: Path, path: str) -> Path:
    """Where a file goes. ServiceDown for a path that leads out of the folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or any(part in ("..", ".") or set(part) & set("\\:\0") for part in parts):
        raise ServiceDown("the service names a file outside of the dataset; nothing was written there")
    return folder.joinpath(*parts)


def _is_right(path: Path, size: int, sha256: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256
