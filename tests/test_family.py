"""The families: what training starts from, what it may change, what plain diffusers opens, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from pydantic import ValidationError
from torch import Tensor

from scanloom.attributes import Attributes
from scanloom.errors import ArtefactError, RecipeError, StoreError
from scanloom.models.attribute_unet import AttributeDenoiser
from scanloom.models.autoencoder import decode, load_autoencoder, moments, normalise
from scanloom.models.conditioner import features
from scanloom.models.family import fetch_weights, initial_denoiser, save_generator, schedule_of
from scanloom.models.generator import load_generator, read_generator
from scanloom.models.text_condition import TextConditioner
from scanloom.recipe import Finetune
from scanloom.recipe_denoiser import AttributeUnet, Denoiser, Lora, PromptTemplate
from scanloom.recipe_generate import Solver
from scanloom.sampling.engine import Engine, ImageRequest
from scanloom.store import Store
from tests.tiny_families import (
    LATENT_SHAPE,
    OBJECTIVES,
    TEXT_FAMILIES,
    card_of,
    publish_text_generator,
    save,
    section,
    write_base,
)
from tests.tiny_generator import SCHEMA, SIZE, publish_generator

PROMPTS = ["chest X-ray, age 63 years, Effusion", ""]
SMALL = AttributeUnet(channels=(8, 16), attention_head_dim=8, condition_dim=16)
FAMILIES = ("attribute-unet", *TEXT_FAMILIES)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {family: write_base(family, tmp_path_factory.mktemp(family) / "base") for family in TEXT_FAMILIES}


def start(family: str, bases: Mapping[str, Path], lora: Lora | None = None) -> tuple[Denoiser, Any]:
    """The recipe's section and the denoiser that training begins with."""
    config = SMALL if family == "attribute-unet" else section(family, bases[family], lora)
    return config, initial_denoiser(config, card_of(config), 0, bases.get(family))


