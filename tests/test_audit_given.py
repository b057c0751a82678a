"""Networks that are given: what they are read from, that they see what they should, and what is refused by name."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scanloom.audit.fidelity import Embedded, frechet
from scanloom.audit.given import FRD, GivenJob, look_again
from scanloom.audit.radiomics import Radiomics
from scanloom.audit.utility import UtilityJob, read_material, utility_of
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.backbone import load_backbone
from scanloom.recipe_audit import Fidelity, UtilityStudy
from scanloom.scans.phantoms import phantom
from scanloom.shards.writer import png_bytes
from scanloom.store import Store
from scanloom.training.utility import lessons, train_and_score
from tests.audited import publish_dataset
from tests.phantom_corpus import publish_corpus
from tests.released import generator
from tests.test_job_audit import IMAGES, honest

RANDOM = np.random.default_rng(4)
HAS_FRD = all(importlib.util.find_spec(name) for name in ("frd_score", "radiomics"))


class Grid(nn.Module):
    """Means of a 4 x 4 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.size_px = 16

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, (4, 4)).flatten(1)


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.sum()


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3] / 0.0


def scripted(file: Path, network: nn.Module) -> str:
    torch.jit.script(network).save(str(file))
    return str(file)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer in transformers' format."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    return folder


def squares(count: int, size: int = 32) -> np.ndarray[Any, Any]:
    return RANDOM.random((count, size, size)).astype(np.float32)


def test_a_torchscript_file_sees_squares_of_its_size(tmp_path: Path) -> None:
    found = load_backbone(scripted(tmp_path / "grid.pt", Grid()))
    assert (found.name, found.size_px) == ("grid.pt", 16)
    images = squares(40, 16)
    assert found(images) == pytest.approx(images.reshape(40, 4, 4, 4, 4).mean(axis=(2, 4)).reshape(40, 16), abs=1e-6)
    assert found(squares(3, 64)).shape == (3, 16)
    assert found.digest != load_backbone(scripted(tmp_path / "flat.pt", Flat())).digest


def test_a_folder_of_transformers_is_read_with_its_mean_and_deviation(vit: Path) -> None:
    from transformers import ViTModel

    found, images = load_backbone(str(vit)), squares(3)
    assert found.size_px == 32
    model: Any = ViTModel.from_pretrained(vit)
    model.eval()
    with torch.no_grad():
        told = model(pixel_values=torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1) * 2 - 1).pooler_output
    assert found(images) == pytest.approx(told.numpy(), abs=1e-5)


