"""The denoisers that read prompts: diffusers' UNet of sd and sdxl, and the multimodal transformer of sd3.

Legend of shape suffixes: B batch, C H W latents, L tokens, D token width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scanloom.errors import RecipeError
from scanloom.recipe_denoiser import Lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ADAPTER = "default"
Network = UNet2DConditionModel | SD3Transformer2DModel


class TextDenoiser(nn.Module):
    """One of diffusers' networks behind the interface that all families share."""

    part: ClassVar[str]
    """Folder of the network in a pipeline."""
    network_class: ClassVar[type[Network]]
    attention: ClassVar[Sequence[str]] = ATTENTION
    """Ends of the names of the projections that LoRA adapts unless told otherwise."""

    def __init__(self, network: UNet2DConditionModel | SD3Transformer2DModel, factor: int) -> None:
        """`factor` is what the autoencoder divides an image's sides by."""
        super().__init__()
        self.network = network
        self.factor = factor

    @classmethod
    def read(cls, folder: Path, factor: int) -> TextDenoiser:
        """The denoiser of a pipeline's folder, float32. OSError or ValueError where it cannot be read."""
        network = cls.network_class.from_pretrained(
            folder / cls.part, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
        return cls(network, factor)

    def enable_gradient_checkpointing(self) -> None:
        """Keep the activations of fewer layers and compute the others again in the backward pass."""
        self.network.enable_gradient_checkpointing()

    def add_lora(self, lora: Lora, seed: int) -> None:
        """Freeze the network and give it adapters, which change nothing until they are trained.

        Raises RecipeError where no module has a name of `lora.targets`.
        """
        self.requires_grad_(False)
        targets = list(lora.targets or self.attention)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.network.add_adapter(config, ADAPTER)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise RecipeError(f"finetune.denoiser.lora.targets {', '.join(targets)}: {reason[:200]}") from error

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """The network's weights under diffusers' names, float32, with what adapters add to them."""
        state = {
            name.replace(".base_layer.", "."): value.float()
            for name, value in self.network.state_dict().items()
            if ".lora_" not in name
        }
        for name, layer in self.network.named_modules():
            if isinstance(layer, LoraLayer):
                added: Tensor = cast(Any, layer).get_delta_weight(ADAPTER)
                state[f"{name}.weight"] = state[f"{name}.weight"] + added.float()
        return {name: value.contiguous() for name, value in state.items()}


class StableDiffusionDenoiser(TextDenoiser):
    """sd: noisy latents, timestep and CLIP's tokens."""

    part = "unet"
    network_class = UNet2DConditionModel

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The prediction [B, C, H, W] under `tokens` [B, L, D]."""
        tokens_BLD = condition["tokens"].to(latents_BCHW.dtype)
        predicted: Tensor = self.network(latents_BCHW, timesteps_B, tokens_BLD, return_dict=False)[0]
        return predicted


class StableDiffusionXLDenoiser(TextDenoiser):
    """sdxl: as sd, and told the pooled text and the image's size (Podell et al. 2023, section 2.2)."""

    part = "unet"
    network_class = UNet2DConditionModel

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The prediction [B, C, H, W] under `tokens` [B, L, D] and `pooled` [B, P]."""
        height, width = (self.factor * side for side in latents_BCHW.shape[2:])
        # Original size, corner of the crop, size asked for: the scan is whole.
        size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=latents_BCHW.device)
        dtype = latents_BCHW.dtype
        predicted: Tensor = self.network(
            latents_BCHW,
            timesteps_B,
            condition["tokens"].to(dtype),
            added_cond_kwargs={
                "text_embeds": condition["pooled"].to(dtype),
                "time_ids": size.expand(len(latents_BCHW), -1),
            },
            return_dict=False,
        )[0]
        return predicted


class StableDiffusion3Denoiser(TextDenoiser):
    """sd3: latents and tokens are one sequence; the pooled text and the time modulate it (Esser et al. 2024)."""

    part = "transformer"
    network_class = SD3Transformer2DModel
    attention = JOINT_ATTENTION

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The prediction [B, C, H, W] under `tokens` [B, L, D] and `pooled` [B, P]."""
        dtype = latents_BCHW.dtype
        predicted: Tensor = self.network(
            hidden_states=latents_BCHW,
            encoder_hidden_states=condition["tokens"].to(dtype),
            pooled_projections=condition["pooled"].to(dtype),
            # The network's time is 1000 sigma, and sigma is (t + 1) / 1000.
            timestep=timesteps_B + 1,
            return_dict=False,
        )[0]
        return predicted


TEXT_DENOISERS: Mapping[str, type[TextDenoiser]] = {
    "sd": StableDiffusionDenoiser,
    "sdxl": StableDiffusionXLDenoiser,
    "sd3": StableDiffusion3Denoiser,
}
