"""One image of a dataset made anew from its row, beside the stored one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scanloom.artefact import Artefact, open_artefact
from scanloom.sampling.dataset import Pixels, stored_row
from scanloom.sampling.plan import PlanSpec
from scanloom.sampling.production import ShardEngine
from scanloom.shards.commit import committed_shards, read_commits
from scanloom.shards.writer import image_pixels

Environment = Mapping[str, Any]
"""What pixels depend on in their last bits, beside the plan: `production.environment`, and `batch_invariant`."""


@dataclass(frozen=True)
class Regenerated:
    """An image as it was made again, and as it is stored, both [H, W]."""

    made: Pixels
    stored: Pixels
    origins: Sequence[Environment]
    """What its shard was made on; several where it is only known that it was one of these."""
    here: Environment

    @property
    def difference(self) -> int:
        """The largest of a pixel, in steps of the bits stored."""
        return int(abs(self.made.astype(int) - self.stored.astype(int)).max())

    @property
    def told(self) -> str | None:
        """A sentence on how what the image was made on differs from what made it again; None where it does not."""
        if len(self.origins) > 1:
            return (
                f"the dataset was made in {len(self.origins)} environments, and the commit that says in which of them "
                "this image was is not there"
            )
        [origin] = self.origins
        apart = [name for name, value in origin.items() if self.here.get(name) != value]
        then, now = (", ".join(f"{name} {found.get(name)}" for name in apart) for found in (origin, self.here))
        return f"it was made with {then}; here it is {now}" if apart else None


def regenerate(dataset_uri: str, image_id: str, generator_uri: str | None = None) -> Regenerated:
    """One image made anew from its row, with as many threads and on such a device as its shard was, if there is one.

    Where it is not known which of several that was, they are tried until one gives the stored image, or the last.
    The generator is found by the dataset's lineage, or at `generator_uri` where it has moved. Made and stored are equal
    on a configuration like the one that made it, and otherwise differ by rounding.

    Raises RecipeError for an id that is not in the dataset, ArtefactError where another generator is there.
    """
    dataset = open_artefact(dataset_uri, "dataset")
    spec = PlanSpec.model_validate(dataset.manifest.statistics["spec"])
    stored = stored_row(dataset, spec, image_id)
    home = dataset.manifest.used_as("generator")
    origins = _origins(stored["index"] // spec.images_per_shard, dataset, spec)
    # Nobody judges it a second time, so neither probe nor gate is needed.
    unjudged = spec.model_copy(update={"probe": None, "gate": None})
    pixels = image_pixels(stored)

    def again(device: str, threads: int) -> Regenerated:
        engine = ShardEngine(unjudged, generator_uri or (home.uri if home else ""), device, threads)
        return Regenerated(engine.again(stored), pixels, origins, engine.environment)

    *others, last = dict.fromkeys((_device(origin), origin["threads"]) for origin in origins)
    for place in others:
        if (found := again(*place)).difference == 0:
            return found
    return again(*last)


def _device(origin: Environment) -> str:
    return "cuda" if origin["device"] != "cpu" and torch.cuda.is_available() else "cpu"


def _origins(shard: int, dataset: Artefact, spec: PlanSpec) -> Sequence[Environment]:
    """What a shard was made on; of a dataset that came without its commits, all that its manifest names."""
    environments: list[Environment] = dataset.manifest.statistics["environments"]
    if len(environments) > 1 and shard in committed_shards(dataset.store):
        [commit] = read_commits(dataset.store, spec.digest, [shard])
        return [commit.statistics["environment"]]
    return environments
