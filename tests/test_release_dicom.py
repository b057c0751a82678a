"""Released DICOM files say that no identity is in them, and by which audit; nothing else of the dataset changes."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread

from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.audit.policy import read_policy
from scanloom.audit.release import Request, release
from scanloom.dicom.checks import dciodvfy, violations
from scanloom.dicom.released import released
from scanloom.dicom.synthetic import InstanceDescription
from scanloom.dicom.template import render
from scanloom.errors import ArtefactError, ReleaseRefused
from scanloom.store import Store
from tests.released import POLICY, Chain, audit
from tests.test_release import KEY, rewritten

INSTANCE = InstanceDescription("00c0ffee", "demo", "ab" * 32, "chest", "cd" * 32, 12, 0.143, "20000101")
KINDS: list[dict[str, Any]] = [
    {}, {"bits_stored": 8, "transfer_syntax": "rle"}, {"sop_class": "CT"}, {"transfer_syntax": "jpeg-ls"},
    {"sop_class": "MR", "transfer_syntax": "htj2k"},
]  # fmt: skip


def bundle(chain: Chain, name: str, of: Artefact | None = None) -> Artefact:
    text = POLICY.encode()
    target = Store(str(chain.folder / name))
    return release(Request(of or chain.dataset, chain.audit.uri, read_policy(text, "p"), text, target), KEY)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())) or "DX")
def test_a_marked_file_is_the_one_that_would_have_been_written_marked(kind: dict[str, Any]) -> None:
    instance = replace(INSTANCE, **kind)
    drawn = np.random.default_rng(0).integers(0, 200, (9, 7))
    pixels = drawn.astype(np.uint8) if instance.bits_stored == 8 else drawn.astype(np.uint16)
    plain = render(pixels, instance)
    marked = released(plain, "scanloom audit 0123456789ab")
    assert marked == render(pixels, replace(instance, audit="scanloom audit 0123456789ab"))
    read = dcmread(io.BytesIO(marked))
    assert violations(read) == []
    assert dciodvfy(marked).errors == ()
    assert read.PatientIdentityRemoved == "YES"
    assert read.DeidentificationMethod == "Synthetic; passed scanloom audit 0123456789ab"
    assert read.PixelData == dcmread(io.BytesIO(plain)).PixelData
    with pytest.raises(ArtefactError, match="says already that identity was removed"):
        released(marked, "another")


@pytest.mark.parametrize("keyword", ["PatientIdentityRemoved", "DeidentificationMethod"])
def test_a_half_made_statement_breaks_a_rule(keyword: str) -> None:
    part = dcmread(io.BytesIO(released(render(np.zeros((4, 4), np.uint16), INSTANCE), "x")))
    delattr(part, keyword)
    assert [one.rule for one in violations(part)] == ["identity-removed"]


def test_a_bundle_says_so_in_every_file_and_points_to_each(tmp_path: Path) -> None:
    chain = Chain.made(tmp_path, webdataset=True)
    inside = open_artefact(f"{bundle(chain, 'bundle').uri}/dataset", "dataset")
    assert inside.digest != chain.dataset.digest
    assert list(verify(inside)) == []
    assert len(inside.manifest.files) == len(chain.dataset.manifest.files)
    before = {file.path: file.sha256 for file in chain.dataset.manifest.files}
    assert {f.path for f in inside.manifest.files} & set(before) == {f.path for f in chain.dataset.files("webdataset")}
    rows = [row for file in inside.files("images") for row in _rows(inside, file.path)]
    old = {row["id"]: row for file in chain.dataset.files("images") for row in _rows(chain.dataset, file.path)}
    assert len(rows) == len(old) == 10
    moved = {"dicom_shard", "dicom_offset", "dicom_length"}
    for row in rows:
        assert {k: v for k, v in row.items() if k not in moved} == {
            k: v for k, v in old[row["id"]].items() if k not in moved
        }
        file, audited = _dicom(inside, row), _dicom(chain.dataset, old[row["id"]])
        assert file == released(audited, f"scanloom audit {chain.audit.digest[:12]}")
        assert dcmread(io.BytesIO(file)).SOPInstanceUID == row["sop_instance_uid"]


def test_two_releases_of_one_audit_are_equal_but_for_their_key(tmp_path: Path) -> None:
    chain = Chain.made(tmp_path)
    first, second = bundle(chain, "one"), bundle(chain, "two")
    assert first.digest == second.digest
    assert Store(first.uri).read("signature.json") == Store(second.uri).read("signature.json")


def test_a_dataset_without_dicom_leaves_as_it_is(tmp_path: Path) -> None:
    chain = Chain.made(tmp_path, dicom={"enabled": False})
    inside = open_artefact(f"{bundle(chain, 'bundle').uri}/dataset", "dataset")
    assert inside.digest == chain.dataset.digest


def test_a_file_that_claims_a_release_before_it_has_one_is_refused(tmp_path: Path) -> None:
    chain = Chain.made(tmp_path)
    entry = chain.dataset.files("dicom")[0]
    tar = chain.dataset.store.read(entry.path)
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        member = next(iter(opened))
        content = opened.extractfile(member)
        assert content is not None
        file = released(content.read(), "x")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as target:
        member.size = len(file)
        target.addfile(member, io.BytesIO(file))
    images = rewritten(chain.dataset, entry.path, made.getvalue())
    again = audit(str(chain.folder / "again"), images, chain.corpus)
    theirs = Chain(chain.folder, chain.corpus, chain.generator, images, again)
    with pytest.raises(ReleaseRefused, match="says that identity was removed, which only a release may say"):
        bundle(theirs, "bundle")


def _rows(of: Artefact, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(of.store.path(path), filesystem=of.store.filesystem).to_pylist()
    return found


def _dicom(of: Artefact, row: dict[str, Any]) -> bytes:
    return of.store.read_range(row["dicom_shard"], row["dicom_offset"], row["dicom_length"])
