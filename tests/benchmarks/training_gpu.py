"""The step of a UNet of Stable Diffusion 2.1's size on one GPU: images/s, share of the GPU's arithmetic, memory.

Random weights, 512x512 scans (latents of 4x64x64), 77 tokens; bf16 weights with float32 masters, fused AdamW, an
average of the weights, compiled, channels-last. Draws, noising, target and weights are scanloom's own, made anew for
every step. Needs torch, numpy, diffusers and this repository; neither Ray nor DeepSpeed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scanloom.models.noise_schedule import noise_schedule
from scanloom.training.draws import draw, positions
from scanloom.training.ema import Ema
from scanloom.training.meter import peak_of, train_flops
from scanloom.training.objectives import add_noise, loss_weight, target, timesteps

SD21: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),  # diffusers reads this argument as the number of heads
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
TINY = SD21 | {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128, 128),
    "attention_head_dim": (1, 2, 4, 4),
    "cross_attention_dim": 64,
}
TOKENS = 77
WARM_UP, MEASURED = 5, 20
GPU_BATCHES, CPU_BATCHES = (8, 16, 32, 64), (2,)
LEAST_MFU = 0.4


@dataclass(frozen=True)
class Measured:
    """What one batch size gave."""

    batch_size: int
    images_per_s: float
    making: float
    """Seconds of making a batch to seconds of a step, which makes the next one in a thread beside."""
    memory_gb: float | None
    """Peak that torch allocated, without gradient checkpointing."""
    mfu: float | None


@dataclass(frozen=True)
class Bench:
    device: str
    name: str
    parameters: int
    flop_per_image: float
    rows: tuple[Measured | str, ...]
    """In place of a measurement, why there is none."""


def measure(batch_sizes: Sequence[int], *, checkpointing: bool = False) -> Bench:
    """Every batch size on this machine's GPU; without one, a tiny UNet on its CPU."""
    on_gpu = torch.cuda.is_available()
    config = SD21 if on_gpu else TINY
    torch.set_float32_matmul_precision("high")
    flop, parameters = count_flop(config)
    rows: list[Measured | str] = []
    for size in batch_sizes:
        try:
            rows.append(_measure(config, size, "cuda" if on_gpu else "cpu", flop, checkpointing))
        except torch.OutOfMemoryError:
            rows.append(f"batch size {size}: out of memory")
        if on_gpu:
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    return Bench("cuda" if on_gpu else "cpu", name, parameters, flop, tuple(rows))


def count_flop(config: dict[str, Any]) -> tuple[float, int]:
    """FLOP of forward and backward for one image, and the number of parameters; nothing is computed."""
    with torch.device("meta"):
        denoiser = Denoiser(config)
        noisy, told = _shapes(config, 1)
        inputs = torch.empty(noisy), torch.zeros((1,), dtype=torch.int64), torch.empty(told)
    return train_flops(denoiser, *inputs), sum(p.numel() for p in denoiser.parameters())


