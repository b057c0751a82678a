"""Recipes: the one configuration of every job, as strict pydantic models.

A recipe is a YAML file; `--set generate.images=512` overrides one value; a key that no model knows is an error
that names the nearest one. The resolved recipe is stored in the manifest of what it made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from scanloom.errors import RecipeError
from scanloom.recipe_audit import Audit as Audit
from scanloom.recipe_cohort import AsCorpusCohort as AsCorpusCohort
from scanloom.recipe_cohort import BalancedCohort as BalancedCohort
from scanloom.recipe_cohort import CellsCohort as CellsCohort
from scanloom.recipe_cohort import Cohort as Cohort
from scanloom.recipe_cohort import MarginalsCohort as MarginalsCohort
from scanloom.recipe_cohort import TableCohort as TableCohort
from scanloom.recipe_denoiser import AttributeUnet as AttributeUnet
from scanloom.recipe_gate import Gate as Gate
from scanloom.recipe_generate import Dicom as Dicom
from scanloom.recipe_generate import Generate as Generate
from scanloom.recipe_generate import Quality as Quality
from scanloom.recipe_prepare import Decode as Decode
from scanloom.recipe_prepare import DicomSource as DicomSource
from scanloom.recipe_prepare import DicomWebSource as DicomWebSource
from scanloom.recipe_prepare import FixedWindow as FixedWindow
from scanloom.recipe_prepare import FullWindow as FullWindow
from scanloom.recipe_prepare import HeaderWindow as HeaderWindow
from scanloom.recipe_prepare import ImageFolderSource as ImageFolderSource
from scanloom.recipe_prepare import NiftiSource as NiftiSource
from scanloom.recipe_prepare import ParquetSource as ParquetSource
from scanloom.recipe_prepare import PhantomSource as PhantomSource
from scanloom.recipe_prepare import Prepare as Prepare
from scanloom.recipe_prepare import Source as Source
from scanloom.recipe_prepare import Split as Split
from scanloom.recipe_prepare import Window as Window
from scanloom.recipe_probe import Probe as Probe
from scanloom.recipe_train import Autoencoder as Autoencoder
from scanloom.recipe_train import Encode as Encode
from scanloom.recipe_train import Finetune as Finetune
from scanloom.section import Count, Section, Words, first_faults
from scanloom.section import nearest as nearest

# Column names of the Parquet shards that no attribute may shadow.
RESERVED_COLUMNS = frozenset(
    {
        "id", "index", "image", "patient", "study", "split", "seed", "solver", "steps", "guidance_scale", "generator",
        "width", "height", "bits_stored", "spacing_mm", "mean", "logvar", "unit", "member", "sop_instance_uid",
        "dicom_shard", "dicom_offset", "dicom_length", "share", "count", "attributes", "cell", "mean_intensity",
        "frame", "window", "value_low", "value_high", "value_unit", "orientation", "direction", "position_mm",
        "repairs", "text_lines", "fingerprint", "prompt", "attempt", "reason", "figures", "order",
    }
)  # fmt: skip

_OF_ONE_CORPUS = frozenset({"corpus", "autoencoder", "latents", "generator", "probe", "gate"})

# YAML 1.1 reads 1e-5 as a string; people write learning rates so.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")

# --- attributes -----------------------------------------------------------------------------------------------


class _Named(Section):
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")]
    source: str = ""
    """DICOM keyword or CSV column that holds it; empty: the same as `name`."""

    @model_validator(mode="after")
    def _not_reserved(self) -> Self:
        if self.name in RESERVED_COLUMNS:
            raise ValueError(f"attribute {self.name!r} has the name of a shard column; choose another name")
        return self


def _distinct(name: str, values: Sequence[str]) -> None:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise ValueError(f"{name}: values repeat: {', '.join(repeated)}")


class CategoryAttribute(_Named):
    """Exactly one of `values`, or unknown."""

    kind: Literal["category"] = "category"
    values: Words
    aliases: Mapping[str, str] = {}
    """Spelling found in the source -> one of `values`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct(self.name, self.values)
        for spelling, value in self.aliases.items():
            if value not in self.values:
                raise ValueError(f"{self.name}: alias {spelling!r} stands for {value!r}{nearest(value, self.values)}")
        return self


