"""A training run's folder in the store: checkpoints while it trains, nothing once its artefact is published."""

from __future__ import annotations

from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig

from scanloom.errors import RecipeError
from scanloom.store import Store

# Ray's default is to try for ever, silently, where workers cannot be placed.
CONTROLLER_FAILURES = 3


def run_name(kind: str, plan: str) -> str:
    """A run is resumed by the same plan, on any number of workers."""
    return f"{kind}-{plan[:12]}"


def run_config(runs: Store, name: str, *, max_failures: int, keep_checkpoints: int, reports: Any) -> RunConfig:
    """Ray Train's configuration of a run that goes on from its last checkpoint where one is."""
    # Checkers see the class of Ray Tune, which lacks the second.
    limits: dict[str, Any] = {"max_failures": max_failures, "controller_failure_limit": CONTROLLER_FAILURES}
    return RunConfig(
        name=name,
        storage_path=runs.path(),
        storage_filesystem=runs.filesystem,
        failure_config=FailureConfig(**limits),
        checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
        callbacks=[reports],
    )


def outcome(result: Any) -> dict[str, Any]:
    """What the training function of worker 0 returned.

    Raises RecipeError where that is why the recipe cannot be trained, as `refused`: returned and not raised by the
    worker, because Ray Train would try again what another attempt does not change.
    """
    made: dict[str, Any] = result.return_value or {}
    if refused := made.get("refused"):
        raise RecipeError(refused)
    return made


def forget(runs: Store, name: str) -> None:
    """Delete a run's checkpoints; its artefact is published."""
    runs.delete(f"{name}/{found.key}" for found in runs.at(name).list())
