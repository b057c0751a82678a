"""What a shard holds when images are refused: each drawn until it passes, none for ever, the same after any retry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from scanloom.artefact import Artefact, FileEntry, publish
from scanloom.attributes import Attributes
from scanloom.errors import ArtefactError
from scanloom.models.attribute_probe import ProbeNetwork, load_probe
from scanloom.models.probe_card import CARD, WEIGHTS, Check, ProbeCard
from scanloom.recipe import CellsCohort, Generate, Quality
from scanloom.sampling import production
from scanloom.sampling.dataset import rows_to_bytes, write_shard
from scanloom.sampling.engine import Engine
from scanloom.sampling.noise import gaussian_noise
from scanloom.sampling.plan import Plan, compile_plan, specify
from scanloom.sampling.production import (
    HOPELESS_DRAWS,
    Produced,
    ShardEngine,
    give_up_after,
    produce,
    request,
)
from scanloom.sampling.quality import PASSES, Appearance, Judge, Verdict
from scanloom.sampling.regeneration import regenerate
from scanloom.sampling.tally import Tally
from scanloom.shards.commit import ShardCommit, begin, commit_key
from scanloom.store import Store
from tests.faulty_generator import FaultyGenerator
from tests.tiny_generator import SCHEMA, STATISTICS, publish_generator

EFFUSION, HOPELESS, NORMAL = ["Effusion"], ["Cardiomegaly"], list[str]()


def plan_of(shares: Sequence[tuple[list[str], int]], *, attempts: int = 8, slots: int = 4, seed: int = 3) -> Plan:
    cells = tuple({"findings": findings, "share": share} for findings, share in shares)
    images = sum(share for _, share in shares)
    section = Generate(
        images=images, images_per_shard=images, cohort=CellsCohort(cells=cells), steps=1, guidance_scale=1.0,
        slots=slots, seed=seed, quality=Quality(attempts=attempts),
    )  # fmt: skip
    return compile_plan(specify(section, "faulty", "f" * 64, STATISTICS))


def made(
    plan: Plan,
    *,
    slots: int | None = None,
    judges: Sequence[Judge] | None = None,
    generator: FaultyGenerator | None = None,
) -> tuple[Produced, Engine]:
    engine = Engine(generator or FaultyGenerator(), slots or plan.spec.slots)
    chosen = [Appearance(plan.spec.quality, plan.spec.bits_stored)] if judges is None else judges
    return produce(engine, plan.spec, plan.rows(0), chosen), engine


def first_that_shows(plan: Plan, index: int) -> int:
    """Counted by hand: the first attempt at an image whose noise begins above 0."""
    noise = (gaussian_noise(plan.spec.seed, index, (2, 8, 8), n).flat[0] for n in range(1000))
    return next(attempt for attempt, value in enumerate(noise) if value > 0.0)


def test_an_image_is_drawn_again_until_it_is_not_blank() -> None:
    plan = plan_of([(EFFUSION, 40), (NORMAL, 20)], attempts=20)
    result, _ = made(plan)
    rows = plan.rows(0).to_pylist()
    expected = [first_that_shows(plan, row["index"]) if row["findings"] else 0 for row in rows]
    assert result.attempts == expected
    assert 0 < sum(expected) < 120
    assert len(result.pixels) == 60
    assert min(image.std() for image in result.pixels) > 10
    counted = Counter(reject["index"] for reject in result.rejects)
    assert counted == {row["index"]: n for row, n in zip(rows, expected, strict=True) if n}
    for reject in result.rejects:
        assert reject["reason"] == "blank"
        assert reject["figures"]["contrast"] < reject["figures"]["least"]
    assert [(r["index"], r["attempt"]) for r in result.rejects] == sorted(
        (row["index"], attempt) for row, n in zip(rows, expected, strict=True) for attempt in range(n)
    )


def test_what_enters_does_not_depend_on_slots_or_on_what_ran_before() -> None:
    plan = plan_of([(EFFUSION, 24), (HOPELESS, 12), (NORMAL, 6)], attempts=3)
    expected, engine = made(plan, slots=1)
    for slots in (2, 5, 64):
        result, engine = made(plan, slots=slots)
        assert result.attempts == expected.attempts
        assert result.rejects == expected.rejects
        np.testing.assert_array_equal(result.pixels, expected.pixels)
    again = produce(engine, plan.spec, plan.rows(0), [Appearance(plan.spec.quality, 8)])
    assert not engine.busy
    assert (again.attempts, again.rejects) == (expected.attempts, expected.rejects)


def test_an_image_that_no_attempt_could_make_is_reported_and_left_out() -> None:
    plan = plan_of([(HOPELESS, 2), (NORMAL, 6)], attempts=5)
    result, _ = made(plan)
    rows = plan.rows(0).to_pylist()
    lost = {row["index"] for row in rows if row["findings"]}
    assert len(result.pixels) == len(result.attempts) == 6
    for index in lost:
        told = [(r["attempt"], r["reason"]) for r in result.rejects if r["index"] == index]
        assert told == [*((attempt, "blank") for attempt in range(5)), (5, "infeasible")]


def test_a_cell_that_cannot_be_filled_is_given_up_and_does_not_eat_the_attempts() -> None:
    plan = plan_of([(HOPELESS, 100), (NORMAL, 20)], attempts=8)
    result, engine = made(plan, slots=8)
    assert len(result.pixels) == 20
    hopeless = [row["index"] for row in plan.rows(0).to_pylist() if row["findings"]]
    infeasible = {r["index"]: r["attempt"] for r in result.rejects if r["reason"] == "infeasible"}
    assert give_up_after(8) == 4
    assert infeasible == {index: 8 if place < 4 else 0 for place, index in enumerate(hopeless)}
    assert sum(r["reason"] == "blank" for r in result.rejects) == 8 * 4
    # All attempts would be 820 draws, of which a step makes at most 8.
    assert engine.steps < 820 / 8 / 3


def test_a_cell_of_which_some_can_be_made_is_not_given_up() -> None:
    plan = plan_of([(EFFUSION, 200)], attempts=1)
    result, _ = made(plan, slots=16)
    outcomes = [first_that_shows(plan, index) < 1 for index in range(200)]
    in_a_row = max(len(run) for run in "".join("." if passed else "x" for passed in outcomes).split("."))
    # A rule of four images, whatever their attempts, would have given up.
    assert 4 <= in_a_row < give_up_after(1), "choose another seed"
    assert len(result.pixels) == sum(outcomes)


@pytest.mark.parametrize("attempts", [1, 2, 5, 8, 9, 100])
def test_no_cell_is_given_up_before_enough_draws_of_it_were_refused(attempts: int) -> None:
    assert give_up_after(attempts) * attempts >= HOPELESS_DRAWS
    assert give_up_after(attempts) >= 4


class _Overflowing(FaultyGenerator):
    """Makes pixels that are no numbers where the second number of the noise is above `bound`."""

    def __init__(self, bound: float) -> None:
        self._bound = bound

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        broken = (latents[:, :1, :1, 1:2] > self._bound).expand(-1, 1, 8, 8)
        return super().decode(latents).masked_fill(broken, torch.nan)


def test_pixels_that_are_no_numbers_are_drawn_again_and_stop_nothing() -> None:
    plan = plan_of([(NORMAL, 30)], attempts=30)
    result, _ = made(plan, generator=_Overflowing(0.0))
    assert len(result.pixels) == 30
    assert {reject["reason"] for reject in result.rejects} == {"not-numbers"}
    for row, attempt in zip(plan.rows(0).to_pylist(), result.attempts, strict=True):
        drawn = [gaussian_noise(plan.spec.seed, row["index"], (2, 8, 8), n).flat[1] for n in range(attempt + 1)]
        assert [bool(number > 0.0) for number in drawn] == [True] * attempt + [False]


def test_a_generator_that_makes_no_numbers_at_all_is_an_error_and_no_empty_dataset() -> None:
    with pytest.raises(ArtefactError, match="pixels that are not numbers"):
        made(plan_of([(NORMAL, 12)], attempts=8), generator=_Overflowing(-100.0))
    few, _ = made(plan_of([(NORMAL, 2)], attempts=8), generator=_Overflowing(-100.0))
    assert [r["reason"] for r in few.rejects].count("infeasible") == 2


def test_a_shard_of_which_nothing_could_be_made_is_empty() -> None:
    result, _ = made(plan_of([(HOPELESS, 3)], attempts=1))
    assert result.pixels.shape == (0, 0, 0)
    assert result.attempts == []
    assert [r["reason"] for r in result.rejects] == ["blank", "infeasible"] * 3


def test_slots_stay_full_while_images_are_drawn_again() -> None:
    plan = plan_of([(EFFUSION, 400)], attempts=30)
    result, engine = made(plan, slots=8)
    draws = sum(attempt + 1 for attempt in result.attempts)
    # One step a draw, eight at once; a few steps at the end when fewer than eight are left.
    assert engine.steps <= draws / 8 + 15


def test_a_row_says_which_attempt_is_to_be_drawn() -> None:
    plan = plan_of([(NORMAL, 1)])
    [row] = plan.rows(0).to_pylist()
    assert request(plan.spec, row).attempt == 0
    assert request(plan.spec, row | {"attempt": 3}).attempt == 3


class _Choosy:
    """Refuses a tiny generator's images whose mean is under the middle of what it saw first."""

    def __init__(self, middle: float) -> None:
        self._middle = middle

    def __call__(self, pixels: np.ndarray[Any, Any], requested: Sequence[Attributes]) -> list[Verdict]:
        refused = Verdict("gate", {"least": self._middle})
        return [PASSES if image.mean() > self._middle else refused for image in pixels]


