"""A few training steps of a tiny denoiser on any number of workers, without Ray: run by test_training_checkpoint.py.

python -m tests.training_worker SPEC, a JSON file; rank and number of workers as torchrun says them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from scanloom.models.attribute_unet import build_denoiser
from scanloom.models.noise_schedule import noise_schedule
from scanloom.recipe import AttributeUnet, Finetune
from scanloom.training import engine
from scanloom.training.checkpoint import SavedState, write_part
from scanloom.training.draws import draw, positions
from scanloom.training.ema import Ema
from scanloom.training.objectives import add_noise, timesteps
from scanloom.training.partition import Partition
from tests.tiny_generator import SCHEMA

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (4, 8, 8)
FROZEN = "unet.conv_in.weight"


def train(folder: Path, name: str, *, workers: int, steps: tuple[int, int], **recipe: object) -> list[float]:
    """Losses of the steps [first, last) by so many processes; goes on from `folder / "state"` and leaves it there.

    The average and the weights that the engine computes with, as all workers put them together, are left in
    `folder / name`.
    """
    spec = folder / f"{name}.json"
    spec.write_text(json.dumps({"folder": str(folder), "name": name, "steps": steps, "recipe": recipe}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(workers),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.training_worker", str(spec)]
    running = [
        subprocess.Popen(
            command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=(folder / f"{name}-{rank}.log").open("w"),
        )
        for rank in range(workers)
    ]  # fmt: skip
    failed = [rank for rank, process in enumerate(running) if process.wait(timeout=120)]
    assert not failed, (folder / f"{name}-{failed[0]}.log").read_text()[-2000:]
    losses: list[float] = json.loads((folder / f"{name}.losses").read_text())
    return losses


def main() -> None:
    """One worker's part."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder, rank, workers = Path(spec["folder"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    recipe = Finetune(batch_size=4, learning_rate=1e-2, warmup_steps=0, **spec["recipe"])
    denoiser = build_denoiser(AttributeUnet(channels=(8, 16), condition_dim=16), SCHEMA, SHAPE, seed=1)
    denoiser.get_parameter(FROZEN).requires_grad_(False)
    torch.distributed.init_process_group("gloo")
    saved = SavedState(folder / "state") if (folder / "state").exists() else None
    if saved is not None:
        saved.restore_weights(denoiser)
    model = engine.start(recipe, denoiser)
    partition = Partition.of(model.engine)
    ema = Ema([flat.values for flat in partition.owned], 0.9)
    if saved is not None:
        saved.restore(partition, ema)
    torch.distributed.barrier()
    losses = [_step(model, recipe, ema, step, rank, workers) for step in range(*spec["steps"])]
    state = folder / "state"
    state.mkdir(exist_ok=True)
    if rank == 0:
        for old in state.glob("part-*"):
            old.unlink()
    torch.distributed.barrier()
    write_part(state, partition, ema, {"step": spec["steps"][1]}, rank)
    averaged = dict(partition.gather(ema.shadow))
    probe = draw([10**6] * 4, SHAPE, 1, seed=3).noise_BCHW
    model.engine.eval()
    with torch.no_grad():
        before = model.predict(probe, torch.full((4,), 500), _condition(4))
        with partition.showing(ema.shadow):
            shown = model.predict(probe, torch.full((4,), 500), _condition(4))
        after = model.predict(probe, torch.full((4,), 500), _condition(4))
    if rank == 0:
        torch.save({"averaged": averaged, "before": before, "shown": shown, "after": after}, folder / spec["name"])
        (folder / f"{spec['name']}.losses").write_text(json.dumps(losses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _step(model: Any, recipe: Finetune, ema: Ema, step: int, rank: int, workers: int) -> float:
    for group in model.engine.optimizer.param_groups:
        group["lr"] = recipe.learning_rate
    where = positions(step, recipe.batch_size, rank, workers)
    share = len(where) // recipe.gradient_accumulation
    schedule = noise_schedule("v_prediction")
    total = torch.zeros(())
    for start in range(0, len(where), share):
        d = draw(where[start : start + share], SHAPE, 1, seed=2)
        at_B = timesteps(d.uniform_BU[:, 0], 1000, "uniform")
        alphas_B, sigmas_B = schedule.alphas_T.float()[at_B], schedule.sigmas_T.float()[at_B]
        noisy = add_noise(d.posterior_BCHW, d.noise_BCHW, alphas_B, sigmas_B)
        loss = (model.predict(noisy, at_B, _condition(share)) - d.posterior_BCHW).square().mean()
        model.engine.backward(loss)
        model.engine.step()
        total += loss.detach() / recipe.gradient_accumulation
    ema.update()
    torch.distributed.all_reduce(total)
    return float(total) / workers


def _condition(rows: int) -> dict[str, torch.Tensor]:
    width = 1 + 2 + 1 + 4
    return {"features": torch.ones(rows, width), "drop": torch.zeros(rows, 4, dtype=torch.bool)}


if __name__ == "__main__":
    main()
