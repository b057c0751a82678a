"""What an audit's figures mean, in words for people who know no statistics: a question, a verdict, and why. torch-free.

A verdict never goes beyond its figures: "no" where the 95 % intervals of images and real scans are apart, "look" where
something is to be looked at, "not measured" where it was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scanloom.audit.report import Beside, Interval, Membership, MembershipAttack, Reading, Report, Usefulness, Utility

Grade = Literal["good", "look", "bad", "unmeasured"]

RECALL = 0.95
"""Of planted copies that change little, so many must be found before none found means none there."""
_NEAR, _FAR = 0.1, 0.25
_MOST, _HALF = 0.9, 0.5
_TELLING = 0.6
_LOWER_IS_BETTER = frozenset({"frechet", "kid"})


@dataclass(frozen=True)
class Verdict:
    """One question that people ask of a dataset, and what the audit answers."""

    topic: str
    question: str
    grade: Grade
    answer: str
    because: str


def verdicts(report: Report) -> tuple[Verdict, ...]:
    """The questions in the order in which they matter."""
    return tuple(_answer(topic, question, answer, report) for topic, question, answer in _QUESTIONS)


def in_one_line(told: Sequence[Verdict]) -> str:
    """Every topic with its answer."""
    return "; ".join(f"{one.topic}: {one.answer.rstrip('.')}" for one in told)


def worth(utility: Utility, arm: str) -> Interval | None:
    """How much of what real scans teach beyond guessing this arm teaches, over all labels: 1 is as much.

    None where the arm is not there, or real scans may teach nothing either.
    """
    told = {one.label: one.share for one in utility.gains if one.arm == arm}
    return told.get(MEAN) if len(told) != 1 else next(iter(told.values()))


def apart(reading: Reading) -> float | None:
    """How far a reading surely is from what was asked; where chance is not known, how far it is."""
    return reading.gap if reading.sure_gap is None else reading.sure_gap


def as_real(name: str, beside: Beside) -> bool:
    """Whether a figure of synthetic images is as good as between real scans, as far as the intervals tell."""
    synthetic, baseline = beside.synthetic, beside.baseline
    if name in _LOWER_IS_BETTER:
        return synthetic.low is not None and baseline.high is not None and synthetic.low <= baseline.high
    return synthetic.high is not None and baseline.low is not None and synthetic.high >= baseline.low


def worst_reading(readings: Sequence[Reading]) -> Reading | None:
    """Of shares in cells that are not small, the one whose gap is widest."""
    told = [one for one in readings if one.share and not one.small and apart(one) is not None]
    return max(told, key=lambda one: (apart(one) or 0.0, one.gap or 0.0), default=None)


def of_100(share: float | None) -> str:
    """A share in words, as in `3 of 100`; of small ones `1 of 1,000` or fewer."""
    if share is None:
        return "an unknown share"
    if 0 < share < 0.005:
        return f"{max(1, round(share * 1000))} of 1,000" if share >= 0.0005 else "fewer than 1 of 1,000"
    return f"{round(share * 100)} of 100"


ALL = "all"
MEAN = "mean of labels"
_Told = tuple[Grade, str, str]


def _answer(topic: str, question: str, answer: Callable[[Report], _Told | None], report: Report) -> Verdict:
    told = answer(report)
    return Verdict(topic, question, *(told or ("unmeasured", "Not measured.", "This audit says nothing of it.")))


def _contains(report: Report) -> _Told | None:
    copies, looked = report.copies, report.subject.looked_at
    if copies is None:
        return None
    others = f"among scans of people that nobody trained on, {of_100(copies.held_out_rate.value)} are"
    if copies.excess:
        return "bad", "Yes, it seems to.", (
            f"{copies.synthetic_copies:,} of {looked:,} images are as alike to one of {copies.copied_scans:,} training "
            f"scans as copies are; {others}. That is far more than chance explains."
        )  # fmt: skip
    found = "No image is" if not copies.synthetic_copies else f"{copies.synthetic_copies:,} of {looked:,} images are"
    power = f"Of training scans that were changed a little and planted, at least {of_100(copies.lowest_slight_recall)}"
    power += " of each kind were found"
    alike = f"{found} as alike to a training scan as copies are; {others}."
    if copies.synthetic_copies:
        return "look", "It need not, but some images need a look.", f"{alike} So many can be chance. {power}."
    if copies.lowest_slight_recall < RECALL:
        return "look", "None was found, but some could have been missed.", f"{alike} {power}."
    if copies.train_scans < copies.corpus_scans:
        return "look", "None was found among the training scans that were looked up.", (
            f"{alike} Only {copies.train_scans:,} of {copies.corpus_scans:,} training scans were looked up. {power}."
        )  # fmt: skip
    answer = "No copy was found." if looked >= report.subject.images else f"No copy was found among {looked:,} images."
    return "good", answer, f"{alike} {power}: copies would have been seen."


def _betrays(report: Report) -> _Told | None:
    membership: Membership | None = report.membership
    if membership is None:
        return None
    attacks = [one for one in membership.attacks if betrayal(one) is not None]
    if not attacks:
        return None
    worst = max(attacks, key=lambda one: abs((one.auc.value or 0.5) - 0.5))
    right = max(worst.auc.value or 0.5, 1 - (worst.auc.value or 0.5))
    why = (
        f"Given two scans, one that the generator learned from and one that it did not, the best of "
        f"{len(attacks)} attacks names the right one {of_100(right)} times; guessing gives 50. "
        f"With one false alarm in 100 it recognises {of_100(worst.tpr.value)} of the scans; guessing gives "
        f"{of_100(membership.guessed_tpr)}. "
        "The best of several can be a little better by chance."
    )
    betrayed = [one for one in attacks if (one.auc.low or 0.0) > 0.5 or (one.auc.high or 1.0) < 0.5]
    if any(one.tpr.low is not None and one.tpr.low > membership.guessed_tpr for one in betrayed):
        return "bad", "Yes, of some people, to whoever holds the generator.", why
    if betrayed:
        return "look", "A little better than by guessing, to whoever holds the generator.", why
    if max(betrayal(one) or 1.0 for one in attacks) > _TELLING:
        return "look", "Not shown, but too few scans were tried to rule it out.", why
    return "good", "Not by the attacks that were tried.", why


def betrayal(one: MembershipAttack) -> float | None:
    """The highest AUC that an attack, or its reverse, may have; None where it cannot be told."""
    if one.auc.low is None or one.auc.high is None:
        return None
    return max(one.auc.high, 1 - one.auc.low)


def _looks_real(report: Report) -> _Told | None:
    return _as_real_scans(
        report, ("precision", "kid"), "Partly: the images can be told from scans.",
        "{synthetic} images lie where real scans lie; of real scans of other people {baseline} do.",
    )  # fmt: skip


def _varied(report: Report) -> _Told | None:
    return _as_real_scans(
        report, ("recall", "coverage"), "Partly: some kinds of scans are missing.",
        "{synthetic} real scans have an image near them; as many real scans of other people come near {baseline}.",
    )  # fmt: skip


def _as_real_scans(report: Report, names: Sequence[str], partly: str, why: str) -> _Told | None:
    """Whether all figures are as between real scans; `why` tells the first of them, a share."""
    figures = report.fidelity or {}
    if any(name not in figures for name in names):
        return None
    first = figures[names[0]]
    because = why.format(synthetic=of_100(first.synthetic.value), baseline=of_100(first.baseline.value))
    if all(as_real(name, figures[name]) for name in names):
        return "good", "Yes, as far as it can be measured.", because
    half = (first.synthetic.value or 0.0) >= _HALF * (first.baseline.value or 0.0)
    return ("look", partly, because) if half else ("bad", "No.", because)


def _shows(report: Report) -> _Told | None:
    worst = None if report.fairness is None else worst_reading(report.fairness)
    gap = None if worst is None else apart(worst)
    if worst is None or gap is None:
        return None
    asked, read = of_100(worst.asked.value), of_100(worst.achieved.value)
    group = "" if worst.cell == ALL else f" of {worst.cell}"
    why = f"Furthest off is {worst.name}{group}: asked of {asked} images, read in {read}"
    if worst.held_out_truth is not None and worst.held_out_read is not None:
        truth, seen = of_100(worst.held_out_truth), of_100(worst.held_out_read)
        why += f". The reader errs too: of real scans it is true of {truth} and read in {seen}"
    if gap <= _NEAR:
        return "good", "Yes, in every group that is large enough to tell.", f"{why}."
    if gap <= _FAR:
        return "look", "Mostly; one thing is off.", f"{why}."
    return "bad", "No, not everywhere.", f"{why}."


def _useful(report: Report) -> _Told | None:
    utility = report.utility
    share = None if utility is None else worth(utility, "synthetic")
    if utility is None or share is None or share.value is None:
        return None
    aucs = {arm: mean_auc(utility.figures, arm) for arm in ("synthetic", "real", "real and synthetic")}
    told = {arm: "?" if auc is None else f"{auc:.2f}" for arm, auc in aucs.items()}
    why = (
        f"A classifier that learned from the images alone scores {told['synthetic']} on real scans, one that learned "
        f"from real scans {told['real']}, from both {told['real and synthetic']}; guessing scores 0.5, no error 1."
    )
    if share.value >= _MOST:
        return "good", "Yes, nearly as much as real scans.", why
    if share.value >= _HALF or share.high is None or share.high >= _HALF:
        return "look", "Less than real scans.", why
    return "bad", "Hardly.", why


def mean_auc(figures: Sequence[Usefulness], arm: str) -> float | None:
    """Of an arm, over all labels of all held-out scans."""
    told = [one.auc.value for one in figures if one.arm == arm and one.cell == ALL and one.auc.value is not None]
    return sum(told) / len(told) if told else None


_QUESTIONS: tuple[tuple[str, str, Callable[[Report], _Told | None]], ...] = (
    ("copies", "Does it contain anybody's scan?", _contains),
    ("membership", "Can it be told whose scans it was made from?", _betrays),
    ("likeness", "Does it look like the real thing?", _looks_real),
    ("variety", "Is it as varied as real scans?", _varied),
    ("fairness", "Does it show what was asked for, in every group?", _shows),
    ("utility", "Is it of use for training?", _useful),
)
