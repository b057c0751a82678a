"""The card of a generator, `generator.json`: what diffusers has no place for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from scanloom.attributes import AttributeSchema, Envelope
from scanloom.errors import ArtefactError
from scanloom.recipe_denoiser import AttributeUnet, Denoiser, Family, PromptTemplate

CARD = "generator.json"


class GeneratorCard(BaseModel):
    """Content of `generator.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    family: Family
    name: str
    attributes: AttributeSchema
    envelope: Envelope
    condition_dim: int | None = None
    """attribute-unet: width of an attribute's token."""
    prompt: PromptTemplate | None = None
    """The other families: how attributes became text in training."""
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    """(1, height, width)."""
    spacing_mm: float | None
    """Median pixel spacing of the corpus after resizing."""
    trained_steps: int

    @property
    def factor(self) -> int:
        """What the autoencoder divides an image's sides by."""
        return self.image_shape[1] // self.latent_shape[1]

    @model_validator(mode="after")
    def _says_how_it_is_conditioned(self) -> Self:
        needed = "condition_dim" if self.family == "attribute-unet" else "prompt"
        if getattr(self, needed) is None:
            raise ValueError(f"family {self.family} needs {needed}")
        return self


def conditioning(denoiser: Denoiser) -> dict[str, Any]:
    """The fields of a card that say what family a denoiser is of and how it is conditioned."""
    if isinstance(denoiser, AttributeUnet):
        return {"family": denoiser.family, "condition_dim": denoiser.condition_dim}
    return {"family": denoiser.family, "prompt": denoiser.prompt}


def read_card(folder: Path, where: str | None = None) -> GeneratorCard:
    """The card of a generator folder. Raises ArtefactError where it is missing or of another family or format.

    `where` names the generator in errors, where the folder is a copy.
    """
    where = where or str(folder)
    try:
        text = (folder / CARD).read_bytes()
    except OSError as error:
        raise ArtefactError(f"{where}: holds no {CARD}; not a generator of scanloom") from error
    return parse_card(text, where)


def parse_card(text: bytes, where: str) -> GeneratorCard:
    """The card of this content. Raises ArtefactError, naming the generator as `where`, for one that is none."""
    try:
        return GeneratorCard.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"]) or "top level"
        found = f" (got {fault['input']!r})" if fault["loc"] else ""
        raise ArtefactError(f"{where}/{CARD}: {place}: {fault['msg']}{found}") from error
