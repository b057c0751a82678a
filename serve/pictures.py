"""Made images in the formats that clients ask for. It computes: call it in a thread.

A PNG is byte for byte the one that a dataset's row has, a Parquet file has the columns of a dataset, a DICOM file says
what a dataset's says, with a digest of the request in the place of a plan's.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from scanloom.api import Image, ImagesAnswer
from scanloom.attributes import AttributeSchema
from scanloom.dicom.encapsulated import UIDS
from scanloom.dicom.synthetic import InstanceDescription, instance_uid
from scanloom.dicom.template import render
from scanloom.errors import ArtefactError
from scanloom.recipe_generate import Dicom
from scanloom.sampling.dataset import describe_instance
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.shards.schemas import dataset_schema
from scanloom.shards.writer import parquet_bytes, png_bytes
from serve.accept import MediaType, chosen, media_type
from serve.catalogue import Offer
from serve.problem import Refusal, invalid

JSON, PNG, PARQUET = "application/json", "image/png", "application/vnd.apache.parquet"
DICOM, MULTIPART = "application/dicom", "multipart/related"
ON_DEMAND = "on-demand"
"""What images made for a request say in the place of a dataset's name."""
_ID_DIGITS = 16


@dataclass(frozen=True)
class Pictures:
    """The images of an order, to be encoded."""

    offer: Offer
    order: ImageOrder
    dicom: Dicom
    made: MadeImages

    def __len__(self) -> int:
        return len(self.made.pixels)

    def digests(self) -> list[str]:
        """What names each image: see `Offer.image_digest`."""
        made = self.made
        return [self.offer.image_digest(self.order, place, made.digest, made.gate) for place in range(len(self))]

    def ids(self) -> list[str]:
        return [digest[:_ID_DIGITS] for digest in self.digests()]


@dataclass(frozen=True)
class Encoded:
    """A body, its media type with parameters, and the headers that belong to it."""

    body: bytes = field(repr=False)
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)


def format_of(accept: str | None, count: int, dicom: Dicom) -> str:
    """The media type of an answer: JSON unless the Accept header likes another better.

    Raises Refusal where it takes none that can hold `count` images.
    """
    offers = [_offered(text) for text in _offers(count, dicom)]
    found = chosen(accept, offers)
    if found is None:
        raise Refusal("unacceptable", f"Accept takes none of what {count} images come as: {', '.join(FORMATS)}{_ALONE}")
    return found.name


def require_describable(offer: Offer, order: ImageOrder, dicom: Dicom) -> None:
    """Raise Refusal of the field `dicom` where DICOM cannot hold what an order asks for, before its images are made."""
    try:
        _description(offer, order, dicom, offer.image_digest(order, 0, offer.digest, offer.gate), offer.digest)
    except ArtefactError as error:
        raise invalid("dicom", str(error)) from error


def encoded(pictures: Pictures, media_type: str) -> Encoded:
    """The images in one of FORMATS, by its media type without parameters."""
    return FORMATS[media_type](pictures)


def _json(pictures: Pictures) -> Encoded:
    order, made = pictures.order, pictures.made
    height, width = made.pixels.shape[1:]
    images = [
        Image(
            id=image_id,
            index=order.first_index + place,
            attempt=made.attempts[place],
            width=width,
            height=height,
            bits_stored=order.bits_stored,
            png=base64.b64encode(png_bytes(pixels)).decode(),
        )
        for place, (image_id, pixels) in enumerate(zip(pictures.ids(), made.pixels, strict=True))
    ]
    answer = ImagesAnswer(
        request=order.request,
        generator=order.generator,
        generator_digest=made.digest,
        attributes=order.attributes,
        seed=order.seed,
        steps=order.steps,
        guidance_scale=order.guidance_scale,
        gate=made.gate,
        images=images,
    )
    return Encoded(answer.model_dump_json().encode(), JSON)


def _png(pictures: Pictures) -> Encoded:
    [pixels], [image_id] = pictures.made.pixels, pictures.ids()
    return Encoded(png_bytes(pixels), PNG, {"X-Image-ID": image_id})


