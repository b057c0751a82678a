"""The acceptance corpus: pydicom's own test files and pydicom-data, every one decoded or refused for a typed reason."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatch

import pytest

from scanloom.errors import ScanError
from scanloom.recipe import Decode
from scanloom.scans.decode import frames, read_instance, require_image, stored_frames
from tests.reference_pixels import REFERENCE, corpus, digest

FILES = corpus()
LUMINANCE = Decode(colour="luminance")

REFUSED: Mapping[str, str] = {
    # with pixels
    "test_files/JPEG2000-embedded-sequence-delimiter.dcm": "undecodable-pixels PixelData",
    "test_files/badVR.dcm": "unsupported-pixels NumberOfFrames",
    "test_files/meta_missing_tsyntax.dcm": "unsupported-pixels Rows",
    "test_files/nested_priv_SQ.dcm": "unsupported-pixels Rows",
    # cut
    "data/emri_small_jpeg_2k_lossless_too_short.dcm": "truncated ",
    "test_files/rtplan_truncated.dcm": "truncated ",
    # one byte too many in front; a text
    "test_files/no_meta.dcm": "not-dicom ",
    "test_files/dicomdirtests/TINY_ALPHA/README": "not-dicom ",
    # without pixels
    "charset_files/chrJapMulti*.dcm": "no-pixels PixelData",
    "charset_files/chrKoreanMulti.dcm": "no-pixels PixelData",
    "charset_files/chrSQEncoding*.dcm": "no-pixels PixelData",
    "test_files/*DICOMDIR*": "no-pixels PixelData",
    "test_files/dicomdirtests/TINY_ALPHA/*/IM0000*": "no-pixels PixelData",
    "test_files/ExplVR_*NoMeta.dcm": "no-pixels PixelData",
    "test_files/UN_sequence.dcm": "no-pixels PixelData",
    "test_files/empty_charset_LEI.dcm": "no-pixels PixelData",
    "test_files/no_meta_group_length.dcm": "no-pixels PixelData",
    "test_files/priv_SQ.dcm": "no-pixels PixelData",
    "test_files/reportsi*.dcm": "no-pixels PixelData",
    "test_files/rtplan.dcm": "no-pixels PixelData",
    "test_files/rtstruct.dcm": "no-pixels PixelData",
    "test_files/test-SR.dcm": "no-pixels PixelData",
    "test_files/waveform_ecg.dcm": "no-pixels PixelData",
}

REPAIRED = {
    "data/OT-PAL-8-face.dcm": "guessed-syntax",
    "test_files/MR_truncated.dcm": "zero-padded",
}

# Pixels, but no scans.
DERIVED = ("*/liver*.dcm", "test_files/rtdose*.dcm")

# Every pixel has the same value.
BLANK = {"test_files/dicomdirtests/77654033/CT2/17166", "test_files/dicomdirtests/77654033/CT2/17196"}


def outcome(data: bytes, rules: Decode = LUMINANCE) -> tuple[Counter[str], tuple[str, ...]]:
    """What comes of each frame, or of the file as a whole; and what was mended."""
    try:
        instance = read_instance(data, rules)
        made = Counter(
            f"{frame.code} {frame.tag}" if isinstance(frame, ScanError) else "image"
            for frame in frames(instance, rules)
        )
    except ScanError as error:
        return Counter([f"{error.code} {error.tag}"]), ()
    assert made.total() == instance.frames
    return made, instance.repairs


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[Counter[str], tuple[str, ...]]]:
    return {name: outcome(path.read_bytes()) for name, path in FILES.items()}


Outcomes = dict[str, tuple[Counter[str], tuple[str, ...]]]


def test_the_corpus_is_the_one_that_the_numbers_are_about() -> None:
    assert len(FILES) == 253


def test_every_file_is_decoded_or_refused_for_the_reason_that_is_pinned(outcomes: Outcomes) -> None:
    decoded = {name for name, (made, _) in outcomes.items() if set(made) <= {"image", "blank-image PixelData"}}
    refused = {name: next(iter(made)) for name, (made, _) in outcomes.items() if name not in decoded}
    assert len(decoded) == 170
    assert len(decoded) + len(refused) == 253
    unexplained = {
        name: code
        for name, code in refused.items()
        if [code] != [reason for pattern, reason in REFUSED.items() if fnmatch(name, pattern)]
    }
    assert unexplained == {}
    assert [pattern for pattern in REFUSED if not any(fnmatch(name, pattern) for name in refused)] == []


def test_only_constant_frames_are_blank(outcomes: Outcomes) -> None:
    assert {name for name, (made, _) in outcomes.items() if "blank-image PixelData" in made} == BLANK


def test_two_files_are_mended_and_refused_where_that_is_not_wanted(outcomes: Outcomes) -> None:
    assert {name: repairs[0] for name, (_, repairs) in outcomes.items() if repairs} == REPAIRED
    strict = Decode(colour="luminance", repair=False)
    codes = {name: next(iter(outcome(FILES[name].read_bytes(), strict)[0])) for name in REPAIRED}
    assert codes == {
        "data/OT-PAL-8-face.dcm": "not-dicom ",
        "test_files/MR_truncated.dcm": "truncated PixelData",
    }


def test_the_stored_values_of_every_frame_are_those_of_dcmtk_and_gdcm() -> None:
    """Bit for bit, the lossy syntaxes too: all these decoders use the same integer transforms."""
    reference = json.loads(REFERENCE.read_text("utf-8"))["files"]
    # GDCM takes its 1A frames for one, of the fifteen that are there.
    del reference["test_files/badVR.dcm"]
    different, checked = [], Counter[str]()
    for name, entry in reference.items():
        made = stored_frames(read_instance(FILES[name].read_bytes(), LUMINANCE))
        ours = [frame.code if isinstance(frame, ScanError) else digest(frame.samples) for frame in made]
        checked[entry["by"]] += 1
        if ours != entry["frames"]:
            different.append(name)
    assert different == []
    assert checked == {"both": 142, "gdcm": 20, "dcmtk": 6, "differ": 2}


def test_nothing_that_was_decoded_lacks_a_reference(outcomes: Outcomes) -> None:
    reference = json.loads(REFERENCE.read_text("utf-8"))["files"]
    decoded = {name for name, (made, _) in outcomes.items() if "image" in made}
    assert decoded - reference.keys() == set()


def test_doses_and_segmentations_are_no_scans_and_everything_else_with_pixels_is(outcomes: Outcomes) -> None:
    refused = {}
    for name, (made, _) in outcomes.items():
        if "image" not in made:
            continue
        try:
            require_image(read_instance(FILES[name].read_bytes(), LUMINANCE))
        except ScanError as error:
            refused[name] = error.code
    assert set(refused.values()) == {"not-an-image"}
    assert {name for name in outcomes if any(fnmatch(name, p) for p in DERIVED)} == refused.keys()


def test_colour_is_refused_unless_the_recipe_reads_its_luminance() -> None:
    strict = {name: set(outcome(path.read_bytes(), Decode())[0]) for name, path in FILES.items()}
    counts = Counter(next(iter(codes)).split()[0] for codes in strict.values() if len(codes) == 1)
    assert (counts["image"], counts["colour"], counts["blank-image"]) == (99, 69, 2)


@pytest.mark.parametrize("name", ["test_files/badVR.dcm", "test_files/nested_priv_SQ.dcm", "data/bad_sequence.dcm"])
def test_no_warning_of_pydicoms_gets_out(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome(FILES[name].read_bytes())
    assert [str(w.message) for w in caught] == []
