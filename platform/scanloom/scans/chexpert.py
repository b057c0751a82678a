"""CheXpert's table (train.csv, valid.csv), read for a schema that is written for DICOM keywords.

One column a finding: 1.0 says present, 0.0 absent, -1.0 uncertain, and blank that the report does not mention it, which
counts as absent. Irvin et al. 2019, "CheXpert: A Large Chest Radiograph Dataset with Uncertainty Labels and Expert
Comparison".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError
from scanloom.recipe import AttributeDeclaration, LabelsAttribute, nearest
from scanloom.scans.scan import TableRow
from scanloom.scans.table import Cells, Header, RowParser

PATH_PARTS = 3
"""patient00001/study1/view1_frontal.jpg names an image, whatever folders the path begins with."""
FINDINGS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip

Uncertain = Literal["absent", "present", "unknown"]
_TextOf = Callable[[Cells], str]

_KEYWORDS = {"sex": "PatientSex", "age": "PatientAge", "view": "ViewPosition", "findings": "ImageComments"}
_SEXES = {"Female": "F", "Male": "M"}
_MARKS = {"1.0": 1, "1": 1, "0.0": 0, "0": 0, "": 0, "-1.0": -1, "-1": -1}
# What NIH ChestX-ray14 calls the finding.
_ALSO_CALLED = {"effusion": "Pleural Effusion"}


def chexpert_rows(header: Header, schema: AttributeSchema, uncertain: Uncertain) -> RowParser:
    """The parser of CheXpert's rows; patient and study come from the path.

    PatientSex reads F or M, ViewPosition AP, PA, LL, RL, or LATERAL where a lateral image has none of these, and
    ImageComments the findings that the schema declares. Any other source is the column of that name, as it is.

    Raises RecipeError for a column that the table lacks, or a finding that CheXpert does not have.
    """
    path = header.place("Path")
    readers = _readers(header, schema, uncertain)
    seen: dict[tuple[str, ...], Mapping[str, str]] = {}

    def parse(cells: Cells) -> TableRow:
        found = tuple(read(cells) for read in readers.values())
        parts = cells[path].split("/")
        return TableRow(
            file="/".join(parts[-PATH_PARTS:]),
            patient=_part(parts, r"patient\w+"),
            study=_part(parts, r"study\w+"),
            texts=seen.setdefault(found, dict(zip(readers, found, strict=True))),
        )

    return parse


def _part(parts: list[str], pattern: str) -> str:
    return next((part for part in parts if re.fullmatch(pattern, part)), "")


def _readers(header: Header, schema: AttributeSchema, uncertain: Uncertain) -> dict[str, _TextOf]:
    """What reads each attribute source of the schema."""
    readers: dict[str, _TextOf] = {}
    for declaration in schema.declarations:
        source = declaration.source or declaration.name
        if source == "Path":
            raise RecipeError(f"attribute {declaration.name!r}: the path names the patient, so it is not kept")
        keyword = _KEYWORDS.get(source, source)
        if keyword == "ImageComments" and source in readers:
            raise RecipeError(f"attribute {declaration.name!r}: another attribute reads CheXpert's findings already")
        readers[source] = _reader(keyword, header, declaration, uncertain)
    return readers


def _reader(keyword: str, header: Header, declaration: AttributeDeclaration, uncertain: Uncertain) -> _TextOf:
    if keyword == "PatientSex":
        return _sex(header.place("Sex"))
    if keyword == "ViewPosition":
        return _view(header.place("AP/PA"), header.place("Frontal/Lateral"))
    if keyword == "ImageComments":
        return _findings(header, declaration, uncertain)
    place = header.place("Age" if keyword == "PatientAge" else keyword)
    return lambda cells: cells[place]


def _sex(place: int) -> _TextOf:
    return lambda cells: _SEXES.get(cells[place], "")


def _view(projection: int, side: int) -> _TextOf:
    return lambda cells: cells[projection] or ("LATERAL" if cells[side] == "Lateral" else "")


def _findings(header: Header, declaration: AttributeDeclaration, uncertain: Uncertain) -> _TextOf:
    if not isinstance(declaration, LabelsAttribute):
        raise RecipeError(f"attribute {declaration.name!r}: CheXpert's findings need kind: labels")
    places = {value: header.place(_finding(value, declaration.name)) for value in declaration.values}
    every = [header.place(name) for name in FINDINGS if name in header]

    def compose(cells: Cells) -> str:
        marks = {value: _MARKS.get(cells[place]) for value, place in places.items()}
        unsaid = not any(cells[place] for place in every)
        if unsaid or None in marks.values() or (uncertain == "unknown" and -1 in marks.values()):
            return ""
        counted = (1, -1) if uncertain == "present" else (1,)
        return declaration.separator.join(v for v, mark in marks.items() if mark in counted) or declaration.none

    return compose


def _finding(value: str, attribute: str) -> str:
    """CheXpert's name of a declared label: the same but for case and underscores, or NIH's name of it."""
    plain = value.replace("_", " ").casefold()
    for name in FINDINGS:
        if plain in (name.casefold(), name.replace(" ", "").casefold()):
            return name
    if plain in _ALSO_CALLED:
        return _ALSO_CALLED[plain]
    raise RecipeError(f"attribute {attribute!r}: CheXpert has no finding {value!r}{nearest(value, FINDINGS)}")
