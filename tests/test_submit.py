"""Jobs sent to a cluster: once, followed to their end, cancelled, gone on with; and what is refused to be sent."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from scanloom import ray_jobs
from scanloom.artefact import open_artefact
from scanloom.cli import app
from scanloom.cluster import auth_token
from scanloom.errors import RecipeError
from scanloom.ray_jobs import Job, JobState
from scanloom.remote import exit_code, said
from scanloom.store import Store
from scanloom.stored_recipe import content_at, recipe_at
from scanloom.submission import LARGEST_RECIPE, Submission, send
from tests.remote_cluster import ROOT, RemoteCluster

LIVE, DONE = JobState(live=True, running=True), JobState(live=False, exit_code=0)
LONGEST_S = 120.0
TREE: dict[str, Any] = {
    "name": "Trial_7",
    "store": "s3://bucket/trial",
    "attributes": [{"name": "sex", "kind": "category", "values": ["F", "M"], "source": "PatientSex"}],
    "generate": {"images": 8},
}


@dataclass
class FakeCluster:
    """Remembers what it was sent."""

    there: list[Job] = field(default_factory=list)
    rival: bool = False
    """Another is quicker with each name."""

    def jobs(self) -> list[Job]:
        return self.there

    def state(self, name: str) -> JobState | None:
        return next((job.state for job in self.there if job.name == name), None)

    def submit(self, name: str, entrypoint: str, *, metadata: dict[str, str] | None = None) -> bool:
        self.there.append(Job(name, LIVE, metadata or {}))
        return not self.rival

    def end(self, state: JobState) -> None:
        self.there = [Job(job.name, state, job.metadata) for job in self.there]


def recipe(folder: Path, **changes: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(TREE | changes), encoding="utf-8")
    return str(file)


# --- what is sent ---------------------------------------------------------------------------------------------


def test_the_recipe_travels_inside_the_command_and_is_read_as_it_was(tmp_path: Path) -> None:
    place = recipe(tmp_path)
    sent = Submission.of("generate", place, ["generate.images=9"], ["--dry", "it's"])
    exec_, *words = shlex.split(sent.entrypoint)
    assert (exec_, words[:3], words[4:]) == (
        "exec", ["python", "-m", "jobs.generate"], ["--set", "generate.images=9", "--dry", "it's"],
    )  # fmt: skip
    assert recipe_at(words[3], [words[5]]) == recipe_at(place, ["generate.images=9"]) == sent.recipe
    assert sent.metadata["makes"] == "s3://bucket/trial/dataset"
    with pytest.raises(RecipeError, match="that was sent along is damaged"):
        recipe_at(words[3] + "*")
    with pytest.raises(RecipeError, match="recipe sent along: top level: unknown key 'naem'"):
        recipe_at(words[3], ["naem=x"])


def test_a_name_says_what_is_done_and_not_how_it_is_written(tmp_path: Path) -> None:
    place = recipe(tmp_path)
    plain = Submission.of("generate", place).name
    assert re.fullmatch(r"generate-trial-7-[0-9a-f]{10}", plain)
    with (tmp_path / "recipe.yaml").open("a", encoding="utf-8") as file:
        file.write("# a remark\n")
    assert Submission.of("generate", place, ["generate.images=8"]).name == plain
    others = [
        Submission.of("generate", place, ["generate.images=9"]),
        Submission.of("audit", place),
        Submission.of("generate", place, [], ["--locate", "0:1"]),
    ]
    assert len({plain, *(other.name for other in others)}) == 4


def test_what_no_other_machine_could_run_or_should_see_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'generat' is no job"):
        Submission.of("generat", recipe(tmp_path))
    with pytest.raises(RecipeError, match="store runs is a folder beside whoever runs the job"):
        Submission.of("generate", recipe(tmp_path, store="runs"))
    large = tmp_path / "large.yaml"
    large.write_text(Path(recipe(tmp_path)).read_text() + "#" * LARGEST_RECIPE)
    with pytest.raises(RecipeError, match="put it into the store and name it there"):
        Submission.of("prepare", str(large))


PACS = {"source": {"kind": "dicomweb", "uri": "https://me:hunter2@pacs.example.com/dicom-web"}, "size_px": 64}
SECRETS: tuple[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]], ...] = (
    ({"prepare": PACS}, (), ()),
    ({"store": "s3://AKIA:hun/ter2@bucket/x"}, (), ()),
    ({"store": "s3://bucket/x?secret_key=hunter2"}, (), ()),
    ({}, ("store=s3://AKIA:hunter2@bucket/x",), ()),
    ({}, (), ("--sign-with", "curl -H 'X-Vault-Token: hunter2' https://vault")),
    ({}, (), ("--to", "s3://AKIA:hunter2@bucket/x")),
    ({}, (), ("--api-key=hunter2",)),
)


@pytest.mark.parametrize("changes, overrides, options", SECRETS)
def test_a_secret_is_not_sent(
    tmp_path: Path, changes: dict[str, Any], overrides: tuple[str, ...], options: tuple[str, ...]
) -> None:
    with pytest.raises(RecipeError, match="would keep in its logs") as told:
        Submission.of("generate", recipe(tmp_path, **changes), overrides, options)
    assert "hunter2" not in str(told.value)


def test_a_release_takes_its_policy_along_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = recipe(tmp_path)
    (tmp_path / "policy.yaml").write_text("name: hospital\ntarget: research\n", encoding="utf-8")
    there = ["--key", "/etc/scanloom-release/key.pem", "--to", "s3://out/a"]
    sent = Submission.of("release", place, [], ["--policy=policy.yaml", *there])
    assert sent.options[0] == "--policy"
    assert content_at(sent.options[1]) == (tmp_path / "policy.yaml").read_bytes()
    assert sent.options[2:] == tuple(there)
    assert sent.makes == "s3://out/a"
    with pytest.raises(RecipeError, match="keys are not sent"):
        Submission.of("release", place, [], ["--policy", "s3://b/policy.yaml", "--key", "key.pem"])
    cluster = FakeCluster()
    send(sent, cluster)
    other = ["--policy", "s3://b/policy.yaml", *there[:3]]
    send(Submission.of("release", place, [], [*other, "s3://out/b"]), cluster)
    with pytest.raises(RecipeError, match="s3://out/a is being made by"):
        send(Submission.of("release", place, [], [*other, "s3://out/a"]), cluster)


@pytest.mark.s3
def test_a_recipe_in_a_store_is_named_there(store_uri: str) -> None:
    Store(store_uri).write("recipe.yaml", yaml.safe_dump(TREE).encode())
    assert Submission.of("generate", f"{store_uri}/recipe.yaml").sent == f"{store_uri}/recipe.yaml"


def test_every_job_can_be_sent() -> None:
    from scanloom.submission import JOBS

    programs = {file.stem for file in (ROOT / "jobs").glob("*.py") if "__main__" in file.read_text(encoding="utf-8")}
    assert programs - {"demo", "embed", "survey"} <= set(JOBS)


# --- once -----------------------------------------------------------------------------------------------------


def test_a_job_that_runs_is_joined_and_one_that_ended_is_followed_by_another(tmp_path: Path) -> None:
    cluster, sent = FakeCluster(), Submission.of("generate", recipe(tmp_path))
    assert send(sent, cluster) == (f"{sent.name}-1", True)
    assert send(sent, cluster) == (f"{sent.name}-1", False)
    cluster.end(JobState(live=False, exit_code=75))
    assert send(sent, cluster) == (f"{sent.name}-2", True)
    cluster.end(DONE)
    cluster.rival = True
    assert send(sent, cluster) == (f"{sent.name}-3", False)


def test_two_recipes_do_not_make_one_artefact_at_once(tmp_path: Path) -> None:
    cluster, place = FakeCluster(), recipe(tmp_path)
    first, _ = send(Submission.of("generate", place), cluster)
    other = Submission.of("generate", place, ["generate.engines=2"])
    with pytest.raises(RecipeError, match=f"is being made by the job {first} of another recipe"):
        send(other, cluster)
    send(Submission.of("audit", place), cluster)
    cluster.end(DONE)
    assert send(other, cluster) == (f"{other.name}-1", True)


# --- the command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state, word, code",
    [
        (DONE, "done", 0),
        (JobState(live=False, exit_code=75), "failed", 75),
        (JobState(live=False, exit_code=-9), "failed", 137),
        (JobState(live=False), "failed", 1),
        (JobState(live=False, started=False), "no room", 1),
        (JobState(live=False, exit_code=-15, stopped=True), "cancelled", 130),
        (JobState(live=True), "waits", 1),
        (LIVE, "runs", 1),
    ],
)
def test_the_end_of_a_job_is_a_word_and_an_exit_code(state: JobState, word: str, code: int) -> None:
    assert (said(state), exit_code(state)) == (word, code)


@pytest.mark.parametrize("command", [("submit", "generate", "r.yaml"), ("jobs", "list"), ("generate", "r.yaml")])
def test_an_address_that_is_none_is_told(command: tuple[str, ...]) -> None:
    told = CliRunner().invoke(app, [*command, "--address", "ray://head:10001"]).exception
    assert isinstance(told, RecipeError)
    assert "expected the dashboard's address" in str(told)


def test_the_token_is_found_where_ray_looks_for_it(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home\n")
    (tmp_path / "named").write_text("of a file\n")
    home = {"HOME": str(tmp_path)}
    named = home | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert auth_token(home) == "of the home"
    assert auth_token(named) == "of a file"
    assert auth_token(named | {"RAY_AUTH_TOKEN": "itself"}) == "itself"
    assert auth_token(home | {"RAY_AUTH_MODE": "disabled"}) is None
    assert auth_token({"HOME": str(tmp_path / "empty")}) is None


class CutOff:
    """A cluster's client whose log comes in pieces, from the beginning after each cut; None: it does not answer."""

    def __init__(self, *logs: list[str] | None) -> None:
        self._logs = iter(logs)
        self._silent = False

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        pieces = next(self._logs, None)
        self._silent = pieces is None
        for piece in pieces or ():
            yield piece
        if pieces is None or pieces[-1] != "end":
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, name: str) -> SimpleNamespace:
        if self._silent:
            raise ConnectionError("Failed to connect to Ray")
        end = {"driver_exit_code": 0, "end_time": 5000, "message": "", "error_type": None}
        return SimpleNamespace(status=next(self.statuses), **end)

    statuses: Iterator[JobStatus]


