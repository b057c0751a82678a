"""training.reconstruction: how good an autoencoder is, and from where one is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.autoencoder import build_autoencoder
from scanloom.recipe import Autoencoder, Recipe, parse_recipe
from scanloom.store import Store
from scanloom.training.given_weights import autoencoder_digest, fetch_autoencoder, put_autoencoder
from scanloom.training.reconstruction import plan_autoencoder, reconstruction_error
from tests.phantom_corpus import ATTRIBUTES, publish_corpus
from tests.tiny_families import write_base

SIZE = 11
GREY = 0.2


def recipe(store: Path, **sections: object) -> Recipe:
    """A recipe of the phantom corpus."""
    tree = {
        "name": "tiny", "store": str(store), "attributes": [a.model_dump(mode="json") for a in ATTRIBUTES],
    }  # fmt: skip
    return parse_recipe(tree | sections, "test")


@pytest.fixture
def painter() -> AutoencoderKL:
    """An autoencoder that paints everything GREY."""
    vae = build_autoencoder(Autoencoder(channels=(8,)), SIZE, 0).eval().requires_grad_(False)
    torch.nn.init.zeros_(vae.get_parameter("decoder.conv_out.weight"))
    torch.nn.init.constant_(vae.get_parameter("decoder.conv_out.bias"), GREY)
    return vae


def test_error_and_likeness_are_those_of_their_formulas(painter: AutoencoderKL) -> None:
    scan = np.random.default_rng(0).uniform(-1, 1, (SIZE, SIZE)).astype(np.float32)
    got = reconstruction_error(painter, torch.from_numpy(scan)[None])
    error = (scan - GREY) / 2
    assert got["l1"] == pytest.approx(np.abs(error).mean(), rel=1e-4)
    assert got["psnr_db"] == pytest.approx(-10 * np.log10(np.square(error).mean()), rel=1e-4)
    # Wang et al. 2004, eq. 13, of the one window that fits; what is painted has neither variance nor covariance.
    bell = np.exp(-np.square(np.arange(SIZE) - SIZE // 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    x, y = (scan + 1) / 2, (GREY + 1) / 2
    mean = (window * x).sum()
    variance = (window * np.square(x)).sum() - mean**2
    luminance = (2 * mean * y + 0.01**2) / (mean**2 + y**2 + 0.01**2)
    assert got["ssim"] == pytest.approx(luminance * 0.03**2 / (variance + 0.03**2), rel=1e-3)


def test_scans_that_come_back_as_they_were_are_alike(painter: AutoencoderKL) -> None:
    got = reconstruction_error(painter, torch.full((20, SIZE, SIZE), GREY))
    assert got["ssim"] == pytest.approx(1.0)
    assert got["l1"] == pytest.approx(0.0, abs=1e-6)


def test_an_autoencoder_is_found_alone_or_inside_a_model(tmp_path: Path) -> None:
    base = write_base("sd", tmp_path / "base")
    digest = autoencoder_digest(str(base / "vae"))
    assert autoencoder_digest(str(base)) == digest
    taken = put_autoencoder(str(base), Store(str(tmp_path / "artefact")))
    assert autoencoder_digest(str(tmp_path / "artefact")) == digest
    assert taken["taken_from"] == str(base)
    assert {entry["path"] for entry in taken["files"]} >= {"vae/config.json"}
    assert autoencoder_digest(str(write_base("sd", tmp_path / "other", seed=1))) != digest


def test_a_folder_without_an_autoencoder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where in (str(tmp_path / "empty"), str(tmp_path / "absent")):
        with pytest.raises(ArtefactError) as caught:
            fetch_autoencoder(where, tmp_path / "to")
        assert where in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_text_family_takes_the_autoencoder_of_its_weights_unless_told_otherwise(tmp_path: Path) -> None:
    corpus = publish_corpus(f"{tmp_path}/corpus", scans=8)
    base = str(write_base("sd", tmp_path / "base"))
    finetune = {"denoiser": {"family": "sd", "weights": base}}
    plans = [
        plan_autoencoder(recipe(tmp_path, **sections), corpus)
        for sections in (
            {}, {"finetune": finetune}, {"finetune": finetune, "autoencoder": {"path": "elsewhere"}},
            {"finetune": finetune, "autoencoder": {"start_from": base}},
            {"autoencoder": {"start_from": base, "decoder_only": True}},
        )
    ]  # fmt: skip
    assert [given for given, _ in plans] == [None, base, "elsewhere", None, None]
    assert len({plan for _, plan in plans}) == len(plans)


@pytest.mark.parametrize("section", [{"path": "a", "start_from": "b"}, {"decoder_only": True}])
def test_an_autoencoder_of_two_origins_or_half_of_none_is_refused(tmp_path: Path, section: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="autoencoder: "):
        recipe(tmp_path, autoencoder=section)
