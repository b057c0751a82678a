"""NIfTI: slices lie, look and measure as their affine says, and a broken volume is refused with its code."""

from __future__ import annotations

import gzip
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as typed_in_part
import numpy as np
import numpy.typing as npt
import pytest

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import CategoryAttribute, Decode, FixedWindow, FullWindow, NiftiSource, Window
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.nifti import list_files, names, read_files
from scanloom.scans.scan import Context, Scan
from tests.made_dicom import KEY

nibabel: Any = typed_in_part
SCHEMA = AttributeSchema(declarations=(CategoryAttribute(name="sex", values=("F", "M")),))
HEADER = "file,patient,sex\n"
ROW = "v.nii,p,F\n"
PSEUDONYMS = Pseudonyms(KEY.encode())
PLANES = ("axial", "coronal", "sagittal")

# The point of the patient (LPS, mm) that every voxel of `anatomy` holds, coded as a number.
SHAPE = (5, 6, 7)
STEP = (2.0, 3.0, 4.0)
RAS = nibabel.affines.from_matvec(np.diag(STEP), (-10.0, 20.0, 30.0))


def anatomy() -> npt.NDArray[np.int16]:
    """A volume whose axes run to the right, the front and the head; each voxel is unlike all others."""
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)


def context(window: Window | None = None) -> Context:
    return Context(SCHEMA, PSEUDONYMS, Decode(window=window or FullWindow()), seed=0, size_px=32)


def source(tmp_path: Path, volume: Any, table: str = HEADER + ROW, **given: Any) -> NiftiSource:
    """A source of one volume: an image of nibabel, or bytes."""
    (tmp_path / "data").mkdir(exist_ok=True)
    place = tmp_path / "data" / "v.nii"
    place.write_bytes(volume if isinstance(volume, bytes) else volume.to_bytes())
    (tmp_path / "table.csv").write_text(table)
    return NiftiSource(uri=f"{tmp_path}/data", table=f"{tmp_path}/table.csv", **given)


def found(source: NiftiSource, window: Window | None = None) -> dict[int | None, Any]:
    """Scan or refusal code by frame of the one volume."""
    files = list_files(source, SCHEMA)
    assert [file.alone for file in files] == [True]
    results = list(read_files(source, files, context(window)))
    assert {member for member, _, _ in results} == {0}
    assert len({frame for _, frame, _ in results}) == len(results)
    return {frame: result.code if isinstance(result, ScanError) else result for _, frame, result in results}


def refusal(tmp_path: Path, volume: Any) -> str:
    (code,) = found(source(tmp_path, volume)).values()
    assert isinstance(code, str)
    return code


def made(data: npt.NDArray[Any] | None = None, affine: npt.NDArray[Any] = RAS, **header: Any) -> Any:
    image = nibabel.Nifti1Image(anatomy() if data is None else data, affine)
    for name, value in header.items():
        image.header[name] = value
    return image


