"""More steps than a generator's noise schedule has: refused by the field's name, before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scanloom.api import DatasetRequest
from scanloom.artefact import FileEntry, publish
from scanloom.errors import ArtefactError, RecipeError
from scanloom.estimate import estimate
from scanloom.models.generator import load_generator
from scanloom.recipe import parse_recipe
from scanloom.recipe_generate import Quality
from scanloom.sampling.engine import Engine, ImageRequest
from scanloom.sampling.inputs import open_inputs
from scanloom.store import Store
from serve.ledger import Ledger
from tests.served_datasets import service
from tests.served_images import ORDER, applications, problem, settings
from tests.tiny_generator import ATTRIBUTES, STATISTICS, publish_generator

MOST = 300


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_generator(str(tmp_path_factory.mktemp("generator")), timesteps=MOST).uri


def test_as_many_are_told_as_the_engine_takes(generator: str) -> None:
    assert open_inputs(generator, Quality()).most_steps == MOST
    engine = Engine(load_generator(generator), 2)
    engine.submit(ImageRequest(0, 0, {}, MOST))
    with pytest.raises(RecipeError, match=f"1 to {MOST}"):
        engine.submit(ImageRequest(0, 0, {}, MOST + 1))


def test_a_plan_is_refused(generator: str, tmp_path: Path) -> None:
    attributes = [declaration.model_dump(mode="json") for declaration in ATTRIBUTES]

    def planned(steps: int) -> Any:
        section = {"images": 4, "generator": generator, "steps": steps}
        tree = {"name": "r", "store": str(tmp_path), "attributes": attributes, "generate": section}
        recipe = parse_recipe(tree, "r")
        assert recipe.generate is not None
        return estimate(recipe), open_inputs(generator, Quality()).specify(recipe.generate)

    assert planned(MOST)[1].steps == MOST
    with pytest.raises(RecipeError, match=rf"^generate\.steps={MOST + 1}: .*{MOST} at most"):
        planned(MOST + 1)


def test_the_service_refuses_images_and_datasets(generator: str, tmp_path: Path) -> None:
    with applications(settings(generator, str(tmp_path))) as opened:
        ask = opened()
        assert ask("GET", "/v1/generators/tiny").json()["most_steps"] == MOST
        for path, body in (("/v1/images", {}), ("/v1/datasets", ORDER)):
            assert ask("POST", path, json=body | {"steps": MOST}).status_code in (200, 202)
            told = problem(ask("POST", path, json=body | {"steps": MOST + 1}), 422, "invalid")
            assert [fault.field for fault in told.errors] == ["steps"]
            assert str(MOST) in told.detail


def test_an_order_that_comes_without_http_is_not_written(generator: str, tmp_path: Path) -> None:
    ledger = Ledger(service(str(tmp_path), generator))
    with pytest.raises(RecipeError, match=r"generate\.steps"):
        ledger.place("clinic-a", DatasetRequest.model_validate(ORDER | {"steps": MOST + 1}), "r")
    assert ledger.jobs(None, 10).datasets == []


@pytest.mark.parametrize("text", ["{", "[]", '{"num_train_timesteps": "many"}', '{"num_train_timesteps": 0}'])
def test_a_schedule_that_says_nothing_is_named(tmp_path: Path, text: str) -> None:
    store = Store(str(tmp_path))
    store.write("scheduler/scheduler_config.json", text.encode())
    files = [FileEntry.of(store.digest("scheduler/scheduler_config.json"))]
    publish(store, kind="generator", name="g", recipe={}, inputs=[], files=files, statistics=STATISTICS)
    with pytest.raises(ArtefactError, match=r"scheduler_config\.json"):
        open_inputs(store.uri, Quality())
