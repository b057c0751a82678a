"""An artefact's manifest as a person reads it: what it is, where it came from, what it holds, what it counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scanloom.artefact import Artefact, FileEntry
from scanloom.progress import STALE_S, Progress
from scanloom.sampling.cell import Cell, shown

_MOST_INLINE = 16
_MOST_CELLS = 40
_STATES = {"running": "running", "finished": "all images are made", "failed": "ended; run its job again to go on"}


def overview(artefact: Artefact) -> RenderableType:
    """Tables for the terminal; every value is printed as it is, never read as markup."""
    parts = [_identity(artefact)]
    if artefact.manifest.inputs:
        parts.append(_lineage(artefact))
    parts += [_contents(artefact.manifest.files), _statistics(artefact.manifest.statistics)]
    return Group(*parts)


def unfinished(uri: str, progress: Progress) -> RenderableType:
    """Of an artefact that its job is still making, or was: how far it has come."""
    stale = progress.state == "running" and progress.age_s > STALE_S
    state = "no sign of life; run its job again to go on" if stale else _STATES[progress.state]
    left = "-" if progress.eta_s is None or stale or progress.state != "running" else f"{progress.eta_s:.0f} s"
    rejects = ", ".join(f"{reason} {count}" for reason, count in progress.rejects.items())
    rows = [
        ("state", state),
        ("images", f"{progress.images_done} of {progress.images_total}"),
        ("images/s", f"{progress.images_per_s:.3g}"),
        ("left", left),
        ("rejects", rejects or "none"),
        ("engine hours", f"{progress.engine_s / 3600:.3g}"),
        ("cost", "-" if progress.cost is None else f"{progress.cost:.2f}"),
        ("started", progress.started),
        ("as of", f"{progress.updated} ({progress.age_s:.0f} s ago)"),
    ]
    return _table(f"unfinished: {uri}", ("", ""), rows)


def cohort_report(statistics: Mapping[str, Any]) -> list[RenderableType]:
    """Of a dataset's statistics, per cell of its cohort what was asked for and what became of it.

    Of many cells only those that the quality checks touched, the worst first; then a line where images are missing.
    """
    cells = statistics["cells"]
    if len(cells) > _MOST_CELLS:
        touched = [cell for cell in cells if cell["rejected"] or cell["infeasible"]]
        cells = sorted(touched, key=lambda cell: (-cell["infeasible"], -cell["rejected"]))[:_MOST_CELLS]
    columns = ("table", "cell", "requested", "made", "rejected", "infeasible")
    rows = [
        (
            str(cell["table"]),
            shown(Cell.model_validate({"values": cell["attributes"], "share": 0}).values),
            *(str(cell[name]) for name in columns[2:]),
        )
        for cell in cells
    ]
    parts: list[RenderableType] = [_table("cohort", columns, rows)] if rows else []
    if lacking := statistics["infeasible"]:
        ordered = statistics["rows"] + lacking
        parts.append(
            Text(
                f"{lacking} of {ordered} images are infeasible: no draw of theirs passed the quality checks; the "
                f"manifest's statistics say of which cells, the folder rejects why"
            )
        )
    return parts


def readable_bytes(count: int) -> str:
    """A size in decimal units, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def statistic_rows(name: str, value: object) -> Iterator[tuple[str, str]]:
    """(name, text) rows of a statistic: small things on one line, nested ones under dotted names, long ones counted."""
    text = _inline(value)
    if text is not None:
        yield name, text
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from statistic_rows(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, Sequence) and all(isinstance(item, Mapping) and "name" in item for item in value):
        for item in value:
            facts = {key: _inline(inner) for key, inner in item.items() if key != "name" and inner not in ({}, [], "")}
            yield f"{name}.{item['name']}", "; ".join(f"{key} {text or '...'}" for key, text in facts.items())
    else:
        yield name, f"{len(value)} entries; --json prints them" if isinstance(value, Sequence) else str(value)


def _identity(artefact: Artefact) -> Table:
    manifest = artefact.manifest
    return _table(
        f"{manifest.kind} {manifest.name}",
        ("", ""),
        [
            ("where", artefact.uri),
            ("digest", artefact.digest),
            ("made", manifest.created_at),
            ("by", f"scanloom {manifest.code_version}"),
            ("recipe", str(manifest.recipe.get("name", ""))),
        ],
    )


def _lineage(artefact: Artefact) -> Table:
    rows = [(entry.role, entry.kind, entry.digest[:12], entry.uri) for entry in artefact.manifest.inputs]
    return _table("made from", ("role", "kind", "digest", "where it was"), rows)


def _contents(files: Sequence[FileEntry]) -> Table:
    folders: dict[str, list[int]] = {}
    for file in files:
        folder = file.path.rpartition("/")[0]
        folders.setdefault(folder + "/" if folder else ".", []).append(file.bytes)
    rows = [(name, str(len(sizes)), readable_bytes(sum(sizes))) for name, sizes in sorted(folders.items())]
    if len(rows) > 1:
        rows.append(("all", str(len(files)), readable_bytes(sum(file.bytes for file in files))))
    return _table("holds", ("folder", "files", "size"), rows)


def _statistics(statistics: Mapping[str, Any]) -> Table:
    return _table("statistics", ("what", "value"), list(statistic_rows("", dict(statistics))))


def _inline(value: object) -> str | None:
    """One line for a scalar or a short flat collection of scalars; None for anything else."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, Mapping):
        inner = [(f"{key} ", _scalar(item)) for key, item in value.items()]
    elif isinstance(value, Sequence):
        inner = [("", _scalar(item)) for item in value]
    else:
        return None
    if len(inner) > _MOST_INLINE or any(text is None for _, text in inner):
        return None
    return ", ".join(f"{key}{text}" for key, text in inner) or "-"


def _scalar(value: object) -> str | None:
    return _inline(value) if value is None or isinstance(value, (str, int, float)) else None


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*columns, title=Text(title, style="bold"), title_justify="left", show_header=any(columns))
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    return table


def how_many(artefact: Artefact) -> str:
    """What an artefact amounts to, in a few words."""
    statistics = artefact.manifest.statistics
    if artefact.manifest.kind == "generator":
        return f"{statistics['training']['step']} steps"
    if "psnr_db" in statistics:
        return f"{statistics['psnr_db']:.1f} dB PSNR held out"
    if artefact.manifest.kind == "probe":
        return f"reads {len(statistics['card']['readings'])} attributes"
    if artefact.manifest.kind == "gate":
        return f"knows {statistics['card']['train_scans']} scans, refuses from {statistics['card']['tau']:.4f}"
    if "taken_from" in statistics:
        return f"taken from {statistics['taken_from']}"
    refused = sum(statistics.get("quarantined", {}).values())
    rows = f"{statistics['rows']} pictures" if "rows" in statistics else f"{len(artefact.manifest.files)} files"
    return rows + (f", {refused} refused" if refused else "")
