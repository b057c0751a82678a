"""The pictures of an audit's page, as PNG: likeness to training scans, and figures with their intervals."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scanloom.audit.report import Interval, Likenesses

# Distinguishable with any colour vision and in grey (Okabe & Ito 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#6b6b6b")
_DPI = 120


@dataclass(frozen=True)
class Row:
    """A line of a plot: its label, and of each series a figure."""

    label: str
    figures: Mapping[str, Interval]


def likeness_png(likenesses: Likenesses) -> bytes:
    """How alike scans of others, synthetic images and planted copies are to their nearest training scan."""
    figure = Figure(figsize=(8, 2.8), dpi=_DPI)
    axes: Any = figure.subplots()
    shown = {
        "scans of people nobody trained on": np.asarray(likenesses.held_out),
        "synthetic images": np.asarray(likenesses.synthetic),
        "planted copies": np.asarray(likenesses.planted),
    }
    low = min([0.99, *(float(values.min()) for values in shown.values() if len(values))])
    # The encoder's likeness is a cosine; what is above 1 is rounding.
    bins = np.linspace(low, 1.0, 60)
    for (name, values), colour in zip(shown.items(), _COLOURS, strict=False):
        if len(values):
            weights = np.full(len(values), 100.0 / len(values))
            axes.hist(values.clip(max=1.0), bins=bins, weights=weights, alpha=0.6, label=name, color=colour)
    axes.axvline(likenesses.tau, color="black", linestyle="--", label="above this line: a copy")
    axes.set_xlabel("likeness to the nearest training scan (1: the same)")
    axes.set_ylabel("of 100")
    axes.legend(fontsize=8, frameon=False)
    return _png(figure)


def intervals_png(rows: Sequence[Row], about: str, span: tuple[float, float], guess: float | None = None) -> bytes:
    """Every figure as a dot with its 95 % interval, a line a row and a colour a series; `guess` is marked."""
    series = list(dict.fromkeys(name for row in rows for name in row.figures))
    figure = Figure(figsize=(8, 0.9 + 0.2 * len(rows) * (1 + len(series))), dpi=_DPI)
    axes: Any = figure.subplots()
    for number, name in enumerate(series):
        told = [(place, row.figures[name]) for place, row in enumerate(rows) if name in row.figures]
        known = [(place, one, one.value) for place, one in told if one.value is not None]
        height = [place + 0.7 * (number - (len(series) - 1) / 2) / max(1, len(series)) for place, _, _ in known]
        values = [value for _, _, value in known]
        ends = [
            [max(0.0, value - (value if one.low is None else one.low)) for _, one, value in known],
            [max(0.0, (value if one.high is None else one.high) - value) for _, one, value in known],
        ]
        axes.errorbar(values, height, xerr=ends, fmt="o", ms=4, lw=1.3, color=_COLOURS[number % 4], label=_label(name))
    if guess is not None:
        axes.axvline(guess, color="black", linestyle=":", lw=1, label="guessing")
    axes.set_yticks(range(len(rows)), [_label(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(*span)
    axes.set_xlabel(about)
    axes.grid(axis="x", color="#e4e4e4")
    axes.set_axisbelow(True)
    if len(series) > 1 or guess is not None:
        axes.legend(fontsize=8, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return _png(figure)


def _label(text: str) -> str:
    """Short enough to be drawn, and nothing in it mathematics."""
    return textwrap.shorten(text, 60, placeholder="...").replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    buffer = io.BytesIO()
    # Without matplotlib's version in it, equal figures give equal bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
