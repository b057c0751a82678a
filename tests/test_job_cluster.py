"""How every job starts and how it is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs.cluster import interruptible

ROOT = Path(__file__).resolve().parents[1]

# Stands for Ray Train's fit: in the main thread it would take Ctrl-C for itself and wait on.
STUBBORN = """
import signal, sys, threading
from jobs.cluster import interruptible
def fit():
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: threading.Event().wait())
    print("working", flush=True)
    threading.Event().wait()
try:
    interruptible(fit)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_interruptible_work_gives_its_result_and_its_error() -> None:
    assert interruptible(lambda: 7) == 7
    with pytest.raises(ValueError, match="in the thread"):
        interruptible(lambda: int("in the thread"))


def test_interruptible_work_does_not_run_where_ray_train_would_take_the_interrupt() -> None:
    assert interruptible(threading.current_thread) is not threading.main_thread()


def test_one_interrupt_ends_work_that_would_wait_without_end() -> None:
    job = subprocess.Popen([sys.executable, "-c", STUBBORN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "working\n"
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=60) == 130
    finally:
        job.kill()
        job.wait()
