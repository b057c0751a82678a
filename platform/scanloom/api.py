"""What travels between the generation service and its clients: the bodies of HTTP API v1, as pydantic models.

The service validates with them, its OpenAPI document is made of them, and `scanloom.client` speaks them. A body that
names an unknown key is refused by naming the nearest known one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from scanloom.recipe_cohort import AsCorpusCohort, BalancedCohort, CellsCohort, MarginalsCohort
from scanloom.recipe_generate import Dicom, ImageFormat
from scanloom.section import Count, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Steps = Annotated[int, Field(ge=1, le=1000)]
GuidanceScale = Annotated[float, Field(ge=1.0, le=30.0)]
BitsStored = Literal[8, 12, 16]
Priority = Literal["interactive", "bulk"]
DatasetState = Literal["accepted", "running", "finished", "failed", "cancelled"]
PROBLEM_JSON = "application/problem+json"


class Answer(BaseModel):
    """A body that the service sends; clients ignore fields that they do not know."""

    model_config = ConfigDict(frozen=True)


# --- images ---------------------------------------------------------------------------------------------------


class ImagesRequest(Section):
    """`POST /v1/images`: a few images, at once. The format of the answer is the one that `Accept` asks for."""

    generator: Name | None = None
    """None: the service's first."""
    attributes: Mapping[str, Any] = {}
    """Attribute -> value, a list of labels, or null; one that is left out is unknown."""
    count: Count = 1
    seed: Seed | None = None
    """Names the noise, with an image's index. None: drawn, or made of the Idempotency-Key; the answer tells it."""
    first_index: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Index of the first image; image n of a dataset with the same seed has index n, and is the same image."""
    steps: Steps = 20
    guidance_scale: GuidanceScale = 2.0
    size_px: tuple[Annotated[int, Field(ge=8, le=4096)], Annotated[int, Field(ge=8, le=4096)]] | None = None
    """Height and width; None: as the generator was trained."""
    bits_stored: BitsStored = 8
    dicom: Dicom = Dicom()
    """Of an answer in DICOM."""
    deadline_s: Annotated[float, Field(gt=0, le=3600)] | None = None
    """Seconds within which the images must be made; what cannot be is refused at once. None: the service's own."""
    priority: Priority = "interactive"


class Image(Answer):
    """One image of an answer in JSON."""

    id: str
    """Names the image in DICOM and in logs: of the generator, the settings, the seed and the index."""
    index: int
    attempt: int
    """How often it was drawn and refused by the quality checks before."""
    width: int
    height: int
    bits_stored: BitsStored
    png: str
    """The image as a PNG, in base64."""


class ImagesAnswer(Answer):
    """`POST /v1/images` as `application/json`."""

    request: str
    """The request's id, as in the header X-Request-ID, the access log and the audit log."""
    generator: str
    generator_digest: str
    attributes: Mapping[str, Any]
    """As the images were made for: canonical, with null for what is unknown."""
    seed: int
    steps: int
    guidance_scale: float
    gate: str
    """Digest of the privacy gate that every image passed; `ungated`: nothing looked for copies of training scans."""
    images: Sequence[Image]


# --- datasets -------------------------------------------------------------------------------------------------

OrderedCohort = Annotated[CellsCohort | MarginalsCohort | BalancedCohort | AsCorpusCohort, Field(discriminator="kind")]
"""All kinds of cohorts but a table in a file, whose place would be of the client's choice."""


class DatasetRequest(Section):
    """`POST /v1/datasets`: a cohort of any size, made by a job; the fields are those of a recipe's `generate`."""

    generator: Name | None = None
    images: Annotated[int, Field(ge=1, lt=2**32)]
    cohort: OrderedCohort = AsCorpusCohort()
    seed: Seed = 0
    steps: Steps = 20
    guidance_scale: GuidanceScale = 2.0
    bits_stored: BitsStored = 8
    image_format: ImageFormat = "png"
    webdataset: bool = False
    dicom: Dicom = Dicom()


class DatasetProgress(Answer):
    """How far a dataset is."""

    images_total: int
    images_done: int
    images_per_s: float | None
    eta_s: float | None
    rejects: Mapping[str, int] = {}


class DatasetJob(Answer):
    """`GET /v1/datasets/{id}`: an accepted order and where it stands."""

    id: str
    state: DatasetState
    generator: str
    generator_digest: str
    plan: str
    """Digest of the plan, which determines the dataset."""
    images: int
    seed: int
    created: str
    """UTC, ISO 8601."""
    request: str
    """Id of the request that ordered it; every row of the dataset has it as `order`."""
    progress: DatasetProgress
    problem: str | None = None
    """Why it failed."""


class DatasetJobs(Answer):
    """`GET /v1/datasets`: newest first."""

    datasets: Sequence[DatasetJob]
    next: str | None
    """Value of `after` for the next page."""


class ResultFile(Answer):
    path: str
    """Within the dataset."""
    bytes: int
    sha256: str
    url: str
    """Where it can be read: presigned, without a key, until `expires`; a path of this service where the store is a
    local folder."""


class DatasetResult(Answer):
    """`GET /v1/datasets/{id}/result`: the finished dataset."""

    id: str
    digest: str
    """Of the dataset artefact."""
    rows: int
    gate: str
    """Digest of the privacy gate that every image passed, or `ungated`."""
    statistics: Mapping[str, Any]
    expires: str
    """UTC, ISO 8601."""
    files: Sequence[ResultFile]


# --- generators -----------------------------------------------------------------------------------------------


class GeneratorInfo(Answer):
    """`GET /v1/generators/{name}`: what may be asked of a generator."""

    name: str
    digest: str
    family: str
    width: int
    height: int
    attributes: Sequence[Mapping[str, Any]]
    """Their declarations: name, kind, and values or unit and range."""
    envelope: Mapping[str, Any]
    """What it was trained on: values with counts, ranges of numbers; requests outside it are refused."""
    gate: str
    """Digest of the privacy gate that its images pass, or `ungated`."""
    most_steps: int | None = None
    """That an image can take: the timesteps of its noise schedule; None: not known."""
    card: str
    """The model card, Markdown; empty where the generator has none."""


class Generators(Answer):
    """`GET /v1/generators`."""

    generators: Sequence[GeneratorInfo]


# --- problems -------------------------------------------------------------------------------------------------

ProblemKind = Literal[
    "bad-request", "unauthenticated", "forbidden", "not-found", "not-allowed", "conflict", "too-large", "too-slow",
    "unacceptable", "outside-envelope", "invalid", "busy", "deadline", "quota", "unavailable", "store-unavailable",
    "internal", "not-satisfiable", "changed",
]  # fmt: skip


class FieldProblem(Answer):
    field: str
    """Dotted path in the body, or the name of a header or a parameter."""
    message: str


class Problem(Answer):
    """Every answer that is no success, as `application/problem+json` (RFC 9457)."""

    type: str
    """`urn:scanloom:problem:` and a ProblemKind."""
    title: str
    status: int
    detail: str
    instance: str
    """The request's id."""
    errors: Sequence[FieldProblem] = ()
    envelope: Mapping[str, Any] | None = None
    """outside-envelope: what the generator was trained on."""
    retry_after_s: float | None = None
