"""From an audited dataset to a signed bundle, or a refusal that names gate, value and limit. torch-free.

The bundle holds the dataset as it is, the audit without what shows training scans, the policy and its gates, a card,
the terms of what it was made from, checksums and a signature (`audit.bundle`).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from scanloom.artefact import MANIFEST, Artefact, FileEntry, Lineage, find_artefact, open_artefact, publish, verify
from scanloom.audit.bundle import SIGNATURE, Signer, fingerprint, seal
from scanloom.audit.cards import dataset_card, terms_page
from scanloom.audit.policy import Gate, Policy, gates, licence_gates
from scanloom.audit.report import PRIVATE, REPORT, Report, read_report
from scanloom.dicom.checks import violations
from scanloom.errors import ArtefactError, ReleaseRefused, ScanloomError
from scanloom.sampling.dataset import DICOM
from scanloom.shards.reader import read_file
from scanloom.store import Store, sha256_of

STATEMENT, POLICY, TERMS, CARD = "release.json", "policy.yaml", "TERMS.md", "README.md"
DATASET, AUDIT = "dataset", "audit"
_TRANSFERS = 8
Advance = Callable[[], object]


@dataclass(frozen=True)
class Request:
    """What is to be released, under which policy, and where to."""

    dataset: Artefact
    audit_uri: str
    policy: Policy
    policy_text: bytes
    target: Store
    """An empty folder or prefix, or one that this very release was begun in."""


def release(request: Request, signer: Signer, examined: Advance = lambda: None) -> Artefact:
    """Check a dataset and write its bundle; the release artefact. `examined` is called after each file.

    Raises ReleaseRefused, all failed gates in one line, and ArtefactError where the target holds something else.
    """
    audit, report = _audited(request)
    sources = _sources(request.dataset, audit)
    require_whole(request.dataset, examined)
    require_marked(request.dataset)
    told = [*gates(request.policy, report), *licence_gates(request.policy, sources)]
    if failed := [gate for gate in told if not gate.passed]:
        raise ReleaseRefused(f"{request.dataset.uri}: {'; '.join(str(gate) for gate in failed)}")
    return _bundle(request, audit, report, told, sources, signer)


def require_whole(dataset: Artefact, examined: Advance = lambda: None) -> None:
    """Raise ReleaseRefused where a file of the dataset is missing or not what its manifest says."""
    for problem in verify(dataset, examined):
        if problem.fault != "extra":
            raise ReleaseRefused(
                f"{dataset.store.uri_of(problem.path)}: checksum: {problem.fault} ({problem.detail}), the limit is none"
            )


def require_marked(dataset: Artefact) -> None:
    """Raise ReleaseRefused where a DICOM file does not say that it is synthetic, or breaks another rule of ours."""
    for entry in dataset.files(DICOM):
        if not entry.path.endswith(".tar"):
            continue
        with tarfile.open(fileobj=io.BytesIO(read_file(dataset.store, entry))) as tar:
            for member in tar:
                opened = tar.extractfile(member)
                if opened is not None and (broken := _broken(opened.read())):
                    where = f"{dataset.store.uri_of(entry.path)}: {member.name}"
                    raise ReleaseRefused(f"{where}: synthetic marker: {broken}, the limit is none")


def _broken(file: bytes) -> str:
    try:
        found = violations(dcmread(io.BytesIO(file)))
    except InvalidDicomError:
        return "is no DICOM file"
    return "; ".join(str(violation) for violation in found)


def _audited(request: Request) -> tuple[Artefact, Report]:
    """The audit of the very dataset and corpus."""
    dataset, uri = request.dataset, request.audit_uri
    audit = find_artefact(uri, "audit")
    if audit is None:
        raise ReleaseRefused(f"{dataset.uri}: audit: there is none at {uri}, the limit is one; run `scanloom audit`")
    for problem in verify(audit):
        if problem.fault != "extra":
            raise ReleaseRefused(
                f"{audit.store.uri_of(problem.path)}: audit: {problem.fault} since it was made ({problem.detail}), "
                "the limit is unchanged; make the audit again"
            )
    inputs = {entry.role: entry.digest for entry in audit.manifest.inputs}
    report = read_report(audit.store.read(REPORT), audit.store.uri_of(REPORT))
    for name, found in (("manifest", inputs.get("dataset", "")), ("report", report.subject.dataset)):
        if found != dataset.digest:
            raise ReleaseRefused(
                f"{dataset.uri}: audit of another dataset: its {name} says {found[:12] or 'none'}, the limit is "
                f"{dataset.digest[:12]}"
            )
    if inputs.get("corpus") != report.subject.corpus:
        raise ReleaseRefused(f"{audit.uri}: audit: its report names another corpus than its manifest; make it again")
    return audit, report


def _sources(dataset: Artefact, audit: Artefact) -> list[tuple[str, ...]]:
    """What the dataset was made from, each by its names: corpora and given weights, found by following the lineage.

    Raises ReleaseRefused where that cannot be followed, or the audit is of a corpus that it does not lead to.
    """
    found: dict[str, tuple[str, ...]] = {}
    for artefact in _ancestors(dataset):
        manifest = artefact.manifest
        if manifest.kind == "corpus":
            found[artefact.digest] = (manifest.name, artefact.digest, artefact.uri)
        for place in _given_weights(manifest.kind, manifest.recipe):
            found[place] = (place,)
    corpus = next(entry.digest for entry in audit.manifest.inputs if entry.role == "corpus")
    corpora = [names[1] for names in found.values() if len(names) > 1]
    if corpus not in corpora:
        raise ReleaseRefused(
            f"{dataset.uri}: audit of another corpus: {corpus[:12]}, the limit is what the generator learned from: "
            f"{', '.join(digest[:12] for digest in corpora) or 'none'}"
        )
    return sorted(found.values())


def _ancestors(artefact: Artefact) -> Iterator[Artefact]:
    seen: set[str] = set()
    waiting = [(artefact, entry) for entry in artefact.manifest.inputs]
    while waiting:
        child, entry = waiting.pop()
        if entry.digest in seen:
            continue
        seen.add(entry.digest)
        parent = _opened(child, entry)
        yield parent
        waiting += [(parent, one) for one in parent.manifest.inputs]


def _opened(child: Artefact, entry: Lineage) -> Artefact:
    try:
        parent = open_artefact(entry.uri)
    except ScanloomError as error:
        raise ReleaseRefused(
            f"{child.uri}: lineage: its {entry.role} cannot be looked at ({error}), the limit is all; restore it"
        ) from error
    if parent.digest != entry.digest:
        raise ReleaseRefused(
            f"{child.uri}: lineage: its {entry.role} at {entry.uri} is {parent.digest[:12]} by now, the limit is "
            f"{entry.digest[:12]}"
        )
    return parent


def _given_weights(kind: str, recipe: dict[str, Any]) -> Iterator[str]:
    """Places of weights that a recipe took from elsewhere."""
    autoencoder, finetune = recipe.get("autoencoder") or {}, recipe.get("finetune") or {}
    if kind == "autoencoder":
        yield from filter(None, (autoencoder.get("path"), autoencoder.get("start_from")))
    if kind == "generator":
        yield from filter(None, ((finetune.get("denoiser") or {}).get("weights"), finetune.get("start_from")))


# --- the bundle -----------------------------------------------------------------------------------------------


def _bundle(
    request: Request, audit: Artefact, report: Report, told: list[Gate], sources: list[tuple[str, ...]], signer: Signer
) -> Artefact:
    target = request.target
    target.require_writable()
    if target.exists(SIGNATURE):
        raise ArtefactError(f"{target.uri}: holds a bundle already; choose another folder or delete that one")
    kept = [file for file in audit.manifest.files if not file.path.startswith(f"{PRIVATE}/")]
    copied = [
        *_copied(request.dataset.store, request.dataset.manifest.files, target, DATASET),
        *_copied(audit.store, kept, target, AUDIT),
    ]
    dataset = {"name": request.dataset.manifest.name, "digest": request.dataset.digest}
    statement = {
        "dataset": dataset | {"images": report.subject.images},
        "audit": audit.digest, "policy": hashlib.sha256(request.policy_text).hexdigest(),
        "target": request.policy.target, "gates": [asdict(gate) for gate in told],
        "made_from": [list(names) for names in sources], "signed_by": fingerprint(signer.public_key),
    }  # fmt: skip
    pages = {
        f"{DATASET}/{MANIFEST}": request.dataset.store.read(MANIFEST),
        f"{AUDIT}/{MANIFEST}": audit.store.read(MANIFEST),
        POLICY: request.policy_text,
        STATEMENT: json.dumps(statement, indent=1, sort_keys=True).encode(),
        TERMS: terms_page(request.policy, sources).encode(),
        CARD: dataset_card(request.dataset, report, request.policy).encode(),
    }
    for path, data in pages.items():
        target.write(path, data)
        copied.append(FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))
    made = publish(
        target, kind="release", name=request.dataset.manifest.name,
        recipe={"policy": request.policy.model_dump(mode="json")}, inputs=[request.dataset, audit], files=copied,
        statistics={"images": report.subject.images, "signed_by": fingerprint(signer.public_key)},
    )  # fmt: skip
    manifest = target.read(MANIFEST)
    last = FileEntry(path=MANIFEST, bytes=len(manifest), sha256=hashlib.sha256(manifest).hexdigest())
    seal(target, [*copied, last], signer)
    return made


def _copied(source: Store, files: Iterable[FileEntry], target: Store, folder: str) -> list[FileEntry]:
    """The files in their new place, never whole in memory. ReleaseRefused where one changed meanwhile."""

    def copy(file: FileEntry) -> FileEntry:
        with tempfile.TemporaryDirectory(prefix="scanloom-release-") as scratch:
            source.fetch([file.path], Path(scratch))
            local = Path(scratch) / file.path
            if sha256_of(local) != file.sha256:
                raise ReleaseRefused(f"{source.uri_of(file.path)}: checksum: changed while it was copied; try again")
            target.put(f"{folder}/{file.path}", local)
        return FileEntry(path=f"{folder}/{file.path}", bytes=file.bytes, sha256=file.sha256)

    with ThreadPoolExecutor(_TRANSFERS) as pool:
        return list(pool.map(copy, files))
