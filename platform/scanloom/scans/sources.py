"""Where scans come from: one face for DICOM files and archives, a PACS, tables of images, volumes and phantoms.

docs/sources.md says what each of them yields. Order is by object key, then by place in the file, so that unit, member
and frame name a scan without naming anybody.
"""

from __future__ import annotations

from collections.abc import Iterator

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError
from scanloom.recipe import (
    DicomSource,
    DicomWebSource,
    ImageFolderSource,
    NiftiSource,
    ParquetSource,
    PhantomSource,
    Source,
    nearest,
)
from scanloom.scans import dicom_objects, dicomweb, image_parquet, image_table, nifti
from scanloom.scans.deidentify import subject_of_row
from scanloom.scans.image import Geometry, ScanImage
from scanloom.scans.phantoms import phantom
from scanloom.scans.scan import Context, Found, Scan, SourceFile
from scanloom.scans.units import Unit


def list_files(source: Source, schema: AttributeSchema) -> list[SourceFile]:
    """Every file of a source, in order.

    Raises RecipeError for an empty prefix, a table that lacks a column, or an attribute that the source cannot give,
    StoreError where the source does not answer.
    """
    match source:
        case DicomSource():
            return dicom_objects.list_files(source, schema)
        case DicomWebSource():
            return dicomweb.list_files(source, schema)
        case ImageFolderSource():
            return image_table.list_files(source, schema)
        case ParquetSource():
            return image_parquet.list_files(source, schema)
        case NiftiSource():
            return nifti.list_files(source, schema)
        case PhantomSource():
            return _phantom_files(source, schema)


def files_per_unit(source: Source) -> int:
    """How many loose files one unit of a source has at most."""
    return source.files_per_unit if isinstance(source, DicomSource | ImageFolderSource) else 1


def read_unit(source: Source, unit: Unit, context: Context) -> Iterator[Found]:
    """Every file of the unit, once or frame by frame, in order. Raises StoreError where the source cannot be read."""
    match source:
        case DicomSource():
            return dicom_objects.read_files(source, unit.files, context)
        case DicomWebSource():
            return dicomweb.read_files(source, unit.files, context)
        case ImageFolderSource():
            return image_table.read_files(source, unit.files, context)
        case ParquetSource():
            return image_parquet.read_files(source, unit.files, context)
        case NiftiSource():
            return nifti.read_files(source, unit.files, context)
        case PhantomSource():
            return _phantoms(unit, context)


def locate(source: Source, unit: Unit, member: int) -> str:
    """The name in the source of one file of a unit, for whoever may read the source: names can identify patients.

    IndexError where the unit has no such member.
    """
    match source:
        case DicomSource():
            return dicom_objects.names(source, unit.files)[member]
        case DicomWebSource():
            return dicomweb.names(source, unit.files)[member]
        case ImageFolderSource():
            return image_table.names(source, unit.files)[member]
        case ParquetSource():
            return image_parquet.names(source, unit.files)[member]
        case NiftiSource():
            return nifti.names(source, unit.files)[member]
        case PhantomSource():
            return f"phantom {_numbers(unit)[member]}"


# --- phantoms -------------------------------------------------------------------------------------------------


def _phantom_files(source: PhantomSource, schema: AttributeSchema) -> list[SourceFile]:
    known = phantom(0, 0, 16).raw
    for declaration in schema.declarations:
        wanted = declaration.source or declaration.name
        if wanted not in known:
            raise RecipeError(f"attribute {declaration.name!r}: phantoms have no {wanted!r}{nearest(wanted, known)}")
    starts = range(0, source.scans, source.scans_per_unit)
    ends = [min(source.scans, start + source.scans_per_unit) for start in starts]
    return [SourceFile(f"{start}-{end}", 0, alone=True) for start, end in zip(starts, ends, strict=True)]


def _numbers(unit: Unit) -> range:
    start, _, end = unit.files[0].key.partition("-")
    return range(int(start), int(end))


def _phantoms(unit: Unit, context: Context) -> Iterator[Found]:
    for member, number in enumerate(_numbers(unit)):
        drawn = phantom(context.seed, number, context.size_px)
        patient = f"{context.seed}-{drawn.patient}"
        subject = subject_of_row(
            f"{context.seed}-{drawn.index}", patient, str(drawn.scan), drawn.raw, context.schema, context.pseudonyms
        )
        geometry = Geometry((drawn.spacing_mm, drawn.spacing_mm), "L\\F")
        yield member, None, Scan(subject, ScanImage(drawn.pixels, geometry))
