"""What is in a source, before anything is made of it: each unit gives a small survey, and surveys add up.

A survey holds counts and the texts of attributes that are not named in the schema; what of these may be shown
decides scans.survey_report. Its size does not grow with the source: patients are counted by `Distinct`, different texts
up to MOST_TEXTS an attribute. Patients, studies and instances are known by pseudonyms under a key that is made for
one survey and then forgotten.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from scanloom.attributes import NO_LABEL, Attributes, AttributeSchema, Value
from scanloom.errors import ScanError
from scanloom.recipe import (
    CategoryAttribute,
    Decode,
    DicomSource,
    DicomWebSource,
    ImageFolderSource,
    NumberAttribute,
    Source,
)
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.dicom_objects import dicom_scans
from scanloom.scans.distinct import Distinct, Seen
from scanloom.scans.glimpse import OTHER, Glimpse, glimpses, is_header_enough, whole_files
from scanloom.scans.image import Pixels
from scanloom.scans.isolation import Fence
from scanloom.scans.resize import fit
from scanloom.scans.scan import Context, Found, Scan
from scanloom.scans.sources import read_unit
from scanloom.scans.units import Unit

MOST_TEXTS = 4096
"""Different texts of one attribute, or pixel sizes, that are told apart; the rest counts as `other`."""
UNKNOWN = "unknown"
PICTURE_PX = 192

K = TypeVar("K", str, tuple[str, str, str])
V = TypeVar("V")
Cell = tuple[str, str, str]
"""Finding, sex and age band; empty where the schema has no such attribute."""


@dataclass(frozen=True)
class Look:
    """How a source is looked at, the same on every worker.

    `most_files` bounds the files that are read of an archive, too; `pixels` also decodes every scan.
    """

    source: Source
    schema: AttributeSchema
    decode: Decode
    key: bytes
    seed: int = 0
    most_files: int | None = None
    pixels: bool = False
    examples: int = 24

    def context(self, fence: Fence | None = None) -> Context:
        return Context(self.schema, Pseudonyms(self.key), self.decode, self.seed, PICTURE_PX, fence)


class Example(NamedTuple):
    """Where a scan lies that may be shown; ordered by pseudonyms, that is by lot."""

    patient: str
    instance: str
    unit: int
    member: int
    frame: int | None


class Extent(NamedTuple):
    """Smallest and largest image: rows, columns."""

    smallest: tuple[int, int]
    largest: tuple[int, int]


@dataclass(frozen=True)
class Survey:
    """Counts of one unit or of many. Scans are what a corpus would take as far as it was looked at.

    `objects` are all files and rows, `refused` are those without scans by code, `terms` counts objects by topic.
    Of scans by attribute: `values` (numbers as text of three digits), `missing`, `withheld` texts.
    """

    units: int = 0
    bytes: int = 0
    objects: int = 0
    scans: int = 0
    subjects: int = 0
    """Headers that a corpus would take, `instances` of them different: of objects, or of frames that were decoded."""
    terms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    extent: Extent | None = None
    refused: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Seen]] = field(default_factory=dict)
    missing: Mapping[str, int] = field(default_factory=dict)
    withheld: Mapping[str, Mapping[str, Seen]] = field(default_factory=dict)
    cells: Mapping[Cell, Seen] = field(default_factory=dict)
    patients: Distinct = field(default_factory=Distinct)
    studies: Distinct = field(default_factory=Distinct)
    instances: Distinct = field(default_factory=Distinct)
    examples: tuple[Example, ...] = ()


def survey_unit(unit: Unit, look: Look) -> Survey:
    """What one unit holds. Raises StoreError where the source cannot be read."""
    tally = _Tally(look.schema)
    headers = is_header_enough(look.source)
    with ExitStack() as stack:
        fence = stack.enter_context(Fence()) if look.pixels or not headers else None
        context = look.context(fence)
        for glimpse in itertools.islice(glimpses(look.source, unit, context), look.most_files):
            tally.add(glimpse, unit)
        if look.pixels and headers:
            tally.replace_refusals(_decoded(unit, look, context))
    return tally.survey(unit, look.examples)


def survey_units(rows: Mapping[str, Sequence[str]], look: Look) -> dict[str, list[Any]]:
    """The survey (pickled) of the units in `rows["unit"]` (JSON), and how many they were: one row."""
    units = [Unit.model_validate_json(unit) for unit in rows["unit"]]
    whole = merged((survey_unit(unit, look) for unit in units), look.examples)
    return {"survey": [pickle.dumps(whole)], "units": [len(units)]}


def merged(surveys: Iterable[Survey], examples: int) -> Survey:
    """The sum, with so many examples."""
    whole = Survey()
    for survey in surveys:
        whole = Survey(
            units=whole.units + survey.units,
            bytes=whole.bytes + survey.bytes,
            objects=whole.objects + survey.objects,
            scans=whole.scans + survey.scans,
            subjects=whole.subjects + survey.subjects,
            terms=_each(whole.terms, survey.terms, _added),
            extent=_wider(whole.extent, survey.extent),
            refused=_added(whole.refused, survey.refused),
            values=_each(whole.values, survey.values, _joined),
            missing=_added(whole.missing, survey.missing),
            withheld=_each(whole.withheld, survey.withheld, _joined),
            cells=_joined(whole.cells, survey.cells),
            patients=whole.patients | survey.patients,
            studies=whole.studies | survey.studies,
            instances=whole.instances | survey.instances,
            examples=drawn((*whole.examples, *survey.examples), examples),
        )
    return whole


def axes(schema: AttributeSchema) -> tuple[str, str, str]:
    """The attributes of the joint table: finding (labels, else a category), sex and age; empty where there is none."""
    categories = [d.name for d in schema.declarations if isinstance(d, CategoryAttribute)]
    labels = [d.name for d in schema.declarations if d.kind == "labels"]
    ages = [d.name for d in schema.declarations if isinstance(d, NumberAttribute) and d.unit == "years"]
    sex = next((name for name in categories if name in ("sex", "gender")), "")
    finding = next(iter(labels), next((name for name in categories if name != sex), ""))
    return finding, sex, next(iter(ages), "")


def band(years: float, cap: float | None) -> str:
    """The decade of an age; from the cap on all ages are one band."""
    if cap is not None and years >= cap:
        return f"{cap:g}+"
    low = 10 * math.floor(years / 10)
    return f"{low}-{low + 9}"


def drawn(examples: Iterable[Example], most: int) -> tuple[Example, ...]:
    """So many scans by lot: of different patients as far as there are so many, then others."""
    by_patient: list[Example] = []
    others: list[Example] = []
    for example in sorted(examples):
        again = by_patient and by_patient[-1].patient == example.patient
        (others if again else by_patient).append(example)
    # Even lots for the rest: each scan's own pseudonym, not its patient's.
    others.sort(key=lambda example: example.instance)
    return (*by_patient[:most], *others[:most])


# --- one unit -------------------------------------------------------------------------------------------------


class _Tally:
    """The counts of a unit while they grow."""

    def __init__(self, schema: AttributeSchema) -> None:
        self._schema, self._axes = schema, axes(schema)
        self._caps = {d.name: d.cap for d in schema.declarations if isinstance(d, NumberAttribute)}
        self._objects: set[int] = set()
        self._subjects = self._scans = 0
        self._terms: dict[str, Counter[str]] = {}
        self._extent: Extent | None = None
        self._refused: Counter[str] = Counter()
        self._values: dict[str, dict[str, Seen]] = {name: {} for name in schema.names}
        self._missing: Counter[str] = Counter()
        self._withheld: dict[str, dict[str, Seen]] = {}
        self._cells: dict[Cell, Seen] = {}
        self._pseudonyms: tuple[set[str], set[str], set[str]] = (set(), set(), set())
        self._examples: list[Example] = []

    def add(self, glimpse: Glimpse, unit: Unit) -> None:
        self._objects.add(glimpse.member)
        for topic, term in glimpse.terms.items():
            self._terms.setdefault(topic, Counter())[term] += 1
        if glimpse.shape is not None:
            self._extent = _wider(self._extent, Extent(glimpse.shape, glimpse.shape))
            rows, columns = glimpse.shape
            self._terms.setdefault("rows x columns", Counter())[f"{rows} x {columns}"] += 1
        if glimpse.subject is None:
            self._refused[glimpse.refused] += 1
            return
        self._subjects += 1
        self._scans += glimpse.frames
        subject = glimpse.subject
        for seen, name in zip(self._pseudonyms, (subject.patient, subject.study, subject.id), strict=True):
            seen.add(name)
        self._add_attributes(subject.patient, subject.attributes, glimpse)
        frame = glimpse.frames // 2 if glimpse.frames > 1 else glimpse.frame
        self._examples.append(Example(subject.patient, subject.id, unit.index, glimpse.member, frame))

    def _add_attributes(self, patient: str, attributes: Attributes, glimpse: Glimpse) -> None:
        for name, value in attributes.items():
            if value is None and name not in glimpse.withheld:
                self._missing[name] += glimpse.frames
            for text in _texts(value):
                _see(self._values[name], text, patient, glimpse.frames)
        for name, texts in glimpse.withheld.items():
            for text in texts:
                _see(self._withheld.setdefault(name, {}), text, patient, glimpse.frames)
        for cell in self._cells_of(attributes):
            self._cells[cell] = self._cells.get(cell, Seen()).of(patient, glimpse.frames)

    def _cells_of(self, attributes: Attributes) -> Iterator[Cell]:
        finding, sex, age = self._axes
        years = attributes.get(age)
        sexes = str(attributes[sex] or UNKNOWN) if sex else ""
        bands = (band(years, self._caps[age]) if isinstance(years, float) else UNKNOWN) if age else ""
        for text in (_texts(attributes[finding]) or (UNKNOWN,)) if finding else ("",):
            yield text, sexes, bands

    def replace_refusals(self, found: Iterable[Found]) -> None:
        """Count again what is refused and accepted, now that every pixel was decoded."""
        self._scans, self._refused = 0, Counter()
        for _, _, scan in found:
            if isinstance(scan, Scan):
                self._scans += 1
            else:
                self._refused[scan.code] += 1

    def survey(self, unit: Unit, examples: int) -> Survey:
        patients, studies, instances = map(Distinct.of, self._pseudonyms)
        return Survey(
            units=1,
            bytes=sum(file.bytes for file in unit.files),
            objects=len(self._objects),
            scans=self._scans,
            subjects=self._subjects,
            terms={topic: _added({}, counts) for topic, counts in self._terms.items()},
            extent=self._extent,
            refused=self._refused,
            values=self._values,
            missing=self._missing,
            withheld=self._withheld,
            cells=self._cells,
            patients=patients,
            studies=studies,
            instances=instances,
            examples=drawn(self._examples, examples),
        )


def _texts(value: Value) -> tuple[str, ...]:
    """The value as texts that can be counted; none where it is unknown."""
    if isinstance(value, tuple):
        return value or (NO_LABEL,)
    if isinstance(value, float):
        return (f"{value:.3g}",)
    return (value,) if isinstance(value, str) else ()


def _see(counts: dict[str, Seen], text: str, patient: str, scans: int) -> None:
    known = text if text in counts or len(counts) < MOST_TEXTS else OTHER
    counts[known] = counts.get(known, Seen()).of(patient, scans)


def _decoded(unit: Unit, look: Look, context: Context) -> Iterator[Found]:
    most = look.most_files
    return itertools.takewhile(lambda found: most is None or found[0] < most, read_unit(look.source, unit, context))


# --- sums -----------------------------------------------------------------------------------------------------


def _added(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    """The sum by key; beyond MOST_TEXTS keys the rare ones are one."""
    total = Counter(counts) + Counter(more)
    kept = dict(total.most_common(MOST_TEXTS))
    rest = total.total() - sum(kept.values())
    return kept | ({OTHER: kept.get(OTHER, 0) + rest} if rest else {})


def _joined(seen: Mapping[K, Seen], more: Mapping[K, Seen]) -> dict[K, Seen]:
    total = dict(seen)
    for key, other in more.items():
        total[key] = total[key].joined(other) if key in total else other
    if len(total) <= MOST_TEXTS:
        return total
    return dict(sorted(total.items(), key=lambda item: -item[1].scans)[:MOST_TEXTS])


def _each(
    groups: Mapping[str, Mapping[str, V]],
    more: Mapping[str, Mapping[str, V]],
    add: Callable[[Mapping[str, V], Mapping[str, V]], dict[str, V]],
) -> dict[str, dict[str, V]]:
    return {name: add(groups.get(name, {}), more.get(name, {})) for name in {**groups, **more}}


def _wider(extent: Extent | None, other: Extent | None) -> Extent | None:
    if extent is None or other is None:
        return extent or other
    return Extent(_of_each(min, extent.smallest, other.smallest), _of_each(max, extent.largest, other.largest))


def _of_each(choose: Callable[[int, int], int], one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return choose(one[0], other[0]), choose(one[1], other[1])


# --- examples -------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A square of PICTURE_PX and what a corpus would know of the scan."""

    example: Example
    pixels: Pixels
    attributes: Attributes


