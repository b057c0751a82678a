"""What is written about the code and generated from it agrees with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from scanloom.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_committed_recipe_schema_is_the_codes() -> None:
    committed = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    assert committed == Recipe.model_json_schema(), "run `make docs`"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_recipe_loads_and_names_its_schema_for_editors(path: Path) -> None:
    load_recipe(path)
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert named
    assert (path.parent / named[1]).resolve() == ROOT / "docs" / "recipe.schema.json"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def test_decision_records_are_numbered_without_gaps_and_fit_a_page() -> None:
    records = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(p.name[:4]) for p in records] == list(range(1, len(records) + 1))
    assert [p.name for p in records if len(p.read_text().splitlines()) > 60] == []
