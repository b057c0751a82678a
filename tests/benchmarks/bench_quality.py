"""What the judges refuse: of real scans and phantoms wrongly, of planted faults and of a generator's images rightly.

python -m tests.benchmarks.bench_quality [--real FOLDER_OF_PNG] [--images 96]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scanloom.artefact import open_artefact
from scanloom.attributes import AttributeSchema, Value
from scanloom.base import URI
from scanloom.models.attribute_probe import Probe, targets
from scanloom.models.generator import load_generator
from scanloom.recipe import Generate, Quality, load_recipe
from scanloom.recipe_probe import Probe as Section
from scanloom.sampling.engine import Engine
from scanloom.sampling.plan import compile_plan, specify
from scanloom.sampling.production import produce
from scanloom.sampling.quality import Agreement, Appearance, levels
from scanloom.scans.phantoms import phantom
from scanloom.training import attribute_probe
from scanloom.training.draws import positions, rows_at

ROOT = Path(__file__).resolve().parents[2]
SIZE, TRAIN, HELD_OUT, FRESH = 64, 2000, 1000, 1000
"""Phantoms, of series that neither the base generator nor the demo draws from."""


def tell(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def drawn(schema: AttributeSchema, seed: int, scans: int) -> tuple[np.ndarray[Any, Any], list[dict[str, Value]]]:
    phantoms = [phantom(seed, number, SIZE) for number in range(scans)]
    return np.stack([one.pixels for one in phantoms]), [schema.from_row(one.attributes) for one in phantoms]


def trained(schema: AttributeSchema) -> Probe:
    """A probe as the job trains it, in this process."""
    job = attribute_probe.ProbeJob(
        recipe=Section(steps=300), name="bench", seed=0, attributes=schema, size_px=SIZE, probe_uri=""
    )
    train, held_out = (
        attribute_probe.Scans(torch.from_numpy(attribute_probe.full_range(pixels))[:, None].half(), rows)
        for pixels, rows in (drawn(schema, 101, TRAIN), drawn(schema, 102, HELD_OUT))
    )
    card = attribute_probe.blank_card(job, train, HELD_OUT)
    wanted = torch.from_numpy(targets(schema, train.attributes, card.scales))
    torch.manual_seed(0)
    network = attribute_probe.ProbeNetwork(job.channels, wanted.shape[1], job.recipe.dropout)
    state = attribute_probe.State(network, torch.optim.AdamW(network.parameters(), weight_decay=0.01))
    began = time.monotonic()
    for step in range(job.recipe.steps):
        state.step = step
        where = positions(step, job.recipe.batch_size, 0, 1)
        rows = torch.from_numpy(rows_at(where, TRAIN, 0))
        images = attribute_probe.moved(train.images_N1SS[rows].float(), where, job)
        attribute_probe._train_step(state, job, images, wanted[rows])
    tell(f"probe: {job.recipe.steps} steps of {job.recipe.batch_size} in {time.monotonic() - began:.0f} s, one thread")
    return Probe(attribute_probe.judged(card, network, held_out, train), "0" * 64, network)


def appearance(real: Path | None) -> None:
    judge = Appearance(Quality(), 8)
    pixels, _ = drawn(AttributeSchema(declarations=load_recipe(ROOT / "jobs/recipes/base.yaml").attributes), 103, 500)
    sets = {"phantoms": list(pixels)}
    if real is not None:
        sets["real scans"] = [np.asarray(Image.open(file).convert("L")) for file in sorted(real.glob("*.png"))]
    for name, images in sets.items():
        seen = [levels(image, 8) for image in images]
        refused = sum(verdict.reason is not None for image in images for verdict in judge(image[None], [{}]))
        tell(
            f"{name}: {refused} of {len(images)} refused; least contrast {min(s.contrast for s in seen):.3f}, most "
            f"white {max(s.white for s in seen):.4f}, most black {max(s.black for s in seen):.3f}"
        )
    large = np.random.default_rng(0).integers(0, 4096, (512, 512)).astype(np.uint16)
    began = time.perf_counter()
    for _ in range(50):
        levels(large, 12)
    tell(f"appearance of 512 x 512 x 12 bit: {(time.perf_counter() - began) / 50 * 1e3:.2f} ms an image")


def agreement(probe: Probe, schema: AttributeSchema) -> None:
    judge = Agreement(probe.card, partial(probe.read, bits_stored=8))
    pixels, rows = drawn(schema, 104, FRESH)
    for reading in probe.card.readings:
        tell(f"  {reading.name}: {reading.figure} {reading.estimate:.3f} ({reading.low:.3f} to {reading.high:.3f})")
    tell("  not checked:", ", ".join(f"{c.name} ({c.reason})" for c in probe.card.checks if c.limit is None) or "-")

    def share(asked: list[dict[str, Value]], which: list[int] | None = None) -> float:
        return float(np.mean([v.reason is not None for v in judge(pixels if which is None else pixels[which], asked)]))

    for name in schema.names:
        tell(f"  {FRESH} fresh phantoms refused for {name}: {share([{name: row[name]} for row in rows]):.2%}")
    tell(f"  for any attribute: {share(rows):.2%}")
    enlarged = [n for n, row in enumerate(rows) if row["findings"] == ("Cardiomegaly",)]
    normal = [n for n, row in enumerate(rows) if row["findings"] == ()]
    as_normal = [rows[n] | {"findings": ()} for n in enlarged]
    as_enlarged = [rows[n] | {"findings": ("Cardiomegaly",)} for n in normal]
    tell(f"  {len(enlarged)} with cardiomegaly, asked for as normal, caught: {share(as_normal, enlarged):.1%}")
    tell(f"  {len(normal)} normal ones, asked for with cardiomegaly, caught: {share(as_enlarged, normal):.1%}")
    other: list[dict[str, Value]] = [{"sex": "M" if row["sex"] == "F" else "F"} for row in rows]
    tell(f"  wrong sex caught: {share(other):.1%}")
    began = time.perf_counter()
    probe.read(pixels[:200], 8)
    tell(f"  reading: {(time.perf_counter() - began) / 200 * 1e3:.2f} ms an image, one thread")


def generated(probe: Probe, images: int) -> None:
    """The base generator's images on the demo's cohort, each judged and drawn again."""
    recipe = load_recipe(ROOT / "jobs/recipes/demo.yaml")
    assert recipe.generate is not None
    generator = load_generator(URI)
    section = Generate(images=images, images_per_shard=images, cohort=recipe.generate.cohort)
    plan = compile_plan(specify(section, generator.name, generator.digest, open_artefact(URI).manifest.statistics))
    engine = Engine(generator, plan.spec.slots)
    judges = [Appearance(plan.spec.quality, 8), Agreement(probe.card, partial(probe.read, bits_stored=8))]
    began = time.monotonic()
    made = produce(engine, plan.spec, plan.rows(0), judges)
    reasons = Counter(reject["reason"] for reject in made.rejects)
    about = Counter(next(iter(r["figures"])) for r in made.rejects if r["reason"] == "disagrees")
    first = sum(attempt == 0 for attempt in made.attempts)
    tell(
        f"base generator: {len(made.pixels)} of {images} made, {first} at the first attempt, refused "
        f"{dict(reasons)}, for {dict(about)}; {images / (time.monotonic() - began):.2f} images/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--real", type=Path)
    parser.add_argument("--images", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    appearance(options.real)
    schema = AttributeSchema(declarations=load_recipe(ROOT / "jobs/recipes/base.yaml").attributes)
    probe = trained(schema)
    agreement(probe, schema)
    generated(probe, options.images)


if __name__ == "__main__":
    main()
