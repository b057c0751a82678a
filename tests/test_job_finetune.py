"""jobs.encode and jobs.finetune on a small corpus of phantoms: real Ray Train, DeepSpeed and Ray Data."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ray.train import TrainingFailedError

from jobs.encode import encode
from jobs.finetune import finetune
from scanloom.artefact import Artefact, open_artefact, verify
from scanloom.console import root_cause
from scanloom.errors import ArtefactError, RecipeError, StoreError
from scanloom.models.attribute_unet import build_denoiser
from scanloom.models.generator import load_generator
from scanloom.recipe import AttributeUnet, Recipe, parse_recipe
from scanloom.store import Store
from scanloom.training.journal import read_history, read_samples
from tests.phantom_corpus import SIZE, phantom_recipe, publish_corpus

FINETUNE = {
    "denoiser": {"channels": [16, 32], "condition_dim": 32},
    "steps": 8,
    "batch_size": 8,
    "warmup_steps": 2,
    "checkpoint_every_steps": 4,
    "log_every_steps": 2,
    "samples": 4,
}


def recipe(store: str, **finetune_keys: object) -> Recipe:
    """A recipe small enough for a test."""
    autoencoder = {
        "channels": [8, 16], "steps": 12, "batch_size": 8, "checkpoint_every_steps": 6, "adversarial_from_step": 6,
    }  # fmt: skip
    return phantom_recipe(store, autoencoder=autoencoder, finetune=FINETUNE | finetune_keys)


@pytest.fixture(scope="module")
def encoded(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with corpus, autoencoder and latents."""
    store = str(tmp_path_factory.mktemp("encoded"))
    publish_corpus(f"{store}/corpus")
    encode(recipe(store))
    return store


@pytest.fixture(scope="module")
def generator(encoded: str) -> Artefact:
    """A generator fine-tuned without disturbance on the encoded store."""
    finetune(recipe(encoded))
    return open_artefact(f"{encoded}/generator", "generator")


@pytest.fixture
def beside(encoded: str, tmp_path: Path) -> str:
    """Another store with the same corpus, autoencoder and latents, and no generator."""
    for name in ("corpus", "autoencoder", "latents"):
        (tmp_path / name).symlink_to(Path(encoded) / name)
    return str(tmp_path)


@contextlib.contextmanager
def _killed_at_checkpoint(store: str, checkpoints: int) -> Iterator[None]:
    """Kill a worker without warning once so many checkpoints were written; fail where none was."""
    killed, ended = threading.Event(), threading.Event()

    def kill() -> None:
        seen: set[str] = set()
        while len(seen) < checkpoints:
            if ended.wait(0.1):
                return
            seen |= {str(found) for found in Path(store).glob("runs/*/checkpoint_*")}
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
        workers[-1].kill()
        killed.set()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        yield
    finally:
        ended.set()
        killer.join()
    assert killed.is_set()


def test_encoding_keeps_the_holdout_out_and_every_other_scan_once(encoded: str) -> None:
    latents = open_artefact(f"{encoded}/latents", "latents")
    assert latents.manifest.statistics["rows"] == 48
    assert {entry.path.split("/")[0] for entry in latents.manifest.files} == {"train", "validation"}
    assert list(verify(latents)) == []


def test_encoding_again_finds_it_done_and_changes_nothing(encoded: str) -> None:
    before = open_artefact(f"{encoded}/latents").manifest
    encode(recipe(encoded))
    assert open_artefact(f"{encoded}/latents").manifest == before