class Denoiser(nn.Module):
    """The UNet with a forward as scanloom's families have it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(in_channels=4, out_channels=4, layers_per_block=2, **config)

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, tokens_BLD: Tensor) -> Tensor:
        predicted: Tensor = self.unet(latents_BCHW, timesteps_B, tokens_BLD, return_dict=False)[0]
        return predicted


def _shapes(config: dict[str, Any], batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    side = config["sample_size"]
    return (batch, 4, side, side), (batch, TOKENS, config["cross_attention_dim"])


class Step:
    """A training step on one device."""

    def __init__(self, config: dict[str, Any], batch: int, device: str, checkpointing: bool) -> None:
        torch.manual_seed(0)
        self._device, self._batch = torch.device(device), batch
        with self._device:
            denoiser = Denoiser(config).to(memory_format=torch.channels_last)
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        # Masters in float32, weights and gradients in bf16, as DeepSpeed keeps them.
        self._masters = [nn.Parameter(p.detach().clone()) for p in denoiser.parameters()]
        self._denoiser = denoiser.to(torch.bfloat16)
        self._weights = list(denoiser.parameters())
        self._ema = Ema(self._masters, 0.995)
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-5, fused=True)
        # Inductor takes minutes for a CPU and says nothing of a GPU; the tracing before it is the same.
        backend = "inductor" if device == "cuda" else "aot_eager"
        self._forward = torch.compile(self._loss, dynamic=False, backend=backend)
        self._shape, told = _shapes(config, batch)
        self._latents = torch.randn(self._shape)
        self._told = torch.randn(told).to(self._device, torch.bfloat16)
        self._schedule = noise_schedule("v_prediction", zero_terminal_snr=True)
        self._thread = ThreadPoolExecutor(1)
        self._ahead: Future[tuple[Tensor, ...]] | None = None

    def __call__(self, step: int) -> None:
        ready = self._ahead.result() if self._ahead is not None else self.made(step)
        # The next batch is made while this one is trained on, as in scanloom's loop.
        self._ahead = self._thread.submit(self.made, step + 1)
        noisy, timesteps_B, wanted, weight = (t.to(self._device, non_blocking=True) for t in ready)
        noisy = noisy.to(torch.bfloat16, memory_format=torch.channels_last)
        self._forward(noisy, timesteps_B, wanted, weight).backward()
        for master, weights in zip(self._masters, self._weights, strict=True):
            master.grad, weights.grad = weights.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)
        self._ema.update()

    def made(self, step: int) -> tuple[Tensor, ...]:
        """Noisy latents, timesteps, targets and weights of a step, in the host's memory."""
        drawn = draw(positions(step, self._batch, 0, 1), self._shape[1:], 2, 0)
        timesteps_B = timesteps(drawn.uniform_BU[:, 0], len(self._schedule.alphas_T), "uniform")
        scales = self._schedule.alphas_T.float()[timesteps_B], self._schedule.sigmas_T.float()[timesteps_B]
        clean = self._latents + 0.1 * drawn.posterior_BCHW
        batch = (
            add_noise(clean, drawn.noise_BCHW, *scales), timesteps_B,
            target("v_prediction", clean, drawn.noise_BCHW, *scales), loss_weight("v_prediction", *scales, 5.0),
        )  # fmt: skip
        return tuple(t.pin_memory() for t in batch) if self._device.type == "cuda" else batch

    def _loss(self, noisy: Tensor, timesteps_B: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        predicted = self._denoiser(noisy, timesteps_B, self._told)
        error = (predicted.float() - wanted).square().flatten(1).mean(1)
        return (error * weight).mean()


def _measure(config: dict[str, Any], batch: int, device: str, flop: float, checkpointing: bool) -> Measured:
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = Step(config, batch, device, checkpointing)
    warm_up, measured = (WARM_UP, MEASURED) if on_gpu else (2, 5)
    for number in range(warm_up):
        step(number)
    seconds = _seconds(step, measured, device)
    rate = batch * measured / seconds
    peak = peak_of(torch.cuda.get_device_name()) if on_gpu else None
    return Measured(
        batch, rate, _seconds(step.made, measured, device) / seconds,
        torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None, rate * flop / peak if peak else None,
    )  # fmt: skip


def _seconds(work: Callable[[int], object], times: int, device: str) -> float:
    _finish(device)
    started = time.monotonic()
    for number in range(times):
        work(number)
    _finish(device)
    return time.monotonic() - started


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- the page -------------------------------------------------------------------------------------------------


def page(batch_sizes: Sequence[int] | None, *, checkpointing: bool) -> tuple[str, list[str]]:
    """The part's text, and where it falls short of what is asked."""
    on_gpu = torch.cuda.is_available()
    found = measure(batch_sizes or (GPU_BATCHES if on_gpu else CPU_BATCHES), checkpointing=checkpointing)
    what = "UNet of Stable Diffusion 2.1's size" if on_gpu else "UNet of its classes, too small to say anything of it"
    lines = [
        f"A {what}: {found.parameters / 1e6:.1f} M parameters, random weights, "
        f"bf16 with float32 masters, {'compiled' if on_gpu else 'traced but not compiled'}, channels-last, "
        f"{'with' if checkpointing else 'without'} gradient checkpointing.",
        f"Forward and backward take {found.flop_per_image / 1e12:.4g} TFLOP an image, a multiply-add counted as two "
        "and nothing that is computed again.",
        "",
        "| batch size | images/s | share of peak (MFU) | peak memory, GB | making a batch, of a step |",
        "|---|---|---|---|---|",
    ]
    for row in found.rows:
        if isinstance(row, str):
            lines.append(f"| {row} | | | | |")
            continue
        mfu = "" if row.mfu is None else f"{row.mfu:.1%}"
        memory = "" if row.memory_gb is None else f"{row.memory_gb:.1f}"
        lines.append(f"| {row.batch_size} | {row.images_per_s:.1f} | {mfu} | {memory} | {row.making:.1%} |")
    if on_gpu:
        peak = peak_of(found.name)
        lines.append(f"\nOn one {found.name}; its peak is {peak / 1e12:.0f} TFLOP/s dense bf16." if peak else "")
    else:
        flop, parameters = count_flop(SD21)
        lines.append(
            f"\nThis machine has no GPU: the rates say that the same code runs, no more. The figure for one GPU "
            f"({parameters / 1e6:.0f} M parameters, {flop / 1e12:.3f} TFLOP an image) is still to be measured: "
            "`python tests/benchmarks/bench_training.py --parts gpu` on a machine with one."
        )
    best = max((row.mfu for row in found.rows if isinstance(row, Measured) and row.mfu), default=None)
    short = best is not None and best < LEAST_MFU
    return "\n".join(lines) + "\n", [f"gpu: MFU {best:.1%}, asked {LEAST_MFU:.0%}"] if short else []
