"""The series of a PACS that speaks DICOMweb, as files: each one's instances are DICOM files like any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from pydicom.datadict import tag_for_keyword

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import DicomWebSource
from scanloom.scans.deidentify import require_harmless_sources
from scanloom.scans.dicom_objects import dicom_scans
from scanloom.scans.pacs import INSTANCES_IN_SERIES, SERIES_UID, STUDY_UID, Pacs, Result, text
from scanloom.scans.quarantine import reject
from scanloom.scans.scan import Context, Found, SourceFile

_RETRIEVE_URL = "00081190"


def list_files(source: DicomWebSource, schema: AttributeSchema) -> list[SourceFile]:
    """Every series that the filters find, by its key `studies/<uid>/series/<uid>`, each alone and of unknown size.

    A series has changed when its number of instances has, or anything else that the server says of it. Raises
    RecipeError where nothing is found, and for a filter or an attribute that is no DICOM keyword; StoreError where the
    server refuses or does not answer.
    """
    require_harmless_sources(schema)
    for keyword in source.query:
        if tag_for_keyword(keyword) is None:
            raise RecipeError(f"prepare.source.query: {keyword!r} is no DICOM keyword, such as Modality or StudyDate")
    pacs = Pacs(source.uri)
    found = [SourceFile(_key(result), 0, _version(result), alone=True) for result in pacs.series(source.query)]
    if not found:
        raise RecipeError(f"{pacs.root}: no series there, or none that passes prepare.source.query")
    return sorted(found, key=lambda file: file.key)


def read_files(source: DicomWebSource, files: Sequence[SourceFile], context: Context) -> Iterator[Found]:
    """The frames of the instances of a series; a member is an instance, in the order of their UIDs.

    One instance is held at a time. Raises StoreError where the server refuses or does not answer.
    """
    pacs = Pacs(source.uri)
    _, study, _, series = files[0].key.split("/")
    instances = pacs.instances(study, series)
    if not instances:
        yield 0, None, reject("empty-series")
    for member, instance in enumerate(instances):
        try:
            content = pacs.instance(study, series, instance)
        except ScanError as error:
            yield member, None, error
            continue
        for frame, scan in dicom_scans(content, context):
            yield member, frame, scan


def names(source: DicomWebSource, files: Sequence[SourceFile]) -> list[str]:
    """The URL of every member."""
    pacs = Pacs(source.uri)
    _, study, _, series = files[0].key.split("/")
    folder = f"{pacs.root}/{files[0].key}"
    return [f"{folder}/instances/{uid}" for uid in pacs.instances(study, series)] or [folder]


def _key(result: Result) -> str:
    return f"studies/{text(result, STUDY_UID)}/series/{text(result, SERIES_UID)}"


def _version(result: Result) -> str:
    said = {tag: value for tag, value in result.items() if tag != _RETRIEVE_URL}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"{text(result, INSTANCES_IN_SERIES)}-{digest[:16]}"
