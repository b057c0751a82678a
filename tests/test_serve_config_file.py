"""Serve config files are read strictly: Ray would take a mistyped limit without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from scanloom.errors import RecipeError
from serve.config import Service, as_arguments
from serve.config_file import IMPORT_PATH, read_config

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "serve" / "scanloom.yaml"


def written(folder: Path, tree: Any) -> Path:
    file = folder / "service.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def example() -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    return tree


def at(tree: Any, path: str) -> Any:
    """The mapping at a dotted path; one that is not there is made."""
    for part in filter(None, path.split(".")):
        tree = tree[int(part)] if part.isdigit() else tree.setdefault(part, {})
    return tree


def test_the_committed_example_is_read_and_says_every_key_rightly() -> None:
    read = read_config(EXAMPLE)
    assert read.application.import_path == IMPORT_PATH
    assert read.service.generators[0].name == "chest"
    assert read.service.datasets is not None
    longest_s = read.service.limits.longest_deadline_s + read.service.limits.body_s
    assert (read.deploy.http_options.request_timeout_s or 0) > longest_s


def test_a_timeout_of_serve_that_cuts_requests_off_is_told(tmp_path: Path) -> None:
    tree = example()
    tree["http_options"]["request_timeout_s"] = 300
    with pytest.raises(RecipeError, match=r"request_timeout_s: 300 s cuts off requests that may take 300 s"):
        read_config(written(tmp_path, tree))
    for harmless in (None, 0):
        tree["http_options"]["request_timeout_s"] = harmless
        assert read_config(written(tmp_path, tree)).service.limits.longest_deadline_s == 300


def test_what_the_service_writes_of_itself_is_read_as_the_same(tmp_path: Path) -> None:
    service = read_config(EXAMPLE).service
    tree = example()
    tree["applications"][0]["args"] = as_arguments(service)
    assert read_config(written(tmp_path, tree)).service == service


@pytest.mark.parametrize(
    "path, typo, meant",
    [
        ("", "htp_options", "http_options"),
        ("http_options", "prt", "port"),
        ("applications.0", "route_prefx", "route_prefix"),
        ("applications.0.runtime_env", "env_var", "env_vars"),
        ("applications.0.args", "generatrs", "generators"),
        ("applications.0.args.generators.0", "urii", "uri"),
        ("applications.0.args.limits", "zzz", None),
        ("applications.0.args.replicas", "queue", "queued"),
        ("applications.0.args.access", "key_file", "keys_file"),
        ("applications.0.args.datasets", "job_at_once", "jobs_at_once"),
    ],
)
def test_a_typo_at_any_level_names_the_key_that_was_meant(
    tmp_path: Path, path: str, typo: str, meant: str | None
) -> None:
    tree = example()
    at(tree, path)[typo] = {}
    with pytest.raises(RecipeError, match=f"unknown key '{typo}'") as told:
        read_config(written(tmp_path, tree))
    assert "\n" not in str(told.value)
    assert (f"did you mean '{meant}'" if meant else "known: ") in str(told.value)


@pytest.mark.parametrize("key", ["logging_confg", "max_queued_request", "ray_actor_option"])
def test_a_typo_in_a_deployments_options_is_told(tmp_path: Path, key: str) -> None:
    tree = example()
    tree["applications"][0]["deployments"] = [{"name": "engines", key: 1}]
    # Ray takes it.
    ServeDeploySchema.model_validate(tree)
    with pytest.raises(RecipeError, match=rf"applications\.0\.deployments\.0: unknown key '{key}'; did you mean"):
        read_config(written(tmp_path, tree))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"name": "engine"}, "unknown deployment 'engine'; did you mean 'engines'"),
        ({"name": "engines", "max_queued_requests": 5}, "max_queued_requests follows from args.replicas.queued"),
        ({"name": "engines", "autoscaling_config": {"min_replicas": 1}}, "follows from args.replicas"),
        (
            {"name": "engines", "ray_actor_options": {"num_gpus": 1}},
            "follows from args.replicas.cpus, gpus and resources",
        ),
    ],
)
def test_a_setting_can_be_made_in_one_place_only(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    tree = example()
    tree["applications"][0]["deployments"] = [options]
    with pytest.raises(RecipeError, match=told):
        read_config(written(tmp_path, tree))


def test_other_options_of_deployments_may_be_set(tmp_path: Path) -> None:
    tree = example()
    tree["applications"][0]["deployments"] = [{"name": "engines", "logging_config": {"encoding": "JSON"}}]
    assert read_config(written(tmp_path, tree)).application.deployments[0].name == "engines"


@pytest.mark.parametrize(
    "tree, told",
    [
        ([], "expected a Serve config file"),
        ({"applications": []}, "expected a list of one"),
        ({"applications": [{"import_path": "elsewhere:app"}]}, f"expected {IMPORT_PATH}"),
        ({"applications": [{"import_path": IMPORT_PATH, "args": {"generators": []}}]}, "generators"),
        ({"applications": [{"import_path": IMPORT_PATH}], "http_options": {"port": "high"}}, "port"),
    ],
)
def test_what_is_no_config_of_ours_is_one_line(tmp_path: Path, tree: Any, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        read_config(written(tmp_path, tree))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_yaml_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read \(No such file"):
        read_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: {", encoding="utf-8")
    with pytest.raises(RecipeError, match="is not YAML") as error:
        read_config(tmp_path / "broken.yaml")
    assert "\n" not in str(error.value)


def test_settings_that_contradict_each_other_are_told() -> None:
    with pytest.raises(ValueError, match="least 3 is above most 2"):
        Service.model_validate({"generators": [{"name": "a", "uri": "x"}], "replicas": {"least": 3, "most": 2}})