def test_a_generator_loads_in_a_plain_process_without_ray(generator: Artefact) -> None:
    code = (
        "import sys, json, torch\n"
        "from scanloom.models.generator import load_generator\n"
        "g = load_generator(sys.argv[1])\n"
        "x = g.denoise(torch.zeros(2, *g.latent_shape), torch.tensor([999, 10]), g.condition([{'sex': 'F'}, {}]))\n"
        "y = g.decode(x)\n"
        "print(json.dumps([list(y.shape), float(y.min()), float(y.max()), 'ray' in sys.modules, g.digest]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, generator.uri], capture_output=True, text=True, check=True)
    shape, low, high, has_ray, digest = json.loads(done.stdout)
    assert shape == [2, 1, SIZE, SIZE]
    assert 0.0 <= low < high <= 1.0
    assert not has_ray
    assert digest == generator.digest


def test_a_generator_is_a_diffusers_folder(generator: Artefact) -> None:
    folder = Path(generator.uri)
    assert isinstance(UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True), torch.nn.Module)
    assert isinstance(AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True), torch.nn.Module)
    index = json.loads((folder / "model_index.json").read_text())
    assert {"unet", "vae", "scheduler"} <= set(index)
    assert list(verify(generator)) == []


def test_the_released_weights_moved_from_where_training_began(generator: Artefact) -> None:
    job = recipe(generator.uri).finetune
    trained = load_generator(generator.uri)
    assert isinstance(job.denoiser, AttributeUnet)
    start = build_denoiser(job.denoiser, trained.schema, trained.latent_shape, seed=3)
    released = UNet2DConditionModel.from_pretrained(Path(generator.uri) / "unet", local_files_only=True)
    moved = [not torch.equal(a, b) for a, b in zip(start.unet.parameters(), released.parameters(), strict=True)]
    assert sum(moved) / len(moved) > 0.95


@pytest.mark.slow
def test_a_killed_worker_costs_no_step_and_ends_in_the_same_weights(generator: Artefact, beside: str) -> None:
    with _killed_at_checkpoint(beside, 1):
        finetune(recipe(beside, log_every_steps=1))
    assert open_artefact(f"{beside}/generator").digest == generator.digest


def test_the_generator_holds_the_record_of_its_training_which_is_no_part_of_its_digest(generator: Artefact) -> None:
    folder = Path(generator.uri) / "training"
    steps = [row["step"] for row in read_history(folder)]
    assert steps == [2, 4, 6, 8]
    last = read_history(folder)[-1]
    assert {"loss", "held_out_loss", "held_out_by_timestep", "images_per_s", "data_wait_share", "copy_rate"} <= set(
        last
    )
    assert set(read_samples(folder)) == {4, 8}
    assert "<svg" in (folder / "report.html").read_text() or "base64" in (folder / "report.html").read_text()
    assert list(folder.glob("events.out.tfevents*"))
    rewritten = tuple(
        entry.model_copy(update={"sha256": "0" * 64}) if entry.path.startswith("training/") else entry
        for entry in generator.manifest.files
    )
    assert generator.manifest.model_copy(update={"files": rewritten}).digest == generator.digest


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_in_one_line_and_leaves_no_generator(beside: str) -> None:
    with pytest.raises(Exception) as caught:
        finetune(recipe(beside, learning_rate=1e30, gradient_clip=1e30, warmup_steps=0, max_failures=0))
    known = root_cause(caught.value)
    assert isinstance(known, RecipeError)
    assert "lower finetune.learning_rate" in str(known)
    with pytest.raises(ArtefactError):
        open_artefact(f"{beside}/generator")


@pytest.mark.slow
def test_a_run_leaves_no_checkpoints_and_a_deleted_generator_is_made_again(generator: Artefact, beside: str) -> None:
    assert not Store(generator.uri.removesuffix("generator") + "runs").list()
    finetune(recipe(beside))
    shutil.rmtree(f"{beside}/generator")
    finetune(recipe(beside))
    again = open_artefact(f"{beside}/generator")
    assert again.digest == generator.digest
    assert list(verify(again)) == []


def test_a_place_for_checkpoints_that_cannot_be_written_is_named_before_anything_starts(beside: str) -> None:
    (Path(beside) / "runs").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="runs"):
        finetune(recipe(beside))


def test_more_workers_than_the_machine_has_are_refused_and_not_waited_for(beside: str) -> None:
    with pytest.raises(RecipeError, match=r"finetune\.workers"):
        finetune(recipe(beside, workers=8))


