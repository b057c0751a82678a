from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from scanloom import console
from scanloom.errors import ArtefactError, RecipeError, ScanError, ScanloomError, StoreError


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def _fail(error: BaseException) -> Any:
    raise error


# --- errors ---------------------------------------------------------------------------------------------------


def test_a_known_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(lambda: _fail(RecipeError("fix\nthis"))) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: fix this"


def test_a_failure_of_a_store_that_may_pass_has_an_exit_code_of_its_own() -> None:
    assert console.run(lambda: _fail(StoreError("down", retryable=True))) == console.TRY_AGAIN == 75
    assert console.run(lambda: _fail(StoreError("no such bucket"))) == 2


def test_an_unknown_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        console.run(lambda: _fail(ZeroDivisionError()))


def test_an_interrupt_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(lambda: _fail(KeyboardInterrupt())) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_success_is_exit_code_0() -> None:
    assert console.run(lambda: None) == 0


def test_a_known_error_is_found_below_the_one_it_caused() -> None:
    known, wrapped = StoreError("full"), RuntimeError("wrapped")
    wrapped.__cause__ = known
    assert console.root_cause(wrapped) is known
    assert console.root_cause(RuntimeError("alone")) is None


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert console.root_cause(first) is None


@pytest.mark.ray
@pytest.mark.parametrize(
    "error",
    [RecipeError("recipe"), ScanError("code", "tag", "reason"), StoreError("busy", retryable=True), ArtefactError("a")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_crossed_ray_is_found_whole(ray_cluster: None, error: ScanloomError) -> None:
    import ray

    task = ray.remote(_fail)
    with pytest.raises(Exception) as wrapped:
        ray.get(task.remote(error))
    found = console.root_cause(wrapped.value)
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "retryable", None) == getattr(error, "retryable", None)


@pytest.mark.ray
@pytest.mark.parametrize("error", [StoreError("s3://b/k: full"), ScanError("code", "tag", "reason"), ValueError("x")])
def test_an_error_that_crossed_ray_data_is_found_by_its_traceback(ray_cluster: None, error: Exception) -> None:
    import ray.data

    def refuse(row: dict[str, Any]) -> dict[str, Any]:
        raise error

    with pytest.raises(Exception) as wrapped:
        ray.data.range(1).map(refuse).take_all()
    found = console.root_cause(wrapped.value)
    assert str(found) == (str(error) if isinstance(error, ScanloomError) else "None")


# --- progress and tables --------------------------------------------------------------------------------------


def test_progress_off_a_terminal_is_log_lines_with_rate_and_rest(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scanloom")
    with console.progress("write", 10, "shards", done=4, every_s=0) as advance:
        advance(3, loss=0.5)
        advance(3)
    first, last = caplog.messages
    assert first.startswith("write 7/10 shards, ")
    assert first.endswith("s left loss 0.5")
    assert last.startswith("write 10/10 shards")


def test_progress_is_not_a_line_per_item(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "scanloom")
    with console.progress("write", 1000, "shards", every_s=3600) as advance:
        for _ in range(1000):
            advance()
    assert len(caplog.messages) == 1


def test_reports_move_progress_to_their_step_also_after_a_resume() -> None:
    moves: list[tuple[int, bool, dict[str, float]]] = []
    receive = console.step_follower(lambda n, *, rebase, **figures: moves.append((n, rebase, figures)))
    for step in (10, 20, 15, 25):
        receive({"step": step, "loss": 0.5})
    assert [(n, jump) for n, jump, _ in moves] == [(10, True), (10, False), (-5, True), (10, False)]
    assert moves[0][2] == {"loss": 0.5}


def test_a_resumed_distance_does_not_count_in_the_rate(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "scanloom")
    clock = iter((0.0, 100.0, 102.0, 104.0, 106.0))
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.progress("train", 1000, "steps", every_s=0) as advance:
        receive = console.step_follower(advance)
        for step in (900, 910, 905, 925):
            receive({"step": step})
    assert caplog.messages == [
        "train 900/1000 steps",
        "train 910/1000 steps, 5/s, 18 s left",
        "train 905/1000 steps",
        "train 925/1000 steps, 10/s, 8 s left",
    ]


def test_a_piped_table_keeps_long_uris_whole_and_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    uri = "s3://bucket/" + "x" * 400
    console.result_table("made", ("where", "what"), [(uri, "[bold]not markup[/bold]")])
    printed = capsys.readouterr().out
    assert uri in printed
    assert "[bold]not markup[/bold]" in printed


_BAR = """
from scanloom.console import progress
with progress("write", 4, "shards") as advance:
    advance(2, rebase=True)
    advance(2, loss=0.25)
"""


def test_progress_on_a_terminal_is_a_bar_with_rate_and_figures() -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", _BAR], stderr=follower, env=environment)
    os.close(follower)
    seen = b""
    try:
        while data := os.read(leader, 4096):
            seen += data
    except OSError:  # the terminal closes with its last writer
        pass
    os.close(leader)
    assert process.wait(30) == 0
    text = seen.decode()
    assert "4/4" in text
    assert "/s" in text
    assert "loss 0.25" in text
