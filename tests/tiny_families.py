"""Base models of every family in miniature: diffusers' and transformers' own classes with random weights."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from scanloom.artefact import Artefact, FileEntry, publish
from scanloom.models.autoencoder import load_autoencoder
from scanloom.models.card import GeneratorCard, conditioning
from scanloom.models.family import initial_denoiser, save_generator, schedule_of
from scanloom.models.noise_schedule import PredictionType
from scanloom.recipe_denoiser import Denoiser, Lora, StableDiffusion, StableDiffusion3, StableDiffusionXL
from scanloom.store import Store
from tests.tiny_generator import ENVELOPE, SCHEMA, SIZE, STATISTICS

TEXT_FAMILIES = ("sd", "sdxl", "sd3")
LATENT_SHAPE = (4, SIZE // 2, SIZE // 2)
CLIP_WIDTH, TOKENS = 32, 77
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
OBJECTIVES: dict[str, PredictionType] = {"sd": "v_prediction", "sdxl": "epsilon", "sd3": "flow"}


def write_base(family: str, folder: Path, seed: int = 0, *, t5: bool = True) -> Path:
    """A base model of `family` in `folder`, as diffusers saves one; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline: Any = _sd3(t5) if family == "sd3" else _sdxl() if family == "sdxl" else _sd()
    pipeline.save_pretrained(folder)
    return folder


def section(family: str, weights: str | Path, lora: Lora | None = None) -> Denoiser:
    """The recipe's section of a text family."""
    kind: Any = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}[family]
    made: Denoiser = kind(family=family, weights=str(weights), lora=lora)
    return made


def card_of(config: Denoiser) -> GeneratorCard:
    """The card of a generator of SIZE x SIZE images with the attributes of `tiny_generator`."""
    return GeneratorCard(
        **conditioning(config),
        name=f"tiny-{config.family}",
        attributes=SCHEMA,
        envelope=ENVELOPE,
        latent_shape=LATENT_SHAPE,
        image_shape=(1, SIZE, SIZE),
        spacing_mm=0.7,
        trained_steps=0,
    )


def save(config: Denoiser, denoiser: nn.Module, base: Path, folder: Path) -> Path:
    """The folder of a generator with this denoiser and all else of its base model."""
    schedule = schedule_of(config, OBJECTIVES[config.family])
    save_generator(folder, card_of(config), denoiser, load_autoencoder(base / "vae"), schedule, base)
    return folder


def publish_text_generator(family: str, uri: str, seed: int = 0) -> Artefact:
    """A finished generator of a text family, untrained."""
    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(family, Path(scratch) / "base", seed)
        config = section(family, base)
        folder = save(config, initial_denoiser(config, card_of(config), seed, base), base, Path(scratch) / "made")
        files = [FileEntry.of(stored) for stored in Store(uri).put_folder(folder)]
    return publish(
        Store(uri), kind="generator", name="tiny", recipe={}, inputs=[], files=files, statistics=STATISTICS
    )  # fmt: skip


def _sd() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_clip()), tokenizer=_clip_tokenizer(), unet=_unet(CLIP_WIDTH),
        scheduler=_ddim("v_prediction"), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> StableDiffusionXLPipeline:
    time_width = 8
    unet = _unet(
        2 * CLIP_WIDTH, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=time_width, projection_class_embeddings_input_dim=6 * time_width + CLIP_WIDTH,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=CLIPTextModel(_clip()), text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer(), unet=unet, scheduler=_ddim("epsilon"),
        force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def _sd3(t5: bool) -> StableDiffusion3Pipeline:
    joint = 2 * CLIP_WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SHAPE[1], patch_size=2, in_channels=LATENT_SHAPE[0], out_channels=LATENT_SHAPE[0],
        num_layers=2, attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=joint,
        pooled_projection_dim=joint, pos_embed_max_size=16,
    )  # fmt: skip
    config = T5Config(vocab_size=len(LETTERS) + 4, d_model=joint, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.06), text_encoder=CLIPTextModelWithProjection(_clip()), tokenizer=_clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip()), tokenizer_2=_clip_tokenizer(),
        text_encoder_3=T5EncoderModel(config) if t5 else None, tokenizer_3=_t5_tokenizer() if t5 else None,
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _unet(width: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[1], in_channels=LATENT_SHAPE[0], out_channels=LATENT_SHAPE[0],
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, **more,
    )  # fmt: skip


def _vae(**more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=LATENT_SHAPE[0], norm_num_groups=4, sample_size=SIZE, **more,
    )  # fmt: skip


def _ddim(prediction_type: PredictionType) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def _clip() -> CLIPTextConfig:
    tokenizer = _clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, intermediate_size=48, projection_dim=CLIP_WIDTH,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _clip_tokenizer() -> CLIPTokenizer:
    """Letters for words: each character of printable ASCII, inside a word and at its end."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], model_max_length=TOKENS)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)
