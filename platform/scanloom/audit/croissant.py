"""A release's metadata as MLCommons' Croissant 1.0, with its vocabulary for responsible AI, which tools read.

http://mlcommons.org/croissant/1.0, http://mlcommons.org/croissant/RAI/1.0
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from scanloom.artefact import Artefact
from scanloom.audit.policy import Policy
from scanloom.audit.report import Report
from scanloom.audit.verdicts import verdicts
from scanloom.sampling.plan import PlanSpec
from scanloom.shards.schemas import dataset_schema

_CONFORMS_TO = ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{term: f"cr:{term}" for term in _TERMS},
}
_SHARDS = "image-shards"
_ROWS = "images"


def croissant(dataset: Artefact, report: Report, policy: Policy) -> bytes:
    """croissant.json of a bundle: its Parquet shards as one set of records, and what is to be known before its use."""
    manifest = dataset.manifest
    told = {
        "@context": _CONTEXT, "@type": "sc:Dataset", "conformsTo": _CONFORMS_TO, "name": manifest.name,
        "description": (
            f"{report.subject.images:,} synthetic medical images, drawn by a generative model that learned from real "
            "scans; no image is a scan of a person. Audited for copies of training scans; audit/report.html says what "
            "was found."
        ),
        "url": f"urn:sha256:{dataset.digest}", "version": "1.0.0", "datePublished": manifest.created_at[:10],
        "license": f"{policy.target} use under TERMS.md", "isLiveDataset": False,
        "creator": {"@type": "Organization", "name": policy.publisher or policy.name},
        "citeAs": f"{manifest.name}, synthetic, scanloom dataset {dataset.digest}",
        "keywords": ["synthetic", "medical", "radiology"],
        "distribution": [{
            "@type": "cr:FileSet", "@id": _SHARDS, "name": _SHARDS, "description": "One row an image.",
            "encodingFormat": "application/x-parquet", "includes": "dataset/images/*.parquet",
        }],
        "recordSet": [{
            "@type": "cr:RecordSet", "@id": _ROWS, "name": _ROWS, "description": "One record an image.",
            "key": {"@id": f"{_ROWS}/id"}, "field": list(_fields(dataset)),
        }],
        **_responsible(report, policy),
    }  # fmt: skip
    return json.dumps(told, indent=1, ensure_ascii=False).encode() + b"\n"


def _fields(dataset: Artefact) -> Iterator[dict[str, Any]]:
    spec = PlanSpec.model_validate(dataset.manifest.statistics["spec"])
    for column in dataset_schema(spec.attributes, spec.image_format, order=spec.order is not None):
        if column.name == "image":
            # Other formats than PNG are bytes that no reader of Croissant decodes.
            if spec.image_format == "png":
                yield _field("image", "sc:ImageObject", transform={"jsonPath": "bytes"})
            continue
        repeated = pa.types.is_list(column.type)
        kind = column.type.value_type if repeated else column.type
        yield _field(column.name, _data_type(kind)) | ({"repeated": True} if repeated else {})


def _field(name: str, data_type: str, transform: Mapping[str, str] | None = None) -> dict[str, Any]:
    source: dict[str, Any] = {"fileSet": {"@id": _SHARDS}, "extract": {"column": name}}
    if transform is not None:
        source["transform"] = transform
    described = _DESCRIBED.get(name, f"{name}, as asked of the generator.")
    return {
        "@type": "cr:Field", "@id": f"{_ROWS}/{name}", "name": name, "description": described,
        "dataType": data_type, "source": source,
    }  # fmt: skip


def _data_type(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "sc:Integer"
    if pa.types.is_floating(kind):
        return "sc:Float"
    return "sc:Boolean" if pa.types.is_boolean(kind) else "sc:Text"


def _responsible(report: Report, policy: Policy) -> dict[str, Any]:
    """Croissant RAI 1.0: how it came about, for what, and what is known to be wrong with it."""
    found = {one.topic: f"{one.question} {one.answer} {one.because}" for one in verdicts(report)}
    return {
        "rai:dataCollection": (
            "Drawn by a latent diffusion model from attributes that were asked for; dataset/manifest.json holds plan, "
            "seeds and the digests of generator and corpus, GENERATOR.md says what it learned from."
        ),
        "rai:dataCollectionType": ["Others: synthesis by a generative model"],
        "rai:dataAnnotationProtocol": ["Labels are what was asked of the generator; nobody read the images."],
        "rai:personalSensitiveInformation": [
            "No image is a scan of a person. Attributes such as sex and age are of nobody.",
            found["copies"], found["membership"],
        ],
        "rai:dataBiases": [found["fairness"], found["variety"]],
        "rai:dataLimitations": [
            found["likeness"], found["utility"],
            "That no copy was found holds for copies of the kinds that were planted; it is no claim of anonymity.",
        ],
        "rai:dataUseCases": [f"Released for: {policy.target}. Not to diagnose or treat anybody."],
        "rai:dataReleaseMaintenancePlan": "The bundle is signed and is not changed; a new version is another bundle.",
    }  # fmt: skip


_DESCRIBED = {
    "id": "Identifier of the image, unique within the dataset.",
    "image": "The image, grey.",
    "index": "Its number in the plan.",
    "width": "In pixels.",
    "height": "In pixels.",
    "bits_stored": "8, 12 or 16 bits a pixel.",
    "spacing_mm": "Distance of two pixels, in mm.",
    "seed": "Of the dataset.",
    "solver": "That integrated the diffusion process.",
    "steps": "Of the solver.",
    "guidance_scale": "How strongly the attributes were enforced.",
    "generator": "Digest of the generator.",
    "attempt": "How many draws before it a check turned down.",
    "sop_instance_uid": "Of its DICOM file.",
    "dicom_shard": "Tar file of DICOM files that holds it, below dataset/.",
    "dicom_offset": "Where its DICOM file begins in that, in bytes.",
    "dicom_length": "And its length, in bytes.",
}
