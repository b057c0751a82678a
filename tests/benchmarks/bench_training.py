"""Images per second of the training loop, beside loops written by hand; writes docs/training-speed.md.

Programs of a comparison take turns, and what counts is the median over the turns of their ratios: rates are this
machine's, and change while it is measured. Rates are of the steady state: of the median window of steps after the
warm-up, by the times in scanloom's history, reporting included, and by the peers' own clocks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.benchmarks.measured_page import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "training-speed.md"
SIZE_PX, SCANS = 64, 512
DENOISER: dict[str, Any] = {"family": "attribute-unet", "channels": [64, 128, 128]}
TEXT_SIZE_PX = 128
BATCH, LEARNING_RATE = 32, 1e-3
WARM_UP, MEASURED, STEPS = 2, 8, 5
"""Windows, and steps a window."""
ATTRIBUTES = [
    {"name": "sex", "kind": "category", "source": "PatientSex", "values": ["F", "M"]},
    {"name": "age", "source": "PatientAge", "kind": "number", "unit": "years", "minimum": 20, "maximum": 90, "cap": 90},
    {"name": "view", "kind": "category", "source": "ViewPosition", "values": ["PA", "AP"]},
    {
        "name": "findings",
        "kind": "labels",
        "source": "ImageComments",
        "values": ["Cardiomegaly", "Effusion", "Nodule", "Pneumothorax", "Consolidation"],
    },
]
RAY_NICENESS = 15
LEAST_BARE, MOST_WAIT, LEAST_TEXT, LEAST_DDP = 0.97, 0.03, 1.2, 0.95


# --- the programs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    images_per_s: float
    waited: float = 0.0
    """Share of the time that scanloom's loop waited for its data."""


def ours(recipe: Any) -> Run:
    """scanloom finetune on this recipe, Ray, workers and all; by the times of its history."""
    from jobs.finetune import finetune
    from scanloom.store import Store

    finetune(recipe)
    generator = Store(recipe.uri("generator"))
    history = [json.loads(line) for line in generator.read("training/history.jsonl").splitlines()]
    Store(recipe.store).delete(f"generator/{found.key}" for found in generator.list())
    # The last report comes after the held-out loss and the checkpoint.
    told = history[WARM_UP - 1 : -1]
    seconds = [later["time"] - sooner["time"] for sooner, later in pairwise(told)]
    return Run(_rate(seconds), statistics.mean(report["data_wait_share"] for report in told[1:]))


