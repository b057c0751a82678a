"""What a dataset must have shown before it may leave, as a YAML file says it. torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from scanloom.audit.report import Report
from scanloom.audit.verdicts import apart, betrayal, worth
from scanloom.errors import RecipeError
from scanloom.section import Count, Fraction, Positive, Section, first_faults

Use = Literal["research", "education", "commercial", "public"]
"""What receivers may do with a dataset."""


class CopiesGate(Section):
    """How sure it must be that nobody's scan is among the images."""

    most_copy_rate: Fraction = 0.01
    """Upper end of the interval of the share of images that count as copies."""
    least_recall: Fraction = 0.95
    """Of slightly changed planted copies, those of the kind that is found least often."""
    most_false_positives: Fraction = 0.05
    """Share of further patients that the threshold promises not to exceed: a coarse one proves little."""
    least_looked_at: Fraction = 0.1
    """Share of the dataset's images that were looked at."""
    least_looked_up: Fraction = 1.0
    """Share of the corpus's training scans that they were held against."""
    excess_allowed: bool = False
    """Whether copies may be more frequent than among held-out patients."""


class FidelityGate(Section):
    """How alike synthetic and real scans must be."""

    most_kid: Positive | None = None
    least_precision: Fraction | None = None
    least_recall: Fraction | None = None
    least_coverage: Fraction | None = None


class FairnessGate(Section):
    """How near to what was asked the images must be."""

    most_gap: Fraction = 0.2
    """Between asked and achieved share, beyond the probe's own error, of cells that are not small; not of numbers."""
    most_parity_gap: Fraction | None = None
    """Between two groups, of any figure that the audit tells by group, where the gap is more than chance."""


class MembershipGate(Section):
    """How little the generator may betray of whose scans it learned from; of the attack that betrays most."""

    most_auc: Fraction = 0.6
    """Upper end; 0.5 is guessing."""
    most_tpr: Fraction = 0.1
    """Upper end of the share of scans recognised at one false alarm in a hundred."""


class UtilityGate(Section):
    """What the images must be worth for training."""

    least_share: Fraction = 0.5
    """Lower end, of what real scans teach beyond guessing, by area under the curve on held-out scans."""


class Licence(Section):
    """Terms under which real scans or given weights were used, and what they allow of what comes of them."""

    of: Annotated[str, Field(min_length=1)]
    """Name or digest of a corpus, or the place that weights were taken from."""
    terms: Annotated[str, Field(min_length=1)]
    """Licence or agreement, such as CC-BY-4.0 or the number of a data use agreement."""
    allows: tuple[Use, ...] = ()


class Policy(Section):
    """Everything that a release is held against."""

    name: Annotated[str, Field(min_length=1)]
    target: Use
    """What the receivers are to be allowed to do."""
    copies: CopiesGate = CopiesGate()
    fidelity: FidelityGate | None = None
    """None: need not be measured."""
    fairness: FairnessGate | None = None
    membership: MembershipGate | None = None
    utility: UtilityGate | None = None
    publisher: Annotated[str, Field(min_length=1)] | None = None
    """Who hands the dataset out, as its cards name it; None: the policy's name."""
    licences: tuple[Licence, ...] = ()
    least_images: Count = 1


@dataclass(frozen=True)
class Gate:
    """One figure and its limit."""

    name: str
    value: float | bool | str
    limit: float | bool | str
    passed: bool

    def __str__(self) -> str:
        return f"{self.name}: {_told(self.value)}, the policy's limit is {_told(self.limit)}"


def read_policy(data: bytes, where: str) -> Policy:
    """The policy in a YAML file. RecipeError in one line for bad YAML, an unknown key or a bad value."""
    try:
        tree = yaml.safe_load(data.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"policy {where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, Mapping):
        raise RecipeError(f"policy {where}: holds {type(tree).__name__}, expected a mapping of keys")
    try:
        return Policy.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"policy {where}: {first_faults(error)}") from error


def gates(policy: Policy, report: Report) -> list[Gate]:
    """Every figure that the policy asks for, with its limit; what was not measured has not passed."""
    return [
        _at_least("dataset.images", report.subject.images, policy.least_images),
        *_copies(policy.copies, report),
        *_fidelity(policy.fidelity, report),
        *_fairness(policy.fairness, report),
        *_membership(policy.membership, report),
        *_utility(policy.utility, report),
    ]


