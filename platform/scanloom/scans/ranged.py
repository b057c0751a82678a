"""An object of a store as a file that can be read from any place, without holding it."""

from __future__ import annotations

import io
from typing import Any

from scanloom.store import Store


class RangedFile(io.RawIOBase):
    """Each read is one range request with the store's retries; StoreError where it fails for good."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__()
        self._store, self._key, self._size, self._at = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = max(min(len(buffer), self._size - self._at), 0)
        buffer[:length] = self._store.read_range(self._key, self._at, length)
        self._at += length
        return length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError("negative place in a file")
        self._at = at
        return at
