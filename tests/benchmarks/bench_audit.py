# ruff: noqa: T201
"""What telling an audit's figures apart by group takes, and what real chest X-rays are worth as synthetic ones.

PYTHONPATH=.:platform python tests/benchmarks/bench_audit.py [NIH_FOLDER] [--images 1000 10000] [--seeds 5]

By group: drawn vectors of 128 values and readings of a probe with 20 outputs, beside 800 scans; time and peak memory.
Usefulness, with the folder: the 519 patients are dealt out, 60 % to train on, 20 % given as synthetic images, 20 % to
test on; then the same images with shuffled labels. With --whole instead: time and memory of whole audits. One thread.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save

from scanloom.artefact import publish
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.audit.fairness import Group, gaps, readings, subgroups
from scanloom.audit.fidelity import Embedded
from scanloom.audit.groups import Grouping
from scanloom.audit.measuring import ENCODER, AuditJob, make_audit
from scanloom.audit.utility import utility_of
from scanloom.heap import peak_resident_bytes
from scanloom.models.attribute_probe import ProbeNetwork
from scanloom.models.copy_encoder import CopyEncoder, levels, weights_of
from scanloom.models.probe_card import CARD, WEIGHTS, ProbeCard, Reading, outputs_of
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.recipe_audit import Audit, UtilityStudy
from scanloom.store import Store
from scanloom.training.utility import Material, Part, lessons, train_and_score
from tests.audited import publish_dataset
from tests.nih_corpus import dealt, nih_scans, publish_nih
from tests.nih_squares import square
from tests.released import generator, put

FINDINGS = ("Atelectasis", "Edema", "Effusion", "Infiltration", "Pneumonia")
SCHEMA = AttributeSchema(declarations=(
    CategoryAttribute(name="sex", values=("F", "M"), source="PatientSex"),
    NumberAttribute(name="age", unit="years", minimum=0, maximum=120, source="PatientAge"),
    CategoryAttribute(name="view", values=("PA", "AP"), source="ViewPosition"),
    LabelsAttribute(name="findings", values=(*FINDINGS, *(f"Finding {n}" for n in range(10)))),
))  # fmt: skip
SCANS, WIDTH, SIZE_PX = 800, 128, 64


def by_group(images: int) -> None:
    random = np.random.default_rng(0)

    def drawn(count: int) -> list[Attributes]:
        return [
            {
                "sex": "FM"[random.integers(2)], "age": float(random.integers(5, 95)),
                "view": ("PA", "AP")[random.integers(2)],
                "findings": tuple(value for value in SCHEMA["findings"].values if random.random() < 0.1),  # type: ignore[union-attr]
            }
            for _ in range(count)
        ]  # fmt: skip

    outputs = outputs_of(SCHEMA)
    card = _card(SCHEMA, 64)
    rows = {"images": drawn(images), "train": drawn(SCANS), "held out": drawn(SCANS)}
    vectors = {name: Embedded.of(random.standard_normal((len(of), WIDTH))) for name, of in rows.items()}
    grouping = Grouping.of(SCHEMA, rows["train"])
    before, started = peak_resident_bytes(), time.monotonic()
    groups = [Group(rows[name], vectors[name].groups, random.random((len(rows[name]), len(outputs))))
              for name in ("images", "held out")]  # fmt: skip
    told = readings(card, grouping, *groups)
    read_s = time.monotonic() - started
    alike = subgroups(grouping, vectors["images"], rows["images"], vectors["train"], rows["train"],
                      vectors["held out"], rows["held out"])  # fmt: skip
    found = gaps(grouping, told, alike)
    took, most = time.monotonic() - started, peak_resident_bytes()
    print(
        f"{images} images: {len(told)} readings in {read_s:.1f} s, {len(alike)} cells' likeness in "
        f"{took - read_s:.1f} s, {len(found)} gaps; peak memory {(most - before) / 1e6:.0f} MB more", flush=True,
    )  # fmt: skip


def usefulness(folder: Path, settings: UtilityStudy) -> None:
    with (folder / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))
    squares = np.stack([square(folder / "images" / row["Image Index"], SIZE_PX) for row in rows]).astype(np.float16)
    told: list[set[str]] = [set(row["Finding Labels"].split("|")) for row in rows]
    wanted = np.array([[name in of for name in FINDINGS] for of in told], dtype=np.float32)
    attributes: list[Attributes] = [
        {"sex": row["Patient Gender"], "age": float(row["Patient Age"]), "view": row["View Position"]} for row in rows
    ]
    owners = np.array([row["Patient ID"] for row in rows])
    patients = np.unique(owners)
    np.random.default_rng(0).shuffle(patients)
    cut = int(0.6 * len(patients)), int(0.8 * len(patients))
    train, made, held = (np.isin(owners, part) for part in np.split(patients, cut))

    def part(chosen: Any, labels: Any = wanted) -> Part:
        return Part(squares[chosen], labels[chosen])

    shuffled = wanted.copy()
    shuffled[made] = np.random.default_rng(1).permutation(wanted[made])
    kinds = {"other patients": part(made), "their labels shuffled": part(made, shuffled)}
    for name, synthetic in kinds.items():
        material = Material(
            schema=SCHEMA, labels=FINDINGS, train=part(train), synthetic=synthetic, held_out=part(held),
            patients=owners[held].tolist(), attributes=[attributes[place] for place in np.flatnonzero(held)],
            classifier="DenseNet",
        )  # fmt: skip
        scores = [train_and_score(one, material) for one in lessons(settings, 0)]
        started = time.monotonic()
        found = utility_of(material, scores, None, settings.least_patients)
        print(
            f"given as synthetic: {name}; {len(material.train)} train scans, {len(synthetic)} images, "
            f"{found.held_out_scans} held-out scans of {found.held_out_patients} patients; a training took "
            f"{found.seconds / len(scores):.1f} s, the summing up {time.monotonic() - started:.1f} s", flush=True,
        )  # fmt: skip
        for one in found.figures:
            if one.cell == "all":
                print(f"  {one.arm}: {one.label} {one.auc}")
        for gain in found.gains:
            if gain.label == "mean of labels":
                print(f"  {gain.arm}, over real: {gain.over_real}")


def whole(folder: Path, counts: list[int]) -> None:
    """All of `make_audit` with a probe, of datasets of moved real scans of 128 px; the networks are not trained."""
    scans = nih_scans(folder, 128)
    train, calibration, check = dealt(scans, (0.6, 0.2, 0.2))
    with tempfile.TemporaryDirectory(prefix="scanloom-bench-") as place:
        corpus = publish_nih(f"{place}/corpus", {"train": train, "holdout": calibration, "validation": check})
        schema = AttributeSchema.model_validate(corpus.manifest.statistics["schema"])
        card = _card(schema, 128)
        weights = save(dict(ProbeNetwork(card.channels, len(card.outputs)).state_dict()))
        store = Store(f"{place}/probe")
        files = put(store, {CARD: card.model_dump_json().encode(), WEIGHTS: weights})
        probe = publish(store, kind="probe", name="made", recipe={}, inputs=[], files=files, statistics={})
        settings = Audit()
        channels = levels(settings.copies.channels, 96)
        for count in counts:
            made = publish_dataset(
                f"{place}/{count}", generator(f"{place}/generator-{count}", corpus), corpus,
                lambda n: np.roll(scans[n % len(scans)].pixels_SS, n // len(scans), axis=1), count,
                dicom={"enabled": False},
            )  # fmt: skip
            audit = Store(f"{place}/{count}-audit")
            audit.write(ENCODER, weights_of(CopyEncoder(channels, settings.copies.width)))
            job = AuditJob.of(settings, corpus, made, audit, probe)
            before, started = peak_resident_bytes(), time.monotonic()
            make_audit(job.model_dump(mode="json"))
            most = peak_resident_bytes()
            print(
                f"an audit of {count} images of 128 px against {len(train)} scans: {time.monotonic() - started:.0f} s, "
                f"peak memory {most / 1e6:.0f} MB, {(most - before) / 1e6:.0f} MB more than before", flush=True,
            )  # fmt: skip


def _card(schema: AttributeSchema, size_px: int) -> ProbeCard:
    """A probe that says of itself that it reads everything."""
    told = [
        Reading(name=one.name, figure="auc", estimate=0.9, low=0.8, high=1.0, chance=0.5, scans=9, with_it=4,
                better_than_chance=True) for one in outputs_of(schema)
    ]  # fmt: skip
    return ProbeCard(
        name="made", attributes=schema, size_px=size_px, channels=(16, 32, 64, 64), scales={"age": (50.0, 10.0)},
        false_reject_share=0.02, trained_scans=1, held_out_scans=1, readings=tuple(told),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--whole", type=int, nargs="*", default=[], help="audits of so many images each")
    told = parser.parse_args()
    for images in told.images:
        by_group(images)
    if told.folder is not None and told.whole:
        whole(told.folder, told.whole)
    elif told.folder is not None:
        usefulness(told.folder, UtilityStudy(seeds=told.seeds, steps=told.steps))


if __name__ == "__main__":
    main()