def test_another_recipe_is_refused_where_a_generator_already_is(generator: Artefact) -> None:
    with pytest.raises(ArtefactError, match="another plan"):
        finetune(recipe(generator.uri.removesuffix("/generator"), steps=9))


def test_attributes_that_differ_from_the_corpus_are_refused_before_anything_starts(beside: str) -> None:
    tree = recipe(beside).model_dump(mode="json")
    tree["attributes"] = tree["attributes"][:2]
    with pytest.raises(ArtefactError, match="declares sex, age"):
        finetune(parse_recipe(tree, "test"))


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_its_checkpoint_and_ends_in_the_same_weights(
    generator: Artefact, beside: str, tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(beside).model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-m", "jobs.finetune", str(file), "--set=finetune.log_every_steps=1"]
    driver = subprocess.Popen(command, start_new_session=True)
    try:
        while not list(Path(beside).glob("runs/*/checkpoint_*")):
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(timeout=0.2)
                pytest.fail("the driver ended before its first checkpoint")
    finally:
        driver.kill()
        driver.wait()
    with pytest.raises(ArtefactError, match="unfinished"):
        open_artefact(f"{beside}/generator")
    finetune(recipe(beside))
    assert open_artefact(f"{beside}/generator").digest == generator.digest


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")])
def test_other_zero_stages_and_precisions_train_to_about_the_same_loss(
    generator: Artefact, beside: str, zero_stage: int, precision: str
) -> None:
    finetune(recipe(beside, zero_stage=zero_stage, precision=precision))
    reached = open_artefact(f"{beside}/generator").manifest.statistics["training"]
    expected = generator.manifest.statistics["training"]
    assert reached["step"] == expected["step"]
    tolerance = 1e-3 if precision == "fp32" else 0.02
    assert reached["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"objective": "epsilon"}, {"objective": "flow", "timestep_density": "logit-normal"}])
def test_every_objective_trains_and_its_generator_loads(beside: str, keys: dict[str, object]) -> None:
    finetune(recipe(beside, **keys))
    made = load_generator(f"{beside}/generator")
    assert made.schedule.prediction_type == keys["objective"]


@pytest.mark.slow
def test_two_workers_then_one_then_two_end_in_the_same_loss(generator: Artefact, beside: str) -> None:
    for workers, checkpoints in ((2, 1), (1, 2)):
        with _killed_at_checkpoint(beside, checkpoints), pytest.raises(TrainingFailedError):
            finetune(recipe(beside, workers=workers, checkpoint_every_steps=2, max_failures=0))
    finetune(recipe(beside, workers=2, checkpoint_every_steps=2))
    reached = open_artefact(f"{beside}/generator").manifest.statistics["training"]
    expected = generator.manifest.statistics["training"]
    assert reached["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-3)


@pytest.mark.slow
def test_as_many_workers_as_there_is_room_for(generator: Artefact, beside: str) -> None:
    finetune(recipe(beside, workers=[1, 2]))
    reached = open_artefact(f"{beside}/generator").manifest.statistics["training"]
    assert reached["held_out_loss"] == pytest.approx(
        generator.manifest.statistics["training"]["held_out_loss"], rel=1e-3
    )


@pytest.mark.slow
def test_one_worker_and_two_see_the_same_data_and_end_in_the_same_loss(generator: Artefact, beside: str) -> None:
    finetune(recipe(beside, workers=1))
    reached = open_artefact(f"{beside}/generator").manifest.statistics["training"]["loss"]
    assert reached == pytest.approx(generator.manifest.statistics["training"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_generator_can_be_fine_tuned_further(generator: Artefact, beside: str) -> None:
    finetune(recipe(beside, start_from=generator.uri, learning_rate=1e-6))
    started = open_artefact(f"{beside}/generator").manifest.statistics["training"]["held_out_loss"]
    assert started == pytest.approx(generator.manifest.statistics["training"]["held_out_loss"], rel=0.1)