def followed(monkeypatch: pytest.MonkeyPatch, client: CutOff, *statuses: JobStatus) -> tuple[JobState | None, str]:
    client.statuses = iter(statuses)
    api = ray_jobs.JobsApi("http://head:8265")
    monkeypatch.setattr(ray_jobs, "_AGAIN_S", 0.0)
    monkeypatch.setattr(api, "_connected", lambda: client)
    told: list[str] = []
    state = api.follow("x", told.append)
    return state, "".join(told)


def test_a_log_that_is_cut_off_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client = CutOff(["ab", "cd"], ["a"], None, None, ["abc", "def", "gh"], ["abcdefghi", "end"])
    running = [JobStatus.RUNNING] * 3
    state, told = followed(monkeypatch, client, *running, JobStatus.SUCCEEDED)
    assert told == "abcdefghiend"
    assert state is not None
    assert (state.live, state.exit_code, state.ended) == (False, 0, 5.0)


def test_a_cluster_that_stays_silent_ends_the_following_and_not_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "LOST_S", 0.0)
    with pytest.raises(ray_jobs.JobsUnavailable, match="does not answer"):
        followed(monkeypatch, CutOff(["ab"]), JobStatus.RUNNING)


# --- a real cluster -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(s3: Any) -> Iterator[RemoteCluster]:
    with RemoteCluster() as found:
        yield found


