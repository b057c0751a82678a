"""Rates of the segmented template and of pydicom, for the same images; run by `make bench`.

The ratio is what must not rot: the rates are this machine's.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from pydicom import dcmwrite

from scanloom.dicom.synthetic import InstanceDescription, Pixels, build
from scanloom.dicom.template import render

PLAIN = InstanceDescription("0", "bench", "ab" * 32, "chest", "cd" * 32, 8, 0.143, "20000101", view="PA")
LEAST_RATIO = 10
Bits = Literal[8, 12, 16]
CASES: tuple[tuple[int, Bits], ...] = ((64, 8), (512, 8), (512, 16), (1024, 12))


def by_pydicom(pixels: Pixels, instance: InstanceDescription) -> bytes:
    file = io.BytesIO()
    dcmwrite(file, build(pixels, instance), enforce_file_format=True)
    return file.getvalue()


def rate(write: Callable[[Pixels, InstanceDescription], bytes], pixels: Pixels, images: int, bits: Bits) -> float:
    """Images per CPU-second, descriptions included."""
    started = time.process_time()
    for i in range(images):
        write(pixels, replace(PLAIN, image_id=f"{i:016x}", bits_stored=bits, age_years=float(i % 90), sex="F"))
    return images / (time.process_time() - started)


def main() -> int:
    least = float("inf")
    for side, bits in CASES:
        pixels = np.zeros((side, side), np.uint8 if bits == 8 else np.uint16)
        slow, fast = rate(by_pydicom, pixels, 100, bits), rate(render, pixels, 2000, bits)
        least = min(least, fast / slow)
        print(f"{side}x{side} {bits:2} bit: pydicom {slow:8.0f}/s  template {fast:8.0f}/s  x{fast / slow:.0f}")  # noqa: T201
    return 0 if least >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
