"""Scans with lines of text burned in, as modalities and film scanners write them: fonts, sizes, places, polarities."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from scanloom.scans.phantoms import phantom

Gray = npt.NDArray[np.uint8]
Ink = Literal["white", "black", "boxed", "gray"]
Place = Literal["top-left", "top-right", "bottom-left", "bottom-right", "centre", "left-edge"]

LINES = (
    "MUSTERMANN ERIKA",
    "Mustermann, Erika",
    "*12.08.1964 F",
    "ID 4711-0815",
    "2019-03-27 14:05",
    "St. Vincent Hospital",
    "CITY HOSPITAL",
    "DOE^JANE 057Y",
    "Ward 7, Dr. Weiss",
    "0049172381",
)
PLACES: tuple[Place, ...] = ("top-left", "top-right", "bottom-left", "bottom-right", "centre", "left-edge")
INKS: tuple[Ink, ...] = ("white", "black", "boxed", "gray")
FONTS = (
    "Pillow",
    "Pillow-bitmap",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSerif",
    "cmss10",
    "STIXGeneral",
)
"""Names for `Burned.font`."""


@dataclass(frozen=True)
class Burned:
    """What is drawn: `cap_px` is the height of a capital, `ink` is white, black, black on a white box, or gray."""

    text: str
    font: str
    cap_px: int
    ink: Ink = "white"
    place: Place = "top-left"
    upright: bool = False


@lru_cache(maxsize=1)
def font_files() -> dict[str, Path]:
    """Font files at hand by name: those that come with matplotlib and with the operating system."""
    folders = [Path("/usr/share/fonts")]
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin:
        folders.append(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf")
    return {path.stem: path for folder in folders for path in sorted(folder.rglob("*.ttf"))}


def fonts() -> tuple[str, ...]:
    """The fonts at hand: Pillow's outline and bitmap fonts always, the others where their files are."""
    return tuple(name for name in FONTS if name.startswith("Pillow") or name in font_files())


def line_image(text: str, font: str, cap_px: int) -> Gray:
    """Coverage 0 to 255 of a line of text cut to its ink, its capitals `cap_px` high."""
    if font == "Pillow-bitmap":
        return _enlarged(_drawn(text, ImageFont.load_default_imagefont()), cap_px)
    return _drawn(text, _sized(font, cap_px))


def _enlarged(mask: Gray, cap_px: int) -> Gray:
    """Pixel fonts grow by whole factors; the capitals of Pillow's are 6 px high."""
    factor = -(-cap_px // 6)
    return np.kron(mask, np.ones((factor, factor), dtype=np.uint8))


@lru_cache(maxsize=256)
def _sized(font: str, cap_px: int) -> ImageFont.FreeTypeFont:
    size = cap_px
    while _cap(_font(font, size)) < cap_px:
        size += 1
    return _font(font, size)


def _font(font: str, size: int) -> ImageFont.FreeTypeFont:
    made = ImageFont.load_default(size) if font == "Pillow" else ImageFont.truetype(font_files()[font], size)
    assert isinstance(made, ImageFont.FreeTypeFont)
    return made


def _cap(font: ImageFont.FreeTypeFont) -> int:
    _, top, _, bottom = font.getbbox("H")
    return int(bottom - top)


def _drawn(text: str, font: Any) -> Gray:
    _, _, right, bottom = font.getbbox(text)
    canvas = Image.new("L", (int(right) + 8, int(bottom) + 8))
    ImageDraw.Draw(canvas).text((2, 2), text, fill=255, font=font)
    ink = np.asarray(canvas)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def burn(pixels: npt.NDArray[Any], burned: Burned) -> npt.NDArray[Any] | None:
    """A copy of the scan (HxW u8 or u16) with the line on it; None where it has no room or could not be read."""
    mask = line_image(burned.text, burned.font, burned.cap_px)
    mask = np.rot90(mask) if burned.upright else mask
    corner = _corner(burned.place, pixels.shape, mask.shape, burned.cap_px)
    if corner is None:
        return None
    box = tuple(slice(start, start + side) for start, side in zip(corner, mask.shape, strict=True))
    made = pixels.copy()
    ink = _ink(made, box, burned)
    if ink is None:
        return None
    under = made[box].astype(np.float64)
    made[box] = np.rint(under + (ink - under) * (mask / 255.0)).astype(pixels.dtype)
    return made


def _ink(made: npt.NDArray[Any], box: Any, burned: Burned) -> float | None:
    """The value to draw with, at least a quarter of the scan's range away from what is under the line."""
    white = float(np.iinfo(made.dtype).max)
    pad = max(2, burned.cap_px // 4)
    wide = tuple(slice(max(0, s.start - pad), s.stop + pad) for s in box)
    if burned.ink == "boxed":
        made[wide] = white
        return 0.0
    low, high = np.percentile(made[wide], (2, 98))
    ink = {"white": white, "black": 0.0, "gray": float(high) + 0.35 * white}[burned.ink]
    clear = ink - high if burned.ink != "black" else low - ink
    return ink if clear >= 0.25 * white and ink <= white else None


def _corner(place: Place, shape: tuple[int, ...], size: tuple[int, ...], cap_px: int) -> tuple[int, int] | None:
    room = (shape[0] - size[0], shape[1] - size[1])
    if min(room) < 0:
        return None
    margin = min(max(3, cap_px // 2), *(max(0, side // 2) for side in room))
    low, right = room[0] - margin, room[1] - margin
    middle = (room[0] // 2, room[1] // 2)
    return {
        "top-left": (margin, margin),
        "top-right": (margin, right),
        "bottom-left": (low, margin),
        "bottom-right": (low, right),
        "centre": middle,
        "left-edge": (middle[0], 0),
    }[place]


def random_lines(size_px: int, count: int) -> list[npt.NDArray[np.uint8]]:
    """Phantoms with one white line each, of 12, 16 and 20 px in turn, wherever it has room: also over bright tissue."""
    place = np.random.default_rng(size_px)
    made = []
    for number in range(count):
        picture = Image.fromarray(phantom(0, number, size_px).pixels)
        at = int(place.integers(2, size_px // 4)), int(place.integers(2, size_px - 26))
        font = ImageFont.load_default((12, 16, 20)[number % 3])
        ImageDraw.Draw(picture).text(at, "DOE^JANE 1950-09-15", fill=255, font=font)
        made.append(np.asarray(picture))
    return made
