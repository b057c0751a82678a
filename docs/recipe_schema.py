"""Write docs/recipe.schema.json, the JSON Schema of a recipe, for editors that complete and check YAML."""

import json
from pathlib import Path

from scanloom.recipe import Recipe

SCHEMA = Path(__file__).with_name("recipe.schema.json")


def schema_text() -> str:
    """The schema as the committed file spells it."""
    return json.dumps(Recipe.model_json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
