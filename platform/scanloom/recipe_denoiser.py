"""What a recipe says of the denoiser: its family, and what each family is built or taken from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator

from scanloom.section import Count, Section, Words

Family = Literal["attribute-unet", "sd", "sdxl", "sd3"]
PLACE_OF_ATTRIBUTES = "{attributes}"
PLACE_OF_VALUE = "{value}"


class AttributeUnet(Section):
    """diffusers' UNet2DConditionModel on latents, conditioned by one learned token per attribute."""

    family: Literal["attribute-unet"] = "attribute-unet"
    channels: Annotated[tuple[Count, ...], Field(min_length=2)] = (64, 128, 192)
    layers_per_block: Count = 1
    attention_head_dim: Count = 32
    condition_dim: Count = 128


class Lora(Section):
    """Low-rank adapters (Hu et al. 2022) in the place of full fine-tuning; merged when the generator is saved."""

    rank: Count = 16
    alpha: Count = 16
    """The adapters' output is scaled by alpha / rank."""
    targets: Words | None = None
    """Ends of the names of the modules to adapt; None: the projections of all attentions."""


class PromptTemplate(Section):
    """How attributes become the text that a text encoder reads; unknown attributes are left out."""

    template: str = "chest X-ray, {attributes}"
    """Where nothing is known the prompt is empty, whatever the template says around its attributes."""
    phrases: Mapping[str, str] = {}
    """How an attribute reads, as `age: "{value} year old"`; the others read `age 63 years`, `view PA`, or as labels."""
    words: Mapping[str, str] = {}
    """How a category or label reads, as `F: female`."""

    @field_validator("template")
    @classmethod
    def _has_attributes(cls, template: str) -> str:
        if PLACE_OF_ATTRIBUTES not in template:
            raise ValueError(f"{template!r} has no place for {PLACE_OF_ATTRIBUTES}")
        return template

    @field_validator("phrases")
    @classmethod
    def _have_values(cls, phrases: Mapping[str, str]) -> Mapping[str, str]:
        for name, phrase in phrases.items():
            if PLACE_OF_VALUE not in phrase:
                raise ValueError(f"{name}: {phrase!r} has no place for {PLACE_OF_VALUE}")
        return phrases


class TextDenoiser(Section):
    """A pretrained denoiser that reads prompts."""

    weights: Annotated[str, Field(min_length=1)]
    """The base model: a folder in diffusers layout, local or s3://, a generator artefact, or a hub id."""
    lora: Lora | None = None
    """None: every weight of the denoiser is trained."""
    prompt: PromptTemplate = PromptTemplate()


class StableDiffusion(TextDenoiser):
    """Stable Diffusion 1.x and 2.x: a UNet that reads CLIP's tokens (Rombach et al. 2022)."""

    family: Literal["sd"]


class StableDiffusionXL(TextDenoiser):
    """SDXL: a larger UNet, two CLIPs, told the image's size (Podell et al. 2023)."""

    family: Literal["sdxl"]


class StableDiffusion3(TextDenoiser):
    """SD3 and 3.5: a multimodal transformer trained by flow matching, two CLIPs and T5 (Esser et al. 2024)."""

    family: Literal["sd3"]


def _family(value: object) -> object:
    default = "attribute-unet"
    return value.get("family", default) if isinstance(value, Mapping) else getattr(value, "family", default)


Denoiser = Annotated[
    Annotated[AttributeUnet, Tag("attribute-unet")]
    | Annotated[StableDiffusion, Tag("sd")]
    | Annotated[StableDiffusionXL, Tag("sdxl")]
    | Annotated[StableDiffusion3, Tag("sd3")],
    Discriminator(
        _family,
        custom_error_type="family",
        custom_error_message=f"unknown family; known: {', '.join(get_args(Family))}",
    ),
]
"""A section that names no family is an attribute-unet."""
