from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont

from scanloom.scans.burned_in import TextLine, text_lines
from scanloom.scans.phantoms import phantom
from tests.made_text import FONTS, INKS, LINES, PLACES, Burned, burn, fonts, random_lines

CAPS_PX = (8, 10, 12, 16, 24, 40, 60)
MOST_MISSED = 1
"""Of up to 24 lines of one font and size."""
NOISE = np.random.default_rng(7)


@lru_cache(maxsize=64)
def scan(index: int = 0, size_px: int = 1024) -> npt.NDArray[Any]:
    return phantom(11, index, size_px).pixels


def written(font: str, cap_px: int) -> Iterator[npt.NDArray[Any]]:
    """Lines of every ink at every place, a sixth of them upright, where they have room and can be read."""
    for number, (ink, place) in enumerate((i, p) for i in INKS for p in PLACES):
        line = Burned(LINES[number % len(LINES)], font, cap_px, ink, place, upright=number % 6 == 5)
        pixels = burn(scan(number % 3), line)
        if pixels is not None:
            yield pixels


@pytest.mark.parametrize("cap_px", CAPS_PX)
@pytest.mark.parametrize("font", FONTS)
def test_text_is_seen(font: str, cap_px: int) -> None:
    if font not in fonts():
        pytest.skip(f"font {font} is not installed")
    seen = [bool(text_lines(pixels)) for pixels in written(font, cap_px)]
    assert len(seen) >= 5
    assert seen.count(False) <= MOST_MISSED


@pytest.mark.parametrize("size_px, scans", [(256, 40), (512, 12), (1024, 4), (2048, 1)])
def test_a_scan_without_text_has_no_lines(size_px: int, scans: int) -> None:
    assert [text_lines(scan(index, size_px)) for index in range(scans)] == [()] * scans


@pytest.mark.slow
def test_anatomy_is_not_taken_for_text() -> None:
    assert sum(bool(text_lines(scan(index, size))) for size in (256, 512, 1024) for index in range(100)) <= 3


@pytest.mark.parametrize("text", ["L", "R", "AP", "LL"])
@pytest.mark.parametrize("cap_px", [12, 24, 60])
def test_a_side_marker_is_no_text(text: str, cap_px: int) -> None:
    for ink in INKS:
        pixels = burn(np.full((512, 512), 90, np.uint8), Burned(text, "Pillow", cap_px, ink))
        assert pixels is not None
        assert text_lines(pixels) == ()


def test_the_box_is_where_the_text_is() -> None:
    pixels = burn(np.zeros((512, 512), np.uint8), Burned("MUSTERMANN 1964", "Pillow", 16, "white", "centre"))
    assert pixels is not None
    rows, columns = np.nonzero(pixels)
    (line,) = text_lines(pixels)
    assert abs(line.top - rows.min()) <= 2
    assert abs(line.left - columns.min()) <= 2
    assert abs(line.top + line.height - rows.max()) <= 3
    assert abs(line.left + line.width - columns.max()) <= 3
    assert 11 <= line.glyphs <= 18


def test_upright_text_has_an_upright_box() -> None:
    pixels = burn(scan(), Burned("MUSTERMANN", "Pillow", 16, "white", "left-edge", upright=True))
    assert pixels is not None
    (line,) = text_lines(pixels)
    assert line.height > 3 * line.width


def test_two_lines_are_two_lines() -> None:
    pixels = burn(scan(), Burned("MUSTERMANN", "Pillow", 16, "white", "top-left"))
    assert pixels is not None
    pixels = burn(pixels, Burned("12.08.1964", "Pillow", 16, "white", "bottom-left"))
    assert pixels is not None
    first, second = text_lines(pixels)
    assert first.top < second.top


def test_twelve_bits_in_sixteen_are_seen_as_eight_are() -> None:
    pixels = burn(scan(), Burned("MUSTERMANN", "Pillow", 16))
    assert pixels is not None
    lines = text_lines(pixels)
    assert lines
    assert text_lines(pixels.astype(np.uint16) * 257) == lines
    assert text_lines(pixels.astype(np.uint16) * 16) == lines


def test_the_same_pixels_give_the_same_lines_whatever_their_layout() -> None:
    pixels = burn(scan(), Burned("MUSTERMANN", "Pillow", 16))
    assert pixels is not None
    assert text_lines(pixels) == text_lines(np.asfortranarray(pixels)) == text_lines(pixels.copy()) != ()


