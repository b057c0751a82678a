"""Checkpoints that any number of workers, any ZeRO stage and any precision goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scanloom.errors import ArtefactError
from scanloom.models.attribute_unet import build_denoiser
from scanloom.recipe import AttributeUnet
from scanloom.training.checkpoint import SavedState
from tests.tiny_generator import SCHEMA
from tests.training_worker import FROZEN, SHAPE, train

TINY = AttributeUnet(channels=(8, 16), condition_dim=16)
START = dict(build_denoiser(TINY, SCHEMA, SHAPE, seed=1).named_parameters())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """Losses and end of six steps by one worker without ZeRO."""
    folder = tmp_path_factory.mktemp("straight")
    return train(folder, "all", workers=1, steps=(0, 6), zero_stage=0), _end(folder, "all")


def _end(folder: Path, name: str) -> dict[str, Any]:
    end: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return end


def _close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    # Not value by value: of a bias before a normalisation the gradient is rounding noise, of which Adam makes steps.
    assert set(ours["averaged"]) == set(theirs["averaged"])
    moved = {name: value - START[name].detach() for name, value in theirs["averaged"].items()}
    apart = {name: value - theirs["averaged"][name] for name, value in ours["averaged"].items()}
    assert _norm(apart) <= tolerance * _norm(moved)
    for kind in ("after", "shown"):
        assert _norm({kind: ours[kind] - theirs[kind]}) <= tolerance * _norm({kind: theirs[kind]})


def _norm(values: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in values.values()]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_stage_on_one_worker_and_two_trains_alike_and_keeps_the_same_average(
    straight: tuple[list[float], dict[str, Any]], tmp_path: Path, zero_stage: int, workers: int
) -> None:
    losses = train(tmp_path, "all", workers=workers, steps=(0, 6), zero_stage=zero_stage)
    assert losses == pytest.approx(straight[0], rel=1e-4)
    end = _end(tmp_path, "all")
    _close(end, straight[1], 0.02)
    # The module computes with the average where it is asked to, and with its weights before and after.
    assert torch.equal(end["before"], end["after"])
    assert float((end["shown"] - end["before"]).abs().max()) > 1e-3
    assert FROZEN not in end["averaged"]
    moved = [not torch.equal(value, START[name]) for name, value in end["averaged"].items()]
    assert sum(moved) / len(moved) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("stages", [(1, 1, 1), (3, 3, 3), (2, 3, 0), (0, 1, 3)], ids=str)
def test_two_workers_then_one_then_two_continue_the_loss_curve_also_under_other_stages(
    straight: tuple[list[float], dict[str, Any]], tmp_path: Path, stages: tuple[int, int, int]
) -> None:
    losses = []
    for part, (workers, stage) in enumerate(zip((2, 1, 2), stages, strict=True)):
        steps = (2 * part, 2 * part + 2)
        losses += train(tmp_path, f"part{part}", workers=workers, steps=steps, zero_stage=stage)
    assert losses == pytest.approx(straight[0], rel=1e-4)
    _close(_end(tmp_path, "part2"), straight[1], 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_half_precision_goes_on_as_if_never_stopped(tmp_path: Path, zero_stage: int, precision: str) -> None:
    # Exactly: master weights, moments, their step and the loss scale are all there.
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    keys: dict[str, Any] = {"zero_stage": zero_stage, "precision": precision, "gradient_accumulation": 2}
    whole = train(tmp_path / "a", "all", workers=2, steps=(0, 4), **keys)
    parts = train(tmp_path / "b", "first", workers=2, steps=(0, 2), **keys)
    parts += train(tmp_path / "b", "second", workers=2, steps=(2, 4), **keys)
    assert parts == whole
    _close(_end(tmp_path / "b", "second"), _end(tmp_path / "a", "all"), 0.0)
    state = json.loads((tmp_path / "a" / "state" / "state.json").read_text())
    assert (state["loss_scale"]["cur_scale"] > 1) == (precision == "fp16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"zero_stage": 1, "offload_optimizer": True},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
        {"zero_stage": 1, "gradient_accumulation": 2},
        {"zero_stage": 3, "gradient_accumulation": 2},
        {"zero_stage": 1, "gradient_checkpointing": True},
        {"zero_stage": 3, "gradient_checkpointing": True},
        {"zero_stage": 1, "channels_last": True},
    ],
    ids=lambda keys: "-".join(f"{name}{value}" for name, value in keys.items()),
)
def test_how_memory_is_saved_does_not_change_what_is_learned(
    straight: tuple[list[float], dict[str, Any]], tmp_path: Path, keys: dict[str, Any]
) -> None:
    losses = train(tmp_path, "first", workers=2, steps=(0, 3), **keys)
    losses += train(tmp_path, "second", workers=2, steps=(3, 6), **keys)
    assert losses == pytest.approx(straight[0], rel=1e-3)
    _close(_end(tmp_path, "second"), straight[1], 0.02)


def test_a_checkpoint_that_lacks_a_part_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"metrics": {"step": 1}}))
    with pytest.raises(ArtefactError, match=r"holds 0 of \d+ values of unet\.conv_in\.weight"):
        SavedState(tmp_path).restore_weights(build_denoiser(TINY, SCHEMA, SHAPE, seed=1))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read"):
        SavedState(tmp_path)
