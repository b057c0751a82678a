"""From Ray Train's controller to the driver's terminal: metrics as they are reported."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayError
from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue

# What fits on a line; the rest is in the journal.
SHOWN = ("step", "loss", "held_out_loss", "images_per_s", "data_wait_share", "mfu", "copy_rate", "psnr_db", "ssim")


class QueueReports(UserCallback):
    """Puts the metrics that worker 0 reports into a queue; runs in the controller."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        """Forward one report; training does not stop because nobody can hear of it."""
        with suppress(RayError):
            self._queue.put({name: metrics[0][name] for name in SHOWN if name in metrics[0]})


@contextmanager
def following(receive: Callable[[dict[str, float]], None]) -> Iterator[Any]:
    """A callback for RunConfig whose reports reach `receive` in this process, until the block ends.

    Any: RunConfig's annotation names Tune's callback class, which Train's own does not derive from.
    """
    queue = Queue()
    actor: Any = queue.actor

    def pump() -> None:
        # Waits without polling: beside workers that hold every core, each look would be time taken from them.
        with suppress(RayError):
            while (report := queue.get()) is not None:
                receive(report)

    thread = threading.Thread(target=pump, name="training-reports", daemon=True)
    thread.start()
    try:
        yield QueueReports(queue)
    finally:
        with suppress(RayError):
            # Nobody waits for a queue that there was never room for.
            actor.put_nowait.remote(None)
        thread.join(timeout=10)
        queue.shutdown()
