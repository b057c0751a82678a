"""What lies at a URI: which kind of source, where its table is, and attributes to begin with.

Files are recognised by their content, a few of them spread over the listing. Of a table the columns are profiled
(scans.table_profile), and those that look like attributes are declared.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError
from scanloom.recipe import (
    RESERVED_COLUMNS,
    AttributeDeclaration,
    CategoryAttribute,
    Decode,
    DicomSource,
    DicomWebSource,
    ImageFolderSource,
    LabelsAttribute,
    NiftiSource,
    NumberAttribute,
    ParquetSource,
    Source,
)
from scanloom.scans import chexpert
from scanloom.scans.archive import is_packed
from scanloom.scans.image_parquet import cell_text, class_names
from scanloom.scans.ranged import RangedFile
from scanloom.scans.scan import TableRow
from scanloom.scans.table import Cells, Header, read_rows
from scanloom.scans.table_profile import MOST_ROWS, Column, ColumnTally
from scanloom.store import ObjectInfo, Store
from scanloom.stored_recipe import recipe_at

SAMPLES = 48
"""Objects whose first bytes are looked at."""
_HEAD_BYTES = 512
_GZIP = b"\x1f\x8b"
_HTTP = ("http://", "https://")
_MOST_TABLES = 8
_MOST_ATTRIBUTES = 12

_IMAGE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*")
_KINDS: Mapping[str, str] = {
    "dicom": "DICOM objects",
    "archive": "archives",
    "image": "PNG, JPEG or TIFF images",
    "parquet": "Parquet files",
    "nifti": "NIfTI volumes",
}

NIH_FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
)  # fmt: skip
_VIEWS = ("PA", "AP", "LL", "RL", "LATERAL", "RLD", "LLD", "RLO", "LLO", "CC", "MLO", "ML", "LM", "XCCL", "AXIAL")
# Of PS3.16 Annex L, what exports are full of.
_BODY_PARTS = (
    "CHEST", "ABDOMEN", "HEAD", "SKULL", "BRAIN", "NECK", "SPINE", "CSPINE", "TSPINE", "LSPINE", "PELVIS", "HIP",
    "BREAST", "SHOULDER", "ELBOW", "HAND", "WRIST", "FINGER", "KNEE", "ANKLE", "FOOT", "LEG", "ARM", "EXTREMITY",
    "HEART", "LIVER", "KIDNEY", "PROSTATE", "UTERUS", "THYROID", "WHOLEBODY",
)  # fmt: skip
_MODALITIES = ("CR", "DX", "CT", "MR", "MG", "US", "XA", "RF", "PT", "NM", "OT", "OP", "OCT", "ES", "XC")

# How tables name their columns, without case and signs; the first that a table has.
_PATIENTS = ("patientid", "patient", "subjectid", "subject", "personid", "pid", "mrn", "patientkey", "patientnumber")
_STUDIES = ("studyid", "study", "studyinstanceuid", "accessionnumber", "examid", "exam", "followup")
_SEXES = {"f": "F", "female": "F", "woman": "F", "m": "M", "male": "M", "man": "M", "o": "O", "other": "O"}
_NO_FINDING = re.compile(r"no ?findings?|none|normal|negative", re.IGNORECASE)
_WORDS: Mapping[str, str] = {"gender": "sex", "sex": "sex", "age": "age", "view": "view", "finding": "findings",
                             "findings": "findings", "labels": "findings", "diagnosis": "findings"}  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """A source, attributes to look for in it, its table's columns, and what was assumed, a sentence each."""

    source: Source
    schema: AttributeSchema
    columns: tuple[Column, ...] = ()
    remarks: tuple[str, ...] = ()
    decode: Decode = Decode()  # noqa: RUF009 - it is frozen
    seed: int = 0


def is_recipe(place: str) -> bool:
    """Whether a source is given as the recipe that names it."""
    return place.lower().endswith((".yaml", ".yml"))


def recognise(place: str, overrides: Sequence[str] = ()) -> Recognised:
    """What a recipe file (with overrides) names as its source, or else what lies at a URI.

    Raises RecipeError for a faulty recipe or one without a prepare section, and overrides without a recipe; and what
    `recognise_uri` raises.
    """
    if not is_recipe(place):
        if overrides:
            raise RecipeError("--set changes a recipe, and this source is none")
        return recognise_uri(place)
    recipe = recipe_at(place, overrides)
    if recipe.prepare is None:
        raise RecipeError(f"recipe {recipe.name}: has no 'prepare' section; it says where the scans are")
    source = recipe.prepare.source
    given = {name: str(getattr(source, name, "")) for name in ("uri", "table")}
    # The same place for workers in other folders.
    places = {name: Store(uri).uri for name, uri in given.items() if uri and not uri.startswith(_HTTP)}
    schema = AttributeSchema(declarations=recipe.attributes)
    return Recognised(source.model_copy(update=places), schema, decode=recipe.prepare.decode, seed=recipe.seed)


