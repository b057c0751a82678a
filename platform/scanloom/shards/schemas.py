"""The columns of every kind of shard, as pyarrow schemas.

The image column is declared as an image feature for Hugging Face `datasets`, so that `load_dataset("parquet", ...)`
decodes it without being told.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scanloom.attributes import AttributeSchema
from scanloom.recipe_generate import ImageFormat

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""An encoded image (lossless, 8 or 16 bit grey) and the file name it would have, which tells its format."""

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


PROMPTS = "prompts"
"""The folder of a latents artefact that holds the embeddings of its distinct prompts."""
SHAPE = b"shape"
"""Key of a column's metadata: the shape of each of its flattened arrays, as in `77,768`."""


def latents_schema(
    attributes: AttributeSchema, latent_shape: tuple[int, int, int], *, prompts: bool = False
) -> pa.Schema:
    """One row an encoded view of a scan: the posterior's mean and log-variance.

    Both are flattened from (channels, height, width). With `prompts` a row also names the hash of its text.
    """
    columns = [pa.field("id", pa.string()), _flattened("mean", latent_shape), _flattened("logvar", latent_shape)]
    named = [pa.field("prompt", pa.string())] if prompts else []
    return pa.schema([*columns, *named, *attributes.arrow_fields()])


def prompts_schema(tokens_shape: tuple[int, int], pooled_width: int | None) -> pa.Schema:
    """One row a distinct prompt: its hash (see `prompt_hash`), its text and its embeddings, tokens flattened."""
    columns = [pa.field("hash", pa.string()), pa.field("text", pa.string()), _flattened("tokens", tokens_shape)]
    return pa.schema(columns if pooled_width is None else [*columns, _flattened("pooled", (pooled_width,))])


def prompt_hash(text: str) -> str:
    """By what rows name a prompt: SHA-256 of its UTF-8 text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def flattened(values: NDArray[np.float16]) -> pa.Array:
    """Arrays [N, ...] as the column that holds each of them in one list."""
    size = math.prod(values.shape[1:])
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size)


def dataset_schema(attributes: AttributeSchema, image_format: ImageFormat = "png", *, order: bool = False) -> pa.Schema:
    """One row a synthetic image: what was asked for, how it was made, and where its DICOM object lies.

    `attempt`: how often the image had been drawn and rejected before. `dicom_offset` and `dicom_length` in bytes within
    `dicom_shard`, a key relative to the dataset; null without DICOM. With `order` there is a column for the id of what
    asked for the dataset. Only a PNG is declared as an image: what others open by themselves.
    """
    columns = [
        pa.field("id", pa.string()),
        pa.field("index", pa.int64()),
        *_PIXELS,
        *attributes.arrow_fields(),
        pa.field("seed", pa.int64()),
        pa.field("attempt", pa.int16()),
        pa.field("solver", pa.string()),
        pa.field("steps", pa.int32()),
        pa.field("guidance_scale", pa.float32()),
        pa.field("generator", pa.string()),
        pa.field("sop_instance_uid", pa.string()),
        pa.field("dicom_shard", pa.string()),
        pa.field("dicom_offset", pa.int64()),
        pa.field("dicom_length", pa.int64()),
        *([pa.field("order", pa.string())] if order else []),
    ]
    return pa.schema(columns, metadata=_IMAGE_FEATURE if image_format == "png" else None)


def rejects_schema(attributes: AttributeSchema) -> pa.Schema:
    """One row a draw that did not enter the dataset, with its reason and the figures it was judged by.

    Reason `infeasible` is of an image, not of a draw: none of its `attempt` draws entered, and the dataset lacks it.
    """
    columns = [
        pa.field("id", pa.string()),
        pa.field("index", pa.int64()),
        pa.field("attempt", pa.int16()),
        pa.field("reason", pa.string()),
        pa.field("figures", pa.map_(pa.string(), pa.float64())),
        *attributes.arrow_fields(),
    ]
    return pa.schema(columns)


def _flattened(name: str, shape: tuple[int, ...]) -> pa.Field:
    spelled = {SHAPE: ",".join(str(size) for size in shape).encode()}
    return pa.field(name, pa.list_(pa.float16(), math.prod(shape)), metadata=spelled)