def licence_gates(policy: Policy, sources: Sequence[tuple[str, ...]]) -> list[Gate]:
    """For each source, given by all its names, whether a licence allows the policy's target."""
    found = []
    for names in sources:
        terms = next((licence for licence in policy.licences if licence.of in names), None)
        name = f"licence of {names[0]}"
        if terms is None:
            found.append(Gate(name, "none stated", policy.target, passed=False))
        else:
            allowed = ", ".join(terms.allows) or "nothing"
            found.append(Gate(name, f"{terms.terms} allows {allowed}", policy.target, policy.target in terms.allows))
    return found


def _copies(gate: CopiesGate, report: Report) -> Iterator[Gate]:
    copies, subject = report.copies, report.subject
    if copies is None:
        yield _missing("copies")
        return
    yield _at_least("copies.looked_at", subject.looked_at / max(1, subject.images), gate.least_looked_at)
    looked_up = copies.train_scans / max(1, copies.corpus_scans)
    yield _at_least("copies.training scans looked up", looked_up, gate.least_looked_up)
    yield _at_most("copies.promised false positives", copies.promised, gate.most_false_positives)
    yield _at_least("copies.recall of planted copies", copies.lowest_slight_recall, gate.least_recall)
    yield _at_most("copies.rate (upper end)", _or(copies.synthetic_rate.high, 1.0), gate.most_copy_rate)
    if not gate.excess_allowed:
        yield Gate("copies.more than among held-out patients", copies.excess, False, passed=not copies.excess)


def _fidelity(gate: FidelityGate | None, report: Report) -> Iterator[Gate]:
    if gate is None:
        return
    if report.fidelity is None:
        yield _missing("fidelity")
        return
    limits: dict[str, Any] = {
        "kid": gate.most_kid, "precision": gate.least_precision, "recall": gate.least_recall,
        "coverage": gate.least_coverage,
    }  # fmt: skip
    for name, limit in limits.items():
        if limit is None:
            continue
        if name not in report.fidelity:
            yield _missing(f"fidelity.{name}")
        elif name == "kid":
            yield _at_most("fidelity.kid (upper end)", _or(report.fidelity[name].synthetic.high, 1e9), limit)
        else:
            yield _at_least(f"fidelity.{name} (lower end)", _or(report.fidelity[name].synthetic.low, 0.0), limit)


def _fairness(gate: FairnessGate | None, report: Report) -> Iterator[Gate]:
    if gate is None:
        return
    if report.fairness is None:
        yield _missing("fairness")
        return
    held = 0
    for reading in report.fairness:
        off = apart(reading)
        if not reading.small and reading.share and off is not None:
            held += 1
            yield _at_most(f"fairness.{reading.name} in {reading.cell}", off, gate.most_gap)
    if not held:
        yield _missing("fairness")
    if gate.most_parity_gap is None:
        return
    if not report.gaps:
        yield _missing("fairness by group")
    for gap in (*(report.gaps or ()), *(report.utility.gaps if report.utility else ())):
        if gap.beyond_chance and gap.gap.value is not None:
            groups = f"{gap.figure}, {gap.worst} beside {gap.best}"
            yield _at_most(f"fairness.gap of {groups}", abs(gap.gap.value), gate.most_parity_gap)


def _membership(gate: MembershipGate | None, report: Report) -> Iterator[Gate]:
    if gate is None:
        return
    if report.membership is None or not report.membership.attacks:
        yield _missing("membership")
        return
    attacks = report.membership.attacks
    auc = max(_or(betrayal(one), 1.0) for one in attacks)
    yield _at_most("membership.AUC of the best attack (upper end)", auc, gate.most_auc)
    tpr = max(_or(one.tpr.high, 1.0) for one in attacks)
    yield _at_most("membership.recognised at 1 % false alarms (upper end)", tpr, gate.most_tpr)


def _utility(gate: UtilityGate | None, report: Report) -> Iterator[Gate]:
    if gate is None:
        return
    share = None if report.utility is None else worth(report.utility, "synthetic")
    if share is None:
        yield _missing("utility")
    else:
        value = _or(share.low, 0.0)
        yield _at_least("utility.share of what real scans teach (lower end)", value, gate.least_share)


def _missing(part: str) -> Gate:
    return Gate(part, "not measured", "measured", passed=False)


def _at_most(name: str, value: float, limit: float) -> Gate:
    return Gate(name, value, limit, value <= limit)


def _at_least(name: str, value: float, limit: float) -> Gate:
    return Gate(name, value, limit, value >= limit)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _told(value: float | bool | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
