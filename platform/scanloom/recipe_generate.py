"""What a recipe says of a dataset: its cohort, how its images are made and checked, and how they are written."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scanloom.recipe_cohort import AsCorpusCohort, Cohort
from scanloom.section import Count, Fraction, Positive, Section

Solver = Literal["ddim", "dpmpp-2m", "euler"]
ImageFormat = Literal["png", "jpeg-xl", "raw"]
TransferSyntax = Literal["native", "rle", "jpeg-ls", "htj2k"]


class Quality(Section):
    """What an image must be to enter the dataset; one that is not is drawn again, from noise of its own."""

    least_contrast: Fraction = 0.02
    """Of the image's pixels, 98th less 2nd percentile as a share of full range; below it an image is blank."""
    most_saturated: Fraction = 0.5
    """Of the image's pixels at full white, or at black with neighbours that are black too, the largest share."""
    probe: str | None = None
    """URI of a probe artefact whose reading of the image must agree with what was asked for; None: nobody reads."""
    gate: str | None = None
    """URI of a privacy gate's artefact; None: the dataset says that it is ungated."""
    attempts: Count = 8
    """Of one image, at most; then its cell of the cohort counts as one that cannot be filled."""


class Dicom(Section):
    """What the DICOM instances say beside the attributes, and how they lie in their shards."""

    enabled: bool = True
    sop_class: Literal["DX", "CT", "MR"] = "DX"
    transfer_syntax: TransferSyntax = "native"
    layout: Literal["flat", "study"] = "flat"
    """Names in the tar shards: SOP instance UIDs alone, or below folders of patient, study and series."""
    pixel_spacing_mm: Positive | None = None
    """None: the median spacing of the corpus, or 1.0 where the corpus has none."""
    content_date: Annotated[str, Field(pattern=r"^[0-9]{8}$")] = "20000101"


class Generate(Section):
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "dataset"
    """Folder of the dataset below the recipe's store."""
    images: Count
    cohort: Cohort = AsCorpusCohort()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    solver: Solver = "dpmpp-2m"
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float, Field(ge=1.0, le=30.0)] = 2.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of denoiser and decoder; the solver's arithmetic is float32 always."""
    compiled: bool = False
    """Compile the denoiser for its one batch shape: minutes at the start, for long orders on GPUs."""
    slots: Count = 32
    """Rows of the denoiser's batch: a guided image takes two, one with guidance_scale 1 takes one."""
    images_per_shard: Count = 64
    """Best a multiple of the images that share a batch, so that no slot idles at the end of a shard."""
    bits_stored: Literal[8, 12, 16] = 8
    quality: Quality = Quality()
    image_format: ImageFormat = "png"
    """Of the image column, all lossless: png opens everywhere, jpeg-xl encodes faster, raw costs nothing."""
    webdataset: bool = False
    """Also write tar shards of image and JSON labels by id, as WebDataset readers stream them."""
    dicom: Dicom = Dicom()
    engines: Count = 1
    cpus_per_engine: Count = 1
    """Threads of an engine. With one, an image's bits on CPU never depend on its batch; more engines scale as well."""
    gpus_per_engine: Annotated[float, Field(ge=0)] = 0
    writers: Count = 1
    cost_per_hour: Annotated[float, Field(ge=0)] | None = None
    """What an engine costs an hour, in whatever currency, for estimates and progress; no part of the plan."""
