"""The families behind one interface: weights to start from, a denoiser to train, the folder of a generator.

    attribute-unet: unet/  vae/  scheduler/  conditioner/                                  from nothing, or a generator
    sd, sdxl, sd3:  unet/ or transformer/  vae/  scheduler/  text_encoder*/  tokenizer*/   from a base model

each with model_index.json, which plain diffusers opens, and generator.json, the card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.attribute_unet import AttributeDenoiser, build_denoiser
from scanloom.models.base_weights import INDEX, UNUSED, family_of, is_weight_file, parts, require_complete
from scanloom.models.base_weights import fetch_weights as fetch_weights
from scanloom.models.card import CARD, GeneratorCard, read_card
from scanloom.models.conditioner import AttributeConditioner
from scanloom.models.noise_schedule import (
    Betas,
    NoiseSchedule,
    PredictionType,
    noise_schedule,
    scheduler_class,
    write_schedule,
)
from scanloom.models.prompts import require_wording
from scanloom.models.text_denoisers import TEXT_DENOISERS, TextDenoiser
from scanloom.recipe_denoiser import AttributeUnet, Denoiser
from scanloom.recipe_denoiser import TextDenoiser as TextSection

# What diffusers' pipelines of these families expect of a scheduler; nothing that training fixed.
PIPELINE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "sd": {"steps_offset": 1},
    "sdxl": {"steps_offset": 1},
    # Esser et al. 2024, section 5.3.2.
    "sd3": {"shift": 3.0},
}


def schedule_of(config: Denoiser, objective: PredictionType, *, zero_terminal_snr: bool = False) -> NoiseSchedule:
    """The schedule that a family is trained on: base models keep the one that their weights know.

    Raises RecipeError where the family was not made for the objective.
    """
    if (config.family == "sd3") != (objective == "flow") and config.family != "attribute-unet":
        allowed = "flow" if config.family == "sd3" else "v_prediction or epsilon"
        raise RecipeError(f"finetune.objective {objective}: family {config.family} was trained for {allowed}; set that")
    betas: Betas | None = None if config.family == "attribute-unet" else "scaled_linear"
    schedule = noise_schedule(objective, zero_terminal_snr=zero_terminal_snr, betas=betas)
    return replace(schedule, settings={**schedule.settings, **PIPELINE_SETTINGS.get(config.family, {})})


def initial_denoiser(config: Denoiser, card: GeneratorCard, seed: int, start: Path | None) -> nn.Module:
    """The denoiser that training begins with, float32; the same weights for the same seed.

    `start` is a local folder in diffusers layout, a base model's or a generator's; attribute-unet needs none. Only
    what is to be trained requires a gradient. The module is called as `module(latents_BCHW, timesteps_B, condition)`
    and predicts [B, C, H, W]; `condition` holds `features` and `drop` (attribute-unet), `tokens` (sd), or `tokens` and
    `pooled` (sdxl, sd3). It has `enable_gradient_checkpointing()`.

    Raises ArtefactError where `start` is of another family, attributes or latents, or cannot be read, RecipeError
    where the recipe's prompt or LoRA names what is not there.
    """
    if isinstance(config, AttributeUnet):
        if start is None:
            return build_denoiser(config, card.attributes, card.latent_shape, seed)
        return _continued(card, start, start).train()
    return _pretrained(config, card, seed, start).train()


def read_denoiser(folder: Path, card: GeneratorCard, where: str | None = None) -> nn.Module:
    """The denoiser of a generator's folder. Raises ArtefactError where a part is missing or does not fit."""
    where = where or str(folder)
    try:
        if card.family != "attribute-unet":
            return TEXT_DENOISERS[card.family].read(folder, card.factor)
        conditioner = AttributeConditioner(card.attributes, card.condition_dim or 0)
        conditioner.load_state_dict(load_file(folder / "conditioner" / "conditioner.safetensors"))
        return AttributeDenoiser(
            UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True), conditioner
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(folder, where, error) from error


def unreadable(folder: Path, where: str, error: Exception) -> ArtefactError:
    """One line of what a library said, with the user's name for the folder."""
    text = " ".join(str(error).split()).replace(str(folder), where)
    return ArtefactError(f"{where}: a part of the generator cannot be read: {text[:200]}")


