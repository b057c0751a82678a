"""What a recipe may ask of training, and what DeepSpeed is told of it."""

from typing import Any

import pytest
from pydantic import ValidationError

from scanloom.recipe import Finetune
from scanloom.training.engine import deepspeed_config, learning_rate_factor


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        ({"objective": "epsilon", "zero_terminal_snr": True}, "set objective: v_prediction"),
        ({"timestep_density": "logit-normal"}, "is for objective: flow"),
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer needs zero_stage"),
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters needs zero_stage 3"),
        ({"workers": [1, 3], "batch_size": 8}, "not a multiple of workers 3"),
        ({"workers": [2, 1]}, "the least comes first"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_the_recipe(keys: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValidationError, match=hint):
        Finetune.model_validate(keys)


def test_a_range_of_workers_is_one_number_or_two() -> None:
    assert Finetune(workers=2).worker_range == (2, 2)
    assert Finetune.model_validate({"workers": [1, 4], "batch_size": 24}).worker_range == (1, 4)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1.0, 1.0), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1)]
)
def test_rates_warm_up_and_then_follow_their_schedule(schedule: Any, middle: float, last: float) -> None:
    recipe = Finetune(steps=110, warmup_steps=10, learning_rate_schedule=schedule)
    assert learning_rate_factor(recipe, 0) == pytest.approx(0.1)
    assert learning_rate_factor(recipe, 9) == pytest.approx(1.0)
    assert learning_rate_factor(recipe, 60) == pytest.approx(middle)
    assert learning_rate_factor(recipe, 110) == pytest.approx(last)


def test_offload_is_told_to_deepspeed() -> None:
    told = deepspeed_config(Finetune(zero_stage=3, offload_optimizer=True, offload_parameters=True), workers=2)
    assert told["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert told["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert "offload_param" not in deepspeed_config(Finetune(), workers=2)["zero_optimization"]


def test_one_worker_divides_nothing_unless_something_is_offloaded() -> None:
    def stage(workers: int, **keys: Any) -> int:
        told: int = deepspeed_config(Finetune(**keys), workers)["zero_optimization"]["stage"]
        return told

    assert stage(1, zero_stage=3) == 0
    assert stage(2, zero_stage=3) == 3
    assert stage(1, zero_stage=2, offload_optimizer=True) == 2
