"""`scanloom doctor --cluster` finds what would stop work, against a dashboard that answers as Ray's does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scanloom.cli import app
from scanloom.cluster import Finding, examine, store_clock
from scanloom.errors import RecipeError
from scanloom.needs import gpus_needed
from scanloom.ray_jobs import JobsApi, JobsUnavailable
from scanloom.recipe import load_recipe

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
TOKEN = "a-token"
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def dashboard(
    *, version: str = "2.60.0", ahead_s: float = 0, gpus: float = 2, text: str | None = None, elsewhere: str = ""
) -> Iterator[str]:
    """Address of one that wants TOKEN; its clock stands at NOW and so many seconds."""
    node: dict[str, Any] = {"state": "ALIVE", "resources_total": {"CPU": 8.0, "GPU": gpus}}
    gone = {"state": "DEAD", "resources_total": {"GPU": 64.0}}
    answers = {
        "/api/version": {"version": "4", "ray_version": version, "ray_commit": "", "session_name": ""},
        "/api/v0/nodes": {"result": True, "data": {"result": {"total": 2, "result": [node, gone]}}},
    }

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            content = (text or json.dumps(answers.get(self.path.split("?")[0], {}))).encode() if allowed else b"{}"
            if elsewhere:
                self.send_response(302)
                self.send_header("Location", elsewhere + self.path)
            else:
                self.send_response(200 if allowed else 401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(NOW + timedelta(seconds=ahead_s), usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def looked_at(address: str, token: str | None = TOKEN, gpus: float = 0) -> dict[str, Finding]:
    return {found.what: found for found in examine(address, token, "2.60.0", gpus, lambda: NOW)}


def test_a_cluster_that_can_be_used_has_nothing_against_it() -> None:
    with dashboard(ahead_s=2) as address:
        found = looked_at(address, gpus=2)
    assert {name: finding.found for name, finding in found.items()} == {
        "cluster": "1 nodes", "cluster's Ray": "2.60.0", "cluster's clock": "2 s ahead", "cluster's GPUs": "2",
    }  # fmt: skip
    assert all(finding.usable for finding in found.values())


@pytest.mark.parametrize("token, told", [(None, "is not set"), ("another", "is not this cluster's")])
def test_a_token_that_is_not_the_clusters_is_told(token: str | None, told: str) -> None:
    with dashboard() as address:
        [finding] = looked_at(address, token).values()
    assert not finding.usable
    assert told in finding.note


def test_another_version_of_ray_is_told() -> None:
    with dashboard(version="2.48.0") as address:
        found = looked_at(address)
    assert [name for name, finding in found.items() if not finding.usable] == ["cluster's Ray"]
    assert "2.60.0 is installed here" in found["cluster's Ray"].note


@pytest.mark.parametrize("ahead_s, said", [(-7200, "7200 s behind"), (120, "120 s ahead")])
def test_a_clock_that_is_wrong_is_told(ahead_s: float, said: str) -> None:
    with dashboard(ahead_s=ahead_s) as address:
        found = looked_at(address)
        with_store = store_clock(address, lambda: NOW)
    assert [name for name, finding in found.items() if not finding.usable] == ["cluster's clock"]
    assert found["cluster's clock"].found == with_store.found == said
    assert not with_store.usable


def test_a_cluster_without_the_gpus_that_a_recipe_needs_is_told() -> None:
    recipe = load_recipe(ROOT / "k8s" / "overlays" / "prod" / "recipe.yaml")
    assert gpus_needed(recipe) == 4
    with dashboard(gpus=0) as address:
        found = looked_at(address, gpus=gpus_needed(recipe))
    assert [name for name, finding in found.items() if not finding.usable] == ["cluster's GPUs"]


def test_what_is_no_dashboard_is_told() -> None:
    with dashboard(text="<html>") as address:
        [finding] = looked_at(address).values()
    assert (finding.found, finding.usable) == ("unreachable", False)
    [finding] = looked_at(address).values()
    assert "URLError" in finding.note
    with pytest.raises(RecipeError, match="expected the dashboard's address"):
        looked_at("ray://somewhere:10001")


def test_a_token_goes_to_no_other_address() -> None:
    with dashboard() as other, dashboard(elsewhere=other) as address:
        [finding] = looked_at(address).values()
    assert finding.found == "refuses"  # by the other one, which was not told the token


@pytest.mark.parametrize("text", ["<html>", "{}", "[]"])
def test_an_address_that_is_no_dashboard_is_no_jobs_api(text: str) -> None:
    with dashboard(text=text) as address, pytest.raises(JobsUnavailable, match="does not answer"):
        JobsApi(address, TOKEN).jobs()


def test_the_command_says_so_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    monkeypatch.setenv("COLUMNS", "200")
    with dashboard() as address:
        done = CliRunner().invoke(app, ["doctor", "--cluster", address])
    assert done.exit_code == 1
    assert "RAY_AUTH_TOKEN is not this cluster's" in done.output