def save_generator(
    folder: Path,
    card: GeneratorCard,
    denoiser: nn.Module,
    vae: AutoencoderKL,
    schedule: NoiseSchedule,
    start: Path | None,
) -> None:
    """Write the folder of a generator; weights as float32 safetensors, LoRA merged (the module stays as it is).

    Text encoders and tokenizers are copied from `start`, so that diffusers' `DiffusionPipeline.from_pretrained` opens
    the folder of sd, sdxl and sd3 (without T5, told `text_encoder_3=None, tokenizer_3=None`, as for its base). Raises
    ArtefactError where there is no `start` or it is no such pipeline.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # diffusers notes the folder that a part was loaded from: a scratch folder, another one at every run.
    vae.register_to_config(_name_or_path=card.name)
    vae.save_pretrained(folder / "vae")
    write_schedule(schedule, folder)
    if isinstance(denoiser, AttributeDenoiser):
        index = _save_attribute_unet(folder, card, denoiser)
    elif isinstance(denoiser, TextDenoiser) and start is not None:
        index = _save_text_family(folder, card, denoiser, start)
    else:
        raise ArtefactError(f"{card.name}: a {card.family} generator is saved from its base model's folder; none given")
    index["scheduler"] = ["diffusers", scheduler_class(schedule).__name__]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    absent = {name for name in ("condition_dim", "prompt") if getattr(card, name) is None}
    (folder / CARD).write_text(card.model_dump_json(indent=2, exclude=absent) + "\n", encoding="utf-8")


def _continued(card: GeneratorCard, start: Path, where: Path | str) -> nn.Module:
    theirs = read_card(start, str(where))
    if theirs.family != card.family:
        raise ArtefactError(f"{where}: is of family {theirs.family}, this recipe trains {card.family}")
    if theirs.attributes != card.attributes or theirs.latent_shape != card.latent_shape:
        raise ArtefactError(
            f"{where}: trained on attributes {', '.join(theirs.attributes.names)} and latents {theirs.latent_shape}; "
            f"this corpus has {', '.join(card.attributes.names)} and {card.latent_shape}, or other values of them"
        )
    return read_denoiser(start, theirs, str(where))


def _pretrained(config: TextSection, card: GeneratorCard, seed: int, start: Path | None) -> TextDenoiser:
    require_wording(card.attributes, config.prompt)
    if start is None:
        raise RecipeError(f"finetune.denoiser: family {card.family} starts from weights; set finetune.denoiser.weights")
    family, _ = family_of(start, config.weights)
    if family != card.family:
        raise ArtefactError(f"{config.weights}: is of family {family}, this recipe trains {card.family}")
    require_complete(start, config.weights)
    try:
        denoiser = TEXT_DENOISERS[family].read(start, card.factor)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unreadable(start, config.weights, error) from error
    channels = denoiser.network.config.in_channels
    if channels != card.latent_shape[0]:
        raise ArtefactError(
            f"{config.weights}: denoises latents of {channels} channels, the autoencoder makes {card.latent_shape[0]}; "
            "set autoencoder.path to the one of these weights"
        )
    if config.lora is not None:
        denoiser.add_lora(config.lora, seed)
    return denoiser


def _save_attribute_unet(folder: Path, card: GeneratorCard, denoiser: AttributeDenoiser) -> dict[str, Any]:
    denoiser.unet.register_to_config(_name_or_path=card.name)
    denoiser.unet.save_pretrained(folder / "unet")
    (folder / "conditioner").mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in denoiser.conditioner.state_dict().items()}
    save_file(weights, folder / "conditioner" / "conditioner.safetensors")
    return {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _save_text_family(folder: Path, card: GeneratorCard, denoiser: TextDenoiser, start: Path) -> dict[str, Any]:
    _, index = family_of(start)
    network = denoiser.network
    # The size that a pipeline makes unless told otherwise.
    network.register_to_config(_name_or_path=card.name, sample_size=card.latent_shape[1])
    network.save_config(folder / denoiser.part)
    save_file(
        denoiser.merged_state(),
        folder / denoiser.part / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    for part in parts(index):
        if part.startswith(("text_encoder", "tokenizer")):
            (folder / part).mkdir()
            for file in sorted((start / part).iterdir()):
                if is_weight_file(file.name):
                    shutil.copyfile(file, folder / part / file.name)
    index |= {part: [None, None] for part in UNUSED if part in index}
    index |= {"requires_safety_checker": False} if "safety_checker" in index else {}
    return index | {"_diffusers_version": diffusers.__version__}