def _dicom(pictures: Pictures) -> Encoded:
    [file], [image_id] = _instances(pictures), pictures.ids()
    return Encoded(file, DICOM, {"X-Image-ID": image_id})


def _multipart(pictures: Pictures) -> Encoded:
    """RFC 2387, as DICOMweb has it (PS3.18 8.6.1.2)."""
    # Of no meaning to anyone and in no part: a line of it would have to be met by chance.
    boundary = uuid.uuid4().hex
    head = f"--{boundary}\r\nContent-Type: {DICOM}; transfer-syntax={_syntax(pictures.dicom)}\r\n\r\n".encode()
    parts = [piece for file in _instances(pictures) for piece in (head, file, b"\r\n")]
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return Encoded(body, f'{MULTIPART}; type="{DICOM}"; boundary="{boundary}"')


def _parquet(pictures: Pictures) -> Encoded:
    schema = dataset_schema(pictures.offer.card.attributes, order=True)
    table = pa.Table.from_pylist(list(_rows(pictures)), schema=schema)
    return Encoded(parquet_bytes(table, stored=("image.bytes",)), PARQUET)


FORMATS: Mapping[str, Callable[[Pictures], Encoded]] = {
    JSON: _json, PNG: _png, MULTIPART: _multipart, DICOM: _dicom, PARQUET: _parquet,
}  # fmt: skip
"""Every media type that images come as -> what encodes them."""
SINGLE = frozenset({PNG, DICOM})
"""Those that hold one image."""
_ALONE = f" ({', '.join(sorted(SINGLE))} where count is 1)"


def _offers(count: int, dicom: Dicom) -> list[str]:
    syntax = f"transfer-syntax={_syntax(dicom)}"
    told = {MULTIPART: f'{MULTIPART}; type="{DICOM}"; {syntax}', DICOM: f"{DICOM}; {syntax}"}
    return [told.get(name, name) for name in FORMATS if count == 1 or name not in SINGLE]


def _offered(text: str) -> MediaType:
    found = media_type(text)
    assert found is not None
    return found


def _syntax(dicom: Dicom) -> str:
    return str(UIDS[dicom.transfer_syntax])


def _instances(pictures: Pictures) -> Iterator[bytes]:
    for digest, pixels in zip(pictures.digests(), pictures.made.pixels, strict=True):
        yield render(pixels, _description(pictures.offer, pictures.order, pictures.dicom, digest, pictures.made.digest))


@dataclass(frozen=True)
class _Origin:
    """What an image of a request says of where it comes from; `digest` is the image's own."""

    digest: str
    generator: str
    generator_name: str
    attributes: AttributeSchema
    bits_stored: Literal[8, 12, 16]
    spacing_mm: float
    dicom: Dicom
    dataset: str = ON_DEMAND


def _description(
    offer: Offer, order: ImageOrder, dicom: Dicom, digest: str, generator_digest: str
) -> InstanceDescription:
    origin = _Origin(
        digest,
        generator_digest,
        offer.generator_name,
        offer.card.attributes,
        order.bits_stored,
        dicom.pixel_spacing_mm or offer.spacing_mm,
        dicom,
    )
    return describe_instance(origin, digest[:_ID_DIGITS], order.attributes)


def _rows(pictures: Pictures) -> Iterator[dict[str, Any]]:
    offer, order, made = pictures.offer, pictures.order, pictures.made
    height, width = made.pixels.shape[1:]
    digests: Sequence[str] = pictures.digests()
    for place, (digest, pixels) in enumerate(zip(digests, made.pixels, strict=True)):
        image_id = digest[:_ID_DIGITS]
        yield {
            **order.attributes,
            "id": image_id, "index": order.first_index + place,
            "image": {"bytes": png_bytes(pixels), "path": f"{image_id}.png"},
            "width": width, "height": height, "bits_stored": order.bits_stored,
            "spacing_mm": pictures.dicom.pixel_spacing_mm or offer.spacing_mm,
            "seed": order.seed, "attempt": made.attempts[place], "solver": offer.served.solver,
            "steps": order.steps, "guidance_scale": order.guidance_scale, "generator": made.digest,
            "sop_instance_uid": instance_uid(digest, image_id, "instance"), "order": order.request,
        }  # fmt: skip
