"""The whole system on phantoms: an S3 server of its own, every job in turn, an audit, and a look at what came out.

python -m jobs.demo [--folder demo] [--set KEY=VALUE ...]     run it again to go on after an interruption
python -m jobs.demo --store-only                              only serve the folder's store, to open its outputs
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from scanloom import console
from scanloom.artefact import open_artefact
from scanloom.audit.report import PAGE
from scanloom.audit.side_by_side import SHEET, leave
from scanloom.embedded_s3 import EmbeddedS3
from scanloom.errors import RecipeError
from scanloom.overview import how_many
from scanloom.recipe import DicomSource, Recipe, load_recipe
from scanloom.scans.phantom_archive import phantom_archive
from scanloom.store import Store

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
# Phantoms are nobody, so this key keeps no secret. Real scans take one that only their owner knows.
DEMO_KEY = "phantoms-are-nobody-and-this-key-keeps-no-secret"
BAD_FILES = 5


def demo(options: argparse.Namespace) -> None:
    """Do every step that is not done yet, then measure, draw and tell."""
    recipe = load_recipe(RECIPE, options.overrides)
    buckets = _buckets(recipe)
    with EmbeddedS3(options.folder / "s3") as s3:
        _enter(s3, options.folder, buckets)
        if options.store_only:
            print(f"S3 at {s3.endpoint} until Ctrl-C; in another shell: source {options.folder}/env", flush=True)  # noqa: T201
            with suppress(KeyboardInterrupt):
                signal.pause()
        else:
            _run_all(recipe, options)


def _buckets(recipe: Recipe) -> set[str]:
    """The buckets of the store and of the scans. RecipeError where the demo's S3 server cannot hold them."""
    source = recipe.prepare.source if recipe.prepare else None
    if not isinstance(source, DicomSource):
        raise RecipeError("the demo puts its scans into prepare.source, as DICOM in tar shards; leave its kind dicom")
    for uri in (recipe.store, source.uri):
        if not uri.startswith("s3://"):
            raise RecipeError(f"{uri}: the demo brings an S3 server of its own; set an s3://BUCKET/FOLDER instead")
    return {uri.removeprefix("s3://").split("/")[0] for uri in (recipe.store, source.uri)}


def _enter(s3: EmbeddedS3, folder: Path, buckets: set[str]) -> None:
    """Point this process and its children to the server, and leave a file that does so for a shell."""
    environment = s3.environment | {"SCANLOOM_PSEUDONYM_KEY": os.environ.get("SCANLOOM_PSEUDONYM_KEY", DEMO_KEY)}
    os.environ.update(environment)
    file = folder / "env"
    file.touch(mode=0o600)
    file.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()))
    for bucket in buckets:
        s3.create_bucket(bucket)


def _run_all(recipe: Recipe, options: argparse.Namespace) -> None:
    started = began = time.monotonic()
    dataset = recipe.generate.dataset if recipe.generate else "dataset"
    steps = {
        "prepare": ["corpus"], "encode": ["autoencoder", "latents"], "finetune": ["generator"], "generate": [dataset],
        "audit": [f"{dataset}-audit"],
    }  # fmt: skip
    scans = _put_scans(recipe, options.scans)
    rows = [("scans", scans, f"{options.scans} scans, {BAD_FILES} bad files", _since(began))]
    for job, names in steps.items():
        began = time.monotonic()
        _run_job(job, options.overrides)
        made = [open_artefact(recipe.uri(name)) for name in names]
        # A job's time stands beside the last artefact that it made.
        rows += [(a.manifest.kind, a.uri, how_many(a), "" if a is not made[-1] else _since(began)) for a in made]
    began = time.monotonic()
    corpus, images, audit = (open_artefact(recipe.uri(name)) for name in ("corpus", dataset, f"{dataset}-audit"))
    title = f"{recipe.name}: phantoms, here the real scans, and what was generated from them"
    said = leave(corpus, images, audit, options.folder, title)
    rows.append(("pictures, report", str(options.folder), f"{SHEET}, {PAGE}", _since(began)))
    console.result_table(f"demo: {_since(started)} s in all", ("what", "where", "how many", "seconds"), rows)
    command = "scanloom" if shutil.which("scanloom") else os.path.relpath(Path(sys.executable).with_name("scanloom"))
    folder = shlex.quote(str(options.folder))
    opening = [f"{command} demo --folder {folder} --store-only", 'wait for its line "S3 at ..."; in another shell:']
    opening += [f"source {folder}/env", *(f"{command} show {uri}" for _, uri, _, _ in rows[1:-1])]
    print(said, "to open what it made:", *opening, sep="\n  ")  # noqa: T201


def _put_scans(recipe: Recipe, scans: int) -> str:
    """Where the phantom scans are: DICOM tar shards with fake patient data and some bad files."""
    assert recipe.prepare is not None
    assert isinstance(recipe.prepare.source, DicomSource)  # `_buckets` refuses others
    store, size_px = Store(recipe.prepare.source.uri), recipe.prepare.size_px
    with console.progress("phantoms", scans, "scans") as advance:
        phantom_archive(store, scans, seed=recipe.seed, size_px=size_px, bad_files=BAD_FILES, wrote=advance)
    return store.uri


def _run_job(job: str, overrides: Sequence[str]) -> None:
    """Run one job as a person would; its exit code, if it fails, is the demo's."""
    command = [sys.executable, "-m", f"jobs.{job}", str(RECIPE), *(f"--set={override}" for override in overrides)]
    process = subprocess.Popen(command, cwd=RECIPE.parents[2])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # The terminal sent Ctrl-C to the job too: it puts its Ray session away before it ends.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        raise
    finally:
        process.kill()
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"{job} {how}; run the demo again to go on from there", file=sys.stderr)  # noqa: T201
        raise SystemExit(128 - code if code < 0 else code)


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="holds the store and the contact sheet")
    parser.add_argument("--scans", type=int, default=1024, help="phantom scans to start from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--store-only", action="store_true", help="serve the store of an earlier run, nothing else")
    options = parser.parse_args(argv)
    return console.run(lambda: demo(options))


if __name__ == "__main__":
    sys.exit(main())
