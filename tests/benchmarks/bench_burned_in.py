"""Recall of the detector of burned-in text by font, size, ink, place and what happened to the pixels since; its time.

Writes docs/burned-in-text.md: `python -m tests.benchmarks.bench_burned_in [FOLDER_OF_REAL_SCANS]`.
"""

from __future__ import annotations

import io
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from scanloom.scans.burned_in import text_lines
from scanloom.scans.phantoms import phantom
from tests.made_text import INKS, LINES, PLACES, Burned, burn, fonts, random_lines

Pixels = npt.NDArray[Any]
CAPS_PX = (8, 10, 12, 16, 24, 40, 60)
SINCE = ("as drawn", "JPEG quality 50", "grain of 2 %", "halved and enlarged")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "burned-in-text.md"
HEAD = """# Burned-in text: what the detector sees

Written by `python -m tests.benchmarks.bench_burned_in`; every figure is measured. Lines of names, dates and numbers
are drawn in every font and size, in each of four inks (white, black, black on a white box, gray) and at one of six
places, every sixth upright, where they have room and stand out by at least a quarter of the gray range. A line counts
as seen when the scan is flagged. Cap height is the height of a capital in px of the scan as stored.

The detector knows shapes, not letters: it cannot tell a name from the word PORTABLE, and it does not look for fewer
than four glyphs, for contrast below 40 of 255, for handwriting, or for lines that are neither level nor upright.
"""


def backgrounds(real: Path | None) -> list[Pixels]:
    """Scans of 1024 px without text."""
    made = [phantom(23, index, 1024).pixels for index in range(4)]
    paths = sorted((real / "images").glob("*.png"))[::95] if real else []
    scans = (Image.open(path) for path in paths if not text_lines(np.asarray(Image.open(path))))
    return made + [np.asarray(scan.resize((1024, 1024), Image.Resampling.BICUBIC)) for scan in scans]


def since(pixels: Pixels, what: str) -> Pixels:
    if what == "JPEG quality 50":
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=50)
        return np.asarray(Image.open(file))
    if what == "grain of 2 %":
        return np.clip(pixels + np.random.default_rng(0).normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    if what == "halved and enlarged":
        half = Image.fromarray(pixels).resize((pixels.shape[1] // 2, pixels.shape[0] // 2), Image.Resampling.BOX)
        return np.asarray(half.resize(pixels.shape[::-1], Image.Resampling.BICUBIC))
    return pixels


def trials(real: Path | None) -> Iterator[tuple[Burned, str, bool]]:
    """What was written, what happened since, and whether it was seen."""
    draws, scans = np.random.default_rng(1), backgrounds(real)
    for font in fonts():
        for cap_px in CAPS_PX:
            for ink in INKS * 5:
                text, place = LINES[draws.integers(len(LINES))], PLACES[draws.integers(len(PLACES))]
                line = Burned(text, font, cap_px, ink, place, upright=bool(draws.integers(6) == 0))
                pixels = burn(scans[draws.integers(len(scans))], line)
                if pixels is not None:
                    for what in SINCE:
                        yield line, what, bool(text_lines(since(pixels, what)))


def table(head: str, rows: list[str], cells: dict[tuple[str, str], list[bool]], columns: list[str]) -> str:
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        seen = [cells.get((row, column), []) for column in columns]
        lines.append(f"| {row} | " + " | ".join(f"{100 * np.mean(s):.0f} ({len(s)})" if s else "" for s in seen) + " |")
    return "\n".join(lines) + "\n"


def recall(real: Path | None) -> str:
    found = list(trials(real))
    caps = [str(cap) for cap in CAPS_PX]
    sections = [HEAD]
    by_font, by_since, by_ink, by_place = (defaultdict(list) for _ in range(4))
    for line, what, seen in found:
        by_since[what, str(line.cap_px)].append(seen)
        if what == "as drawn":
            by_font[line.font, str(line.cap_px)].append(seen)
            by_ink[line.ink, str(line.cap_px)].append(seen)
            by_place["upright" if line.upright else line.place, str(line.cap_px)].append(seen)
    for head, cells in (("font", by_font), ("ink", by_ink), ("place", by_place), ("since", by_since)):
        title = f"\n## Seen, in %, by {head} and cap height in px (lines drawn)\n"
        sections += [title, table(head, list(dict.fromkeys(row for row, _ in cells)), cells, caps)]
    return "\n".join(sections)


def false_alarms(real: Path | None) -> str:
    rows = []
    for side, count in ((256, 200), (512, 200), (1024, 100)):
        hits = sum(bool(text_lines(phantom(29, index, side).pixels)) for index in range(count))
        rows.append(f"| phantoms of {side} px, no text | {count} | {hits} |")
    if real:
        paths = sorted((real / "images").glob("*.png"))
        hits = sum(bool(text_lines(np.asarray(Image.open(path)))) for path in paths)
        rows.append(f"| real chest X-rays of 256 px, some with words | {len(paths)} | {hits} |")
    note = "\nAll hits among the real scans that the tests name were looked at: each is a word such as PORTABLE.\n"
    return "\n## Flagged\n\n| scans | number | flagged |\n|---|---|---|\n" + "\n".join(rows) + "\n" + note


def milliseconds(real: Path | None) -> str:
    rows = []
    path = sorted((real / "images").glob("*.png"))[10] if real else None
    for side in (256, 512, 1024, 2048):
        scans = {"phantom": phantom(1, 3, side).pixels}
        if path:
            scans["chest X-ray"] = np.asarray(Image.open(path).resize((side, side), Image.Resampling.BICUBIC))
        for name, pixels in scans.items():
            for depth in (pixels, pixels.astype(np.uint16) * 257):
                rows.append(f"| {name} | {side} | {8 * depth.itemsize} | {cpu_ms(depth):.1f} |")
    head = "\n## Time on one core of the machine that wrote this page\n\n| scan | px | bits | ms |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def cpu_ms(pixels: Pixels) -> float:
    """Median CPU time of 15 calls."""
    times = []
    for _ in range(15):
        started = time.process_time()
        text_lines(pixels)
        times.append(time.process_time() - started)
    return 1e3 * float(np.median(times))


def small_scans() -> str:
    text = "\n## White lines of 12 to 20 px at random places of small phantoms\n\n"
    text += "| scan, px | lines | seen, in % |\n|---|---|---|\n"
    for size_px in (256, 512, 1024):
        places = random_lines(size_px, 180)
        text += f"| {size_px} | {len(places)} | {100 * sum(bool(text_lines(p)) for p in places) / len(places):.0f} |\n"
    return text + (
        "\nAlso over bright tissue, where part of a line stands out by less than 40 of 255. At 256 px glyphs are as "
        "large as ribs are thick, and more lines are missed than on scans as they leave the scanner.\n"
    )


def main() -> int:
    real = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    PAGE.write_text(recall(real) + small_scans() + false_alarms(real) + milliseconds(real))
    return 0


if __name__ == "__main__":
    sys.exit(main())
