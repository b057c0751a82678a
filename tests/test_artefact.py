from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scanloom.artefact import (
    Artefact,
    FileEntry,
    Problem,
    find_artefact,
    lineage,
    open_artefact,
    plan_digest,
    publish,
    verify,
)
from scanloom.errors import ArtefactError, StoreError
from scanloom.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "artefact"))


def _file(store: Store, path: str, data: bytes) -> FileEntry:
    store.write(path, data)
    return FileEntry.of(store.digest(path))


def _published(store: Store, files: dict[str, bytes] | None = None, **changes: Any) -> Artefact:
    entries = [_file(store, path, data) for path, data in (files or {"b/y": b"second", "a/x": b"first"}).items()]
    what: dict[str, Any] = {"kind": "corpus", "name": "n", "recipe": {}, "inputs": [], "statistics": {}}
    return publish(store, **{**what, "files": entries, **changes})


def test_what_is_published_opens_equal(store: Store) -> None:
    published = _published(store, statistics={"rows": 3, "cells": [{"sex": None}]}, recipe={"name": "r"})
    opened = open_artefact(store.uri, "corpus")
    assert opened == published
    assert [file.path for file in opened.manifest.files] == ["a/x", "b/y"]
    assert opened.files("a") == (published.manifest.files[0],)
    assert opened.manifest.code_version.startswith("0.")


def test_the_digest_is_of_content_and_inputs_not_of_place_name_or_time(tmp_path: Path) -> None:
    base = _published(Store(str(tmp_path / "1")))
    same = _published(Store(str(tmp_path / "2")), name="other", recipe={"a": 1}, statistics={"s": 2})
    assert same.digest == base.digest
    other_bytes = _published(Store(str(tmp_path / "3")), {"a/x": b"first", "b/y": b"changed"})
    other_kind = _published(Store(str(tmp_path / "4")), kind="latents")
    other_input = _published(Store(str(tmp_path / "5")), inputs=[lineage("corpus", base)])
    other_role = _published(Store(str(tmp_path / "6")), inputs=[lineage("reference", base)])
    assert len({a.digest for a in (base, other_bytes, other_kind, other_input, other_role)}) == 5


def test_an_artefact_as_input_has_its_kind_as_role(tmp_path: Path) -> None:
    corpus = _published(Store(str(tmp_path / "corpus")))
    latents = _published(Store(str(tmp_path / "latents")), kind="latents", inputs=[corpus])
    (entry,) = latents.manifest.inputs
    assert (entry.role, entry.kind, entry.uri, entry.digest) == ("corpus", "corpus", corpus.uri, corpus.digest)


def test_an_equal_manifest_that_is_there_is_adopted(store: Store) -> None:
    first = _published(store, statistics={"seconds": 1})
    assert _published(store, statistics={"seconds": 2}).manifest == first.manifest


def test_another_artefact_is_never_overwritten(store: Store) -> None:
    first = _published(store)
    with pytest.raises(ArtefactError, match="holds another corpus already"):
        _published(store, {"c": b"more"})
    assert open_artefact(store.uri) == first


def test_shards_without_a_manifest_are_no_artefact(store: Store) -> None:
    store.write("plan.json", b"{}")
    store.write("commits/shard-000000.json", b"{}")
    store.write("train/shard-000000-0123456789ab.parquet", b"")
    with pytest.raises(ArtefactError, match=r"unfinished \(1 shards are committed.*run its job again"):
        open_artefact(store.uri)


def test_an_empty_place_is_no_artefact(store: Store) -> None:
    with pytest.raises(ArtefactError, match="there is no artefact here"):
        open_artefact(store.uri)


@pytest.mark.s3
def test_a_missing_bucket_is_not_called_a_missing_artefact(s3: object) -> None:
    with pytest.raises(StoreError, match="no bucket"):
        open_artefact("s3://nobody-made-it/corpus")


def test_another_kind_is_refused(store: Store) -> None:
    _published(store)
    with pytest.raises(ArtefactError, match="is a corpus, expected a generator"):
        open_artefact(store.uri, "generator")


def test_newer_code_is_named_before_its_fields_are_judged(store: Store) -> None:
    store.write("manifest.json", json.dumps({"schema_version": 9, "new_field": 1}).encode())
    with pytest.raises(ArtefactError, match=r"newer code.*upgrade"):
        open_artefact(store.uri)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": "x"}', b'{"kind": "corpus"}'])
def test_a_damaged_manifest_is_refused(store: Store, text: bytes) -> None:
    store.write("manifest.json", text)
    with pytest.raises(ArtefactError, match=r"manifest\.json is damaged"):
        open_artefact(store.uri)


def test_fetching_copies_every_file_and_refuses_a_changed_one(store: Store, tmp_path: Path) -> None:
    artefact = _published(store)
    store.write("stray", b"not fetched")
    artefact.fetch(tmp_path / "copy")
    files = {p.relative_to(tmp_path / "copy").as_posix(): p for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert {name: path.read_bytes() for name, path in files.items()} == {"a/x": b"first", "b/y": b"second"}
    store.write("b/y", b"secOnd")
    with pytest.raises(ArtefactError, match="b/y: changed since it was written"):
        artefact.fetch(tmp_path / "again")


def test_an_unfinished_artefact_is_not_found_and_another_kind_is_an_error(store: Store) -> None:
    assert find_artefact(store.uri, "corpus") is None
    published = _published(store)
    assert find_artefact(store.uri, "corpus") == published
    with pytest.raises(ArtefactError, match="expected a dataset"):
        find_artefact(store.uri, "dataset")


def test_a_plan_digest_depends_on_values_not_on_the_order_of_keys() -> None:
    assert plan_digest("dataset", {"a": 1, "b": [2]}) == plan_digest("dataset", {"b": [2], "a": 1})
    different = [plan_digest("dataset", {"a": 1}), plan_digest("dataset", {"a": 2}), plan_digest("corpus", {"a": 1})]
    assert len({*different, plan_digest("dataset", {"a": 1.5})}) == 4
    with pytest.raises(ValueError, match="not JSON compliant"):
        plan_digest({"a": float("nan")})


def test_verification_finds_what_is_missing_changed_and_extra(store: Store) -> None:
    files = dict.fromkeys(("good", "gone", "longer", "flipped"), b"content")
    artefact = _published(store, files)
    assert list(verify(artefact)) == []
    store.delete(["gone"])
    store.write("longer", b"content and more")
    store.write("flipped", b"cOntent")
    store.write("stray", b"")
    store.write("commits/shard-000000.json", b"{}")
    found = list(verify(artefact))
    assert [(p.path, p.fault) for p in found] == [
        ("flipped", "changed"),
        ("gone", "missing"),
        ("longer", "changed"),
        ("stray", "extra"),
    ]
    assert all(isinstance(p, Problem) and p.detail for p in found)