def recognise_uri(uri: str) -> Recognised:
    """The source at a folder, `s3://bucket/prefix` or the root of a DICOMweb service.

    Raises RecipeError where nothing is there that is read, or images or volumes without a table of them; StoreError
    where the store does not answer.
    """
    if uri.startswith(_HTTP):
        return Recognised(DicomWebSource(uri=uri), dicom_schema())
    store = Store(uri)
    objects = store.list()
    if not objects:
        hint = "it is a file; give its folder" if store.is_local and Path(store.uri).is_file() else "check the URI"
        raise RecipeError(f"{store.uri}: no objects under this prefix; {hint}")
    kinds = Counter(content_kind(store.read_range(o.key, 0, min(o.bytes, _HEAD_BYTES))) for o in _spread(objects))
    known = {kind: count for kind, count in kinds.items() if kind}
    if not known:
        raise RecipeError(f"{store.uri}: holds none of what is read: {', '.join(_KINDS.values())}")
    match max(known, key=lambda kind: known[kind]):
        case "image":
            return _image_folder(store, objects)
        case "nifti":
            return _volumes(store, objects)
        case "parquet":
            return _parquet(store, objects)
        case _:
            return Recognised(DicomSource(uri=store.uri), dicom_schema())


def content_kind(head: bytes) -> str:
    """dicom, archive, image, parquet, nifti or empty, by the first 512 bytes of a file."""
    if head[128:132] == b"DICM" or (head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0"):
        return "dicom"
    if _is_nifti(head) or (head.startswith(_GZIP) and _is_nifti(_inflated(head))):
        return "nifti"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(_IMAGE_STARTS):
        return "image"
    return "archive" if is_packed(head) else ""


def _is_nifti(head: bytes) -> bool:
    return head[344:348] == b"n+1\0" or head[4:8] == b"n+2\0"


def _inflated(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(wbits=31).decompress(head, _HEAD_BYTES)
    except zlib.error:
        return b""


def dicom_schema() -> AttributeSchema:
    """Attributes that headers of any modality may give, and findings where ImageComments has NIH ChestX-ray14's."""
    return AttributeSchema(
        declarations=(
            CategoryAttribute(name="sex", source="PatientSex", values=("F", "M", "O")),
            _age("PatientAge"),
            CategoryAttribute(name="modality", source="Modality", values=_MODALITIES),
            CategoryAttribute(name="body_part", source="BodyPartExamined", values=_BODY_PARTS),
            CategoryAttribute(name="view", source="ViewPosition", values=_VIEWS),
            CategoryAttribute(name="laterality", source="ImageLaterality", values=("L", "R", "B", "U")),
            LabelsAttribute(name="findings", source="ImageComments", values=NIH_FINDINGS),
        )
    )


def _age(source: str) -> NumberAttribute:
    # The few who are older could be recognised by their age alone.
    return NumberAttribute(name="age", source=source, unit="years", minimum=0, maximum=90, cap=90)


def _spread(objects: Sequence[ObjectInfo]) -> Iterator[ObjectInfo]:
    """At most SAMPLES objects, evenly spread, tables and empty ones left out."""
    some = [o for o in objects if o.bytes and not _is_table(o)]
    step = max(1, len(some) // SAMPLES)
    return iter(some[::step][:SAMPLES])


def _is_table(object_: ObjectInfo) -> bool:
    return object_.key.lower().endswith(".csv")


# --- images and volumes with a table --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    uri: str
    header: Header
    columns: tuple[Column, ...]
    file: str
    matched: int

    @property
    def patient(self) -> str:
        return _named(self.header.names, _PATIENTS)

    @property
    def study(self) -> str:
        return _named(self.header.names, _STUDIES)

    def schema(self) -> AttributeSchema:
        return _declared(self.columns, {self.file, self.patient, self.study})

    def remarks(self) -> tuple[str, ...]:
        if self.patient:
            return ()
        return (
            f"no column of the table seems to name the patient: {self.file!r} stands for it, so that every file counts "
            "as a patient; set patient_column, or scans of one person come into several splits",
        )


def _image_folder(store: Store, objects: Sequence[ObjectInfo]) -> Recognised:
    table = _table(store, objects)
    names = table.header.names
    if {"Image Index", "Patient ID", "Finding Labels"} <= set(names):
        source = ImageFolderSource(uri=store.uri, table=table.uri, preset="nih-cxr14")
        return Recognised(source, _chest_schema(NIH_FINDINGS), table.columns)
    if {"Path", "Sex", "Age", "Frontal/Lateral"} <= set(names):
        source = ImageFolderSource(uri=store.uri, table=table.uri, preset="chexpert")
        findings = tuple(name for name in chexpert.FINDINGS[1:] if name in names)
        return Recognised(source, _chest_schema(findings), table.columns)
    patient = table.patient or table.file
    source = ImageFolderSource(
        uri=store.uri, table=table.uri, file_column=table.file, patient_column=patient, study_column=table.study
    )
    return Recognised(source, table.schema(), table.columns, table.remarks())


def _volumes(store: Store, objects: Sequence[ObjectInfo]) -> Recognised:
    table = _table(store, objects)
    patient = table.patient or table.file
    source = NiftiSource(
        uri=store.uri, table=table.uri, file_column=table.file, patient_column=patient, study_column=table.study
    )
    return Recognised(source, table.schema(), table.columns, table.remarks())


def _chest_schema(findings: tuple[str, ...]) -> AttributeSchema:
    return AttributeSchema(
        declarations=(
            CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
            _age("PatientAge"),
            CategoryAttribute(name="view", source="ViewPosition", values=("PA", "AP", "LL", "RL", "LATERAL")),
            LabelsAttribute(name="findings", source="ImageComments", values=findings),
        )
    )


def _table(store: Store, objects: Sequence[ObjectInfo]) -> _Table:
    """The table that names the most of the files."""
    files = {PurePosixPath(o.key).name for o in objects if not _is_table(o)}
    tables = sorted(filter(_is_table, objects), key=lambda o: -o.bytes)[:_MOST_TABLES]
    if not tables:
        raise RecipeError(f"{store.uri}: images or volumes, but no .csv file says of whom; give a folder with both")
    best = max((_read_table(store.uri_of(o.key), files) for o in tables), key=lambda table: table.matched)
    if not best.matched:
        raise RecipeError(f"{store.uri}: no column of {len(tables)} .csv files names the images or volumes there")
    return best


def _read_table(uri: str, files: set[str]) -> _Table:
    readers: list[_TableReader] = []

    def begin(header: Header) -> Any:
        readers.append(_TableReader(header, files))
        return readers[0].read

    read_rows(uri, begin)
    matches = readers[0].matches
    file = max(matches, key=lambda name: matches[name])
    columns = tuple(tally.column() for tally in readers[0].tallies)
    return _Table(uri, readers[0].header, columns, file, matches[file])


class _TableReader:
    """Profiles a table while `read_rows` passes; its rows are not kept."""

    def __init__(self, header: Header, files: set[str]) -> None:
        self.header = header
        self.tallies = [ColumnTally(name) for name in header.names]
        self.matches = dict.fromkeys(header.names, 0)
        self._files, self._rows = files, 0
        patient = _named(header.names, _PATIENTS)
        self._patient = header.names.index(patient) if patient else None

    def read(self, cells: Cells) -> TableRow:
        self._rows += 1
        if self._rows <= MOST_ROWS:
            patient = str(self._rows) if self._patient is None else cells[self._patient]
            for tally, cell in zip(self.tallies, cells, strict=False):
                tally.add(cell, patient)
            for name, cell in zip(self.header.names, cells, strict=False):
                self.matches[name] += cell.rpartition("/")[2] in self._files
        return TableRow("", "", "", {})


def _named(columns: Iterable[str], wanted: Sequence[str]) -> str:
    """The column of the first of these names that is there; empty where none is."""
    plain = {re.sub(r"[^a-z0-9]", "", column.lower()): column for column in columns}
    return next((plain[name] for name in wanted if name in plain), "")


# --- Parquet --------------------------------------------------------------------------------------------------


def _parquet(store: Store, objects: Sequence[ObjectInfo]) -> Recognised:
    opened = next(filter(None, (_opened(store, object_) for object_ in objects)), None)
    image = "" if opened is None else _image_column(opened.schema_arrow)
    if opened is None or not image:
        raise RecipeError(f"{store.uri}: the Parquet files have no column with the bytes of images")
    texts = _text_columns(opened.schema_arrow)
    if not texts:
        raise RecipeError(f"{store.uri}: the Parquet files have no column that says of whom an image is")
    columns, patient, study = _profiled(opened, texts), _named(texts, _PATIENTS), _named(texts, _STUDIES)
    remark = f"no column seems to name the patient: {texts[0]!r} stands for it; set patient_column, or scans of one "
    remarks = () if patient else (remark + "person come into several splits",)
    source = ParquetSource(uri=store.uri, image_column=image, patient_column=patient or texts[0], study_column=study)
    return Recognised(source, _declared(columns, {patient or texts[0], study}), columns, remarks)


def _opened(store: Store, object_: ObjectInfo) -> Any:
    try:
        return pq.ParquetFile(RangedFile(store, object_.key, object_.bytes))
    except (pa.ArrowException, OSError):
        return None


def _image_column(schema: Any) -> str:
    for field in schema:
        kind = field.type
        if pt.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if pt.is_binary(kind) or pt.is_large_binary(kind):
            return str(field.name)
    return ""


def _text_columns(schema: Any) -> tuple[str, ...]:
    def item(kind: Any) -> Any:
        return kind.value_type if pt.is_list(kind) or pt.is_large_list(kind) or pt.is_dictionary(kind) else kind

    plain = (pt.is_string, pt.is_large_string, pt.is_integer, pt.is_floating, pt.is_boolean)
    return tuple(field.name for field in schema if any(is_kind(item(field.type)) for is_kind in plain))


def _profiled(opened: Any, names: tuple[str, ...]) -> tuple[Column, ...]:
    """The columns of the file's first rows, as the source reads their texts."""
    tallies = {name: ColumnTally(name) for name in names}
    classes = {name: class_names(opened.schema_arrow, name) for name in names}
    patient = _named(names, _PATIENTS)
    number = 0
    for batch in opened.iter_batches(1024, columns=list(names), use_threads=False):
        for row in batch.to_pylist():
            number += 1
            whose = cell_text(row[patient]) if patient else str(number)
            for name, tally in tallies.items():
                tally.add(_joined(row[name], classes[name]), whose)
        if number >= MOST_ROWS:
            break
    return tuple(tally.column() for tally in tallies.values())


def _joined(value: object, classes: tuple[str, ...]) -> str:
    if isinstance(value, list):
        return "|".join(_joined(item, classes) for item in value)
    if classes and isinstance(value, int):
        return classes[value] if 0 <= value < len(classes) else ""
    return cell_text(value)


# --- attributes of columns ------------------------------------------------------------------------------------


def _declared(columns: Sequence[Column], roles: set[str]) -> AttributeSchema:
    """The columns that look like attributes; where none does, the first other one, whose values are all withheld."""
    rest = [column for column in columns if column.name not in roles]
    found: dict[str, AttributeDeclaration] = {}
    for column in rest:
        declaration = _declaration(column)
        if declaration is not None and len(found) < _MOST_ATTRIBUTES:
            found.setdefault(declaration.name, declaration)
    if not found and not rest:
        raise RecipeError("the table has no columns beside those that name files and patients")
    if not found:
        blank = CategoryAttribute(name=_slug(rest[0].name), source=rest[0].name, values=("unknown",))
        found = {blank.name: blank}
    return AttributeSchema(declarations=tuple(found.values()))


def _declaration(column: Column) -> AttributeDeclaration | None:
    name = _slug(column.name)
    if column.kind == "number":
        return _age(column.name) if name == "age" else None
    sexes = {value: _SEXES.get(value.lower(), "") for value in column.values}
    if column.kind == "category" and name == "sex" and all(sexes.values()):
        values = tuple(sex for sex in ("F", "M", "O") if sex in sexes.values())
        aliases = {value: sex for value, sex in sexes.items() if value != sex}
        return CategoryAttribute(name=name, source=column.name, values=values, aliases=aliases)
    if column.kind == "category":
        return CategoryAttribute(name=name, source=column.name, values=tuple(column.values))
    if column.kind == "labels":
        none = next((value for value in column.values if _NO_FINDING.fullmatch(value)), "No Finding")
        labels = tuple(value for value in column.values if value != none)
        if labels:
            return LabelsAttribute(name=name, source=column.name, values=labels, separator=column.separator, none=none)
    return None


def _slug(column: str) -> str:
    """An attribute's name for a column: the usual word for it, else the column's own in small letters."""
    plain = re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")
    for word in plain.split("_"):
        if word in _WORDS:
            return _WORDS[word]
    named = (plain if plain[:1].isalpha() else f"column_{plain}").strip("_")[:40]
    return f"{named[:33]}_value" if named in RESERVED_COLUMNS else named
