"""What the gateway knows of the generators it serves: read once from the store, without torch and without weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scanloom import base
from scanloom.api import FieldProblem, GeneratorInfo, ProblemKind
from scanloom.artefact import Artefact, plan_digest
from scanloom.attributes import NO_LABEL, Value
from scanloom.errors import ArtefactError, RecipeError
from scanloom.models.card import CARD, GeneratorCard, parse_card
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.sampling.gate import UNGATED
from scanloom.sampling.image_order import ImageOrder
from scanloom.sampling.inputs import open_inputs
from scanloom.section import nearest
from serve.config import ServedGenerator, Service
from serve.problem import Refusal, invalid

MODEL_CARDS = ("MODEL_CARD.md", "README.md")
"""Files of a generator artefact that may hold its model card, the best first."""
LARGEST_SIDES = 2
"""Of images, in sides of those that a generator was trained on. What is larger has nothing to do with its training,
and attention between all of its places would take an engine's memory."""
_FALLBACK_SPACING_MM = 1.0
# Each fault costs a search for what was meant, while other requests wait.
_MOST_FAULTS = 8
_LONGEST_LIST = 1024


@dataclass(frozen=True)
class Offer:
    """A served generator: what may be asked of it, and what its images are called."""

    served: ServedGenerator
    generator_name: str
    """Its own, which its images name as their maker."""
    digest: str
    gate: str
    """Digest of the privacy gate that its images pass, or `ungated`."""
    card: GeneratorCard
    model_card: str
    """Markdown; empty where there is none."""
    most_steps: int | None = None
    """The timesteps of its noise schedule; None: not known."""

    @property
    def name(self) -> str:
        """By which requests ask for it."""
        return self.served.name

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width that it was trained on."""
        return self.card.image_shape[1], self.card.image_shape[2]

    @property
    def spacing_mm(self) -> float:
        return self.card.spacing_mm or _FALLBACK_SPACING_MM

    @property
    def envelope(self) -> dict[str, Any]:
        return self.card.envelope.model_dump(mode="json")

    def info(self) -> GeneratorInfo:
        """What `GET /v1/generators/{name}` answers."""
        height, width = self.size_px
        return GeneratorInfo(
            name=self.name,
            digest=self.digest,
            family=self.card.family,
            width=width,
            height=height,
            attributes=[_told(declaration) for declaration in self.card.attributes.declarations],
            envelope=self.envelope,
            gate=self.gate,
            most_steps=self.most_steps,
            card=self.model_card,
        )

    def require_steps(self, steps: int) -> None:
        """Raise Refusal of the field `steps` for more than the noise schedule has."""
        if self.most_steps is not None and steps > self.most_steps:
            raise invalid("steps", f"{steps} is over the {self.most_steps} timesteps that {self.name} was trained on")

    def attributes(self, asked: Mapping[str, Any]) -> dict[str, Value]:
        """The attributes of a request in canonical form, what is left out as unknown.

        Raises Refusal naming every field at fault and the envelope: `invalid` for what the schema does not have, else
        `outside-envelope`.
        """
        wrong: list[FieldProblem] = []
        outside: list[FieldProblem] = []
        for name, value in asked.items():
            if len(wrong) + len(outside) == _MOST_FAULTS:
                break
            if isinstance(value, (list, dict)) and len(value) > _LONGEST_LIST:
                raise invalid(
                    f"attributes.{name}", f"{len(value)} values; no attribute takes more than {_LONGEST_LIST}"
                )
            try:
                self.card.envelope.require(self.card.attributes.check({name: value}))
            except RecipeError as error:
                wrong.append(FieldProblem(field=f"attributes.{name}", message=str(error)))
            except ArtefactError as error:
                outside.append(FieldProblem(field=f"attributes.{name}", message=str(error)))
        faults = wrong + outside
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            kind: ProblemKind = "invalid" if wrong else "outside-envelope"
            raise Refusal(kind, faults[0].message + more, errors=faults, envelope=self.envelope)
        return self.card.attributes.check(asked)

    def latent_shape(self, size_px: tuple[int, int] | None) -> tuple[int, int, int] | None:
        """(C, H, W) of the latents of images of a size; None for the generator's own.

        Raises Refusal for sides that its decoder cannot make or that are too long. What its denoiser cannot make, the
        engine says.
        """
        if size_px is None or size_px == self.size_px:
            return None
        height, width = size_px
        factor = self.card.factor
        if height % factor or width % factor:
            raise invalid("size_px", f"{self.name} makes images whose sides are multiples of {factor} px")
        most = [LARGEST_SIDES * side for side in self.size_px]
        if height > most[0] or width > most[1]:
            raise invalid("size_px", f"{self.name} makes images of {most[0]} x {most[1]} px at most")
        return self.card.latent_shape[0], height // factor, width // factor

    def image_digest(self, order: ImageOrder, place: int, digest: str, gate: str) -> str:
        """SHA-256 that names image number `place` of an order, made by the generator of this digest behind that gate.

        A function of all that was asked: the same request names the same image anywhere. Its first 16 digits are the
        image's id, and its DICOM UIDs are those of a plan of that digest.
        """
        height, width = self.image_size(order)
        # Ungated images keep the names that they had before there were gates.
        behind = [] if gate == UNGATED else [gate]
        return plan_digest(
            "image", digest, order.seed, order.first_index + place, order.steps, order.guidance_scale,
            self.served.solver, [height, width], order.bits_stored, order.attributes, *behind,
        )  # fmt: skip

    def image_size(self, order: ImageOrder) -> tuple[int, int]:
        """Height and width of the images of an order."""
        if order.latent_shape is None:
            return self.size_px
        factor = self.card.factor
        return order.latent_shape[1] * factor, order.latent_shape[2] * factor

    def own_steps(self, order: ImageOrder) -> float:
        """Steps at the generator's own size that have as many pixels to work on as those of an order's image."""
        return order.steps * math.prod(self.image_size(order)) / math.prod(self.size_px)

    def example(self) -> dict[str, Any]:
        """Attributes that it was trained on, for examples that work: of each the most frequent value."""
        found: dict[str, Any] = {}
        for declaration in self.card.attributes.declarations:
            name = declaration.name
            counts = self.card.envelope.values.get(name, {})
            if seen := self.card.envelope.ranges.get(name):
                middle = float(round((seen.low + seen.high) / 2))
                found[name] = middle if seen.low <= middle <= seen.high else seen.low
            elif counts:
                most = max(counts, key=lambda value: counts[value])
                labels = [] if most == NO_LABEL else [most]
                found[name] = labels if isinstance(declaration, LabelsAttribute) else most
        return found


def read_catalogue(service: Service) -> dict[str, Offer]:
    """Every served generator by its name, in the order of the settings.

    Raises ArtefactError for one that is none or is damaged, or whose probe or gate is missing or does not fit;
    StoreError where the store does not answer.
    """
    return {served.name: read_offer(served) for served in service.generators}


def read_offer(served: ServedGenerator) -> Offer:
    """What is known of one; raises as `read_catalogue` does."""
    inputs = open_inputs(served.uri, served.quality)
    artefact = inputs.generator
    card = parse_card(artefact.store.read(CARD), served.uri)
    gate = inputs.gate.digest if inputs.gate is not None else UNGATED
    return Offer(
        served, artefact.manifest.name, artefact.digest, gate, card, _model_card(artefact), inputs.most_steps
    )  # fmt: skip


def offered(catalogue: Mapping[str, Offer], name: str | None) -> Offer:
    """The offer of a name that a body gives, the first for None. Raises Refusal of the field `generator`."""
    if name is None:
        return next(iter(catalogue.values()))
    if name not in catalogue:
        raise invalid("generator", f"no generator {name!r} is served here{nearest(name, catalogue)}")
    return catalogue[name]


def _model_card(artefact: Artefact) -> str:
    if artefact.uri == base.URI:
        return base.MODEL_CARD.read_text(encoding="utf-8")
    paths = {file.path for file in artefact.manifest.files}
    found = next((name for name in MODEL_CARDS if name in paths), None)
    return artefact.store.read(found).decode("utf-8", errors="replace") if found else ""


def _told(declaration: CategoryAttribute | NumberAttribute | LabelsAttribute) -> dict[str, Any]:
    """A declaration without what only concerns its source."""
    told: dict[str, Any] = {"name": declaration.name, "kind": declaration.kind}
    if isinstance(declaration, NumberAttribute):
        return told | {"unit": declaration.unit, "minimum": declaration.minimum, "maximum": declaration.maximum}
    return told | {"values": list(declaration.values)}
