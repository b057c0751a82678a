"""The other programs of bench_training.py: training loops as one writes them by hand, each in processes of its own.

python -m tests.benchmarks.training_peers PROGRAM FOLDER: trains what FOLDER/plan.json says on FOLDER/data.pt and prints
as JSON the seconds of every window of steps. They train the same denoiser with the same optimizer, objective, dropout,
clipping and average of weights as scanloom's loop, and do nothing else: no checkpoints, no held-out loss, no reports.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

TIMESTEPS = 1000
GAMMA = 5.0
WHOLE_DROPOUT, ATTRIBUTE_DROPOUT = 0.1, 0.05
CLIP = 1.0
Plan = dict[str, Any]
Data = dict[str, Any]


class Watch:
    """Seconds of each window of steps; `tick` at the end of every step, with its loss."""

    def __init__(self, plan: Plan) -> None:
        self._steps = plan["steps_per_window"]
        self._last = time.monotonic()
        self._count = 0
        self.seconds: list[float] = []

    def tick(self, loss: Tensor) -> None:
        self._count += 1
        if self._count % self._steps == 0:
            assert math.isfinite(loss.item())
            now = time.monotonic()
            self.seconds.append(now - self._last)
            self._last = now


# --- on the attribute-unet ------------------------------------------------------------------------------------


def bare(plan: Plan, data: Data) -> list[float]:
    """One process, latents in memory."""
    return _train(plan, data, _attribute_unet(plan), _stored_latents)


def online(plan: Plan, data: Data) -> list[float]:
    """One process, scans in memory, encoded at every step."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(Path(plan["folder"]) / "vae").eval().requires_grad_(False)

    def encoded(data: Data, rows: Tensor) -> Tensor:
        with torch.no_grad():
            latents: Tensor = vae.encode(data["images"][rows]).latent_dist.sample()
        return latents

    return _train(plan, data, _attribute_unet(plan), encoded)


def ddp(plan: Plan, data: Data) -> list[float]:
    """Two processes under DistributedDataParallel over gloo, each with half of every batch."""
    torch.distributed.init_process_group("gloo")
    seconds = _train(plan, data, DistributedDataParallel(_attribute_unet(plan)), _stored_latents)
    torch.distributed.destroy_process_group()
    return seconds


def ddp_on_ray(plan: Plan, _: Data) -> list[float]:
    """The same two processes as workers of Ray Train, beside Ray's own processes."""
    import tempfile

    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from jobs.cluster import connected

    with connected(), tempfile.TemporaryDirectory() as runs:
        trainer = TorchTrainer(
            _ray_worker, train_loop_config=plan, scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=runs),
        )  # fmt: skip
        result: Any = trainer.fit()
    seconds: list[float] = result.return_value
    return seconds


def _ray_worker(plan: Plan) -> list[float]:
    torch.set_num_threads(plan["threads"])
    data = torch.load(Path(plan["folder"]) / "data.pt")
    return _train(plan, data, DistributedDataParallel(_attribute_unet(plan)), _stored_latents)


def _attribute_unet(plan: Plan) -> nn.Module:
    from scanloom.attributes import AttributeSchema
    from scanloom.models.attribute_unet import build_denoiser
    from scanloom.recipe import AttributeUnet

    schema = AttributeSchema.model_validate(plan["schema"])
    config = AttributeUnet.model_validate(plan["denoiser"])
    return build_denoiser(config, schema, tuple(plan["latent_shape"]), 0)


def _stored_latents(data: Data, rows: Tensor) -> Tensor:
    mean, logvar = data["mean"][rows].float(), data["logvar"][rows].float()
    return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)


