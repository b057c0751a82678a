from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from scanloom.scans import fingerprint as module
from scanloom.scans.fingerprint import alike, fingerprint
from scanloom.scans.phantoms import phantom

Pixels = npt.NDArray[Any]
Change = Callable[[Pixels], Pixels]


def bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count()


def scan(index: int = 0, size_px: int = 256) -> Pixels:
    return phantom(3, index, size_px).pixels


def resized(pixels: Pixels, side: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def jpeg(pixels: Pixels) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def letterboxed(pixels: Pixels) -> Pixels:
    return np.pad(pixels, ((30, 30), (0, 0)))


def grainy(pixels: Pixels) -> Pixels:
    noise = np.random.default_rng(0).normal(0, 4, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


CHANGES: dict[str, Change] = {
    "16 bits": lambda p: p.astype(np.uint16) * 257,
    "brighter": lambda p: np.clip(p * 0.8 + 20, 0, 255).astype(np.uint8),
    "gamma": lambda p: (255 * (p / 255) ** 0.7).astype(np.uint8),
    "smaller": lambda p: resized(p, 128),
    "larger": lambda p: resized(p, 400),
    "jpeg": jpeg,
    "noise": grainy,
    "bars": letterboxed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_scan_changed_keeps_nearly_its_fingerprint(change: str) -> None:
    distances = [bits(fingerprint(scan(i)), fingerprint(CHANGES[change](scan(i)))) for i in range(6)]
    assert max(distances) <= 16


def real(folder: Path) -> tuple[list[Pixels], npt.NDArray[np.int64]]:
    paths = sorted((folder / "images").glob("*.png"))[::3]
    return [np.asarray(Image.open(p)) for p in paths], np.asarray([int(p.name[:8]) for p in paths])


@pytest.mark.parametrize("change", CHANGES)
def test_a_real_scan_changed_keeps_nearly_its_fingerprint(change: str, nih_png: Path) -> None:
    scans, _ = real(nih_png)
    distances = [bits(fingerprint(p), fingerprint(CHANGES[change](p))) for p in scans[::2]]
    # Bars beside a scan whose own margin is black on one side are not told from that margin.
    assert np.mean(np.asarray(distances) <= 16) >= (0.8 if change == "bars" else 0.95)


def test_real_scans_of_different_patients_are_far_apart(nih_png: Path) -> None:
    scans, patients = real(nih_png)
    made = np.frombuffer(b"".join(map(fingerprint, scans)), np.uint8).reshape(-1, 32)
    distance = np.bitwise_count(made[:, None] ^ made[None]).sum(axis=2, dtype=int)
    assert distance[patients[:, None] != patients[None]].min() > 48
    assert list(alike(made, patients, 16)) == []


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (31, 33), (2048, 2048), (1, 500), (40, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_scans_of_any_size_have_32_bytes(shape: tuple[int, int], kind: type) -> None:
    pixels: Pixels = np.random.default_rng(0).integers(0, 200, shape).astype(kind)
    assert len(fingerprint(pixels)) == 32
    assert fingerprint(np.zeros(shape, kind)) == fingerprint(np.full(shape, 9, kind)) == bytes(32)


# --- pairs ----------------------------------------------------------------------------------------------------


def planted(count: int, near: int, flips: int) -> npt.NDArray[np.uint8]:
    """Random fingerprints; the i-th of the last `near` is the i-th of all with `flips` of its bits turned."""
    draws = np.random.default_rng(count)
    made = np.unpackbits(draws.integers(0, 256, (count, 32), dtype=np.uint8), axis=1)
    for row in range(near):
        made[count - near + row] = made[row]
        made[count - near + row, draws.choice(256, flips, replace=False)] ^= 1
    return np.packbits(made, axis=1)


@pytest.mark.parametrize("max_bits", [0, 1, 3, 10, 16, 40, 64])
def test_pairs_up_to_the_limit_are_found_and_no_others(max_bits: int) -> None:
    at, beyond = planted(1500, 200, max_bits), planted(1500, 200, max_bits + 1)
    patients = np.arange(1500)
    assert list(alike(at, patients, max_bits)) == [(i, 1300 + i, max_bits) for i in range(200)]
    assert list(alike(beyond, patients, max_bits)) == []


def crowd(count: int) -> npt.NDArray[np.uint8]:
    """Fingerprints of nearly blank scans: nearly all bits are alike in all of them."""
    return np.packbits(np.random.default_rng(5).random((count, 256)) < 0.02, axis=1)


@pytest.mark.parametrize("max_bits", [2, 4, 8])
def test_all_pairs_of_a_crowd_are_found(max_bits: int) -> None:
    made = np.unique(crowd(700), axis=0)
    distance = np.bitwise_count(made[:, None] ^ made[None]).sum(axis=2, dtype=int)
    first, second = np.nonzero(np.triu(distance <= max_bits, 1))
    expected = [(int(i), int(j), int(distance[i, j])) for i, j in zip(first, second, strict=True)]
    assert len(expected) > 100
    assert sorted(alike(made, np.arange(len(made)), max_bits)) == expected


def test_scans_of_one_patient_are_no_pair() -> None:
    made = planted(100, 20, 3)
    patients = np.arange(100)
    patients[80:90] = patients[:10]
    assert [(i, j) for i, j, _ in alike(made, patients, 10)] == [(i, 80 + i) for i in range(10, 20)]


def test_each_equal_scan_is_paired_once_with_the_first_of_another_patient() -> None:
    made = np.repeat(planted(1, 0, 0), 6, axis=0)
    assert list(alike(made, np.asarray([7, 7, 8, 9, 7, 8]), 4)) == [
        (0, 2, 0),
        (0, 3, 0),
        (0, 5, 0),
        (1, 2, 0),
        (2, 4, 0),
    ]


def test_equal_scans_are_paired_with_near_ones_by_two_patients() -> None:
    made = planted(2, 1, 5)[[0, 0, 1]]
    # The first scan is of the near one's patient, the second is not.
    found = list(alike(made, np.asarray([1, 2, 1]), 10))
    assert found == [(0, 1, 0), (1, 2, 5)]


def test_a_crowd_ends_at_the_most_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PAIRS", 1000)
    assert len(list(alike(crowd(3000), np.arange(3000), 16))) == 1000


def test_the_pairs_do_not_depend_on_what_was_seen_before() -> None:
    made = crowd(500)
    assert list(alike(made, np.arange(500), 6)) == list(alike(made.copy(), np.arange(500), 6))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_scans_have_no_pairs(count: int) -> None:
    assert list(alike(np.zeros((count, 32), np.uint8), np.arange(count), 10)) == []


def test_fingerprints_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        list(alike(np.zeros((3, 8), np.uint8), np.arange(3), 10))


@pytest.mark.slow
@pytest.mark.parametrize("blank", [False, True])
def test_a_hundred_thousand_scans_are_no_quadratic_matter(blank: bool) -> None:
    made = planted(100_000, 100, 10)
    if blank:
        made[20_000:70_000] = crowd(50_000)
    found = {(i, j) for i, j, _ in alike(made, np.arange(100_000), 10)}
    assert blank or len(found) == 100
    assert len(found) <= module.MOST_PAIRS
