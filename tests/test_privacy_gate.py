"""The privacy gate: what it lets through and what not, whoever shares a call, and of which generators it may judge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scanloom import base
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.audit.privacy_gate import gate_seed
from scanloom.errors import ArtefactError
from scanloom.models.gate_card import CARD
from scanloom.models.privacy_gate import ENCODER, INDEX, LOOK_ROWS, PrivacyGate, load_gate
from scanloom.recipe import Generate, Quality
from scanloom.sampling.dataset import rows_to_bytes
from scanloom.sampling.engine import Engine
from scanloom.sampling.gate import Privacy, open_gate
from scanloom.sampling.inputs import open_inputs
from scanloom.sampling.plan import Plan, compile_plan, specify
from scanloom.sampling.production import ShardEngine, judges, produce
from scanloom.sampling.quality import PASSES, Verdict
from scanloom.scans.phantoms import phantom
from tests.made_gate import SCANS, RememberingGenerator, publish_chain, publish_gate, publish_learner, train_scans
from tests.phantom_corpus import SIZE, publish_corpus
from tests.tiny_generator import STATISTICS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus, generator and gate."""
    folder = tmp_path_factory.mktemp("gated")
    publish_chain(folder)
    publish_gate(folder)
    return folder


@pytest.fixture(scope="module")
def made(store: Path) -> Artefact:
    return open_artefact(f"{store}/gate", "gate")


@pytest.fixture(scope="module")
def gate(made: Artefact) -> PrivacyGate:
    return load_gate(made.uri)


@pytest.fixture(scope="module")
def scans(store: Path) -> np.ndarray[Any, Any]:
    return np.stack(train_scans(open_artefact(f"{store}/corpus", "corpus")))


@pytest.fixture(scope="module")
def fresh() -> np.ndarray[Any, Any]:
    """Phantoms that no corpus holds."""
    return np.stack([phantom(77, number, SIZE).pixels for number in range(200)])


def refused(gate: PrivacyGate, pixels: np.ndarray[Any, Any], bits: int = 8) -> int:
    told = Privacy(gate.card.tau, partial(gate.likeness, bits_stored=bits))(pixels, [{}] * len(pixels))
    assert {verdict.reason for verdict in told} <= {None, "gate"}
    return sum(verdict.reason == "gate" for verdict in told)


def test_a_gate_is_an_artefact_of_its_corpus_that_says_what_it_is_worth(made: Artefact, gate: PrivacyGate) -> None:
    assert list(verify(made)) == []
    assert {entry.path for entry in made.manifest.files} == {CARD, ENCODER, INDEX}
    assert [entry.kind for entry in made.manifest.inputs] == ["corpus"]
    card = gate.card
    assert made.manifest.statistics["card"] == card.model_dump(mode="json")
    assert card.train_scans == SCANS * 3 // 4
    assert card.calibration_patients + card.held_out_scans == SCANS // 4
    told = {one.plant: one.refused.value for one in card.power}
    assert told["as it is"] == told["mirrored"] == 1.0
    assert card.lowest_slight == min(one.refused.value for one in card.power if one.strength == "slight")
    assert card.held_out.value <= 0.1


def test_its_encoder_is_never_the_audits() -> None:
    assert gate_seed(3) != 3
    assert len({gate_seed(seed) for seed in range(100)} | set(range(100))) == 200
    assert 0 <= gate_seed(2**63 - 1) < 2**63


def test_training_scans_are_refused_and_those_of_nobody_pass(
    gate: PrivacyGate, scans: np.ndarray[Any, Any], fresh: np.ndarray[Any, Any]
) -> None:
    assert refused(gate, scans) == len(scans)
    assert refused(gate, np.ascontiguousarray(scans[:, :, ::-1])) == len(scans)
    paler = np.round((scans[:, :, ::-1] - 127.5) * 0.8 + 127.5).astype(np.uint8)
    assert refused(gate, paler) >= 0.9 * len(scans)
    assert refused(gate, fresh) <= 0.05 * len(fresh)


def test_pixels_of_more_bits_and_another_size_are_judged_alike(gate: PrivacyGate, scans: np.ndarray[Any, Any]) -> None:
    some = scans[:20]
    larger = np.repeat(np.repeat(some.astype(np.uint16) * 257, 2, axis=1), 2, axis=2)
    np.testing.assert_allclose(gate.likeness(larger, 16), gate.likeness(some, 8), atol=1e-5)


