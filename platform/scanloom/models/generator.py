"""The generator artefact: a diffusers-layout folder that loads in a plain process, without Ray. See models.family."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from scanloom.artefact import Artefact, open_artefact
from scanloom.attributes import Attributes, AttributeSchema, Envelope
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models import family
from scanloom.models.attribute_unet import AttributeDenoiser, predict
from scanloom.models.autoencoder import decode, moments, normalise
from scanloom.models.card import GeneratorCard as GeneratorCard
from scanloom.models.card import read_card as read_card
from scanloom.models.conditioner import features
from scanloom.models.noise_schedule import NoiseSchedule, PredictionType, read_schedule
from scanloom.models.prompts import prompt
from scanloom.models.text_condition import TextConditioner
from scanloom.models.text_denoisers import TextDenoiser

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_PROMPTS = 64
"""Their embeddings are kept: a cohort asks for the same ones again, and T5 takes longer than a denoiser's step."""


class Generator:
    """A trained generator on one device: it conditions, denoises, encodes and decodes. To sample, see the engine.

    `precision` is that of denoiser and decoder, whose answers are float32 all the same. `compiled` compiles the
    denoiser at the first call of each batch shape; on a GPU it is replayed as a CUDA graph from then on.
    """

    def __init__(
        self,
        card: GeneratorCard,
        digest: str,
        denoiser: nn.Module,
        vae: AutoencoderKL,
        schedule: NoiseSchedule,
        text: TextConditioner | None = None,
        device: str = "cpu",
        *,
        precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        self.card = card
        self.digest = digest
        self.device = torch.device(device)
        self.schedule = schedule
        self._compiled = compiled
        self._dtype = DTYPES[precision]
        denoiser = denoiser.eval().requires_grad_(False).to(self.device)
        self._network = _network(denoiser)
        # Not the network's own `to`, which warns of float32 modules even where there are none.
        nn.Module.to(self._network, self._dtype)
        if self.device.type == "cuda":
            _channels_last(self._network)
        if compiled:
            # Not max-autotune: it picks kernels by timing, so that two workers would differ in their last bits.
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._network.compile(dynamic=False, mode=mode)
        self._conditioned = (
            _ByAttributes(denoiser, card.attributes, self.device)
            if isinstance(denoiser, AttributeDenoiser)
            else _ByText(denoiser, card, text)
        )
        self._vae = vae.eval().requires_grad_(False).to(self.device)
        # The decoder of SDXL overflows fp16, and says so; its pipeline decodes in float32 then.
        upcast = precision == "fp16" and card.family == "sdxl" and vae.config.force_upcast
        nn.Module.to(self._vae, torch.float32 if upcast else self._dtype)
        # The layout that its convolutions are fastest in, on CPUs too, where those of small denoisers are not.
        _channels_last(self._vae)

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

    def latent_shape_of(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images of a size. Raises RecipeError where the generator cannot make them."""
        factor = self.card.factor
        shape = (self.latent_shape[0], height_px // factor, width_px // factor)
        if height_px % factor or width_px % factor:
            raise RecipeError(f"{self.name}: makes images of sides that are multiples of {factor} px; set such a size")
        self.require_shape(shape)
        return shape

    def require_shape(self, latent_shape: Sequence[int]) -> None:
        """Raise RecipeError where the denoiser cannot take latents [C, H, W] of a shape."""
        step, most = _sides(self._network)
        channels, sides = latent_shape[0], latent_shape[1:]
        fits = len(sides) == 2 and all(
            side > 0 and side % step == 0 and (most is None or side <= most) for side in sides
        )
        if channels != self.latent_shape[0] or not fits:
            raise RecipeError(
                f"{self.name}: cannot make latents of {'x'.join(map(str, latent_shape))}; they have "
                f"{self.latent_shape[0]} channels and sides that are multiples of {step}"
                + ("" if most is None else f", {most} at most")
            )

    @torch.inference_mode()
    def denoise(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition: Tensor) -> Tensor:
        """The denoiser's prediction [B, C, H, W] float32 (see `schedule.prediction_type`) at integer timesteps."""
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        latents_BCHW = latents_BCHW.to(self._dtype)
        if self.device.type == "cuda":
            latents_BCHW = latents_BCHW.contiguous(memory_format=torch.channels_last)
        predicted = self._conditioned.denoise(latents_BCHW, timesteps_B, condition)
        # A CUDA graph answers in the same memory at every call.
        return predicted.to(torch.float32, memory_format=torch.contiguous_format, copy=self._compiled)

    @torch.inference_mode()
    def encode(self, pixels_B1HW: Tensor) -> Tensor:
        """The latents [B, C, h, w] float32, as `denoise` sees them, that pixels in [-1, 1] are most likely to have."""
        mean_BCHW, _ = moments(self._vae, pixels_B1HW.to(self.device, self._vae.dtype))
        return normalise(self._vae, mean_BCHW)

    @torch.inference_mode()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 1, H, W] float32 in [0, 1]."""
        return decode(self._vae, latents_BCHW.contiguous(memory_format=torch.channels_last))


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


def _channels_last(network: nn.Module) -> None:
    """Lay out its convolutions' weights with the channels innermost."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _network(denoiser: nn.Module) -> UNet2DConditionModel | SD3Transformer2DModel:
    """Diffusers' part of a denoiser: all that takes time."""
    if isinstance(denoiser, AttributeDenoiser):
        return denoiser.unet
    if isinstance(denoiser, TextDenoiser):
        return denoiser.network
    raise ArtefactError(f"a denoiser of no known family: {type(denoiser).__name__}")


def _sides(network: UNet2DConditionModel | SD3Transformer2DModel) -> tuple[int, int | None]:
    """What the sides of latents are multiples of, and the longest."""
    config = network.config
    if isinstance(network, SD3Transformer2DModel):
        return config.patch_size, config.patch_size * config.pos_embed_max_size
    return 2 ** (len(config.block_out_channels) - 1), None


def load_generator(
    uri: str, device: str = "cpu", *, precision: Precision = "fp32", compiled: bool = False
) -> Generator:
    """The generator artefact at a URI, verified against its manifest's hashes while it is fetched.

    Raises ArtefactError where it is missing, damaged or of an unknown family; StoreError where it cannot be read.
    """
    artefact = open_artefact(uri, "generator")
    with tempfile.TemporaryDirectory(prefix="scanloom-generator-") as scratch:
        folder = Path(scratch)
        artefact.fetch(folder)
        return read_generator(folder, artefact.digest, device, uri, precision=precision, compiled=compiled)


def require_continuable(
    start: Artefact, card: GeneratorCard, prediction_type: PredictionType, autoencoder: Artefact
) -> None:
    """Raise ArtefactError where training of `card` cannot go on from a generator: other attributes, latents or target.

    Its latents are those of the autoencoder that it was trained with, and of one taken from its own `vae/`.
    """
    theirs = GeneratorCard.model_validate_json(start.store.read("generator.json"))
    scheduler = json.loads(start.store.read("scheduler/scheduler_config.json"))
    trained_with = start.manifest.used_as("autoencoder")
    latents_of = trained_with.digest if trained_with else "none"
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


def read_generator(
    folder: Path,
    digest: str,
    device: str = "cpu",
    where: str | None = None,
    *,
    precision: Precision = "fp32",
    compiled: bool = False,
) -> Generator:
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
    return Generator(
        card, digest, denoiser, vae, schedule, text, device, precision=precision, compiled=compiled
    )  # fmt: skip
