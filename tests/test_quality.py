"""The judges: what real scans, phantoms and planted faults are called, and that what nobody asked for is not judged."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scanloom.attributes import Attributes
from scanloom.errors import ArtefactError
from scanloom.models.probe_card import Check, Output, ProbeCard
from scanloom.recipe import Quality
from scanloom.sampling.quality import PASSES, REASONS, Agreement, Appearance, Levels, Verdict, levels, verdicts
from scanloom.scans.phantoms import phantom
from tests.phantom_corpus import SCHEMA
from tests.tiny_generator import SCHEMA as OTHER_SCHEMA


def judged(pixels: np.ndarray[Any, Any], bits: int = 8) -> Verdict:
    [verdict] = Appearance(Quality(), bits)(pixels[None], [{}])
    return verdict


def test_phantoms_pass() -> None:
    drawn = np.stack([phantom(5, number, 64).pixels for number in range(40)])
    assert Appearance(Quality(), 8)(drawn, [{}] * 40) == [PASSES] * 40


def test_real_chest_x_rays_pass(nih_png: Path) -> None:
    files = sorted((nih_png / "images").glob("*.png"))[::12]
    assert len(files) > 50
    for file in files:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            small = np.asarray(image.convert("L").resize((128, 128), Image.Resampling.BOX))
        assert judged(small) == PASSES, file.name


def ramp(bits: int, size: int = 64) -> np.ndarray[Any, Any]:
    dtype = np.uint8 if bits == 8 else np.uint16
    return np.tile(np.linspace(0.1, 0.9, size) * (2**bits - 1), (size, 1)).astype(dtype)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    "fault, reason",
    [
        (lambda image, top: np.zeros_like(image), "blank"),
        (lambda image, top: np.full_like(image, top), "blank"),
        (lambda image, top: np.full_like(image, top // 2), "blank"),
        (lambda image, top: image // 20 + top // 2, "blank"),
        (lambda image, top: half(image, top), "saturated"),
        (lambda image, top: np.where(np.arange(image.shape[0])[:, None] < 52, 0, image), "saturated"),
        (lambda image, top: np.where(np.arange(image.shape[0])[:, None] < 32, 0, image), None),
        (lambda image, top: image, None),
    ],
    ids=["black", "white", "grey", "faint", "half white", "four fifths black", "half black", "a ramp"],
)
def test_planted_faults_are_called_by_their_name(fault: Any, reason: str | None, bits: int) -> None:
    top = 2**bits - 1
    verdict = judged(fault(ramp(bits), top).astype(ramp(bits).dtype), bits)
    assert verdict.reason == reason
    # The figure that decided stands beside its limit.
    assert len(verdict.figures) == (2 if reason else 0)


def half(image: np.ndarray[Any, Any], top: int) -> np.ndarray[Any, Any]:
    return np.where(np.arange(image.shape[0])[:, None] < image.shape[0] // 2, top, image)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_levels_are_those_of_a_sorted_image(bits: int) -> None:
    top = 2**bits - 1
    pixels = np.random.default_rng(bits).integers(0, top + 1, (50, 40)).astype(np.uint16 if bits > 8 else np.uint8)
    low, high = np.percentile(pixels.astype(np.float64), [2, 98], method="inverted_cdf")
    expected = Levels((high - low) / top, float((pixels >= 0.99 * top).mean()), float((pixels <= 0.01 * top).mean()))
    assert levels(pixels, bits).contrast == pytest.approx(expected.contrast, abs=1e-12)
    assert levels(pixels, bits).white == pytest.approx(expected.white, abs=1e-12)
    assert levels(pixels, bits).black == pytest.approx(expected.black, abs=1e-12)


def test_every_pixel_of_a_large_image_counts() -> None:
    striped = np.tile(ramp(8, 1024), 1)
    striped[1::2] = 255
    assert levels(striped, 8).white == pytest.approx(0.5)
    assert judged(striped).reason == "saturated"


class Recorder:
    """Refuses what is asked for as `refuse`, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Attributes] = []

    def __call__(self, pixels: np.ndarray[Any, Any], requested: Sequence[Attributes]) -> list[Verdict]:
        self.seen += requested
        return [Verdict("gate", {"score": 1.0}) if asked.get("refuse") else PASSES for asked in requested]