def row_of(shape: npt.NDArray[Any], count: int, step: int) -> npt.NDArray[Any]:
    pixels = np.full((256, 256), 40, np.uint8)
    for number in range(count):
        left = 20 + number * step
        pixels[100 : 100 + shape.shape[0], left : left + shape.shape[1]][shape > 0] = 220
    return pixels


def disc(radius: int) -> npt.NDArray[Any]:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x * x + y * y <= radius * radius, dtype=np.uint8)


def framed() -> npt.NDArray[Any]:
    pixels = scan()
    pixels[40:44, 40:-40] = pixels[-44:-40, 40:-40] = 255
    pixels[40:-40, 40:44] = pixels[40:-40, -44:-40] = 255
    return pixels


NO_TEXT: dict[str, npt.NDArray[Any]] = {
    "frame": framed(),
    "beads": row_of(disc(6), 12, 17),
    "blocks": row_of(np.ones((12, 12)), 12, 17),
    "noise": NOISE.integers(0, 256, (512, 512)).astype(np.uint8),
    "grain": np.clip(scan() + NOISE.normal(0, 12, (1024, 1024)), 0, 255).astype(np.uint8),
    "dots": np.where(NOISE.random((512, 512)) < 0.02, 255, scan(0, 512)).astype(np.uint8),
    "grid": np.asarray((np.indices((512, 512)) // 8).sum(axis=0) % 2 * 255, dtype=np.uint8),
    "stripes": np.tile(np.repeat(np.asarray([0, 255], np.uint8), 5), (300, 30)),
    "wires": np.maximum(scan(), np.eye(1024, dtype=np.uint8) * 255),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_drawn_but_not_written_is_no_text(name: str) -> None:
    assert text_lines(NO_TEXT[name]) == ()


@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 9), (1, 1), (1, 4000), (4000, 1), (31, 33), (33, 31), (37, 4000), (127, 65)]
)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_scans_of_any_size_are_read(shape: tuple[int, int], kind: type) -> None:
    noise: npt.NDArray[Any] = NOISE.integers(0, np.iinfo(kind).max, shape, endpoint=True).astype(kind)
    for pixels in (noise, np.zeros_like(noise)):
        assert isinstance(text_lines(pixels), tuple)


def test_a_page_of_text_is_read_whole() -> None:
    pixels = np.zeros((600, 600), np.uint8)
    for row in range(8):
        line = burn(np.zeros((70, 600), np.uint8), Burned(LINES[row], "Pillow", 16, "white", "top-left"))
        assert line is not None
        pixels[row * 70 : (row + 1) * 70] = line
    assert len(text_lines(pixels)) == 8


def test_real_scans_are_flagged_for_their_words_alone(nih_png: Path) -> None:
    # Each of these was looked at: PORTABLE, AP PORTABLE or PORT stands where the line is.
    true = {"00001373_010", "00001460_004", "00001986_007", "00002262_010", "00002576_008"}
    true |= {"00004533_020", "00005567_000", "00005567_002", "00006008_010", "00007256_004"}
    found = {
        path.stem for path in sorted((nih_png / "images").glob("*.png")) if text_lines(np.asarray(Image.open(path)))
    }
    assert found == true


def test_a_line_says_nothing_of_what_is_written() -> None:
    assert set(TextLine.__slots__) == {"top", "left", "height", "width", "glyphs"}


@pytest.mark.parametrize("size_px, least", [(256, 0.7), (512, 0.95)])
def test_white_lines_at_random_places_of_small_scans_are_seen(size_px: int, least: float) -> None:
    """Fewer at 256 px, where glyphs are as large as ribs are thick."""
    places = random_lines(size_px, 60)
    assert sum(bool(text_lines(place)) for place in places) >= least * len(places)


def test_a_line_in_a_scan_of_forty_million_pixels_is_found_where_it_stands() -> None:
    pixels = np.zeros((6400, 6400), np.uint8)
    picture = Image.fromarray(pixels)
    ImageDraw.Draw(picture).text((4000, 3000), "DOE^JANE 1950-09-15", fill=230, font=ImageFont.load_default(80))
    (line,) = text_lines(np.asarray(picture))
    assert 2950 < line.top < 3080
    assert 3950 < line.left < 4050
