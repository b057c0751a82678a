"""The generator artefact: a diffusers-layout folder that loads in a plain process, without Ray.

    model_index.json  unet/  vae/  scheduler/  conditioner/  generator.json

`generator.json` holds what diffusers has no place for: attribute schema, trained envelope, family, image geometry.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scanloom.artefact import Artefact, open_artefact
from scanloom.attributes import Attributes, AttributeSchema, Envelope
from scanloom.errors import ArtefactError
from scanloom.models.attribute_unet import AttributeDenoiser, predict
from scanloom.models.autoencoder import decode
from scanloom.models.conditioner import AttributeConditioner, features
from scanloom.models.noise_schedule import TRAIN_TIMESTEPS as TRAIN_TIMESTEPS
from scanloom.models.noise_schedule import PredictionType, noise_schedule, write_schedule


class GeneratorCard(BaseModel):
    """Content of `generator.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    family: Literal["attribute-unet"]
    name: str
    attributes: AttributeSchema
    envelope: Envelope
    condition_dim: int
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    """(1, height, width)."""
    spacing_mm: float | None
    """Median pixel spacing of the corpus after resizing."""
    trained_steps: int


def alphas_cumprod(prediction_type: PredictionType) -> Tensor:
    """float64 [TRAIN_TIMESTEPS], decreasing: the share of signal variance at each timestep."""
    return noise_schedule(prediction_type).alphas_T.square()


class Generator:
    """A trained generator on one device: conditions, denoises, decodes. It samples nothing itself: see the engine."""

    def __init__(
        self,
        card: GeneratorCard,
        digest: str,
        unet: UNet2DConditionModel,
        conditioner: AttributeConditioner,
        vae: AutoencoderKL,
        scheduler: DDIMScheduler,
        device: str = "cpu",
    ) -> None:
        self.card = card
        self.digest = digest
        self.device = torch.device(device)
        self._unet = unet.eval().requires_grad_(False).to(self.device)
        self._conditioner = conditioner.eval().requires_grad_(False).to(self.device)
        self._vae = vae.eval().requires_grad_(False).to(self.device)
        self.prediction_type: PredictionType = scheduler.config.prediction_type
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod.double()
        """float64 [T], decreasing; the index is the timestep."""

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def schema(self) -> AttributeSchema:
        return self.card.attributes

    @property
    def envelope(self) -> Envelope:
        return self.card.envelope

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.card.latent_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.card.image_shape

    @torch.inference_mode()
    def condition(self, attributes: Sequence[Attributes]) -> Tensor:
        """Condition tokens [B, A, D] float32; an attribute that is None or absent gets its unknown token."""
        table = torch.from_numpy(features(self.schema, attributes)).to(self.device)
        tokens: Tensor = self._conditioner(table)
        return tokens

    def null_condition(self, batch: int) -> Tensor:
        """Tokens [B, A, D] of "nothing is known", the unconditional half of guidance."""
        return self.condition([{}] * batch)

    @torch.inference_mode()
    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition_BAD: Tensor) -> Tensor:
        """The denoiser's prediction [B, C, H, W] float32 (see `prediction_type`) at integer timesteps."""
        return predict(self._unet, latents_BCHW, timesteps_B, condition_BAD).float()

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 1, H, W] float32 in [0, 1]."""
        return decode(self._vae, latents_BCHW)


def save_generator(
    folder: Path, card: GeneratorCard, denoiser: AttributeDenoiser, vae: AutoencoderKL, prediction_type: PredictionType
) -> None:
    """Write the folder of a generator; weights as float32 safetensors."""
    for part in (denoiser.unet, vae):
        # diffusers notes the folder that a part was loaded from: a scratch folder, another one at every run.
        part.register_to_config(_name_or_path=card.name)
    denoiser.unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    write_schedule(noise_schedule(prediction_type), folder)
    (folder / "conditioner").mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in denoiser.conditioner.state_dict().items()}
    save_file(weights, folder / "conditioner" / "conditioner.safetensors")
    index = {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "generator.json").write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_generator(uri: str, device: str = "cpu") -> Generator:
    """The generator artefact at a URI, verified against its manifest's hashes while it is fetched.

    Raises ArtefactError where it is missing, damaged or of an unknown family; StoreError where it cannot be read.
    """
    artefact = open_artefact(uri, "generator")
    with tempfile.TemporaryDirectory(prefix="scanloom-generator-") as scratch:
        folder = Path(scratch)
        artefact.fetch(folder)
        return read_generator(folder, artefact.digest, device, uri)


def load_denoiser(uri: str, schema: AttributeSchema, latent_shape: tuple[int, int, int]) -> AttributeDenoiser:
    """The trainable denoiser of a generator artefact, to go on training from.

    Raises ArtefactError where its attributes or latents are not those of the corpus, or a part cannot be read.
    """
    artefact = open_artefact(uri, "generator")
    with tempfile.TemporaryDirectory(prefix="scanloom-generator-") as scratch:
        folder = Path(scratch)
        artefact.fetch(folder)
        card = read_card(folder, uri)
        if card.attributes != schema or card.latent_shape != latent_shape:
            raise ArtefactError(
                f"{uri}: trained on attributes {', '.join(card.attributes.names)} and latents {card.latent_shape}; "
                f"this corpus has {', '.join(schema.names)} and {latent_shape}, or other values of them"
            )
        return AttributeDenoiser(*_read_denoiser(folder, card, uri)).train()


def require_continuable(start: Artefact, condition_dim: int, prediction_type: str, autoencoder_digest: str) -> None:
    """Raise ArtefactError where training cannot go on from a generator: other latents, target or condition width."""
    card = GeneratorCard.model_validate_json(start.store.read("generator.json"))
    scheduler = json.loads(start.store.read("scheduler/scheduler_config.json"))
    latents_of = next((entry.digest for entry in start.manifest.inputs if entry.role == "autoencoder"), "none")
    for what, theirs, ours in (
        ("finetune.denoiser.condition_dim", card.condition_dim, condition_dim),
        ("finetune.objective", scheduler["prediction_type"], prediction_type),
        ("autoencoder digest", latents_of[:12], autoencoder_digest[:12]),
    ):
        if theirs != ours:
            raise ArtefactError(f"{start.uri}: cannot go on from it: its {what} is {theirs}, this recipe's is {ours}")


def read_latent_shape(autoencoder: Artefact, size_px: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents that this autoencoder artefact makes of square scans of `size_px`."""
    config = json.loads(autoencoder.store.read("vae/config.json"))
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return config["latent_channels"], size_px // factor, size_px // factor


def read_card(folder: Path, where: str | None = None) -> GeneratorCard:
    """The card of a generator folder. Raises ArtefactError where it is missing or of another family or format.

    `where` names the generator in errors, where the folder is a copy.
    """
    where = where or str(folder)
    try:
        return GeneratorCard.model_validate_json((folder / "generator.json").read_bytes())
    except OSError as error:
        raise ArtefactError(f"{where}: holds no generator.json; not a generator of scanloom") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ArtefactError(f"{where}/generator.json: {place}: {fault['msg']} (got {fault['input']!r})") from error


def read_generator(folder: Path, digest: str, device: str = "cpu", where: str | None = None) -> Generator:
    """The generator of a local folder. Raises ArtefactError where a part is missing or does not fit."""
    where = where or str(folder)
    card = read_card(folder, where)
    unet, conditioner = _read_denoiser(folder, card, where)
    try:
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(folder, where, error) from error
    return Generator(card, digest, unet, conditioner, vae, scheduler, device)


def _read_denoiser(folder: Path, card: GeneratorCard, where: str) -> tuple[UNet2DConditionModel, AttributeConditioner]:
    try:
        conditioner = AttributeConditioner(card.attributes, card.condition_dim)
        conditioner.load_state_dict(load_file(folder / "conditioner" / "conditioner.safetensors"))
        return UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True), conditioner
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(folder, where, error) from error


def _unreadable(folder: Path, where: str, error: Exception) -> ArtefactError:
    text = " ".join(str(error).split()).replace(str(folder), where)
    return ArtefactError(f"{where}: a part of the generator cannot be read: {text[:200]}")
