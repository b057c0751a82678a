"""docs/access.md: its settings are settings, and what it says of them is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import TypeAdapter

from scanloom.api import Name
from scanloom.api_key import Scope
from serve import audit_log, issuer_keys
from serve.config import Access, ApiKey, Tenant

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "access.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())
BLOCKS = re.findall(r"^```yaml (\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
MODELS: dict[str, TypeAdapter[Any]] = {
    "keys_file": TypeAdapter(tuple[ApiKey, ...]),
    "access": TypeAdapter(Access),
    "tenants": TypeAdapter(dict[Name, Tenant]),
}


@pytest.mark.parametrize("kind, text", BLOCKS, ids=[kind for kind, _ in BLOCKS])
def test_every_example_is_a_setting(kind: str, text: str) -> None:
    MODELS[kind].validate_python(yaml.safe_load(text))


def test_every_block_is_looked_at_and_every_kind_has_one() -> None:
    assert len(BLOCKS) == TEXT.count("```yaml")
    assert {kind for kind, _ in BLOCKS} == set(MODELS)


def test_every_scope_and_limit_has_its_row() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    assert rows == {*get_args(Scope), *Tenant.model_fields}


def test_its_numbers_are_the_codes() -> None:
    assert (issuer_keys.FRESH_S, issuer_keys.STALE_S, issuer_keys.AGAIN_S) == (300, 3600, 10)
    for said in ("after five minutes", "for up to an hour", "every ten seconds at most"):
        assert said in PROSE
    assert (audit_log.EVERY_S, audit_log.MOST_LINES, audit_log.MOST_WAITING, audit_log.CLOSE_S) == (
        5,
        1000,
        100_000,
        10,
    )
    for said in ("every five seconds or thousand lines", "up to 100 000 lines", "within ten seconds"):
        assert said in PROSE
