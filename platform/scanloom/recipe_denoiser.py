"""What a recipe says of the denoiser: its family, and what each family is built or taken from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scanloom.section import Count, Section


class AttributeUnet(Section):
    """diffusers' UNet2DConditionModel on latents, conditioned by one learned token per attribute."""

    family: Literal["attribute-unet"] = "attribute-unet"
    channels: Annotated[tuple[Count, ...], Field(min_length=2)] = (64, 128, 192)
    layers_per_block: Count = 1
    attention_head_dim: Count = 32
    condition_dim: Count = 128
