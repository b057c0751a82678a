"""Where the log lines of the service's processes go: to standard error, which Ray keeps in a file of each process."""

from __future__ import annotations

import logging
import sys

AS_THEY_ARE = ("scanloom.access", "scanloom.audit")
"""Loggers whose lines are JSON already."""


def log_to_stderr() -> None:
    """One line an event of scanloom's loggers, from INFO on; to say so again changes nothing."""
    ours = logging.getLogger("scanloom")
    ours.setLevel(logging.INFO)
    if not any(isinstance(handler.formatter, _Lines) for handler in ours.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Lines("%(asctime)s %(name)s %(message)s"))
        ours.addHandler(handler)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name in AS_THEY_ARE else super().format(record)
