"""Whether images are copies of training scans: detectors, thresholds from held-out patients, and proven power.

A detector says how alike an image and its nearest training scan are. What counts as a copy follows from scans of
patients that nobody trained on: their likeness is what chance and anatomy give. Two scans of one patient are more alike
than that without being copies, so that thresholds come from held-out patients alone, never from training scans among
themselves, where patients meet their own other scans; and it is patients that are independent, so that a patient counts
once, by the scan that is most alike.

Legend of shape suffixes: N images, R training scans, V views of each, S pixels of a square's side, D values of an
embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, nct, norm

from scanloom.audit.fidelity import chunks
from scanloom.audit.intervals import Estimate, clustered_share, share
from scanloom.audit.plants import Plant, Strength
from scanloom.models.copy_encoder import kept_views

Floats = NDArray[np.float64]
Squares = NDArray[np.float32]
"""Images [N, S, S] in [0, 1], all of one side."""

_CARLINI_NEAREST, _CARLINI_ALPHA = 50, 0.5
_LEAST_FOR_BOUND = 10


@dataclass(frozen=True)
class Found:
    """For each image the training scan that is nearest to it, and how alike they are; the higher, the more."""

    likeness_N: Floats
    row_N: NDArray[np.int64]


@dataclass(frozen=True)
class Scale:
    """How likeness becomes about normally distributed over patients, and back."""

    normal: Callable[[Floats], Floats]
    back: Callable[[float], float]


_LEAST = 1e-9
CORRELATION = Scale(lambda r: np.arctanh(np.clip(r, _LEAST - 1.0, 1.0 - _LEAST)), math.tanh)
"""Fisher's z of a cosine or correlation."""
DISTANCE = Scale(lambda d: -np.log(np.maximum(-d, _LEAST)), lambda z: -math.exp(-z))
"""Minus the logarithm of what is, with a minus, a distance."""


class Detector(Protocol):
    """Looks an image up among the training scans that it was made with."""

    @property
    def scale(self) -> Scale: ...

    def __call__(self, images_NSS: Squares, /) -> Found: ...


# --- detectors ------------------------------------------------------------------------------------------------


class Embeddings:
    """Likeness is the cosine of embeddings to the nearest of several views of every training scan."""

    scale = CORRELATION

    def __init__(
        self, embed: Callable[[Squares], NDArray[np.float32]], views_VRD: Sequence[NDArray[np.float32]]
    ) -> None:
        """`views_VRD`: unit vectors of `kept_views` of the training scans, those of the scans as they are first."""
        self._embed = embed
        self._index_RD = np.concatenate(list(views_VRD))
        self._scans = len(views_VRD[0])

    @classmethod
    def of(cls, embed: Callable[[Squares], NDArray[np.float32]], train_RSS: Squares) -> Self:
        """The detector of training scans that are all in memory."""
        return cls(embed, [embed(view) for view in kept_views(train_RSS)])

    def __call__(self, images_NSS: Squares) -> Found:
        return self.look_up(self._embed(images_NSS))

    def look_up(self, vectors_ND: NDArray[np.float32]) -> Found:
        """What unit vectors [N, D] are nearest to, exactly."""
        likeness, row = np.zeros(len(vectors_ND)), np.zeros(len(vectors_ND), dtype=np.int64)
        for rows in chunks(len(vectors_ND), len(self._index_RD)):
            cosine = vectors_ND[rows] @ self._index_RD.T
            row[rows] = cosine.argmax(axis=1)
            likeness[rows] = cosine[np.arange(len(cosine)), row[rows]]
        return Found(likeness, row % self._scans)

    def nearest_images(self, vectors_ND: NDArray[np.float32]) -> Floats:
        """How alike the image that is most alike to each training scan is to it, [R]; -inf without images."""
        best = np.full(len(self._index_RD), -math.inf)
        for rows in chunks(len(vectors_ND), len(self._index_RD)):
            best = np.maximum(best, (vectors_ND[rows] @ self._index_RD.T).max(axis=0))
        return np.asarray(best.reshape(-1, self._scans).max(axis=0), dtype=np.float64)

    def among_train(self, patients: Sequence[str]) -> tuple[Floats, Floats]:
        """How alike each training scan is to the nearest other one of its patient, and of other patients, [R] each.

        -inf where there is none.
        """
        _, patient = np.unique(np.asarray(patients), return_inverse=True)
        same, other = np.full(self._scans, -math.inf), np.full(self._scans, -math.inf)
        views = len(self._index_RD) // self._scans
        owners = np.tile(patient, views)
        for rows in chunks(self._scans, len(self._index_RD)):
            places = np.arange(self._scans)[rows]
            cosine = (self._index_RD[rows] @ self._index_RD.T).astype(np.float64)
            for view in range(views):
                cosine[np.arange(len(places)), places + view * self._scans] = -math.inf
            alike = patient[rows][:, None] == owners[None, :]
            same[rows] = np.where(alike, cosine, -math.inf).max(axis=1)
            other[rows] = np.where(alike, -math.inf, cosine).max(axis=1)
        return same, other


