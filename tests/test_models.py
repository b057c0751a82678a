"""Conditions, denoiser and generator folder: what is told apart, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from scanloom.artefact import Artefact, FileEntry, publish
from scanloom.attributes import Attributes, AttributeSchema
from scanloom.errors import ArtefactError
from scanloom.models.autoencoder import build_autoencoder, decode, latent_shape, load_autoencoder, moments, normalise
from scanloom.models.conditioner import AttributeConditioner, feature_widths, features
from scanloom.models.family import read_denoiser, save_generator
from scanloom.models.generator import (
    load_generator,
    read_card,
    read_generator,
    read_latent_shape,
    require_continuable,
)
from scanloom.models.noise_schedule import PredictionType, read_schedule
from scanloom.recipe import Autoencoder
from scanloom.store import Store
from tests.tiny_generator import ATTRIBUTES, SCHEMA, publish_generator

FULL: Attributes = {"sex": "F", "age": 60.0, "view": "PA", "findings": ("Effusion",)}


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return publish_generator(str(tmp_path_factory.mktemp("generator")))


def tokens(*rows: Attributes) -> torch.Tensor:
    """[B, A, D] of a conditioner with the same weights at every call."""
    torch.manual_seed(0)
    conditioner = AttributeConditioner(SCHEMA, 16)
    with torch.no_grad():
        made: torch.Tensor = conditioner(torch.from_numpy(features(SCHEMA, rows)))
    return made


def test_features_hold_every_value_and_leave_unknown_at_zero() -> None:
    table = features(SCHEMA, [FULL, {}])
    assert feature_widths(SCHEMA) == [1, 2, 1, 4]
    assert table.tolist() == [[1, 0.5, 1, 1, 1, 0, 1, 0], [0] * 8]


@pytest.mark.parametrize(
    ("name", "other"), [("sex", "M"), ("age", 20.0), ("view", "AP"), ("findings", ()), ("findings", ("Nodule",))]
)
def test_a_change_of_one_attribute_changes_its_token_alone(name: str, other: object) -> None:
    before, after = tokens(FULL, {**FULL, name: other})  # type: ignore[dict-item]
    changed = [not torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True)]
    assert changed == [attribute.name == name for attribute in ATTRIBUTES]


def test_no_findings_is_a_statement_and_unknown_findings_is_none() -> None:
    known, unknown = tokens({**FULL, "findings": ()}, {**FULL, "findings": None})
    assert not torch.allclose(known[3], unknown[3])


def test_the_age_of_the_youngest_is_not_an_unknown_age() -> None:
    youngest, unknown = tokens({**FULL, "age": 0.0}, {**FULL, "age": None})
    assert not torch.allclose(youngest[1], unknown[1])


def test_a_dropped_attribute_is_an_unknown_one() -> None:
    torch.manual_seed(0)
    conditioner = AttributeConditioner(SCHEMA, 16)
    table = torch.from_numpy(features(SCHEMA, [FULL, {**FULL, "age": None}, {}]))
    drop = torch.zeros(3, 4, dtype=torch.bool)
    drop[0, 1] = True
    dropped, unknown, nothing = conditioner(table, drop)
    assert torch.equal(dropped, unknown)
    everything = conditioner(table, torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(everything[0], nothing)


def test_the_null_condition_is_that_of_an_image_of_which_nothing_is_known(generator: Artefact) -> None:
    loaded = load_generator(generator.uri)
    assert torch.equal(loaded.null_condition(2), loaded.condition([{}, dict.fromkeys(SCHEMA.names)]))


def test_the_denoiser_listens_to_its_condition_and_its_timestep(generator: Artefact) -> None:
    loaded = load_generator(generator.uri)
    latents = torch.zeros(3, *loaded.latent_shape)
    told = loaded.condition([FULL, {**FULL, "sex": "M"}, FULL])
    first, second, third = loaded.denoise(latents, torch.tensor([500, 500, 100]), told)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, third)


def test_normalised_latents_decode_to_what_the_latents_decode_to() -> None:
    vae = build_autoencoder(Autoencoder(channels=(8, 8)), 16, seed=0)
    vae.register_to_config(scaling_factor=0.4, shift_factor=0.3)
    pixels = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, logvar = moments(vae, pixels)
        expected = (vae.decode(mean).sample * 0.5 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decode(vae, normalise(vae, mean)), expected, rtol=1e-4, atol=1e-5)
    assert mean.shape == logvar.shape == (2, *latent_shape(vae, 16))


def test_the_shape_of_latents_is_known_without_loading_weights(generator: Artefact) -> None:
    assert read_latent_shape(generator, 16) == load_generator(generator.uri).latent_shape


@pytest.mark.parametrize("missing", ["generator.json", "unet/config.json", "vae/config.json", "scheduler"])
def test_a_generator_without_one_of_its_parts_is_one_clear_error(
    generator: Artefact, tmp_path: Path, missing: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(generator.uri, folder)
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ArtefactError) as caught:
        read_generator(folder, "digest")
    assert "\n" not in str(caught.value)


def test_a_generator_of_an_unknown_family_is_refused_by_name(generator: Artefact, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(generator.uri, folder)
    card = json.loads((folder / "generator.json").read_text())
    (folder / "generator.json").write_text(json.dumps(card | {"family": "gan"}))
    with pytest.raises(ArtefactError, match=r"family.*'attribute-unet'.*'gan'"):
        read_generator(folder, "digest")


def test_weights_that_changed_in_the_store_are_found_when_the_generator_is_loaded(tmp_path: Path) -> None:
    artefact = publish_generator(str(tmp_path))
    weights = tmp_path / "conditioner" / "conditioner.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtefactError, match=r"conditioner\.safetensors: changed"):
        load_generator(artefact.uri)


def test_training_goes_on_only_on_the_latents_and_target_of_before(generator: Artefact, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    files = [FileEntry.of(file) for file in store.put_folder(Path(generator.uri) / "vae", "vae")]
    same = publish(store, kind="autoencoder", name="tiny", recipe={}, inputs=[], files=files, statistics={})
    retrained = [file.model_copy(update={"sha256": "0" * 64}) for file in files]
    changed = Artefact(store, same.manifest.model_copy(update={"files": tuple(retrained)}))
    card = read_card(Path(generator.uri))
    older = [d.model_copy(update={"maximum": 90.0}) if d.name == "age" else d for d in ATTRIBUTES]
    require_continuable(generator, card, "v_prediction", same)
    target: PredictionType
    for update, target, latents_of, why in (
        ({"condition_dim": 32}, "v_prediction", same, "condition_dim is 16, this recipe's is 32"),
        ({"latent_shape": (4, 16, 16)}, "v_prediction", same, "latent shape"),
        ({"attributes": AttributeSchema(declarations=ATTRIBUTES[:2])}, "v_prediction", same, "is sex, age, view"),
        ({"attributes": AttributeSchema(declarations=tuple(older))}, "v_prediction", same, "'age' has another"),
        ({}, "epsilon", same, "objective is v_prediction, this recipe's is epsilon"),
        ({}, "v_prediction", changed, "autoencoder digest"),
    ):
        with pytest.raises(ArtefactError, match=f"cannot go on from it.*{why}"):
            require_continuable(generator, card.model_copy(update=update), target, latents_of)


@pytest.mark.parametrize("age", [20.0, 63.0])
def test_the_condition_of_a_number_survives_training_in_bfloat16(age: float) -> None:
    torch.manual_seed(0)
    conditioner = AttributeConditioner(SCHEMA, 16)
    table = torch.from_numpy(features(SCHEMA, [{"age": age}]))
    exact = conditioner(table)[0, 1]
    rounded = conditioner.bfloat16()(table)[0, 1].float()
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_saving_what_was_loaded_from_two_places_writes_the_same_bytes(generator: Artefact, tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        shutil.copytree(Path(generator.uri) / "vae", tmp_path / name / "vae")
        vae = load_autoencoder(tmp_path / name / "vae")
        card = read_card(Path(generator.uri))
        denoiser = read_denoiser(Path(generator.uri), card)
        schedule = read_schedule(Path(generator.uri))
        save_generator(tmp_path / name / "saved", card, denoiser, vae, schedule, None)
        saved = sorted((tmp_path / name / "saved").rglob("*.*"))
        written.append({file.relative_to(tmp_path / name): file.read_bytes() for file in saved})
    assert written[0] == written[1]
    assert len(written[0]) == 8


def test_a_folder_that_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="not a diffusers autoencoder"):
        load_autoencoder(tmp_path)
