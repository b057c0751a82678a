"""Memory of the training state against the closed forms of the ZeRO paper."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from scanloom.training.memory import state_memory

N = 1e9


@pytest.mark.parametrize(
    "stage, per_parameter",
    # Rajbhandari et al. 2020, figure 1: 16, 4 + 12/W, 2 + 14/W, 16/W bytes; and the average, 4/W at every stage.
    [(0, 16 + 4 / 8), (1, 4 + 16 / 8), (2, 2 + 18 / 8), (3, 20 / 8)],
)
def test_full_fine_tuning_in_bf16_takes_what_the_paper_says(stage: Any, per_parameter: float) -> None:
    held = state_memory(N, N, zero_stage=stage, workers=8)
    assert held.device == pytest.approx(per_parameter * N)
    assert held.host == 0


def test_every_stage_takes_less_than_the_one_before() -> None:
    stages: list[Any] = [0, 1, 2, 3]
    held = [state_memory(N, N, zero_stage=stage, workers=4).device for stage in stages]
    assert all(more > less for more, less in itertools.pairwise(held))


def test_offloading_moves_bytes_and_loses_none() -> None:
    on_device = state_memory(N, N, zero_stage=3, workers=4)
    cases: list[Any] = [{"offload_optimizer": True}, {"offload_optimizer": True, "offload_parameters": True}]
    for options in cases:
        moved = state_memory(N, N, zero_stage=3, workers=4, **options)
        assert moved.device + moved.host == pytest.approx(on_device.device)
        assert moved.host > 0


def test_adapters_take_little_beside_the_weights_that_they_adapt() -> None:
    held = state_memory(N, 0.01 * N, zero_stage=0, workers=1)
    assert held.device == pytest.approx(2 * N + 0.01 * N * 18)


def test_float32_without_zero_needs_no_second_copy_of_the_weights() -> None:
    assert state_memory(N, N, zero_stage=0, workers=1, precision="fp32").device == pytest.approx(20 * N)
    assert state_memory(N, N, zero_stage=1, workers=1, precision="fp32").device == pytest.approx(24 * N)
