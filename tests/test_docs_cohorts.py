"""docs/cohorts.md: every example is one, and can be ordered of the base generator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from scanloom.artefact import open_artefact
from scanloom.recipe import parse_recipe
from scanloom.recipe_cohort import Cohort
from scanloom.sampling.plan import compile_plan, order

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "cohorts.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^### (.+?)$(?:(?!^### ).)*?^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
(TABLE,) = re.findall(r"^```csv\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
HEAD = {"name": "doc", "store": "runs/doc", "attributes": [{"name": "sex", "kind": "category", "values": ["F", "M"]}]}


def test_every_example_is_looked_at_and_every_kind_has_one() -> None:
    assert len(EXAMPLES) == TEXT.count("```yaml")
    union = get_args(Cohort)[0]
    kinds = {model.model_fields["kind"].default for model in get_args(union)}
    assert {yaml.safe_load(text)["generate"]["cohort"]["kind"] for _, text in EXAMPLES} == kinds
    assert {title.split()[0] for title, _ in EXAMPLES} == kinds


@pytest.mark.parametrize("title, text", EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_can_be_ordered_of_the_base_generator(
    title: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cohort.csv").write_text(TABLE)
    base = open_artefact("embedded://base").manifest
    section = parse_recipe(HEAD | yaml.safe_load(text), title).generate
    assert section is not None
    assert section.cohort.kind == title.split()[0]
    ordered = order(section, base.name, "0" * 64, base.statistics)
    rows = compile_plan(ordered.spec).table
    assert len(rows) == section.images
    known = sum(rows["sex"].is_valid().to_pylist())
    assert known == section.images
