"""What a latents artefact is made of: the plan that its workers share, and the prompts that go into it.

It has a shard for each of the corpus and, for text families, shards of distinct prompts after them. What a shard
holds is a function of the plan and its number, so that whoever commits it first has committed it for all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from scanloom.artefact import Artefact, plan_digest
from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError
from scanloom.models.generator import read_latent_shape
from scanloom.models.prompts import prompt, require_wording
from scanloom.recipe import Encode, Recipe
from scanloom.recipe_denoiser import PromptTemplate, TextDenoiser
from scanloom.shards.commit import ShardCommit
from scanloom.training.given_weights import text_digest

SPLITS = ("train", "validation")
"""The holdout split is never encoded: nothing that trains may see it."""
# A shard of SDXL's prompts is then about 40 MB, and an actor's turn takes seconds.
PROMPTS_PER_SHARD = 128
# How to encode, not what comes out: rounding apart.
_PLACE = {"batch_size", "prompt_batch_size", "workers", "gpus_per_worker"}


class TextSource(BaseModel):
    """What makes a prompt of attributes, and an embedding of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    template: PromptTemplate


class EncodingJob(BaseModel):
    """What a worker is told; everything else it reads from the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Encode
    seed: int
    corpus_uri: str
    autoencoder_uri: str
    latents_uri: str
    attributes: AttributeSchema
    text: TextSource | None
    """None for a family that reads attributes."""
    plan: str

    @property
    def device(self) -> str:
        return "cuda" if self.recipe.gpus_per_worker else "cpu"

    def prompts(self, rows: pa.Table) -> list[str]:
        """The prompt of each corpus row. Raises ValueError for a family without text."""
        if self.text is None:
            raise ValueError("a family that reads attributes has no prompts")
        told = [self.attributes.from_row(row) for row in rows.select(list(self.attributes.names)).to_pylist()]
        return [prompt(self.attributes, row, self.text.template) for row in told]


def plan_encoding(recipe: Recipe, corpus: Artefact, autoencoder: Artefact) -> EncodingJob:
    """The job of a recipe, with the digest of all that decides what the latents are.

    Raises RecipeError where the autoencoder cannot halve the corpus's scans as often as it wants to, or the prompt
    words what the corpus does not have; ArtefactError where base weights lack a part.
    """
    _require_divisible(autoencoder, corpus.manifest.statistics["size_px"])
    section, text = recipe.encode, _text_source(recipe)
    attributes = AttributeSchema.model_validate(corpus.manifest.statistics["schema"])
    if text:
        require_wording(attributes, text.template)
    plan = plan_digest(
        "latents", corpus.digest, autoencoder.digest, recipe.seed if section.crops else None,
        section.model_dump(mode="json", exclude=_PLACE if section.canaries else _PLACE | {"canaries"}),
        text and [text.template.model_dump(mode="json"), text_digest(text.weights)],
    )  # fmt: skip
    return EncodingJob(
        recipe=section, seed=recipe.seed, corpus_uri=corpus.uri, autoencoder_uri=autoencoder.uri,
        latents_uri=recipe.uri("latents"), attributes=attributes, text=text, plan=plan,
    )  # fmt: skip


def distinct_prompts(rows: pa.Table, job: EncodingJob) -> pa.Table:
    """The column `text`: each prompt of these corpus rows once."""
    return pa.table({"text": pa.array(sorted(set(job.prompts(rows))), pa.string())})


def prompt_rows(texts: Iterable[str], first: int) -> list[dict[str, Any]]:
    """Every distinct prompt, the empty one among them, in shards numbered from `first`.

    A row of work each: `shard` and, as a JSON list, its `texts`.
    """
    distinct = sorted({"", *texts})
    starts = range(0, len(distinct), PROMPTS_PER_SHARD)
    parts = [distinct[start : start + PROMPTS_PER_SHARD] for start in starts]
    return [{"shard": shard, "texts": json.dumps(part)} for shard, part in enumerate(parts, first)]


def finished(commits: Collection[ShardCommit], corpus: Artefact) -> dict[str, Any]:
    """What the artefact of all these shards publishes: `files` and `statistics`."""
    carried = ("schema", "envelope", "cells", "spacing_mm", "size_px")
    counted = {
        "rows": sum(commit.rows for commit in commits),
        "encoded": sum(commit.statistics.get("encoded", 0) for commit in commits),
        "prompts": sum(commit.statistics.get("prompts", 0) for commit in commits),
    }
    plan = {commit.plan for commit in commits}.pop()
    return {
        "files": [entry for commit in commits for entry in commit.files.values()],
        "statistics": {"plan": plan} | counted | {key: corpus.manifest.statistics[key] for key in carried},
    }


def _text_source(recipe: Recipe) -> TextSource | None:
    denoiser = recipe.finetune.denoiser
    if not isinstance(denoiser, TextDenoiser):
        return None
    return TextSource(weights=denoiser.weights, template=denoiser.prompt)


def _require_divisible(autoencoder: Artefact, size_px: int) -> None:
    large_px = 1 << 16
    factor = large_px // read_latent_shape(autoencoder, large_px)[1]
    if size_px % factor:
        raise RecipeError(
            f"prepare.size_px {size_px} is not a multiple of {factor}, by which {autoencoder.uri} reduces scans; "
            "prepare with another size, or take another autoencoder"
        )
