"""The engine on real families: diffusers' own pipelines, other sizes, narrow precision, compilation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from scanloom.attributes import Attributes
from scanloom.errors import RecipeError
from scanloom.models.generator import Generator, Precision, load_generator, read_card
from scanloom.models.prompts import prompt
from scanloom.recipe_generate import Solver
from scanloom.sampling.engine import Engine, ImageRequest, is_batch_invariant
from scanloom.sampling.noise import gaussian_noise
from tests.tiny_families import LATENT_SHAPE, TEXT_FAMILIES, publish_text_generator
from tests.tiny_generator import SCHEMA, SIZE, publish_generator

FAMILIES = ("attribute-unet", *TEXT_FAMILIES)
ASKED: Attributes = {"age": 63.0, "findings": ("Effusion",)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        if family == "attribute-unet":
            publish_generator(str(folder))
        else:
            publish_text_generator(family, str(folder))
    return made


def image(generator: Generator, *, slots: int = 2, solver: Solver = "ddim", **wanted: Any) -> np.ndarray[Any, Any]:
    request = replace(ImageRequest(index=3, seed=7, attributes=ASKED, steps=5, guidance_scale=2.0), **wanted)
    [made] = Engine(generator, slots, solver).run([request])
    return made.image


def piped(
    folder: Path, family: str, solver: Solver, steps: int, scale: float, shape: tuple[int, int, int] = LATENT_SHAPE
) -> Tensor:
    """The latents [1, C, H, W] that diffusers' pipeline of the folder makes of the same noise and prompt."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    if family == "sd3":
        # Trailing spacing, on the sigmas that the network was trained on.
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        more["sigmas"] = np.linspace(1.0, 1.0 / steps, steps).tolist()
        more["max_sequence_length"] = 77
    else:
        kind: Any = DDIMScheduler if solver in ("ddim", "euler") else DPMSolverMultistepScheduler
        known = {
            k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_") and k != "timestep_spacing"
        }
        pipeline.scheduler = kind.from_config(known, timestep_spacing="trailing")
    noise = torch.from_numpy(gaussian_noise(7, 3, shape)[None])
    factor = SIZE // LATENT_SHAPE[1]
    template = read_card(folder).prompt
    assert template is not None
    text = prompt(SCHEMA, ASKED, template)
    made: Tensor = pipeline(
        prompt=text, guidance_scale=scale, num_inference_steps=steps, latents=noise,
        height=factor * shape[1], width=factor * shape[2], output_type="latent", **more,
    ).images  # fmt: skip
    return made


PIPELINES: list[tuple[str, Solver]] = [
    ("sd", "ddim"), ("sd", "euler"), ("sd", "dpmpp-2m"), ("sdxl", "ddim"), ("sdxl", "dpmpp-2m"), ("sd3", "euler"),
    ("sd3", "ddim"),
]  # fmt: skip


@pytest.mark.parametrize("family, solver", PIPELINES)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_images_equal_those_of_diffusers_own_pipelines(
    folders: Mapping[str, Path], family: str, solver: Solver, steps: int
) -> None:
    generator = load_generator(str(folders[family]))
    theirs = generator.decode(piped(folders[family], family, solver, steps, 3.0))[0].numpy()
    ours = image(generator, solver=solver, steps=steps, guidance_scale=3.0)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert theirs.std() > 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_an_image_of_another_size_equals_the_pipelines(folders: Mapping[str, Path], family: str) -> None:
    generator = load_generator(str(folders[family]))
    shape = generator.latent_shape_of(SIZE, 2 * SIZE)
    assert shape == (LATENT_SHAPE[0], LATENT_SHAPE[1], 2 * LATENT_SHAPE[2])
    theirs = generator.decode(piped(folders[family], family, "ddim", 5, 3.0, shape))[0].numpy()
    ours = image(generator, guidance_scale=3.0, latent_shape=shape)
    assert ours.shape == (1, SIZE, 2 * SIZE)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_a_family_cannot_make_are_refused_with_those_it_can(
    folders: Mapping[str, Path], family: str
) -> None:
    generator = load_generator(str(folders[family]))
    channels, side, _ = generator.latent_shape
    with pytest.raises(RecipeError, match="multiples of 2"):
        generator.require_shape((channels, side + 1, side))
    with pytest.raises(RecipeError, match=f"{channels} channels"):
        generator.require_shape((channels + 1, side, side))
    with pytest.raises(RecipeError, match="px"):
        generator.latent_shape_of(SIZE + 1, SIZE)
    if family == "sd3":
        with pytest.raises(RecipeError, match="32 at most"):
            generator.require_shape((channels, 34, side))
    with pytest.raises(RecipeError, match="cannot make latents of 4x9x8"):
        Engine(generator, 2).submit(ImageRequest(0, 0, {}, 2, latent_shape=(4, 9, 8)))


NARROW: list[tuple[Precision, float]] = [("bf16", 0.05), ("fp16", 0.01)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision, tolerance", NARROW)
def test_narrow_precision_makes_almost_the_same_images(
    folders: Mapping[str, Path], family: str, precision: Precision, tolerance: float
) -> None:
    exact = image(load_generator(str(folders[family])))
    narrow = load_generator(str(folders[family]), precision=precision)
    made = image(narrow)
    assert made.dtype == np.float32
    assert not np.array_equal(made, exact)
    assert np.abs(made - exact).mean() < tolerance * max(exact.std(), 0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_networks_answers_are_float32_in_every_precision(folders: Mapping[str, Path], precision: Precision) -> None:
    generator = load_generator(str(folders["attribute-unet"]), precision=precision)
    seen: list[torch.dtype] = []
    generator._network.register_forward_hook(lambda _, __, out: seen.append(out[0].dtype))
    latents = torch.zeros(2, *generator.latent_shape)
    answer = generator.denoise(latents, torch.tensor([3, 7]), generator.null_condition(2))
    assert (answer.dtype, generator.decode(latents).dtype) == (torch.float32, torch.float32)
    assert seen == [{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_one_thread_no_family_lets_rows_share_their_fate(
    folders: Mapping[str, Path], family: str, precision: Precision
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert is_batch_invariant(load_generator(str(folders[family]), precision=precision), 8)
    finally:
        torch.set_num_threads(threads)


def test_the_example_of_the_engines_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "engine.md").read_text()
    [example] = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/engine.md", "exec"), {})
    assert sorted(capsys.readouterr().out.splitlines()) == [f"{index} (1, 64, 64)" for index in range(4)]


@pytest.mark.slow
def test_a_compiled_denoiser_makes_the_same_images_and_is_batch_invariant(folders: Mapping[str, Path]) -> None:
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for family in ("attribute-unet", "sd"):
            generator = load_generator(str(folders[family]), compiled=True)
            np.testing.assert_allclose(image(generator), image(load_generator(str(folders[family]))), atol=1e-4)
            assert torch._dynamo.utils.counters["frames"]["ok"] > 0
            assert is_batch_invariant(generator, 2)
            torch._dynamo.reset()
    finally:
        torch.set_num_threads(threads)
