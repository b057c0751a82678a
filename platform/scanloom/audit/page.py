"""An audit as one HTML file that needs nothing else: what it says first, in plain words; then figures and pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scanloom.audit.report import Copies, Report

Floats = NDArray[np.float64]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ccc;
text-align: left; } img { max-width: 100%; } .good { color: #12632a; } .bad { color: #a01414; } small { color: #555; }
"""


@dataclass(frozen=True)
class Likenesses:
    """How alike images and their nearest training scans are."""

    tau: float
    held_out_N: Floats
    synthetic_N: Floats
    planted_N: Floats
    """Of training scans changed in all of the slight ways at once."""


def page(report: Report, likenesses: Likenesses, sheet_png: bytes) -> str:
    """The whole page; `sheet_png` shows synthetic images."""
    name = html.escape(report.subject.name)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Audit of {name}</title><style>{_STYLE}</style>",
        f"<h1>Audit of {name}</h1>",
        f"<p>{report.subject.looked_at:,} of {report.subject.images:,} synthetic images were looked at.</p>",
        "<h2>Does it contain anybody's scan?</h2>",
        *(_copies(report.copies) if report.copies else ["<p class=bad>Not measured.</p>"]),
        _image(_histogram(likenesses), "likeness of images to training scans"),
        "<h2>Does it look like the real thing?</h2>",
        "<p>Each figure stands beside what it is between two sets of real scans of different people: no synthetic set "
        "can be expected to do better. Brackets hold 95 % intervals.</p>",
        _figures(report),
        _image(sheet_png, "synthetic images"),
        *_fairness(report),
        "<h2>What this does not say</h2>",
        "<p>That no image lies above the threshold is a statement about copies of the kinds that were planted. It is "
        "no proof that nothing can be inferred about a person, and no claim of anonymity in law. "
        f"Not measured: membership inference, usefulness for training{'' if report.fairness else ', fairness'}.</p>",
        f"<h2>Numbers</h2><p><small>dataset {report.subject.dataset}<br>corpus {report.subject.corpus}<br>"
        f"measured in {report.seconds:.0f} s; all of it is in report.json</small></p>",
        *(_power(report.copies) if report.copies else []),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _copies(copies: Copies) -> list[str]:
    if copies.excess:
        verdict = (
            f"<p class=bad><b>Yes, it seems to.</b> {copies.synthetic_copies:,} images are as alike to one of "
            f"{copies.copied_scans:,} training scans as copies are, far more than chance explains.</p>"
        )
    elif copies.synthetic_copies:
        verdict = (
            f"<p><b>{copies.synthetic_copies:,} images</b> are as alike to a training scan as copies are, no more than "
            "among scans of people that nobody trained on. Look at them before you hand the images out.</p>"
        )
    else:
        verdict = "<p class=good><b>No image that was looked at is as alike to a training scan as copies are.</b></p>"
    return [
        verdict,
        f"<p>The share of images above the threshold is {copies.synthetic_rate}; among scans of patients that nobody "
        f"trained on it is {copies.held_out_rate}. To see whether copies would have been found, training scans were "
        f"shifted, mirrored, turned, blurred and changed in contrast: of each kind at least "
        f"{copies.lowest_slight_recall:.1%} were found.</p>",
        f"<p>The threshold follows from {copies.calibration_patients} held-out patients: of further people like them, "
        f"at most {copies.promised:.1%} on average have a scan above it.</p>",
    ]


def _figures(report: Report) -> str:
    named = {**(report.fidelity or {}), **(report.appearance or {})}
    rows = [(name, str(one.synthetic), str(one.baseline), f"{one.images:,}") for name, one in named.items()]
    return _table(("figure", "synthetic against real", "real against real", "images"), rows)


def _fairness(report: Report) -> list[str]:
    if not report.fairness:
        return []
    rows = [
        (
            one.name, one.cell, str(one.asked), str(one.achieved), _number(one.held_out_truth),
            _number(one.held_out_read), f"{one.images:,}{' (few)' if one.small else ''}",
        )
        for one in report.fairness
    ]  # fmt: skip
    return [
        "<h2>Does it show what was asked for, in every group?</h2>",
        "<p>A classifier read every image. It errs: the columns of real scans say how often something is true of them, "
        "and how often it is read. A gap of the images that real scans have too is the classifier's.</p>",
        _table(("what", "of", "asked", "read", "real: true", "real: read", "images"), rows),
    ]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _power(copies: Copies) -> list[str]:
    planted = [(one.plant, one.strength, str(one.recall), f"{one.traced:.3f}") for one in copies.power]
    peers = [
        (one.name, f"{one.lowest_slight_recall:.3f}", str(one.copy_rate), str(one.held_out_rate))
        for one in copies.peers
    ]
    mine = ("this audit", f"{copies.lowest_slight_recall:.3f}", str(copies.synthetic_rate), str(copies.held_out_rate))
    return [
        "<h3>Planted copies</h3>",
        _table(("change", "strength", "found", "led to the right patient"), planted),
        "<h3>Beside other ways to look for copies, at the same rule of threshold</h3>",
        _table(("way", "slight copies found at least", "images above", "held-out scans above"), [mine, *peers]),
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _image(png: bytes, described: str) -> str:
    return f'<p><img alt="{html.escape(described)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _histogram(likenesses: Likenesses) -> bytes:
    figure = Figure(figsize=(8, 3), dpi=120)
    axes: Any = figure.subplots()
    shown = {
        "scans of patients nobody trained on": likenesses.held_out_N,
        "synthetic images": likenesses.synthetic_N,
        "planted copies": likenesses.planted_N,
    }
    low = min((float(values.min()) for values in shown.values() if len(values)), default=0.0)
    bins = np.linspace(low, 1.0, 60)
    for name, values in shown.items():
        if len(values):
            axes.hist(values, bins=bins, weights=np.full(len(values), 1.0 / len(values)), alpha=0.6, label=name)
    axes.axvline(likenesses.tau, color="black", linestyle="--", label="threshold")
    axes.set_xlabel("likeness to the nearest training scan")
    axes.set_ylabel("share")
    axes.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
