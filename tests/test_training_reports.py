"""training.reports: metrics on their way from Ray Train's controller to the driver."""

from __future__ import annotations

import ray

from scanloom.training.reports import following


def test_all_that_was_reported_is_received_before_the_block_ends(ray_cluster: None) -> None:
    received: list[dict[str, float]] = []
    with following(received.append) as reports:
        for step in range(3):
            # What the controller calls; of several workers' metrics the first one's count.
            reports.after_report(None, [{"step": step, "loss": 0.5, "secret": 1}, {"step": -1}], None)
    assert received == [{"step": step, "loss": 0.5} for step in range(3)]


def test_a_run_ends_though_nobody_hears_of_its_reports(ray_cluster: None) -> None:
    received: list[dict[str, float]] = []
    with following(received.append) as reports:
        ray.kill(reports._queue.actor)
        reports.after_report(None, [{"step": 1}], None)
    assert received == []
