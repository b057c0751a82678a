"""Attributes to prompts: what is said, in which order, and what is not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from scanloom.attributes import Attributes
from scanloom.errors import RecipeError
from scanloom.models.prompts import prompt, require_wording
from scanloom.recipe_denoiser import PromptTemplate
from tests.tiny_generator import SCHEMA


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            {"findings": ("Cardiomegaly", "Effusion"), "view": "PA", "age": 63.0, "sex": "F"},
            "chest X-ray, sex F, age 63 years, view PA, Cardiomegaly, Effusion",
        ),
        ({"age": 0.5, "sex": None}, "chest X-ray, age 0.5 years"),
        ({"findings": ()}, "chest X-ray, no findings"),
        ({"sex": None}, ""),
        ({}, ""),
    ],
)
def test_what_is_known_is_said_in_the_schemas_order_and_no_more(attributes: Attributes, text: str) -> None:
    assert prompt(SCHEMA, attributes) == text


def test_a_recipe_chooses_the_words() -> None:
    template = PromptTemplate(
        template="a radiograph: {attributes}.",
        phrases={"age": "{value} year old", "sex": "{value}"},
        words={"F": "female", "Effusion": "pleural effusion"},
    )
    told: Attributes = {"sex": "F", "age": 63.0, "findings": ("Effusion",)}
    assert prompt(SCHEMA, told, template) == "a radiograph: female, 63 year old, pleural effusion."


def test_numbers_that_a_reader_would_not_tell_apart_share_a_prompt() -> None:
    assert prompt(SCHEMA, {"age": 63.001}) == prompt(SCHEMA, {"age": 63.0}) != prompt(SCHEMA, {"age": 63.25})


@pytest.mark.parametrize(
    ("template", "hint"),
    [
        (PromptTemplate(phrases={"gender": "{value}"}), "phrases: 'gender' is not in the schema"),
        (PromptTemplate(words={"Efusion": "fluid"}), "'Efusion' is not in the schema; did you mean 'Effusion'"),
    ],
)
def test_words_for_what_the_schema_lacks_are_refused(template: PromptTemplate, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        require_wording(SCHEMA, template)


@pytest.mark.parametrize("settings", [{"template": "chest X-ray"}, {"phrases": {"age": "old"}}])
def test_a_template_without_a_place_for_what_it_words_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="has no place for"):
        PromptTemplate.model_validate(settings)
