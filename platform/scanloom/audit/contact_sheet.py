"""Contact sheet: real beside synthetic, one row a cell, each picture captioned with its attributes; or real alone."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from scanloom.attributes import Attributes, describe

_MARGIN, _GAP, _GUTTER = 16, 8, 28
_TITLE_PX, _HEADING_PX, _CAPTION_PX = 22, 17, 12
_LABEL_WIDTH = 150
_PAPER, _INK, _FAINT = "white", "black", "#666666"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """One picture: HxW u8 or u16 with `bits_stored` significant bits."""

    pixels: npt.NDArray[Any]
    attributes: Attributes
    bits_stored: int = 8


@dataclass(frozen=True)
class SheetRow:
    """One cell of the cohort, e.g. `Cardiomegaly`; `note` is a second line below its name."""

    cell: str
    real: Sequence[Tile]
    synthetic: Sequence[Tile]
    note: str = ""


def contact_sheet(title: str, rows: Sequence[SheetRow], *, tile_px: int = 128) -> bytes:
    """The sheet as PNG bytes: a title, a column of cell names, then real and synthetic pictures side by side.

    Without names there is no column of them, and without synthetic pictures no side for them.
    """
    layout = _Layout(
        tile_px=tile_px,
        title_width=math.ceil(_font(_TITLE_PX).getlength(title)),
        label_width=_LABEL_WIDTH if any(row.cell or row.note for row in rows) else 0,
        real=max((len(row.real) for row in rows), default=0),
        synthetic=max((len(row.synthetic) for row in rows), default=0),
        rows=len(rows),
        caption_lines=max((len(_caption(t, tile_px)) for row in rows for t in (*row.real, *row.synthetic)), default=1),
    )
    sheet = Image.new("RGB", layout.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font(_TITLE_PX))
    if layout.synthetic:
        for name, column in (("real", 0), ("synthetic", layout.real)):
            draw.text((layout.left(column), layout.headings), name, fill=_INK, font=_font(_HEADING_PX))
        line = layout.left(layout.real) - (_GUTTER + _GAP) // 2
        draw.line((line, layout.headings, line, layout.size[1] - _MARGIN), fill=_FAINT, width=1)
    for number, row in enumerate(rows):
        _draw_row(sheet, draw, layout, number, row)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Layout:
    tile_px: int
    title_width: int
    label_width: int
    real: int
    synthetic: int
    rows: int
    caption_lines: int

    @property
    def headings(self) -> int:
        return _MARGIN + _TITLE_PX + 14

    @property
    def pitch(self) -> int:
        """Height of a row: the picture and its caption."""
        return self.tile_px + self.caption_lines * (_CAPTION_PX + 3) + 10

    @property
    def size(self) -> tuple[int, int]:
        width = max(self.left(self.real + self.synthetic) - _GAP, _MARGIN + self.title_width)
        return width + _MARGIN, self.top(self.rows) + _MARGIN

    def left(self, column: int) -> int:
        gutter = _GUTTER if self.synthetic and column >= self.real else 0
        return _MARGIN + self.label_width + column * (self.tile_px + _GAP) + gutter

    def top(self, row: int) -> int:
        return self.headings + (_HEADING_PX + 10 if self.synthetic else 0) + row * self.pitch


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, layout: _Layout, number: int, row: SheetRow) -> None:
    top = layout.top(number)
    names = _wrapped(row.cell, _LABEL_WIDTH - _GAP, _font(_HEADING_PX), lines=3)
    draw.multiline_text((_MARGIN, top), "\n".join(names), fill=_INK, font=_font(_HEADING_PX))
    notes = "\n".join(_wrapped(row.note, _LABEL_WIDTH - _GAP, _font(_CAPTION_PX), lines=3))
    below = top + len(names) * (_HEADING_PX + 5) + 2
    draw.multiline_text((_MARGIN, below), notes, fill=_FAINT, font=_font(_CAPTION_PX))
    for first, tiles in ((0, row.real), (layout.real, row.synthetic)):
        for column, tile in enumerate(tiles, start=first):
            left = layout.left(column)
            sheet.paste(_picture(tile, layout.tile_px), (left, top))
            caption = "\n".join(_caption(tile, layout.tile_px))
            draw.multiline_text(
                (left, top + layout.tile_px + 2), caption, fill=_INK, font=_font(_CAPTION_PX), spacing=2
            )


def _caption(tile: Tile, tile_px: int) -> list[str]:
    return _wrapped(describe(tile.attributes), tile_px, _font(_CAPTION_PX), lines=3)


def _picture(tile: Tile, tile_px: int) -> Image.Image:
    levels = np.asarray(tile.pixels, dtype=np.float32) * (255.0 / ((1 << tile.bits_stored) - 1))
    grey = Image.fromarray(np.clip(levels + 0.5, 0, 255).astype(np.uint8))
    height, width = tile.pixels.shape
    scale = tile_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    square = Image.new("L", (tile_px, tile_px))
    square.paste(grey.resize(size, Image.Resampling.BICUBIC), ((tile_px - size[0]) // 2, (tile_px - size[1]) // 2))
    return square.convert("RGB")


def _font(size_px: int) -> Font:
    return ImageFont.load_default(size_px)


def _wrapped(text: str, width_px: int, font: Font, *, lines: int) -> list[str]:
    """`text` broken at spaces and after `+` into at most `lines` lines of `width_px`, the last one shortened."""
    words = text.replace("+", "+ ").split(" ")
    out = [words[0]]
    for before, word in itertools.pairwise(words):
        longer = out[-1] + ("" if before.endswith("+") else " ") + word
        if font.getlength(longer) <= width_px:
            out[-1] = longer
        else:
            out.append(word)
    if len(out) > lines:
        out = [*out[: lines - 1], out[lines - 1] + "…"]
    return [_shortened(line, width_px, font) for line in out]


def _shortened(line: str, width_px: int, font: Font) -> str:
    while font.getlength(line) > width_px and len(line) > 2:
        line = line.rstrip("…")[:-1] + "…"
    return line
