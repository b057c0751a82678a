"""What may be done in a store, tried one right after the other: `scanloom doctor s3://bucket/prefix`."""

from __future__ import annotations

import uuid
from contextlib import suppress

from scanloom.cluster import Finding
from scanloom.errors import ScanloomError
from scanloom.store import Store


def try_store(uri: str) -> list[Finding]:
    """Whether objects there can be listed, written, created only once, read and deleted; nothing is left behind.

    The first that stands in the way of all others is the only finding.
    """
    try:
        store = Store(uri)
        store.require_writable()
    except ScanloomError as error:
        return [Finding("store", "unusable", str(error), usable=False)]
    folder = f"scanloom-doctor-{uuid.uuid4().hex}"
    key = f"{folder}/tried"
    try:
        store.write(key, b"tried")
        if store.read(key) != b"tried" or key not in {found.key for found in store.list("")}:
            return [
                Finding("store", "unusable", f"{uri}: what was written is not there; check the bucket", usable=False)
            ]
    except ScanloomError as error:
        with suppress(ScanloomError):
            store.delete([key])
        return [Finding("store", "unusable", str(error), usable=False)]
    written = Finding("store", "usable", f"{uri} can be read and written, listed, and created in only once")
    try:
        store.delete([key])
    except ScanloomError as error:
        note = f"{error}; jobs delete what attempts left behind: grant s3:DeleteObject, then delete {key}"
        return [written, Finding("store: delete", "refused", note, usable=False)]
    return [written]