def damaged(volume: bytes, **fields: Any) -> bytes:
    """The volume with header fields set to values that nibabel would not write."""
    header = nibabel.Nifti1Header(volume[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + volume[348:]


# --- how slices lie -------------------------------------------------------------------------------------------


def expected(plane: str, frame: int) -> npt.NDArray[np.int16]:
    """The slice of `anatomy` in radiological convention, worked out by hand for axes to right, front and head."""
    volume = anatomy()
    return {
        "axial": volume[::-1, ::-1, frame].T,  # left at the right of the image, front at the top
        "coronal": volume[::-1, SHAPE[1] - 1 - frame, ::-1].T,  # from the front, head at the top
        "sagittal": volume[SHAPE[0] - 1 - frame, ::-1, ::-1].T,  # from the right, front at the left
    }[plane]


@pytest.mark.parametrize("plane", PLANES)
def test_slices_of_a_plane_are_shown_in_radiological_convention(tmp_path: Path, plane: str) -> None:
    slices = found(source(tmp_path, made(), plane=plane))
    assert list(slices) == list(range({"axial": 7, "coronal": 6, "sagittal": 5}[plane]))
    for frame, scan in slices.items():
        assert isinstance(scan, Scan)
        assert frame is not None
        right = expected(plane, frame).astype(np.float64)
        full = np.rint((right - right.min()) / (right.max() - right.min()) * 65535).astype(np.uint16)
        np.testing.assert_array_equal(scan.image.pixels, full)


def orientations() -> list[npt.NDArray[Any]]:
    """All 48 ways in which three voxel axes can run."""
    return [
        np.array([[axis, flip] for axis, flip in zip(axes, flips, strict=True)])
        for axes in itertools.permutations(range(3))
        for flips in itertools.product((1, -1), repeat=3)
    ]


@pytest.mark.parametrize("plane", PLANES)
def test_however_the_voxels_are_stored_the_slices_are_the_same(tmp_path: Path, plane: str) -> None:
    wanted = found(source(tmp_path, made(), plane=plane))
    for ornt in orientations():
        turned = nibabel.apply_orientation(anatomy(), ornt)
        # nibabel's own account of how the affine turns with the voxels.
        volume = made(turned, RAS @ nibabel.orientations.inv_ornt_aff(ornt, SHAPE))
        slices = found(source(tmp_path, volume, plane=plane))
        assert slices.keys() == wanted.keys()
        for frame, scan in slices.items():
            np.testing.assert_array_equal(scan.image.pixels, wanted[frame].image.pixels)
            assert scan.image.geometry == wanted[frame].image.geometry


@pytest.mark.parametrize(
    "plane, spacing, letters, direction",
    [
        ("axial", (3.0, 2.0), "L\\P", (1, 0, 0, 0, 1, 0)),
        ("coronal", (4.0, 2.0), "L\\F", (1, 0, 0, 0, 0, -1)),
        ("sagittal", (4.0, 3.0), "P\\F", (0, 1, 0, 0, 0, -1)),
    ],
)
def test_geometry_is_in_dicoms_axes(
    tmp_path: Path, plane: str, spacing: tuple[float, float], letters: str, direction: tuple[int, ...]
) -> None:
    slices = found(source(tmp_path, made(), plane=plane))
    for frame, scan in slices.items():
        geometry = scan.image.geometry
        assert (geometry.spacing_mm, geometry.orientation, geometry.direction) == (spacing, letters, direction)
        # The voxel under the first pixel, by its number, taken through the affine to RAS and from there to LPS.
        voxel = np.array(np.unravel_index(int(expected(plane, frame or 0)[0, 0]), SHAPE))
        x, y, z = RAS[:3, :3] @ voxel + RAS[:3, 3]
        assert geometry.position_mm == pytest.approx((-x, -y, z))


def test_an_oblique_volume_keeps_its_angle_and_every_pixel_its_place(tmp_path: Path) -> None:
    turn = nibabel.eulerangles.euler2mat(0.2, -0.15, 0.1)
    affine = nibabel.affines.from_matvec(turn @ np.diag(STEP), (5.0, -6.0, 7.0))
    for plane in PLANES:
        for frame, scan in found(source(tmp_path, made(affine=affine), plane=plane)).items():
            geometry, numbers = scan.image.geometry, expected(plane, frame or 0)
            right, down = np.array(geometry.direction[:3]), np.array(geometry.direction[3:])
            assert abs(right @ down) < 1e-6
            last = np.array(np.unravel_index(int(numbers[-1, -1]), SHAPE))
            x, y, z = affine[:3, :3] @ last + affine[:3, 3]
            rows, columns = numbers.shape
            across = right * geometry.spacing_mm[1] * (columns - 1)
            place = np.array(geometry.position_mm) + across + down * geometry.spacing_mm[0] * (rows - 1)
            # The header holds single precision.
            np.testing.assert_allclose(place, (-x, -y, z), atol=1e-4)


def test_the_sform_goes_before_the_qform_and_units_are_counted(tmp_path: Path) -> None:
    volume = made()
    volume.set_qform(nibabel.affines.from_matvec(np.diag((-9.0, 9.0, 9.0))), code=1)
    volume.set_sform(RAS, code=2)
    assert found(source(tmp_path, volume))[0].image.geometry.spacing_mm == (3.0, 2.0)
    volume.set_sform(RAS, code=0)
    assert found(source(tmp_path, volume))[0].image.geometry.spacing_mm == (9.0, 9.0)
    metres = made(affine=nibabel.affines.from_matvec(np.diag((0.002, 0.003, 0.004))), xyzt_units=1)
    assert found(source(tmp_path, metres))[0].image.geometry.spacing_mm == pytest.approx((3.0, 2.0))


def test_a_qform_whose_sign_is_left_out_counts_as_positive(tmp_path: Path) -> None:
    volume = made()
    volume.set_qform(RAS, code=1)
    volume.set_sform(None, code=0)
    written = damaged(volume.to_bytes(), pixdim=[0, 2, 3, 4, 0, 0, 0, 0])
    assert found(source(tmp_path, written))[0].image.geometry.spacing_mm == pytest.approx((3.0, 2.0))


# --- values ---------------------------------------------------------------------------------------------------


def test_voxels_are_rescaled_and_windowed_in_their_unit(tmp_path: Path) -> None:
    volume = made(anatomy())
    volume.header.set_slope_inter(2.0, -100.0)
    written = volume.to_bytes()
    scan = found(source(tmp_path, written, value_unit="HU"), FixedWindow(center=0.0, width=200.0))[0]
    numbers = expected("axial", 0).astype(np.float64)
    stored = nibabel.Nifti1Image.from_bytes(written)
    values = numbers * stored.dataobj.slope + stored.dataobj.inter
    shown = np.rint(np.clip((values + 100.0) / 200.0, 0, 1) * 65535)
    np.testing.assert_array_equal(scan.image.pixels, shown.astype(np.uint16))
    rendering = scan.image.rendering
    assert (rendering.choice, rendering.low, rendering.high, rendering.unit) == ("fixed", -100.0, 100.0, "HU")


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8", "i8", "u8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_type_and_byte_order_of_voxels_is_read(tmp_path: Path, kind: str, order: str) -> None:
    data = (anatomy() % 100).astype(f"{order}{kind}")
    image = nibabel.Nifti1Image(data, RAS, nibabel.Nifti1Header(endianness=order), dtype=data.dtype)
    scan = found(source(tmp_path, image))[0]
    # 0 to 8 bits shown as 8, the others as 16.
    assert scan.image.pixels.dtype == (np.uint8 if kind[1] == "1" else np.uint16)
    right = (expected("axial", 0) % 100).astype(np.float64)
    top = np.iinfo(scan.image.pixels.dtype).max
    full = np.rint((right - right.min()) / (right.max() - right.min()) * top)
    np.testing.assert_array_equal(scan.image.pixels, full.astype(scan.image.pixels.dtype))


def test_the_headers_own_range_is_its_window(tmp_path: Path) -> None:
    scan = found(source(tmp_path, made(cal_min=10, cal_max=50)), Decode().window)[0]
    assert (scan.image.rendering.choice, scan.image.rendering.low, scan.image.rendering.high) == ("window-1", 10, 50)
    without = found(source(tmp_path, made(cal_min=0, cal_max=0)), Decode().window)[0]
    assert without.image.rendering.choice == "full"


def test_empty_slices_are_refused_one_by_one_and_nan_is_black(tmp_path: Path) -> None:
    data = anatomy().astype(np.float32)
    data[:, :, 2] = 7
    data[:, :, 3] = np.nan
    data[4, 5, 4] = np.nan
    slices = found(source(tmp_path, made(data)))
    assert slices[2] == slices[3] == "blank-image"
    assert slices[4].image.pixels[0, 0] == 0
    assert [isinstance(slices[i], Scan) for i in (0, 1, 4, 5, 6)] == [True] * 5


# --- frames, ids and rows -------------------------------------------------------------------------------------


def test_each_nth_slice_keeps_its_number_and_its_id(tmp_path: Path) -> None:
    every = found(source(tmp_path, made()))
    third = found(source(tmp_path, made(), every=3))
    assert list(third) == [0, 3, 6]
    assert [scan.subject.id for scan in third.values()] == [every[i].subject.id for i in third]
    assert len({scan.subject.id for scan in every.values()}) == 7
    assert len({scan.subject.study for scan in every.values()}) == len({s.subject.patient for s in every.values()}) == 1


@pytest.mark.parametrize(
    "table, code",
    [
        (HEADER, "no-table-row"),
        (HEADER + ROW + "v.nii,q,F\n", "ambiguous-table-row"),
        (HEADER + "v.nii,,F\n", "no-patient-id"),
    ],
)
def test_a_volume_that_the_table_lets_down_is_refused_as_a_whole(tmp_path: Path, table: str, code: str) -> None:
    assert found(source(tmp_path, made(), table)) == {None: code}


def test_a_compressed_and_a_nifti2_volume_are_the_same_scans(tmp_path: Path) -> None:
    plain = found(source(tmp_path, made()))
    packed = found(source(tmp_path, gzip.compress(made().to_bytes())))
    second = found(source(tmp_path, nibabel.Nifti2Image(anatomy(), RAS)))
    for frame, scan in plain.items():
        for other in (packed[frame], second[frame]):
            np.testing.assert_array_equal(scan.image.pixels, other.image.pixels)
            assert scan.image.geometry == other.image.geometry
            assert scan.subject == other.subject


def test_a_flat_image_is_a_volume_of_one_slice(tmp_path: Path) -> None:
    slices = found(source(tmp_path, made(anatomy()[:, :, 0])))
    assert list(slices) == [0]
    assert slices[0].image.pixels.shape == (6, 5)
    assert list(found(source(tmp_path, made(anatomy()[..., None])))) == list(range(7))


def test_the_listing_needs_files_a_table_and_its_columns(tmp_path: Path) -> None:
    good = source(tmp_path, made())
    assert names(good, list_files(good, SCHEMA)) == [f"{tmp_path}/data/v.nii"]
    with pytest.raises(RecipeError, match=r"no objects under this prefix; check prepare\.source\.uri"):
        list_files(good.model_copy(update={"uri": f"{tmp_path}/missing"}), SCHEMA)
    with pytest.raises(RecipeError, match="no column 'volume'"):
        list_files(good.model_copy(update={"file_column": "volume"}), SCHEMA)


# --- what is wrong --------------------------------------------------------------------------------------------


def test_what_is_no_nifti_volume_is_refused(tmp_path: Path) -> None:
    whole = made().to_bytes()
    analyze = whole[:344] + b"\0\0\0\0" + whole[348:]
    pair = whole[:344] + b"ni1\0" + whole[348:]
    for data in (analyze, pair, b'{"EchoTime": 0.03}', whole[:300], bytes(1000), gzip.compress(b"a letter" * 100)):
        assert refusal(tmp_path, data) == "not-nifti"
    assert refusal(tmp_path, b"") == "empty-file"


@pytest.mark.parametrize(
    "fields, code",
    [
        ({"dim": [4, 5, 6, 7, 2, 1, 1, 1]}, "several-volumes"),
        ({"dim": [5, 5, 6, 7, 1, 3, 1, 1]}, "several-volumes"),
        ({"dim": [0, 5, 6, 7, 1, 1, 1, 1]}, "unreadable-nifti"),
        ({"dim": [9, 5, 6, 7, 1, 1, 1, 1]}, "unreadable-nifti"),
        ({"dim": [3, -5, 6, 7, 1, 1, 1, 1]}, "unreadable-nifti"),
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "too-large"),
        ({"dim": [3, 20000, 20000, 1, 1, 1, 1, 1]}, "too-large"),
        ({"dim": [3, 5, 6, 700, 1, 1, 1, 1]}, "truncated"),
        ({"dim": [3, 1000, 1000, 250, 1, 1, 1, 1]}, "truncated"),
        ({"vox_offset": 4096.0}, "truncated"),
        ({"vox_offset": 1e30}, "too-large"),
        ({"dim": [3, 1000, 1000, 300, 1, 1, 1, 1]}, "too-large"),
        ({"dim": [3, 1000, 1000, 130, 1, 1, 1, 1], "datatype": 64}, "truncated"),
        ({"vox_offset": np.nan}, "unreadable-nifti"),
        ({"vox_offset": 100.0}, "unreadable-nifti"),
        ({"datatype": 128}, "colour"),
        ({"datatype": 32}, "unsupported-pixels"),
        ({"datatype": 1536}, "unsupported-pixels"),
        ({"datatype": 12345}, "unsupported-pixels"),
        ({"sform_code": 0, "qform_code": 0}, "no-orientation"),
        ({"srow_x": [0, 0, 0, 0], "qform_code": 0}, "no-orientation"),
        ({"srow_x": [np.nan, 0, 0, 0], "qform_code": 0}, "no-orientation"),
        ({"srow_x": [0, 3, 0, 0], "qform_code": 0}, "no-orientation"),
        ({"scl_slope": 1.0, "scl_inter": np.inf}, "unreadable-nifti"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(
    tmp_path: Path, fields: dict[str, Any], code: str
) -> None:
    volume = damaged(made().to_bytes(), **fields)
    for data in (volume, gzip.compress(volume)):
        tracemalloc.start()
        try:
            assert refusal(tmp_path, data) == code
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()


def test_a_volume_cut_or_flipped_anywhere_is_refused(tmp_path: Path) -> None:
    whole = made().to_bytes()
    for end in (352, 353, len(whole) - 1):
        assert refusal(tmp_path, whole[:end]) == "truncated"
    packed = gzip.compress(made(np.random.default_rng(0).integers(0, 1000, (30, 30, 30), np.int16)).to_bytes())
    for end in (len(packed) // 2, len(packed) - 4):
        assert refusal(tmp_path, packed[:end]) == "truncated"
    flipped = bytearray(packed)
    flipped[-6] ^= 1
    assert refusal(tmp_path, bytes(flipped)) == "undecodable-pixels"


def test_a_gzip_bomb_is_inflated_no_further_than_its_header_says(tmp_path: Path) -> None:
    bomb = gzip.compress(made().to_bytes() + bytes(1 << 28), compresslevel=1)
    chosen = source(tmp_path, bomb)
    tracemalloc.start()
    try:
        assert len(found(chosen)) == 7
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_any_damage_to_the_header_ends_in_scans_or_one_refusal(tmp_path: Path) -> None:
    whole = made(anatomy() * 100).to_bytes()
    chosen = source(tmp_path, whole)
    files = list_files(chosen, SCHEMA)
    random = np.random.default_rng(1)
    codes = set()
    for _ in range(400):
        data = bytearray(whole)
        for place in random.integers(0, 352, 4):
            data[place] = random.integers(256)
        (tmp_path / "data" / "v.nii").write_bytes(bytes(data))
        results = list(read_files(chosen, files, context()))
        assert results
        codes |= {result.code for _, _, result in results if isinstance(result, ScanError)}
    assert {"not-nifti", "unreadable-nifti"} <= codes


@pytest.mark.parametrize("kind, bytes_", [(np.int16, 2), (np.float64, 4)])
def test_a_volume_is_held_once_whatever_plane_is_read(tmp_path: Path, kind: Any, bytes_: int) -> None:
    data = np.random.default_rng(0).integers(0, 1000, (128, 128, 256)).astype(kind)
    chosen = source(tmp_path, gzip.compress(made(data).to_bytes(), 1), plane="sagittal")
    files = list_files(chosen, SCHEMA)
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_files(chosen, files, context()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 128
    assert peak < data.size * bytes_ + (24 << 20)
