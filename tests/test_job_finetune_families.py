"""Every family under every ZeRO stage on two workers: trained, saved, opened again, and drawn from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from jobs.encode import encode
from jobs.finetune import finetune
from scanloom.artefact import open_artefact, verify
from scanloom.models.generator import load_generator
from scanloom.recipe import Recipe
from scanloom.sampling.engine import Engine, ImageRequest
from tests.phantom_corpus import SIZE, phantom_recipe, publish_corpus
from tests.tiny_families import TEXT_FAMILIES, write_base

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
STAGES = (0, 1, 2, 3)
OBJECTIVES = {"sd": "v_prediction", "sdxl": "epsilon", "sd3": "flow"}
LORA = {"rank": 2}


@dataclass
class Family:
    """A store in which a corpus is encoded for one family, and what each ZeRO stage came to in it."""

    store: Path
    denoiser: dict[str, Any]
    objective: str
    reached: dict[int, dict[str, float]] = field(default_factory=dict)

    def recipe(self, store: Path, zero_stage: int) -> Recipe:
        """A recipe small enough for a test."""
        return phantom_recipe(
            store,
            autoencoder={"channels": [8, 16], "steps": 4, "batch_size": 8, "adversarial_from_step": 2},
            finetune={
                "denoiser": self.denoiser, "objective": self.objective, "zero_stage": zero_stage, "workers": 2,
                "steps": 6, "batch_size": 8, "warmup_steps": 2, "learning_rate": 1e-3, "checkpoint_every_steps": 6,
                "log_every_steps": 3, "samples": 2,
            },
        )  # fmt: skip

    def train(self, folder: Path, zero_stage: int) -> Path:
        """A generator trained in a store of its own; its folder."""
        for name in ("corpus", "autoencoder", "latents", "base"):
            (folder / name).symlink_to(self.store / name)
        finetune(self.recipe(folder, zero_stage))
        made = open_artefact(f"{folder}/generator", "generator")
        assert list(verify(made)) == []
        self.reached[zero_stage] = made.manifest.statistics["training"]
        return folder / "generator"


@pytest.fixture(
    scope="module",
    params=[("attribute-unet", False), *((name, lora) for name in TEXT_FAMILIES for lora in (False, True))],
    ids=lambda param: f"{param[0]}{'-lora' * param[1]}",
)
def family(request: pytest.FixtureRequest, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, lora = request.param
    store = tmp_path_factory.mktemp(name)
    denoiser: dict[str, Any] = {"channels": [16, 32], "condition_dim": 32}
    if name in TEXT_FAMILIES:
        denoiser = {"family": name, "weights": str(write_base(name, store / "base"))} | ({"lora": LORA} if lora else {})
    made = Family(store, denoiser, OBJECTIVES.get(name, "v_prediction"))
    publish_corpus(f"{store}/corpus")
    encode(made.recipe(store, 0))
    return made


def _weights(folder: Path) -> bytes:
    return next(folder.glob("[ut][nr]*/diffusion_pytorch_model.safetensors")).read_bytes()


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_family_trains_saves_opens_and_samples(family: Family, zero_stage: int, tmp_path: Path) -> None:
    folder = family.train(tmp_path, zero_stage)
    generator = load_generator(str(folder))
    engine = Engine(generator, slots=4)
    wanted = [ImageRequest(n, 1, {"sex": sex, "view": "PA"}, 3, 1.0 + n) for n, sex in enumerate("FM")]
    images = {finished.request.index: finished.image for finished in engine.run(wanted)}
    assert {image.shape for image in images.values()} == {(1, SIZE, SIZE)}
    assert all(np.isfinite(image).all() and np.ptp(image) > 0 for image in images.values())
    if family.denoiser.get("family") in TEXT_FAMILIES:
        assert isinstance(DiffusionPipeline.from_pretrained(folder, local_files_only=True), DiffusionPipeline)
        assert _weights(folder) != _weights(family.store / "base")


def test_all_zero_stages_reach_the_same_losses(family: Family, tmp_path: Path) -> None:
    for stage in set(STAGES) - set(family.reached):
        (tmp_path / str(stage)).mkdir()
        family.train(tmp_path / str(stage), stage)
    plain = family.reached[0]
    for stage in STAGES[1:]:
        for figure in ("loss", "held_out_loss"):
            assert family.reached[stage][figure] == pytest.approx(plain[figure], rel=1e-3), (stage, figure)
