"""Attributes to text: the prompt that the text families are trained and asked with."""

from __future__ import annotations

from collections.abc import Mapping

from scanloom.attributes import Attributes, AttributeSchema, Value
from scanloom.errors import RecipeError
from scanloom.recipe import AttributeDeclaration, NumberAttribute, nearest
from scanloom.recipe_denoiser import PLACE_OF_ATTRIBUTES, PLACE_OF_VALUE, PromptTemplate

DEFAULT = PromptTemplate()


def prompt(schema: AttributeSchema, attributes: Attributes, template: PromptTemplate = DEFAULT) -> str:
    """The text of these attributes, in the schema's order; unknown ones are left out.

    With nothing known it is empty, which is the null condition of classifier-free guidance.
    """
    read = [
        _phrase(declaration, value, template)
        for declaration in schema.declarations
        if (value := attributes.get(declaration.name)) is not None
    ]
    return template.template.replace(PLACE_OF_ATTRIBUTES, ", ".join(read)) if read else ""


def require_wording(schema: AttributeSchema, template: PromptTemplate) -> None:
    """Raise RecipeError where a template words an attribute or a value that the schema does not have."""
    values = [value for d in schema.declarations if not isinstance(d, NumberAttribute) for value in d.values]
    for what, given, known in (("phrases", template.phrases, schema.names), ("words", template.words, values)):
        for key in given:
            if key not in known:
                raise RecipeError(f"finetune.denoiser.prompt.{what}: {key!r} is not in the schema{nearest(key, known)}")


def _phrase(declaration: AttributeDeclaration, value: Value, template: PromptTemplate) -> str:
    name = declaration.name
    said = _said(declaration, value, template.words)
    if name in template.phrases:
        return template.phrases[name].replace(PLACE_OF_VALUE, said)
    if isinstance(declaration, NumberAttribute):
        return f"{name} {said} {declaration.unit}".strip()
    return said if declaration.kind == "labels" else f"{name} {said}"


def _said(declaration: AttributeDeclaration, value: Value, words: Mapping[str, str]) -> str:
    if isinstance(declaration, NumberAttribute):
        # Two decimals tell apart what a reader would, and keep the number of distinct prompts small.
        return f"{round(float(str(value)), 2):g}"
    if isinstance(value, tuple):
        return ", ".join(words.get(label, label) for label in value) or f"no {declaration.name}"
    return words.get(str(value), str(value))
