"""How every job starts: its recipe from the command line, and the Ray cluster of RAY_ADDRESS or a new local one."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.data import DataContext

from scanloom import console
from scanloom.recipe import Recipe, load_recipe

# Credentials and endpoints that workers on other hosts need too.
FORWARDED = ("AWS_", "SCANLOOM_")


def run_recipe(work: Callable[[Recipe], None], job: str, summary: str, argv: Sequence[str] | None) -> int:
    """Exit code of a job that takes `RECIPE [--set KEY=VALUE ...]` and does `work` on the recipe."""
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{job}", description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a YAML recipe; jobs/recipes holds examples")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one value, such as generate.images=512; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    return console.run(lambda: work(load_recipe(arguments.recipe, arguments.overrides)))


@contextmanager
def connected() -> Iterator[None]:
    """A Ray session for the length of a job; a local cluster that it started ends with it."""
    env = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
    already = ray.is_initialized()
    if not already:
        # Ray Data lists and reads files in tasks that ask for a CPU each. Where training workers hold every core, those
        # tasks would wait for ever: a local cluster offers two more than it has, for work that mostly waits for I/O.
        cpus = None if os.environ.get("RAY_ADDRESS") else (os.cpu_count() or 1) + 2
        ray.init(
            num_cpus=cpus,
            runtime_env={"env_vars": env},
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
