"""Recipes wherever they lie: in a file of this machine, or as an object in a store."""

from __future__ import annotations

from collections.abc import Sequence

from scanloom.errors import RecipeError
from scanloom.recipe import Recipe, load_recipe, read_recipe
from scanloom.store import MissingError, Store


def recipe_at(place: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path or at `s3://bucket/key`, after its overrides.

    Raises as `load_recipe` does; StoreError where the store does not answer.
    """
    if not place.startswith("s3://"):
        return load_recipe(place, overrides)
    folder, _, name = place.rpartition("/")
    try:
        content = Store(folder).read(name)
    except MissingError as error:
        raise RecipeError(f"recipe {place}: cannot be read (no such object); check the URI") from error
    return read_recipe(content, place, overrides)
