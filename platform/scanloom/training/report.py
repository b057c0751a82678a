"""The training report: one HTML file, without external resources, of what a run's journal holds."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from scanloom.training.probes import bucket_names

History = Sequence[Mapping[str, Any]]
Series = list[tuple[int, float]]

# A held-out loss this much above its best has risen; one that fell by less over the last third has levelled off.
_RISEN, _LEVEL = 0.02, 0.01
_MUCH_WAITING = 0.03
_MOST_PICTURES = 6
# Distinguishable with any colour vision and in grey (Okabe & Ito 2008).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#6b6b6b"
_LOOK: Any = {
    "svg.hashsalt": "scanloom",
    "svg.fonttype": "none",
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A figure, and what it shows in words."""

    title: str
    figure: Figure
    alt: str
    note: str


def training_report(
    history: History, pictures: Mapping[int, bytes], facts: Mapping[str, str], *, title: str = "Training report"
) -> str:
    """The report of a run: `history` as of `journal.read_history`, sample grids as PNG by step, what was trained.

    `facts` are shown as they are, name and value, in their order. Every figure comes from the history.
    """
    sections = [
        _section("What was trained", _table((), facts.items())),
        _section("In short", "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in verdict(history)) + "</ul>"),
        _section("Figures", _table(("", "value"), _summary(history))),
        *(_section(plot.title, _figure(_svg(plot), "svg+xml", plot.alt, plot.note)) for plot in plots(history)),
        *_samples(pictures),
        _section("Evaluations", _table(*_evaluations(history))),
    ]
    return _PAGE.format(title=html.escape(title), body="\n".join(sections))


def verdict(history: History) -> list[str]:
    """What the figures say, in plain sentences."""
    lines = [_held_out_verdict(series(history, "held_out_loss"))]
    lines += _copy_verdict(history)
    waits = [share for _, share in series(history, "data_wait_share")]
    if waits:
        share = statistics.fmean(waits)
        judged = "data is made too slowly for the device" if share > _MUCH_WAITING else "data keeps up"
        lines.append(f"Workers spent {share:.1%} of the time waiting for data: {judged}.")
    return lines


def series(history: History, name: str) -> Series:
    """The (step, value) pairs of the reports that hold a value of this name."""
    return [(int(row["step"]), float(row[name])) for row in history if row.get(name) is not None]


def plots(history: History) -> list[Plot]:
    """The plots that the history has figures for."""
    with matplotlib.rc_context(_LOOK):
        made = [_loss(history), _held_out(history), _by_timestep(history), _speed(history), _copying(history)]
    return [plot for plot in made if plot is not None]


def _held_out_verdict(held_out: Series) -> str:
    if len(held_out) < 3:
        return f"Held-out loss was measured {len(held_out)} times, too few to tell where it goes."
    (best_at, best), (last_at, last) = min(held_out, key=lambda point: point[1]), held_out[-1]
    if last > best * (1 + _RISEN):
        return (
            f"Held-out loss rose from {best:.4g} at step {best_at} to {last:.4g} at step {last_at}: "
            f"the run is over-trained; about {best_at} steps generalise best."
        )
    from_step = held_out[0][0] + (last_at - held_out[0][0]) * 2 / 3
    earlier_at, earlier = next(point for point in reversed(held_out[:-1]) if point[0] <= from_step)
    if last < earlier * (1 - _LEVEL):
        return (
            f"Held-out loss was still falling at the end, from {earlier:.4g} at step {earlier_at} to {last:.4g} "
            f"at step {last_at}: more steps may help."
        )
    return f"Held-out loss has levelled off: {earlier:.4g} at step {earlier_at}, {last:.4g} at step {last_at}."


def _copy_verdict(history: History) -> list[str]:
    rows = [row for row in history if row.get("copy_rate") is not None]
    if not rows:
        return ["Copying was not measured."]
    last = rows[-1]
    measured = (
        f"{last['copy_rate']:.0%} of the samples are nearer to a training latent than to any held-out one "
        f"(95 % interval {last['copy_rate_low']:.0%} to {last['copy_rate_high']:.0%}; chance gives 50 %)"
    )
    above = [int(row["step"]) for row in rows if row["copy_rate_low"] > 0.5]
    if last["copy_rate_low"] > 0.5:
        return [f"{measured}: above chance, first at step {above[0]}. The generator has begun to memorise scans."]
    if above:
        return [f"{measured}: no sign of copying at the end, but it was above chance at step {above[0]}."]
    if last["copy_rate_high"] < 0.5:
        return [f"{measured}: below chance, which a random split does not give. Check how scans were split."]
    return [f"{measured}: no sign of copying. This is no evidence of privacy; the audit measures that."]


def _summary(history: History) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if steps := series(history, "step"):
        rows.append(("optimizer steps", f"{steps[-1][0]}"))
    if loss := series(history, "loss"):
        rows.append(("training loss, last", f"{loss[-1][1]:.4g}"))
    if held_out := series(history, "held_out_loss"):
        best_at, best = min(held_out, key=lambda point: point[1])
        rows.append(("held-out loss, last", f"{held_out[-1][1]:.4g}"))
        rows.append(("held-out loss, best", f"{best:.4g} at step {best_at}"))
    for name, text, form in (
        ("images_per_s", "images per second, median of the windows", "{:.4g}"),
        ("data_wait_share", "share of time spent waiting for data, median", "{:.1%}"),
        ("mfu", "model FLOP utilisation, median", "{:.1%}"),
    ):
        if values := [value for _, value in series(history, name)]:
            rows.append((text, form.format(statistics.median(values))))
    if memory := series(history, "memory_gb"):
        rows.append(("most memory held by a worker", f"{max(value for _, value in memory):.3g} GB"))
    return rows


def _evaluations(history: History) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    heads = ("step", "training loss", "held-out loss", "copy rate", "95 % interval", "distance ratio")
    names = ("loss", "held_out_loss", "copy_rate", "copy_rate_low", "copy_rate_high", "copy_distance_ratio")
    rows: list[tuple[str, ...]] = []
    for row in history:
        if row.get("held_out_loss") is None and row.get("copy_rate") is None:
            continue
        loss, held_out, rate, low, high, ratio = (_cell(row.get(name)) for name in names)
        rows.append((str(row["step"]), loss, held_out, rate, f"{low} to {high}" if rate else "", ratio))
    return heads, rows


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _loss(history: History) -> Plot | None:
    loss = series(history, "loss")
    if not loss:
        return None
    figure, (axes,) = _canvas(1)
    _line(axes, loss, _BLUE, marker="")
    axes.set_title("training loss, weighted as the recipe says")
    _log_where_wide(axes, loss)
    return Plot("Training loss", figure, f"Training loss: {_course(loss)}.", "Mean of each window of steps.")


def _held_out(history: History) -> Plot | None:
    held_out = series(history, "held_out_loss")
    if not held_out:
        return None
    figure, (axes,) = _canvas(1)
    _line(axes, held_out, _ORANGE)
    best_at, best = min(held_out, key=lambda point: point[1])
    axes.plot([best_at], [best], marker="o", markersize=11, markerfacecolor="none", color=_GREY, linestyle="none")
    axes.annotate(
        f"best, step {best_at}", (best_at, best), xytext=(0, 10), textcoords="offset points", ha="center", color=_GREY
    )
    axes.set_title("held-out loss")
    axes.margins(y=0.15)
    return Plot(
        "Held-out loss",
        figure,
        f"Held-out loss: {_course(held_out)}, best {best:.4g} at step {best_at}.",
        "Unweighted, of the averaged weights, on scans that are not trained on. The same scans and noise every time.",
    )


def _by_timestep(history: History) -> Plot | None:
    rows = [row for row in history if row.get("held_out_by_timestep")]
    if not rows:
        return None
    names = bucket_names(len(rows[0]["held_out_by_timestep"]))
    colours = matplotlib.colormaps["viridis"]
    figure, (axes,) = _canvas(1, height=3.8)
    told = []
    for number, name in enumerate(names):
        points = [(int(row["step"]), row["held_out_by_timestep"][number]) for row in rows]
        known: Series = [(step, value) for step, value in points if value is not None]
        if not known:
            continue
        _line(axes, known, colours(0.92 * number / max(1, len(names) - 1)), label=name[1:])
        told.append(f"{name[1:]} {_course(known)}")
    _logarithmic(axes)
    axes.set_title("held-out loss by timestep, logarithmic")
    axes.legend(title="timesteps", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Plot(
        "Held-out loss by timestep",
        figure,
        f"Held-out loss by timestep: {'; '.join(told)}.",
        "Low timesteps are fine detail, high ones the layout of the whole image.",
    )


def _speed(history: History) -> Plot | None:
    panels = [
        (title, [(step, value * scale) for step, value in series(history, name)], colour)
        for name, title, scale, colour in (
            ("images_per_s", "images per second", 1.0, _BLUE),
            ("data_wait_share", "waiting for data, %", 100.0, _ORANGE),
            ("mfu", "model FLOP utilisation, %", 100.0, _GREEN),
            ("memory_gb", "memory, GB", 1.0, _GREY),
        )
        if series(history, name)
    ]
    if not panels:
        return None
    figure, all_axes = _canvas(len(panels), height=2.6)
    for axes, (title, points, colour) in zip(all_axes, panels, strict=True):
        _line(axes, points, colour, marker="")
        axes.set_title(title)
        axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1.0)
    told = "; ".join(f"{title} {_course(points)}" for title, points, _ in panels)
    return Plot("Speed and memory", figure, f"{told}.", "Of each window; memory is the most held so far by a worker.")


def _copying(history: History) -> Plot | None:
    rate, ratio = series(history, "copy_rate"), series(history, "copy_distance_ratio")
    if not rate:
        return None
    figure, (left, right) = _canvas(2)
    steps = [step for step, _ in rate]
    low, high = ([value for _, value in series(history, f"copy_rate_{end}")] for end in ("low", "high"))
    left.fill_between(steps, low, high, color=_ORANGE, alpha=0.2, linewidth=0, label="95 % interval")
    _line(left, rate, _ORANGE, label="share of samples")
    left.axhline(0.5, color=_GREY, linestyle="--", linewidth=1.2, label="chance")
    left.set_ylim(0, 1.02)
    left.set_title("nearer to training than to held-out")
    left.legend(loc="lower right")
    _line(right, ratio, _BLUE)
    right.axhline(1.0, color=_GREY, linestyle="--", linewidth=1.2)
    right.set_ylim(0, max(1.2, *(value * 1.1 for _, value in ratio)))
    right.set_title("median ratio of the two distances")
    return Plot(
        "Copying",
        figure,
        f"Share of samples nearer to training than to held-out latents: {_course(rate)}; chance is 0.5. "
        f"Median ratio of the distances: {_course(ratio)}; 1 without copying.",
        "Each sample's nearest training latent against its nearest of as many held-out ones, in latent space.",
    )


def _canvas(panels: int, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, height), layout="constrained")
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for one in axes:
        one.set_xlabel("step")
        one.locator_params(axis="x", nbins=max(3, 9 // panels), integer=True)
    return figure, axes


def _line(axes: Axes, points: Series, colour: Any, *, marker: str = "o", label: str | None = None) -> None:
    steps, values = zip(*points, strict=True)
    # A single window has no line.
    shown = "o" if len(points) == 1 else marker
    axes.plot(steps, values, color=colour, marker=shown, markersize=4, linewidth=1.6, label=label)


def _log_where_wide(axes: Axes, points: Series) -> None:
    values = [value for _, value in points]
    if min(values) > 0 and max(values) > 10 * min(values):
        _logarithmic(axes)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _course(points: Series) -> str:
    (first_at, first), (last_at, last) = points[0], points[-1]
    return f"{first:.3g} at step {first_at}, {last:.3g} at step {last_at}"


def _svg(plot: Plot) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(_LOOK):
        plot.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _samples(pictures: Mapping[int, bytes]) -> list[str]:
    """The first, the last and evenly spaced ones between."""
    steps = sorted(pictures)
    if not steps:
        return []
    shown = min(_MOST_PICTURES, len(steps))
    chosen = {steps[round(k * (len(steps) - 1) / max(1, shown - 1))] for k in range(shown)}
    figures = [
        _figure(pictures[step], "png", f"Sample images drawn at step {step}.", f"Step {step}.")
        for step in sorted(chosen)
    ]
    note = "<p>Each place of the grid has the same noise and the same attributes at every step.</p>"
    return [_section("Samples", note + "".join(figures))]


def _figure(content: bytes, kind: str, alt: str, note: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}">'
        f"<figcaption>{html.escape(note)}</figcaption></figure>"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in heads)
    body = [
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    ]
    head = f"<thead><tr>{top}</tr></thead>" if any(heads) else ""
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.7rem; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }}
li {{ margin: .3rem 0; }}
figure {{ margin: 0 0 1.2rem; break-inside: avoid; }}
img {{ max-width: 100%; height: auto; }}
figcaption, p {{ color: #555; font-size: .9rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #eee; vertical-align: top; }}
th[scope=row] {{ font-weight: 500; }}
td {{ overflow-wrap: anywhere; }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11pt; }} h2 {{ break-after: avoid; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