def test_a_real_generators_image_comes_again_from_the_attempt_that_entered(tmp_path: Path) -> None:
    plan, engine = tiny(tmp_path)
    first = produce(engine._engine, plan.spec, plan.rows(0), [])
    judge = _Choosy(float(np.median([image.mean() for image in first.pixels])))
    result = produce(engine._engine, plan.spec, plan.rows(0), [judge])
    lost = {r["index"] for r in result.rejects if r["reason"] == "infeasible"}
    rows = [row for row in plan.rows(0).to_pylist() if row["index"] not in lost]
    assert any(result.attempts)
    for row, attempt, image in zip(rows, result.attempts, result.pixels, strict=True):
        np.testing.assert_array_equal(engine.again(row | {"attempt": attempt}), image)


def tiny(folder: Path, **changes: Any) -> tuple[Plan, ShardEngine]:
    generator: Artefact = publish_generator(str(folder))
    section = Generate(images=8, images_per_shard=8, slots=4, steps=2, **changes)
    plan = compile_plan(specify(section, "tiny", generator.digest, STATISTICS))
    return plan, ShardEngine(plan.spec, generator.uri, "cpu", 1)


def test_an_image_comes_again_on_as_many_threads_as_its_shard_was_made_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = publish_generator(str(tmp_path / "generator"))
    plan = compile_plan(
        specify(Generate(images=4, images_per_shard=2, slots=4, steps=2), "tiny", generator.digest, STATISTICS)
    )
    engine = ShardEngine(plan.spec, generator.uri, "cpu", 1)
    store, tally = Store(str(tmp_path / "dataset")), Tally(plan.spec)
    begin(store, "dataset", plan.digest)
    for shard in (0, 1):
        made = engine({"shard": shard, "rows": rows_to_bytes(plan.rows(shard))})
        made["environment"] = made["environment"] | ({"threads": 2, "torch": "older"} if shard else {})
        tally.add(ShardCommit.model_validate_json(write_shard(made, plan.spec, store)["commit"]))
    dataset = publish(
        store, kind="dataset", name="d", recipe={}, inputs=[generator], files=tally.files(),
        statistics={"spec": plan.spec.model_dump(mode="json"), **tally.statistics()},
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        for index in (3, 0):
            again = regenerate(dataset.uri, plan.spec.image_id(index))
            assert torch.get_num_threads() == 1 + index // 2
            told = f"it was made with torch older; here it is torch {torch.__version__}"
            assert again.told == (told if index == 3 else None)
        store.delete([commit_key(0), commit_key(1)])
        again = regenerate(dataset.uri, plan.spec.image_id(3))
        assert torch.get_num_threads() == 1
        assert again.told is not None
        assert "made in 2 environments" in again.told
        with monkeypatch.context() as patched:
            # One that only two threads give.
            single = ShardEngine.again
            patched.setattr(ShardEngine, "again", lambda e, row: single(e, row) ^ (torch.get_num_threads() == 1))
            assert regenerate(dataset.uri, plan.spec.image_id(3)).difference == 0
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_plan_that_a_probe_checks_is_not_made_without_it(tmp_path: Path) -> None:
    plan = plan_of([(NORMAL, 1)])
    spec = plan.spec.model_copy(update={"probe": "p" * 64})
    with pytest.raises(ArtefactError, match="say where it lies"):
        production.judges(spec, None, "cpu")
    with pytest.raises(ArtefactError, match="no artefact here"):
        production.judges(spec, str(tmp_path), "cpu")


def publish_probe(uri: str, limit: float) -> Artefact:
    """A probe with random weights that refuses every request for F of which it reads less than `limit`."""
    check = Check(attribute="sex", value="F", scans=100, limit=limit, rejected_share=0.02)
    card = ProbeCard(
        name="random", attributes=SCHEMA, size_px=16, channels=(8,), scales={"age": (50.0, 10.0)},
        false_reject_share=0.02, trained_scans=1, held_out_scans=1, checks=(check,),
    )  # fmt: skip
    torch.manual_seed(0)
    network = ProbeNetwork(card.channels, len(card.outputs))
    store = Store(uri)
    store.write(WEIGHTS, save(network.state_dict()))
    store.write(CARD, card.model_dump_json().encode())
    files = [FileEntry.of(store.digest(name)) for name in (WEIGHTS, CARD)]
    return publish(store, kind="probe", name="random", recipe={}, inputs=[], files=files, statistics={})


def test_what_a_plans_probe_disagrees_with_does_not_enter(tmp_path: Path) -> None:
    generator = publish_generator(str(tmp_path / "generator"))
    section = Generate(
        images=12, images_per_shard=12, slots=4, steps=2, quality=Quality(attempts=40),
        cohort=CellsCohort(cells=({"sex": "F", "share": 1}, {"sex": "M", "share": 1})),
    )  # fmt: skip
    free = compile_plan(specify(section, "tiny", generator.digest, STATISTICS))
    anything = ShardEngine(free.spec, generator.uri, "cpu", 1)({"shard": 0, "rows": rows_to_bytes(free.rows(0))})
    reader = load_probe(publish_probe(str(tmp_path / "reader"), 0.0).uri)
    read = reader.read(np.frombuffer(anything["pixels"], np.uint8).reshape(12, 16, 16), 8)[:, 0]
    limit = float(np.median(read))

    probe = publish_probe(str(tmp_path / "probe"), limit)
    plan = compile_plan(specify(section, "tiny", generator.digest, STATISTICS, probe.digest))
    assert plan.digest != free.digest
    made = ShardEngine(plan.spec, generator.uri, "cpu", 1, probe.uri)({"shard": 0, "rows": rows_to_bytes(plan.rows(0))})
    lost = {reject["index"] for reject in made["rejects"] if reject["reason"] == "infeasible"}
    rows = [row for row in plan.rows(0).to_pylist() if row["index"] not in lost]
    pixels = np.frombuffer(made["pixels"], np.uint8).reshape(-1, 16, 16)
    read = reader.read(pixels, 8)[:, 0]
    assert [bool(value >= limit) for value, row in zip(read, rows, strict=True) if row["sex"] == "F"].count(False) == 0
    refused = [reject for reject in made["rejects"] if reject["reason"] == "disagrees"]
    assert refused
    assert {tuple(reject["figures"]) for reject in refused} == {("sex=F", "least")}
    asked = {row["index"]: row["sex"] for row in plan.rows(0).to_pylist()}
    assert {asked[reject["index"]] for reject in refused} == {"F"}
    with pytest.raises(ArtefactError, match="say where it lies"):
        ShardEngine(plan.spec, generator.uri, "cpu", 1)
