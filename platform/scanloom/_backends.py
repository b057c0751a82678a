"""The two places a store can be: a local folder and an S3 bucket. Everybody else uses `scanloom.store.Store`.

boto3 carries whole objects, since it types its errors, checks checksums and can create conditionally; pyarrow.fs
(`filesystem`) carries what streams: Ray Data, Ray Train, column reads.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pyarrow.fs
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from scanloom.errors import StoreError

LOG = logging.getLogger("scanloom.store")
HIDDEN = ".scanloom-"
"""Objects whose last name starts so are probes or half-written files; no listing shows them."""
CHUNK = 1 << 20
_BODY_ATTEMPTS = 6
_MULTIPART = TransferConfig(multipart_threshold=256 << 20, multipart_chunksize=64 << 20, max_concurrency=4)
_T = TypeVar("_T")


@dataclass(frozen=True)
class ObjectInfo:
    """One object of a listing; `modified` in seconds since 1970 by the store's clock.

    `version` changes when the content may have changed: the ETag, or a file's time of modification.
    """

    key: str
    bytes: int
    modified: float
    version: str


class StoredFile(NamedTuple):
    """What an upload put where."""

    key: str
    bytes: int
    sha256: str


class MissingError(StoreError):
    """There is no object of this name."""


# --- a local folder -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A local folder. Writes appear whole or not at all; creation is exclusive among processes of one host."""

    root: Path

    def filesystem(self) -> pyarrow.fs.FileSystem:
        return pyarrow.fs.LocalFileSystem()

    def path(self, key: str) -> str:
        return str(self.root / key)

    def require(self) -> None:
        with os_errors(str(self.root)):
            place = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not place.is_dir():
            raise StoreError(f"{self.root}: {place} is a file, not a folder; choose another folder")

    def stream(self, key: str, sink: Callable[[], BinaryIO]) -> None:
        with os_errors(self.path(key)), (self.root / key).open("rb") as source:
            _copy(iter(lambda: source.read(CHUNK), b""), sink())

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with os_errors(self.path(key)), (self.root / key).open("rb") as source:
            source.seek(offset)
            return source.read(length)

    def write(self, key: str, data: bytes) -> None:
        with os_errors(self.path(key)), self._half_written(key) as (half, target):
            half.write_bytes(data)
            _persist(half)
            half.replace(target)

    def create(self, key: str, data: bytes) -> bool:
        with os_errors(self.path(key)), self._half_written(key) as (half, target):
            half.write_bytes(data)
            _persist(half)
            try:
                # link(2) refuses an existing name atomically, which rename(2) does not.
                target.hardlink_to(half)
            except FileExistsError:
                return False
            _persist(target.parent)
            return True

    def upload(self, source: Path, key: str) -> None:
        with os_errors(self.path(key)), self._half_written(key) as (half, target):
            with source.open("rb") as stream, half.open("wb") as sink:
                _copy(iter(lambda: stream.read(CHUNK), b""), sink)
            _persist(half)
            half.replace(target)

    def copy(self, key: str, to: str) -> None:
        self.upload(self.root / key, to)

    def exists(self, key: str) -> bool:
        with os_errors(self.path(key)):
            return (self.root / key).is_file()

    def list(self, prefix: str) -> list[ObjectInfo]:
        with os_errors(self.path(prefix)):
            return [
                ObjectInfo(
                    file.relative_to(self.root).as_posix(), status.st_size, status.st_mtime, str(status.st_mtime_ns)
                )
                for folder, names in _folders(self.root / prefix)
                for file in (folder / name for name in names)
                if (status := _file_status(file)) is not None
            ]

    def names(self, prefix: str, after: str, limit: int) -> Sequence[str]:
        try:
            with os_errors(self.path(prefix)), os.scandir(self.root / prefix) as entries:
                found = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
        except MissingError:
            return []
        return [name for name in found if name > after][:limit]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with os_errors(self.path(key)):
                (self.root / key).unlink(missing_ok=True)

    def presign(self, key: str, expires_s: int) -> str:
        raise StoreError(f"{self.path(key)}: a local file has no presigned URL; use an s3:// store")

    @contextmanager
    def _half_written(self, key: str) -> Iterator[tuple[Path, Path]]:
        target = self.root / key
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:
            raise StoreError(f"{target.parent}: cannot be created there; choose another folder") from error
        half = target.parent / f"{HIDDEN}{uuid.uuid4().hex}"
        try:
            yield half, target
        finally:
            half.unlink(missing_ok=True)


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below, also behind links, once; and the names in it."""
    seen = set()
    for folder, below, names in os.walk(root, onerror=_unless_gone, followlinks=True):
        status = os.stat(folder)  # noqa: PTH116 - os.walk names folders by text
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below.sort()
        yield Path(folder), names


def _unless_gone(error: OSError) -> None:
    # A folder that may not be read must not look like one without files.
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _file_status(file: Path) -> os.stat_result | None:
    try:
        return file.stat() if file.is_file() else None
    except FileNotFoundError:  # deleted since the folder was read
        return None


def _persist(path: Path) -> None:
    # A commit must not outlive the shard it names when the machine loses power.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def os_errors(where: str) -> Iterator[None]:
    """Turn the operating system's errors into a StoreError of one line about `where`."""
    try:
        yield
    except OSError as error:
        raise _explain_os(error, where) from error


