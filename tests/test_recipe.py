from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError
from scanloom.recipe import RESERVED_COLUMNS, Dicom, PhantomSource, Recipe, load_recipe, parse_recipe
from scanloom.shards.schemas import corpus_schema, dataset_schema, latents_schema
from scanloom.store import Store
from scanloom.stored_recipe import recipe_at

AGE = {"name": "age", "kind": "number", "unit": "years", "minimum": 0, "maximum": 90}
SEX = {"name": "sex", "kind": "category", "values": ["F", "M"], "aliases": {"female": "F"}}
FINDINGS = {"name": "findings", "kind": "labels", "values": ["effusion", "nodule"]}


def _tree(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "r",
        "store": "s3://bucket/r",
        "attributes": [AGE, SEX, FINDINGS],
        "prepare": {"source": {"kind": "phantoms"}},
        "generate": {"images": 8},
    }
    return {**base, **changes}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(_tree()))
    return path


def _refusal(**changes: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(_tree(**changes), "r.yaml")
    text = str(caught.value)
    assert text.startswith("recipe r.yaml: ")
    assert "\n" not in text
    return text


def test_a_small_recipe_is_filled_with_defaults_and_comes_back_from_its_manifest(file: Path) -> None:
    recipe = load_recipe(file)
    assert isinstance(recipe.prepare and recipe.prepare.source, PhantomSource)
    assert recipe.generate is not None
    assert recipe.generate.dicom == Dicom()
    assert recipe.uri("corpus") == "s3://bucket/r/corpus"
    assert parse_recipe(recipe.model_dump(mode="json"), "manifest") == recipe


def test_a_local_store_is_the_same_place_for_a_worker_that_runs_in_another_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    told = load_recipe(file, ["store=runs/r"]).uri("generator")
    monkeypatch.chdir("/")
    assert told == f"{tmp_path}/runs/r/generator"


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"stroe": 1}, "unknown key 'stroe'; did you mean 'store'?"),
        ({"generate": {"images": 8, "guidance": 2}}, "generate: unknown key 'guidance'; did you mean 'guidance_scale'"),
        ({"generate": {"images": 8, "dicom": {"enable": 1}}}, "generate.dicom: unknown key 'enable'; did you mean"),
        ({"prepare": {"source": {"kind": "phantoms", "scan": 5}}}, "unknown key 'scan'; did you mean 'scans'?"),
        ({"finetune": {"zzz": 1}}, "unknown key 'zzz'; known: attribute_dropout, batch_size,"),
    ],
)  # fmt: skip
def test_a_typo_names_the_nearest_key_at_any_depth(changes: dict[str, Any], hint: str) -> None:
    assert hint in _refusal(**changes)


def test_a_wrong_kind_lists_the_kinds() -> None:
    text = _refusal(prepare={"source": {"kind": "dcm"}})
    assert all(kind in text for kind in ("prepare.source", "'dicomweb'", "'image-folder'", "'phantoms'"))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"generate": {"images": 0}}, "generate.images: Input should be greater than or equal to 1 (got 0)"),
        ({"generate": {"images": 8, "guidance_scale": 0.5}}, "generate.guidance_scale"),
        ({"finetune": {"learning_rate": float("nan")}}, "finetune.learning_rate"),
        ({"finetune": {"learning_rate": float("inf")}}, "finetune.learning_rate"),
        ({"finetune": {"batch_size": 7, "workers": 2}}, "batch_size 7 is not a multiple of workers 2"),
        ({"prepare": {"source": {"kind": "phantoms"}, "split": {"train": 0.9}}}, "shares sum to 1.1, not to 1"),
        ({"prepare": {"source": {"kind": "phantoms"}, "size_px": 65}}, "prepare.size_px"),
        ({"attributes": []}, "attributes"),
        ({"attributes": [AGE, AGE]}, "attribute names repeat: age"),
        ({"attributes": [{**AGE, "name": "seed"}]}, "'seed' has the name of a shard column"),
        ({"attributes": [{**AGE, "minimum": 90}]}, "age: minimum 90.0 is not below maximum 90.0"),
        ({"attributes": [{**AGE, "cap": 95}]}, "age: cap 95.0"),
        ({"attributes": [{**SEX, "aliases": {"female": "W"}}]}, "sex: alias 'female' stands for 'W'; known: F, M"),
        ({"attributes": [{**SEX, "values": ["F", "F"]}]}, "sex: values repeat: F"),
        ({"attributes": [{**FINDINGS, "values": ["a|b"]}]}, "findings: label 'a|b'"),
        ({"attributes": [{**FINDINGS, "values": ["No Finding"]}]}, "findings: label 'No Finding'"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(changes: dict[str, Any], hint: str) -> None:
    assert hint in _refusal(**changes)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("generate.images=512", "generate", "images", 512),
        ("finetune.learning_rate=1e-5", "finetune", "learning_rate", 1e-5),
        ("finetune.learning_rate=2.5E-05", "finetune", "learning_rate", 2.5e-5),
        ("autoencoder.channels=[8, 16]", "autoencoder", "channels", (8, 16)),
        ("autoencoder.path=s3://b/x=y", "autoencoder", "path", "s3://b/x=y"),
        ("autoencoder.path=nan", "autoencoder", "path", "nan"),
        ("autoencoder.path=null", "autoencoder", "path", None),
        ("generate.dicom={enabled: false}", "generate", "dicom", Dicom(enabled=False)),
    ],
)
def test_set_overrides_one_value_and_makes_absent_sections(
    file: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load_recipe(file, [override]), section), key) == value


