"""What encoding takes of weights that are given: an autoencoder, or text encoders with their tokenizers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scanloom.artefact import MANIFEST, FileEntry, plan_digest
from scanloom.errors import ArtefactError
from scanloom.models.autoencoder import load_autoencoder
from scanloom.models.base_weights import INDEX, fetch_weights, is_weight_file
from scanloom.store import Store, sha256_of

_TEXT_PARTS = ("text_encoder", "tokenizer")
# Settings outside of these parts that decide what an embedding is: zeros for no text, the width that SD3 pads to.
_TEXT_SETTINGS = (INDEX, "transformer/config.json")


def fetch_text_encoders(where: str, to: Path) -> Path:
    """A local folder with a base model's text encoders and tokenizers; the rest may be there or not.

    Raises what `models.base_weights.fetch_weights` raises.
    """
    if not where.startswith("s3://") or Store(where).exists(MANIFEST):
        return fetch_weights(where, to)
    # A denoiser is many times as large, and nobody here reads it.
    store = Store(where)
    store.fetch([found.key for found in store.list() if _of_text(found.key)], to)
    return to


def fetch_autoencoder(where: str, to: Path) -> Path:
    """The local folder of an autoencoder in diffusers layout: the one given, or the `vae` of a model or an artefact.

    Raises ArtefactError where there is none, StoreError where the store cannot be read.
    """
    if "://" not in where and not Path(where).expanduser().is_dir():
        return fetch_weights(where, to) / "vae"
    store = Store(where)
    for part in ("", "vae"):
        if store.exists(f"{part}/config.json".lstrip("/")):
            store.fetch_folder(part, to)
            return to
    raise ArtefactError(f"{where}: holds no autoencoder (config.json or vae/config.json); check autoencoder.path")


def put_autoencoder(where: str, store: Store) -> dict[str, Any]:
    """Copy a given autoencoder to `vae/` of an artefact; its `files`, and where it was `taken_from`.

    Raises ArtefactError where it is none that takes scans.
    """
    with tempfile.TemporaryDirectory(prefix="scanloom-autoencoder-") as scratch:
        folder = fetch_autoencoder(where, Path(scratch))
        load_autoencoder(folder, where)
        files = [FileEntry.of(file).model_dump() for file in store.put_folder(folder, "vae")]
    return {"taken_from": where, "files": files}


def text_digest(where: str) -> str:
    """SHA-256 over all of a base model that turns a prompt into an embedding."""
    with tempfile.TemporaryDirectory(prefix="scanloom-weights-") as scratch:
        folder = fetch_text_encoders(where, Path(scratch))
        return _digest(folder, (name for name in _names(folder) if _of_text(name)))


def autoencoder_digest(where: str) -> str:
    """SHA-256 over the autoencoder that `fetch_autoencoder` fetches."""
    with tempfile.TemporaryDirectory(prefix="scanloom-weights-") as scratch:
        folder = fetch_autoencoder(where, Path(scratch))
        return _digest(folder, _names(folder))


def _of_text(name: str) -> bool:
    return name in _TEXT_SETTINGS or (name.startswith(_TEXT_PARTS) and is_weight_file(Path(name).name))


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _digest(folder: Path, names: Iterable[str]) -> str:
    return plan_digest(*([name, sha256_of(folder / name)] for name in names))
