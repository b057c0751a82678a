"""The denoiser under DeepSpeed: which engine a recipe asks for."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from scanloom.errors import RecipeError
from scanloom.recipe import Finetune
from scanloom.training.exchange import Exchange

BETAS = (0.9, 0.99)
INITIAL_LOSS_SCALE_POWER = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Model:
    """The denoiser under its engine."""

    engine: Any
    dtype: torch.dtype
    memory_format: torch.memory_format
    exchange: Exchange | None
    """What averages the gradients; None where DeepSpeed does."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self.engine.device
        return device

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction, float32, in the precision of training."""
        told = {name: value.to(self.device, non_blocking=True) for name, value in condition.items()}
        noisy_BCHW = noisy_BCHW.to(self.device, self.dtype, non_blocking=True, memory_format=self.memory_format)
        predicted: Tensor = self.engine(noisy_BCHW, timesteps_B.to(self.device, non_blocking=True), told)
        return predicted.float()

    def learn(self, loss: Tensor) -> None:
        """Add this loss's gradients, and step the weights where the batch is whole. Collective."""
        engine, exchange = self.engine, self.exchange
        if exchange is None or not engine.is_gradient_accumulation_boundary():
            engine.backward(loss)
            engine.step()
            return
        exchange.begin()
        with engine.no_sync():
            engine.backward(loss)
        exchange.finish()
        engine.step()
        exchange.spread()


def start(recipe: Finetune, denoiser: nn.Module) -> Model:
    """An engine that trains what of the denoiser requires gradients. Collective."""
    if not recipe.use_gpu:
        # Without it DeepSpeed guesses, and a CPU worker on a GPU host guesses wrong.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # reads DS_ACCELERATOR when imported
    from deepspeed.accelerator import get_accelerator

    if not recipe.use_gpu:
        # A C++ extension for collectives in shared memory, compiled at first use: it needs a compiler on every host,
        # takes a minute, and a worker killed while compiling leaves a lock that its successors wait for. Gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if recipe.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    if DTYPES[recipe.precision] not in get_accelerator().supported_dtypes():
        raise RecipeError(f"finetune.precision {recipe.precision}: this device cannot; set fp32 or bf16")
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    # torch's own, whose CPU kernel needs no compiler. The loop sets the rate; 0 keeps DeepSpeed's trial step harmless.
    optimizer = torch.optim.AdamW(trainable, lr=0.0, betas=BETAS, weight_decay=recipe.weight_decay, fused=True)
    config = deepspeed_config(recipe, torch.distributed.get_world_size())
    engine, _, _, _ = deepspeed.initialize(model=denoiser, optimizer=optimizer, config=config)
    engine.basic_optimizer.state.clear()
    if recipe.compile:
        engine.compile()
    layout = torch.channels_last if recipe.channels_last else torch.preserve_format
    told = config["zero_optimization"]
    direct = told["stage"] == 1 and not recipe.use_gpu and "offload_optimizer" not in told
    return Model(engine, DTYPES[recipe.precision], layout, Exchange(engine.optimizer) if direct else None)


def deepspeed_config(recipe: Finetune, workers: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe on so many workers."""
    offloaded = recipe.offload_optimizer or recipe.offload_parameters
    # One worker has nobody to divide with: what divides would only cost time.
    zero: dict[str, Any] = {"stage": recipe.zero_stage if workers > 1 or offloaded else 0}
    if zero["stage"] in (1, 2) and not offloaded and not recipe.use_gpu:
        # Copies of gradients that pay where memory is scarce and transfers run beside the computation; on CPU neither.
        zero |= {"contiguous_gradients": False, "overlap_comm": False}
    pinned = {"device": "cpu", "pin_memory": recipe.use_gpu}
    if recipe.offload_optimizer:
        zero["offload_optimizer"] = pinned
    if recipe.offload_parameters:
        zero["offload_param"] = pinned
    return {
        "train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "gradient_clipping": recipe.gradient_clip,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "fp16": {"enabled": recipe.precision == "fp16", "initial_scale_power": INITIAL_LOSS_SCALE_POWER},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
        "steps_per_print": 10**9,
    }


def learning_rate_factor(recipe: Finetune, step: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant, or down to a tenth along half a cosine or a line."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    share = min(1.0, (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps))
    if recipe.learning_rate_schedule == "constant":
        return 1.0
    left = 1.0 - share if recipe.learning_rate_schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * share)
    return 0.1 + 0.9 * left
