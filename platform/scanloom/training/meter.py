"""What training does with its time and memory: rate, share of waiting, use of the device's arithmetic, peak memory."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scanloom.heap import peak_resident_bytes

_PEAK_TFLOPS = {
    r"B200": 2250.0,
    r"H200 NVL|H100 NVL": 835.5,
    r"H100 PCIe": 756.5,
    r"H100|H200|H800|GH200": 989.5,
    r"A100|A800": 312.0,
    r"A40": 149.7,
    r"A30": 165.0,
    r"A10": 125.0,
    r"L40S": 362.0,
    r"L40": 181.0,
    r"L4": 121.0,
    r"RTX 6000 Ada": 364.2,
    r"RTX 4090": 165.2,
    r"RTX 3090": 71.0,
}


class Meter:
    """Measures windows of training steps on one worker.

    A window ends where `window` is called and the next begins there; `begin` begins it anew, for example after an
    evaluation or a checkpoint, which are not training. Nothing waits for the device but the end of a window.
    """

    def __init__(
        self,
        device: torch.device,
        workers: int,
        *,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._device = device
        self._workers = workers
        self._mfu_of_a_rate = flops_per_image / (workers * peak_flops) if flops_per_image and peak_flops else None
        self.begin()

    def begin(self) -> None:
        """Begin a window; what was measured since the last one is dropped."""
        self._settle()
        self._images, self._waited_s = 0, 0.0
        self._began_s = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data: the making of a batch and its way to the device."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - began_s

    def step(self, images: int) -> None:
        """Count images that this worker has trained on."""
        self._images += images

    def window(self) -> dict[str, float]:
        """The figures of the window, which ends here.

        images_per_s: of all workers, taking each to train on as many as this one.
        data_wait_share: in [0, 1], of the window's time. On a GPU it is an upper bound of what waiting costs: the
        device may be busy with earlier steps while the next batch is made.
        mfu: model FLOP utilisation in [0, 1] (Chowdhery et al. 2022, appendix B), where the peak is known.
        memory_gb: the most that this worker has held since it began, in 1e9 bytes; see `peak_memory_gb`.
        """
        self._settle()
        elapsed_s = max(time.perf_counter() - self._began_s, 1e-9)
        rate = self._images * self._workers / elapsed_s
        figures = {
            "images_per_s": rate,
            "data_wait_share": min(1.0, self._waited_s / elapsed_s),
            "memory_gb": peak_memory_gb(self._device),
        }
        if self._mfu_of_a_rate is not None:
            figures["mfu"] = rate * self._mfu_of_a_rate
        self.begin()
        return figures

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def train_flops(module: nn.Module, *inputs: Tensor | Mapping[str, Tensor]) -> float:
    """FLOP of forward and backward per image; a multiply-add counts two.

    `inputs` are what the module's forward takes, of any number of rows. Counted on shapes alone: nothing is computed,
    no memory is taken and no gradient is left. Recomputation by gradient checkpointing does not count, as MFU has it;
    neither do parameters without gradients in the backward pass. Call it before DeepSpeed or a compiler wrap the
    module.
    """
    shapes = [_on_meta(value) for value in inputs]
    rows = len(inputs[0]) if isinstance(inputs[0], Tensor) else 1
    state = {name: _meta(value).requires_grad_(value.requires_grad) for name, value in module.named_parameters()}
    state |= {name: _meta(value) for name, value in module.named_buffers()}
    counter = FlopCounterMode(display=False)
    # The counter knows no formula for the fused attention of CPUs; spelled out, it is matrix products everywhere.
    with _without_recomputation(module), sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), counter:
        output: Tensor = torch.func.functional_call(module, state, tuple(shapes))
        output.sum().backward()
    return counter.get_total_flops() / rows


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s at `precision`, dense, or None where it is not known.

    Known are GPUs whose maker states one for bfloat16 and float16 on tensor cores (NVIDIA's data sheets of B200, H200,
    H100, A100, A30, A40, A10, L40S, L40 and L4, halved where they state it with sparsity; its Ada and Ampere white
    papers for RTX). None for fp32, whose peak depends on whether TF32 is allowed, for a slice of a GPU, and for a CPU.
    """
    if device.type != "cuda" or precision not in ("bf16", "fp16"):
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The peak of the GPU that the driver calls `name`, see `peak_flops`."""
    if "MIG" in name:
        return None
    # Whole words: an A10G is not an A10. The first that fits: an H100 NVL is also an H100.
    fits = (peak for pattern, peak in _PEAK_TFLOPS.items() if re.search(rf"\b({pattern})\b", name))
    peak = next(fits, None)
    return None if peak is None else peak * 1e12


def peak_memory_gb(device: torch.device) -> float:
    """The most that was held so far, in 1e9 bytes: of a GPU's memory by tensors, else of the host's by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_resident_bytes() / 1e9


def _on_meta(value: Tensor | Mapping[str, Tensor]) -> Any:
    return _meta(value) if isinstance(value, Tensor) else {name: _meta(part) for name, part in value.items()}


def _meta(value: Tensor) -> Tensor:
    return torch.empty_like(value, device="meta")


@contextmanager
def _without_recomputation(module: nn.Module) -> Iterator[None]:
    # Where diffusers and transformers keep it.
    switches: list[Any] = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in switches:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in switches:
            part.gradient_checkpointing = True
