"""The privacy gate in the service: what it refuses is drawn again and counted, and every answer names it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scanloom.artefact import Artefact, open_artefact
from scanloom.errors import ArtefactError, QualityError, ScanloomError
from scanloom.models.privacy_gate import load_gate
from scanloom.recipe import Quality
from scanloom.sampling.desk import Desk
from scanloom.sampling.gate import Privacy
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.sampling.inputs import open_inputs
from scanloom.sampling.workbench import open_workbench
from scanloom.stored_recipe import recipe_at
from serve.catalogue import Offer, read_catalogue, read_offer
from serve.config import Service
from serve.ledger import Ledger
from tests.gated_generator import bench_of
from tests.made_gate import RememberingGenerator, publish_chain, publish_gate, publish_learner, train_scans
from tests.phantom_corpus import publish_corpus
from tests.served_datasets import REQUEST, service


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus, generator and gate, whose encoder has hardly learned: copies that are exact it finds."""
    folder = tmp_path_factory.mktemp("gated")
    publish_chain(folder)
    publish_gate(folder, steps=2)
    return folder


@pytest.fixture(scope="module")
def made(store: Path) -> Artefact:
    return open_artefact(f"{store}/gate", "gate")


@pytest.fixture(scope="module")
def settings(store: Path, made: Artefact) -> Service:
    return behind(service(f"{store}/datasets", f"{store}/generator"), made.uri)


def behind(service: Service, gate: str) -> Service:
    """The service with a gate before its generator."""
    [served] = service.generators
    return service.model_copy(update={"generators": (served.model_copy(update={"quality": Quality(gate=gate)}),)})


@pytest.fixture
def remembering(store: Path, made: Artefact) -> Iterator[Any]:
    """Opens a desk with a generator of whose draws a share are training scans, behind the gate."""
    desks: list[Desk] = []
    gate = load_gate(made.uri)
    judge = Privacy(gate.card.tau, lambda pixels: gate.likeness(pixels, 8))
    scans = train_scans(open_artefact(f"{store}/corpus", "corpus"))

    def opened(share: float) -> Desk:
        bench = bench_of(RememberingGenerator(scans, share), judges=[judge], attempts=8, gate=gate.digest)
        desks.append(Desk(lambda name: bench))
        return desks[-1]

    yield opened
    for desk in desks:
        desk.close(0.0)


def order(count: int) -> ImageOrder:
    return ImageOrder("r", "g", {}, seed=3, due=time.time() + 60, count=count, steps=1, guidance_scale=1.0)


def test_what_the_gate_refuses_is_drawn_again_and_counted(remembering: Any, made: Artefact) -> None:
    desk = remembering(0.5)
    answer: MadeImages = desk.take(order(12)).result(60)
    assert answer.gate == made.digest
    assert len(answer.pixels) == 12
    assert answer.rejects == desk.status().rejects == {"gate": sum(answer.attempts)}
    assert sum(answer.attempts) > 3
    gate = load_gate(made.uri)
    assert (gate.likeness(answer.pixels, 8) <= gate.card.tau).all()


def test_a_generator_that_only_remembers_answers_nobody(remembering: Any) -> None:
    with pytest.raises(QualityError, match=r"none of 8 attempts passed the quality checks \(gate 8 in all\)"):
        remembering(1.0).take(order(1)).result(60)


def test_an_engine_opens_with_its_gate_and_makes_what_a_dataset_would(
    store: Path, made: Artefact, tmp_path: Path
) -> None:
    free, gated = (
        open_workbench(f"{store}/generator", slots=4, quality=Quality(gate=gate)) for gate in (None, made.uri)
    )
    assert (free.gate, gated.gate) == ("ungated", made.digest)
    assert [len(bench.judges(8)) for bench in (free, gated)] == [1, 2]
    other = publish_learner(tmp_path, publish_corpus(f"{tmp_path}/corpus", scans=8))
    with pytest.raises(ArtefactError, match="is a gate of corpus"):
        open_workbench(other.uri, slots=4, quality=Quality(gate=made.uri))


def test_a_catalogue_tells_the_gate_and_does_not_open_with_a_wrong_one(
    settings: Service, made: Artefact, tmp_path: Path
) -> None:
    [offer] = read_catalogue(settings).values()
    assert offer.gate == offer.info().gate == made.digest
    other = publish_learner(tmp_path, publish_corpus(f"{tmp_path}/corpus", scans=8))
    with pytest.raises(ArtefactError, match="is a gate of corpus"):
        read_catalogue(behind(service(str(tmp_path / "datasets"), other.uri), made.uri))


def test_an_image_behind_a_gate_has_a_name_of_its_own(settings: Service, made: Artefact) -> None:
    [served] = settings.generators
    offer: Offer = read_offer(served)
    told = [
        offer.image_digest(order(2), place, offer.digest, gate) for gate in ("ungated", made.digest) for place in (0, 1)
    ]
    assert len(set(told)) == 4


def test_an_ordered_dataset_is_made_behind_the_same_gate(settings: Service, made: Artefact, store: Path) -> None:
    ledger = Ledger(settings)
    job, _ = ledger.place("acme", REQUEST, "request-1")
    recipe = recipe_at(ledger.orders.store.at(f"acme/{job.id}").uri_of("recipe.yaml"))
    assert recipe.generate is not None
    assert recipe.generate.quality.gate == made.uri
    inputs = open_inputs(recipe.generator_uri, recipe.generate.quality)
    assert inputs.specify(recipe.generate).digest == job.plan
    assert inputs.specify(recipe.generate).gate == made.digest


def test_no_dataset_is_ordered_behind_a_gate_that_is_gone(store: Path, tmp_path: Path) -> None:
    ledger = Ledger(behind(service(str(tmp_path / "datasets"), f"{store}/generator"), str(tmp_path / "nowhere")))
    with pytest.raises(ScanloomError, match=r"cannot be used now: .*nowhere: there is no artefact here"):
        ledger.place("acme", REQUEST, "request-1")
    assert ledger.orders.store.list() == []