def peer(program: str, folder: Path, processes: int = 1) -> Run:
    """A program of training_peers on a folder that `hand_over` filled."""
    # At the low priority that Ray gives its workers, so that whatever else runs costs both programs the same.
    nice = ["nice", "-n", str(RAY_NICENESS - os.nice(0))]
    command = [*nice, sys.executable, "-m", "tests.benchmarks.training_peers", program, str(folder)]
    threads = json.loads((folder / "plan.json").read_text())["threads"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}", "OMP_NUM_THREADS": str(threads), "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(processes)
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{' '.join(command)} failed")
    return Run(_rate(json.loads(said[0].splitlines()[-1])[WARM_UP:]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rate(seconds: list[float]) -> float:
    return BATCH * STEPS / statistics.median(seconds)


# --- what they train on ---------------------------------------------------------------------------------------


def recipe_in(store: str, *, size_px: int = SIZE_PX, autoencoder: Mapping[str, Any], **finetune: Any) -> Any:
    """A recipe on phantoms that trains for as many steps as are measured, and reports once a window."""
    from scanloom.recipe import parse_recipe

    steps = STEPS * (WARM_UP + MEASURED + 1)
    section = {
        "denoiser": DENOISER, "steps": steps, "batch_size": BATCH, "learning_rate": LEARNING_RATE,
        "checkpoint_every_steps": steps, "log_every_steps": STEPS, "samples": 0,
    }  # fmt: skip
    tree = {
        "name": "bench", "store": store, "attributes": ATTRIBUTES,
        "prepare": {"source": {"kind": "phantoms", "scans": SCANS}, "size_px": size_px, "burned_in_text": "ignore"},
        "autoencoder": dict(autoencoder), "finetune": section | finetune,
    }  # fmt: skip
    return parse_recipe(tree, "bench")


def encoded(recipe: Any) -> None:
    """Make the recipe's corpus, autoencoder and latents."""
    from jobs.encode import encode
    from jobs.prepare import prepare

    prepare(recipe)
    encode(recipe)


def hand_over(recipe: Any, folder: Path, *, threads: int = 1) -> None:
    """Put what the peers train on into a folder: the corpus's train split as tensors, its latents, the plan."""
    import torch

    from scanloom.artefact import open_artefact
    from scanloom.models.conditioner import features
    from scanloom.models.generator import read_latent_shape
    from scanloom.models.prompts import prompt

    autoencoder = open_artefact(recipe.uri("autoencoder"), "autoencoder")
    autoencoder.fetch(folder)
    shape = read_latent_shape(autoencoder, recipe.prepare.size_px)
    schema, scans, latents = _train_split(recipe)
    rows = [schema.from_row(row) for row in scans.select(list(schema.names)).to_pylist()]
    columns = {name: latents[name].combine_chunks().flatten().to_numpy() for name in ("mean", "logvar")}
    torch.save(
        {
            **{name: torch.from_numpy(flat.reshape(-1, *shape).copy()) for name, flat in columns.items()},
            "features": torch.from_numpy(features(schema, rows)),
            "images": _pixels(scans),
            "prompts": [prompt(schema, row) for row in rows],
        },
        folder / "data.pt",
    )
    plan = {
        "threads": threads, "batch_size": recipe.finetune.batch_size, "learning_rate": recipe.finetune.learning_rate,
        "windows": WARM_UP + MEASURED, "steps_per_window": STEPS, "schema": schema.model_dump(mode="json"),
        "denoiser": recipe.finetune.denoiser.model_dump(mode="json"), "attributes": len(schema.names),
        "latent_shape": shape,
        "scaling_factor": json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"],
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))


def _train_split(recipe: Any) -> tuple[Any, Any, Any]:
    import pyarrow as pa

    from scanloom.artefact import open_artefact
    from scanloom.attributes import AttributeSchema
    from scanloom.shards.reader import read_parquet

    tables = []
    for kind in ("corpus", "latents"):
        artefact = open_artefact(recipe.uri(kind), kind)
        files = [file for file in artefact.files("train") if file.path.endswith(".parquet")]
        tables.append(pa.concat_tables(read_parquet(artefact.store, file) for file in files).sort_by("id"))
    return AttributeSchema.model_validate(artefact.manifest.statistics["schema"]), *tables


def _pixels(scans: Any) -> Any:
    import numpy as np
    import torch

    from scanloom.shards.writer import png_pixels

    images = [png_pixels(image["bytes"]) for image in scans["image"].to_pylist()]
    scaled = [image / (np.iinfo(image.dtype).max / 2.0) - 1.0 for image in images]
    return torch.from_numpy(np.stack(scaled)[:, None]).float()


# --- the comparisons ------------------------------------------------------------------------------------------


def in_turns(rounds: int, **programs: Callable[[], Run]) -> dict[str, list[Run]]:
    """Every program once a round, in the other order in every second round, since the first finds a rested machine."""
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for turn in range(rounds):
        for name in list(programs)[:: -1 if turn % 2 else 1]:
            runs[name].append(programs[name]())
            print(f"round {turn + 1}: {name} {runs[name][-1].images_per_s:.1f} images/s", file=sys.stderr)  # noqa: T201
    return runs


def _ratio(runs: Mapping[str, list[Run]], peer: str) -> float:
    both = zip(runs["scanloom"], runs[peer], strict=True)
    return statistics.median(ours.images_per_s / theirs.images_per_s for ours, theirs in both)


def _ratios(runs: Mapping[str, list[Run]], peer: str) -> str:
    both = zip(runs["scanloom"], runs[peer], strict=True)
    return ", ".join(f"{ours.images_per_s / theirs.images_per_s:.2f}" for ours, theirs in both)


def _table(runs: Mapping[str, list[Run]], titles: Mapping[str, str]) -> str:
    lines = ["| program | images/s | scanloom to it | by round |", "|---|---|---|---|"]
    for name, title in titles.items():
        rate = statistics.median(run.images_per_s for run in runs[name])
        compared = "| | |" if name == "scanloom" else f"| {_ratio(runs, name):.2f} | {_ratios(runs, name)} |"
        lines.append(f"| {title} | {rate:.1f} {compared}")
    return "\n".join(lines)


def _waited(runs: Mapping[str, list[Run]]) -> float:
    return statistics.median(run.waited for run in runs["scanloom"])


def loop(folder: Path, rounds: int, _: Any) -> tuple[str, list[str]]:
    """(a), (b): one worker beside a bare loop on latents in memory, and beside one that encodes at every step."""
    recipe = recipe_in(str(folder / "store"), autoencoder=_autoencoder(folder), workers=1)
    encoded(recipe)
    hand_over(recipe, folder)
    runs = in_turns(
        rounds, scanloom=lambda: ours(recipe), bare=lambda: peer("bare", folder), online=lambda: peer("online", folder)
    )
    titles = {
        "scanloom": "scanloom, 1 worker of 1 thread",
        "bare": "PyTorch in one process, latents in memory",
        "online": "the same, encoding the scans at every step",
    }
    waited, ratio = _waited(runs), _ratio(runs, "bare")
    missed = [f"loop: {ratio:.3f} of the bare loop, asked {LEAST_BARE}"] * (ratio < LEAST_BARE)
    missed += [f"loop: waits for data {waited:.1%} of the time, asked {MOST_WAIT:.0%}"] * (waited >= MOST_WAIT)
    text = (
        f"The attribute-unet of the demo ({DENOISER['channels']} channels) on latents of {SIZE_PX}x{SIZE_PX} scans, "
        f"batches of {BATCH}, float32.\n\n{_table(runs, titles)}\n\n"
        f"scanloom's loop waits for its data {waited:.1%} of the time.\n"
    )
    return text, missed


def _autoencoder(folder: Path) -> dict[str, Any]:
    """The demo's autoencoder, untrained: latents are as many."""
    from scanloom.models.autoencoder import build_autoencoder
    from scanloom.recipe import Autoencoder

    build_autoencoder(Autoencoder(channels=(16, 32, 64)), SIZE_PX, 0).save_pretrained(folder / "given")
    return {"path": str(folder / "given")}


def text_to_image(folder: Path, rounds: int, _: Any) -> tuple[str, list[str]]:
    """(c): Stable Diffusion beside a loop of accelerate that encodes scans and prompts at every step."""
    from tests.benchmarks.training_sd import save_stable_diffusion

    save_stable_diffusion(folder / "base")
    recipe = recipe_in(
        str(folder / "store"), size_px=TEXT_SIZE_PX, autoencoder={"path": str(folder / "base" / "vae")},
        denoiser={"family": "sd", "weights": str(folder / "base")}, workers=1, min_snr_gamma=None,
    )  # fmt: skip
    encoded(recipe)
    hand_over(recipe, folder)
    runs = in_turns(rounds, scanloom=lambda: ours(recipe), accelerate=lambda: peer("text-to-image", folder))
    titles = {"scanloom": "scanloom, family sd", "accelerate": "accelerate, encoding scans and prompts at every step"}
    ratio = _ratio(runs, "accelerate")
    missed = [f"text-to-image: {ratio:.2f} of accelerate's, asked {LEAST_TEXT}"] * (ratio < LEAST_TEXT)
    return f"{_table(runs, titles)}\n", missed


def ddp(folder: Path, rounds: int, _: Any) -> tuple[str, list[str]]:
    """(d): ZeRO-1 on two workers beside DistributedDataParallel on two processes."""
    recipe = recipe_in(str(folder / "store"), autoencoder=_autoencoder(folder), workers=2, zero_stage=1)
    encoded(recipe)
    hand_over(recipe, folder)
    runs = in_turns(
        rounds, scanloom=lambda: ours(recipe), ddp=lambda: peer("ddp", folder, processes=2),
        ray=lambda: peer("ddp-on-ray", folder),
    )  # fmt: skip
    titles = {
        "scanloom": "scanloom, ZeRO-1, 2 workers",
        "ddp": "DistributedDataParallel over gloo, 2 processes",
        "ray": "the same as 2 workers of Ray Train",
    }
    ratio = _ratio(runs, "ddp")
    missed = [f"ddp: {ratio:.3f} of DistributedDataParallel's, asked {LEAST_DDP}"] * (ratio < LEAST_DDP)
    text = (
        f"The denoiser and batches of the first table, half a batch a worker, one thread each.\n\n"
        f"{_table(runs, titles)}\n\n"
        f"DistributedDataParallel sums all gradients on all workers. scanloom's workers send each other only what the "
        f"other steps, while they compute the rest, and their weights after every step (`scanloom.training.exchange`). "
        f"The last two rows differ by what Ray's own processes, which wake many times a second, take from workers that "
        f"hold every core of the machine, and by the memory that glibc gives back to the kernel where a thread trains, "
        f"not a process (scanloom has it kept).\n"
    )
    return text, missed


def gpu(_: Path, __: int, asked: Any) -> tuple[str, list[str]]:
    """(e): a UNet of Stable Diffusion 2.1's size on one GPU."""
    from tests.benchmarks.training_gpu import page

    return page(asked.batch_sizes, checkpointing=asked.checkpointing)


# --- the page -------------------------------------------------------------------------------------------------

HEAD = """# How fast training runs

Measured by `tests/benchmarks/bench_training.py`. Ratios are what to compare: rates are each machine's. The programs
of a table take turns, and a ratio is the median of those of the rounds. A rate is that of the median window of
{steps} steps once {warm_up} windows have passed: start-up, checkpoints and held-out losses are left out of it, reports
are not. The peers are written by hand in `tests/benchmarks/training_peers.py`: the same model, optimizer, objective,
clipping and averaged weights, and neither reports nor checkpoints.
"""
PARTS: dict[str, tuple[str, Callable[[Path, int, Any], tuple[str, list[str]]]]] = {
    "loop": ("One worker", loop),
    "text-to-image": ("Stable Diffusion", text_to_image),
    "ddp": ("Two workers", ddp),
    "gpu": ("One GPU", gpu),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure and to write")
    options.add_argument("--batch-sizes", nargs="+", type=int, help="of the part gpu")
    options.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, of the part gpu")
    asked = options.parse_args()
    os.environ.setdefault("SCANLOOM_PSEUDONYM_KEY", "bench" * 8)
    missed = []
    for part in asked.parts:
        title, measure = PARTS[part]
        with tempfile.TemporaryDirectory(prefix="scanloom-bench-") as folder:
            text, short = measure(Path(folder), asked.rounds, asked)
        how = "" if part == "gpu" else f", {asked.rounds} rounds"
        section = f"## {title}\n\nOn {machine()}{how}.\n\n{text}"
        write_section(
            PAGE, HEAD.format(steps=STEPS, warm_up=WARM_UP), [name for name, _ in PARTS.values()], title, section
        )
        print(section)  # noqa: T201
        missed += short
    print(*missed, sep="\n")  # noqa: T201
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