class NumberAttribute(_Named):
    """A number in `unit`, within [minimum, maximum], or unknown. A value over `cap` becomes `cap`."""

    kind: Literal["number"] = "number"
    unit: str
    minimum: float
    maximum: float
    cap: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum < self.maximum:
            raise ValueError(f"{self.name}: minimum {self.minimum} is not below maximum {self.maximum}")
        if self.cap is not None and not self.minimum < self.cap <= self.maximum:
            raise ValueError(f"{self.name}: cap {self.cap} is not above minimum {self.minimum} and within the maximum")
        return self


class LabelsAttribute(_Named):
    """Any subset of `values` (the empty set is a statement: none of them), or unknown."""

    kind: Literal["labels"] = "labels"
    values: Words
    separator: Annotated[str, Field(min_length=1)] = "|"
    none: str = "No Finding"
    """How the source spells the empty set."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct(self.name, self.values)
        for value in self.values:
            if value == self.none or self.separator in value:
                raise ValueError(f"{self.name}: label {value!r} cannot be told from `none` or holds the separator")
        return self


AttributeDeclaration = Annotated[CategoryAttribute | NumberAttribute | LabelsAttribute, Field(discriminator="kind")]


class Recipe(Section):
    """One recipe holds every step from scans to dataset; each job reads its own section."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    store: str
    """Root of every artefact this recipe makes: `s3://bucket/prefix` or a local folder."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    corpus_version: Count = 1
    """Which version of a corpus whose source has grown; `scanloom prepare` makes the next and says its number."""
    attributes: Annotated[tuple[AttributeDeclaration, ...], Field(min_length=1)]
    prepare: Prepare | None = None
    autoencoder: Autoencoder = Autoencoder()
    encode: Encode = Encode()
    finetune: Finetune = Finetune()
    probe: Probe = Probe()
    gate: Gate = Gate()
    audit: Audit = Audit()
    generate: Generate | None = None

    @model_validator(mode="after")
    def _distinct_attributes(self) -> Self:
        names = [a.name for a in self.attributes]
        if len(set(names)) != len(names):
            raise ValueError(f"attribute names repeat: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
        return self

    @model_validator(mode="after")
    def _halves(self) -> Self:
        factor = 2 ** (len(self.autoencoder.channels) - 1)
        if self.prepare and self.prepare.size_px % factor:
            raise ValueError(
                f"prepare.size_px {self.prepare.size_px} is not a multiple of {factor}, by which an autoencoder of "
                f"{len(self.autoencoder.channels)} levels reduces it"
            )
        return self

    def uri(self, artefact: str) -> str:
        """URI of an artefact folder of this recipe, e.g. `uri("corpus")`; a local one absolute, as workers need it.

        The corpus, and what is made of it under a fixed name, has its version in its name from the second on.
        """
        versioned = artefact in _OF_ONE_CORPUS and self.corpus_version > 1
        # A worker's working folder is not that of whoever started the job.
        root = self.store if "://" in self.store else str(Path(self.store).expanduser().absolute())
        return f"{root.rstrip('/')}/{artefact}" + (f"-v{self.corpus_version}" if versioned else "")

    @property
    def generator_uri(self) -> str:
        """URI of the generator that `generate` takes: the one that it names, else this recipe's."""
        return (self.generate and self.generate.generator) or self.uri("generator")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file after its overrides (`section.key=value`, the value read as YAML).

    Raises RecipeError, in one line, for a missing file, bad YAML, an unknown key (naming the nearest) or a bad value.
    """
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        raise RecipeError(f"recipe {source}: cannot be read ({error.strerror}); check the path") from error
    return read_recipe(content, str(source), overrides)


def read_recipe(content: bytes, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the content of a YAML file, after its overrides; raises as `load_recipe` does, naming `where`."""
    try:
        tree = yaml.safe_load(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {where}: is not UTF-8 text; check the path") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {where}: holds {type(tree).__name__}, expected a mapping of keys")
    for override in overrides:
        _override(tree, override)
    return parse_recipe(tree, where)


def parse_recipe(tree: Mapping[str, object], where: str) -> Recipe:
    """The recipe of an already read tree; `where` names it in the RecipeError that bad content raises."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"recipe {where}: {first_faults(error)}") from error


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as --set generate.images=512")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not YAML") from error
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent!r} is not a section")
        node = child
    node[last] = value
