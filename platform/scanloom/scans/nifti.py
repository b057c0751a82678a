"""NIfTI volumes: the slices of one plane as frames, shown as a radiologist expects them.

Voxel axes may run any way; the affine of the header says which (NIfTI-1: +x right, +y anterior, +z superior). An axial
slice comes with the patient's left at the right of the image and the front up, a coronal one with the left at the
right and the head up, a sagittal one with the front at the left and the head up. Frames are counted along the patient's
axes as DICOM has them: from the right to the left, from the front to the back, from the feet to the head.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import io_orientation

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import NiftiSource, Window
from scanloom.scans.decode import MAX_FILE_BYTES, MAX_PIXELS, rendered
from scanloom.scans.deidentify import Subject, subject_of_row
from scanloom.scans.grayscale import Grayscale, Ramp, Rescale
from scanloom.scans.image import Geometry, Pixels, Rendering, ScanImage
from scanloom.scans.image_pixel import MAX_FRAMES
from scanloom.scans.quarantine import reject
from scanloom.scans.ranged import RangedFile
from scanloom.scans.scan import Context, Found, Scan, SourceFile
from scanloom.scans.table import Columns, read_rows, row_parser, with_rows
from scanloom.store import Store

Vector = npt.NDArray[np.float64]
Voxels = npt.NDArray[Any]

_GZIP = b"\x1f\x8b"
_DEFLATE_RATIO = 1032
"""No deflate stream inflates to more bytes a byte."""
_READ_AHEAD = 1 << 20
_PIECE = 8 << 20
_SPARE_BYTES = 16 << 20
"""Read at most after the voxels, for the checksum at the end of a gzip stream."""

# sizeof_hdr -> header, and the magic of a volume whose header and voxels are in one file with its place.
_FORMATS: dict[int, tuple[Any, bytes, int]] = {
    348: (Nifti1Header, b"n+1\0", 344),
    540: (Nifti2Header, b"n+2\0\r\n\x1a\n", 4),
}
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""By the low bits of xyzt_units: not said, metre, millimetre, micrometre."""

# Patient axis (0 left, 1 posterior, 2 head) and direction in which frames, rows and columns are counted.
_PLANES = {
    "axial": ((2, 1), (1, 1), (0, 1)),
    "coronal": ((1, 1), (2, -1), (0, 1)),
    "sagittal": ((0, 1), (2, -1), (1, 1)),
}
_LETTERS = {"axial": "L\\P", "coronal": "L\\F", "sagittal": "P\\F"}


# --- the source -----------------------------------------------------------------------------------------------


def list_files(source: NiftiSource, schema: AttributeSchema) -> list[SourceFile]:
    """Every object under the prefix but the table itself, by key, each alone and with the table's rows for it.

    Raises RecipeError for an empty prefix, a table that cannot be read, or a column that it lacks.
    """
    store, table = Store(source.uri), Store(source.table)
    objects = [o for o in store.list() if store.uri_of(o.key) != table.uri]
    if not objects:
        raise RecipeError(f"{store.uri}: no objects under this prefix; check prepare.source.uri")
    wanted = {(d.source or d.name): (d.source or d.name) for d in schema.declarations}
    columns = Columns(source.file_column, source.patient_column, source.study_column, wanted)
    return with_rows(objects, read_rows(source.table, lambda header: row_parser(header, columns)), alone=True)


def read_files(source: NiftiSource, files: Sequence[SourceFile], context: Context) -> Iterator[Found]:
    """Each chosen slice of the volume as a frame, or why there is none; the volume's voxels are held in memory.

    Raises StoreError where the source cannot be read.
    """
    try:
        stream = _opened(Store(source.uri), files[0])
        volume = _volume(stream)
        view = _view(volume, source.plane)
        subject = _subject(files[0], context)
        _require_bytes(stream, volume, files[0].bytes)
        voxels = view.of(_voxels(stream, volume))
    except ScanError as error:
        yield 0, None, error
        return
    for frame in range(0, len(voxels), source.every):
        try:
            pixels, rendering = _shown_slice(voxels[frame], volume, context.decode.window, source.value_unit)
        except ScanError as error:
            yield 0, frame, error
        else:
            image = ScanImage(pixels, view.geometry(frame), rendering)
            yield 0, frame, Scan(subject.of_frame(frame, context.pseudonyms), image)


def names(source: NiftiSource, files: Sequence[SourceFile]) -> list[str]:
    """The source's name of every member."""
    return [Store(source.uri).uri_of(file.key) for file in files]


