"""Pages that go with a release: cards of dataset and generator as the Hugging Face hub reads them, terms of sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from scanloom.artefact import Artefact
from scanloom.audit.policy import Policy
from scanloom.audit.report import Copies, Report
from scanloom.audit.verdicts import verdicts

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(dataset: Artefact, report: Report, policy: Policy) -> str:
    """README.md of a dataset: what it is, what was measured, and what that does not say."""
    head: dict[str, Any] = {
        "pretty_name": dataset.manifest.name,
        "language": ["en"],
        "tags": ["medical", "radiology", "synthetic", "croissant"],
        "task_categories": ["image-classification", "unconditional-image-generation"],
        "annotations_creators": ["machine-generated"],
        "source_datasets": ["original"],
        "size_categories": [next((name for most, name in _SIZES if report.subject.images < most), "n>1M")],
        "license": "other",
        "license_name": f"{policy.target}-use",
        "license_link": "TERMS.md",
        "configs": [{"config_name": "default", "data_files": "dataset/images/*.parquet"}],
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {dataset.manifest.name}",
        f"{report.subject.images:,} synthetic images. No image is a scan of a person: all were drawn by a generative "
        "model that learned from real scans. `dataset/manifest.json` says how, `audit/` holds the evidence.",
        "## What was found",
        _answers(report),
        _copies(report.copies),
        *_figures(report),
        "`audit/report.html` shows it with pictures, `croissant.json` describes the files to programs, `GENERATOR.md` "
        "is the card of the model that drew them.",
        "## What this does not say",
        "That no image is above the threshold is a statement about copies of the kinds that were planted. It is no "
        "proof that nothing about a person can be inferred from all images together, and no claim of anonymity in law.",
        "The images must not be used to diagnose or treat anybody.",
        f"## Use\n\nReleased for: {policy.target}. `TERMS.md` names the terms of everything that it was made from.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def model_card(generator: Artefact, corpora: Sequence[Artefact], report: Report, policy: Policy) -> str:
    """GENERATOR.md: the model that drew a dataset; it is not in the bundle. `corpora`: what it learned from."""
    head: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": ["medical", "radiology", "synthetic", "latent-diffusion"],
        "license": "other",
        "license_name": f"{policy.target}-use",
        "license_link": "TERMS.md",
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {generator.manifest.name}, the generator",
        f"A latent diffusion model for medical images. Digest {generator.digest}. The weights are not part of this "
        "release: whoever holds them can learn more about the scans than the images show.",
        "## What it learned from",
        "\n".join(f"- {_corpus(corpus)}" for corpus in corpora) or "Nothing that its lineage names.",
        "## How it was trained",
        _table(("setting", "value"), _settings(generator)),
        "## What it can be asked for",
        _table(("attribute", "trained on"), _envelope(corpora)),
        "## What was found of it",
        *(f"**{one.question}** {one.answer} {one.because}" for one in verdicts(report)),
        "## Limits\n\nIts images must not be used to diagnose or treat anybody. What is rare among the scans is rarely "
        "drawn well; nothing outside of what it was trained on can be asked for.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_SHOWN = ("steps", "batch_size", "learning_rate", "ema_decay", "prediction_type", "precision", "start_from")


def _corpus(corpus: Artefact) -> str:
    statistics = corpus.manifest.statistics
    patients = statistics.get("patients")
    told = [f"{statistics['rows']:,} scans"] if "rows" in statistics else []
    told += [f"{sum(patients.values()):,} patients"] if isinstance(patients, dict) else []
    told += ["split by patient, a part of them held out of all training"] if told else []
    return f"{corpus.manifest.name} ({corpus.digest[:12]})" + (f": {', '.join(told)}" if told else "")


def _settings(generator: Artefact) -> list[tuple[str, str]]:
    section = generator.manifest.recipe.get("finetune") or {}
    rows = [("family", str((section.get("denoiser") or {}).get("family", "unknown")))]
    rows += [(name, str(section[name])) for name in _SHOWN if section.get(name) is not None]
    training = generator.manifest.statistics.get("training") or {}
    rows += [("held-out loss", f"{training['held_out_loss']:.4f}")] if "held_out_loss" in training else []
    return [*rows, ("code", generator.manifest.code_version)]


def _envelope(corpora: Sequence[Artefact]) -> list[tuple[str, str]]:
    rows = []
    for corpus in corpora:
        envelope = corpus.manifest.statistics.get("envelope") or {}
        # Names alone: how many people have a rare finding is not for everybody.
        rows += [(name, ", ".join(values)) for name, values in envelope.get("values", {}).items()]
        rows += [(name, f"{span['low']:g} to {span['high']:g}") for name, span in envelope.get("ranges", {}).items()]
    return rows


def terms_page(policy: Policy, sources: Sequence[tuple[str, ...]]) -> str:
    """TERMS.md: under which terms each source was used."""
    rows = []
    for names in sources:
        terms = next(licence for licence in policy.licences if licence.of in names)
        rows.append((names[0], terms.terms, ", ".join(terms.allows)))
    table = _table(("made from", "terms", "they allow"), rows)
    return f"# Terms\n\nReleased for: {policy.target}.\n\n{table}\n"


def _copies(copies: Copies | None) -> str:
    if copies is None:
        return ""
    above = "No image" if not copies.synthetic_copies else f"{copies.synthetic_copies:,} images"
    return (
        f"{above} of those looked at lies above the threshold for copies of a training scan (rate "
        f"{copies.synthetic_rate}, among scans of {copies.calibration_patients} patients that nobody trained on "
        f"at most {copies.promised:.2%} "
        f"promised, {copies.held_out_rate} measured on others). Of slightly changed copies that were planted, at least "
        f"{copies.lowest_slight_recall:.1%} of each kind were found."
    )


def _answers(report: Report) -> str:
    return _table(
        ("question", "answer"), [(one.question, f"**{one.answer}** {one.because}") for one in verdicts(report)]
    )


def _figures(report: Report) -> list[str]:
    named = {**(report.fidelity or {}), **(report.appearance or {})}
    rows = [(name, str(beside.synthetic), str(beside.baseline)) for name, beside in named.items()]
    return [_table(("figure", "synthetic", "real against real"), rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
