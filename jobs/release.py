"""Audited dataset -> a signed bundle to hand out, or a refusal: what `scanloom release` does, on a cluster.

python -m jobs.release RECIPE --policy PLACE (--key FILE | --sign-with COMMAND --public-key FILE) --to URI
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray

from jobs.cluster import connected, recipe_parser
from scanloom import console
from scanloom.artefact import open_artefact
from scanloom.audit.bundle import signer_of
from scanloom.audit.policy import read_policy
from scanloom.audit.release import Request, release
from scanloom.errors import RecipeError
from scanloom.store import Store
from scanloom.stored_recipe import content_at, recipe_at

T = TypeVar("T")


def run(options: argparse.Namespace) -> None:
    """Release the dataset that the recipe's `generate` section names."""
    recipe = recipe_at(options.recipe, options.overrides)
    if recipe.generate is None:
        raise RecipeError("the recipe has no `generate` section, which names the dataset to release; add one")
    text = content_at(options.policy, "policy")
    policy, signer = read_policy(text, options.policy), signer_of(options.key, options.sign_with, options.public_key)
    dataset = open_artefact(recipe.uri(recipe.generate.dataset), "dataset")
    wanted = Request(dataset, options.audit or f"{dataset.uri}-audit", policy, text, Store(options.to), _on_ray)
    with connected(), console.progress("check", len(dataset.manifest.files), "files") as advance:
        made = release(wanted, signer, lambda: advance(1))
    told = made.manifest.statistics
    row = (made.uri, told["images"], len(made.manifest.files), told["signed_by"])
    console.result_table("release", ("where", "images", "files", "signed by"), [row])


def _on_ray(work: Callable[[Mapping[str, Any]], T], settings: Sequence[Mapping[str, Any]]) -> Iterator[T]:
    """A task for each, wherever there is room; a worker that dies costs one file."""
    task: Any = ray.remote(num_cpus=1, max_retries=3)(work)
    waiting = [task.remote(one) for one in settings]
    while waiting:
        done, waiting = ray.wait(waiting)
        yield from ray.get(done)


def main(argv: Sequence[str] | None = None) -> int:
    parser = recipe_parser("release", __doc__ or "")
    parser.add_argument("--policy", required=True, metavar="PLACE", help="YAML, a file or s3://bucket/key")
    parser.add_argument("--to", required=True, metavar="URI", help="an empty folder or s3://bucket/prefix")
    parser.add_argument("--audit", metavar="URI", help="default: DATASET-audit")
    parser.add_argument("--key", type=Path, metavar="FILE", help="Ed25519 private key, PEM, to sign with")
    parser.add_argument("--sign-with", metavar="COMMAND", help="signs its standard input by a key service, say")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="PEM, of the key that the command signs with")
    options = parser.parse_args(argv)
    return console.run(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
