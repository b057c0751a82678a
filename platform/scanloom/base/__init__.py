"""The embedded base generator: trained on phantoms, shipped with the code, to go on training from.

`generator/` is a generator artefact like any other, its weights in float16, read wherever a URI is: `embedded://base`
in a recipe, or in `scanloom show embedded://base`. `jobs/recipes/base.yaml` trains it, `python -m jobs.embed` puts it
here.
"""

from __future__ import annotations

from pathlib import Path

URI = "embedded://base"
FOLDER = Path(__file__).parent / "generator"
MODEL_CARD = Path(__file__).parent / "MODEL_CARD.md"
LIMIT_BYTES = 12_000_000
"""What the wheel may carry of it."""


def embedded_folder(uri: str) -> Path | None:
    """Where this installation has what an `embedded://base` or `embedded://base/PART` names; None for other URIs."""
    name, slash, part = uri.partition(f"{URI}/")
    if uri == URI or (slash and not name):
        return FOLDER / part
    return None