def test_a_verdict_does_not_depend_on_who_shares_the_call(
    gate: PrivacyGate, scans: np.ndarray[Any, Any], fresh: np.ndarray[Any, Any]
) -> None:
    alone = gate.likeness(fresh[:1], 8)[0]
    for place in range(2 * LOOK_ROWS + 1):
        beside = np.concatenate([scans[:place], fresh[:1], scans[place : 2 * LOOK_ROWS]])
        for company in (beside, beside[: place + 1], beside[place:]):
            where = min(place, len(company) - 1) if company is not beside[place:] else 0
            found = gate.likeness(company, 8)
            assert alone in found[[where, 0]], place
    assert gate.likeness(scans[:0], 8).shape == (0,)


def test_a_verdict_shows_how_alike_and_how_alike_it_may_be() -> None:
    judge = Privacy(0.9, lambda pixels: np.array([0.95, 0.9, -1.0, np.nan]))
    told = judge(np.zeros((4, 4, 4), np.uint8), [{}] * 4)
    assert told[:3] == [Verdict("gate", {"likeness": 0.95, "most": 0.9}), PASSES, PASSES]
    assert told[3].reason == "gate"


# --- in generation --------------------------------------------------------------------------------------------


def plan_of(gate: str | None = None, images: int = 24, attempts: int = 12) -> Plan:
    section = Generate(
        images=images, images_per_shard=images, steps=1, guidance_scale=1.0, slots=4, seed=5,
        quality=Quality(attempts=attempts),
    )  # fmt: skip
    return compile_plan(specify(section, "remembering", "r" * 64, STATISTICS, gate=gate))


def test_what_a_generator_remembers_is_drawn_again_until_it_is_somebody_new(
    gate: PrivacyGate, made: Artefact, scans: np.ndarray[Any, Any]
) -> None:
    plan = plan_of(gate.digest)
    generator = RememberingGenerator(list(scans), remembered=0.5)
    found = judges(plan.spec, None, "cpu", made.uri)
    result = produce(Engine(generator, 4), plan.spec, plan.rows(0), found)
    assert len(result.pixels) == 24
    assert {reject["reason"] for reject in result.rejects} == {"gate"}
    assert all(reject["figures"]["likeness"] > reject["figures"]["most"] for reject in result.rejects)
    assert sum(result.attempts) == len(result.rejects) > 8
    assert refused(gate, result.pixels) == 0
    for slots in (1, 7):
        again = produce(Engine(generator, slots), plan.spec, plan.rows(0), found)
        assert (again.attempts, again.rejects) == (result.attempts, result.rejects)
        np.testing.assert_array_equal(again.pixels, result.pixels)


def test_a_generator_that_remembers_everything_makes_nothing(
    made: Artefact, gate: PrivacyGate, scans: np.ndarray[Any, Any]
) -> None:
    plan = plan_of(gate.digest, images=6, attempts=2)
    generator = RememberingGenerator(list(scans), remembered=1.0)
    result = produce(Engine(generator, 4), plan.spec, plan.rows(0), judges(plan.spec, None, "cpu", made.uri))
    assert len(result.pixels) == 0
    assert [r["reason"] for r in result.rejects].count("infeasible") == 6
    assert {r["reason"] for r in result.rejects} == {"gate", "infeasible"}
    free = plan_of(images=6)
    assert len(produce(Engine(generator, 4), free.spec, free.rows(0), judges(free.spec, None, "cpu")).pixels) == 6


def test_a_plan_names_its_gate_and_is_not_made_without_it(store: Path, made: Artefact, tmp_path: Path) -> None:
    section = Generate(images=4, images_per_shard=4, slots=4, steps=2, quality=Quality(gate=made.uri))
    inputs = open_inputs(f"{store}/generator", section.quality)
    spec, free = inputs.specify(section), specify(section, "tiny", inputs.generator.digest, STATISTICS)
    assert (spec.gate, free.gate, spec.quality.gate) == (made.digest, None, None)
    assert spec.digest != free.digest
    assert inputs.artefacts == [inputs.generator, inputs.gate]
    shard = {"shard": 0, "rows": rows_to_bytes(compile_plan(spec).rows(0))}
    [_, gate_uri] = inputs.uris
    told = ShardEngine(spec, inputs.generator.uri, "cpu", 1, None, gate_uri)(shard)
    assert len(told["attempts"]) == 4
    with pytest.raises(ArtefactError, match="say where it lies"):
        ShardEngine(spec, inputs.generator.uri, "cpu", 1)
    with pytest.raises(ArtefactError, match=r"is gate \w+, the plan is for"):
        judges(spec.model_copy(update={"gate": "0" * 64}), None, "cpu", made.uri)