class PixelDistance:
    """Likeness is minus the root mean square difference of pixels."""

    scale = DISTANCE

    def __init__(self, train_RSS: Squares) -> None:
        self._train = _Flat(train_RSS)

    def __call__(self, images_NSS: Squares) -> Found:
        parts = [(distance.min(axis=1), distance.argmin(axis=1)) for distance in self._train.distances(images_NSS)]
        return _joined(parts, sign=-1.0)


class Pearson:
    """Likeness is the correlation of pixels."""

    scale = CORRELATION

    def __init__(self, train_RSS: Squares) -> None:
        self._train = _Flat(_standard(train_RSS))

    def __call__(self, images_NSS: Squares) -> Found:
        # Of images with mean 0 and deviation 1 the mean square difference is 2 - 2 r.
        parts = [
            (1.0 - distance.min(axis=1) ** 2 / 2.0, distance.argmin(axis=1))
            for distance in self._train.distances(_standard(images_NSS))
        ]
        return _joined(parts, sign=1.0)


class CarliniRatio:
    """Likeness is minus the distance of pixels to the nearest scan over half of the mean to the 50 nearest ones.

    Carlini et al. 2023, "Extracting Training Data from Diffusion Models", section 5.1 (alpha 0.5, n 50).
    """

    scale = DISTANCE

    def __init__(self, train_RSS: Squares) -> None:
        self._train = _Flat(train_RSS)

    def __call__(self, images_NSS: Squares) -> Found:
        parts = []
        for distance in self._train.distances(images_NSS):
            count = min(_CARLINI_NEAREST, distance.shape[1])
            nearest = np.partition(distance, count - 1, axis=1)[:, :count]
            usual = np.maximum(_CARLINI_ALPHA * nearest.mean(axis=1), 1e-12)
            parts.append((nearest.min(axis=1) / usual, distance.argmin(axis=1)))
        return _joined(parts, sign=-1.0)


PEERS: Mapping[str, Callable[[Squares], Detector]] = {
    "pixel L2": PixelDistance,
    "Pearson": Pearson,
    "Carlini ratio": CarliniRatio,
}
"""What others look for copies with, by name."""


class _Flat:
    """Training scans as rows of pixels, to which images have distances."""

    def __init__(self, train_RSS: Squares) -> None:
        self._rows = train_RSS.reshape(len(train_RSS), -1)
        self._squares = np.einsum("rp,rp->r", self._rows, self._rows, dtype=np.float64)

    def distances(self, images_NSS: Squares) -> Iterator[Floats]:
        """Root mean square differences [n, R] of a block of images after the other."""
        for rows in chunks(len(images_NSS), max(len(self._rows), self._rows.shape[1])):
            part = images_NSS[rows].reshape(-1, self._rows.shape[1])
            squares = np.einsum("np,np->n", part, part, dtype=np.float64)
            product = (part @ self._rows.T).astype(np.float64)
            total = np.clip(squares[:, None] + self._squares[None, :] - 2.0 * product, 0.0, None)
            yield np.sqrt(total / self._rows.shape[1])


def _standard(images_NSS: Squares) -> Squares:
    centred = images_NSS - images_NSS.mean(axis=(1, 2), keepdims=True)
    return np.asarray(centred / np.maximum(centred.std(axis=(1, 2), keepdims=True), 1e-6), dtype=np.float32)


def _joined(parts: Sequence[tuple[Floats, NDArray[np.int64]]], sign: float) -> Found:
    if not parts:
        return Found(np.zeros(0), np.zeros(0, dtype=np.int64))
    return Found(sign * np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]))


# --- thresholds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Threshold:
    """Above which likeness an image counts as a copy, and how often a scan of nobody trained on would."""

    tau: float
    asked: float
    """Share of further patients of whom a scan may lie above it."""
    promised: float
    """What follows from so many patients: k / (n + 1); over `asked` where there are too few of them."""
    at_most: float
    """Upper end of the one-sided 95 % interval of that share, over which patients happened to be held out."""
    patients: int
    scans: int
    extrapolated: bool = False
    """Whether it lies above all that a rank among so many patients would give."""

    @property
    def told(self) -> dict[str, Any]:
        """The fields of a Calibration."""
        return {
            "tau": self.tau, "asked": self.asked, "promised": self.promised, "at_most": self.at_most,
            "calibration_patients": self.patients, "calibration_scans": self.scans,
        }  # fmt: skip