@dataclass
class Site:
    """A recipe of a corpus of phantoms, and the command as a person runs it."""

    cluster: RemoteCluster
    store: str
    file: Path
    scans: int

    def __post_init__(self) -> None:
        source = {"kind": "phantoms", "scans": self.scans, "scans_per_unit": 4}
        tree = TREE | {"store": self.store, "prepare": {"source": source, "size_px": 64, "workers": 1}}
        self.file.write_text(yaml.safe_dump(tree), encoding="utf-8")

    def start(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", "import sys; from scanloom.cli import main; sys.exit(main())", *arguments],
            env=os.environ | self.cluster.environment() | dict(environment or {}), text=True, start_new_session=True,
            stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, environment=environment)
        out, err = process.communicate(timeout=LONGEST_S)
        return process.returncode, out, err

    def submit(self, *options: str) -> tuple[int, str, str]:
        return self.run("submit", "prepare", str(self.file), *options)

    def commits(self) -> int:
        return sum("/commits/" in f"/{found.key}" for found in Store(self.store).list(""))

    def name(self, attempt: int) -> str:
        return f"{Submission.of('prepare', str(self.file)).name}-{attempt}"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_job_is_sent_followed_and_its_end_told(cluster: RemoteCluster, store_uri: str, tmp_path: Path) -> None:
    site = Site(cluster, store_uri, tmp_path / "r.yaml", scans=16)
    for token, told in (("", "set RAY_AUTH_TOKEN"), ("another's", "set RAY_AUTH_TOKEN")):
        code, _, err = site.run("submit", "prepare", str(site.file), RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
        assert (code, told in err.splitlines()[-1]) == (2, True), err
    code, out, err = site.submit()
    assert (code, "where" in out) == (0, True), out + err
    assert open_artefact(f"{store_uri}/corpus", "corpus").manifest.statistics["rows"] == 16
    code, out, err = site.submit()
    assert (code, "was finished before" in out) == (0, True), out + err
    code, out, err = site.submit("--set", "prepare.size_px=32")
    assert (code, "of another plan" in out) == (2, True), out + err
    code, out, _ = site.run("jobs", "list", "--all")
    assert code == 0
    assert {site.name(1), site.name(2)} <= set(out.split())
    assert (out.count("done"), out.count("failed")) == (2, 1)
    assert site.run("jobs", "status", site.name(1))[0] == 0
    code, out, _ = site.run("jobs", "follow", site.name(2))
    assert (code, "was finished before" in out) == (0, True)
    assert site.run("jobs", "status", "nothing")[0] == 2
    kept = [file for file in cluster.session.rglob("*") if file.is_file()]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert len(kept) > 10
    assert [file for file in kept if secret in file.read_bytes() or cluster.token.encode() in file.read_bytes()] == []


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_job_is_joined_cancelled_and_gone_on_with(cluster: RemoteCluster, store_uri: str, tmp_path: Path) -> None:
    site = Site(cluster, store_uri, tmp_path / "r.yaml", scans=1200)
    first = site.start("submit", "prepare", str(site.file))
    until(lambda: site.commits() >= 2)
    second = site.start("submit", "prepare", str(site.file))
    assert second.stderr is not None
    assert "runs there already; following it" in second.stderr.readline()
    second.send_signal(signal.SIGINT)  # no terminal: it is left alone
    assert second.wait(LONGEST_S) == 130
    code, _, err = site.run("jobs", "cancel", site.name(1))
    assert (code, "cancelled" in err) == (0, True), err
    assert first.wait(LONGEST_S) == 130
    done = site.commits()
    assert 2 <= done < 300
    # On a terminal, Ctrl-C asks.
    master, terminal = pty.openpty()
    third = site.start("submit", "prepare", str(site.file), stdin=terminal)
    until(lambda: site.commits() > done)
    third.send_signal(signal.SIGINT)
    os.write(master, b"y\n")
    assert third.wait(LONGEST_S) == 130
    code, out, err = site.submit()
    assert (code, "300 units" in out or "1200" in out) == (0, True), out + err
    assert open_artefact(f"{store_uri}/corpus", "corpus").manifest.statistics["rows"] == 1200
    assert site.run("jobs", "follow", site.name(2))[0] == 130