def test_the_first_judge_that_objects_decides_and_later_ones_do_not_look() -> None:
    pixels = np.stack([np.zeros((8, 8), np.uint8), ramp(8, 8), ramp(8, 8)])
    gate = Recorder()
    asked: list[Attributes] = [{"n": "a", "refuse": "yes"}, {"n": "b", "refuse": "yes"}, {"n": "c"}]
    told = verdicts([Appearance(Quality(), 8), gate], pixels, asked)
    assert [verdict.reason for verdict in told] == ["blank", "gate", None]
    assert gate.seen == asked[1:]


def card(*checks: Check) -> ProbeCard:
    return ProbeCard(
        name="made", attributes=SCHEMA, size_px=32, channels=(8,), scales={"age": (50.0, 10.0)},
        false_reject_share=0.02, trained_scans=1, held_out_scans=1, checks=checks,
    )  # fmt: skip


def check(attribute: str, value: str | None, limit: float | None, *, present: bool = True) -> Check:
    return Check(attribute=attribute, value=value, present=present, scans=100, limit=limit, rejected_share=0.01)


CHECKED = card(
    check("sex", "F", 0.2),
    check("sex", "M", None),
    check("age", None, -15.0),
    check("findings", "Effusion", 0.4),
    check("findings", "Effusion", 0.6, present=False),
)


def agreed(read: Mapping[str, float], asked: Attributes) -> Verdict:
    """What the judge says of one image of which a probe reads this, and 0 of everything else."""
    outputs = np.array([[read.get(output.name, 0.0) for output in CHECKED.outputs]], dtype=np.float32)
    [verdict] = Agreement(CHECKED, lambda pixels: outputs)(np.zeros((1, 4, 4), np.uint8), [asked])
    return verdict


@pytest.mark.parametrize(
    "read, asked, about",
    [
        ({"sex=F": 0.9}, {"sex": "F"}, None),
        ({"sex=F": 0.1}, {"sex": "F"}, "sex=F"),
        ({"sex=F": 0.1}, {"sex": None}, None),
        ({"sex=F": 0.1}, {}, None),
        ({"sex=F": 0.9}, {"sex": "M"}, None),
        ({"age": 60.0}, {"age": 46.0}, None),
        ({"age": 60.0}, {"age": 44.0}, "age"),
        ({"age": 60.0}, {"age": 76.0}, "age"),
        ({"findings=Effusion": 0.3}, {"findings": ("Effusion", "Nodule")}, "findings=Effusion"),
        ({"findings=Effusion": 0.5}, {"findings": ("Effusion",)}, None),
        ({"findings=Effusion": 0.5}, {"findings": ()}, "findings without Effusion"),
        ({"findings=Effusion": 0.3}, {"findings": ("Nodule",)}, None),
        ({"findings=Effusion": 0.9, "findings=Nodule": 0.9}, {"findings": None}, None),
        ({"findings=Nodule": 0.9}, {"findings": ()}, None),
        ({}, {"view": "PA"}, None),
    ],
)
def test_an_image_is_held_to_what_was_asked_and_can_be_read(
    read: Mapping[str, float], asked: Attributes, about: str | None
) -> None:
    verdict = agreed(read, asked)
    assert verdict.reason == ("disagrees" if about else None)
    assert list(verdict.figures) == ([about, "least"] if about else [])


def test_a_probe_of_other_attributes_is_refused() -> None:
    with pytest.raises(ArtefactError, match="'findings', which the generator does not have, or with other values"):
        CHECKED.require_fits(OTHER_SCHEMA, "memory")
    card(check("sex", "F", 0.2)).require_fits(OTHER_SCHEMA, "memory")
    CHECKED.require_fits(SCHEMA, "memory")


def test_outputs_are_named_by_attribute_and_value_in_the_schemas_order() -> None:
    names = [output.name for output in CHECKED.outputs]
    assert names[:5] == ["sex=F", "sex=M", "age", "view=PA", "view=AP"]
    assert Output(attribute="findings", value="Nodule").name in names[5:]


def test_every_reason_and_setting_is_documented() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "quality.md").read_text()
    assert [reason for reason in REASONS if f"| `{reason}` |" not in page] == []
    assert [key for key in Quality.model_fields if f"`{key}" not in page] == []
