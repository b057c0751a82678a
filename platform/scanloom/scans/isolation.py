"""Work on one file in a process of its own, for files that take their reader down with them.

A codec written in C can crash, hang or eat the memory on a malformed file, and then takes a whole worker with it.
Reading goes without this fence, which costs time; a unit whose first attempt did not come to its end goes with it,
so that the one file at fault is refused and its neighbours are read.
"""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, cast

from scanloom.errors import ScanloomError
from scanloom.scans.quarantine import reject

PATIENCE_S = 30.0
"""Longest silence of the other process between two results."""
MEMORY_BYTES = 6 << 30
"""Address space of the other process; far above what any file that is read needs."""
_LENGTH = struct.Struct("<Q")
_ITEM, _END, _RAISED = b"i", b"e", b"x"


class Fence:
    """Runs a generator function on one file after the other in another process, which is started anew if it dies.

    `run(read, content, context)` yields what `read(content, context)` yields. Everything must pickle, and `read` must
    be importable by its module and name. To be closed, or used as a context manager.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Fence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, read: Callable[..., Iterator[Any]], *arguments: Any) -> Iterator[Any]:
        """What `read(*arguments)` yields, and whatever it raises.

        A reader that dies, falls silent or fails unforeseen raises ScanError: reader-died, reader-hung, reader-failed.
        """
        process = self._process = self._process or _start(self._patience_s)
        self._send(process, pickle.dumps((read, arguments)))
        whole = False
        try:
            while (answer := self._receive(process))[:1] == _ITEM:
                yield pickle.loads(answer[1:])
            whole = True
        finally:
            if not whole:  # what is still to come must not be taken for the next file's
                self.close()
        if answer[:1] == _RAISED:
            raise pickle.loads(answer[1:])

    def close(self) -> None:
        """End the other process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _send(self, process: subprocess.Popen[bytes], message: bytes) -> None:
        with suppress(BrokenPipeError):  # it died before it read; the answer will say so
            _write(cast(BinaryIO, process.stdin), message)

    def _receive(self, process: subprocess.Popen[bytes]) -> bytes:
        head = self._exactly(process, _LENGTH.size)
        return self._exactly(process, _LENGTH.unpack(head)[0])

    def _exactly(self, process: subprocess.Popen[bytes], length: int) -> bytes:
        stream = cast(BinaryIO, process.stdout).fileno()
        deadline = time.monotonic() + self._patience_s
        pieces, left = [], length
        while left:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise reject("reader-hung")
            piece = os.read(stream, min(left, 1 << 20))
            if not piece:
                self.close()
                raise reject("reader-died")
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def _start(patience_s: float) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "scanloom.scans.isolation", str(2 * patience_s)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
    )


def _write(stream: BinaryIO, message: bytes) -> None:
    view = memoryview(_LENGTH.pack(len(message)) + message)
    while view:
        view = view[stream.write(view) :]


def _serve(requests: BinaryIO, answers: BinaryIO, alarm_s: float) -> None:
    """Answer requests until there are no more.

    The kernel ends this process when an item takes longer than `alarm_s`, also inside a codec and with nobody left on
    the other side to do it.
    """
    while head := requests.read(_LENGTH.size):
        read, arguments = pickle.loads(requests.read(_LENGTH.unpack(head)[0]))
        signal.setitimer(signal.ITIMER_REAL, alarm_s)
        try:
            for item in read(*arguments):
                _write(answers, _ITEM + pickle.dumps(item))
                signal.setitimer(signal.ITIMER_REAL, alarm_s)
        except ScanloomError as error:
            _write(answers, _RAISED + pickle.dumps(error))
        except MemoryError:
            _write(answers, _RAISED + pickle.dumps(reject("reader-died")))
        except Exception:  # noqa: BLE001 - whatever it is, its text may quote the file
            _write(answers, _RAISED + pickle.dumps(reject("reader-failed")))
        else:
            _write(answers, _END)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    # Whatever a library prints must not get between the answers.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with suppress(BrokenPipeError, KeyboardInterrupt):
        _serve(os.fdopen(os.dup(0), "rb"), cast(BinaryIO, answers), float(sys.argv[1]))


if __name__ == "__main__":
    _main()