def _train(plan: Plan, data: Data, model: nn.Module, latents: Callable[[Data, Tensor], Tensor]) -> list[float]:
    rank, workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(rank)
    share, count = plan["batch_size"] // workers, len(data["mean"])
    signals = _cosine_signal()
    averaged = [p.detach().clone() for p in model.parameters()]
    optimizer = _adamw(model, plan)
    order, watch = torch.empty(0, dtype=torch.int64), Watch(plan)
    for step in range(plan["steps_per_window"] * plan["windows"]):
        if len(order) < share:
            order = torch.randperm(count).repeat(1 + share // count)
        rows, order = order[:share], order[share:]
        clean = latents(data, rows) * plan["scaling_factor"]
        noise, timesteps = torch.randn_like(clean), torch.randint(TIMESTEPS, (share,))
        signal = signals[timesteps]
        alpha, sigma = signal.sqrt().view(-1, 1, 1, 1), (1 - signal).sqrt().view(-1, 1, 1, 1)
        drop = torch.rand(share, 1).less(WHOLE_DROPOUT) | torch.rand(share, plan["attributes"]).less(ATTRIBUTE_DROPOUT)
        told = {"features": data["features"][rows], "drop": drop}
        predicted = model(alpha * clean + sigma * noise, timesteps, told)
        error = (predicted - (alpha * noise - sigma * clean)).square().flatten(1).mean(1)
        snr = signal / (1 - signal)
        loss = (error * snr.clamp_max(GAMMA) / (snr + 1)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(model.parameters()), 1 - decay)
        watch.tick(loss.detach())
    return watch.seconds


def _adamw(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=plan["learning_rate"], betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )


def _cosine_signal() -> Tensor:
    """Share of signal variance [TIMESTEPS] (Nichol & Dhariwal 2021, eq. 17), betas clipped at 0.999."""
    times = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    shares = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod((shares[1:] / shares[:-1]).clamp_min(0.001), 0).float()


# --- text to image --------------------------------------------------------------------------------------------


def text_to_image(plan: Plan, data: Data) -> list[float]:
    """accelerate, a DataLoader, and at every step the VAE and the text encoder: a fine-tuning of Stable Diffusion."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.utils.data import DataLoader
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(cpu=True)
    base = Path(plan["folder"]) / "base"
    vae = AutoencoderKL.from_pretrained(base / "vae").eval().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    unet = UNet2DConditionModel.from_pretrained(base / "unet").train()
    schedule = DDPMScheduler.from_pretrained(base / "scheduler")
    averaged = EMAModel(unet.parameters(), decay=0.995, foreach=True)
    optimizer = _adamw(unet, plan)
    rate = get_scheduler("constant", optimizer)

    def collate(rows: list[int]) -> tuple[Tensor, Tensor]:
        told = tokenizer([data["prompts"][row] for row in rows], padding="max_length", truncation=True,
                         max_length=tokenizer.model_max_length, return_tensors="pt")  # fmt: skip
        return data["images"][rows].expand(-1, vae.config.in_channels, -1, -1), told.input_ids

    rows = list(range(len(data["images"])))
    loader = DataLoader(rows, plan["batch_size"], shuffle=True, collate_fn=collate, drop_last=True)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    watch, steps = Watch(plan), plan["steps_per_window"] * plan["windows"]
    for pixels, tokens in _first(steps, loader):
        with accelerator.accumulate(unet):
            clean = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(clean)
            timesteps = torch.randint(schedule.config.num_train_timesteps, (len(clean),))
            noisy = schedule.add_noise(clean, noise, timesteps)
            told = text_encoder(tokens, return_dict=False)[0]
            velocity = schedule.config.prediction_type == "v_prediction"
            wanted = schedule.get_velocity(clean, noise, timesteps) if velocity else noise
            predicted = unet(noisy, timesteps, told, return_dict=False)[0]
            loss = nn.functional.mse_loss(predicted.float(), wanted.float())
            accelerator.gather(loss.repeat(len(clean))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), CLIP)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        averaged.step(unet.parameters())
        watch.tick(loss.detach())
    return watch.seconds


def _first(count: int, batches: Iterable[Any]) -> Iterable[Any]:
    while True:
        for batch in batches:
            if not count:
                return
            count -= 1
            yield batch


PROGRAMS = {"bare": bare, "online": online, "ddp": ddp, "ddp-on-ray": ddp_on_ray, "text-to-image": text_to_image}


def main() -> int:
    program, folder = sys.argv[1:]
    plan: Plan = json.loads((Path(folder) / "plan.json").read_text())
    torch.set_num_threads(plan["threads"])
    # By its name in the module, not in __main__, so that workers of Ray find what they run.
    run = getattr(importlib.import_module("tests.benchmarks.training_peers"), PROGRAMS[program].__name__)
    seconds = run(plan | {"folder": folder}, torch.load(Path(folder) / "data.pt"))
    print(json.dumps(seconds))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
