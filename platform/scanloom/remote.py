"""Jobs on another cluster, at the command line: `scanloom submit`, `scanloom jobs list|status|follow|cancel`."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from scanloom import console
from scanloom.cluster import auth_token
from scanloom.errors import RecipeError

if TYPE_CHECKING:  # Ray, which takes a second to import
    from scanloom.ray_jobs import Job, JobsApi, JobState

INTERRUPTED = 130
RecipePlace = Annotated[str, typer.Argument(help="A YAML recipe, a file or s3://bucket/key.", metavar="RECIPE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value; may be repeated.")
]
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's dashboard: http://host:8265."),
]
_Job = Annotated[str, typer.Argument(help="prepare, encode, finetune, generate, audit, ...", metavar="JOB")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="As `scanloom jobs list` shows it.")]

jobs = typer.Typer(help="Jobs on a Ray cluster: what runs there, its log, its end.", no_args_is_help=True)


def submit(
    context: typer.Context,
    job: _Job,
    recipe: RecipePlace,
    address: Address,
    overrides: Overrides = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print its id and leave it to itself.")] = False,
) -> None:
    """Run a job on a Ray cluster and follow it; again, to go on after any interruption. Ctrl-C asks what to do.

    Options that are not known here go to the job. The exit code is the job's.
    """
    send(job, recipe, overrides or [], context.args, address, detach=detach)


def send(
    job: str, recipe: str, overrides: list[str], options: list[str], address: str, *, detach: bool = False
) -> NoReturn:
    """Submit a job, follow it unless told not to, and exit with its code."""
    from scanloom import submission

    api = _api(address)
    name, started = submission.send(submission.Submission.of(job, recipe, overrides, options), api)
    console.LOG.info("%s: %s", name, f"sent to {address}" if started else "runs there already; following it")
    if detach:
        print(name)  # noqa: T201
        raise typer.Exit
    _follow(api, name, address)


def render(
    context: typer.Context,
    job: _Job,
    recipe: RecipePlace,
    image: Annotated[str, typer.Option(metavar="IMAGE", help="scanloom's, with a version.")],
    overrides: Overrides = None,
    namespace: Annotated[str, typer.Option(metavar="NAME", help="Of Kubernetes.")] = "scanloom",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the RayJob; default: of what it does.")] = None,
    queue: Annotated[str | None, typer.Option(metavar="NAME", help="Of Kueue, for it to wait in.")] = None,
) -> None:
    """A job as YAML for Kubernetes: the RayJob and its recipe, to be committed or piped to kubectl apply.

    Options that are not known here go to the job.
    """
    from scanloom import rayjob

    where = rayjob.Place(image, namespace, name, queue)
    print(rayjob.render(job, recipe, overrides or [], context.args, where), end="")  # noqa: T201


@jobs.command(name="list")
def list_jobs(
    address: Address, every: Annotated[bool, typer.Option("--all", help="Those that have ended, too.")] = False
) -> None:
    """Jobs that wait or run; with --all, all that the cluster remembers."""
    found = [job for job in _api(address).jobs() if every or job.state.live]
    columns = ("id", "job", "recipe", "state", "begun", "makes")
    console.result_table(f"jobs at {address}", columns, [_row(job) for job in found])


@jobs.command()
def status(job: _Id, address: Address) -> None:
    """Where a job stands; exit 0 where it lives or has ended well, 1 where not."""
    state = _known(_api(address).state(job), job, address)
    rows = [("state", said(state)), ("exit code", state.exit_code), ("ended", _time(state.ended))]
    if not state.live and state.message:
        rows.append(("told", state.message.strip()))
    console.result_table(job, ("what", "found"), [(what, "" if found is None else found) for what, found in rows])
    if not state.live and state.exit_code != 0:
        raise typer.Exit(1)


@jobs.command()
def follow(job: _Id, address: Address) -> None:
    """A job's log from its beginning until it ends; the exit code is the job's. Ctrl-C asks what to do."""
    api = _api(address)
    _known(api.state(job), job, address)
    _follow(api, job, address)


@jobs.command()
def cancel(job: _Id, address: Address) -> None:
    """Have a job stopped. What it had committed stays: the same `scanloom submit` goes on from there."""
    api = _api(address)
    if not _known(api.state(job), job, address).live:
        console.LOG.info("%s: had ended before", job)
        return
    console.LOG.info("%s: %s", job, said(_known(_stopped(api, job), job, address)))


def said(state: JobState) -> str:
    """Where a job stands, in a word."""
    if state.live:
        return "runs" if state.running else "waits"
    if state.stopped:
        return "cancelled"
    if not state.started:
        return "no room"
    return "done" if state.exit_code == 0 else "failed"


def exit_code(state: JobState) -> int:
    """The job's, as a shell would tell it: of a driver that a signal ended, 128 and the signal's number."""
    if state.stopped:
        return INTERRUPTED
    if state.exit_code is None:
        return 1
    return state.exit_code if state.exit_code >= 0 else 128 - state.exit_code


def _follow(api: JobsApi, name: str, address: str) -> NoReturn:
    try:
        state = _known(api.follow(name, _print), name, address)
    except KeyboardInterrupt:
        _interrupted(api, name, address)
    if exit_code(state) and state.exit_code is None:
        console.LOG.error("%s: %s: %s", name, said(state), " ".join(state.message.split())[:500])
    raise typer.Exit(exit_code(state))


def _interrupted(api: JobsApi, name: str, address: str) -> NoReturn:
    if sys.stdin.isatty() and _wants_to_cancel(name):
        _stopped(api, name)
        console.LOG.info("%s: is stopped; the same command goes on with it later", name)
    else:
        told = "%s: goes on without this terminal; scanloom jobs follow|cancel %s --address %s"
        console.LOG.info(told, name, name, address)
    raise typer.Exit(INTERRUPTED)


def _stopped(api: JobsApi, name: str) -> JobState | None:
    """Where the job has ended: until then the same name would be joined, not begun anew."""
    api.stop(name)
    return api.follow(name, lambda _: None)


def _wants_to_cancel(name: str) -> bool:
    try:
        return typer.confirm(f"cancel {name}? (no: it goes on without this terminal)", default=False, err=True)
    except (typer.Abort, KeyboardInterrupt):
        return False


def _print(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201


def _api(address: str) -> JobsApi:
    if not address.startswith(("http://", "https://")):
        raise RecipeError(f"--address {address}: expected the dashboard's address, such as http://127.0.0.1:8265")
    from scanloom.ray_jobs import JobsApi

    logging.getLogger("ray").setLevel(logging.WARNING)  # importing it made it say every closed connection
    return JobsApi(address, auth_token())


def _known(state: JobState | None, name: str, address: str) -> JobState:
    if state is None:
        raise RecipeError(f"{address} knows of no job {name}; scanloom jobs list --all shows those that it does")
    return state


def _row(job: Job) -> tuple[str, ...]:
    told = job.metadata
    return (
        job.name, told.get("job", ""), told.get("recipe", ""), said(job.state), _time(job.begun), told.get("makes", "")
    )  # fmt: skip


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
