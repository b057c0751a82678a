"""Answers read back by who reads them: pydicom and dciodvfy, pyarrow, a mail parser, an image viewer."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image as PilImage

from scanloom.attributes import Attributes
from scanloom.dicom.checks import dciodvfy, violations
from scanloom.dicom.encapsulated import UIDS
from scanloom.recipe_generate import Dicom
from scanloom.sampling.image_order import ImageOrder, MadeImages
from scanloom.shards.schemas import dataset_schema
from scanloom.shards.writer import image_pixels, png_bytes
from serve.catalogue import Offer, read_offer
from serve.config import ServedGenerator
from serve.pictures import Encoded, Pictures, encoded
from tests.tiny_generator import SCHEMA, SIZE, publish_generator

KNOWN: Attributes = {"sex": "F", "age": 50.0, "view": "PA", "findings": ("Effusion",)}
DIGEST = "ab" * 32
BITS: dict[int, Any] = {8: np.uint8, 12: np.uint16, 16: np.uint16}


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    uri = publish_generator(str(tmp_path_factory.mktemp("generator"))).uri
    return read_offer(ServedGenerator(name="tiny", uri=uri))


def pictures(offer: Offer, count: int = 1, dicom: Dicom | None = None, **changes: Any) -> Pictures:
    order = replace(
        ImageOrder("request-1", "tiny", KNOWN, seed=7, due=0.0, first_index=3, count=count, steps=4), **changes
    )
    levels = np.random.default_rng(1).integers(0, 2**order.bits_stored, (count, SIZE, SIZE))
    made = MadeImages(levels.astype(BITS[order.bits_stored]), list(range(count)), DIGEST)
    return Pictures(offer, order, dicom or Dicom(), made)


def parts(answer: Encoded) -> list[tuple[str, bytes]]:
    """Content type and content of each part, as a parser of mail reads them."""
    message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {answer.media_type}\r\n\r\n".encode() + answer.body)
    found = []
    for part in message.iter_parts():
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append((str(part["Content-Type"]), content))
    return found


@pytest.mark.parametrize("bits_stored", BITS)
def test_json_holds_the_pixels_as_png(offer: Offer, bits_stored: int) -> None:
    shown = pictures(offer, 3, bits_stored=bits_stored)
    told = json.loads(encoded(shown, "application/json").body)
    for place, image in enumerate(told["images"]):
        pixels = np.asarray(PilImage.open(io.BytesIO(base64.b64decode(image["png"]))))
        assert np.array_equal(pixels, shown.made.pixels[place])
        assert (image["index"], image["attempt"], image["bits_stored"]) == (3 + place, place, bits_stored)
    assert [image["id"] for image in told["images"]] == shown.ids()
    assert told["generator_digest"] == DIGEST


def test_a_png_is_byte_for_byte_that_of_a_dataset(offer: Offer) -> None:
    shown = pictures(offer)
    answer = encoded(shown, "image/png")
    assert answer.body == png_bytes(shown.made.pixels[0])
    assert answer.headers["X-Image-ID"] == shown.ids()[0]


@pytest.mark.parametrize("syntax", UIDS)
@pytest.mark.parametrize("sop_class, bits_stored", [("DX", 8), ("DX", 12), ("CT", 16), ("MR", 12)])
def test_dicom_may_be_handed_out_and_holds_the_pixels(
    offer: Offer, sop_class: Any, bits_stored: int, syntax: Any
) -> None:
    shown = pictures(offer, dicom=Dicom(sop_class=sop_class, transfer_syntax=syntax), bits_stored=bits_stored)
    file = encoded(shown, "application/dicom").body
    instance = pydicom.dcmread(io.BytesIO(file))
    assert violations(instance) == []
    assert dciodvfy(file).errors == ()
    assert np.array_equal(instance.pixel_array, shown.made.pixels[0])
    assert instance.PatientID == f"SYN-{shown.ids()[0]}"
    assert instance.file_meta.TransferSyntaxUID == UIDS[syntax]
    assert "findings Effusion" in instance.ImageComments
    assert instance.ContributingEquipmentSequence[0].ContributionDescription == f"plan {shown.digests()[0]}"


def test_a_multipart_answer_has_an_instance_a_part_each_of_its_own_patient(offer: Offer) -> None:
    shown = pictures(offer, 3, dicom=Dicom(transfer_syntax="rle"))
    answer = encoded(shown, "multipart/related")
    found = parts(answer)
    assert [kind.replace('"', "") for kind, _ in found] == [f"application/dicom; transfer-syntax={UIDS['rle']}"] * 3
    assert answer.media_type.startswith('multipart/related; type="application/dicom"; boundary=')
    instances = [pydicom.dcmread(io.BytesIO(content)) for _, content in found]
    for instance, pixels in zip(instances, shown.made.pixels, strict=True):
        assert np.array_equal(instance.pixel_array, pixels)
    for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        assert len({instance[keyword].value for instance in instances}) == 3


def test_the_same_request_makes_the_same_bytes_of_dicom_and_another_other_uids(offer: Offer) -> None:
    def uid(shown: Pictures) -> str:
        return str(pydicom.dcmread(io.BytesIO(encoded(shown, "application/dicom").body)).SOPInstanceUID)

    first = encoded(pictures(offer), "application/dicom").body
    assert encoded(pictures(offer, request="request-2"), "application/dicom").body == first
    assert uid(pictures(offer, seed=8)) != uid(pictures(offer))


@pytest.mark.parametrize("bits_stored", BITS)
def test_parquet_has_the_columns_of_a_dataset_and_a_row_an_image(offer: Offer, bits_stored: int) -> None:
    shown = pictures(offer, 4, bits_stored=bits_stored)
    table = pq.read_table(io.BytesIO(encoded(shown, "application/vnd.apache.parquet").body))
    expected = dataset_schema(SCHEMA, order=True)
    assert (table.schema.names, table.schema.metadata) == (expected.names, expected.metadata)
    rows = table.to_pylist()
    for place, row in enumerate(rows):
        assert np.array_equal(image_pixels(row), shown.made.pixels[place])
        assert SCHEMA.from_row(row) == KNOWN
        assert (row["index"], row["attempt"], row["seed"], row["steps"]) == (3 + place, place, 7, 4)
        assert (row["generator"], row["order"], row["dicom_shard"]) == (DIGEST, "request-1", None)
    assert [row["id"] for row in rows] == shown.ids()


def test_a_row_names_the_instance_that_the_same_request_gives_in_dicom(offer: Offer) -> None:
    shown = pictures(offer)
    [row] = pq.read_table(io.BytesIO(encoded(shown, "application/vnd.apache.parquet").body)).to_pylist()
    instance = pydicom.dcmread(io.BytesIO(encoded(shown, "application/dicom").body))
    assert row["sop_instance_uid"] == instance.SOPInstanceUID
    assert float(instance.PixelSpacing[0]) == pytest.approx(row["spacing_mm"])


def test_unknown_attributes_stay_unknown_in_every_format(offer: Offer) -> None:
    shown = pictures(offer, attributes=dict.fromkeys(SCHEMA.names))
    [row] = pq.read_table(io.BytesIO(encoded(shown, "application/vnd.apache.parquet").body)).to_pylist()
    assert {row[name] for name in SCHEMA.names} == {None}
    assert set(json.loads(encoded(shown, "application/json").body)["attributes"].values()) == {None}
    instance = pydicom.dcmread(io.BytesIO(encoded(shown, "application/dicom").body))
    assert (instance.PatientSex, instance.PatientAge, instance.ViewPosition) == ("", "", "")
