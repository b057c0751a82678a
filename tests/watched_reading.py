"""Reads files in a process that is watched: one that dies, hangs, swells or raises what it should not is a finding."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from scanloom.attributes import AttributeSchema
from scanloom.errors import ScanError
from scanloom.heap import peak_resident_bytes
from scanloom.recipe import CategoryAttribute, Decode, DicomSource, ImageFolderSource, LabelsAttribute, NumberAttribute
from scanloom.scans.archive import read_archive
from scanloom.scans.burned_in import text_lines
from scanloom.scans.decode import file_image
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.dicom_objects import dicom_scans
from scanloom.scans.fingerprint import fingerprint
from scanloom.scans.glimpse import Glimpse, glimpses
from scanloom.scans.image import ScanImage
from scanloom.scans.quarantine import CODES
from scanloom.scans.resize import fit
from scanloom.scans.scan import Context, Scan, SourceFile
from scanloom.scans.units import Unit
from scanloom.store import Store
from tests.made_dicom import KEY
from tests.made_mutants import Mutant

MOST_SECONDS = 10.0
MOST_BYTES = 2 << 30
# Where the reader is stopped, so that a finding does not take the machine with it.
MOST_WALL_SECONDS = 60.0
_ADDRESS_SPACE = 12 << 30

CONTEXT = Context(
    AttributeSchema(
        declarations=(
            CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
            NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
            LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Mass")),
        )
    ),
    Pseudonyms(KEY.encode()),
    Decode(colour="luminance"),
    seed=3,
    size_px=64,
)


@dataclass(frozen=True)
class Outcome:
    """One file: its refusal codes, or `scan`, by frame; CPU time and peak memory of its process until then."""

    number: int
    origin: str
    codes: tuple[str, ...]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Finding:
    """A file that did what no file may do; `origin` is empty where its process did not live to tell."""

    number: int
    origin: str
    fault: str


def read_watched(numbers: Sequence[int], make: Callable[[int], Mutant]) -> Iterator[Outcome | Finding]:
    """What becomes of each of these files; every number comes out once. `make` must be importable by its name."""
    left = list(numbers)
    while left:
        before = len(left)
        with _Reader(left, make) as reader:
            for result in reader.results():
                yield result
                left = left[left.index(result.number) + 1 :]
        assert len(left) < before, f"the reader ended before it said anything of file {left[0]}"


class _Reader:
    """A process that reads the files in turn; `results` ends with it, or with the first finding that ends it."""

    def __init__(self, numbers: Sequence[int], make: Callable[[int], Mutant]) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawning.Pipe(duplex=False)
        self._process = spawning.Process(target=_read, args=(theirs, list(numbers), make), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def results(self) -> Iterator[Outcome | Finding]:
        while (number := self._received()) is not None:
            result = self._received()
            if isinstance(result, Outcome | Finding):
                yield result
                if isinstance(result, Outcome) and result.peak_bytes > MOST_BYTES:
                    return
                continue
            self._process.join(0.1)
            fault = "hung" if self._process.is_alive() else f"died with exit code {self._process.exitcode}"
            yield Finding(number, "", fault)
            return

    def _received(self) -> Any:
        """What the reader says next; None where it died, fell silent or is done."""
        try:
            return self._pipe.recv() if self._pipe.poll(MOST_WALL_SECONDS) else None
        except EOFError:
            return None


def _read(pipe: Connection, numbers: Sequence[int], make: Callable[[int], Mutant]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    for number in numbers:
        pipe.send(number)
        made = make(number)
        started = time.process_time()
        try:
            codes = tuple(_codes(made))
        except Exception:  # noqa: BLE001 - which is what is looked for
            pipe.send(Finding(number, made.origin, traceback.format_exc()))
            continue
        pipe.send(Outcome(number, made.origin, codes, time.process_time() - started, peak_resident_bytes()))


def _codes(made: Mutant) -> Iterator[str]:
    """What becomes of the file in a corpus; it is looked at as `inspect` does, too."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(made.data)
        looked_at = [glimpse.refused for glimpse in _glimpses(made, folder)]
        assert looked_at
        assert set(looked_at) <= {"", *CODES}
        if made.kind == "dicom":
            yield from _dicom_codes(made.data)
        elif made.kind == "image":
            yield _image_code(made.data)
        else:
            yield from _archive_codes(Store(folder), len(made.data))


def _glimpses(made: Mutant, folder: str) -> Iterator[Glimpse]:
    source = ImageFolderSource(uri=folder, table="none") if made.kind == "image" else DicomSource(uri=folder)
    file = SourceFile("file", len(made.data), alone=made.kind == "archive")
    return glimpses(source, Unit(index=0, files=(file,)), CONTEXT)


def _dicom_codes(data: bytes) -> Iterator[str]:
    found = 0
    for _, result in dicom_scans(data, CONTEXT):
        yield _code(result.image if isinstance(result, Scan) else result)
        found += 1
    assert found, "a file that gives neither scan nor reason"


def _image_code(data: bytes) -> str:
    try:
        return _code(file_image(data, CONTEXT.decode))
    except ScanError as error:
        return _code(error)


def _archive_codes(store: Store, size: int) -> Iterator[str]:
    for _, content in read_archive(store, "file", size):
        yield from [_code(content)] if isinstance(content, ScanError) else _dicom_codes(content)


def _code(result: ScanImage | ScanError) -> str:
    if isinstance(result, ScanError):
        assert result.code in CODES
        return result.code
    assert len(text_lines(result.pixels)) >= 0
    fitted = fit(result, 64, "letterbox")
    assert fitted.pixels.shape == (64, 64)
    assert len(fingerprint(fitted.pixels)) == 32
    assert fitted.pixels.dtype in ("uint8", "uint16")
    return "scan"
