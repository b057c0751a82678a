"""The generator artefact: a diffusers-layout folder that loads in a plain process, without Ray. See models.family."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from scanloom.artefact import Artefact, open_artefact
from scanloom.attributes import Attributes, AttributeSchema, Envelope
from scanloom.errors import ArtefactError
from scanloom.models import family
from scanloom.models.attribute_unet import AttributeDenoiser, predict
from scanloom.models.autoencoder import decode
from scanloom.models.card import GeneratorCard as GeneratorCard
from scanloom.models.card import read_card as read_card
from scanloom.models.conditioner import features
from scanloom.models.noise_schedule import NoiseSchedule, PredictionType, read_schedule
from scanloom.models.prompts import prompt
from scanloom.models.text_condition import TextConditioner

KEPT_PROMPTS = 64
"""Their embeddings are kept: a cohort asks for the same ones again, and T5 takes longer than a denoiser's step."""


class Generator:
    """A trained generator on one device: conditions, denoises, decodes. It samples nothing itself: see the engine."""

    def __init__(
        self,
        card: GeneratorCard,
        digest: str,
        denoiser: nn.Module,
        vae: AutoencoderKL,
        schedule: NoiseSchedule,
        text: TextConditioner | None = None,
        device: str = "cpu",
    ) -> None:
        self.card = card
        self.digest = digest
        self.device = torch.device(device)
        self.schedule = schedule
        denoiser = denoiser.eval().requires_grad_(False).to(self.device)
        self._conditioned = (
            _ByAttributes(denoiser, card.attributes, self.device)
            if isinstance(denoiser, AttributeDenoiser)
            else _ByText(denoiser, card, text)
        )
        self._vae = vae.eval().requires_grad_(False).to(self.device)

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
        """What `denoise` is told, float32 [B, ...]; an attribute that is None or absent is unknown."""
        return self._conditioned.condition(attributes)

    def null_condition(self, batch: int) -> Tensor:
        """The condition [B, ...] of "nothing is known", the unconditional half of guidance."""
        return self.condition([{}] * batch)

    @torch.inference_mode()
    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition: Tensor) -> Tensor:
        """The denoiser's prediction [B, C, H, W] float32 (see `schedule.prediction_type`) at integer timesteps."""
        return self._conditioned.denoise(latents_BCHW, timesteps_B, condition).float()

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 1, H, W] float32 in [0, 1]."""
        return decode(self._vae, latents_BCHW)


class _ByAttributes:
    """attribute-unet: a condition is the attributes' tokens [B, A, D]."""

    def __init__(self, denoiser: AttributeDenoiser, schema: AttributeSchema, device: torch.device) -> None:
        self._denoiser = denoiser
        self._schema = schema
        self._device = device

    def condition(self, attributes: Sequence[Attributes]) -> Tensor:
        tokens_BAD: Tensor = self._denoiser.conditioner(
            torch.from_numpy(features(self._schema, attributes)).to(self._device)
        )
        return tokens_BAD

    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition_BAD: Tensor) -> Tensor:
        return predict(self._denoiser.unet, latents_BCHW, timesteps_B, condition_BAD)


class _ByText:
    """The text families: a condition is the prompt's tokens and, behind them, its pooled text, in one row [B, N]."""

    def __init__(self, denoiser: nn.Module, card: GeneratorCard, text: TextConditioner | None) -> None:
        if card.prompt is None or text is None:
            raise ArtefactError(f"{card.name}: a {card.family} generator needs its prompt template and text encoders")
        self._denoiser = denoiser
        self._schema = card.attributes
        self._template = card.prompt
        self._text = text
        self._shapes = {name: value.shape[1:] for name, value in text.encode([""]).items()}
        self._row = lru_cache(KEPT_PROMPTS)(self._encoded)

    def condition(self, attributes: Sequence[Attributes]) -> Tensor:
        return torch.stack([self._row(prompt(self._schema, row, self._template)) for row in attributes])

    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition_BN: Tensor) -> Tensor:
        parts = condition_BN.split([shape.numel() for shape in self._shapes.values()], dim=1)
        told = {name: part.reshape(-1, *self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}
        predicted: Tensor = self._denoiser(latents_BCHW, timesteps_B, told)
        return predicted

    def _encoded(self, text: str) -> Tensor:
        return torch.cat([part.flatten() for part in self._text.encode([text]).values()])


def load_generator(uri: str, device: str = "cpu") -> Generator:
    """The generator artefact at a URI, verified against its manifest's hashes while it is fetched.

    Raises ArtefactError where it is missing, damaged or of an unknown family; StoreError where it cannot be read.
    """
    artefact = open_artefact(uri, "generator")
    with tempfile.TemporaryDirectory(prefix="scanloom-generator-") as scratch:
        folder = Path(scratch)
        artefact.fetch(folder)
        return read_generator(folder, artefact.digest, device, uri)


def require_continuable(
    start: Artefact, card: GeneratorCard, prediction_type: PredictionType, autoencoder: Artefact
) -> None:
    """Raise ArtefactError where training of `card` cannot go on from a generator: other attributes, latents or target.

    Its latents are those of the autoencoder that it was trained with, and of one taken from its own `vae/`.
    """
    theirs = GeneratorCard.model_validate_json(start.store.read("generator.json"))
    scheduler = json.loads(start.store.read("scheduler/scheduler_config.json"))
    latents_of = next((entry.digest for entry in start.manifest.inputs if entry.role == "autoencoder"), "none")
    if _files(start, "vae") == _files(autoencoder, "vae"):
        latents_of = autoencoder.digest
    for what, before, now in (
        ("finetune.denoiser.family", theirs.family, card.family),
        ("finetune.denoiser.condition_dim", theirs.condition_dim, card.condition_dim),
        ("finetune.objective", scheduler.get("prediction_type", "flow"), prediction_type),
        ("list of attributes", ", ".join(theirs.attributes.names), ", ".join(card.attributes.names)),
        ("latent shape", theirs.latent_shape, card.latent_shape),
        ("autoencoder digest", latents_of[:12], autoencoder.digest[:12]),
    ):
        if before != now:
            raise ArtefactError(f"{start.uri}: cannot go on from it: its {what} is {before}, this recipe's is {now}")
    for ours, other in zip(card.attributes.declarations, theirs.attributes.declarations, strict=True):
        if ours != other:
            raise ArtefactError(
                f"{start.uri}: cannot go on from it: attribute {ours.name!r} has another kind, range, source or values"
            )


def _files(artefact: Artefact, folder: str) -> set[tuple[str, str]]:
    return {(file.path, file.sha256) for file in artefact.files(folder)}


def read_latent_shape(autoencoder: Artefact, size_px: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents that this autoencoder artefact makes of square scans of `size_px`."""
    config = json.loads(autoencoder.store.read("vae/config.json"))
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return config["latent_channels"], size_px // factor, size_px // factor


def read_generator(folder: Path, digest: str, device: str = "cpu", where: str | None = None) -> Generator:
    """The generator of a local folder. Raises ArtefactError where a part is missing or does not fit."""
    where = where or str(folder)
    card = read_card(folder, where)
    denoiser = family.read_denoiser(folder, card, where)
    schedule = read_schedule(folder, where)
    text = None if card.family == "attribute-unet" else TextConditioner(folder, device, where)
    try:
        vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise family.unreadable(folder, where, error) from error
    return Generator(card, digest, denoiser, vae, schedule, text, device)
