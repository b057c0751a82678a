"""The service's settings: frozen models that refuse unknown keys, the only configuration beside credentials.

A Serve config file carries them as `args` of the application; `scanloom serve GENERATOR` makes them itself.
"""

# Ray Serve validates a builder's argument by its annotation, which must be a class: no `annotations` from __future__ in
# the module that declares the builder. Here it is fine.
from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, model_validator

from scanloom.api import Name
from scanloom.api_key import Scope as Scope
from scanloom.recipe_generate import Quality, Solver
from scanloom.section import Count, Positive, Section, Words


class ServedGenerator(Section):
    """One generator under the name by which requests ask for it."""

    name: Name
    uri: str
    solver: Solver = "dpmpp-2m"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compiled: bool = False
    quality: Quality = Quality()
    """Images that fail the checks are drawn again, as in datasets; its `probe` and `gate` are loaded with the
    generator."""


class Replicas(Section):
    """Of the engines, and what Ray gives each; there are as many as it takes for one request to every two slots."""

    least: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks; the first to ask waits for one to start."""
    most: Count = 1
    cpus: Count = 1
    """Threads of an engine."""
    gpus: Annotated[float, Field(ge=0)] = 0
    resources: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """Custom Ray resources that an engine asks for, such as those of some nodes."""
    slots: Count = 32
    """Rows of the denoiser's batch; a guided image takes two."""
    rows: Count | None = None
    """Of one call of the denoiser, idle ones padded. Few answer a lone image soon, many make more images per second; a
    dataset's engine has as many as slots. None: 4 on a CPU, all slots on a GPU."""
    loaded: Count = 2
    """Generators in memory at once; the one that was idle longest makes room for another."""
    requests: Count = 64
    """That a replica takes at once, running and waiting for slots."""
    queued: Count = 64
    """Requests that wait at a gateway because every replica has its `requests`; more are refused with 429."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0
    drain_s: Annotated[float, Field(ge=0)] = 60.0
    """What a replica that is to stop may still take to finish what it has."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is above most {self.most}")
        return self


class Limits(Section):
    """Of a single request, whoever sends it."""

    images: Annotated[int, Field(ge=1, le=1024)] = 16
    body_bytes: Count = 1 << 20
    body_s: Positive = 10.0
    """Within which the whole body must have come."""
    deadline_s: Positive = 60.0
    """Of a request that states none."""
    longest_deadline_s: Positive = 300.0
    pixels: Count = 1 << 24
    """Of all images of a request together."""


class Tenant(Section):
    """What one tenant may use; None: no limit of its own."""

    image_steps: Count = 50
    """An image counts once for every so many of its steps that are begun, at the size that its generator was trained
    on; a larger one as if it had as many more steps."""
    images_per_minute: Annotated[float, Field(gt=0)] | None = None
    images_at_once: Count | None = None
    """Asked for by requests that are not answered yet."""
    datasets_at_once: Count | None = 4
    """Accepted and not ended."""
    images_per_dataset: Count | None = None
    images_per_day: Count | None = None
    """Of images and datasets together, by UTC days."""


class ApiKey(Section):
    """A key that a client sends as bearer token; only its hash is known here. `scanloom key` makes one."""

    id: Name
    """Names the key in logs."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tenant: Name
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("generate", "datasets")
    expires: AwareDatetime | None = None


class Oidc(Section):
    """Whose signed tokens (JWT) are taken."""

    issuer: str
    audience: str
    jwks: str
    """https:// URL, or a file, of the issuer's keys."""
    algorithms: Words = ("RS256", "ES256")
    tenant_claim: str = "tenant"
    scope_claim: str = "scope"
    """Scopes in it are words of a string, or a list."""
    leeway_s: Annotated[float, Field(ge=0, le=300)] = 30.0


class Access(Section):
    """Who may ask. With no key and no issuer nobody may, unless `open` is set."""

    keys: tuple[ApiKey, ...] = ()
    keys_file: str | None = None
    """YAML list of further keys; read again when it changes."""
    oidc: Oidc | None = None
    open: bool = False
    """Take everybody for the tenant `local`, with all scopes: on loopback, for trials."""


class Datasets(Section):
    """How ordered datasets are made."""

    store: str
    """s3://bucket/prefix or a local folder, below which every tenant has a folder of its own."""
    jobs_at_once: Count = 2
    """Over all tenants; others wait their turn."""
    attempts: Count = 5
    """At one dataset; each goes on where the former ended."""
    engines: Count = 1
    cpus_per_engine: Count = 1
    gpus_per_engine: Annotated[float, Field(ge=0)] = 0
    writers: Count = 1
    images_per_shard: Count = 64
    niceness: Annotated[int, Field(ge=0, le=19)] = 15
    """Of the processes of datasets, so that interactive requests come first on a shared host."""
    resources: Mapping[str, Annotated[float, Field(gt=0)]] = {}
    """Custom Ray resources that the job's driver asks for, such as those of spot nodes."""
    links_s: Annotated[int, Field(ge=60, le=604800)] = 3600
    """Validity of presigned URLs."""
    poll_s: Positive = 2.0
    most_images: Annotated[int, Field(ge=1, lt=2**32)] = 2_000_000
    """Of one dataset, whoever orders it."""
    most_cells: Count = 2000
    """Of an ordered cohort: cells, or combinations of its marginals."""
    stalled_s: Positive = 7200.0
    """A running job that commits nothing for so long is stopped, which counts as a failed attempt."""


class Service(Section):
    """All of it."""

    generators: Annotated[tuple[ServedGenerator, ...], Field(min_length=1)]
    replicas: Replicas = Replicas()
    limits: Limits = Limits()
    access: Access = Access()
    tenants: Mapping[Name, Tenant] = {}
    everyone: Tenant = Tenant()
    """Limits of tenants that `tenants` does not name."""
    datasets: Datasets | None = None
    """None: no datasets can be ordered."""
    audit_store: str | None = None
    """Where the audit log is kept, as JSON lines; None: in the log alone."""
    gateways: Count = 1
    """Processes that speak HTTP; limits per tenant hold within each."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [generator.name for generator in self.generators]
        if len(set(names)) < len(names):
            raise ValueError(f"generators: names repeat: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return self

    def tenant(self, name: str) -> Tenant:
        """The limits of a tenant."""
        return self.tenants.get(name, self.everyone)


def as_arguments(service: Service) -> dict[str, Any]:
    """The settings as plain data, for `args` of a Serve config file."""
    return service.model_dump(mode="json", exclude_defaults=True)
