"""Images at once: the call, and its result in the forms that Python has for images."""

from __future__ import annotations

import base64
import functools
import io
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scanloom.api import BitsStored, ImagesAnswer, ImagesRequest, Priority
from scanloom.client.flow import Flow, Reply
from scanloom.client.session import JSON, Session, checked, post
from scanloom.errors import RecipeError
from scanloom.recipe_generate import Dicom

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import pyarrow as pa
    import pydicom
    from numpy.typing import NDArray

Format = Literal["png", "dicom", "parquet"]
ACCEPT: Mapping[Format, str] = {
    "png": JSON,
    "dicom": 'multipart/related; type="application/dicom"',
    "parquet": "application/vnd.apache.parquet",
}
"""What is asked for, by the format of the images."""
_LATE_S = 15.0
"""After a request's deadline in which its answer may still come."""
_SUFFIXES: Mapping[Format, str] = {"png": "png", "dicom": "dcm", "parquet": "parquet"}


@dataclass(frozen=True)
class Images:
    """What the service made. The same `seed`, index, attributes and settings give the same images at any time."""

    request: str
    """Id of the request, for whoever runs the service."""
    generator: str
    generator_digest: str
    seed: int
    first_index: int
    gate: str
    """Digest of the privacy gate that every image passed; `ungated`: nothing looked for copies of training scans."""
    format: Format
    files: Sequence[bytes] = field(repr=False)
    """As they came: a PNG or a DICOM file each, or one Parquet file."""
    answer: ImagesAnswer | None = field(default=None, repr=False)
    """All that the service said; with format png."""

    def pil(self) -> list[PIL.Image.Image]:
        """As Pillow has them: mode L for 8 bits stored, I;16 for more."""
        from PIL import Image

        if self.format == "png":
            return [Image.open(io.BytesIO(file)) for file in self.files]
        return [Image.fromarray(pixels) for pixels in self.numpy()]

    def numpy(self) -> NDArray[np.uint8 | np.uint16]:
        """Pixels, shape [N, H, W], uint8 for 8 bits stored, uint16 for more."""
        import numpy as np

        from scanloom.shards.writer import image_pixels, png_pixels

        if self.format == "png":
            return np.stack([png_pixels(file) for file in self.files])
        if self.format == "dicom":
            return np.stack([instance.pixel_array for instance in self.dicom()])
        return np.stack([image_pixels(row) for row in self.table().to_pylist()])

    def dicom(self) -> list[pydicom.Dataset]:
        """As DICOM instances. RecipeError unless they were asked for with format="dicom"."""
        self._require("dicom")
        import pydicom

        return [pydicom.dcmread(io.BytesIO(file)) for file in self.files]

    def table(self) -> pa.Table:
        """As a table with the columns of a dataset. RecipeError unless asked for with format="parquet"."""
        self._require("parquet")
        import pyarrow.parquet as pq

        return pq.read_table(io.BytesIO(self.files[0]))

    def save(self, folder: str | Path) -> list[Path]:
        """Write the files as they came into a folder, by generator, seed and index; where they are."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        written = []
        for index, file in enumerate(self.files, self.first_index):
            written.append(place / f"{self.generator}-{self.seed}-{index}.{_SUFFIXES[self.format]}")
            written[-1].write_bytes(file)
        return written

    def _require(self, wanted: Format) -> None:
        if self.format != wanted:
            raise RecipeError(f"these images came as {self.format}; ask for them with format={wanted!r}")


def generate(
    session: Session,
    attributes: Mapping[str, Any] | None = None,
    *,
    count: int = 1,
    seed: int | None = None,
    first_index: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    generator: str | None = None,
    size_px: tuple[int, int] | None = None,
    bits_stored: BitsStored | None = None,
    format: Format = "png",
    dicom: Dicom | Mapping[str, Any] | None = None,
    deadline_s: float | None = None,
    priority: Priority | None = None,
) -> Flow[Images]:
    """Make `count` images with these attributes, and wait for them.

    An attribute that is left out is unknown. Without a seed one is drawn here, so that a retry gives the same images;
    the result tells it. Settings that are None are the service's. `size_px` is height and width.

    Raises RequestRefused for what cannot be made, with the fields at fault and what the generator was trained on;
    NotAllowed, Busy or ServiceDown.
    """
    seed = secrets.randbits(63) if seed is None else seed
    body = checked(
        ImagesRequest, attributes=attributes, count=count, seed=seed, first_index=first_index, steps=steps,
        guidance_scale=guidance_scale, generator=generator, size_px=size_px, bits_stored=bits_stored, dicom=dicom,
        deadline_s=deadline_s, priority=priority,
    )  # fmt: skip
    silence_s = session.patience_s if deadline_s is None else deadline_s + _LATE_S
    parse = functools.partial(_images, body, format)
    return (yield from post(session, "/v1/images", body, parse, {"Accept": ACCEPT[format]}, silence_s))


def _images(asked: ImagesRequest, format: Format, reply: Reply) -> Images:
    """The images of a reply. ValueError where it is damaged or of another kind."""
    answer = ImagesAnswer.model_validate_json(reply.body) if format == "png" else None
    if answer is not None:
        files = [base64.b64decode(image.png, validate=True) for image in answer.images]
    else:
        files = parts(reply) if format == "dicom" else [_parquet(reply)]
    if format != "parquet" and len(files) != asked.count:
        raise ValueError(f"{len(files)} images of {asked.count}")
    told = reply.headers
    return Images(
        request=told.get("x-request-id", ""),
        generator=answer.generator if answer else told.get("x-generator", ""),
        generator_digest=answer.generator_digest if answer else told.get("x-generator-digest", ""),
        seed=asked.seed or 0,
        first_index=asked.first_index,
        gate=answer.gate if answer else told.get("x-gate", ""),
        format=format,
        files=files,
        answer=answer,
    )


def parts(reply: Reply) -> list[bytes]:
    """The parts of a multipart/related body (RFC 2046, 2387). ValueError where it is another, or cut."""
    message = Message()
    message["Content-Type"] = reply.headers.get("content-type", "")
    boundary = message.get_boundary()
    if message.get_content_type() != "multipart/related" or not boundary:
        raise ValueError("no multipart/related")
    pieces = (b"\r\n" + reply.body).split(b"\r\n--" + boundary.encode("latin-1", "replace"))
    if not pieces[-1].startswith(b"--"):
        raise ValueError("the last boundary is missing")
    return [piece.partition(b"\r\n\r\n")[2] for piece in pieces[1:-1]]


def _parquet(reply: Reply) -> bytes:
    # Parquet files begin and end so; a cut one is told by its end.
    if not (reply.body.startswith(b"PAR1") and reply.body.endswith(b"PAR1")):
        raise ValueError("no whole Parquet file")
    return reply.body
