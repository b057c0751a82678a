"""A few training steps of a tiny denoiser on any number of workers, without Ray, for tests of what they share."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
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

SHAPE = (4, 8, 8)
SHORT: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-2}
FROZEN = "unet.conv_in.weight"


def train(folder: Path, name: str, *, workers: int, steps: tuple[int, int], **recipe: object) -> list[float]:
    """Losses of the steps [first, last) by so many processes; goes on from `folder / "state"` and leaves it there.

    What training came to is left in `folder / name`: the average, put together from all workers, and what the engine
    says to a probe with its weights, with the average, and with its weights again.
    """
    on_workers(workers, folder, name, _train, (folder, name, steps, Finetune(**SHORT | recipe)))
    losses: list[float] = json.loads((folder / f"{name}.losses").read_text())
    return losses


def on_workers(workers: int, folder: Path, name: str, work: Callable[..., None], told: tuple[Any, ...]) -> None:
    """Call `work(rank, workers, *told)` in so many processes that gloo joins; raises what they raised."""
    # A server that has imported everything forks the workers: importing takes longer than training.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "deepspeed"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        processes.Process(target=_work, args=(folder / f"{name}-{rank}.error", rank, workers, port, work, told))
        for rank in range(workers)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
        process.kill()
    failed = sorted(folder.glob(f"{name}-*.error"))
    assert not failed, failed[0].read_text()


def _work(error: Path, rank: int, workers: int, port: int, work: Callable[..., None], told: tuple[Any, ...]) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers), "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }  # fmt: skip
    torch.set_num_threads(1)
    # DeepSpeed asks for fast float16, which few CPUs have; slow ones compute the same.
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    try:
        torch.distributed.init_process_group("gloo")
        work(rank, workers, *told)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        error.write_text(traceback.format_exc())
        raise


def _train(rank: int, workers: int, folder: Path, name: str, steps: tuple[int, int], recipe: Finetune) -> None:
    denoiser = build_denoiser(AttributeUnet(channels=(8, 16), condition_dim=16), SCHEMA, SHAPE, seed=1)
    denoiser.get_parameter(FROZEN).requires_grad_(False)
    saved = SavedState(folder / "state") if (folder / "state").exists() else None
    if saved is not None:
        saved.restore_weights(denoiser)
    model = engine.start(recipe, denoiser)
    partition = Partition.of(model.engine)
    ema = Ema([flat.values for flat in partition.owned], 0.9)
    if saved is not None:
        saved.restore(partition, ema)
    torch.distributed.barrier()
    losses = [_step(model, recipe, ema, step, rank, workers) for step in range(*steps)]
    state = folder / "state"
    state.mkdir(exist_ok=True)
    if rank == 0:
        for old in state.glob("part-*"):
            old.unlink()
    torch.distributed.barrier()
    write_part(state, partition, ema, {"step": steps[1]}, rank)
    end = {"averaged": dict(partition.gather(ema.shadow)), "before": _probe(model)}
    with partition.showing(ema.shadow):
        end["shown"] = _probe(model)
    end["after"] = _probe(model)
    if rank == 0:
        torch.save(end, folder / name)
        (folder / f"{name}.losses").write_text(json.dumps(losses))


@torch.no_grad()
def _probe(model: Any) -> torch.Tensor:
    model.engine.eval()
    noisy = draw([10**6] * 4, SHAPE, 1, seed=3).noise_BCHW
    said: torch.Tensor = model.predict(noisy, torch.full((4,), 500), _condition(4))
    model.engine.train()
    return said


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
        model.learn(loss)
        total += loss.detach() / recipe.gradient_accumulation
    ema.update()
    torch.distributed.all_reduce(total)
    return float(total) / workers


def _condition(rows: int) -> dict[str, torch.Tensor]:
    width = 1 + 2 + 1 + 4
    return {"features": torch.ones(rows, width), "drop": torch.zeros(rows, 4, dtype=torch.bool)}
