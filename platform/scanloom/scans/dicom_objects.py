"""DICOM objects under a prefix of a store: loose ones, and those inside archives; every frame is a scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import DicomSource
from scanloom.scans.archive import archive_names, is_archive_name, read_archive
from scanloom.scans.decode import MAX_FILE_BYTES, frames, read_instance, require_image
from scanloom.scans.deidentify import require_harmless_sources, require_shareable_pixels, subject_of_header
from scanloom.scans.quarantine import reject
from scanloom.scans.scan import Context, Found, Scan, SourceFile
from scanloom.store import Store


def list_files(source: DicomSource, schema: AttributeSchema) -> list[SourceFile]:
    """Every object under the prefix, by key; archives are alone.

    Raises RecipeError for an empty prefix or an attribute that no DICOM header may give.
    """
    require_harmless_sources(schema)
    store = Store(source.uri)
    found = [
        SourceFile(object_.key, object_.bytes, object_.version, alone=is_archive_name(object_.key))
        for object_ in store.list()
    ]
    if not found:
        raise RecipeError(f"{store.uri}: no objects under this prefix; check prepare.source.uri")
    return found


def read_files(source: DicomSource, files: Sequence[SourceFile], context: Context) -> Iterator[Found]:
    """The frames of the objects in one unit. Raises StoreError where the source cannot be read."""
    store = Store(source.uri)
    for member, content in _contents(store, files):
        if isinstance(content, ScanError):
            yield member, None, content
        else:
            for frame, scan in dicom_scans(content, context):
                yield member, frame, scan


def names(source: DicomSource, files: Sequence[SourceFile]) -> list[str]:
    """The source's name of every member."""
    store = Store(source.uri)
    if len(files) == 1 and files[0].alone:
        uri = store.uri_of(files[0].key)
        return [f"{uri} {name}" for name in archive_names(store, files[0].key, files[0].bytes)]
    return [store.uri_of(file.key) for file in files]


def dicom_scans(content: bytes, context: Context) -> Iterator[tuple[int | None, Scan | ScanError]]:
    """Frame number (None where there is but one, or for the file as a whole) and scan of each frame of a DICOM file.

    Never empty: a file that cannot be used gives its reason.
    """
    if context.fence is None:
        yield from _read(content, context)
        return
    try:
        yield from context.fence.run(_read, content, replace(context, fence=None))
    except ScanError as error:
        yield None, error


def _read(content: bytes, context: Context) -> Iterator[tuple[int | None, Scan | ScanError]]:
    try:
        instance = read_instance(content, context.decode)
        require_image(instance)
        require_shareable_pixels(instance.dataset)
        subject = subject_of_header(instance.dataset, context.schema, context.pseudonyms)
        single = instance.frames == 1
        for number, image in enumerate(frames(instance, context.decode)):
            frame = None if single else number
            if isinstance(image, ScanError):
                yield frame, image
            else:
                yield frame, Scan(subject.of_frame(frame, context.pseudonyms), image)
    except ScanError as error:
        yield None, error


def _contents(store: Store, files: Sequence[SourceFile]) -> Iterator[tuple[int, bytes | ScanError]]:
    if len(files) == 1 and files[0].alone:
        yield from read_archive(store, files[0].key, files[0].bytes)
        return
    for member, file in enumerate(files):
        yield member, reject("too-large") if file.bytes > MAX_FILE_BYTES else store.read(file.key)
