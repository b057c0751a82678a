"""The image of a PNG, JPEG or TIFF file."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TiffImageFile

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.colour import Colour, gray_of_colour
from scanloom.scans.image import Pixels, ScanImage
from scanloom.scans.image_pixel import MAX_PIXELS
from scanloom.scans.quarantine import reject


def file_image(data: bytes, rules: Decode) -> ScanImage:
    """Pixels as the file has them: windows are for values, and such files have none.

    Raises ScanError: empty-file, not-an-image-file, too-large, several-pages, colour, unsupported-pixels, truncated,
    undecodable-pixels, blank-image.
    """
    if not data:
        raise reject("empty-file")
    pixels = _pixels(data, rules.colour)
    if pixels.min() == pixels.max():
        raise reject("blank-image")
    return ScanImage(pixels)


def _pixels(data: bytes, colour: Colour) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise reject("too-large")
            # Counting the pages of a TIFF walks through all of them.
            if getattr(image, "is_animated", False):
                raise reject("several-pages")
            return _gray(image, colour)
    except ScanError:
        raise
    except UnidentifiedImageError:
        raise reject("not-an-image-file") from None
    except Image.DecompressionBombError:
        raise reject("too-large") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders meet junk with any exception
        # Pillow has no type for it; "Truncated File Read" is its TIFF reader.
        raise reject("truncated" if "truncated" in str(error).lower() else "undecodable-pixels") from None


def _white_is_zero(image: Image.Image) -> bool:
    return isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def _gray(image: Image.Image, colour: Colour) -> Pixels:
    if image.mode in ("L", "LA"):
        return np.asarray(image.getchannel(0))
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
        # Of 16 bits, Pillow leaves it to the caller that in some TIFF files 0 is white; of 8 it does not.
        return ~values if _white_is_zero(image) else values
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if image.mode in ("RGB", "RGBA", "P", "YCbCr"):
        return gray_of_colour(np.asarray(image.convert("RGB")), "RGB", 8, colour)
    raise reject("colour" if image.mode in ("CMYK", "LAB", "HSV") else "unsupported-pixels")
