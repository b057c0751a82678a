"""docs/sources.md tells of every source, and its recipes are recipes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from scanloom.recipe import ImageFolderSource, Recipe, Source

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "sources.md").read_text(encoding="utf-8")
SNIPPETS: list[dict[str, Any]] = [yaml.safe_load(s) for s in re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)]
KINDS = {kind.model_fields["kind"].default for kind in get_args(get_args(Source)[0])}
SEX = {"name": "sex", "kind": "category", "source": "PatientSex", "values": ["F", "M"]}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: str(snippet["prepare"]["source"]["kind"]))
def test_a_snippet_is_part_of_a_recipe(snippet: dict[str, Any]) -> None:
    recipe = Recipe.model_validate({"name": "a", "store": "runs/a", "attributes": [SEX]} | snippet)
    assert recipe.prepare is not None
    assert recipe.prepare.source.model_dump(exclude_unset=True) == snippet["prepare"]["source"]


def test_every_source_has_one_row_of_the_table_and_a_snippet() -> None:
    table = TEXT[TEXT.index("| source | unit |") :].split("\n\n")[0].splitlines()
    assert {line.count("|") for line in table} == {12}
    assert sorted(re.findall(r"^\| `([a-z-]+)` \|", "\n".join(table), flags=re.MULTILINE)) == sorted(KINDS)
    assert {snippet["prepare"]["source"]["kind"] for snippet in SNIPPETS} == KINDS


def test_every_preset_has_a_snippet() -> None:
    presets = set(get_args(ImageFolderSource.model_fields["preset"].annotation))
    shown = [snippet["prepare"]["source"] for snippet in SNIPPETS]
    assert {source.get("preset", "generic") for source in shown if source["kind"] == "image-folder"} == presets
