"""What a person sees of a job: a progress bar with rate and time left, a result table, one-line errors."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table
from rich.text import Text

from scanloom.errors import ArtefactError, RecipeError, ScanloomError, StoreError

LOG = logging.getLogger("scanloom")
Advance = Callable[[int], None]


@contextmanager
def progress(
    what: str, total: int, unit: str, *, done: int = 0, every_s: float = 10.0
) -> Iterator[Callable[..., None]]:
    """A callable `advance(n, **figures)`: a bar with rate and ETA on a terminal, else a log line each `every_s`.

    `advance(n, rebase=True)` is a jump: the rate counts from there.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(what, total, unit, done, console) as advance:
            yield advance
        return
    started = last = time.monotonic()
    count = done

    def advance_logged(n: int = 1, *, rebase: bool = False, **figures: float) -> None:
        nonlocal started, done, count, last
        count += n
        now = time.monotonic()
        if rebase:
            started, done = now, count
        if now - last >= every_s or count >= total:
            last = now
            pace = _pace(count - done, now - started, total - count)
            LOG.info("%s %d/%d %s%s%s", what, count, total, unit, pace, _figures(figures))

    yield advance_logged


@contextmanager
def _bar(what: str, total: int, unit: str, done: int, console: Console) -> Iterator[Callable[..., None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit + "{task.fields[figures]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        Remaining(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, figures="", rate="")
        started, count = time.monotonic(), 0

        def advance(n: int = 1, *, rebase: bool = False, **figures: float) -> None:
            nonlocal started, count
            if rebase:
                started, count = time.monotonic(), 0
                bar.reset(task, completed=int(bar.tasks[0].completed) + n, figures=_figures(figures), rate="")
                return
            count += n
            rate = count / max(time.monotonic() - started, 1e-9)
            bar.update(task, advance=n, figures=_figures(figures), rate=f"{rate:.3g}/s")

        yield advance


def _pace(count: int, seconds: float, left: int) -> str:
    rate = count / max(seconds, 1e-9)
    return f", {rate:.3g}/s, {left / rate:.0f} s left" if count > 0 else ""


def _figures(figures: Mapping[str, float]) -> str:
    return "".join(f" {name} {value:.4g}" for name, value in figures.items())


def step_follower(advance: Callable[..., None]) -> Callable[[Mapping[str, float]], None]:
    """A receiver of training reports that moves a progress bar to the reported `step`.

    The first step of a resumed run, and a step back after a restart, are jumps that say nothing of the rate.
    """
    reached: int | None = None

    def receive(report: Mapping[str, float]) -> None:
        nonlocal reached
        figures = {name: value for name, value in report.items() if name != "step"}
        step = int(report["step"])
        advance(step - (reached or 0), rebase=reached is None or step < reached, **figures)
        reached = step

    return receive


def result_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print what a job made and where, to standard output."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(str(cell), overflow="fold") for cell in row))
    show(table)


def show(content: RenderableType) -> None:
    """Print to standard output; what is piped is never wrapped, so that a next command can read its URIs."""
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(content)


def log_to_stderr() -> None:
    """One line an event, on standard error."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s", force=True)
    for noisy in ("botocore", "boto3", "urllib3", "ray", "deepspeed", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # What Ray Data says of every run, and its own report of an error that reaches the user by way of `run`.
    for part in ("exceptions", "progress", "execution.streaming_executor", "execution.streaming_executor_state"):
        for module in (f"ray.data.{part}", f"ray.data._internal.{part}"):
            logging.getLogger(module).addFilter(_to_file_only)


def _to_file_only(record: logging.LogRecord) -> bool:
    # Ray Data's console handler leaves out records that are marked so; its log file keeps them.
    record.hide = True
    return True


TRY_AGAIN = 75
"""Exit code where a store failed in a way that may pass (EX_TEMPFAIL of sysexits.h)."""


def run(main: Callable[[], None]) -> int:
    """Exit code of `main`: 0, or 2 with one line on standard error where a ScanloomError ended it.

    TRY_AGAIN in place of 2 where the same command may succeed later by itself. An error that crossed a Ray worker is
    found under its wrappers. Anything else passes through with its traceback.
    """
    log_to_stderr()
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)  # noqa: T201
        return 130
    except Exception as error:
        known = root_cause(error)
        if known is None:
            raise
        print("error:", " ".join(str(known).split()), file=sys.stderr)  # noqa: T201
        return TRY_AGAIN if isinstance(known, StoreError) and known.retryable else 2
    return 0


def root_cause(error: BaseException) -> ScanloomError | None:
    """The ScanloomError at the bottom of an exception, also under Ray's task and training wrappers; None if none."""
    queue: list[BaseException] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        # Ray's dual-class errors are instances of the cause's class too, but their text is a traceback.
        if isinstance(current, ScanloomError) and not hasattr(current, "cause"):
            return current
        inner = [getattr(current, "cause", None), current.__cause__, current.__context__]
        inner += list(getattr(current, "worker_failures", {}).values())
        inner += [getattr(current, "_base_exception", None), getattr(current, "controller_failure", None)]
        queue += [e for e in inner if isinstance(e, BaseException)]
    return _named_in(str(error))


# The last line of a traceback that one of our errors ended.
_ENDING = re.compile(r"^scanloom\.errors\.(\w+): (.+)$", re.MULTILINE)


def _named_in(traceback: str) -> ScanloomError | None:
    # Ray Data sends its wrapper without the cause: what is left of that is the worker's traceback, innermost first.
    ending = _ENDING.search(traceback)
    if ending is None:
        return None
    if ending[1] == StoreError.__name__:
        # Whether it may pass is not told. A store that had let the job begin is more likely down than wrong.
        return StoreError(ending[2], retryable=True)
    kinds: dict[str, type[ScanloomError]] = {kind.__name__: kind for kind in (RecipeError, ArtefactError)}
    return kinds.get(ending[1], ScanloomError)(ending[2])