def _explain_os(error: OSError, where: str) -> StoreError:
    if error.errno == errno.ENOENT:
        return MissingError(f"{where}: no such file")
    advice = {
        errno.ENOSPC: "the disk is full; free space or choose another folder",
        errno.EDQUOT: "the disk quota is used up; free space or choose another folder",
        errno.EROFS: "the folder is read-only; choose another folder",
        errno.EACCES: "permission denied; check the folder's owner and mode",
        errno.EPERM: "the filesystem refused it (permission, or no hard links); choose another folder",
        errno.EOPNOTSUPP: "the filesystem has no hard links, which create-only needs; choose another folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another folder",
        errno.EISDIR: "is a folder, not a file",
        errno.ENAMETOOLONG: "the name is too long for the filesystem",
    }
    code = error.errno or 0
    return StoreError(f"{where}: {advice.get(code) or error.strerror or error}", retryable=code == errno.EIO)


# --- an S3 bucket ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """A prefix (without slashes at its ends) of an S3 bucket."""

    name: str
    prefix: str

    def filesystem(self) -> pyarrow.fs.FileSystem:
        return _arrow_s3(_settings())

    def path(self, key: str) -> str:
        return "/".join(part for part in (self.name, self.prefix, key) if part)

    def require(self) -> None:
        # A listing carries an error code, which HEAD's bare 403 does not; few attempts, so that a wrong endpoint
        # is told at once.
        with self._errors(""):
            _client(_settings(), 3).list_objects_v2(Bucket=self.name, Prefix=self._key(""), MaxKeys=1)

    def stream(self, key: str, sink: Callable[[], BinaryIO]) -> None:
        self._get(key, {}, lambda body: _copy(body.iter_chunks(CHUNK), sink()))

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        data: bytes = self._get(key, {"Range": f"bytes={offset}-{offset + length - 1}"}, lambda body: body.read())
        return data

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            self._s3.put_object(Bucket=self.name, Key=self._key(key), Body=data)

    def create(self, key: str, data: bytes) -> bool:
        with self._errors(key):
            try:
                self._s3.put_object(Bucket=self.name, Key=self._key(key), Body=data, IfNoneMatch="*")
            except ClientError as error:
                # 412: it is there (perhaps ours, when the acknowledgement was lost); 409: another PUT is under way.
                if _status(error) not in (409, 412):
                    raise
                return False
            return True

    def upload(self, source: Path, key: str) -> None:
        # By its name: of an open file, up to ten parts would be held in memory. Not by the client's upload_file, which
        # hides why a store refused.
        with os_errors(str(source)), self._errors(key), create_transfer_manager(self._s3, _MULTIPART) as transfers:
            transfers.upload(str(source), self.name, self._key(key)).result()

    def copy(self, key: str, to: str) -> None:
        with self._errors(key):
            self._s3.copy({"Bucket": self.name, "Key": self._key(key)}, self.name, self._key(to), Config=_MULTIPART)

    def exists(self, key: str) -> bool:
        with self._errors(key):
            try:
                self._s3.head_object(Bucket=self.name, Key=self._key(key))
            except ClientError as error:
                if _status(error) == 404:
                    return False
                self.require()  # tells wrong credentials from a missing right, which HEAD does not
                raise
            return True

    def list(self, prefix: str) -> list[ObjectInfo]:
        folder = f"{self._key(prefix)}/".lstrip("/")
        cut = len(f"{self.prefix}/".lstrip("/"))
        with self._errors(prefix):
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=folder)
            return [
                ObjectInfo(
                    found["Key"][cut:], found["Size"], found["LastModified"].timestamp(), found["ETag"].strip('"')
                )
                for page in pages
                for found in page.get("Contents", [])
                if not found["Key"].endswith("/")  # directory markers of pyarrow and Ray
            ]

    def names(self, prefix: str, after: str, limit: int) -> Sequence[str]:
        folder = f"{self._key(prefix)}/".lstrip("/")
        wanted = {"Bucket": self.name, "Prefix": folder, "Delimiter": "/", "StartAfter": f"{folder}{after}"}
        found: list[str] = []
        with self._errors(prefix):
            # One more: of a folder to start after, some servers tell again.
            size = {"PageSize": min(limit + 1, 1000)}
            for page in self._s3.get_paginator("list_objects_v2").paginate(**wanted, PaginationConfig=size):
                entries = [o["Key"] for o in page.get("Contents", [])]
                entries += [o["Prefix"] for o in page.get("CommonPrefixes", [])]
                found += [name for entry in entries if (name := entry[len(folder) :]) > after]
                if len(found) >= limit:
                    break
        return sorted(found)[:limit]

    def delete(self, keys: Iterable[str]) -> None:
        names = [self._key(key) for key in keys]
        for start in range(0, len(names), 1000):
            batch = {"Objects": [{"Key": name} for name in names[start : start + 1000]], "Quiet": True}
            with self._errors(""):
                refused = self._s3.delete_objects(Bucket=self.name, Delete=batch).get("Errors", [])
            if refused:
                first = refused[0]
                raise StoreError(f"s3://{self.name}/{first['Key']}: refused to be deleted ({first['Code']})")

    def presign(self, key: str, expires_s: int) -> str:
        with self._errors(key):
            place = {"Bucket": self.name, "Key": self._key(key)}
            return str(self._s3.generate_presigned_url("get_object", Params=place, ExpiresIn=expires_s))

    @property
    def _s3(self) -> Any:
        return _client(_settings(), 8)

    def _key(self, key: str) -> str:
        return "/".join(part for part in (self.prefix, key) if part)

    def _get(self, key: str, extra: dict[str, str], consume: Callable[[Any], _T]) -> _T:
        # botocore retries requests but never a body that breaks, so GET and read are one unit here.
        with self._errors(key):
            for attempt in range(_BODY_ATTEMPTS):
                response = self._s3.get_object(Bucket=self.name, Key=self._key(key), **extra)
                try:
                    return consume(response["Body"])
                except BotoCoreError as error:
                    if attempt == _BODY_ATTEMPTS - 1:
                        raise
                    LOG.debug("reading s3://%s again: %s", self.path(key), error)
                    time.sleep(0.05 * 2**attempt)
            raise AssertionError("unreachable")

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            raise _explain_refusal(error, self.name, f"s3://{self.path(key)}") from error
        except (BotoCoreError, ValueError) as error:
            raise _explain_failure(error, f"s3://{self.path(key)}") from error


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _explain_refusal(error: ClientError, bucket: str, where: str) -> StoreError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    what = f"{error.operation_name}: {code}"
    status = _status(error)
    if code == "NoSuchBucket":
        return StoreError(f"{where}: there is no bucket {bucket!r} at {_endpoint()}; create it or correct the recipe")
    if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "AuthFailure"}:
        return StoreError(
            f"{where}: {_endpoint()} refused the credentials ({code}); check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    if status in (401, 403):
        return StoreError(f"{where}: these credentials may not do this ({what}); ask for the right or choose another")
    if status == 404:
        return MissingError(f"{where}: no such object")
    if status == 416:
        return StoreError(f"{where}: the object is shorter than the range asked for")
    retryable = status >= 500 or status == 429
    again = "; the store is overloaded or failing, try again later" if retryable else ""
    return StoreError(f"{where}: {_endpoint()} refused ({what}, HTTP {status}){again}", retryable=retryable)


def _explain_failure(error: Exception, where: str) -> StoreError:
    if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
        return StoreError(f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, (ConnectionError, HTTPClientError)):
        kind = type(error).__name__
        return StoreError(
            f"{where}: no answer from {_endpoint()} ({kind}); check AWS_ENDPOINT_URL and that it runs", retryable=True
        )
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return StoreError(f"{where}: {text}; check the AWS_* environment variables")
    return StoreError(f"{where}: {text}", retryable=True)


# --- S3 clients -----------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """Everything of the environment that a client depends on, so that a change of it makes a new client."""

    endpoint: str | None
    region: str
    access_key: str | None
    secret_key: str | None
    token: str | None
    pid: int


def _settings() -> _Settings:
    get = os.environ.get
    return _Settings(
        endpoint=get("AWS_ENDPOINT_URL_S3") or get("AWS_ENDPOINT_URL") or None,
        region=get("AWS_REGION") or get("AWS_DEFAULT_REGION") or "us-east-1",
        access_key=get("AWS_ACCESS_KEY_ID"),
        secret_key=get("AWS_SECRET_ACCESS_KEY"),
        token=get("AWS_SESSION_TOKEN"),
        pid=os.getpid(),  # sockets must not be shared with a forked child
    )


def _endpoint() -> str:
    return _settings().endpoint or "AWS S3"


@functools.lru_cache(maxsize=8)
def _client(settings: _Settings, attempts: int) -> Any:
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"} if settings.endpoint else {},
        connect_timeout=5,
        read_timeout=30,
        tcp_keepalive=True,
        max_pool_connections=32,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    # A session of its own: the default session is not safe to make clients from several threads.
    return Session().client("s3", endpoint_url=settings.endpoint, region_name=settings.region, config=config)


@functools.lru_cache(maxsize=8)
def _arrow_s3(settings: _Settings) -> pyarrow.fs.FileSystem:
    place = {}
    if settings.endpoint:
        parts = urlsplit(settings.endpoint)
        place = {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
    return pyarrow.fs.S3FileSystem(
        region=settings.region,
        allow_delayed_open=True,  # a small PUT is one request, not three
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=8),
        **place,
    )


# --- both -----------------------------------------------------------------------------------------------------


def _copy(chunks: Iterable[bytes], sink: BinaryIO) -> None:
    for chunk in chunks:
        sink.write(chunk)


class Sha256Sink:
    """A write-only stream that keeps size and SHA-256 of what passes, not the bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.bytes += len(data)
        self._hash.update(data)
        return len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
