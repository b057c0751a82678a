"""Who is let in by a key: of the settings or of the file of keys, and whatever else is sent is refused."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from scanloom.api_key import PATTERN, Scope, entry, fingerprint, new_key
from scanloom.errors import RecipeError
from serve.access import Caller, Forbidden, Gatekeeper, Unauthenticated
from serve.config import Access, ApiKey
from tests.gatekeeping import KEY, Clock, admit, admitted, api_key

# --- API keys -------------------------------------------------------------------------------------------------


def test_a_key_is_taken_for_its_tenant_id_and_scopes_however_the_scheme_is_written() -> None:
    keeper = Gatekeeper(Access(keys=(api_key(new_key("other"), id="other"), api_key(scopes=("generate",)))))
    for scheme in ("Bearer ", "bearer ", "BEARER  "):
        assert admit(keeper, KEY, scheme) == Caller("clinic-a", "lab", frozenset({"generate"}))


@pytest.mark.parametrize(
    "header",
    [
        None, "", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY} x", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x",
        f"Bearer {fingerprint(KEY)}", "Bearer \x00", "Bearer schlüssel", f"Bearer {'x' * 20_000}", "Bearer a.b.c",
        f"Bearer {KEY.swapcase()}", f"Bearer {new_key('lab')}",
    ],
)  # fmt: skip
def test_everything_else_is_refused_without_being_repeated(header: str | None) -> None:
    with pytest.raises(Unauthenticated) as refused:
        asyncio.run(admitted(Gatekeeper(Access(keys=(api_key(),))).admit(header)))
    said = str(refused.value)
    assert "\n" not in said
    assert len(said) < 200
    assert header in (None, "") or header.split(" ")[-1] in ("", "Bearer") or header.split(" ")[-1] not in said.split()


def test_a_key_is_taken_until_it_expires_whatever_the_time_zone() -> None:
    now = datetime.now(UTC)
    elsewhere = now.astimezone(tz=None) + timedelta(minutes=5)
    assert admit(Gatekeeper(Access(keys=(api_key(expires=elsewhere),))), KEY).who == "lab"
    with pytest.raises(Unauthenticated, match="'lab' expired"):
        admit(Gatekeeper(Access(keys=(api_key(expires=now - timedelta(seconds=1)),))), KEY)


def test_all_keys_are_compared_whichever_one_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [new_key(f"k{n}") for n in range(20)]
    keeper = Gatekeeper(Access(keys=tuple(api_key(key, id=f"k{n}") for n, key in enumerate(keys))))
    compared: list[str] = []
    true_digest = hmac.compare_digest

    def counted(ours: str, theirs: str) -> bool:
        compared.append(ours)
        return true_digest(ours, theirs)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    counts = []
    for sent in (keys[0], keys[-1], new_key("k0"), "scanloom_unknown", keys[3][:-1]):
        compared.clear()
        with suppress(Unauthenticated):
            admit(keeper, sent)
        counts.append(len(compared))
    assert counts == [20] * 5


def test_nobody_is_let_in_where_nothing_is_set_and_everybody_where_it_is_open(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "scanloom.serve"):
        keeper = Gatekeeper(Access())
    assert "every request will be refused" in caplog.text
    with pytest.raises(Unauthenticated):
        admit(keeper, KEY)
    keeper = Gatekeeper(Access(open=True))
    everybody = Caller("local", "anybody", frozenset({"generate", "datasets", "admin"}))
    for near in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert asyncio.run(keeper.admit(None, near)) == everybody
    for far in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "a-name", "", None):
        with pytest.raises(Forbidden, match="open to the host that it runs on alone"):
            asyncio.run(keeper.admit(None, far))


def test_a_scope_is_required_and_admin_has_all() -> None:
    Caller("t", "w", frozenset({"generate"})).require("generate")
    Caller("t", "w", frozenset({"admin"})).require("datasets")
    scopes: tuple[Scope, ...] = ("datasets", "admin")
    for scope in scopes:
        with pytest.raises(Forbidden, match=f"'{scope}'"):
            Caller("t", "w", frozenset({"generate"})).require(scope)
        with pytest.raises(Forbidden, match=f"'{scope}'"):
            Caller("t", "w", frozenset()).require(scope)


def test_a_made_key_has_the_form_that_scanners_search_for_and_its_entry_lets_it_in() -> None:
    key = new_key("a.b-c_d")
    assert re.fullmatch(PATTERN, key)
    assert len({new_key("x") for _ in range(100)}) == 100
    made = entry(key, "a.b-c_d", "clinic-a", ["datasets"], 30)
    assert key not in json.dumps(made)
    found = ApiKey.model_validate(yaml.safe_load(yaml.safe_dump(made)))
    assert found.expires is not None
    assert timedelta(days=29) < found.expires - datetime.now(UTC) <= timedelta(days=30)
    # It has two dots, as tokens have.
    assert admit(Gatekeeper(Access(keys=(api_key(new_key("a.b.c"), id="x"), found))), key).who == "a.b-c_d"


# --- the file of keys -----------------------------------------------------------------------------------------


class KeysFile:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.clock = Clock()

    def write(self, text: str) -> None:
        """Replace the file, as Kubernetes and careful editors do, and let the time pass that makes it noticed."""
        half = self.place.with_suffix(".half")
        half.write_text(text)
        half.replace(self.place)
        self.clock.now += 10

    def list(self, *keys: str) -> None:
        self.write(yaml.safe_dump([entry(key, key[:12], "clinic-b", ["generate"], None) for key in keys]))

    def keeper(self) -> Gatekeeper:
        return Gatekeeper(Access(keys=(api_key(),), keys_file=str(self.place)), self.clock)


@pytest.fixture
def keys_file(tmp_path: Path) -> KeysFile:
    return KeysFile(tmp_path / "keys.yaml")


def test_keys_of_the_file_come_and_go_while_the_service_runs(keys_file: KeysFile) -> None:
    first, second = new_key("file-1"), new_key("file-2")
    keys_file.list(first)
    keeper = keys_file.keeper()
    assert admit(keeper, first).tenant == "clinic-b"
    assert admit(keeper, KEY).tenant == "clinic-a"
    keys_file.list(second)
    assert admit(keeper, second).tenant == "clinic-b"
    with pytest.raises(Unauthenticated):
        admit(keeper, first)
    keys_file.write("[]")
    with pytest.raises(Unauthenticated):
        admit(keeper, second)
    assert admit(keeper, KEY).tenant == "clinic-a"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("- id: [", "no YAML"),
        ("keys: 1", "tuple"),
        ("- {id: x, sha256: SECRET, tenant: t}", "0.sha256"),
        ("- {id: ../x, sha256: " + "ab" * 32 + ", tenant: t}", "0.id"),
        ("- {id: x, sha256: " + "ab" * 32 + ", tenant: ../t}", "0.tenant"),
        ("- {id: x, sha256: " + "ab" * 32 + ", tenant: t, scope: [admin]}", "did you mean 'scopes'"),
        ("- {id: x, sha256: " + "ab" * 32 + ", tenant: t, scopes: [root]}", "0.scopes"),
        ("- {id: x, sha256: " + "ab" * 32 + ", tenant: t, expires: 2020-01-01T00:00:00}", "time"),
        ("- {id: lab, sha256: " + "ab" * 32 + ", tenant: t}", "'lab' is there twice"),
        ("- {id: x, sha256: " + fingerprint(KEY) + ", tenant: t}", "sha256"),
        ("- id: \x00", "no YAML"),
    ],
)
def test_a_broken_edit_keeps_the_former_keys_and_says_so_once(
    keys_file: KeysFile, text: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_key("file-1")
    keys_file.list(key)
    keeper = keys_file.keeper()
    keys_file.write(text)
    for _ in range(3):
        assert admit(keeper, key).tenant == "clinic-b"
        keys_file.clock.now += 10
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert said in errors[0]
    assert "the former 2 keys are used on" in errors[0]
    assert "SECRET" not in errors[0]
    keys_file.write("[]")
    with pytest.raises(Unauthenticated):
        admit(keeper, key)
    keys_file.write(text)
    with pytest.raises(RecipeError, match=re.escape(str(keys_file.place))):
        keys_file.keeper()


def test_a_file_that_vanishes_keeps_its_keys_and_one_that_never_was_is_told_at_start(
    keys_file: KeysFile, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        keys_file.keeper()
    key = new_key("file-1")
    keys_file.list(key)
    keeper = keys_file.keeper()
    keys_file.place.unlink()
    keys_file.clock.now += 10
    for seconds in (10, 10, 60, 10, 60):
        assert admit(keeper, key).tenant == "clinic-b"
        keys_file.clock.now += seconds
    assert caplog.text.count("No such file or directory; it should list API keys; the former 2 keys are used on") == 2
    keys_file.write("[]")
    with pytest.raises(Unauthenticated):
        admit(keeper, key)
    caplog.clear()
    keys_file.clock.now += 600
    assert admit(keeper, KEY).tenant == "clinic-a"
    assert caplog.text == ""


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"open": True, "keys": (api_key(),)}, "open"),
        ({"keys": (api_key(), api_key(new_key("x")))}, "twice"),
        ({"keys": (api_key(), api_key(id="x"))}, "twice"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: Mapping[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Gatekeeper(Access(**settings))