def _subject(file: SourceFile, context: Context) -> Subject:
    if len(file.rows) != 1:
        raise reject("ambiguous-table-row" if file.rows else "no-table-row")
    row = file.rows[0]
    return subject_of_row(row.file, row.patient, row.study, row.texts, context.schema, context.pseudonyms)


# --- header and voxels ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Volume:
    """What the header says of the voxels. `affine` takes voxel indices to millimetres along LPS."""

    shape: tuple[int, int, int]
    kind: np.dtype[Any]
    skip: int
    """Bytes between the header and the first voxel."""
    rescale: Rescale
    shown: tuple[Ramp, ...]
    """The header's range for display, cal_min to cal_max, where it has one."""
    affine: Vector

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.kind.itemsize

    @property
    def held_as(self) -> np.dtype[Any]:
        """Type in memory: of this machine's byte order, and single precision for double, which pixels do not show."""
        native = self.kind.newbyteorder("=")
        return np.dtype(np.float32) if native == np.float64 else native


def _opened(store: Store, file: SourceFile) -> BinaryIO:
    if not file.bytes:
        raise reject("empty-file")
    buffered = io.BufferedReader(RangedFile(store, file.key, file.bytes), _READ_AHEAD)
    return cast(BinaryIO, gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == _GZIP else buffered)


def _volume(stream: BinaryIO) -> _Volume:
    """Raises ScanError: not-nifti, truncated, undecodable-pixels, several-volumes, too-large, and of the header."""
    header, read = _header(stream)
    try:
        count, *dimensions = (int(n) for n in header["dim"])
        offset = int(header["vox_offset"]) or read + 4
        scale = header.get_slope_inter()
    except Exception:  # noqa: BLE001 - a header of junk fails anywhere in nibabel
        raise reject("unreadable-nifti") from None
    shape, kind = _shape(dimensions[: max(0, count)]) if count <= 7 else (), _kind(header)
    if offset < read or not shape:
        raise reject("unreadable-nifti")
    made = _Volume(
        (shape[0], shape[1], shape[2]),
        kind,
        offset - read,
        Rescale() if scale[0] is None else Rescale(*scale),
        _shown(header),
        _affine(header),
    )
    if max(made.skip, math.prod(shape) * made.held_as.itemsize) > MAX_FILE_BYTES:
        raise reject("too-large")
    return made


def _header(stream: BinaryIO) -> tuple[Any, int]:
    """The header as nibabel reads it, and how many bytes it took."""
    head = _exactly(stream, 348, "not-nifti")
    for order in "<>":
        size = int(np.frombuffer(head, f"{order}i4", 1)[0])
        header, magic, place = _FORMATS.get(size, (None, b"", 0))
        if header is not None and head[place : place + len(magic)] == magic:
            rest = _exactly(stream, size - len(head), "truncated")
            return header(head + rest, endianness=order, check=False), size
    raise reject("not-nifti")


def _shape(dimensions: list[int]) -> tuple[int, ...]:
    """Sizes along three axes; empty where they make no volume."""
    if min(dimensions, default=0) < 1:
        return ()
    if max(dimensions[3:], default=1) > 1:
        raise reject("several-volumes")
    shape = (*dimensions, 1, 1)[:3]
    if math.prod(sorted(shape)[1:]) > MAX_PIXELS or max(shape) > MAX_FRAMES:
        raise reject("too-large")
    return shape


def _kind(header: Any) -> np.dtype[Any]:
    try:
        kind: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except Exception:  # noqa: BLE001 - nibabel has several errors for a code that it does not know
        raise reject("unsupported-pixels") from None
    if kind.names:
        raise reject("colour")
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise reject("unsupported-pixels")
    return kind


def _shown(header: Any) -> tuple[Ramp, ...]:
    low, high = float(header["cal_min"]), float(header["cal_max"])
    return (Ramp(low, high),) if math.isfinite(low) and math.isfinite(high) and low < high else ()


def _affine(header: Any) -> Vector:
    """Voxel indices to LPS millimetres by the sform, else by the qform. Raises ScanError no-orientation."""
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1.0  # as the standard says of the sign in qform (qfac)
    for code, form in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        try:
            affine = np.asarray(form(), dtype=np.float64) if header[code] > 0 else np.zeros((4, 4))
        except Exception:  # noqa: BLE001 - a quaternion of junk
            continue
        affine[:3] *= _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
        if _is_placed(affine):
            return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    raise reject("no-orientation")


def _is_placed(affine: Vector) -> bool:
    """Whether three directions are told apart, by steps that a scanner could have."""
    if not np.isfinite(affine).all():
        return False
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if steps.min() < 1e-4 or steps.max() > 1e4:
        return False
    return abs(float(np.linalg.det(affine[:3, :3] / steps))) > 0.1


