"""Generator -> the base that the wheel carries: float16 weights, and figures measured on them for its model card.

python -m jobs.embed RECIPE [--set KEY=VALUE ...]     after prepare, encode and finetune of the same recipe
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jobs.cluster import run_recipe
from scanloom import base, console
from scanloom.artefact import Artefact, FileEntry, Lineage, open_artefact, publish
from scanloom.attributes import AttributeSchema
from scanloom.audit.contact_sheet import Tile
from scanloom.audit.side_by_side import separation
from scanloom.errors import ArtefactError
from scanloom.models.generator import Generator, read_generator
from scanloom.recipe import Recipe
from scanloom.sampling.engine import Engine, ImageRequest
from scanloom.store import Store

IMAGES_PER_CELL = 12
FIGURES = re.compile(r"(?<=<!-- figures -->\n).*?(?=<!-- end of figures -->)", re.DOTALL)


def embed(recipe: Recipe) -> None:
    """Put the recipe's generator, in float16, where the wheel takes it from, in the place of the one before."""
    started = time.monotonic()
    trained = open_artefact(recipe.uri("generator"), "generator")
    with tempfile.TemporaryDirectory(prefix="scanloom-base-") as scratch:
        folder = Path(scratch) / "generator"
        trained.fetch(folder)
        shutil.rmtree(folder / "training", ignore_errors=True)  # reports and pictures of the run
        for weights in folder.rglob("*.safetensors"):
            halve(weights)
        figures = _figures(recipe, trained, folder)
        embedded = _publish(recipe, trained, folder, figures)
        shutil.rmtree(base.FOLDER, ignore_errors=True)
        shutil.copytree(folder, base.FOLDER)
    text = base.MODEL_CARD.read_text(encoding="utf-8")
    base.MODEL_CARD.write_text(FIGURES.sub(lambda _: figures_table(figures), text), encoding="utf-8")
    row = ("base generator", str(base.FOLDER), f"{figures['bytes'] / 1e6:.1f} MB", embedded.digest[:12])
    console.result_table(f"embed: {time.monotonic() - started:.0f} s", ("what", "where", "size", "digest"), [row])


def halve(weights: Path) -> None:
    """Store a safetensors file's numbers as float16. ArtefactError where one is too large for it."""
    halved = {name: value.half() if value.is_floating_point() else value for name, value in load_file(weights).items()}
    for name, value in halved.items():
        if not torch.isfinite(value).all():
            raise ArtefactError(f"{weights.name}: {name} does not fit into float16; train with more weight decay")
    save_file(halved, weights, {"format": "pt"})


def figures_table(figures: Mapping[str, Any]) -> str:
    """The figures as the model card shows them."""
    heart = figures["cardiomegaly"]
    rows = {
        "autoencoder, phantoms it did not see": f"PSNR {figures['autoencoder']['psnr_db']:.1f} dB",
        "denoiser, phantoms it did not see": f"loss {figures['training']['held_out_loss']:.4f} (v-prediction)",
        f"cardiothoracic ratio, {heart['with_finding']} images with cardiomegaly": f"{heart['mean_with']:.3f}",
        f"the same, {heart['without']} images without finding": f"{heart['mean_without']:.3f}",
        "how well it tells them apart (AUC)": f"{heart['auc']:.3f}",
        "images that could not be measured": str(heart["unmeasured"]),
        "parameters": f"{figures['parameters'] / 1e6:.2f} million",
        "size": f"{figures['bytes'] / 1e6:.1f} MB",
    }
    return "".join(f"| {what} | {value} |\n" for what, value in ({"measured": "value", "---": "---"} | rows).items())


def measure(generator: Generator) -> dict[str, Any]:
    """How well the cardiothoracic ratio tells requested cardiomegaly from none, in images made with guidance 2."""
    engine = Engine(generator, slots=32)
    tiles = [_tile(done.image, done.request) for done in engine.run(_requests(generator.schema))]
    return vars(separation(tiles))


def _requests(schema: AttributeSchema) -> Iterator[ImageRequest]:
    cells = product(("F", "M"), ("PA", "AP"), ((), ("Cardiomegaly",)), range(IMAGES_PER_CELL))
    for index, (sex, view, findings, number) in enumerate(cells):
        told = {"sex": sex, "view": view, "findings": findings, "age": 25.0 + 60.0 * number / IMAGES_PER_CELL}
        yield ImageRequest(index, seed=0, attributes=schema.check(told), steps=20, guidance_scale=2.0)


def _tile(image: Any, request: ImageRequest) -> Tile:
    return Tile((image[0] * 255.0 + 0.5).astype("uint8"), request.attributes)


def _figures(recipe: Recipe, trained: Artefact, folder: Path) -> dict[str, Any]:
    autoencoder = open_artefact(recipe.uri("autoencoder"), "autoencoder").manifest.statistics
    weights = [value for file in folder.rglob("*.safetensors") for value in load_file(file).values()]
    return {
        "autoencoder": {key: autoencoder[key] for key in ("step", "psnr_db", "l1")},
        "training": trained.manifest.statistics["training"],
        "cardiomegaly": measure(read_generator(folder, trained.digest)),
        "parameters": sum(value.numel() for value in weights),
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _publish(recipe: Recipe, trained: Artefact, folder: Path, figures: dict[str, Any]) -> Artefact:
    if figures["bytes"] > base.LIMIT_BYTES:
        raise ArtefactError(f"{trained.uri}: {figures['bytes']} bytes in float16, over {base.LIMIT_BYTES}")
    entries = [FileEntry.of(Store(str(folder)).digest(f.key)) for f in Store(str(folder)).list()]
    # Where the recipe says, not where this checkout happens to lie.
    origin = Lineage(role="float16-of", kind="generator", uri=f"{recipe.store}/generator", digest=trained.digest)
    return publish(
        Store(str(folder)), kind="generator", name=recipe.name, recipe=recipe.model_dump(mode="json"),
        inputs=[origin], files=entries, statistics=trained.manifest.statistics | {"base": figures},
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(run_recipe(embed, "embed", __doc__ or "", None))
