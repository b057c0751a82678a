"""From a header or a table row to what the corpus may know: pseudonyms and the attributes the schema names.

Why an allow-list alone, and no PS3.15 profile applied first: a profile decides what to take out of a header that is
kept. The corpus keeps no header. What leaves this module is three keyed pseudonyms, the schema's attributes, each
parsed into a declared value or number (text that is not one becomes unknown), and counts. A profile run before it
could only remove more of what is dropped anyway, would cost a copy of every header, and would add its own 11
survivors (of the 598 attributes of PS3.15 Table E.1-1) to what must be trusted. Pixels are what remains: burned-in
text is refused, overlays and everything beside the image's own bits are not read.
"""

from __future__ import annotations

import difflib
import functools
import hmac
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydicom import uid
from pydicom.datadict import dictionary_VR, keyword_dict, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag

from scanloom.attributes import AttributeSchema, Value
from scanloom.errors import RecipeError
from scanloom.scans.quarantine import reject

KEY_VARIABLE = "SCANLOOM_PSEUDONYM_KEY"
_MAKE_KEY = f"export {KEY_VARIABLE}=$(python -c 'import secrets; print(secrets.token_hex(32))')"
_SHORTEST_KEY = 32

Actions = Counter[tuple[str, str]]
"""(DICOM tag and keyword, or column; action) -> how often. Actions: parsed, withheld, pseudonymised, used, removed."""

# What decoding reads of a header; it shapes the pixels and is then gone.
_PIXEL_MODULE = frozenset(
    {
        "PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
        "SamplesPerPixel", "NumberOfFrames", "PhotometricInterpretation", "PixelPaddingValue",
        "PixelPaddingRangeLimit", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence",
        "VOILUTFunction", "WindowCenter", "WindowWidth", "PixelSpacing", "ImagerPixelSpacing",
        "PlanarConfiguration", "PixelAspectRatio", "NominalScannedPixelSpacing", "ImageOrientationPatient",
        "ImagePositionPatient", "PatientOrientation", "SharedFunctionalGroupsSequence", "RescaleType",
        "PerFrameFunctionalGroupsSequence", "FloatPixelData", "DoubleFloatPixelData",
        "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
        "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
        "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
        "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
        "SegmentedBluePaletteColorLookupTableData", "EstimatedRadiographicMagnificationFactor",
        "FloatPixelPaddingValue", "FloatPixelPaddingRangeLimit", "DoubleFloatPixelPaddingValue",
        "DoubleFloatPixelPaddingRangeLimit", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
        "PresentationIntentType", "SOPClassUID", "Modality", "BurnedInAnnotation", "RecognizableVisualFeatures",
    }
)  # fmt: skip
_PSEUDONYMISED = frozenset({"PatientID", "StudyInstanceUID", "SOPInstanceUID"})
_TEXT_VRS = frozenset({"AE", "AS", "CS", "DA", "LO", "LT", "SH", "ST", "TM", "UC", "UI", "UT"})
_IDENTIFYING_VRS = frozenset({"PN", "UI", "DA", "DT", "TM"})
_IDENTIFYING = frozenset({"PatientID", "OtherPatientIDs", "AccessionNumber", "StudyID", "DeviceSerialNumber"})


class Pseudonyms:
    """Keyed one-way names: HMAC-SHA256, so that nobody without the key can test a guess (PS3.15 E.1.1)."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @property
    def fingerprint(self) -> str:
        """Tells two keys apart without saying anything of either."""
        return self.digest("fingerprint", b"")[:16]

    def of(self, kind: str, identifier: str) -> str:
        """16 hex digits that stand for one patient, study or instance."""
        return self.digest(kind, identifier.encode())[:16]

    def share(self, patient: str) -> float:
        """A fixed number in [0, 1) per patient pseudonym, by which patients are split."""
        return int(self.digest("split", patient.encode())[:13], 16) / 16.0**13

    def digest(self, purpose: str, content: bytes) -> str:
        """HMAC-SHA256 in hex; different purposes never collide."""
        return hmac.digest(self._key, purpose.encode() + b"\0" + content, "sha256").hex()


def pseudonyms_from_environment() -> Pseudonyms:
    """Pseudonyms under the secret of this environment.

    Raises RecipeError, with the command that makes a key, where there is none or a guessable one.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise RecipeError(
            f"{KEY_VARIABLE} is not set: patients are renamed with a secret key; make one, keep it "
            f"(the same key gives the same names and the same split): {_MAKE_KEY}"
        )
    if len(key) < _SHORTEST_KEY:
        raise RecipeError(
            f"{KEY_VARIABLE} has {len(key)} characters; at least {_SHORTEST_KEY} are needed against guessing: "
            f"{_MAKE_KEY}"
        )
    return Pseudonyms(key.encode())


