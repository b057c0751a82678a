"""An artefact's manifest as a person reads it: what it is, where it came from, what it holds, what it counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scanloom.artefact import Artefact, FileEntry

_MOST_INLINE = 16


def overview(artefact: Artefact) -> RenderableType:
    """Tables for the terminal; every value is printed as it is, never read as markup."""
    parts = [_identity(artefact)]
    if artefact.manifest.inputs:
        parts.append(_lineage(artefact))
    parts += [_contents(artefact.manifest.files), _statistics(artefact.manifest.statistics)]
    return Group(*parts)


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
    if "taken_from" in statistics:
        return f"taken from {statistics['taken_from']}"
    refused = sum(statistics.get("quarantined", {}).values())
    rows = f"{statistics['rows']} pictures" if "rows" in statistics else f"{len(artefact.manifest.files)} files"
    return rows + (f", {refused} refused" if refused else "")
