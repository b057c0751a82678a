"""An audit arranged by the seven criteria of the scorecard for synthetic medical data, and what each leaves open.

Zamzmi et al., "Scorecard for synthetic medical data evaluation", Communications Engineering 4:130, 2025. torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from scanloom.audit.report import Beside, Criterion, Finding, Report
from scanloom.audit.verdicts import mean_auc, worst_reading
from scanloom.recipe_audit import ARMS

_BEHIND_READERS = "reading by radiologists"
_CONGRUENCE = ("frechet", "kid", "precision", "density")
_COVERAGE = ("recall", "coverage")
_VARIETY = "MS-SSIM"


def scorecard(report: Report) -> tuple[Criterion, ...]:
    """The seven criteria in their published order."""
    return (
        _criterion(
            "congruence", "Are images distributed as real scans are?", _congruence(report),
            {"likeness to real scans": report.fidelity is not None, "usefulness for training": bool(report.utility),
             _BEHIND_READERS: False},
        ),
        _criterion(
            "coverage", "Is all that real scans show among the images, and do they go beyond single scans?",
            _coverage(report), {"variety": report.fidelity is not None, "copies": report.copies is not None},
        ),
        _criterion(
            "constraint", "Do images obey anatomy, physics and what was declared?", _constraint(report),
            {"declared ranges": report.contents is not None, "what images show": report.fairness is not None,
             "anatomy beyond what the probe reads": False, _BEHIND_READERS: False},
        ),
        _criterion(
            "completeness", "Is everything there that was ordered, and is it said of every image?",
            _completeness(report), {"the order": report.contents is not None},
        ),
        _criterion(
            "compliance", "Is privacy kept, and are formats and rules?", _compliance(report),
            {"copies": report.copies is not None, "membership inference": report.membership is not None,
             "DICOM marks, licences and the policy: a release checks them": False, "anonymity in law": False},
        ),
        _criterion(
            "comprehension", "Can people understand what it is and how it came about?", _comprehension(report),
            {"how well its readers understand it": False},
        ),
        _criterion(
            "consistency", "Is it as good for every group, and again and again?", _consistency(report),
            {"groups": bool(report.subgroups or report.gaps or report.fairness),
             "other seeds and other generators of the same recipe": False},
        ),
    )  # fmt: skip


def _criterion(name: str, asks: str, measured: Iterator[Finding], covered: Mapping[str, bool]) -> Criterion:
    missing = tuple(what for what, there in covered.items() if not there)
    return Criterion(name=name, asks=asks, measured=tuple(measured), not_measured=missing)


def _congruence(report: Report) -> Iterator[Finding]:
    likeness = report.fidelity or {}
    yield from _besides({name: likeness[name] for name in _CONGRUENCE if name in likeness})
    yield from _besides({n: one for n, one in (report.appearance or {}).items() if not n.startswith(_VARIETY)})
    if report.utility is not None:
        for arm in ARMS:
            if (auc := mean_auc(report.utility.figures, arm)) is not None:
                yield Finding(what=f"mean AUC on held-out scans, trained on {arm}", found=f"{auc:.3f}")


def _coverage(report: Report) -> Iterator[Finding]:
    likeness = report.fidelity or {}
    yield from _besides({name: likeness[name] for name in _COVERAGE if name in likeness})
    yield from _besides({n: one for n, one in (report.appearance or {}).items() if n.startswith(_VARIETY)})
    if report.copies is not None:
        yield Finding(what="images that count as copies of a training scan", found=str(report.copies.synthetic_rate))


def _constraint(report: Report) -> Iterator[Finding]:
    contents = report.contents
    if contents is not None:
        told = f"{contents.outside:,} of {report.subject.looked_at:,} images"
        yield Finding(what="asked for something outside of what the training scans hold", found=told)
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in contents.rejected_draws.items())
        yield Finding(what="draws that checks turned down and others replaced", found=rejected or "none")
    worst = worst_reading(report.fairness or ())
    if worst is not None:
        read = f"{worst.name} in {worst.cell}: asked {worst.asked}, read {worst.achieved}"
        yield Finding(what="furthest from what was asked for", found=read)


def _completeness(report: Report) -> Iterator[Finding]:
    contents = report.contents
    if contents is None:
        return
    made = f"{report.subject.images:,} of {contents.requested:,}; {contents.infeasible:,} could not be made"
    yield Finding(what="images made of those ordered", found=made)
    for name, share in contents.unknown.items():
        yield Finding(what=f"images that do not say {name}", found=f"{share:.1%}")


def _compliance(report: Report) -> Iterator[Finding]:
    if report.copies is not None:
        copies = report.copies
        yield Finding(what="images that count as copies", found=str(copies.synthetic_rate))
        yield Finding(what="held-out scans that do", found=str(copies.held_out_rate))
        yield Finding(what="slight planted copies found, at least", found=f"{copies.lowest_slight_recall:.3f}")
    if report.membership is not None:
        for attack in report.membership.attacks:
            yield Finding(what=f"membership inference, {attack.name}: AUC (0.5: nothing)", found=str(attack.auc))
    if report.contents is not None:
        yield Finding(what="copies looked for while images were made", found=report.contents.gate)


def _comprehension(report: Report) -> Iterator[Finding]:
    subject = report.subject
    yield Finding(
        what="dataset", found=f"{subject.name}, {subject.dataset[:12]}: recipe, plan and seeds in its manifest"
    )
    yield Finding(what="made from", found=f"corpus {subject.corpus[:12]}, by digest from image to scan")
    yield Finding(what="explained by", found="this page; a release adds cards of dataset and generator")


def _consistency(report: Report) -> Iterator[Finding]:
    for gap in report.gaps or ():
        told = f"{gap.gap}: worst {gap.worst}, best {gap.best}"
        yield Finding(what=f"{gap.figure}: gap between values of {gap.of}", found=told)
    cells = {one.cell for one in report.fairness or ()} | {one.cell for one in report.subgroups or ()}
    small = {one.cell for one in report.fairness or () if one.small}
    small |= {one.cell for one in report.subgroups or () if one.small}
    if cells:
        yield Finding(what="groups looked at", found=f"{len(cells)}, too small to say much: {len(small)}")


def _besides(named: Mapping[str, Beside]) -> Iterator[Finding]:
    for name, one in named.items():
        yield Finding(what=name, found=f"{one.synthetic}; between real scans {one.baseline}")
