"""Recipes wherever they lie: in a file of this machine, as an object in a store, or sent along inside a command."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from scanloom.errors import RecipeError
from scanloom.recipe import Recipe, read_recipe
from scanloom.store import MissingError, Store

_INLINE = "data:application/yaml;base64,"


def recipe_at(place: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path, at `s3://bucket/key` or in a `data:` URI, after its overrides.

    Raises as `read_recipe` and `content_at` do.
    """
    return read_recipe(content_at(place), "sent along" if place.startswith(_INLINE) else place, overrides)


def content_at(place: str, what: str = "recipe") -> bytes:
    """The file of a recipe, or of what else it is called, as it is.

    Raises RecipeError where it is not there; StoreError where the store does not answer.
    """
    if place.startswith(_INLINE):
        try:
            return base64.b64decode(place.removeprefix(_INLINE), validate=True)
        except binascii.Error as error:
            raise RecipeError("the recipe that was sent along is damaged (not base64); submit it again") from error
    if not place.startswith("s3://"):
        try:
            return Path(place).read_bytes()
        except OSError as error:
            raise RecipeError(f"{what} {place}: cannot be read ({error.strerror}); check the path") from error
    folder, _, name = place.rpartition("/")
    try:
        return Store(folder).read(name)
    except MissingError as error:
        raise RecipeError(f"{what} {place}: cannot be read (no such object); check the URI") from error
