"""Pages that go with a released dataset: its card in the form of the Hugging Face hub, and the terms of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from scanloom.artefact import Artefact
from scanloom.audit.policy import Policy
from scanloom.audit.report import Copies, Report

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(dataset: Artefact, report: Report, policy: Policy) -> str:
    """README.md of a dataset: what it is, what was measured, and what that does not say."""
    head: dict[str, Any] = {
        "pretty_name": dataset.manifest.name,
        "tags": ["medical", "radiology", "synthetic"],
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
        "## What was measured",
        _copies(report.copies),
        *_figures(report),
        "## What this does not say",
        "That no image is above the threshold is a statement about copies of the kinds that were planted. It is no "
        "proof that nothing about a person can be inferred from all images together, and no claim of anonymity in law.",
        "The images must not be used to diagnose or treat anybody.",
        f"## Use\n\nReleased for: {policy.target}. `TERMS.md` names the terms of everything that it was made from.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def terms_page(policy: Policy, sources: Sequence[tuple[str, ...]]) -> str:
    """TERMS.md: under which terms each source was used."""
    lines = [f"# Terms\n\nReleased for: {policy.target}.\n", "| made from | terms | they allow |", "|---|---|---|"]
    for names in sources:
        terms = next(licence for licence in policy.licences if licence.of in names)
        lines.append(f"| {names[0]} | {terms.terms} | {', '.join(terms.allows)} |")
    return "\n".join(lines) + "\n"


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


def _figures(report: Report) -> list[str]:
    named = {**(report.fidelity or {}), **(report.appearance or {})}
    if not named:
        return []
    lines = ["| figure | synthetic | real against real |", "|---|---|---|"]
    return [
        "\n".join([*lines, *(f"| {name} | {beside.synthetic} | {beside.baseline} |" for name, beside in named.items())])
    ]
