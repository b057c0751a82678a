"""Weights to start from: the folder of a base model, from a disk, a store or a hub, and what it must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scanloom.artefact import MANIFEST, open_artefact
from scanloom.errors import ArtefactError
from scanloom.recipe_denoiser import Family
from scanloom.store import Store

INDEX = "model_index.json"
PIPELINES: Mapping[str, Family] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
}
"""The families of diffusers' pipelines."""
# What a generation does without: diffusers leaves them out where the index says null.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL = (".json", ".txt", ".model")


def fetch_weights(where: str, to: Path) -> Path:
    """The folder of a base model or generator named by a local path, a store URI, or a hub id.

    A plain local folder is used where it is, all else is copied below `to`; of a hub, what is cached is not asked for
    again. Raises ArtefactError that names the missing file, StoreError where the store cannot be read.
    """
    local = Path(where).expanduser()
    if where.startswith(("s3://", "embedded://")) or local.is_dir():
        found = _from_store(where, to)
    elif HUB_ID.fullmatch(where):
        found = from_hub(where)
    else:
        raise ArtefactError(f"{where}: no such folder, and neither a s3:// URI nor a hub id (owner/name)")
    require_complete(found, where)
    return found


def _from_store(where: str, to: Path) -> Path:
    store = Store(where)
    if store.exists(MANIFEST):
        open_artefact(where, "generator").fetch(to)
        return to
    if store.is_local:
        return Path(store.uri)
    wanted = [o.key for o in store.list() if o.key.count("/") <= 1 and is_weight_file(Path(o.key).name)]
    store.fetch(wanted, to)
    return to


def from_hub(name: str) -> Path:
    """The local folder of a hub's repository: its settings and safetensors. ArtefactError where it gives none."""
    from huggingface_hub import snapshot_download  # asks for the network only here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [f"{folder}{kind}" for folder in ("", "*/") for kind in (*(f"*{s}" for s in _SMALL), "*.safetensors")]
    unwanted = ["*.fp16.*", "*.non_ema.*", *(f"{part}/*" for part in UNUSED)]
    try:
        try:
            found = snapshot_download(name, allow_patterns=patterns, ignore_patterns=unwanted, local_files_only=True)
        except LocalEntryNotFoundError:
            found = snapshot_download(name, allow_patterns=patterns, ignore_patterns=unwanted)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(
            f"{name}: not in the local hub cache, and the hub gave no weights: {reason[:160]}"
        ) from error
    return Path(found)


def is_weight_file(name: str) -> bool:
    """Whether a part is read from a file of this name: settings, and one set of weights, not its variants."""
    return Path(name).suffix in _SMALL or (name.endswith(".safetensors") and name.count(".") == 1)


def family_of(folder: Path, where: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Family and `model_index.json` of a base model's folder. Raises ArtefactError where it is of none of ours."""
    where = where or str(folder)
    index = _index(folder, where)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ArtefactError(f"{where}: is a {name}; known: {', '.join(PIPELINES)}")
    return PIPELINES[str(name)], index


def require_complete(folder: Path, where: str) -> None:
    """Raise ArtefactError that names the first file that a pipeline's parts lack."""
    for part in parts(_index(folder, where)):
        for file in _needed(folder, part):
            if not (folder / file).is_file():
                raise ArtefactError(f"{where}: {file} is missing; fetch the weights again or name a complete folder")


def _index(folder: Path, where: str) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{where}: {INDEX} is missing or damaged; expected a folder in diffusers layout") from error
    return index


def parts(index: Mapping[str, Any]) -> list[str]:
    """The parts that a pipeline's index says it has and that a generator keeps."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and value and value[0] is not None and name not in UNUSED
    ]


def _needed(folder: Path, part: str) -> Sequence[str]:
    if part == "scheduler":
        return ("scheduler/scheduler_config.json",)
    if part.startswith("tokenizer"):
        # Which files a tokenizer has depends on its class.
        return () if any((folder / part).glob("*")) else (f"{part}/tokenizer.json",)
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    sharded = folder / part / f"{stem}.safetensors.index.json"
    if not sharded.is_file():
        return (f"{part}/config.json", f"{part}/{stem}.safetensors")
    shards = sorted(set(json.loads(sharded.read_bytes())["weight_map"].values()))
    return (f"{part}/config.json", *(f"{part}/{shard}" for shard in shards))
