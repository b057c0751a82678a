"""jobs.encode on real Ray: text families, resuming, and the autoencoder's stage."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from jobs.encode import encode
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.prompts import prompt
from scanloom.recipe import Recipe
from scanloom.shards.reader import rows
from scanloom.shards.schemas import prompt_hash
from scanloom.training.latents import read_prompts
from tests.phantom_corpus import SCHEMA, phantom_recipe, publish_corpus
from tests.tiny_families import write_base

SHARDS = 6


def recipe(store: Path, **sections: object) -> Recipe:
    """A recipe small enough for a test."""
    return phantom_recipe(store, **({"encode": {"crops": 1, "workers": 2}} | sections))


def sd(store: Path) -> dict[str, Any]:
    """The recipe's section of a text family whose weights are in the store."""
    return {"denoiser": {"family": "sd", "weights": f"{store}/base"}}


@pytest.fixture(scope="module")
def encoded(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which a corpus was encoded for a text family without disturbance."""
    store = tmp_path_factory.mktemp("encoded")
    publish_corpus(f"{store}/corpus", scans=48, shards=SHARDS, distinct=5)
    write_base("sd", store / "base")
    encode(recipe(store, finetune=sd(store)))
    return store


@pytest.fixture
def beside(encoded: Path, tmp_path: Path) -> Path:
    """Another store with the same corpus and base weights, and nothing made of them."""
    for name in ("corpus", "base"):
        (tmp_path / name).symlink_to(encoded / name)
    return tmp_path


def interrupted(store: Path, recipe: Recipe, far_enough: Callable[[], bool]) -> None:
    """Run the job in a process of its own, and kill it with all its workers' driver once it is far enough."""
    file = store / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    driver = subprocess.Popen([sys.executable, "-m", "jobs.encode", str(file)], start_new_session=True)
    try:
        while not far_enough():
            try:
                driver.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail("the job ended before it could be killed")
    finally:
        driver.kill()
        driver.wait()


def commits(store: Path) -> dict[str, int]:
    """The committed shards, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in (store / "latents" / "commits").glob("shard-*.json")}


def test_a_text_family_is_encoded_with_what_its_base_weights_hold(encoded: Path) -> None:
    latents, autoencoder = open_artefact(f"{encoded}/latents", "latents"), open_artefact(f"{encoded}/autoencoder")
    assert autoencoder.manifest.statistics["taken_from"] == f"{encoded}/base"
    assert list(verify(latents)) == list(verify(autoencoder)) == []
    held = [row for split in ("train", "validation") for row in rows(latents, split, ["id", "prompt", *SCHEMA.names])]
    assert len({row["id"] for row in held}) == len(held) == latents.manifest.statistics["rows"] == 36 * 2 + 12
    assert latents.manifest.statistics["encoded"] < len(held)
    assert {row["prompt"] for row in held} == {prompt_hash(prompt(SCHEMA, SCHEMA.from_row(row))) for row in held}
    prompts = read_prompts(latents)
    assert prompts is not None
    assert set(prompts.number) == {row["prompt"] for row in held} | {prompt_hash("")}
    assert latents.manifest.statistics["prompts"] == len(prompts.number)


def test_only_what_is_missing_is_encoded_again(encoded: Path, tmp_path: Path) -> None:
    for name in ("corpus", "base", "autoencoder"):
        (tmp_path / name).symlink_to(encoded / name)
    shutil.copytree(encoded / "latents", tmp_path / "latents")
    (tmp_path / "latents" / "manifest.json").unlink()
    before = commits(tmp_path)
    lost = sorted(before)[1]
    (tmp_path / "latents" / "commits" / lost).unlink()
    # The weights' place is part of the recipe, what they hold is part of the plan.
    encode(recipe(tmp_path, finetune=sd(encoded)))
    after = commits(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {lost}
    assert open_artefact(f"{tmp_path}/latents").digest == open_artefact(f"{encoded}/latents").digest


def test_more_gpus_than_there_are_are_refused_and_not_waited_for(encoded: Path, beside: Path) -> None:
    (beside / "autoencoder").symlink_to(encoded / "autoencoder")
    with pytest.raises(RecipeError, match=r"encode\.workers"):
        encode(recipe(beside, finetune=sd(encoded), encode={"gpus_per_worker": 64}))


@pytest.mark.slow
def test_a_killed_encoder_goes_on_and_commits_every_shard_once(encoded: Path, beside: Path) -> None:
    (beside / "autoencoder").symlink_to(encoded / "autoencoder")
    wanted = recipe(beside, finetune=sd(encoded), encode={"crops": 1, "workers": 1})
    interrupted(beside, wanted, lambda: len(commits(beside)) > 1)
    before = commits(beside)
    assert len(before) <= SHARDS
    with pytest.raises(ArtefactError, match="unfinished"):
        open_artefact(f"{beside}/latents")
    encode(wanted)
    after = commits(beside)
    assert {name: after[name] for name in before} == before
    assert open_artefact(f"{beside}/latents").digest == open_artefact(f"{encoded}/latents").digest
    assert list(verify(open_artefact(f"{beside}/latents"))) == []


def trained(store: Path, base: Path, **keys: object) -> Artefact:
    """An autoencoder trained on from base weights."""
    section = {"start_from": str(base), "steps": 12, "batch_size": 8, "adversarial_from_step": 6,
               "checkpoint_every_steps": 4, "learning_rate": 5e-3}  # fmt: skip
    encode(recipe(store, autoencoder=section | keys, encode={"workers": 1}))
    return open_artefact(f"{store}/autoencoder", "autoencoder")


@pytest.mark.slow
def test_given_weights_are_trained_on_and_the_encoder_is_left_alone_if_told(encoded: Path, beside: Path) -> None:
    made = trained(beside, encoded / "base", decoder_only=True)
    statistics = made.manifest.statistics
    assert statistics["psnr_db"] > statistics["start_psnr_db"]
    assert statistics["l1"] < 0.9 * statistics["start_l1"]
    assert -1 <= statistics["start_ssim"] < statistics["ssim"] <= 1
    start, end = (AutoencoderKL.from_pretrained(folder / "vae") for folder in (encoded / "base", Path(made.uri)))
    assert end.config.scaling_factor == start.config.scaling_factor
    before, after = dict(start.named_parameters()), dict(end.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("decoder.", "post_quant_conv."))} == moved


@pytest.mark.slow
def test_a_loss_that_is_no_number_leaves_the_checkpoint_before_it(encoded: Path, beside: Path) -> None:
    with pytest.raises(RecipeError, match=r"lower autoencoder\.learning_rate"):
        trained(beside, encoded / "base", learning_rate=1e30, checkpoint_every_steps=1)
    for file in beside.glob("runs/*/checkpoint_*/autoencoder.pt"):
        saved = torch.load(file, weights_only=True)
        assert all(bool(value.isfinite().all()) for value in saved["model"].values())
    with pytest.raises(ArtefactError):
        open_artefact(f"{beside}/autoencoder")


@pytest.mark.slow
def test_an_autoencoder_goes_on_with_another_number_of_workers(encoded: Path, beside: Path, tmp_path: Path) -> None:
    section = {"channels": [8, 16], "steps": 30, "batch_size": 8, "adversarial_from_step": 20,
               "checkpoint_every_steps": 5}  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "corpus").symlink_to(encoded / "corpus")
    encode(recipe(whole, autoencoder=section | {"workers": 1}))
    wanted = recipe(beside, autoencoder=section | {"workers": 2})
    interrupted(beside, wanted, lambda: bool(list(beside.glob("runs/*/checkpoint_*"))))
    encode(recipe(beside, autoencoder=section | {"workers": 1}))
    reached, expected = (open_artefact(f"{store}/autoencoder").manifest.statistics for store in (beside, whole))
    assert reached["step"] == expected["step"] == 30
    assert reached["psnr_db"] == pytest.approx(expected["psnr_db"], abs=0.2)
    assert reached["ssim"] == pytest.approx(expected["ssim"], abs=0.02)
