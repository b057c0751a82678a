"""The contact sheet shows each picture where its row and side say, unclipped and captioned."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from scanloom.attributes import Value
from scanloom.audit.contact_sheet import SheetRow, Tile, contact_sheet
from scanloom.scans.phantoms import phantom

NORMAL: dict[str, Value] = {"sex": "F", "age": 63.0, "view": "PA", "findings": ()}


def _flat(level: int, bits_stored: int = 8) -> Tile:
    kind = np.uint8 if bits_stored == 8 else np.uint16
    return Tile(np.full((64, 64), level, kind), NORMAL, bits_stored)


def _open(png: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _area(sheet: npt.NDArray[np.uint8], level: int) -> tuple[int, int, int]:
    """Size of the picture of exactly this grey, its leftmost column and topmost row."""
    here = (sheet == level).all(axis=2)
    # The rims of letters have every grey: a picture's rows and columns have it many times.
    rows, columns = np.flatnonzero(here.sum(axis=1) > 50), np.flatnonzero(here.sum(axis=0) > 50)
    return len(rows) * len(columns), int(columns.min()), int(rows.min())


def test_real_pictures_lie_left_of_synthetic_ones_and_rows_in_their_order() -> None:
    rows = [SheetRow("normal", [_flat(40)], [_flat(80)]), SheetRow("Cardiomegaly", [_flat(120)], [_flat(160)])]
    sheet = _open(contact_sheet("a title", rows))
    areas = {level: _area(sheet, level) for level in (40, 80, 120, 160)}
    assert all(area >= 120 * 120 for area, _, _ in areas.values())
    assert areas[40][1] < areas[80][1]
    assert areas[120][1] < areas[160][1]
    assert areas[40][2] == areas[80][2] < areas[120][2] == areas[160][2]


def test_a_sixteen_bit_picture_is_shown_by_its_stored_bits_and_not_clipped() -> None:
    sheet = _open(contact_sheet("t", [SheetRow("c", [_flat(1024, 12)], [_flat(32896, 16)])]))
    assert _area(sheet, 64)[0] == _area(sheet, 128)[0] == 128 * 128


def test_two_cells_with_different_attributes_get_different_captions() -> None:
    def row(findings: tuple[str, ...]) -> SheetRow:
        return SheetRow("cell", [Tile(_flat(40).pixels, {**NORMAL, "findings": findings})], [])

    one = contact_sheet("t", [row(("Cardiomegaly",))])
    assert one != contact_sheet("t", [row(("Effusion",))])
    assert one == contact_sheet("t", [row(("Cardiomegaly",))])


def test_long_captions_make_room_for_themselves_below_the_pictures() -> None:
    many = {**NORMAL, "findings": ("Cardiomegaly", "Consolidation", "Pneumothorax")}
    short = _open(contact_sheet("t", [SheetRow("c", [_flat(40)], [_flat(40)])]))
    long = _open(contact_sheet("t", [SheetRow("c", [Tile(_flat(40).pixels, many)], [_flat(40)])]))
    assert long.shape[0] > short.shape[0]
    assert long.shape[1] == short.shape[1]


def test_a_cell_without_synthetic_pictures_and_a_picture_that_is_not_square_still_make_a_sheet() -> None:
    tall = Tile(np.full((64, 32), 40, np.uint8), NORMAL)
    sheet = _open(contact_sheet("t", [SheetRow("c", [tall], [])]))
    assert 128 * 60 < _area(sheet, 40)[0] < 128 * 68


def test_the_picture_on_the_sheet_is_the_phantom_that_was_given() -> None:
    scan = phantom(0, 1, 64)
    sheet = _open(contact_sheet("t", [SheetRow("c", [Tile(scan.pixels, scan.attributes)], [])]))
    grey = sheet[:, :, 0].astype(np.float32)
    expected = np.asarray(Image.fromarray(scan.pixels).resize((128, 128), Image.Resampling.BICUBIC), np.float32)
    rows, columns = (np.arange(size - 128 + 1) for size in grey.shape)
    misses = [np.abs(grey[r : r + 128, c : c + 128] - expected).mean() for r in rows for c in columns]
    assert min(misses) < 1.0


def test_real_pictures_alone_have_no_other_side_and_no_room_for_names() -> None:
    both = _open(contact_sheet("t", [SheetRow("cell", [_flat(40)], [_flat(80)])]))
    alone = _open(contact_sheet("t", [SheetRow("", [_flat(40)] * 3, [])] * 2))
    assert _area(alone, 40)[1] < _area(both, 40)[1]
    # Three pictures and their gaps, and no line of headings above them.
    assert alone.shape[1] < 3 * 128 + 100
    assert _area(alone, 40)[2] < _area(both, 40)[2]


def test_a_title_is_never_cut() -> None:
    title = "a title that is a good deal wider than the one picture below it"
    wide = _open(contact_sheet(title, [SheetRow("", [_flat(40)], [])]))
    assert (wide[:, -12:] == 255).all()
    assert wide.shape[1] > _open(contact_sheet("t", [SheetRow("", [_flat(40)], [])])).shape[1]
