"""docs/training.md: its recipes run, its table is the code's, its keys exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from scanloom.recipe import Finetune, parse_recipe
from scanloom.training.journal import GAUGES

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "training.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^### (.+?)$.*?^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_every_recipe_block_is_looked_at() -> None:
    assert len(RECIPES) == TEXT.count("```yaml") == 3


@pytest.mark.parametrize("title, block", RECIPES, ids=[title for title, _ in RECIPES])
def test_a_recipe_of_the_document_is_one(title: str, block: str) -> None:
    recipe = parse_recipe(yaml.safe_load(block), title)
    section = recipe.finetune
    assert section.use_gpu
    if found := re.search(r"ZeRO (\d)", title):
        assert section.zero_stage == int(found[1])
    assert ("LoRA" in title) == (getattr(section.denoiser, "lora", None) is not None)


def test_the_memory_table_is_the_one_that_is_computed() -> None:
    assert runpy.run_path(str(DOCS / "training_memory.py"))["document"]() == TEXT, "run `make docs`"


def test_every_key_that_the_document_explains_is_a_key_of_finetune() -> None:
    table = TEXT[TEXT.index("| key of `finetune`") : TEXT.index("The order to change")]
    rows = [line for line in table.splitlines()[2:] if line]
    named = {key for row in rows for key in re.findall(r"`([a-z_]+)[`.]", row.split("|")[1])}
    assert named
    assert named <= set(Finetune.model_fields)


def test_every_gauge_that_the_document_names_is_exported() -> None:
    named = re.findall(r"`(?:scanloom_training_|\.\.\._)([a-z_]+)`", TEXT)
    assert named
    assert set(named) <= set(GAUGES)
