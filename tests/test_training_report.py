"""The report says what the history says, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from scanloom.training.report import plots, training_report, verdict

FACTS = {"corpus": "1f2e3d4c", "learning rate": "0.0005"}


def _history(held_out: list[float], copies: list[tuple[float, float, float]] = []) -> list[dict[str, Any]]:  # noqa: B006
    rows: list[dict[str, Any]] = []
    for number, value in enumerate(held_out):
        step = 100 * (number + 1)
        window = {"images_per_s": 50.0 + number, "data_wait_share": 0.01, "memory_gb": 1.5, "mfu": 0.4}
        rows.append({"step": step - 50, "time": 1.0, "loss": value + 0.2, **window})
        rows.append(
            {"step": step, "time": 2.0, "loss": value + 0.1, "held_out_loss": value, **window}
            | {"held_out_by_timestep": [value * (10 - k) for k in range(10)]}
        )
    for row, (rate, low, high) in zip(rows[1::2], copies, strict=False):
        row |= {"copy_rate": rate, "copy_rate_low": low, "copy_rate_high": high, "copy_distance_ratio": 1.5 - rate}
    return rows


def _png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, 8), 90).save(buffer, "PNG")
    return buffer.getvalue()


class Page(HTMLParser):
    """Tags in their order, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, Mapping[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def images(self) -> list[Mapping[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


HISTORY = _history([0.9, 0.5, 0.4, 0.35], [(0.5, 0.3, 0.7), (0.6, 0.4, 0.8), (0.7, 0.5, 0.9), (0.9, 0.8, 0.97)])


def test_the_report_needs_nothing_but_itself() -> None:
    page = Page(training_report(HISTORY, {100: _png(8)}, FACTS))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed"} == set()
    sources = [str(image["src"]) for image in page.images]
    assert len(sources) == 6
    for source in sources:
        kind, data = source.split(";base64,")
        assert kind in ("data:image/svg+xml", "data:image/png")
        content = base64.b64decode(data)
        if kind.endswith("xml"):
            links = re.findall(rb'(?:href|src)="([^"]*)"|url\(([^)]*)\)', content)
            assert all((one or other).startswith((b"#", b"data:")) for one, other in links)


def test_the_same_history_makes_the_same_bytes() -> None:
    assert training_report(HISTORY, {100: _png(8)}, FACTS) == training_report(HISTORY, {100: _png(8)}, FACTS)


def test_every_picture_is_told_in_words_with_the_figures_of_the_history() -> None:
    told = [str(image["alt"]) for image in Page(training_report(HISTORY, {100: _png(8)}, FACTS)).images]
    assert all(told)
    assert any("0.9 at step 100, 0.35 at step 400, best 0.35 at step 400" in alt for alt in told)
    assert any("50 at step 50, 53 at step 400" in alt for alt in told)
    assert any("step 100" in alt and "Sample" in alt for alt in told)


def test_facts_are_shown_in_their_order_and_cannot_break_the_page() -> None:
    page = training_report(HISTORY, {}, FACTS | {"name": "<script>alert(1)</script> & co"}, title="<b>lungs</b>")
    parsed = Page(page)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "b" not in {tag for tag, _ in parsed.tags}
    assert "<script>alert(1)</script> & co" in parsed.text
    assert parsed.text.index("corpus") < parsed.text.index("learning rate") < parsed.text.index("alert")


def test_evaluations_are_a_table_with_one_row_each() -> None:
    text = Page(training_report(HISTORY, {}, FACTS)).text
    evaluations = text[text.rindex("Evaluations") :]
    for cell in ("100", "0.35", "0.45", "0.8 to 0.97", "0.6"):
        assert cell in evaluations


@pytest.mark.parametrize("history", [[], [{"step": 5, "loss": 0.5}], [{"step": 5, "loss": None, "mfu": None}]])
def test_a_run_that_reported_little_still_has_a_report(history: list[dict[str, Any]]) -> None:
    page = Page(training_report(history, {}, {}))
    assert "too few to tell" in page.text
    assert len(page.images) == sum(1 for row in history if row["loss"] is not None)


def test_of_many_sample_grids_the_first_the_last_and_some_between_are_shown() -> None:
    pictures = {step: _png(step) for step in range(1, 40)}
    images = Page(training_report([], pictures, {})).images
    widths = [
        Image.open(io.BytesIO(base64.b64decode(str(i["src"]).partition(",")[2]))).width
        for i in images
        if "png" in str(i["src"])
    ]
    assert (widths[0], widths[-1], len(widths)) == (1, 39, 6)
    assert widths == sorted(widths)


@pytest.mark.parametrize(
    "held_out, says",
    [
        ([0.9, 0.5, 0.4, 0.35], "still falling at the end, from 0.4 at step 300 to 0.35 at step 400"),
        ([0.9, 0.5, 0.4, 0.4, 0.399, 0.4], "levelled off"),
        ([0.9, 0.5, 0.4, 0.45, 0.6], "rose from 0.4 at step 300 to 0.6 at step 500"),
        ([0.9, 0.5], "measured 2 times"),
    ],
)
def test_the_verdict_tells_where_held_out_loss_goes(held_out: list[float], says: str) -> None:
    assert says in verdict(_history(held_out))[0]


@pytest.mark.parametrize(
    "copies, says",
    [
        ([(0.5, 0.3, 0.7), (0.55, 0.4, 0.7)], "no sign of copying"),
        ([(0.8, 0.6, 0.9), (0.9, 0.8, 0.97)], "above chance, first at step 100"),
        ([(0.8, 0.6, 0.9), (0.55, 0.4, 0.7)], "at the end, but it was above chance at step 100"),
        ([(0.5, 0.3, 0.7), (0.1, 0.02, 0.3)], "below chance"),
        ([], "was not measured"),
    ],
)
def test_the_verdict_tells_whether_copying_is_above_chance(copies: list[tuple[float, float, float]], says: str) -> None:
    assert says in verdict(_history([0.5, 0.4], copies))[1]


@pytest.mark.parametrize("share, says", [(0.01, "data keeps up"), (0.2, "20.0% of the time waiting")])
def test_the_verdict_tells_whether_data_keeps_up(share: float, says: str) -> None:
    rows = [row | {"data_wait_share": share} for row in _history([0.5])]
    assert says in verdict(rows)[-1]


def test_plots_hold_the_points_of_the_history() -> None:
    by_title = {plot.title: plot.figure for plot in plots(HISTORY)}
    assert list(by_title) == [
        "Training loss", "Held-out loss", "Held-out loss by timestep", "Speed and memory", "Copying",
    ]  # fmt: skip
    line = by_title["Held-out loss"].axes[0].lines[0]
    assert line.get_xydata().tolist() == [[100, 0.9], [200, 0.5], [300, 0.4], [400, 0.35]]  # type: ignore[union-attr]
    assert len(by_title["Held-out loss by timestep"].axes[0].lines) == 10
    assert len(by_title["Speed and memory"].axes) == 4
