"""The meter's rates against a clock of our own, and FLOP counts against counts by hand."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scanloom.models.conditioner import feature_widths
from scanloom.models.family import initial_denoiser
from scanloom.recipe_denoiser import AttributeUnet, Denoiser, Lora
from scanloom.training import meter
from scanloom.training.meter import Meter, peak_flops, peak_memory_gb, peak_of, train_flops
from tests.tiny_families import CLIP_WIDTH, LATENT_SHAPE, TEXT_FAMILIES, card_of, section, write_base
from tests.tiny_generator import SCHEMA

CPU = torch.device("cpu")


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    ours = Clock()
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=ours.perf_counter))
    return ours  # type: ignore[return-value]


def _run(measured: Meter, clock: Clock, *, steps: int, images: int, wait: float, work: float) -> None:
    for _ in range(steps):
        with measured.waiting():
            clock.now += wait
        clock.now += work
        measured.step(images)


def test_a_window_tells_the_rate_of_all_workers_and_the_share_of_waiting(clock: Clock) -> None:
    measured = Meter(CPU, workers=4)
    _run(measured, clock, steps=5, images=8, wait=0.5, work=1.5)
    figures = measured.window()
    assert figures["images_per_s"] == pytest.approx(4 * 40 / 10)
    assert figures["data_wait_share"] == pytest.approx(0.25)
    assert "mfu" not in figures


def test_a_window_does_not_remember_the_one_before(clock: Clock) -> None:
    measured = Meter(CPU, workers=1)
    _run(measured, clock, steps=5, images=8, wait=1.0, work=0.0)
    measured.window()
    _run(measured, clock, steps=2, images=3, wait=0.0, work=1.0)
    figures = measured.window()
    assert figures["images_per_s"] == pytest.approx(3.0)
    assert figures["data_wait_share"] == 0.0


def test_what_is_not_training_is_left_out_where_the_window_begins_anew(clock: Clock) -> None:
    measured = Meter(CPU, workers=1)
    clock.now += 1000.0
    measured.begin()
    _run(measured, clock, steps=1, images=6, wait=1.0, work=2.0)
    assert measured.window()["images_per_s"] == pytest.approx(2.0)


def test_mfu_is_the_flop_of_a_workers_images_over_its_devices_peak(clock: Clock) -> None:
    measured = Meter(CPU, workers=2, flops_per_image=3e9, peak_flops=100e9)
    _run(measured, clock, steps=4, images=10, wait=0.0, work=1.0)
    # 10 images a second on each worker's device, of 3 GFLOP each, of 100.
    assert measured.window()["mfu"] == pytest.approx(0.3)


def test_waiting_counts_where_making_a_batch_failed(clock: Clock) -> None:
    measured = Meter(CPU, workers=1)
    with suppress(KeyError), measured.waiting():
        clock.now += 2.0
        raise KeyError
    clock.now += 2.0
    assert measured.window()["data_wait_share"] == pytest.approx(0.5)


def test_the_peak_of_memory_is_at_least_what_the_process_holds_now() -> None:
    held = psutil.Process().memory_info().rss / 1e9
    peak = peak_memory_gb(CPU)
    assert held * 0.98 <= peak < psutil.virtual_memory().total / 1e9


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name: str, tera: float) -> None:
    assert peak_of(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300X", ""])
def test_a_gpu_that_only_looks_like_a_known_one_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(CPU, "bf16") is None


class Layer(nn.Module):
    """Rows of 8 columns through one matrix; the inputs need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, rows_B8: Tensor) -> Tensor:
        out: Tensor = self.linear(rows_B8)
        return out


def test_a_matrix_counts_two_flop_a_weight_forward_and_two_for_its_gradient() -> None:
    assert train_flops(Layer(), torch.zeros(4, 8)) == 2 * (2 * 8 * 16)


def test_two_layers_count_the_gradient_that_passes_through_the_second() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    assert train_flops(model, torch.zeros(4, 8)) == (2 + 3) * (2 * 8 * 16)


def test_a_frozen_layer_has_no_gradient_to_count() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False))
    model[0].requires_grad_(False)
    assert train_flops(model, torch.zeros(4, 8)) == (1 + 2) * (2 * 8 * 16)


class Attention(nn.Module):
    """Self-attention without projections, of a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, tokens_BLD: Tensor) -> Tensor:
        heads = (tokens_BLD + self.shift).unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_attention_counts_though_cpus_fuse_it() -> None:
    length, width = 32, 16
    products = 2 * (2 * length * length * width)
    assert train_flops(Attention(), torch.zeros(3, length, width)) == 3 * products


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def test_a_unet_counts_the_same_for_any_batch_and_with_gradient_checkpointing() -> None:
    unet = _unet()
    inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 5, 16)
    plain = train_flops(_Sample(unet), *inputs)
    assert train_flops(_Sample(unet), *(torch.cat([part] * 3) for part in inputs)) == pytest.approx(plain)
    unet.enable_gradient_checkpointing()
    assert train_flops(_Sample(unet), *inputs) == plain
    assert unet.is_gradient_checkpointing
    # A UNet's backward pass is twice its forward pass, but for the first layer, which passes no gradient on.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _Sample(unet)(*inputs)
    assert plain / counter.get_total_flops() == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize(
    "family, lora", [("attribute-unet", None), *itertools.product(TEXT_FAMILIES, (None, Lora(rank=4)))]
)
def test_shapes_alone_count_what_computing_counts_in_every_family(
    family: str, lora: Lora | None, tmp_path: Path
) -> None:
    if family == "attribute-unet":
        config: Denoiser = AttributeUnet(channels=(8, 16), attention_head_dim=8, condition_dim=16)
        base, told = None, {"features": torch.zeros(1, sum(feature_widths(SCHEMA))), "drop": torch.zeros(1, 4).bool()}
    else:
        base = write_base(family, tmp_path)
        config = section(family, base, lora)
        told = {"tokens": torch.zeros(1, 8, CLIP_WIDTH * (1 if family == "sd" else 2))}
        if family != "sd":
            told["pooled"] = torch.zeros(1, CLIP_WIDTH * (2 if family == "sd3" else 1))
    denoiser = initial_denoiser(config, card_of(config), 0, base)
    inputs = torch.zeros(1, *LATENT_SHAPE), torch.zeros(1, dtype=torch.int64), told
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        denoiser(*inputs).sum().backward()
    assert train_flops(denoiser, *inputs) == counter.get_total_flops() > 0


def test_counting_leaves_weights_gradients_and_devices_as_they_were() -> None:
    model = Layer()
    before = io.BytesIO()
    torch.save(model.state_dict(), before)
    train_flops(model, torch.zeros(4, 8))
    after = io.BytesIO()
    torch.save(model.state_dict(), after)
    assert after.getvalue() == before.getvalue()
    assert model.linear.weight.grad is None
    assert model.linear.weight.device == CPU


class _Sample(nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents_BCHW: Tensor, timesteps_B: Tensor, tokens_BLD: Tensor) -> Tensor:
        out: Tensor = self.unet(latents_BCHW, timesteps_B, tokens_BLD, return_dict=False)[0]
        return out
