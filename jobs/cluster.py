"""How every job starts: its recipe from the command line, and the Ray cluster of RAY_ADDRESS or a new local one."""

from __future__ import annotations

import argparse
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

import ray
from ray.data import DataContext

from scanloom import console
from scanloom.errors import RecipeError
from scanloom.recipe import Recipe
from scanloom.stored_recipe import recipe_at

# Credentials, endpoints and the pseudonym key, which workers on other hosts need too.
FORWARDED = ("AWS_", "SCANLOOM_")
# Ray Data lists and reads files in tasks that ask for a CPU each. Where training workers hold every core, those tasks
# would wait for ever: a local cluster offers two more than it has, for work that mostly waits for I/O.
SPARE_CPUS = 2

T = TypeVar("T")


def recipe_parser(job: str, summary: str) -> argparse.ArgumentParser:
    """What reads `RECIPE [--set KEY=VALUE ...]`, as `recipe` and `overrides`; a job may add options of its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{job}", description=summary, formatter_class=argparse.RawDescriptionHelpFormatter,
        # Whoever checks a command before it is sent to a cluster looks for options by their names.
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("recipe", help="a YAML recipe, a file or s3://bucket/key; jobs/recipes holds examples")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one value, such as generate.images=512; may be repeated",
    )  # fmt: skip
    return parser


def run_recipe(work: Callable[[Recipe], None], job: str, summary: str, argv: Sequence[str] | None) -> int:
    """Exit code of a job that takes `RECIPE [--set KEY=VALUE ...]` and does `work` on the recipe."""
    arguments = recipe_parser(job, summary).parse_args(argv)
    return console.run(lambda: work(recipe_at(arguments.recipe, arguments.overrides)))


@contextmanager
def connected() -> Iterator[None]:
    """A Ray session for the length of a job; a local cluster that it started ends with it."""
    already = ray.is_initialized()
    if not already:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            # Without an address Ray would join whatever cluster somebody started on this machine.
            address=address or "local",
            num_cpus=None if address else (os.cpu_count() or 1) + SPARE_CPUS,
            # What a cluster of our own starts inherits the environment.
            runtime_env={"worker_process_setup_hook": _environment(), "env_vars": _niceness()} if address else None,
            log_to_driver=False,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        if not already:
            ray.shutdown()


def _environment() -> Callable[[], None]:
    """What a worker of another cluster does first: it takes over this process's credentials and settings.

    As a function, not as the `env_vars` of a runtime environment: those Ray writes into its nodes' logs, in clear.
    """
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    return lambda: os.environ.update(forwarded)


def _niceness() -> dict[str, str]:
    """Workers of another cluster run with this driver's niceness where it has one; Ray's default is 15 for all."""
    own = os.nice(0)
    return {"RAY_worker_niceness": str(own)} if own > 0 else {}


def require_room(cpus: int, gpus: float, what: str) -> None:
    """Refuse what could never start beside one task that reads or writes; a cluster of RAY_ADDRESS may grow.

    `what` names the recipe's keys and numbers, as in "finetune.workers 8 x 1 CPUs".
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    cpus_there, gpus_there = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    if cpus > cpus_there - 1:
        cores = max(cpus_there - SPARE_CPUS, 1)
        raise RecipeError(f"{what}: this machine has {cores:g} CPUs; set fewer, or RAY_ADDRESS to a cluster")
    if gpus > gpus_there:
        raise RecipeError(
            f"{what}: needs {gpus:g} GPUs, this machine has {gpus_there:g}; set fewer, or none to run on CPUs"
        )


def interruptible(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread of its own, so that Ctrl-C reaches this one as KeyboardInterrupt.

    In the main thread Ray Train's fit answers Ctrl-C itself, by waiting without end for its controller to abort.
    """
    done: Future[T] = Future()

    def work_and_tell() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised in the waiting thread
            done.set_exception(error)

    threading.Thread(target=work_and_tell, name="work", daemon=True).start()
    return done.result()
