"""A verdict in words follows from its figures; the scorecard and the page say what was not measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest

from scanloom.audit.page import page
from scanloom.audit.report import (
    Beside,
    Contents,
    Finding,
    Gain,
    Gap,
    Interval,
    Likenesses,
    Membership,
    MembershipAttack,
    Reading,
    Report,
    Subject,
    Usefulness,
    Utility,
)
from scanloom.audit.scorecard import scorecard
from scanloom.audit.verdicts import of_100, verdicts, worth
from tests.released import copies

SUBJECT = Subject(name="d <1>", dataset="d" * 64, corpus="c" * 64, images=1000, looked_at=900)
LIKENESSES = Likenesses(tau=0.9, held_out=(0.5, 0.6), synthetic=(0.4, 0.5), planted=(0.95, 0.99))


def around(value: float, width: float = 0.02) -> Interval:
    return Interval(value=value, low=value - width, high=value + width)


def beside(synthetic: float, baseline: float) -> Beside:
    return Beside(synthetic=around(synthetic), baseline=around(baseline), images=900)


def likeness(**changes: Beside) -> Mapping[str, Beside]:
    real = {name: beside(0.8, 0.8) for name in ("precision", "recall", "coverage", "density")}
    return real | {"kid": beside(0.01, 0.01), "frechet": beside(1.0, 1.0)} | changes


def reading(asked: float, achieved: float, **changes: Any) -> Reading:
    told: dict[str, Any] = {
        "name": "Effusion", "cell": "all", "asked": around(asked), "achieved": around(achieved),
        "held_out_truth": 0.2, "held_out_read": 0.25, "share": True, "images": 900, "small": False,
    }  # fmt: skip
    return Reading.model_validate(told | changes)


def attacked(auc: Interval, tpr: Interval) -> Membership:
    attacks = (
        MembershipAttack(name="loss", auc=auc, tpr=tpr),
        MembershipAttack(name="other", auc=around(0.5), tpr=around(0.01, 0.005)),
    )
    return Membership(
        generator="e" * 64, members=500, others=100, member_patients=400, other_patients=90, attacks=attacks
    )


def learned(**aucs: float) -> Utility:
    arms: Any = {"real": "real", "synthetic": "synthetic", "both": "real and synthetic"}
    figures = tuple(
        Usefulness(arm=arms[arm], label="Effusion", cell="all", auc=around(auc), scans=100, positives=40, seeds=3,
                   small=False)
        for arm, auc in aucs.items()
    )  # fmt: skip
    share = None if aucs.get("real", 0.5) <= 0.5 else (aucs["synthetic"] - 0.5) / (aucs["real"] - 0.5)
    gain = Gain(
        arm="synthetic", label="Effusion", over_real=around(0.0), share=None if share is None else around(share)
    )
    return Utility(classifier="a small CNN", train_scans=500, synthetic_images=900, figures=figures, gains=(gain,))


def told(**parts: Any) -> Report:
    return Report(subject=SUBJECT, seconds=1.0, **parts)


CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("copies", {"copies": copies()}, "good", "100 of 100 of each kind were found: copies would have been seen"),
    ("copies", {"copies": copies(synthetic_copies=3)}, "look", "3 of 900 images are as alike"),
    ("copies", {"copies": copies(excess=True, synthetic_copies=300, copied_scans=40)}, "bad", "one of 40 training"),
    ("copies", {"copies": copies(synthetic_copies=40, power=[])}, "look", "40 of 900 images are as alike"),
    ("copies", {"copies": copies(train_scans=50)}, "look", "Only 50 of 400 training scans were looked up."),
    ("copies", {"copies": copies(power=[])}, "look", "at least 0 of 100 of each kind were found."),
    ("membership", {"membership": attacked(around(0.51), around(0.01))}, "good", "51 of 100 times; guessing gives 50"),
    ("membership", {"membership": attacked(around(0.55), around(0.02))}, "look", "recognises 2 of 100"),
    ("membership", {"membership": attacked(around(0.8), around(0.3))}, "bad", "recognises 30 of 100"),
    ("membership", {"membership": attacked(around(0.9, 0.5), around(0.01))}, "look", "90 of 100 times"),
    ("membership", {"membership": attacked(around(0.1), around(0.0, 0.001))}, "look", "90 of 100 times"),
    ("likeness", {"fidelity": likeness()}, "good", "80 of 100 images lie where real scans lie"),
    ("likeness", {"fidelity": likeness(kid=beside(0.2, 0.01))}, "look", "80 of 100"),
    ("likeness", {"fidelity": likeness(precision=beside(0.3, 0.8))}, "bad", "30 of 100 images"),
    ("variety", {"fidelity": likeness()}, "good", "80 of 100 real scans"),
    ("variety", {"fidelity": likeness(coverage=beside(0.5, 0.8))}, "look", "80 of 100"),
    ("variety", {"fidelity": likeness(recall=beside(0.05, 0.8))}, "bad", "5 of 100 real scans"),
    ("fairness", {"fairness": (reading(0.3, 0.33),)}, "good", "asked of 30 of 100 images, read in 33 of 100"),
    ("fairness", {"fairness": (reading(0.3, 0.33), reading(0.3, 0.1, cell="sex F"))}, "look", "Effusion of sex F"),
    ("fairness", {"fairness": (reading(0.9, 0.1, small=True), reading(0.5, 0.1))}, "bad", "asked of 50 of 100"),
    ("utility", {"utility": learned(real=0.8, synthetic=0.79, both=0.85)}, "good", "scores 0.79 on real scans"),
    ("utility", {"utility": learned(real=0.8, synthetic=0.7, both=0.8)}, "look", "from real scans 0.80"),
    ("utility", {"utility": learned(real=0.8, synthetic=0.55)}, "bad", "from both ?"),
]  # fmt: skip


@pytest.mark.parametrize("topic, parts, grade, because", CASES)
def test_a_verdict_follows_from_its_figures(topic: str, parts: dict[str, Any], grade: str, because: str) -> None:
    found = {one.topic: one for one in verdicts(told(**parts))}
    assert found[topic].grade == grade
    assert because in found[topic].because
    others = {one.topic for one in found.values() if one.grade != "unmeasured"} - {topic}
    assert others <= {"likeness", "variety"}


def test_what_was_not_measured_has_no_verdict() -> None:
    found = verdicts(told())
    assert [one.grade for one in found] == ["unmeasured"] * 6
    assert worth(learned(synthetic=0.9), "synthetic") is None
    assert worth(learned(real=0.5, synthetic=0.9), "synthetic") is None
    half = worth(learned(real=0.9, synthetic=0.7), "synthetic")
    assert half is not None
    assert half.value == pytest.approx(0.5)


def test_shares_in_words() -> None:
    assert [of_100(share) for share in (0.0, 0.0001, 0.004, 0.0123, 1.0, None)] == [
        "0 of 100", "fewer than 1 of 1,000", "4 of 1,000", "1 of 100", "100 of 100", "an unknown share",
    ]  # fmt: skip


def full() -> Report:
    gap = Gap(figure="precision", of="sex", worst="F", best="M", gap=around(0.1))
    contents = Contents(
        requested=1002, infeasible=2, rejected_draws={"blank": 7}, unknown={"age": 0.25}, outside=1, gate="ungated"
    )
    return told(
        copies=copies(), fidelity=likeness(), membership=attacked(around(0.55), around(0.02)),
        fairness=(reading(0.3, 0.33), reading(0.9, 0.1, small=True, cell="view AP")), gaps=(gap,),
        utility=learned(real=0.8, synthetic=0.7), contents=contents,
    )  # fmt: skip


def test_the_scorecard_has_seven_criteria_and_says_what_none_of_them_saw() -> None:
    found = {one.name: one for one in scorecard(full())}
    assert list(found) == [
        "congruence", "coverage", "constraint", "completeness", "compliance", "comprehension", "consistency",
    ]  # fmt: skip
    assert Finding(what="draws that checks turned down and others replaced", found="7 blank") in (
        found["constraint"].measured
    )
    assert Finding(what="images that do not say age", found="25.0%") in found["completeness"].measured
    assert Finding(what="groups looked at", found="2, too small to say much: 1") in found["consistency"].measured
    assert found["congruence"].not_measured == ("reading by radiologists",)
    empty = {one.name: one for one in scorecard(told())}
    assert set(empty) == set(found)
    assert "membership inference" in empty["compliance"].not_measured
    assert "usefulness for training" in empty["congruence"].not_measured
    assert "likeness to real scans" in empty["congruence"].not_measured
    assert empty["consistency"].measured == ()


def test_the_page_begins_with_the_verdicts_and_needs_nothing_else() -> None:
    report = full()
    report = report.model_copy(update={"scorecard": scorecard(report)})
    text = page(report, LIKENESSES, b"\x89PNG")
    assert text == page(report, LIKENESSES, b"\x89PNG")
    assert "Audit of d &lt;1&gt;" in text
    assert "://" not in text
    assert "<script" not in text
    order = [text.index(one.answer) for one in verdicts(report)]
    assert order == sorted(order)
    assert order[-1] < text.index("<img") < text.index("Scorecard: the seven Cs")
    assert text.count("<h3>Co") == 7
    assert "Not measured: none of the questions above." in text
    assert "Not measured: copies, membership, likeness, variety, fairness, utility." in page(told(), LIKENESSES, b"")


def test_the_page_says_of_every_figure_which_way_is_better() -> None:
    seen = {name: beside(0.1, 0.1) for name in ("spectrum (dB)", "grey levels (share of range)", "MS-SSIM of any two")}
    text = page(told(fidelity=likeness(), appearance=seen), LIKENESSES, b"")
    for name in ("precision", "recall", "coverage", "density"):
        assert re.search(rf"<td>{name}<td>[^<]*<td>higher", text)
    for name in ("kid", "frechet", *seen):
        assert re.search(rf"<td>{re.escape(name)}<td>[^<]*<td>lower", text)


def test_names_are_drawn_as_they_are() -> None:
    named = tuple(reading(0.3, 0.3, name=name) for name in (r"$\frac{$", "a$b$", "long " * 80))
    alike = Likenesses(tau=1.0, held_out=(1.0000001,), synthetic=(1.0000001,), planted=(1.0000001,))
    assert "data:image/png" in page(told(fairness=named, copies=copies()), alike, b"")
