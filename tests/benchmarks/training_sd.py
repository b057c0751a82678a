"""Stable Diffusion 2.1 with about a tenth of its widths and random weights, as a folder that diffusers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 128
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128, 128),
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": TEXT_WIDTH,
    "use_linear_projection": True,
}
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


def save_stable_diffusion(folder: Path) -> None:
    """Write UNet, VAE, text encoder, tokenizer and scheduler; 8 px a latent, 77 tokens, v-prediction."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_attention_heads=2,
        num_hidden_layers=23, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(in_channels=3, out_channels=3, sample_size=128, **VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(in_channels=4, out_channels=4, layers_per_block=2, **UNET),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
            clip_sample=False,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    """One token a letter, padded to 77 as CLIP's is: how long a text is costs nothing."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77)