def _require_bytes(stream: BinaryIO, volume: _Volume, size: int) -> None:
    """Raise ScanError truncated where a file of this size cannot hold the voxels, before they are given memory."""
    most = size * _DEFLATE_RATIO if isinstance(stream, gzip.GzipFile) else size
    if volume.skip + volume.bytes > most:
        raise reject("truncated")


def _voxels(stream: BinaryIO, volume: _Volume) -> Voxels:
    """The stored values, [i, j, k]. Raises ScanError: truncated, undecodable-pixels."""
    left = volume.skip
    while left:
        left -= len(_exactly(stream, min(left, _PIECE), "truncated"))
    voxels = np.empty(math.prod(volume.shape), volume.held_as)
    count = _PIECE // volume.kind.itemsize
    with np.errstate(over="ignore"):
        for start in range(0, len(voxels), count):
            piece = voxels[start : start + count]
            piece[:] = np.frombuffer(_exactly(stream, len(piece) * volume.kind.itemsize, "truncated"), volume.kind)
    if isinstance(stream, gzip.GzipFile):
        for _ in range(_SPARE_BYTES // _PIECE):
            _exactly(stream, _PIECE)
    return voxels.reshape(volume.shape, order="F")


def _exactly(stream: BinaryIO, size: int, code: str = "") -> bytes:
    """So many bytes; fewer are refused with `code`, or taken where it is empty."""
    try:
        data = stream.read(size)
    except EOFError:
        raise reject("truncated") from None
    except (gzip.BadGzipFile, zlib.error):
        raise reject("undecodable-pixels") from None
    if code and len(data) < size:
        raise reject(code)
    return data


# --- slices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A volume seen as frames, rows and columns: the voxel axis of each, and whether it runs backwards."""

    axes: tuple[int, int, int]
    backwards: tuple[bool, bool, bool]
    shape: tuple[int, int, int]
    affine: Vector
    letters: str

    def of(self, voxels: Voxels) -> Voxels:
        """The voxels as [frame, row, column], without a copy."""
        steps = tuple(slice(None, None, -1 if backwards else 1) for backwards in self.backwards)
        return np.transpose(voxels, self.axes)[steps]

    def geometry(self, frame: int) -> Geometry:
        """Where the frame lies, at the centre of its first pixel."""
        index = np.zeros(4)
        index[3] = 1.0
        for axis, backwards, number in zip(self.axes, self.backwards, (frame, 0, 0), strict=True):
            index[axis] = self.shape[axis] - 1 - number if backwards else number
        down, right = (self._step(which) for which in (1, 2))
        place = self.affine @ index
        spacing = float(np.linalg.norm(down)), float(np.linalg.norm(right))
        right, down = right / spacing[1], down / spacing[0]
        direction = None if abs(right @ down) > 0.01 else _six(np.concatenate([right, down]))
        return Geometry(spacing, self.letters, direction, (float(place[0]), float(place[1]), float(place[2])))

    def _step(self, which: int) -> Vector:
        sign = -1.0 if self.backwards[which] else 1.0
        return np.asarray(self.affine[:3, self.axes[which]] * sign)


def _six(values: Vector) -> tuple[float, float, float, float, float, float]:
    first, second, third, fourth, fifth, sixth = (float(value) + 0.0 for value in values)  # no -0.0
    return first, second, third, fourth, fifth, sixth


def _view(volume: _Volume, plane: str) -> _View:
    """The volume along the voxel axes that are nearest to the plane's."""
    nearest = [(int(axis), int(sign)) for axis, sign in io_orientation(volume.affine)]  # type: ignore[no-untyped-call]
    axes, backwards = [], []
    for axis, sign in _PLANES[plane]:
        voxel_axis = next(i for i, (of, _) in enumerate(nearest) if of == axis)
        axes.append(voxel_axis)
        backwards.append(nearest[voxel_axis][1] != sign)
    return _View(
        (axes[0], axes[1], axes[2]),
        (backwards[0], backwards[1], backwards[2]),
        volume.shape,
        volume.affine,
        _LETTERS[plane],
    )


def _shown_slice(stored: Voxels, volume: _Volume, window: Window, unit: str) -> tuple[Pixels, Rendering]:
    """One slice through the window; u8 where voxels have 8 bits. Raises ScanError blank-image."""
    values = np.ascontiguousarray(stored)
    known = Grayscale(modality=volume.rescale, windows=volume.shown, unit=unit)
    return rendered(values, window, known, bits=8 if volume.kind.itemsize == 1 else 16)