def test_a_network_without_a_pooler_is_no_random_one(vit: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(vit)
    model.save_pretrained(tmp_path)
    images = squares(2)
    first, again = load_backbone(str(tmp_path))(images), load_backbone(str(tmp_path))(images)
    assert (first == again).all()


def test_what_is_no_network_is_refused_by_name(vit: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ArtefactError, match=r"text\.pt: is no TorchScript file"):
        load_backbone(str(tmp_path / "text.pt"))
    with pytest.raises(ArtefactError, match=r"holds no config\.json"):
        load_backbone(str(tmp_path))
    with pytest.raises(ArtefactError, match="no such file or folder"):
        load_backbone("nowhere/at/all")
    (tmp_path / "config.json").write_bytes((vit / "config.json").read_bytes())
    with pytest.raises(ArtefactError, match="transformers reads no network there"):
        load_backbone(str(tmp_path))
    with pytest.raises(ArtefactError, match=r"flat\.pt: gives no vector an image"):
        load_backbone(scripted(tmp_path / "flat.pt", Flat()))(squares(2))
    with pytest.raises(ArtefactError, match=r"broken\.pt: gives vectors that are no numbers"):
        load_backbone(scripted(tmp_path / "broken.pt", Broken()))(squares(2))


@pytest.mark.s3
def test_a_network_in_a_store_is_the_same_as_on_a_disk(store_uri: str, vit: Path, tmp_path: Path) -> None:
    scripted(tmp_path / "grid.pt", Grid())
    Store(store_uri).put_folder(tmp_path)
    Store(store_uri).put_folder(vit, "vit")
    images = squares(2)
    for name, local in (("grid.pt", tmp_path / "grid.pt"), ("vit", vit)):
        there, here = load_backbone(f"{store_uri}/{name}"), load_backbone(str(local))
        assert (there.digest, there.size_px) == (here.digest, here.size_px)
        assert (there(images) == here(images)).all()


# --- in an audit ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given")
    corpus = publish_corpus(f"{place}/corpus", scans=96)
    publish_dataset(f"{place}/dataset", generator(f"{place}/generator", corpus), corpus, honest, IMAGES)
    publish_dataset(f"{place}/dark", generator(f"{place}/other", corpus), corpus, lambda n: honest(n) // 3, IMAGES)
    scripted(place / "grid.pt", Grid())
    return place


def looked(folder: Path, dataset: str = "dataset", **settings: Any) -> Any:
    job = GivenJob(
        settings=Fidelity(**settings), corpus_uri=f"{folder}/corpus", dataset_uri=f"{folder}/{dataset}"
    )  # fmt: skip
    return look_again(job.model_dump(mode="json"))


def test_a_given_network_says_the_figures_of_fidelity_beside_real_scans(folder: Path) -> None:
    assert looked(folder) == ()
    (good,) = looked(folder, backbone=f"{folder}/grid.pt")
    (dark,) = looked(folder, "dark", backbone=f"{folder}/grid.pt")
    assert good.backbone == "grid.pt"
    assert set(good.figures) == {"frechet", "kid", "precision", "recall", "density", "coverage"}
    assert good.figures["kid"].synthetic.low < good.figures["kid"].baseline.high
    assert dark.figures["kid"].synthetic.low > good.figures["kid"].synthetic.high
    assert dark.figures["precision"].synthetic.value < 0.1
    (few,) = looked(folder, backbone=f"{folder}/grid.pt", images=30)
    # Every third of 72 train scans.
    assert few.figures["kid"].images == 24
    with pytest.raises(ArtefactError, match=r"too few images or patients for grid\.pt"):
        looked(folder, backbone=f"{folder}/grid.pt", images=4)


def test_a_given_network_may_be_what_a_classifier_stands_on(folder: Path) -> None:
    settings = UtilityStudy(backbone=f"{folder}/grid.pt", labels=("sex=F",), seeds=1, steps=20, least_patients=4)
    job = UtilityJob(settings=settings, corpus_uri=f"{folder}/corpus", dataset_uri=f"{folder}/dataset")
    material = read_material(job.model_dump(mode="json"))
    assert material.train.inputs_NX.shape == (72, 16)
    scores = [train_and_score(one, material) for one in lessons(settings, 0)]
    found = utility_of(material, scores, None, 4)
    assert found.classifier == "linear layer on grid.pt"
    assert {one.arm for one in found.figures} == {"real", "synthetic", "real and synthetic", "synthetic, then real"}


@pytest.mark.skipif(HAS_FRD, reason="the extra `frd` is installed")
def test_radiomics_that_are_not_installed_are_asked_for_by_name(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"the extra `frd` is not installed; pip install"):
        looked(folder, radiomics=True)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FRD, reason="the extra `frd` is not installed")
def test_the_radiomic_distance_is_that_of_frd_score(folder: Path, tmp_path: Path) -> None:
    compute_frd = importlib.import_module("frd_score").compute_frd
    files: list[list[str]] = []
    for seed in (1, 2):
        place = tmp_path / str(seed)
        place.mkdir()
        for n in range(12):
            (place / f"{n:02}.png").write_bytes(png_bytes(phantom(seed, n, 64).pixels))
        files.append([str(file) for file in sorted(place.iterdir())])
    theirs = compute_frd(files, norm_ref="d1", norm_range=[0, 1], num_workers=1)
    radiomics = Radiomics(64)
    real, made = (radiomics(np.stack([phantom(s, n, 64).pixels / 255.0 for n in range(12)])) for s in (1, 2))
    scale = radiomics.scale(real)
    ours = frechet(Embedded.of(scale(made)), Embedded.of(scale(real))).value
    assert np.log(ours) == pytest.approx(theirs, abs=0.02)
    (found,) = looked(folder, radiomics=True, radiomics_images=20)
    assert found.figures[FRD].synthetic.value == pytest.approx(np.log(found.figures["frechet"].synthetic.value))
