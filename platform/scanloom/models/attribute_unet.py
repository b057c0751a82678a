"""The attribute-unet family: diffusers' UNet2DConditionModel on latents, told its attributes twice.

The attribute tokens are attended to (cross-attention, below the finest level) and, flattened, added to the timestep
embedding, which at small sizes carries most of the condition at almost no cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from scanloom.attributes import AttributeSchema
from scanloom.models.conditioner import AttributeConditioner
from scanloom.recipe import AttributeUnet


class AttributeDenoiser(nn.Module):
    """UNet and conditioner as one module, so that one optimizer and one data-parallel engine own both."""

    def __init__(self, unet: UNet2DConditionModel, conditioner: AttributeConditioner) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction [B, C, H, W] for noisy latents at integer timesteps.

        `condition` holds `features` [B, F] (see `conditioner.features`) and, where some are dropped, `drop`: bool
        [B, A].
        """
        tokens_BAD = self.conditioner(condition["features"], condition.get("drop"))
        return predict(self.unet, latents_BCHW, timesteps_B, tokens_BAD)

    def enable_gradient_checkpointing(self) -> None:
        """Keep the activations of fewer layers and compute the others again in the backward pass."""
        self.unet.enable_gradient_checkpointing()


def predict(unet: nn.Module, latents_BCHW: Tensor, timesteps_B: Tensor, condition_BAD: Tensor) -> Tensor:
    """The UNet's prediction [B, C, H, W] under condition tokens [B, A, D]."""
    condition_BAD = condition_BAD.to(latents_BCHW.dtype)
    predicted: Tensor = unet(
        latents_BCHW, timesteps_B, condition_BAD, class_labels=condition_BAD.flatten(1), return_dict=False
    )[0]
    return predicted


def build_denoiser(
    config: AttributeUnet, schema: AttributeSchema, latent_shape: tuple[int, int, int], seed: int
) -> AttributeDenoiser:
    """A freshly initialised denoiser for latents [C, H, W]; the same weights for the same seed."""
    channels, height, _ = latent_shape
    levels = len(config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        conditioner = AttributeConditioner(schema, config.condition_dim)
        unet = UNet2DConditionModel(
            sample_size=height,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
            cross_attention_dim=config.condition_dim,
            # diffusers reads this argument as the number of heads.
            attention_head_dim=tuple(max(1, c // config.attention_head_dim) for c in config.channels),
            norm_num_groups=math.gcd(32, *config.channels),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=config.condition_dim * len(schema.declarations),
        )
        # A zero output layer starts the network at "no change", which shortens the first phase of training.
        for parameter in unet.conv_out.parameters():
            nn.init.zeros_(parameter)
    return AttributeDenoiser(unet, conditioner)
