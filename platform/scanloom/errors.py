"""What can go wrong, named by what the caller does about it.

ScanloomError
├── RecipeError      the recipe or the command line is wrong: fix the file
│   └── DeadlineTooShort  no engine of this kind is fast enough for it, however idle
├── ScanError        one input scan is unusable: a quarantine row, never a dead job
├── StoreError       the object store refused or failed; `retryable` says whether trying again can help
├── ArtefactError    an artefact is missing, damaged, or does not fit this recipe or this code
├── BusyError        a service has no room for this now, or not in time: ask again after `retry_after_s`
│   └── DeadlineError  not by the time that was asked for
├── QualityError     no attempt at an image passed the quality checks; the same order ends the same way
└── ReleaseRefused   a gate's value is over its limit
"""

from __future__ import annotations


class ScanloomError(Exception):
    """Root of every error that scanloom raises on purpose; its text is one line meant for the user."""


class RecipeError(ScanloomError):
    """The recipe, an override or an argument is wrong; nothing was started."""


class DeadlineTooShort(RecipeError):
    """What was asked for takes longer than its `deadline_s` leaves, even with an engine to itself."""


class ScanError(ScanloomError):
    """One scan cannot be used.

    `code` is one of the documented quarantine codes (kebab-case), `tag` the DICOM keyword or column at fault
    (empty when it is the file as a whole), `reason` a sentence without any value taken from the scan.
    """

    def __init__(self, code: str, tag: str, reason: str) -> None:
        super().__init__(code, tag, reason)
        self.code = code
        self.tag = tag
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}" + (f" ({self.tag})" if self.tag else "")


class StoreError(ScanloomError):
    """The store refused or failed."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable

    def __reduce__(self) -> tuple[object, ...]:
        return (_store_error, (str(self), self.retryable))


def _store_error(message: str, retryable: bool) -> StoreError:
    return StoreError(message, retryable=retryable)


class ArtefactError(ScanloomError):
    """An artefact is missing, damaged, or does not fit the recipe or the code that reads it."""


class ReleaseRefused(ScanloomError):
    """A gate refused; the message names gate, value and limit."""


class BusyError(ScanloomError):
    """A service refuses work that it could do at another time; `retry_after_s` says when asking again may help."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.retry_after_s))


class DeadlineError(BusyError):
    """What was asked for cannot be there by its deadline, as things stand; with a later one it may."""


class QualityError(ScanloomError):
    """None of the attempts at an image is one that would enter a dataset; another seed or other attributes may do."""