def test_a_later_set_wins_and_reaches_into_nested_sections(file: Path) -> None:
    recipe = load_recipe(file, ["prepare.source.scans=5", "prepare.source.scans=6", "generate.dicom.enabled=no"])
    assert recipe.prepare is not None
    assert isinstance(recipe.prepare.source, PhantomSource)
    assert recipe.prepare.source.scans == 6
    assert recipe.generate is not None
    assert not recipe.generate.dicom.enabled


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("generate.images", "expected KEY=VALUE"),
        ("=5", "expected KEY=VALUE"),
        ("generate.images=[1", "the value is not YAML"),
        ("name.x=5", "'name' is not a section"),
        ("generate.imags=5", "unknown key 'imags'; did you mean 'images'?"),
        ("generat.images=5", "unknown key 'generat'; did you mean 'generate'?"),
        ("generate.images=many", "generate.images"),
    ],
)
def test_a_wrong_set_is_one_line(file: Path, override: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [override])
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"name: [", "not YAML"),
        (b"- a\n- b", "holds list, expected a mapping"),
        (b"", "holds NoneType"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"name: a\tb: c\n x", "not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path: Path, content: bytes, hint: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=hint) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_generator_lies_beside_unless_the_recipe_names_another(file: Path) -> None:
    assert load_recipe(file, ["store=s3://b/r"]).generator_uri == "s3://b/r/generator"
    assert load_recipe(file, ["generate.generator=s3://other/g"]).generator_uri == "s3://other/g"


@pytest.mark.parametrize("order", ["", "a/b", "a b", "x" * 65])
def test_an_order_is_an_id(file: Path, order: str) -> None:
    with pytest.raises(RecipeError, match=r"generate\.order"):
        load_recipe(file, [f"generate.order='{order}'"])


@pytest.mark.s3
def test_a_recipe_in_a_store_is_read_as_one_in_a_file(file: Path, store_uri: str) -> None:
    store = Store(store_uri)
    store.write("orders/recipe.yaml", file.read_bytes())
    place = f"{store_uri}/orders/recipe.yaml"
    assert recipe_at(place, ["seed=7"]) == load_recipe(file, ["seed=7"]) == recipe_at(str(file), ["seed=7"])
    for content, hint in ((b"name: [", "not YAML"), (b"\xff\xfe\x00", "not UTF-8"), (b"", "holds NoneType")):
        store.write("orders/bad.yaml", content)
        with pytest.raises(RecipeError, match=rf"{store_uri}/orders/bad.yaml: .*{hint}"):
            recipe_at(f"{store_uri}/orders/bad.yaml")
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        recipe_at(f"{store_uri}/orders/none.yaml")
    with pytest.raises(RecipeError, match="s3://: cannot be read"):
        recipe_at("s3://")


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / name)


def test_no_attribute_can_shadow_a_shard_column(file: Path) -> None:
    schema = AttributeSchema(declarations=load_recipe(file).attributes)
    columns = {
        name
        for made in (corpus_schema(schema), dataset_schema(schema), latents_schema(schema, (1, 1, 1)))
        for name in made.names
    }
    assert columns - {*schema.names} <= RESERVED_COLUMNS


def test_a_recipe_is_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(file).name = "other"


def test_every_field_is_typed_for_editors() -> None:
    properties = Recipe.model_json_schema()["$defs"]["Generate"]["properties"]
    assert properties["solver"]["enum"] == ["ddim", "dpmpp-2m", "euler"]
