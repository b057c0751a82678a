"""What a recipe says of a dataset: its cohort, how its images are made and checked, and how they are written."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from scanloom.recipe_cohort import AsCorpusCohort, Cohort
from scanloom.section import Count, Fraction, Positive, Section

Solver = Literal["ddim", "dpmpp-2m", "euler"]
ImageFormat = Literal["png", "jpeg-xl", "raw"]
TransferSyntax = Literal["native", "rle", "jpeg-ls", "htj2k"]
SopClass = Literal["DX", "CT", "MR"]


class Quality(Section):
    """What an image must be to enter the dataset; one that is not is drawn again, from noise of its own."""

    least_contrast: Fraction = 0.1
    """98th less 2nd percentile of the pixels as a share of full range; below it an image is blank. Chest X-rays have
    more than 0.4."""
    most_white: Fraction = 0.1
    """Share of the pixels within 1 % of full white; above it an image is saturated. Chest X-rays have below 0.01."""
    most_black: Fraction = 0.75
    """Share of the pixels within 1 % of black. Room for black bars beside a narrow scan, and for air around a head."""
    probe: str | None = None
    """URI of a probe artefact whose reading of the image must agree with what was asked for; None: nobody reads."""
    gate: str | None = None
    """URI of a gate artefact made of the generator's corpus: an image too alike to a training scan is refused. None:
    the dataset says that it is ungated."""
    attempts: Annotated[int, Field(ge=1, le=1000)] = 8
    """At one image, at most; one that none of them could make is left out of the dataset and reported."""


class Dicom(Section):
    """What the DICOM instances say beside the attributes, and how they lie in their shards."""

    enabled: bool = True
    sop_class: SopClass = "DX"
    transfer_syntax: TransferSyntax = "native"
    layout: Literal["flat", "study"] = "flat"
    """Names in the tar shards: SOP instance UIDs alone, or below folders of patient, study and series."""
    pixel_spacing_mm: Positive | None = None
    """None: the median spacing of the corpus, or 1.0 where the corpus has none."""
    content_date: Annotated[str, Field(pattern=r"^[12][0-9]{7}$")] = "20000101"
    hu_range: tuple[float, float] = (-1024.0, 3071.0)
    """What black and white stand for in CT images: the ends of the window that the corpus was read with."""

    @field_validator("content_date")
    @classmethod
    def _require_date(cls, content_date: str) -> str:
        try:
            datetime.strptime(content_date, "%Y%m%d")
        except ValueError:
            raise ValueError(f"{content_date} is no date of the calendar; write it as YYYYMMDD") from None
        return content_date

    @model_validator(mode="after")
    def _require_range(self) -> Dicom:
        if not self.hu_range[0] < self.hu_range[1]:
            raise ValueError(f"hu_range {list(self.hu_range)}: black must be below white")
        return self


class Generate(Section):
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "dataset"
    """Folder of the dataset below the recipe's store."""
    generator: str | None = None
    """URI of a generator that lies elsewhere; None: the recipe's own."""
    order: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    """Id of what asked for the dataset; every row has it as `order`. None: there is no such column."""
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

    @model_validator(mode="after")
    def _require_bits_of_slices(self) -> Generate:
        if self.dicom.enabled and self.dicom.sop_class != "DX" and self.bits_stored == 8:
            raise ValueError(f"bits_stored 8: {self.dicom.sop_class} images hold 12 or 16 bits")
        return self
