"""A job sent to a cluster: its name, its command, and its recipe, which is all of it that travels.

The image holds the library, `jobs` and `serve`; credentials are the cluster's own. The recipe goes along inside the
command, as a `data:` URI (RFC 2397) that the job reads like a file's content: nothing has to be uploaded first, and
what ran can be read off the cluster's list of jobs.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from scanloom.artefact import code_version
from scanloom.errors import RecipeError
from scanloom.recipe import Recipe
from scanloom.stored_recipe import content_at, recipe_at

if TYPE_CHECKING:  # Ray, which takes a second to import
    from scanloom.ray_jobs import Job, JobState

JOBS = ("prepare", "encode", "finetune", "probe", "gate", "generate", "audit", "release")
"""What can be sent; each is `python -m jobs.NAME RECIPE`."""
LARGEST_RECIPE = 64 << 10
"""Bytes of a recipe inside a command; Linux allows 128 KiB for one argument."""
# User and password before a host, also where the password holds a slash; a secret as a parameter of a URI.
_IN_A_URI = re.compile(
    r"""://[^\s@"',}]*:[^\s@"',}]*@|[?&][\w-]*(secret|token|passw|signature|credential)[\w-]*=""", re.I
)
_IN_AN_OPTION = re.compile(r"(secret|token|passw|api[-_]?key|authorization|credential)[\w-]*[\s\"']*[:=]\s*\S", re.I)
_OF_THE_CLUSTER = ("--key", "--public-key")
"""Options of `release` that name a file where the job runs: a key never travels."""
_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Submission:
    """A job with its recipe, ready to be sent."""

    job: str
    recipe: Recipe
    sent: str
    """The recipe as the job is given it: a `data:` URI, or where it lies in a store."""
    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """The job's own."""

    @classmethod
    def of(cls, job: str, place: str, overrides: Sequence[str] = (), options: Sequence[str] = ()) -> Submission:
        """The job on the recipe at a path or URI, after its overrides, with options of the job's own.

        Raises RecipeError where the recipe is wrong, or where no other machine could run it.
        """
        if job not in JOBS:
            raise RecipeError(f"{job!r} is no job that can be sent to a cluster; known: {', '.join(JOBS)}")
        recipe = recipe_at(place, overrides)
        if not recipe.store.startswith(("s3://", "/")):
            raise RecipeError(
                f"recipe {place}: store {recipe.store} is a folder beside whoever runs the job; name a bucket, "
                "s3://bucket/prefix, or the absolute path of a folder that all machines of the cluster share"
            )
        content = content_at(place)
        _refuse_secrets(place, content.decode(errors="replace"), recipe.model_dump_json(), overrides, options)
        sent = place if place.startswith("s3://") else inline(place, content)
        return cls(job, recipe, sent, tuple(overrides), _travelling(options) if job == "release" else tuple(options))

    @property
    def entrypoint(self) -> str:
        """The shell command; `exec`, so that the exit code is the driver's and a signal reaches it."""
        changes = [word for override in self.overrides for word in ("--set", override)]
        return f"exec {shlex.join(['python', '-m', f'jobs.{self.job}', self.sent, *changes, *self.options])}"

    @property
    def name(self) -> str:
        """Of the job and all that it was told: the same work has the same name, on whatever machine it is sent."""
        told = [self.job, self.recipe.model_dump(mode="json"), *self.options]
        digest = sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        return f"{self.job}-{_NAME.sub('-', self.recipe.name.lower()).strip('-')[:24]}-{digest[:10]}"

    @property
    def makes(self) -> str:
        """URI of the artefact that it makes."""
        recipe = self.recipe
        dataset = recipe.uri(recipe.generate.dataset) if recipe.generate else recipe.uri("dataset")
        if self.job == "release" and (to := _value_of("--to", self.options)):
            return to
        made = {"prepare": "corpus", "encode": "latents", "finetune": "generator"}
        of_dataset = {"generate": "", "audit": "-audit", "release": "-release"}
        return dataset + of_dataset[self.job] if self.job in of_dataset else recipe.uri(made.get(self.job, self.job))

    @property
    def metadata(self) -> dict[str, str]:
        """What a list of jobs can say of it."""
        return {"job": self.job, "recipe": self.recipe.name, "makes": self.makes, "scanloom": code_version()}


class Jobs(Protocol):
    """Of a cluster, as far as sending needs it."""

    def jobs(self) -> list[Job]: ...

    def state(self, name: str) -> JobState | None: ...

    def submit(self, name: str, entrypoint: str, *, metadata: dict[str, str] | None = None) -> bool: ...


def send(submission: Submission, cluster: Jobs) -> tuple[str, bool]:
    """Name under which the job runs, and whether this call started it; one that runs already is not started twice.

    After one that has ended comes another attempt, which goes on with what the store lacks. Raises RecipeError where
    another job makes the same artefact at this moment.
    """
    there = cluster.jobs()
    for job in there:
        if job.state.live and _attempt(job.name, submission.name):
            return job.name, False
        if job.state.live and job.metadata.get("makes") == submission.makes:
            raise RecipeError(
                f"{submission.makes} is being made by the job {job.name} of another recipe; wait for it, "
                f"or cancel it: scanloom jobs cancel {job.name}"
            )
    last = max((_attempt(job.name, submission.name) for job in there), default=0)
    name = f"{submission.name}-{last + 1}"
    return name, cluster.submit(name, submission.entrypoint, metadata=submission.metadata)


def _attempt(name: str, of: str) -> int:
    """Number of the attempt that a job's name says; 0: of something else."""
    head, _, number = name.rpartition("-")
    return int(number) if head == of and number.isdigit() else 0


def inline(place: str, content: bytes) -> str:
    """A file as a `data:` URI. Raises RecipeError where it is too large for that."""
    if len(content) > LARGEST_RECIPE:
        raise RecipeError(
            f"recipe {place}: {len(content)} bytes are too many for a command, which takes {LARGEST_RECIPE}; "
            "put it into the store and name it there, s3://bucket/recipe.yaml"
        )
    return f"data:application/yaml;base64,{base64.b64encode(content).decode()}"


def _refuse_secrets(place: str, text: str, resolved: str, overrides: Sequence[str], options: Sequence[str]) -> None:
    for what, found in (("recipe", text), ("recipe", resolved), *(("--set", override) for override in overrides)):
        if _IN_A_URI.search(found):
            raise RecipeError(
                f"{what} of {place}: holds a URI with a password, which the cluster would keep in its logs; "
                "take it out: credentials come from the cluster's environment"
            )
    if any(_IN_A_URI.search(word) or _IN_AN_OPTION.search(word) for word in options):
        raise RecipeError(
            "an option for the job holds a secret, which the cluster would keep in its logs; let the job read it from "
            "a file or from the environment there"
        )


def _travelling(options: Sequence[str]) -> tuple[str, ...]:
    """Options of `release` as another machine can follow them: the policy goes along, keys are the cluster's."""
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for number, (name, value) in enumerate(pairwise(words), start=1):
        if name == "--policy" and not value.startswith(("s3://", "data:", "/")):
            words[number] = inline(value, content_at(value))
        if name in _OF_THE_CLUSTER and not value.startswith("/"):
            raise RecipeError(
                f"{name} {value}: a file of this machine, and keys are not sent; name the absolute path that it has on "
                "the cluster, such as /etc/scanloom-release/key.pem"
            )
    return tuple(words)


def _value_of(name: str, options: Sequence[str]) -> str | None:
    return next((value for word, value in pairwise(options) if word == name), None)