def pictures(unit: Unit, examples: Sequence[Example], look: Look) -> list[Picture]:
    """The pictures of those examples of the unit that can be decoded. Raises StoreError as reading does."""
    with Fence() as fence:
        return [
            Picture(example, fit(found.image, PICTURE_PX, "letterbox").pixels, found.subject.attributes)
            for example, found in _found(unit, examples, look, look.context(fence))
            if isinstance(found, Scan)
        ]


def picture_units(row: Mapping[str, Any], look: Look) -> dict[str, Any]:
    """The pictures (pickled) of the examples in `row["examples"]` (pickled) of the unit in `row["unit"]` (JSON)."""
    unit = Unit.model_validate_json(row["unit"])
    return {"pictures": pickle.dumps(pictures(unit, pickle.loads(row["examples"]), look))}


def _found(
    unit: Unit, examples: Sequence[Example], look: Look, context: Context
) -> Iterator[tuple[Example, Scan | ScanError]]:
    wanted = {(example.member, example.frame): example for example in examples}
    for member, frame, found in _frames_of(unit, {member for member, _ in wanted}, look.source, context):
        example = wanted.pop((member, frame), None)
        if example is not None:
            yield example, found
        if not wanted:
            return


def _frames_of(unit: Unit, members: set[int], source: Source, context: Context) -> Iterator[Found]:
    """All frames of these members; as few others as the source allows are read."""
    if isinstance(source, DicomSource | DicomWebSource) and unit.files[0].alone:
        for member, content in whole_files(source, unit.files[0], members):
            if isinstance(content, bytes):
                yield from ((member, frame, scan) for frame, scan in dicom_scans(content, context))
    elif isinstance(source, DicomSource | ImageFolderSource):
        for member in sorted(members):
            one = Unit(index=unit.index, files=(unit.files[member],))
            yield from ((member, frame, scan) for _, frame, scan in read_unit(source, one, context))
    else:
        yield from read_unit(source, unit, context)
