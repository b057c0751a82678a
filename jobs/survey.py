"""What is in a source, before anything is made of it: counts, attributes, refusals, an example sheet, a first recipe.

python -m jobs.survey SOURCE [--sheet FILE] [--json FILE] [--recipe FILE] [--limit N] [--decode]

SOURCE is a folder, s3://bucket/prefix, the root of a DICOMweb service, or a recipe (.yaml) with --set KEY=VALUE.
"""

from __future__ import annotations

import argparse
import json
import pickle
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data
from rich.text import Text

from jobs.cluster import SPARE_CPUS, connected
from scanloom import console
from scanloom.audit.contact_sheet import SheetRow, Tile, contact_sheet
from scanloom.recipe import DicomWebSource
from scanloom.scans.recognise import Recognised, is_recipe, recognise
from scanloom.scans.sources import files_per_unit, list_files
from scanloom.scans.starter_recipe import starter_recipe
from scanloom.scans.survey import Look, Picture, Survey, merged, picture_units, survey_units
from scanloom.scans.survey_report import remarks, report, tables
from scanloom.scans.units import Unit, cut
from scanloom.store import Store

# A driver that tracks more tasks than this spends its time on them; units then share a task.
MOST_TASKS = 2000
# A PACS gives no headers alone: every instance of a series is fetched.
MOST_SERIES = 100
PICTURES_A_ROW = 8


def survey(arguments: argparse.Namespace) -> None:
    """Look at the source and tell what is there."""
    source = recognise(arguments.source, arguments.overrides)
    look = _look(source, arguments)
    files = list_files(look.source, look.schema)
    units = cut(files[: look.most_files], files_per_unit(look.source), 0)
    with connected():
        found = _surveyed(units, look)
        pictures = list(_pictures(units, found, look)) if arguments.sheet else []
    told = report(found, look, source.columns, len(files))
    for table in tables(told):
        console.result_table(table.title, table.columns, table.rows)
    for remark in (*source.remarks, *remarks(told, look)):
        console.show(Text(f"- {remark}"))
    recipe = starter_recipe(found, look)
    if arguments.json:
        _write(arguments.json, json.dumps(told | {"recipe": recipe}, indent=2).encode(), "the same as data")
    if arguments.sheet:
        _write(arguments.sheet, sheet(pictures, found), "examples: REAL PATIENTS, to be kept as the source is")
    if arguments.recipe:
        _write(arguments.recipe, recipe.encode(), f"a recipe to begin with: scanloom prepare {arguments.recipe}")
    elif not is_recipe(arguments.source):
        console.show(Text(f"\n{recipe}"))


def _look(source: Recognised, arguments: argparse.Namespace) -> Look:
    most = arguments.limit or (MOST_SERIES if isinstance(source.source, DicomWebSource) else None)
    # Patients are counted under a key that is forgotten: nothing told here can be joined with a corpus.
    key = secrets.token_bytes(32)
    return Look(
        source.source, source.schema, source.decode, key, source.seed, most, arguments.decode, arguments.examples
    )


def _surveyed(units: Sequence[Unit], look: Look) -> Survey:
    """Every unit is looked at by a task on Ray's workers, which returns counts."""
    rows: ray.data.Dataset = ray.data.from_items(
        [{"unit": unit.model_dump_json()} for unit in units], override_num_blocks=min(len(units), MOST_TASKS)
    )
    work: Callable[..., Any] = survey_units
    done = rows.map_batches(work, batch_size=None, fn_kwargs={"look": look}, num_cpus=1, compute=_pool(len(units)))

    def arriving() -> Iterator[Survey]:
        with console.progress("look", len(units), "units") as advance:
            for row in done.iter_rows():
                part = pickle.loads(row["survey"])
                advance(row["units"], scans=part.scans)
                yield part

    return merged(arriving(), look.examples)


def _pictures(units: Sequence[Unit], found: Survey, look: Look) -> Iterator[Picture]:
    """The example scans that can be decoded, of different patients first."""
    wanted = found.examples[: 2 * look.examples]
    jobs = [
        {"unit": unit.model_dump_json(), "examples": pickle.dumps([e for e in wanted if e.unit == unit.index])}
        for unit in units
        if any(example.unit == unit.index for example in wanted)
    ]
    if not jobs:
        return
    rows: ray.data.Dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs))
    work: Callable[..., Any] = picture_units
    done = rows.map(work, fn_kwargs={"look": look}, num_cpus=1, compute=_pool(len(jobs)))
    made = {picture.example: picture for row in done.iter_rows() for picture in pickle.loads(row["pictures"])}
    yield from [made[example] for example in wanted if example in made][: look.examples]


def _pool(most: int) -> ray.data.TaskPoolStrategy:
    workers = max(1, int(ray.cluster_resources().get("CPU", 1)) - SPARE_CPUS)
    return ray.data.TaskPoolStrategy(size=min(workers, most))


def sheet(pictures: Sequence[Picture], found: Survey) -> bytes:
    tiles = [Tile(p.pixels, p.attributes, 8 * p.pixels.dtype.itemsize) for p in pictures]
    rows = [SheetRow("", tiles[at : at + PICTURES_A_ROW], ()) for at in range(0, len(tiles), PICTURES_A_ROW)]
    return contact_sheet(f"{len(tiles)} of {found.scans:,} scans, by lot: real patients", rows)


def _write(target: str, content: bytes, what: str) -> None:
    folder, slash, name = target.rpartition("/")
    Store(folder or slash or ".").write(name, content)
    console.show(Text(f"wrote {target}: {what}"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scanloom inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    for name in ("sheet", "json", "recipe"):
        parser.add_argument(f"--{name}", metavar="FILE")
    parser.add_argument("--limit", type=int, metavar="N", help="look at the first N files, and N of each archive")
    parser.add_argument("--examples", type=int, default=24, metavar="N", help="scans on the sheet")
    parser.add_argument("--decode", action="store_true", help="decode every scan, as prepare does")
    arguments = parser.parse_args(argv)
    return console.run(lambda: survey(arguments))


if __name__ == "__main__":
    sys.exit(main())