def inputs(family: str, bases: Mapping[str, Path]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, timesteps and condition of two rows, of which the second is told nothing."""
    latents = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    if family == "attribute-unet":
        rows: list[Attributes] = [{"age": 63.0}, {}]
        told = {"features": torch.from_numpy(features(SCHEMA, rows)), "drop": torch.zeros(2, 4, dtype=torch.bool)}
    else:
        told = TextConditioner(bases[family]).encode(PROMPTS)
    return latents, torch.tensor([40, 900]), told


def disturb(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_begins_with_the_same_denoiser_and_every_weight_learns(
    family: str, bases: Mapping[str, Path]
) -> None:
    _, denoiser = start(family, bases)
    _, again = start(family, bases)
    assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), again.parameters(), strict=True))
    disturb(denoiser.parameters())
    latents, timesteps, told = inputs(family, bases)
    predicted = denoiser(latents, timesteps, told)
    assert predicted.shape == latents.shape
    predicted.square().mean().backward()
    unused = {name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # Of the last transformer block's context nothing comes out; the vocabularies of unknown values were not asked.
    assert len(unused) < 0.2 * len(list(denoiser.parameters())), unused


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str, bases: Mapping[str, Path]) -> None:
    gradients = []
    for checkpointed in (False, True):
        _, denoiser = start(family, bases, Lora(rank=2) if family != "attribute-unet" else None)
        disturb(denoiser.parameters())
        if checkpointed:
            denoiser.enable_gradient_checkpointing()
        denoiser(*inputs(family, bases)).square().mean().backward()
        gradients.append([p.grad for p in denoiser.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for plain, checkpointed_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed_gradient, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_lora_trains_its_adapters_alone_and_begins_as_the_base(family: str, bases: Mapping[str, Path]) -> None:
    latents, timesteps, told = inputs(family, bases)
    _, base = start(family, bases)
    _, denoiser = start(family, bases, Lora(rank=2))
    with torch.no_grad():
        torch.testing.assert_close(denoiser(latents, timesteps, told), base(latents, timesteps, told))
    trained = {name for name, p in denoiser.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    optimizer = torch.optim.SGD([p for p in denoiser.parameters() if p.requires_grad], lr=1.0)
    denoiser(latents, timesteps, told).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in denoiser.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert changed <= trained


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_plain_diffusers_opens_what_is_saved_and_predicts_the_same(
    family: str, lora: Lora | None, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    config, denoiser = start(family, bases, lora)
    disturb(denoiser.parameters())
    latents, timesteps, told = inputs(family, bases)
    with torch.no_grad():
        ours = denoiser(latents, timesteps, told)
    folder = save(config, denoiser, bases[family], tmp_path / "made")
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if family == "sd3":
        theirs = pipeline.transformer(
            hidden_states=latents, timestep=timesteps + 1, encoder_hidden_states=told["tokens"],
            pooled_projections=told["pooled"],
        ).sample  # fmt: skip
    else:
        size = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2)
        more = {"text_embeds": told["pooled"], "time_ids": size} if family == "sdxl" else None
        theirs = pipeline.unet(latents, timesteps, told["tokens"], added_cond_kwargs=more).sample
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=2e-4)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("chest X-ray", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, SIZE, SIZE, 3)
    assert np.isfinite(made).all()


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_saving_leaves_a_lora_denoiser_as_it_was(family: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    config, denoiser = start(family, bases, Lora(rank=2))
    disturb(denoiser.parameters())
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    save(config, denoiser, bases[family], tmp_path / "made")
    after = denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_texts_condition_is_that_of_diffusers_own_pipeline(family: str, bases: Mapping[str, Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(bases[family], local_files_only=True)
    told = TextConditioner(bases[family]).encode(PROMPTS)
    more: dict[str, Any] = {"sd": {}, "sdxl": {"prompt_2": None}, "sd3": {"prompt_2": None, "prompt_3": None}}[family]
    more |= {"max_sequence_length": 77} if family == "sd3" else {}
    with torch.no_grad():
        theirs = pipeline.encode_prompt(
            prompt=PROMPTS[0], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **more
        )
    # With guidance the pipeline also makes what it takes for the empty prompt.
    ours = [told["tokens"][:1], told["tokens"][1:], *(told["pooled"].split(1) if "pooled" in told else ())]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sd3_without_t5_reads_zeros_in_its_place_and_saves(bases: Mapping[str, Path], tmp_path: Path) -> None:
    base = write_base("sd3", tmp_path / "base", t5=False)
    told = TextConditioner(base).encode(PROMPTS)
    assert told["tokens"].shape == TextConditioner(bases["sd3"]).encode(PROMPTS)["tokens"].shape
    assert not told["tokens"][:, 77:].any()
    config = section("sd3", base)
    folder = save(config, initial_denoiser(config, card_of(config), 0, base), base, tmp_path / "made")
    absent: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}
    assert DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent).text_encoder_3 is None
    assert read_generator(folder, "digest").condition([{"age": 30.0}]).isfinite().all()


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_engine_samples_what_was_asked_for_from_every_family(family: str, tmp_path: Path) -> None:
    generator = load_generator(publish_text_generator(family, str(tmp_path)).uri)
    assert generator.schedule.prediction_type == OBJECTIVES[family]
    asked: list[Attributes] = [{"age": 30.0}, {"age": 80.0, "sex": "F"}, {"age": 30.0}]
    requests = [ImageRequest(0, 7, told, steps=4, guidance_scale=2.0) for told in asked]
    # One by one: they share their noise.
    made = [next(iter(Engine(generator, slots=2).run([request]))).image for request in requests]
    assert made[0].shape == (1, SIZE, SIZE)
    assert np.array_equal(made[0], made[2])
    assert not np.array_equal(made[0], made[1])


def test_a_flow_that_knows_its_data_is_sampled_to_it(bases: Mapping[str, Path]) -> None:
    """With data at one point the flow is straight and every solver follows it exactly."""
    del bases
    point = 0.3

    class Straight:
        latent_shape = (1, 4, 4)
        schedule = schedule_of(section("sd3", "unused"), "flow")

        def condition(self, rows: Any) -> Tensor:
            return torch.zeros(len(rows), 1)

        def null_condition(self, batch: int) -> Tensor:
            return torch.zeros(batch, 1)

        def denoise(self, latents: Tensor, timesteps: Tensor, _: Tensor) -> Tensor:
            sigma = self.schedule.sigmas_T[timesteps].float().reshape(-1, 1, 1, 1)
            return (latents - point) / sigma

        def decode(self, latents: Tensor) -> Tensor:
            return latents

        def require_shape(self, latent_shape: tuple[int, ...]) -> None:
            raise AssertionError(latent_shape)

    solvers: tuple[Solver, ...] = ("ddim", "euler", "dpmpp-2m")
    for solver in solvers:
        for steps in (1, 2, 7):
            [made] = Engine(Straight(), 1, solver).run([ImageRequest(0, 1, {}, steps)])
            np.testing.assert_allclose(made.image, point, atol=1e-5)


def test_training_goes_on_from_a_saved_generator_of_every_family(bases: Mapping[str, Path], tmp_path: Path) -> None:
    for family in TEXT_FAMILIES:
        config, denoiser = start(family, bases)
        disturb(denoiser.parameters())
        folder = save(config, denoiser, bases[family], tmp_path / family)
        again = initial_denoiser(section(family, folder), card_of(config), 0, folder)
        assert all(torch.equal(a, b) for a, b in zip(denoiser.parameters(), again.parameters(), strict=True))
    artefact = publish_generator(str(tmp_path / "attributes"), seed=3)
    fetched = fetch_weights(artefact.uri, tmp_path / "fetched")
    again = initial_denoiser(SMALL, card_of(SMALL), 0, fetched)
    assert isinstance(again, AttributeDenoiser)
    assert again.unet.conv_out.weight.any()


def test_weights_are_fetched_from_a_store_without_their_half_precision_copies(
    bases: Mapping[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(bases["sd"], source)
    (source / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    assert fetch_weights(str(source), tmp_path / "unused") == source
    artefact = publish_text_generator("sd", str(tmp_path / "generator"))
    fetched = fetch_weights(artefact.uri, tmp_path / "fetched")
    assert fetched == tmp_path / "fetched"
    assert read_generator(fetched, "digest").card.family == "sd"


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "vae/config.json",
    ],
)
def test_a_missing_weight_file_is_named(missing: str, bases: Mapping[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bases["sd"], source)
    (source / missing).unlink()
    with pytest.raises(ArtefactError, match=missing) as caught:
        fetch_weights(str(source), tmp_path / "unused")
    assert "\n" not in str(caught.value)


def test_a_missing_shard_of_weights_is_named(bases: Mapping[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bases["sd"], source)
    stem = source / "unet" / "diffusion_pytorch_model"
    stem.with_suffix(".safetensors").unlink()
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    stem.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtefactError, match="unet/diffusion_pytorch_model-00001-of-00001"):
        fetch_weights(str(source), tmp_path / "unused")


@pytest.mark.parametrize("where", ["/nowhere/at/all", "no such thing"])
def test_weights_that_are_nowhere_are_one_clear_error(where: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such folder"):
        fetch_weights(where, tmp_path)


def test_a_hub_id_without_a_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ArtefactError, match="nobody/nothing: not in the local hub cache") as caught:
        fetch_weights("nobody/nothing", tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_family_are_refused(bases: Mapping[str, Path]) -> None:
    config = section("sdxl", bases["sd"])
    with pytest.raises(ArtefactError, match="is of family sd, this recipe trains sdxl"):
        initial_denoiser(config, card_of(config), 0, bases["sd"])


def test_a_pipeline_that_is_no_family_of_ours_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bases["sd"], source)
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    config = section("sd", source)
    with pytest.raises(ArtefactError, match="is a FluxPipeline; known: StableDiffusionPipeline"):
        initial_denoiser(config, card_of(config), 0, source)


def test_latents_of_another_autoencoder_are_refused(bases: Mapping[str, Path]) -> None:
    config = section("sd", bases["sd"])
    card = card_of(config).model_copy(update={"latent_shape": (16, 8, 8)})
    with pytest.raises(ArtefactError, match="latents of 4 channels, the autoencoder makes 16"):
        initial_denoiser(config, card, 0, bases["sd"])


def test_a_generator_of_other_attributes_is_refused(tmp_path: Path) -> None:
    artefact = publish_generator(str(tmp_path))
    other = SCHEMA.model_copy(update={"declarations": SCHEMA.declarations[:2]})
    with pytest.raises(ArtefactError, match=r"sex, age, view, findings and .*; this corpus has sex, age and"):
        initial_denoiser(SMALL, card_of(SMALL).model_copy(update={"attributes": other}), 0, Path(artefact.uri))


def test_lora_on_modules_that_are_not_there_is_refused(bases: Mapping[str, Path]) -> None:
    config = section("sd", bases["sd"], Lora(targets=("to_z",)))
    with pytest.raises(RecipeError, match=r"lora\.targets to_z") as caught:
        initial_denoiser(config, card_of(config), 0, bases["sd"])
    assert "\n" not in str(caught.value)


def test_a_prompt_that_words_an_unknown_attribute_is_refused_with_the_nearest(bases: Mapping[str, Path]) -> None:
    template = PromptTemplate(phrases={"agee": "{value} old"})
    config = section("sd", bases["sd"]).model_copy(update={"prompt": template})
    with pytest.raises(RecipeError, match="'agee' is not in the schema; did you mean 'age'"):
        initial_denoiser(config, card_of(config), 0, bases["sd"])


@pytest.mark.parametrize(("family", "objective"), [("sd3", "epsilon"), ("sd", "flow"), ("sdxl", "flow")])
def test_an_objective_that_a_family_was_not_made_for_is_refused(family: str, objective: Any) -> None:
    with pytest.raises(RecipeError, match=f"family {family} was trained for"):
        schedule_of(section(family, "unused"), objective)


def test_base_models_keep_the_schedule_that_their_weights_know(bases: Mapping[str, Path]) -> None:
    theirs = DiffusionPipeline.from_pretrained(bases["sd"], local_files_only=True).scheduler.alphas_cumprod
    ours = schedule_of(section("sd", "unused"), "v_prediction").alphas_T
    torch.testing.assert_close(ours.square().float(), theirs)


def test_a_text_generator_without_its_base_model_cannot_be_saved(bases: Mapping[str, Path], tmp_path: Path) -> None:
    config, denoiser = start("sd", bases)
    vae = read_generator(save(config, denoiser, bases["sd"], tmp_path / "made"), "digest")._vae
    with pytest.raises(ArtefactError, match="saved from its base model's folder"):
        save_generator(tmp_path / "other", card_of(config), denoiser, vae, schedule_of(config, "epsilon"), None)


def test_a_generator_without_its_text_encoder_is_one_clear_error(bases: Mapping[str, Path], tmp_path: Path) -> None:
    config, denoiser = start("sd", bases)
    folder = save(config, denoiser, bases["sd"], tmp_path / "made")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ArtefactError, match="text encoder cannot be read") as caught:
        read_generator(folder, "digest")
    assert "\n" not in str(caught.value)


def test_a_store_that_holds_nothing_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ArtefactError, StoreError), match="model_index"):
        fetch_weights(Store(str(tmp_path / "empty")).uri, tmp_path / "to")


def test_a_grey_scan_passes_an_autoencoder_of_three_channels_and_comes_back_grey(bases: Mapping[str, Path]) -> None:
    vae = load_autoencoder(bases["sd3"] / "vae")
    pixels = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, logvar = moments(vae, pixels)
        torch.testing.assert_close(mean, vae.encode(pixels.repeat(1, 3, 1, 1)).latent_dist.mean)
        painted = vae.decode(mean).sample
        made = decode(vae, normalise(vae, mean))
    assert mean.shape == logvar.shape == (2, *LATENT_SHAPE)
    expected = (painted.mean(1, keepdim=True) * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("denoiser", "what"),
    [
        ({"family": "gan"}, "unknown family; known: attribute-unet, sd, sdxl, sd3"),
        ({"family": "sd"}, "weights"),
        ({"family": "sdxl", "weights": "a/b", "lora": {"rnak": 4}}, "did you mean 'rank'"),
    ],
)
def test_a_recipe_of_no_family_or_without_weights_is_refused(denoiser: dict[str, Any], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        Finetune.model_validate({"denoiser": denoiser})


def test_a_recipe_that_names_no_family_trains_the_attribute_unet() -> None:
    assert Finetune.model_validate({"denoiser": {"channels": [8, 16]}}).denoiser == AttributeUnet(channels=(8, 16))
