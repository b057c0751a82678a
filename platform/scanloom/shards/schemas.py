"""The columns of every kind of shard, as pyarrow schemas.

The image column is declared as an image feature for Hugging Face `datasets`, so that `load_dataset("parquet", ...)`
decodes it without being told.
"""

from __future__ import annotations

import json

import pyarrow as pa

from scanloom.attributes import AttributeSchema

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An encoded image (PNG, lossless, 8 or 16 bit grey) and the file name it would have."""

_IMAGE_FEATURE = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}).encode()}
_PIXELS = [
    pa.field("image", IMAGE),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("bits_stored", pa.int8()),
    pa.field("spacing_mm", pa.float32()),
]

QUARANTINE_SCHEMA = pa.schema(
    [
        ("unit", pa.int32()),
        ("unit_name", pa.string()),
        # The ordinal within the unit, never a file name: names can identify.
        ("member", pa.int32()),
        ("frame", pa.int32()),
        ("code", pa.string()),
        ("tag", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One row a refused scan: where it lies in its source (`frame` null: the file as a whole), and the typed reason."""


def corpus_schema(attributes: AttributeSchema) -> pa.Schema:
    """One row a curated scan: pseudonymous ids, pixels, attributes, and where in the source it came from.

    `window` says how values became pixels: black is `value_low` and white `value_high`, in `value_unit` (null where
    the source has pixels alone). `orientation`, `direction` and `position_mm` are as `scans.image.Geometry` has them,
    of the resized square. `repairs` names what was mended to read the file, `text_lines` counts the lines of text
    seen in the pixels (null: not looked for), `fingerprint` is perceptual. `unit`, `member` and `frame` are the
    ordinals of the unit in the source, of the file in its unit and of the frame in its file (null: it has but one).
    """
    columns = [
        pa.field("id", pa.string()),
        pa.field("patient", pa.string()),
        pa.field("study", pa.string()),
        *_PIXELS,
        pa.field("window", pa.string()),
        pa.field("value_low", pa.float32()),
        pa.field("value_high", pa.float32()),
        pa.field("value_unit", pa.string()),
        pa.field("orientation", pa.string()),
        pa.field("direction", pa.list_(pa.float32())),
        pa.field("position_mm", pa.list_(pa.float32())),
        pa.field("repairs", pa.list_(pa.string())),
        pa.field("text_lines", pa.int32()),
        pa.field("fingerprint", pa.binary(32)),
        pa.field("unit", pa.int32()),
        pa.field("member", pa.int32()),
        pa.field("frame", pa.int32()),
        *attributes.arrow_fields(),
    ]
    return pa.schema(columns, metadata=_IMAGE_FEATURE)


def latents_schema(attributes: AttributeSchema, latent_shape: tuple[int, int, int]) -> pa.Schema:
    """One row an encoded scan: the posterior's mean and log-variance, flattened from (channels, height, width)."""
    channels, height, width = latent_shape
    latent = pa.list_(pa.float16(), channels * height * width)
    columns = [pa.field("id", pa.string()), pa.field("mean", latent), pa.field("logvar", latent)]
    return pa.schema([*columns, *attributes.arrow_fields()])


def dataset_schema(attributes: AttributeSchema) -> pa.Schema:
    """One row a synthetic image: what was asked for, how it was made, and where its DICOM object lies.

    `dicom_offset` and `dicom_length` in bytes within `dicom_shard`, a key relative to the dataset; null without DICOM.
    """
    columns = [
        pa.field("id", pa.string()),
        pa.field("index", pa.int64()),
        *_PIXELS,
        *attributes.arrow_fields(),
        pa.field("seed", pa.int64()),
        pa.field("solver", pa.string()),
        pa.field("steps", pa.int32()),
        pa.field("guidance_scale", pa.float32()),
        pa.field("generator", pa.string()),
        pa.field("sop_instance_uid", pa.string()),
        pa.field("dicom_shard", pa.string()),
        pa.field("dicom_offset", pa.int64()),
        pa.field("dicom_length", pa.int64()),
    ]
    return pa.schema(columns, metadata=_IMAGE_FEATURE)
