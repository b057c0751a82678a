"""A recipe to begin with, for what a survey found in a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from scanloom.recipe import AttributeDeclaration, LabelsAttribute, NumberAttribute, parse_recipe
from scanloom.scans.survey import Look, Survey

SIZES_PX = (256, 128, 64, 32, 16)
_ROOM = 0.1
"""How much more than the survey saw may be refused before a run stops."""

_HEADER = """\
# Written by `scanloom inspect` for what it found. Before you run it:
# - name and store: what it is to be called, and where it goes (s3://bucket/prefix or a folder)
# - attributes: only what is declared here survives; add values, or aliases for other spellings of them
# - size_px: 64 for a first look on a laptop, 256 and more for training on a GPU
#
#   scanloom prepare THIS-FILE
"""


def starter_recipe(survey: Survey, look: Look) -> str:
    """The YAML of a recipe that `load_recipe` accepts: the source as it was looked at, the attributes that it gives."""
    tree: dict[str, Any] = {
        "name": "scans",
        "store": "runs/scans",
        "attributes": [_tree(declaration) for declaration in _found(survey, look)],
        "prepare": {
            "source": {"kind": look.source.kind} | look.source.model_dump(mode="json", exclude_defaults=True),
            "size_px": _size_px(survey),
            **_decode(survey, look),
            **_rejected_share(survey),
        },
        "generate": {"images": 256},
    }
    parse_recipe(tree, "made by inspect")
    return _HEADER + "\n" + yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Lists of words on a line of their own, everything else indented."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=not any(isinstance(i, dict) for i in sequence))


def _found(survey: Survey, look: Look) -> list[AttributeDeclaration]:
    """The attributes of the schema that tell scans apart, with the values that were seen."""
    seen = [
        narrowed
        for declaration in look.schema.declarations
        if (narrowed := _narrowed(declaration, survey.values.get(declaration.name, {}))) is not None
    ]
    return seen or list(look.schema.declarations[:1])


def _narrowed(declaration: AttributeDeclaration, seen: Mapping[str, object]) -> AttributeDeclaration | None:
    if isinstance(declaration, NumberAttribute):
        return declaration if seen else None
    values = tuple(value for value in declaration.values if value in seen)
    if isinstance(declaration, LabelsAttribute):
        return declaration.model_copy(update={"values": values}) if values else None
    aliases = {spelling: value for spelling, value in declaration.aliases.items() if value in values}
    return declaration.model_copy(update={"values": values, "aliases": aliases}) if len(values) > 1 else None


def _tree(declaration: AttributeDeclaration) -> dict[str, Any]:
    first = {"name": declaration.name, "kind": declaration.kind}
    return first | declaration.model_dump(mode="json", exclude_defaults=True)


def _size_px(survey: Survey) -> int:
    """The largest of the usual sizes that most scans are not smaller than."""
    sizes = survey.terms.get("rows x columns", {})
    known = {size: count for size, count in sizes.items() if " x " in size}
    if not known:
        return SIZES_PX[0]
    side = min(map(int, max(known, key=lambda size: known[size]).split(" x ")))
    return next((size for size in SIZES_PX if size <= side), SIZES_PX[-1])


def _decode(survey: Survey, look: Look) -> dict[str, Any]:
    decode = look.decode.model_dump(mode="json", exclude_unset=True)
    modalities = survey.terms.get("modality", {})
    if not decode and 2 * modalities.get("CT", 0) > sum(modalities.values()):
        # Soft tissue; what headers ask for differs from slice to slice.
        decode = {"window": {"kind": "fixed", "center": 40, "width": 400}}
    return {"decode": decode} if decode else {}


def _rejected_share(survey: Survey) -> dict[str, float]:
    refused = sum(survey.refused.values())
    share = refused / max(1, refused + survey.scans)
    return {"max_rejected_share": min(1.0, round(share + _ROOM, 2))} if share + _ROOM > 0.5 else {}
