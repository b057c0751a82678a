"""An object of a store as a file that can be read from any place, without holding it."""

from __future__ import annotations

import io
import time
from typing import Any

import pyarrow as pa

from scanloom.errors import StoreError
from scanloom.store import Store

_ATTEMPTS = 6


class RangedFile(io.RawIOBase):
    """Each read is one range request with retries; StoreError where it fails for good.

    Buckets are read through pyarrow, which takes a third of the processor time that boto3 takes for large ranges.
    """

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._at = store, key, size, 0
        self._open: pa.NativeFile | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._at), 0)
        if length:
            self._fill(memoryview(buffer)[:length])
        self._at += length
        return length

    def _fill(self, part: memoryview) -> None:
        if self._store.is_local:
            part[:] = self._store.read_range(self._key, self._at, len(part))
            return
        for attempt in range(_ATTEMPTS):
            try:
                opened = self._open or self._store.filesystem.open_input_file(self._store.path(self._key))
                self._open = opened
                opened.seek(self._at)
                filled = opened.readinto(part)
            except FileNotFoundError as error:
                raise StoreError(f"{self._store.uri_of(self._key)}: no such object") from error
            except OSError as error:
                self._open = None
                if attempt == _ATTEMPTS - 1:
                    reason = " ".join(str(error).split())[:200]
                    raise StoreError(f"{self._store.uri_of(self._key)}: {reason}", retryable=True) from error
                time.sleep(0.05 * 2**attempt)
            else:
                if filled != len(part):
                    raise StoreError(f"{self._store.uri_of(self._key)}: the object is shorter than its listing said")
                return
        raise AssertionError("unreachable")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError("negative place in a file")
        self._at = at
        return at
