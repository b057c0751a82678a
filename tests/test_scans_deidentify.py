"""De-identification: nothing of a header survives but declared values, pseudonyms need the key, text is refused."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
)

from scanloom.attributes import AttributeSchema
from scanloom.errors import RecipeError, ScanError
from scanloom.recipe import CategoryAttribute, LabelsAttribute, NumberAttribute
from scanloom.scans.deidentify import (
    KEY_VARIABLE,
    Pseudonyms,
    Subject,
    pseudonyms_from_environment,
    require_harmless_sources,
    require_shareable_pixels,
    subject_of_header,
    subject_of_row,
)
from tests.made_dicom import CANARY, KEY, dataset, radiograph

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M"), aliases={"W": "F"}),
        NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
        CategoryAttribute(name="view", source="ViewPosition", values=("PA", "AP")),
        LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Mass")),
    )
)
PSEUDONYMS = Pseudonyms(KEY.encode())
TEXT_VRS = {"AE", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "CS"}


def subject(**elements: Any) -> Subject:
    return subject_of_header(dataset(radiograph(8), **elements), SCHEMA, PSEUDONYMS)


def refusal(**elements: Any) -> str:
    with pytest.raises(ScanError) as caught:
        subject(**elements)
    assert CANARY not in str(caught.value)
    return caught.value.code


def full_of_canaries() -> Dataset:
    """Every text attribute of the dictionary, at the top and one level down, private ones too."""
    made = dataset(radiograph(8))
    inner = Dataset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag in keyword_dict.values():
            vr = dictionary_VR(tag)
            if tag >> 16 >= 8 and vr in TEXT_VRS:
                made.add_new(tag, vr, f"{CANARY}{tag:08X}")
                inner.add_new(tag, vr, f"{CANARY}{tag:08X}")
    made.OtherPatientIDsSequence = Sequence([inner])
    made.PatientID = f"MRN-{CANARY}"
    return made


def test_no_text_of_any_attribute_of_the_standard_survives() -> None:
    made = full_of_canaries()
    assert sum(CANARY in str(element.value) for element in made if element.VR != "SQ") > 1500
    known = subject_of_header(made, SCHEMA, PSEUDONYMS)
    assert CANARY.encode() not in pickle.dumps(known)
    assert dict(known.attributes) == {"sex": None, "age": 61.0, "view": None, "findings": None}
    assert known.actions["(private)", "removed"] == 2
    assert known.actions["(0010,0040) PatientSex", "withheld"] == 1
    assert known.actions["(0010,0010) PatientName", "removed"] == 1
    assert sum(known.actions.values()) == len(made.keys())


@given(st.dictionaries(st.sampled_from(["PatientSex", "ViewPosition", "ImageComments"]), st.text(max_size=40)))
def test_free_text_never_passes_an_attribute(texts: dict[str, str]) -> None:
    known = subject_of_row("image", "patient", "", texts, SCHEMA, PSEUDONYMS).attributes
    assert known["sex"] in (None, "F", "M")
    assert known["view"] in (None, "PA", "AP")
    findings = known["findings"]
    assert findings is None or (isinstance(findings, tuple) and set(findings) <= {"Effusion", "Mass"})


def test_declared_values_pass_and_aliases_are_spelled_out() -> None:
    known = subject(PatientSex="W", PatientAge="018M", ViewPosition="AP", ImageComments="Mass|Secret note").attributes
    assert known == {"sex": "F", "age": 1.5, "view": "AP", "findings": ("Mass",)}


def test_the_very_old_become_ninety() -> None:
    assert subject(PatientAge="103Y").attributes["age"] == 90


def test_age_comes_from_birth_and_study_date_where_the_header_has_none() -> None:
    assert subject(PatientAge=None, PatientBirthDate="19500301", StudyDate="20120301").attributes["age"] == 62
    assert subject(PatientAge=None, PatientBirthDate="19500302", StudyDate="20120301").attributes["age"] == 61
    assert subject(PatientAge=None, PatientBirthDate="20130101", StudyDate="20120301").attributes["age"] is None
    assert subject(PatientAge=None, PatientBirthDate="1950", StudyDate="20120301").attributes["age"] is None


def test_a_scan_without_patient_or_instance_is_refused() -> None:
    assert refusal(PatientID=None) == "no-patient-id"
    assert refusal(PatientID="  ") == "no-patient-id"
    assert refusal(SOPInstanceUID=None) == "no-instance-uid"


def test_numbers_out_of_range_or_no_numbers_are_refused_without_being_quoted() -> None:
    assert refusal(PatientAge=CANARY) == "attribute-not-a-number"
    with pytest.raises(ScanError, match="attribute-out-of-range"):
        subject_of_row("image", "patient", "", {"PatientAge": "-3"}, SCHEMA, PSEUDONYMS)


# --- pseudonyms -----------------------------------------------------------------------------------------------


def test_one_patient_has_one_pseudonym_and_another_key_gives_another() -> None:
    first, second = subject(PatientID="MRN-7"), subject(PatientID="MRN-7 ", StudyInstanceUID="1.2.3")
    assert first.patient == second.patient
    assert first.study != second.study
    assert first.id != second.id
    assert Pseudonyms(b"another").of("patient", "MRN-7") != first.patient
    assert Pseudonyms(b"another").fingerprint != PSEUDONYMS.fingerprint


def test_a_guess_cannot_be_tested_without_the_key() -> None:
    name = PSEUDONYMS.of("patient", "MRN-7")
    for guess in (b"MRN-7", b"patient\0MRN-7", KEY.encode() + b"MRN-7"):
        assert not hashlib.sha256(guess).hexdigest().startswith(name)
    assert KEY[:8] not in PSEUDONYMS.fingerprint


def test_the_same_number_as_patient_and_as_study_gives_two_names() -> None:
    assert PSEUDONYMS.of("patient", "1") != PSEUDONYMS.of("study", "1")


def test_shares_of_patients_are_even_and_stay() -> None:
    shares = [PSEUDONYMS.share(f"{i:016x}") for i in range(20_000)]
    assert all(0 <= share < 1 for share in shares)
    tenths = [sum(k / 10 <= share < (k + 1) / 10 for share in shares) for k in range(10)]
    # Five standard deviations of a binomial count around 2000.
    assert all(abs(count - 2000) < 5 * (20_000 * 0.09) ** 0.5 for count in tenths)
    assert PSEUDONYMS.share("0" * 16) == Pseudonyms(KEY.encode()).share("0" * 16)


def test_a_missing_or_guessable_key_is_refused_with_the_command_that_makes_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(RecipeError, match=r"not set.*secrets\.token_hex"):
        pseudonyms_from_environment()
    monkeypatch.setenv(KEY_VARIABLE, "hospital")
    with pytest.raises(RecipeError, match=r"8 characters.*secrets\.token_hex") as caught:
        pseudonyms_from_environment()
    assert "hospital" not in str(caught.value)


# --- pixels that must not leave -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sop_class, modality, burned_in, code",
    [
        (ComputedRadiographyImageStorage, "CR", "NO", None),
        (ComputedRadiographyImageStorage, "CR", None, None),
        (ComputedRadiographyImageStorage, "CR", "YES", "burned-in-text"),
        (ComputedRadiographyImageStorage, "CR", "yes ", "burned-in-text"),
        (UltrasoundImageStorage, "US", None, "burned-in-unknown"),
        (UltrasoundImageStorage, "US", "", "burned-in-unknown"),
        (UltrasoundImageStorage, "US", "NO", None),
        (SecondaryCaptureImageStorage, "CR", None, "burned-in-unknown"),
        (SecondaryCaptureImageStorage, "OT", "NO", None),
        (ComputedRadiographyImageStorage, "US", None, "burned-in-unknown"),
    ],
)
def test_burned_in_text_is_refused_also_where_ultrasound_is_silent(
    sop_class: str, modality: str, burned_in: str | None, code: str | None
) -> None:
    made = dataset(radiograph(8), SOPClassUID=sop_class, Modality=modality, BurnedInAnnotation=burned_in)
    if code is None:
        require_shareable_pixels(made)
        return
    with pytest.raises(ScanError) as caught:
        require_shareable_pixels(made)
    assert caught.value.code == code


def test_recognizable_faces_are_refused() -> None:
    with pytest.raises(ScanError, match="recognizable-face"):
        require_shareable_pixels(dataset(radiograph(8), RecognizableVisualFeatures="YES"))


# --- recipes --------------------------------------------------------------------------------------------------


def test_an_attribute_from_no_keyword_or_an_identifying_one_is_refused() -> None:
    require_harmless_sources(SCHEMA)

    def message(source: str) -> str:
        declaration = NumberAttribute(name="number", source=source, unit="", minimum=0, maximum=1e9)
        with pytest.raises(RecipeError) as caught:
            require_harmless_sources(AttributeSchema(declarations=(declaration,)))
        return str(caught.value)

    assert "did you mean 'PatientAge'" in message("PatientsAge")
    for source in ("PatientID", "AccessionNumber", "PatientBirthDate", "StudyInstanceUID", "PatientName"):
        assert "can identify a patient" in message(source)
