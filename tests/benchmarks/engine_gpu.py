"""A model of Stable Diffusion 2.1's size on one GPU: images/s beside diffusers' pipeline, and where the time goes.

Random weights, random embeddings of 77 tokens in place of a text encoder's, bf16, guidance 2; images end in the host's
memory, nothing is written. Without a GPU the same code runs on a model too small to say anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from scanloom.models.card import GeneratorCard
from scanloom.models.generator import Generator
from scanloom.models.noise_schedule import noise_schedule
from scanloom.models.text_denoisers import StableDiffusionDenoiser
from scanloom.recipe_denoiser import PromptTemplate
from scanloom.sampling.engine import GPU_DECODE_ROWS, Engine, ImageRequest
from tests.benchmarks.training_gpu import SD21, TINY, TOKENS
from tests.tiny_generator import ENVELOPE, SCHEMA

VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
TINY_VAE: dict[str, Any] = {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8}
SIZES_PX, STEPS, IMAGES = (256, 512), (20, 4), 16
"""Images a batch: twice as many slots."""
ROUNDS = 3
FACTOR = 8


@dataclass(frozen=True)
class Measured:
    size_px: int
    steps: int
    rates: dict[str, float]
    """Images per second by program, the median of the rounds."""
    denoising: float
    """Share of the compiled engine's time that denoiser calls alone take, and the same of decoder calls."""
    decoding: float


class _Told:
    """In place of text encoders: as many tokens of as many numbers, the same for the same text."""

    def __init__(self, width: int, device: str) -> None:
        self._width, self._device = width, device

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        made = [torch.randn(TOKENS, self._width, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
        return {"tokens": torch.stack(made).to(self._device)}


def measure(size_px: int, steps: int, device: str) -> Measured:
    """One size and number of steps; the programs take turns, each once before it counts."""
    plain, compiled = (_generator(size_px, device, compiled) for compiled in (False, device == "cuda"))
    pipeline = _pipeline(plain, device)
    programs: dict[str, Callable[[], None]] = {
        "engine, compiled": lambda: _by_engine(compiled, steps),
        "engine": lambda: _by_engine(plain, steps),
        "pipeline": lambda: _by_pipeline(pipeline, plain, size_px, steps),
    }
    rounds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(ROUNDS + 1):
        for name, program in programs.items():
            seconds = _seconds(program, device)
            if turn:
                rounds[name].append(2 * IMAGES / seconds)
    rates = {name: statistics.median(values) for name, values in rounds.items()}
    denoiser, decoder = _stages(compiled, steps, device)
    return Measured(size_px, steps, rates, denoiser * rates["engine, compiled"], decoder * rates["engine, compiled"])


def _generator(size_px: int, device: str, compiled: bool) -> Generator:
    unet_config, vae_config = (SD21, VAE) if device == "cuda" else (TINY, TINY_VAE)
    side = size_px // FACTOR
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=4, layers_per_block=2, **unet_config | {"sample_size": side}
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2, sample_size=size_px,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **vae_config,
        )  # fmt: skip
    card = GeneratorCard(
        family="sd", name="bench", attributes=SCHEMA, envelope=ENVELOPE, prompt=PromptTemplate(), spacing_mm=None,
        latent_shape=(4, side, side), image_shape=(1, size_px, size_px), trained_steps=0,
    )  # fmt: skip
    schedule = noise_schedule("v_prediction", betas="scaled_linear")
    told: Any = _Told(unet_config["cross_attention_dim"], device)
    return Generator(
        card, "random", StableDiffusionDenoiser(unet, FACTOR), vae, schedule, told, device,
        precision="bf16", compiled=compiled,
    )  # fmt: skip


def _by_engine(generator: Generator, steps: int) -> None:
    engine = Engine(generator, 2 * IMAGES)
    asked = (ImageRequest(n, 1, {"age": float(n)}, steps, 2.0) for n in range(2 * IMAGES))
    assert len(list(engine.run(asked))) == 2 * IMAGES


def _pipeline(generator: Generator, device: str) -> Any:
    made: Any = StableDiffusionPipeline(
        vae=generator._vae, unet=generator._network, text_encoder=None, tokenizer=None, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        scheduler=DPMSolverMultistepScheduler.from_config(
            dict(generator.schedule.settings), timestep_spacing="trailing", steps_offset=1
        ),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def _by_pipeline(pipeline: Any, generator: Generator, size_px: int, steps: int) -> None:
    for start in (0, IMAGES):
        rows = generator.condition([{"age": float(start + n)} for n in range(IMAGES)])
        tokens = rows.reshape(IMAGES, TOKENS, -1).bfloat16()
        images = pipeline(
            prompt_embeds=tokens, negative_prompt_embeds=torch.zeros_like(tokens), height=size_px, width=size_px,
            num_inference_steps=steps, guidance_scale=2.0, output_type="np",
        ).images  # fmt: skip
        assert len(images) == IMAGES


def _stages(generator: Generator, steps: int, device: str) -> tuple[float, float]:
    """Seconds of denoiser calls and of decoder calls an image, each by itself."""
    rows = 2 * IMAGES
    latents = torch.randn(rows, *generator.latent_shape, device=device)
    times, told = torch.full((rows,), 500, device=device), generator.null_condition(rows)
    denoise = _seconds(lambda: [generator.denoise(latents, times, told) for _ in range(4)], device) / 4
    few = latents[:GPU_DECODE_ROWS]
    decode = _seconds(lambda: [generator.decode(few) for _ in range(4)], device) / 4
    return denoise * steps / IMAGES, decode / len(few)


def _seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.monotonic()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - started


def page() -> tuple[str, list[str]]:
    """The part's text, and where it falls short of what is asked: nothing is."""
    on_gpu = torch.cuda.is_available()
    cases = [(size, steps) for size in SIZES_PX for steps in STEPS] if on_gpu else [(64, 4)]
    what = "A model of Stable Diffusion 2.1's size" if on_gpu else "A model of its classes, too small to say anything"
    lines = [
        f"{what}: random weights, bf16, guidance 2, DPM-Solver++, {IMAGES} images a batch. The pipeline is diffusers' "
        "own with the same networks, not compiled; text encoders are left out of both.",
        "",
        "| size | steps | engine, compiled, images/s | engine, images/s | pipeline, images/s | denoiser | decoder | "
        "images per GPU-hour | GPU-hours for a million |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, steps in cases:
        found = measure(size, steps, "cuda" if on_gpu else "cpu")
        best = max(found.rates["engine, compiled"], found.rates["engine"])
        rates = " | ".join(f"{found.rates[name]:.2f}" for name in ("engine, compiled", "engine", "pipeline"))
        hours = f"{3600 * best:,.0f} | {1e6 / best / 3600:,.1f}" if on_gpu else "|"
        lines.append(f"| {size} | {steps} | {rates} | {found.denoising:.0%} | {found.decoding:.0%} | {hours} |")
    if on_gpu:
        lines.append(
            f"\nOn one {torch.cuda.get_device_name()}. Shares are of the compiled engine's time, of calls timed by "
            "themselves: above 100 % together they overlap."
        )
    else:
        lines.append(
            "\nThis machine has no GPU: the rates say that the same code runs, no more, and nothing is compiled. The "
            "figures for one GPU are still to be measured: `python tests/benchmarks/bench_engine.py --parts gpu` on a "
            "machine with one."
        )
    return "\n".join(lines) + "\n", []