def test_plans_of_before_there_were_gates_keep_their_digest() -> None:
    assert "gate" not in plan_of().spec.model_dump(mode="json", exclude={"gate"})
    told = plan_of().spec.model_dump(mode="json")
    assert told["gate"] is None
    assert type(plan_of().spec).model_validate(told).digest == plan_of().digest


# --- whose gate it is -----------------------------------------------------------------------------------------


def test_a_gate_of_another_corpus_is_refused(store: Path, made: Artefact, tmp_path: Path) -> None:
    assert open_gate(made.uri, open_artefact(f"{store}/generator", "generator")).digest == made.digest
    other = publish_learner(tmp_path, publish_corpus(f"{tmp_path}/corpus", scans=8))
    with pytest.raises(
        ArtefactError, match=r"is a gate of corpus \w+, and generator .* learned from \w+: it would miss copies"
    ):
        open_gate(made.uri, other)
    with pytest.raises(ArtefactError, match=r"learned from \w+"):
        open_inputs(other.uri, Quality(gate=made.uri))


def test_a_gate_must_know_all_that_a_generator_learned_from(store: Path, made: Artefact, tmp_path: Path) -> None:
    generator = open_artefact(f"{store}/generator", "generator")
    other = publish_learner(tmp_path, publish_corpus(f"{tmp_path}/corpus", scans=8))

    def continued(start: str) -> Artefact:
        told = {"recipe": {"finetune": {"start_from": start}}}
        return Artefact(generator.store, generator.manifest.model_copy(update=told))

    with pytest.raises(ArtefactError, match=r"learned from \w+, \w+: it would miss copies"):
        open_gate(made.uri, continued(other.uri))
    with pytest.raises(ArtefactError, match="its start cannot be looked at"):
        open_gate(made.uri, continued(f"{tmp_path}/nowhere"))
    for harmless in (generator.uri, base.URI):
        assert open_gate(made.uri, continued(harmless)).digest == made.digest


def test_a_generator_whose_lineage_is_lost_takes_no_gate(made: Artefact, tmp_path: Path) -> None:
    lost = publish_learner(tmp_path, publish_corpus(f"{tmp_path}/corpus", scans=8))
    (tmp_path / "latents-of-generator" / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"its latents cannot be looked at .* restore it"):
        open_gate(made.uri, lost)
    [corpus] = made.manifest.inputs
    told = {"statistics": lost.manifest.statistics | {"corpora": [corpus.digest]}}
    knowing = Artefact(lost.store, lost.manifest.model_copy(update=told))
    assert open_gate(made.uri, knowing).digest == made.digest


def test_what_is_no_gate_or_is_damaged_is_refused(store: Path, made: Artefact, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is a corpus, expected a gate"):
        load_gate(f"{store}/corpus")
    made.fetch(tmp_path)
    (tmp_path / "manifest.json").write_bytes(made.store.read("manifest.json"))
    assert load_gate(str(tmp_path)).digest == made.digest
    index = tmp_path / INDEX
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(bytes(content))
    with pytest.raises(ArtefactError, match=rf"{INDEX}: changed since it was written"):
        load_gate(str(tmp_path))


def test_a_gate_that_sees_no_copies_or_refuses_anybody_is_not_made(store: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").symlink_to(store / "corpus")
    with pytest.raises(
        ArtefactError, match=r"of planted copies, .* it refuses 0\.\d+, the limit is 1 \(gate\.least_recall\)"
    ):
        publish_gate(tmp_path, steps=1, least_recall=1.0)
    with pytest.raises(ArtefactError, match=r"calibrated on 30 patients, .* chance of 0\.032, the limit is 0\.02"):
        publish_gate(tmp_path, steps=1, most_false_positives=0.02)
    assert not (tmp_path / "gate" / CARD).exists()


def test_a_corpus_without_held_out_patients_has_no_gate(tmp_path: Path) -> None:
    publish_corpus(f"{tmp_path}/corpus", scans=7, shards=1)
    with pytest.raises(ArtefactError, match="fewer than two held-out patients"):
        publish_gate(tmp_path, steps=1)
