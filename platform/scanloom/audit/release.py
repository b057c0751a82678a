"""From an audited dataset to a signed bundle, or a refusal that names gate, value and limit. torch-free.

The bundle holds the dataset with its DICOM files marked as released (`audit.marking`), the audit without what shows
training scans, the policy and its gates, cards, the terms of what it was made from, checksums and a signature
(`audit.bundle`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scanloom.artefact import (
    MANIFEST,
    Artefact,
    FileEntry,
    Lineage,
    Manifest,
    find_artefact,
    lineage,
    open_artefact,
    publish,
    verify,
)
from scanloom.audit.bundle import SIGNATURE, SUMS, Signer, fingerprint, seal
from scanloom.audit.cards import dataset_card, model_card, terms_page
from scanloom.audit.croissant import croissant
from scanloom.audit.marking import Spread, copy_file, examine_file, in_threads, jobs, mark_shard, marked_files
from scanloom.audit.policy import Gate, Policy, gates, licence_gates
from scanloom.audit.report import PRIVATE, REPORT, Report, read_report
from scanloom.errors import ArtefactError, ReleaseRefused, ScanloomError
from scanloom.sampling.gate import corpora_of
from scanloom.store import Store

STATEMENT, POLICY, TERMS = "release.json", "policy.yaml", "TERMS.md"
CARD, MODEL_CARD, CROISSANT = "README.md", "GENERATOR.md", "croissant.json"
DATASET, AUDIT = "dataset", "audit"
ORIGINAL = "original"
"""Role of the audited dataset among the inputs of the released one."""
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
    spread: Spread = field(default=in_threads)
    """Where files are examined, copied and marked."""


def release(request: Request, signer: Signer, examined: Advance = lambda: None) -> Artefact:
    """Check a dataset and write its bundle; the release artefact. `examined` is called after each file.

    Raises ReleaseRefused, all failed gates in one line, and ArtefactError where the target holds something else.
    """
    audit, report = _audited(request)
    sources = _sources(request.dataset, audit)
    require_fit(request.dataset, request.spread, examined)
    told = [*gates(request.policy, report), *licence_gates(request.policy, sources)]
    if failed := [gate for gate in told if not gate.passed]:
        raise ReleaseRefused(f"{request.dataset.uri}: {'; '.join(str(gate) for gate in failed)}")
    return _bundle(request, audit, report, told, sources, signer)


def require_fit(dataset: Artefact, spread: Spread = in_threads, examined: Advance = lambda: None) -> None:
    """Raise ReleaseRefused where a file is missing or changed, or a DICOM file does not say that it is synthetic."""
    refused = []
    for reason in spread(examine_file, jobs(dataset.store, dataset.manifest.files)):
        examined()
        refused += [reason] if reason else []
    if refused:
        # The first by name, so that the same dataset is refused with the same words.
        raise ReleaseRefused(min(refused))


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
    generators = {entry.digest for entry in dataset.manifest.inputs if entry.role == "generator"}
    if report.membership is not None and report.membership.generator not in generators:
        raise ReleaseRefused(
            f"{audit.uri}: audit: attacked the generator {report.membership.generator[:12]}, the limit is the "
            "dataset's own; make the audit again"
        )
    if inputs.get("corpus") != report.subject.corpus:
        raise ReleaseRefused(f"{audit.uri}: audit: its report names another corpus than its manifest; make it again")
    _require_other_eyes(dataset, audit)
    return audit, report


def _require_other_eyes(dataset: Artefact, audit: Artefact) -> None:
    """Raise ReleaseRefused where the audit looked with the encoder of the gate that the images passed already."""
    theirs = {
        file.sha256
        for entry in dataset.manifest.inputs
        if entry.role == "gate"
        for file in _opened(dataset, entry).manifest.files
    }
    if shared := next((file for file in audit.files("copies") if file.sha256 in theirs), None):
        raise ReleaseRefused(
            f"{audit.store.uri_of(shared.path)}: audit: looked with the encoder of the dataset's gate, the limit is "
            "another; set another seed and make the audit again"
        )


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
    corpora = _learned_from(dataset)
    if corpora != {corpus}:
        raise ReleaseRefused(
            f"{dataset.uri}: audit of another corpus: {corpus[:12]}, the limit is all that the generator learned from: "
            f"{', '.join(digest[:12] for digest in sorted(corpora)) or 'none'}"
        )
    for digest in corpora:
        # One that a generator was continued from has no other name here.
        found.setdefault(digest, (digest,))
    return sorted(found.values())


def _learned_from(dataset: Artefact) -> set[str]:
    """Digests of the corpora behind the generator; probe and gate may have others, which is no matter of copies."""
    generators = [_opened(dataset, entry) for entry in dataset.manifest.inputs if entry.role == "generator"]
    try:
        return {digest for generator in generators for digest in corpora_of(generator)}
    except ArtefactError as error:
        raise ReleaseRefused(f"{dataset.uri}: lineage: {error}, the limit is all; restore it") from error


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
    copied, released = _files(request, audit)
    statement = {
        "dataset": {"name": released.manifest.name, "digest": released.digest, "images": report.subject.images},
        "original": request.dataset.digest,
        "audit": audit.digest, "policy": hashlib.sha256(request.policy_text).hexdigest(),
        "target": request.policy.target, "gates": [asdict(gate) for gate in told],
        "made_from": [list(names[:2]) for names in sources], "signed_by": fingerprint(signer.public_key),
    }  # fmt: skip
    pages = {
        f"{DATASET}/{MANIFEST}": _abroad(released.manifest),
        f"{AUDIT}/{MANIFEST}": _abroad(audit.manifest),
        POLICY: request.policy_text,
        STATEMENT: json.dumps(statement, indent=1, sort_keys=True).encode(),
        TERMS: terms_page(request.policy, sources).encode(),
        CARD: dataset_card(released, report, request.policy).encode(),
        CROISSANT: croissant(released, report, request.policy),
        **_model_cards(request, report),
    }
    for path, data in pages.items():
        target.write(path, data)
        copied.append(FileEntry.of_bytes(path, data))
    _require_nothing_else(target, copied)
    made = publish(
        target, kind="release", name=request.dataset.manifest.name,
        recipe={"policy": request.policy.model_dump(mode="json")},
        inputs=[_placeless(lineage(one.manifest.kind, one)) for one in (request.dataset, audit)], files=copied,
        statistics={"images": report.subject.images, "signed_by": fingerprint(signer.public_key)},
    )  # fmt: skip
    seal(target, [*copied, FileEntry.of_bytes(MANIFEST, target.read(MANIFEST))], signer)
    return made


def _model_cards(request: Request, report: Report) -> dict[str, bytes]:
    generator = next((one for one in _ancestors(request.dataset) if one.manifest.kind == "generator"), None)
    if generator is None:
        return {}
    corpora = [one for one in _ancestors(generator) if one.manifest.kind == "corpus"]
    return {MODEL_CARD: model_card(generator, corpora, report, request.policy).encode()}


def _files(request: Request, audit: Artefact) -> tuple[list[FileEntry], Artefact]:
    """The files of dataset and audit in their new places, and the dataset as it is there."""
    dataset, target = request.dataset, request.target
    named = f"scanloom audit {audit.digest[:12]}"
    marked, plain = marked_files(dataset)
    kept = [file for file in audit.manifest.files if not file.path.startswith(f"{PRIVATE}/")]
    written: list[dict[str, Any]] = []
    for entries in request.spread(mark_shard, jobs(dataset.store, marked, target, DATASET, named)):
        written += entries
    for entries in request.spread(copy_file, jobs(dataset.store, plain, target, DATASET)):
        written += entries
    inside = [FileEntry.model_validate(entry) for entry in written]
    for entries in request.spread(copy_file, jobs(audit.store, kept, target, AUDIT)):
        written += entries
    changed = len(plain) < len(dataset.manifest.files)
    return [FileEntry.model_validate(entry) for entry in written], _released(dataset, target, inside, changed)


def _released(dataset: Artefact, target: Store, inside: Sequence[FileEntry], changed: bool) -> Artefact:
    """The dataset as the bundle holds it: the audited one itself, or its marked copy, which has that as an input."""
    if not changed:
        return Artefact(target.at(DATASET), dataset.manifest)
    files = [file.model_copy(update={"path": file.path.removeprefix(f"{DATASET}/")}) for file in inside]
    told = {
        "files": tuple(sorted(files, key=lambda file: file.path)),
        "inputs": (*dataset.manifest.inputs, lineage(ORIGINAL, dataset)),
    }
    return Artefact(target.at(DATASET), dataset.manifest.model_copy(update=told))


def _require_nothing_else(target: Store, files: Sequence[FileEntry]) -> None:
    """Raise ArtefactError where the target holds what this release did not write: it would leave with it."""
    known = {file.path for file in files} | {MANIFEST, SUMS}
    if other := next((found.key for found in target.list() if found.key not in known), None):
        raise ArtefactError(f"{target.uri_of(other)}: is none of this release's files; release into an empty place")


def _abroad(manifest: Manifest) -> bytes:
    """The manifest for receivers: without the places of this site's stores. Its digest is the same."""
    told = {
        "recipe": _without_places(manifest.recipe), "statistics": _without_places(manifest.statistics),
        "inputs": tuple(map(_placeless, manifest.inputs)),
    }  # fmt: skip
    return manifest.model_copy(update=told).model_dump_json(indent=1).encode()


def _placeless(entry: Lineage) -> Lineage:
    return entry.model_copy(update={"uri": f"sha256:{entry.digest}"})


def _without_places(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_places(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_places(value) for value in tree]
    is_place = isinstance(tree, str) and ("://" in tree or tree.startswith(("/", "./", "~")))
    return "withheld" if is_place else tree
