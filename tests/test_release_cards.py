"""Cards and metadata of a release are read by the tools they are for: huggingface_hub, mlcroissant, a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard

from scanloom.artefact import Artefact, open_artefact
from scanloom.audit.policy import read_policy
from scanloom.audit.release import CARD, CROISSANT, MODEL_CARD, Request, release
from scanloom.errors import ReleaseRefused
from scanloom.sampling.dataset import IMAGES
from scanloom.shards.reader import read_parquet
from scanloom.shards.writer import image_pixels
from scanloom.store import Store
from tests.released import POLICY, Chain, report
from tests.test_audit_verdicts import around, attacked, full, learned
from tests.test_release import KEY


def bundle(chain: Chain, policy: str = POLICY) -> Artefact:
    text = policy.encode()
    wanted = Request(chain.dataset, chain.audit.uri, read_policy(text, "p"), text, Store(f"{chain.folder}/bundle"))
    return release(wanted, KEY)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    told = full()
    parts = {"fidelity": told.fidelity, "fairness": told.fairness, "utility": told.utility}
    chain = Chain.made(tmp_path_factory.mktemp("made"), lambda of, against: report(of, against, **parts))
    return Path(bundle(chain, POLICY + "publisher: A hospital\n").uri)


def test_the_croissant_file_is_valid_and_its_records_are_the_images(made: Path) -> None:
    read = mlcroissant.Dataset(jsonld=str(made / CROISSANT))
    assert read.metadata.ctx.issues.errors == set()
    assert read.metadata.ctx.issues.warnings == set()
    rows = list(read.records(record_set="images"))
    inside = open_artefact(str(made / "dataset"), "dataset")
    held = [row for file in inside.files(IMAGES) for row in read_parquet(inside.store, file).to_pylist()]
    assert len(rows) == len(held) == 10
    for found, row in zip(
        sorted(rows, key=lambda one: one["images/id"]), sorted(held, key=lambda r: r["id"]), strict=True
    ):
        assert found["images/id"].decode() == row["id"]
        assert found["images/steps"] == row["steps"]
        assert np.array_equal(np.asarray(found["images/image"]), image_pixels(row))


def test_the_croissant_file_says_what_is_to_be_known_before_use(made: Path) -> None:
    told = json.loads((made / CROISSANT).read_text())
    assert told["conformsTo"] == ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
    assert told["creator"]["name"] == "A hospital"
    assert "No copy was found." in told["rai:personalSensitiveInformation"][1]
    assert "Not measured." in told["rai:personalSensitiveInformation"][2]
    assert "scores 0.70 on real scans" in " ".join(told["rai:dataLimitations"])


def test_the_dataset_card_is_one_of_the_hub(made: Path) -> None:
    card = DatasetCard((made / CARD).read_text(), ignore_metadata_errors=False)
    head: Any = card.data
    assert head.license == "other"
    assert head.size_categories == ["n<1K"]
    shards = head.to_dict()["configs"][0]["data_files"]
    assert len(list(made.glob(shards))) == 3
    assert "| Does it contain anybody's scan? | **No copy was found.**" in card.text
    for named in ("audit/report.html", "GENERATOR.md", "croissant.json", "TERMS.md"):
        assert named in card.text
        assert named == "audit/report.html" or (made / named).exists()


def test_the_model_card_names_what_the_generator_learned_from(made: Path) -> None:
    card = ModelCard((made / MODEL_CARD).read_text(), ignore_metadata_errors=False)
    head: Any = card.data
    assert head.library_name == "diffusers"
    assert "- phantoms (" in card.text
    assert "**Can it be told whose scans it was made from?** Not measured." in card.text


GATES = [
    ("membership: {most_auc: 0.6}", {"membership": None}, "membership: not measured"),
    ("membership: {most_auc: 0.6}", {"auc": 0.8}, "AUC of the best attack .*: 0.82, .* 0.6"),
    ("membership: {most_auc: 0.9}", {"auc": 0.8}, "at 1 % false alarms .*: 0.42, .* 0.1"),
    ("utility: {}", {}, "utility: not measured"),
    ("utility: {least_share: 0.8}", {"utility": learned(real=0.8, synthetic=0.7)}, "lower end.: 0.6467, .* 0.8"),
    ("fairness: {most_gap: 0.1}", {"fairness": full().fairness, "wide": 0.3}, "fairness.Effusion in all: 0.15, .* 0.1"),
    ("fairness: {most_parity_gap: 0.05}", {"fairness": full().fairness, "gaps": full().gaps},
     "gap of precision, F beside M: 0.1, .* 0.05"),
]  # fmt: skip


@pytest.mark.parametrize("policy, parts, reason", GATES)
def test_each_gate_refuses_by_name_value_and_limit(
    tmp_path: Path, policy: str, parts: dict[str, object], reason: str
) -> None:
    chain = Chain.made(tmp_path)
    told = dict(parts)
    if auc := told.pop("auc", None):
        attack = attacked(around(float(str(auc))), around(0.4))
        told["membership"] = attack.model_copy(update={"generator": chain.generator.digest})
    if told.pop("wide", None):
        told["fairness"] = ((full().fairness or ())[0].model_copy(update={"achieved": around(0.5)}),)
    again = Chain.made(tmp_path / "again", lambda of, against: report(of, against, **told))
    with pytest.raises(ReleaseRefused, match=reason):
        bundle(again, f"{POLICY}{policy}\n")


def test_an_attack_on_another_generator_counts_for_nothing(tmp_path: Path) -> None:
    told = {"membership": attacked(around(0.5), around(0.01))}
    chain = Chain.made(tmp_path, lambda of, against: report(of, against, **told))
    with pytest.raises(
        ReleaseRefused, match="audit: attacked the generator eeeeeeeeeeee, the limit is the dataset's own"
    ):
        bundle(chain)


def test_a_licence_cannot_break_its_table(tmp_path: Path) -> None:
    policy = POLICY.replace("terms: CC0-1.0", 'terms: "a | b\\n<script>"')
    told = bundle(Chain.made(tmp_path), policy).store.read("TERMS.md").decode()
    assert r"| phantoms | a \| b &lt;script> | research, commercial |" in told
