"""A glimpse tells of a file what a corpus would make of it, from its header alone, in the standard's words."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scanloom.attributes import AttributeSchema
from scanloom.errors import ScanError
from scanloom.recipe import (
    CategoryAttribute,
    Decode,
    DicomSource,
    ImageFolderSource,
    LabelsAttribute,
    NumberAttribute,
    PhantomSource,
    Source,
)
from scanloom.scans import image_table
from scanloom.scans.decode import read_instance
from scanloom.scans.deidentify import Pseudonyms
from scanloom.scans.glimpse import (
    HEAD_BYTES,
    OTHER,
    UNSAID,
    Glimpse,
    glimpses,
    is_header_enough,
    unnamed,
    without_pixels,
)
from scanloom.scans.scan import Context
from scanloom.scans.sources import list_files, read_unit
from scanloom.scans.units import Unit, cut
from scanloom.store import Store
from tests.made_dicom import KEY, LOSSLESS, file, radiograph, tar

SCHEMA = AttributeSchema(
    declarations=(
        CategoryAttribute(name="sex", source="PatientSex", values=("F", "M")),
        NumberAttribute(name="age", source="PatientAge", unit="years", minimum=0, maximum=90, cap=90),
        LabelsAttribute(name="findings", source="ImageComments", values=("Effusion", "Mass")),
    )
)
CONTEXT = Context(SCHEMA, Pseudonyms(KEY.encode()), Decode(), 0, 64)


def _glimpses(source: Source) -> list[Glimpse]:
    units = cut(list_files(source, SCHEMA), 256, 0)
    return [glimpse for unit in units for glimpse in glimpses(source, unit, CONTEXT)]


def _of(folder: Path, **elements: Any) -> Glimpse:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a").write_bytes(file(**elements))
    (found,) = _glimpses(DicomSource(uri=str(folder)))
    return found


@pytest.mark.parametrize("syntax", sorted(LOSSLESS))
def test_a_header_without_its_pixels_is_the_same_header(syntax: str) -> None:
    whole = file(radiograph(8, (600, 600)), LOSSLESS[syntax])
    short = without_pixels(whole[: min(len(whole), 4096)], len(whole))
    if syntax == "deflated":
        assert short is None
        return
    assert short is not None
    assert len(short) < 2000
    before, after = (read_instance(data, Decode()) for data in (whole, short))
    assert after.syntax == before.syntax
    assert after.pixel == before.pixel
    assert [e for e in after.dataset if e.keyword != "PixelData"] == [
        e for e in before.dataset if e.keyword != "PixelData"
    ]


def test_what_has_no_such_header_is_read_whole() -> None:
    whole = file(radiograph(8, (600, 600)))
    assert without_pixels(whole[:600], len(whole)) is None
    # Cut off: whether a repair helps is for the reader of the whole to say.
    assert without_pixels(whole[:4096], len(whole) - 1000) is None
    assert without_pixels(b"a letter" * 100, 800) is None
    assert without_pixels(bytes(5000), 10**6) is None


def test_of_a_large_loose_object_the_pixels_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = file(radiograph(8, (800, 800)))
    assert len(content) > HEAD_BYTES
    (tmp_path / "a").write_bytes(content)

    def read(store: Store, key: str) -> bytes:
        raise AssertionError("the whole object was read")

    monkeypatch.setattr(Store, "read", read)
    (found,) = _glimpses(DicomSource(uri=str(tmp_path)))
    assert (found.shape, found.refused) == ((800, 800), "")


def test_every_file_is_refused_for_the_reason_that_a_corpus_would_have(tmp_path: Path) -> None:
    made: dict[str, bytes] = {
        "good": file(),
        "letter": b"a letter",
        "empty": b"",
        "nobody": file(PatientID=None),
        "burned": file(BurnedInAnnotation="YES"),
        "raw": file(PresentationIntentType="FOR PROCESSING"),
        "old": file(PatientAge="200Y"),
        "report": file(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"),
        "cut": file()[:2000],
    }
    (tmp_path / "a.tar").write_bytes(tar(made))
    for name, content in made.items():
        (tmp_path / f"{name}.dcm").write_bytes(content)
    source = DicomSource(uri=str(tmp_path))
    units = cut(list_files(source, SCHEMA), 256, 0)
    for unit in units:
        seen = [(glimpse.member, glimpse.refused) for glimpse in glimpses(source, unit, CONTEXT)]
        read = [
            (member, found.code if isinstance(found, ScanError) else "")
            for member, _, found in read_unit(source, unit, CONTEXT)
        ]
        assert seen == read
    assert [len(unit.files) for unit in units] == [1, 9]


def test_a_damaged_file_is_told_as_a_corpus_tells_it_unless_only_its_pixels_show_it(tmp_path: Path) -> None:
    chance = random.Random(0)
    sound = [file(radiograph(8, (48, 40)), syntax) for syntax in LOSSLESS.values()]
    members: dict[str, bytes] = {}
    for number in range(600):
        content = bytearray(sound[number % len(sound)])
        for _ in range(chance.choice([1, 1, 2, 5])):
            place = chance.randrange(len(content))
            if chance.random() < 0.7:
                content[place] = chance.randrange(256)
            else:
                del content[place : place + chance.randrange(1, 30)]
        members[str(number)] = bytes(content)
    (tmp_path / "a.tar").write_bytes(tar(members))
    source = DicomSource(uri=str(tmp_path))
    (unit,) = cut(list_files(source, SCHEMA), 256, 0)
    seen = [glimpse.refused for glimpse in glimpses(source, unit, CONTEXT)]
    read = [
        found.code if isinstance(found, ScanError) else ""
        for _, frame, found in read_unit(source, unit, CONTEXT)
        if not frame
    ]
    differ = [(told, found) for told, found in zip(seen, read, strict=True) if told != found]
    assert {told for told, _ in differ} <= {""}
    assert {found for _, found in differ} <= {"undecodable-pixels", "blank-image"}
    assert len(set(read)) > 5


def test_headers_are_told_in_the_words_of_the_standard_or_not_at_all(tmp_path: Path) -> None:
    good = _of(tmp_path / "good", NumberOfFrames=None)
    assert good.terms == {
        "modality": "CR",
        "SOP class": "Computed Radiography Image Storage",
        "transfer syntax": "Explicit VR Little Endian",
        "bits stored": "12 in 16",
        "photometric interpretation": "MONOCHROME2",
        "frames of a file": "1",
    }
    odd = _of(tmp_path / "odd", Modality="MILLER^ANNA", SOPClassUID="1.2.3.4", PhotometricInterpretation="MILLER")
    assert (odd.terms["modality"], odd.terms["SOP class"]) == (OTHER, OTHER)
    assert odd.terms["photometric interpretation"] == OTHER
    assert _of(tmp_path / "none", Modality=None).terms["modality"] == UNSAID


def test_a_glimpse_knows_the_attributes_and_what_would_be_withheld(tmp_path: Path) -> None:
    found = _of(tmp_path, PatientSex="X", ImageComments="Mass|Hernia")
    assert found.subject is not None
    assert found.subject.attributes == {"sex": None, "age": 61.0, "findings": ("Mass",)}
    assert found.withheld == {"sex": ("X",), "findings": ("Hernia",)}


@pytest.mark.parametrize(
    ("texts", "withheld"),
    [
        ({"PatientSex": "M", "PatientAge": "what", "ImageComments": "Mass|Effusion"}, {}),
        ({"PatientSex": "m", "ImageComments": "No Finding"}, {"sex": ("m",)}),
        ({"ImageComments": "Mass||Zebra|Cat"}, {"findings": ("Cat", "Zebra")}),
        ({"PatientSex": " "}, {}),
    ],
)
def test_only_texts_that_the_schema_does_not_name_are_withheld(
    texts: dict[str, str], withheld: dict[str, tuple[str, ...]]
) -> None:
    assert unnamed(SCHEMA, texts) == withheld


def _png(mode: str = "L", size: tuple[int, int] = (40, 30)) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(sink, "PNG")
    return sink.getvalue()


def test_image_files_are_known_by_their_headers_and_refused_as_a_corpus_would(tmp_path: Path) -> None:
    contents = {"a.png": _png(), "b.png": _png("RGB"), "c.png": b"junk", "d.png": b"", "e.png": _png()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    rows = "".join(f"{name},p{name},F,061Y,Mass\n" for name in ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "t.csv").write_text("file,patient,PatientSex,PatientAge,ImageComments\n" + rows)
    source = ImageFolderSource(uri=str(tmp_path), table=str(tmp_path / "t.csv"))
    found = _glimpses(source)
    codes = ["", "", "not-an-image-file", "empty-file", "no-table-row"]
    assert [glimpse.refused for glimpse in found] == codes
    assert found[0].terms == {"file format": "PNG", "bits stored": "8", "photometric interpretation": "gray"}
    assert (found[0].shape, found[1].terms["photometric interpretation"]) == ((30, 40), "colour")
    files = image_table.list_files(source, SCHEMA)
    (unit,) = cut(files, 256, 0)
    read = [found.code if isinstance(found, ScanError) else "" for _, _, found in read_unit(source, unit, CONTEXT)]
    # The channels of b.png are equal, which no header tells.
    assert read == codes


def test_a_source_without_headers_is_read() -> None:
    schema = AttributeSchema(declarations=(CategoryAttribute(name="sex", values=("F",)),))
    source = PhantomSource(scans=12)
    assert not is_header_enough(source)
    context = Context(schema, Pseudonyms(KEY.encode()), Decode(), 0, 32)
    (unit,) = (Unit(index=0, files=tuple(list_files(source, schema))),)
    found = list(glimpses(source, unit, context))
    assert [glimpse.shape for glimpse in found] == [(32, 32)] * 12
    # Their texts are gone once they are read.
    assert {glimpse.withheld.get("sex") for glimpse in found} == {None, ("",)}