@dataclass(frozen=True)
class Subject:
    """All that the corpus knows of a scan beside its pixels."""

    id: str
    patient: str
    study: str
    attributes: Mapping[str, Value]
    actions: Actions = field(repr=False)

    def of_frame(self, frame: int | None, pseudonyms: Pseudonyms) -> Subject:
        """The subject of one frame of a multi-frame object, under an id of its own; of the object itself for None.

        What was done to the header is the same for all of its frames.
        """
        return self if frame is None else replace(self, id=pseudonyms.of("frame", f"{self.id} {frame}"))


# --- DICOM headers --------------------------------------------------------------------------------------------


def require_harmless_sources(schema: AttributeSchema) -> None:
    """Raise RecipeError unless every attribute comes from a DICOM keyword that names nobody and no point in time."""
    for declaration in schema.declarations:
        source = declaration.source or declaration.name
        tag = tag_for_keyword(source)
        if tag is None:
            near = difflib.get_close_matches(source, list(keyword_dict), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "such as PatientSex or ViewPosition"
            raise RecipeError(f"attribute {declaration.name!r}: source {source!r} is no DICOM keyword; {hint}")
        if source in _IDENTIFYING or dictionary_VR(tag) in _IDENTIFYING_VRS:
            raise RecipeError(f"attribute {declaration.name!r}: {source} can identify a patient, so it is not kept")


def require_shareable_pixels(dataset: Dataset) -> None:
    """Raise ScanError for burned-in text (also where ultrasound or a secondary capture is silent about it) or faces."""
    burned_in = _text(dataset, "BurnedInAnnotation").upper()
    if burned_in == "YES":
        raise reject("burned-in-text", "BurnedInAnnotation")
    if burned_in != "NO" and _may_hold_text(dataset):
        raise reject("burned-in-unknown", "BurnedInAnnotation")
    if _text(dataset, "RecognizableVisualFeatures").upper() == "YES":
        raise reject("recognizable-face", "RecognizableVisualFeatures")


def _may_hold_text(dataset: Dataset) -> bool:
    sop_class = uid.UID(_text(dataset, "SOPClassUID")).name
    return _text(dataset, "Modality").upper() in ("US", "IVUS") or any(
        word in sop_class for word in ("Ultrasound", "Secondary Capture")
    )


def subject_of_header(dataset: Dataset, schema: AttributeSchema, pseudonyms: Pseudonyms) -> Subject:
    """What may be known of a DICOM object.

    Raises ScanError: no-patient-id, no-instance-uid, attribute-out-of-range, attribute-not-a-number.
    """
    patient, instance = _text(dataset, "PatientID"), _text(dataset, "SOPInstanceUID")
    if not patient:
        raise reject("no-patient-id", "PatientID")
    if not instance:
        raise reject("no-instance-uid", "SOPInstanceUID")
    texts = {name: _attribute_text(dataset, name) for name in (d.source or d.name for d in schema.declarations)}
    attributes = schema.parse(texts)
    return Subject(
        id=pseudonyms.of("instance", instance),
        patient=pseudonyms.of("patient", patient),
        study=pseudonyms.of("study", _text(dataset, "StudyInstanceUID") or instance),
        attributes=attributes,
        actions=_header_actions(dataset, _attribute_actions(schema, texts, attributes)),
    )


def _attribute_text(dataset: Dataset, keyword: str) -> str:
    text = _text(dataset, keyword)
    return text or (_age(dataset) if keyword == "PatientAge" else "")


def _text(dataset: Dataset, keyword: str) -> str:
    """The element as text, several values joined by a backslash; empty where there is none.

    Raises ScanError unreadable-dicom where it is not what its value representation says.
    """
    tag = _tag_of(keyword)
    if tag not in dataset:
        return ""
    # Without keep_deferred, pydicom converts an element that is empty, whatever it calls itself.
    element = dataset.get_item(tag, keep_deferred=True)
    # Plain text needs none of pydicom's conversion, which takes ten times as long.
    if isinstance(element, RawDataElement) and (element.VR or dictionary_VR(tag)) in _TEXT_VRS:
        raw = element.value
        if isinstance(raw, bytes) and raw.isascii() and b"\x1b" not in raw:
            return raw.decode("ascii").replace("\0", " ").strip()
    try:
        value = dataset[tag].value
    except Exception:  # noqa: BLE001 - pydicom converts values when they are asked for; junk raises anything
        raise reject("unreadable-dicom", keyword) from None
    if value is None:
        return ""
    parts = value if isinstance(value, MultiValue) else (value,)
    return "\\".join(str(part) for part in parts).replace("\0", " ").strip()


@functools.cache
def _tag_of(keyword: str) -> BaseTag:
    return Tag(keyword)


def _age(dataset: Dataset) -> str:
    """PatientAge as AS from birth and study date, which many archives hold instead; empty where they do not tell."""
    born, seen = _text(dataset, "PatientBirthDate"), _text(dataset, "StudyDate")
    if not all(len(date) == 8 and date.isdigit() for date in (born, seen)):
        return ""
    years = int(seen[:4]) - int(born[:4]) - (seen[4:] < born[4:])
    return f"{years:03d}Y" if 0 <= years <= 999 else ""


def _attribute_actions(
    schema: AttributeSchema, texts: Mapping[str, str], attributes: Mapping[str, Value]
) -> dict[str, str]:
    """Source -> parsed, or withheld where there is text that is none of the declared values."""
    actions = {}
    for declaration in schema.declarations:
        source = declaration.source or declaration.name
        if texts.get(source):
            actions[source] = "withheld" if attributes[declaration.name] is None else "parsed"
    return actions


def _header_actions(dataset: Dataset, parsed: Mapping[str, str]) -> Actions:
    # A Dataset iterates over decoded elements, its keys are free. As plain numbers they are compared by Python itself.
    return _actions_of(tuple(map(int, dataset.keys())), tuple(parsed.items()))


@functools.lru_cache(maxsize=256)
def _actions_of(tags: Sequence[int], parsed: Sequence[tuple[str, str]]) -> Actions:
    """What is done to a header with these tags: the headers of one archive have mostly the same."""
    known = dict(parsed)
    return Counter((_tag_name(tag), _action(keyword_of(tag), known)) for tag in map(BaseTag, tags))


@functools.lru_cache(maxsize=8192)
def keyword_of(tag: BaseTag) -> str:
    """The DICOM keyword of a tag; empty for private and unknown ones."""
    return "" if tag.is_private else keyword_for_tag(tag)


@functools.lru_cache(maxsize=8192)
def _tag_name(tag: BaseTag) -> str:
    """A tag as the report names it; those that the standard does not know all alike, since they can tell a device."""
    keyword = keyword_of(tag)
    if not keyword:
        return "(private)" if tag.is_private else "(unknown)"
    return f"({tag.group:04X},{tag.element:04X}) {keyword}"


def _action(keyword: str, parsed: Mapping[str, str]) -> str:
    if keyword in _PSEUDONYMISED:
        return "pseudonymised"
    return parsed.get(keyword) or ("used" if keyword in _PIXEL_MODULE else "removed")


# --- table rows -----------------------------------------------------------------------------------------------


def subject_of_row(
    instance: str,
    patient: str,
    study: str,
    texts: Mapping[str, str],
    schema: AttributeSchema,
    pseudonyms: Pseudonyms,
    frame: int | None = None,
) -> Subject:
    """What may be known of an image file (or of one frame of it) with its table row; `texts` by attribute source.

    Raises ScanError: no-patient-id, attribute-out-of-range, attribute-not-a-number.
    """
    if not patient.strip():
        raise reject("no-patient-id")
    attributes = schema.parse(texts)
    actions = Counter(_attribute_actions(schema, texts, attributes).items())
    actions.update({("(file name)", "pseudonymised"): 1, ("(patient)", "pseudonymised"): 1})
    whole = Subject(
        id=pseudonyms.of("instance", instance),
        patient=pseudonyms.of("patient", patient.strip()),
        study=pseudonyms.of("study", f"{patient.strip()}\0{study}" if study else instance),
        attributes=attributes,
        actions=actions,
    )
    return whole.of_frame(frame, pseudonyms)
