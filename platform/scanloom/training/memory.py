"""How much memory a worker's training state takes: computed, not measured.

Weights, gradients, optimizer and average alone. Activations come on top, and are what a smaller micro-batch, gradient
checkpointing and a smaller image shrink; so do DeepSpeed's buffers, about the size of one layer under stage 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_SINGLE, _HALF = 4, 2
_ADAM = 2 * _SINGLE


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one worker."""

    device: float
    host: float


def state_memory(
    parameters: float,
    trainable: float,
    *,
    zero_stage: Literal[0, 1, 2, 3],
    workers: int,
    precision: Literal["fp32", "bf16", "fp16"] = "bf16",
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> StateMemory:
    """What a worker holds of a denoiser with so many parameters, of which so many are trained.

    A parameter has its value and, where it is trained, a gradient of the same width, a float32 master value, Adam's two
    float32 moments, and a float32 average. Stage 1 divides master and moments among the workers, stage 2 gradients too,
    stage 3 values too (Rajbhandari et al. 2020, section 3); the average is divided at every stage. Without ZeRO a
    float32 weight is its own master. Offloading moves master, moments and average, or values, to the host.
    """
    width = _SINGLE if precision == "fp32" else _HALF
    values = width * parameters / (workers if zero_stage == 3 else 1)
    gradients = width * trainable / (workers if zero_stage >= 2 else 1)
    master = 0 if precision == "fp32" and zero_stage == 0 else _SINGLE
    optimizer = (master + _ADAM) * trainable / (workers if zero_stage >= 1 else 1)
    optimizer += _SINGLE * trainable / workers
    moved = (optimizer if offload_optimizer else 0.0) + (values if offload_parameters else 0.0)
    return StateMemory(device=values + gradients + optimizer - moved, host=moved)
