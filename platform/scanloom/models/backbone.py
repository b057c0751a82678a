"""A given network that maps images to vectors: read from weights alone, never from code that comes with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from scanloom.artefact import plan_digest
from scanloom.errors import ArtefactError
from scanloom.models.base_weights import HUB_ID, from_hub, is_weight_file
from scanloom.store import Store, sha256_of

CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_DEFAULT_PX = 224
_PLAIN = {"image_mean": 0.0, "image_std": 1.0}
_ROWS = 16


class Backbone:
    """A frozen network on one device."""

    def __init__(self, name: str, digest: str, size_px: int, network: Callable[[Tensor], Tensor], device: str) -> None:
        self.name = name
        self.digest = digest
        """SHA-256 over its files."""
        self.size_px = size_px
        """It looks at squares of this side."""
        self._network = network
        self._device = device

    @torch.inference_mode()
    def __call__(self, squares_NSS: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors float32 [N, D] of squares in [0, 1] of any side. ArtefactError where it gives no vectors."""
        parts = []
        for start in range(0, len(squares_NSS), _ROWS):
            images = torch.from_numpy(squares_NSS[start : start + _ROWS]).float()[:, None].to(self._device)
            if images.shape[-1] != self.size_px:
                images = functional.interpolate(images, (self.size_px,) * 2, mode="bilinear", antialias=True)
            parts.append(self._vectors(images))
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def _vectors(self, images_B1SS: Tensor) -> NDArray[np.float32]:
        try:
            told = self._network(images_B1SS)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ArtefactError(
                f"{self.name}: does not take squares of {self.size_px} px ({_line(error)}); see docs/audit.md"
            ) from error
        if not isinstance(told, Tensor) or told.ndim < 2 or len(told) != len(images_B1SS):
            raise ArtefactError(f"{self.name}: gives no vector an image; see docs/audit.md")
        if not torch.isfinite(told).all():
            raise ArtefactError(f"{self.name}: gives vectors that are no numbers; check its weights")
        vectors: NDArray[np.float32] = told.flatten(1).float().cpu().numpy()
        return vectors


def load_backbone(where: str, device: str = "cpu") -> Backbone:
    """The network at a path, a store URI or a hub id.

    A folder in transformers' format: config.json and safetensors, with mean and deviation of preprocessor_config.json
    where there is one; its vector is the pooled output, or the mean over what is left of places. Or a TorchScript file
    (.pt, .ts, .torchscript): a module that takes float32 [N, 1, S, S] in [0, 1] and gives [N, D]; S is its attribute
    `size_px`, 224 without one. ArtefactError where it is neither, StoreError where a store cannot be read.
    """
    name = where.rstrip("/").rpartition("/")[2]
    with tempfile.TemporaryDirectory(prefix="scanloom-backbone-") as scratch:
        found = _fetched(where, Path(scratch))
        files = [found] if found.is_file() else sorted(p for p in found.iterdir() if is_weight_file(p.name))
        digest = plan_digest("backbone", *([file.name, sha256_of(file)] for file in files))
        size_px, network = (_torchscript if found.is_file() else _transformers)(found, where, device)
    return Backbone(name, digest, size_px, network, device)


def _fetched(where: str, to: Path) -> Path:
    local = Path(where).expanduser()
    if local.exists():
        return local
    if where.startswith(("s3://", "embedded://")):
        folder, _, name = where.rstrip("/").rpartition("/")
        if Store(folder).exists(name):
            Store(folder).fetch([name], to)
            return to / name
        store = Store(where)
        store.fetch([found.key for found in store.list() if "/" not in found.key and is_weight_file(found.key)], to)
        return to
    if HUB_ID.fullmatch(where):
        return from_hub(where)
    raise ArtefactError(f"{where}: no such file or folder, and neither a s3:// URI nor a hub id (owner/name)")


def _torchscript(file: Path, where: str, device: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    try:
        network = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise ArtefactError(
            f"{where}: is no TorchScript file ({_line(error)}); expected one, or a folder with {CONFIG}"
        ) from error
    return int(getattr(network, "size_px", _DEFAULT_PX)), network


def _transformers(folder: Path, where: str, device: str) -> tuple[int, Callable[[Tensor], Tensor]]:
    if not (folder / CONFIG).is_file():
        raise ArtefactError(f"{where}: holds no {CONFIG}; expected a folder in transformers' format")
    # Takes seconds to import, which only who was given such a network has to wait for.
    from transformers import AutoModel

    try:
        model: Any
        model, loading = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        told = json.loads((folder / _PREPROCESSOR).read_bytes()) if (folder / _PREPROCESSOR).is_file() else {}
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ArtefactError(f"{where}: transformers reads no network there: {_line(error)}") from error
    # What is missing would be drawn at random. A pooler may be: classifiers have none.
    missing = sorted(loading["missing_keys"])
    if any("pooler" not in key for key in missing):
        raise ArtefactError(f"{where}: its weights lack {missing[0]!r} and {len(missing) - 1} others; fetch them again")
    # Of a network for images and text, the part for images.
    model = getattr(model, "vision_model", model)
    model = model.float().eval().requires_grad_(False).to(device)
    size = _size(getattr(model.config, "image_size", None) or told.get("crop_size") or told.get("size"))
    channels = int(getattr(model.config, "num_channels", 3))
    mean, deviation = (_per_channel(told.get(key), channels, plain) for key, plain in _PLAIN.items())
    pooled = _Pooled(model, not missing, channels, mean, deviation)
    return size, pooled.to(device)


class _Pooled(nn.Module):
    """A model of transformers as a function of grey squares."""

    def __init__(self, model: nn.Module, has_pooler: bool, channels: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.model = model
        self.has_pooler = has_pooler
        self.channels = channels
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, images_B1SS: Tensor) -> Tensor:
        seen = (images_B1SS.expand(-1, self.channels, -1, -1) - self.mean) / self.deviation
        told = self.model(pixel_values=seen)
        pooled = getattr(told, "pooler_output", None) if self.has_pooler else None
        if pooled is None:
            places: Tensor = told.last_hidden_state
            pooled = places.mean(1) if places.ndim == 3 else places.mean((2, 3))
        vector: Tensor = pooled.flatten(1)
        return vector


def _size(told: Any) -> int:
    if isinstance(told, dict):
        told = told.get("height") or told.get("shortest_edge")
    if isinstance(told, (list, tuple)):
        told = told[0]
    return int(told) if told else _DEFAULT_PX


def _per_channel(told: Any, channels: int, plain: float) -> Tensor:
    values = told if isinstance(told, list) else [plain if told is None else float(told)] * channels
    return torch.tensor(values, dtype=torch.float32).reshape(1, channels, 1, 1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
