"""The phantoms' promises: same in, same out; the drawn truth is what the pixels show."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from scanloom.scans.phantom_archive import member, phantom_archive
from scanloom.scans.phantom_patients import FINDINGS
from scanloom.scans.phantoms import Phantom, phantom
from scanloom.store import Store


@pytest.fixture(scope="module")
def series() -> list[Phantom]:
    return [phantom(3, index, 64) for index in range(600)]


def _only(series: list[Phantom], *findings: str) -> list[Phantom]:
    return [scan for scan in series if scan.findings == findings]


def test_same_seed_and_index_draw_the_same_pixels_whatever_was_drawn_before(series: list[Phantom]) -> None:
    again = phantom(3, 417, 64)
    assert np.array_equal(again.pixels, series[417].pixels)
    assert again.raw == series[417].raw
    assert not np.array_equal(phantom(4, 417, 64).pixels, again.pixels)


def test_pixels_are_frozen_across_versions() -> None:
    # A change of the drawing changes every corpus made of it: then this number is changed on purpose.
    scan = phantom(0, 5, 64)
    assert (scan.raw["sex"], scan.raw["age"], scan.raw["view"], scan.raw["findings"]) == (
        "M",
        "059Y",
        "AP",
        "Pneumothorax",
    )
    assert float(scan.pixels.mean()) == pytest.approx(133.448, abs=0.05)


def test_every_block_of_twelve_scans_has_patients_with_one_two_and_three_scans(series: list[Phantom]) -> None:
    scans_of = np.bincount([scan.patient for scan in series])
    assert set(scans_of.tolist()) == {1, 2, 3}
    assert len(scans_of) == 8 * len(series) // 12


def test_scans_of_one_patient_share_sex_and_anatomy_but_not_pixels(series: list[Phantom]) -> None:
    pairs = [(a, b) for a, b in itertools.pairwise(series) if a.patient == b.patient]
    assert pairs
    for a, b in pairs:
        assert a.sex == b.sex
        assert b.age_years == a.age_years + 1
        assert ("Cardiomegaly" in a.findings) == ("Cardiomegaly" in b.findings)
        assert not np.array_equal(a.pixels, b.pixels)


def test_half_of_the_scans_are_without_finding_and_three_in_ten_have_cardiomegaly(series: list[Phantom]) -> None:
    assert 0.42 < len(_only(series)) / len(series) < 0.58
    assert 0.22 < sum("Cardiomegaly" in s.findings for s in series) / len(series) < 0.38
    for finding in FINDINGS[1:]:
        assert sum(finding in s.findings for s in series) >= 20, finding


def test_cardiomegaly_means_a_ratio_over_one_half_and_its_absence_one_under_it(series: list[Phantom]) -> None:
    for scan in series:
        ratio = scan.truth.cardiothoracic_ratio
        assert ratio > 0.54 if "Cardiomegaly" in scan.findings else ratio < 0.52


def test_the_heart_mask_is_as_wide_as_the_truth_says_and_points_to_the_image_right(series: list[Phantom]) -> None:
    for scan in series[:200]:
        columns = np.flatnonzero(scan.truth.heart.any(axis=0))
        width = columns[-1] - columns[0] + 1
        assert width == pytest.approx(scan.truth.heart_width_px, abs=2.5)
        middle = scan.truth.thorax_left_px + scan.truth.thorax_width_px / 2
        assert columns[-1] - middle > middle - columns[0]


def test_lungs_are_darker_than_the_heart_and_the_heart_is_not_lung(series: list[Phantom]) -> None:
    for scan in series[:200]:
        assert not (scan.truth.lungs & scan.truth.heart).any()
        assert scan.pixels[scan.truth.lungs].mean() < scan.pixels[scan.truth.heart].mean() - 25


def test_an_effusion_takes_air_from_the_bottom_of_the_lungs(series: list[Phantom]) -> None:
    def low_air(scans: list[Phantom]) -> float:
        return float(np.mean([s.truth.lungs[38:50].mean() for s in scans]))

    assert low_air(_only(series, "Effusion")) < 0.8 * low_air(_only(series))


def test_a_pneumothorax_darkens_and_a_consolidation_whitens_the_lungs(series: list[Phantom]) -> None:
    def lung(scans: list[Phantom], percentile: float) -> float:
        return float(np.mean([np.percentile(s.pixels[s.truth.lungs], percentile) for s in scans]))

    normal = _only(series)
    assert lung(_only(series, "Pneumothorax"), 5) < lung(normal, 5) - 10
    assert lung(_only(series, "Consolidation"), 97) > lung(normal, 97) + 10


def test_size_changes_the_sampling_and_not_the_scan() -> None:
    for index in range(6):
        small, large = phantom(3, index, 64), phantom(3, index, 256)
        assert small.raw == large.raw
        assert small.truth.cardiothoracic_ratio == large.truth.cardiothoracic_ratio
        pooled = large.pixels.reshape(64, 4, 64, 4).mean(axis=(1, 3))
        assert np.abs(pooled - small.pixels).mean() < 8


def test_twelve_bit_pixels_are_the_eight_bit_ones_with_more_levels() -> None:
    coarse, fine = phantom(3, 1, 64), phantom(3, 1, 64, bits_stored=12)
    assert fine.pixels.dtype == np.uint16
    assert fine.pixels.max() > 255
    assert np.abs(fine.pixels / 4095 - coarse.pixels / 255).max() < 0.005


def test_phantoms_import_no_torch() -> None:
    code = "import sys, scanloom.scans.phantoms, scanloom.scans.phantom_archive; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_archived_scans_decode_to_the_phantom_in_every_encoding() -> None:
    seen = set()
    for index in range(60):
        _, content = member(3, index, 64)
        ds = pydicom.dcmread(io.BytesIO(content))
        drawn = phantom(3, index, 64, bits_stored=12 if ds.BitsStored == 12 else 8)
        top = (1 << ds.BitsStored) - 1
        pixels = top - ds.pixel_array if ds.PhotometricInterpretation == "MONOCHROME1" else ds.pixel_array
        assert np.array_equal(pixels, drawn.pixels)
        assert {keyword: str(ds[keyword].value) for keyword in drawn.raw if keyword[0].isupper()} == {
            keyword: text for keyword, text in drawn.raw.items() if keyword[0].isupper()
        }
        seen.add((ds.Modality, ds.PhotometricInterpretation, ds.BitsStored, ds.file_meta.TransferSyntaxUID.name))
    assert {modality for modality, *_ in seen} == {"CR", "DX"}
    assert {s[1] for s in seen} == {"MONOCHROME1", "MONOCHROME2"}
    assert {s[2] for s in seen} == {8, 12}
    assert len({s[3] for s in seen}) == 2


def test_identities_in_the_archive_all_say_that_they_are_fake() -> None:
    ds = pydicom.dcmread(io.BytesIO(member(3, 7, 64)[1]))
    for keyword in ("PatientName", "PatientID", "PatientAddress", "AccessionNumber", "InstitutionName", "StationName"):
        assert "FAKE" in str(ds[keyword].value), keyword


def test_an_archive_is_the_same_bytes_again_and_holds_the_bad_files_it_names(tmp_path: Path) -> None:
    first = phantom_archive(Store(str(tmp_path / "a")), 20, seed=3, size_px=32, scans_per_shard=8, bad_files=6)
    phantom_archive(Store(str(tmp_path / "b")), 20, seed=3, size_px=32, scans_per_shard=8, bad_files=6)
    assert len(first.shards) == 3
    assert sum(first.bad_files.values()) == 6
    names = []
    for key in first.shards:
        content = Store(str(tmp_path / "a")).read(key)
        assert content == Store(str(tmp_path / "b")).read(key)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            names += tar.getnames()
    assert len(names) == 26
    assert sum(name.startswith("FAKE-BAD/") for name in names) == 6


def test_an_interrupted_archive_goes_on_with_the_shards_that_are_missing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    keys = phantom_archive(store, 20, seed=3, size_px=32, scans_per_shard=8).shards
    whole = {key: store.read(key) for key in keys}
    store.delete(keys[1:2])
    store.write(keys[0], b"kept")
    heard: list[int] = []
    phantom_archive(store, 20, seed=3, size_px=32, scans_per_shard=8, wrote=heard.append)
    assert heard == [8, 8, 4]
    assert (store.read(keys[0]), store.read(keys[1])) == (b"kept", whole[keys[1]])


def test_archives_of_other_settings_do_not_share_a_key(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    settings = [(20, 3, 32), (21, 3, 32), (20, 4, 32), (20, 3, 40)]
    keys = [k for n, seed, px in settings for k in phantom_archive(store, n, seed=seed, size_px=px).shards]
    assert len(set(keys)) == len(keys) == len(store.list())