def calibrate(
    likeness_N: Floats, patients: Sequence[str], asked: float = 0.01, scale: Scale | None = None
) -> Threshold:
    """The split-conformal threshold of held-out patients (Vovk et al. 2005; Angelopoulos & Bates 2023, section 1).

    Of n patients, each by the scan most alike to a training scan, it is the k-th highest, k = floor(asked (n + 1)) and
    at least 1: a patient like them lies above it with a chance of at most k / (n + 1). Given these patients that chance
    has the distribution Beta(k, n + 1 - k) (Vovk 2012), whose 95 % point is `at_most`.

    That point lies far above what is asked for unless there are several hundred patients. With a `scale` the threshold
    is raised where needed to the one-sided tolerance bound of a normal distribution (Lieberman 1958): with 95 %
    confidence no more than `asked` of all patients lie above it, as far as likeness is normal on that scale. It is
    never lowered, so that what ranks promise holds in any case.

    ValueError where there is no patient.
    """
    if len(likeness_N) == 0:
        raise ValueError("calibrate: no scan of a held-out patient")
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    most = np.full(int(patient.max()) + 1, -math.inf)
    np.maximum.at(most, patient, likeness_N)
    count = len(most)
    k = max(1, math.floor(asked * (count + 1) + 1e-9))
    by_rank, at_most = float(np.sort(most)[-k]), float(beta.ppf(0.95, k, count + 1 - k))
    bound = -math.inf if scale is None or at_most <= asked or count < _LEAST_FOR_BOUND else _bound(most, asked, scale)
    return Threshold(
        tau=max(by_rank, bound), asked=asked, promised=k / (count + 1), at_most=at_most, patients=count,
        scans=len(likeness_N), extrapolated=bound > by_rank,
    )  # fmt: skip


def _bound(most_P: Floats, asked: float, scale: Scale) -> float:
    values, count = scale.normal(most_P), len(most_P)
    factor = nct.ppf(0.95, count - 1, norm.ppf(1.0 - asked) * math.sqrt(count)) / math.sqrt(count)
    return scale.back(float(values.mean() + factor * values.std(ddof=1)))


# --- power and rates ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    """How many planted copies of one kind are found."""

    plant: str
    strength: Strength
    recall: Estimate
    """Share that lies above the threshold, by patients."""
    traced: float
    """Share that does and whose nearest training scan is of the right patient."""
    copies: int


def power(
    detector: Detector,
    threshold: Threshold,
    scans_NSS: Squares,
    rows: Sequence[int],
    patients: Sequence[str],
    plants: Sequence[Plant],
) -> tuple[Recall, ...]:
    """How many copies of some training scans are found, for each way of planting them.

    `rows`: which of the training scans that the detector knows these are; `patients`: whose each of those is.
    """
    owners = np.asarray(patients)
    own = owners[np.asarray(rows, dtype=np.int64)]
    found = []
    for plant in plants:
        told = detector(plant.change(scans_NSS))
        hits = told.likeness_N > threshold.tau
        traced = hits & (owners[told.row_N] == own)
        recall = clustered_share(hits, own.tolist())
        found.append(Recall(plant.name, plant.strength, recall, float(traced.mean()), len(scans_NSS)))
    return tuple(found)


@dataclass(frozen=True)
class CopyRates:
    """How many images count as copies, beside scans of patients that nobody trained on."""

    synthetic: Estimate
    copies: int
    copied_scans: int
    """Training scans that the copies are nearest to."""
    held_out: Estimate
    """Of patients that the threshold was not made with."""
    held_out_scans: int
    held_out_copies: int

    @property
    def excess(self) -> bool:
        """Whether copies are more frequent than chance and anatomy explain."""
        return self.synthetic.low > self.held_out.high


def copy_rates(threshold: Threshold, synthetic: Found, held_out: Found, held_out_patients: Sequence[str]) -> CopyRates:
    """The rates at a threshold; every synthetic image counts for itself."""
    copies = synthetic.likeness_N > threshold.tau
    false = held_out.likeness_N > threshold.tau
    return CopyRates(
        synthetic=share(int(copies.sum()), len(copies)), copies=int(copies.sum()),
        copied_scans=len(np.unique(synthetic.row_N[copies])), held_out=clustered_share(false, held_out_patients),
        held_out_scans=len(false), held_out_copies=int(false.sum()),
    )  # fmt: skip


@dataclass(frozen=True)
class Reproduced:
    """Training scans that a generator saw equally often, and how near its images came to them."""

    times: int
    scans: int
    copied: int
    """Those with an image above the threshold."""
    likeness: float
    """To the most similar image, the median over these scans."""


def reproduced(
    detector: Embeddings, threshold: Threshold, vectors_ND: NDArray[np.float32], times_R: Sequence[int]
) -> tuple[Reproduced, ...]:
    """What images, by their embeddings, hold of the training scans, by how often each of those was trained on."""
    nearest_R, often_R = detector.nearest_images(vectors_ND), np.asarray(times_R)
    return tuple(
        Reproduced(
            times, int((often_R == times).sum()), int((nearest_R[often_R == times] > threshold.tau).sum()),
            float(np.median(nearest_R[often_R == times])),
        )
        for times in np.unique(often_R).tolist()
    )  # fmt: skip


def most_alike(found: Found, count: int) -> list[tuple[int, int, float]]:
    """The images most alike to a training scan, (image, scan, likeness), each scan once."""
    pairs: list[tuple[int, int, float]] = []
    seen: set[int] = set()
    for image in np.argsort(-found.likeness_N, kind="stable").tolist():
        scan = int(found.row_N[image])
        if scan not in seen:
            seen.add(scan)
            pairs.append((image, scan, float(found.likeness_N[image])))
        if len(pairs) == count:
            break
    return pairs
