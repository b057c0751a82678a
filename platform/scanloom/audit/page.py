"""An audit as one HTML file that needs nothing else: verdicts in plain words first, then why, then every figure."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence

from scanloom.audit.plots import Row, intervals_png, likeness_png
from scanloom.audit.report import Copies, Criterion, Interval, Likenesses, Reading, Report
from scanloom.audit.verdicts import ALL, Grade, Verdict, verdicts
from scanloom.recipe_audit import ARMS

_STYLE = """
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; } .under { color: #555; margin-top: .2rem; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(27rem, 1fr)); gap: .8rem; margin: 1.5rem 0; }
.verdict { border: 1px solid #ddd; border-left: .45rem solid #8a8a8a; border-radius: .3rem; padding: .6rem .9rem; }
.verdict h3 { margin: 0; font-size: 1rem; font-weight: 500; color: #444; }
.verdict .answer { margin: .1rem 0 .3rem; font-size: 1.15rem; font-weight: 700; }
.verdict .why { margin: 0; font-size: .9rem; color: #333; }
.good { border-left-color: #009e73; } .look { border-left-color: #e69f00; } .bad { border-left-color: #b01515; }
.mark { display: inline-block; width: 1.4rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
img { max-width: 100%; } small, .note { color: #555; } details { margin: .6rem 0; } summary { cursor: pointer; }
@media print { details > * { display: block; } .verdict { break-inside: avoid; } }
"""
_MARKS: dict[Grade, str] = {"good": "✓", "look": "!", "bad": "✗", "unmeasured": "–"}
_SHARES = ("precision", "recall", "coverage")
_HIGHER_IS_BETTER = (*_SHARES, "density")
_MEANS = {
    "precision": "images that lie where real scans lie",
    "recall": "real scans that have an image near them",
    "density": "how densely images lie where real scans lie",
    "coverage": "real scans of which an image is among the nearest",
    "frechet": "distance of the two sets as a whole (Fréchet)",
    "kid": "distance of the two sets as a whole (kernel)",
}


def page(report: Report, likenesses: Likenesses, sheet_png: bytes) -> str:
    """The whole page; `sheet_png` shows synthetic images."""
    subject, name = report.subject, _plain(report.subject.name)
    told = verdicts(report)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        f'<meta name=viewport content="width=device-width"><title>Audit of {name}</title>',
        f"<style>{_STYLE}</style></head><body><h1>Audit of {name}</h1>",
        f"<p class=under>{subject.images:,} synthetic images, {subject.looked_at:,} of them looked at. What was found, "
        "in plain words first; the figures behind each answer are below, and all of them in report.json.</p>",
        '<div class="verdicts">', *map(_verdict, told), "</div>",
        *_copies(report, likenesses), *_membership(report), *_likeness(report, sheet_png),
        *_fairness(report), *_utility(report), *_scorecard(report.scorecard),
        "<h2>What this does not say</h2>",
        "<p>That no image lies above the threshold is a statement about copies of the kinds that were planted. It is "
        "no proof that nothing can be inferred about a person, and no claim of anonymity in law. The images must not "
        "be used to diagnose or treat anybody.</p>",
        f"<p>Not measured: {_unmeasured(told)}.</p>",
        f"<p><small>dataset {subject.dataset}<br>corpus {subject.corpus}<br>measured in {report.seconds:.0f} s"
        "</small></p></body></html>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _verdict(one: Verdict) -> str:
    return (
        f'<div class="verdict {one.grade}"><h3>{_plain(one.question)}</h3>'
        f'<p class="answer"><span class="mark">{_MARKS[one.grade]}</span>{_plain(one.answer)}</p>'
        f'<p class="why">{_plain(one.because)}</p></div>'
    )


def _unmeasured(told: Sequence[Verdict]) -> str:
    return ", ".join(one.topic for one in told if one.grade == "unmeasured") or "none of the questions above"


# --- by question ----------------------------------------------------------------------------------------------


def _copies(report: Report, likenesses: Likenesses) -> Iterator[str]:
    copies = report.copies
    if copies is None:
        return
    yield "<h2>Copies of training scans</h2>"
    yield (
        "<p>An encoder that learned to recognise a scan however it is shifted, turned, mirrored or changed in contrast "
        f"looked up every image among {copies.train_scans:,} of {copies.corpus_scans:,} training scans. What counts as "
        "a copy follows from "
        f"{copies.calibration_patients} patients that nobody trained on: of further people like them at most "
        f"{copies.promised:.1%} on average have a scan to the right of the line.</p>"
    )
    yield _image(likeness_png(likenesses), "likeness of images to training scans")
    yield _table(
        ("above the line", "share (95 % interval)", "of"),
        [
            ("synthetic images", str(copies.synthetic_rate), f"{report.subject.looked_at:,}"),
            ("scans of other people", str(copies.held_out_rate), f"{copies.held_out_scans:,}"),
        ],
    )
    yield from _power(copies)


def _power(copies: Copies) -> Iterator[str]:
    planted = [(one.plant, one.strength, str(one.recall), f"{one.traced:.3f}") for one in copies.power]
    mine = ("this audit", f"{copies.lowest_slight_recall:.3f}", str(copies.synthetic_rate), str(copies.held_out_rate))
    peers = [
        (one.name, f"{one.lowest_slight_recall:.3f}", str(one.copy_rate), str(one.held_out_rate))
        for one in copies.peers
    ]
    yield "<details><summary>Would copies have been found? Planted copies, and other ways to look</summary>"
    yield _table(("planted: training scan", "strength", "found", "led to the right patient"), planted)
    yield _table(("way to look", "slight copies found at least", "images above", "other people above"), [mine, *peers])
    yield "</details>"


def _membership(report: Report) -> Iterator[str]:
    found = report.membership
    if found is None:
        return
    yield "<h2>Whose scans it was made from</h2>"
    yield (
        f"<p>{found.members:,} scans that the generator learned from and {found.others:,} of "
        f"{found.other_patients:,} patients that it never saw were given to whoever holds the generator. "
        "0.5 is guessing, 1 is to know of everybody.</p>"
    )
    rows = [Row(one.name, {"right of pairs": one.auc}) for one in found.attacks]
    yield _image(intervals_png(rows, "pairs told right (AUC, 95 % interval)", (0.3, 1.0), 0.5), "attacks")
    shown = [(one.name, str(one.auc), str(one.tpr)) for one in found.attacks]
    recognised = f"recognised at 1 % false alarms (guessing: {found.guessed_tpr:.2g})"
    yield _table(("attack", "AUC (guessing: 0.5)", recognised), shown)


def _likeness(report: Report, sheet_png: bytes) -> Iterator[str]:
    figures = report.fidelity or {}
    yield "<h2>Likeness to real scans</h2>"
    yield (
        "<p>Each figure stands beside what it is between two sets of real scans of different people: no synthetic set "
        "can be expected to do better.</p>"
    )
    rows = [
        Row(_MEANS[name], {"synthetic": figures[name].synthetic, "real scans of others": figures[name].baseline})
        for name in _SHARES
        if name in figures
    ]
    if rows:
        yield _image(intervals_png(rows, "share, 95 % interval", (0.0, 1.0)), "likeness in shares")
    yield _image(sheet_png, "synthetic images")
    shown = [
        (name, _MEANS.get(name, ""), "higher" if name in _HIGHER_IS_BETTER else "lower", str(one.synthetic),
         str(one.baseline), f"{one.images:,}")
        for name, one in {**figures, **(report.appearance or {})}.items()
    ]  # fmt: skip
    columns = ("figure", "what it is", "better", "synthetic against real", "real against real", "images")
    yield f"<details><summary>All figures with their 95 % intervals</summary>{_table(columns, shown)}</details>"
    for given in report.fidelity_given:
        theirs = [(name, str(one.synthetic), str(one.baseline)) for name, one in given.figures.items()]
        told = _table(("figure", "synthetic against real", "real against real"), theirs)
        yield f"<details><summary>The same as {_plain(given.backbone)} sees it</summary>{told}</details>"


def _fairness(report: Report) -> Iterator[str]:
    if not report.fairness and not report.subgroups and not report.gaps:
        return
    yield "<h2>What was asked for, by group</h2>"
    if report.fairness:
        yield from _readings(report.fairness)
    if report.gaps:
        gaps = [
            (one.figure, one.of, one.worst, one.best, str(one.gap), "" if one.baseline is None else str(one.baseline))
            for one in report.gaps
        ]
        yield "<h3>How far the worst-off group lies from the best</h3>"
        yield "<p class=note>The two were chosen after looking, which their intervals allow for.</p>"
        yield _table(("figure", "groups by", "worst", "best", "gap (95 % interval)", "real scans"), gaps)
    if report.subgroups:
        shown = [
            (f"{one.cell}{' (few)' if one.small else ''}", name, str(beside.synthetic), str(beside.baseline),
             f"{one.images:,}", f"{one.held_out_scans:,}")
            for one in report.subgroups for name, beside in one.figures.items()
        ]  # fmt: skip
        columns = ("group", "figure", "synthetic", "real against real", "images", "held-out scans")
        yield f"<details><summary>Likeness within each group</summary>{_table(columns, shown)}</details>"


def _readings(found: Sequence[Reading]) -> Iterator[str]:
    yield (
        "<p>A classifier read every image. It errs: where real scans show the same gap between what is true and what "
        "is read, the gap is the classifier's.</p>"
    )
    rows = [
        Row(one.name, {"asked for": one.asked, "read in the images": one.achieved})
        for one in found
        if one.cell == ALL and one.share
    ]
    if rows:
        yield _image(intervals_png(rows, "share of images", (0.0, 1.0)), "asked for and read")
    shown = [
        (
            one.name, one.cell, str(one.asked), str(one.achieved), _number(one.held_out_truth),
            _number(one.held_out_read), f"{one.images:,}{' (few)' if one.small else ''}",
        )
        for one in found
    ]  # fmt: skip
    columns = ("what", "of", "asked", "read", "real: true", "real: read", "images")
    yield f"<details><summary>Every group and every reading</summary>{_table(columns, shown)}</details>"


def _utility(report: Report) -> Iterator[str]:
    found = report.utility
    if found is None or not found.figures:
        return
    yield "<h2>Use for training</h2>"
    yield (
        f"<p>Classifiers ({_plain(found.classifier)}) learned findings from {found.train_scans:,} real scans, "
        f"from {found.synthetic_images:,} synthetic images, or from both, and read held-out real scans of other "
        "people.</p>"
    )
    labels = list(dict.fromkeys(one.label for one in found.figures if one.cell == ALL))
    named: dict[tuple[str, str], Interval] = {(one.label, one.arm): one.auc for one in found.figures if one.cell == ALL}
    rows = [Row(label, {f"from {arm}": named[label, arm] for arm in ARMS if (label, arm) in named}) for label in labels]
    yield _image(intervals_png(rows, "AUC on real scans, 95 % interval", (0.2, 1.0), 0.5), "use for training")
    gains = [
        (one.arm, one.label, str(one.over_real), "not known" if one.share is None else str(one.share))
        for one in found.gains
    ]
    if gains:
        yield _table(("learned from", "finding", "AUC over real scans alone", "share of what those teach"), gains)
    if found.left_out:
        left = "; ".join(f"{label}: {reason}" for label, reason in found.left_out.items())
        yield f"<p class=note>Left out: {_plain(left)}.</p>"
    shown = [
        (one.label, one.cell, one.arm, str(one.auc), f"{one.positives:,} of {one.scans:,}", f"{one.seeds}",
         "few" if one.small else "")
        for one in found.figures
    ]  # fmt: skip
    columns = ("finding", "of", "learned from", "AUC", "scans that have it", "runs", "")
    yield f"<details><summary>Every finding and group</summary>{_table(columns, shown)}</details>"


def _scorecard(criteria: Sequence[Criterion]) -> Iterator[str]:
    if not criteria:
        return
    yield "<h2>Scorecard: the seven Cs</h2>"
    yield (
        "<p class=note>The same by the criteria of the scorecard for synthetic medical data (Zamzmi et al., "
        "Communications Engineering 2025), with what was not measured.</p>"
    )
    for one in criteria:
        yield f"<h3>{_plain(one.name.capitalize())}</h3><p>{_plain(one.asks)}</p>"
        yield _table(("measured", "found"), [(finding.what, finding.found) for finding in one.measured])
        missing = _plain("; ".join(one.not_measured)) or "nothing that this criterion asks"
        yield f"<p class=note>Not measured: {missing}.</p>"


# --- pieces ---------------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    return html.escape(text, quote=False)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "<p class=note>Nothing.</p>"
    head = "".join(f"<th>{_plain(column)}" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_plain(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _image(png: bytes, described: str) -> str:
    return f'<p><img alt="{html.escape(described)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
