"""Looking at a source: without a key and without a recipe, told without a name, and the recipe it suggests runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from pydicom import uid

from jobs import prepare, survey
from scanloom.artefact import open_artefact
from scanloom.scans.deidentify import KEY_VARIABLE
from tests.made_canaries import canaries_in, full_of_canaries
from tests.made_dicom import KEY, file, radiograph, tar

CLASSES = ((uid.CTImageStorage, "CT"), (uid.DigitalXRayImageStorageForPresentation, "DX"), (uid.MRImageStorage, "MR"))


def _fill(folder: Path) -> None:
    """An archive of 14 patients, three loose files full of canaries, and two that are no scans."""
    folder.mkdir()
    patients = {
        f"P{number}.dcm": file(
            radiograph(8, (64, 64), number), PatientID=f"P{number}", PatientSex="FM"[number % 2], ViewPosition="PA"
        )
        for number in range(14)
    }
    (folder / "a.tar").write_bytes(tar(patients))
    for number, (sop_class, modality) in enumerate(CLASSES):
        content = full_of_canaries(radiograph(12, (64, 64), number), str(sop_class), modality, number)
        (folder / f"PHICANRY-{number}").write_bytes(content)
    (folder / "PHICANRY-letter").write_bytes(b"PHICANRY")
    (folder / "PHICANRY-nobody").write_bytes(file(PatientID=None))


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.ray
def test_a_source_is_told_shown_and_given_a_recipe_that_runs(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path / "in")
    monkeypatch.delenv(KEY_VARIABLE)
    data, sheet, recipe = (tmp_path / name for name in ("found.json", "sheet.png", "recipe.yaml"))
    outputs = [f"--json={data}", f"--sheet={sheet}", f"--recipe={recipe}", "--examples=9"]
    assert survey.main([str(tmp_path / "in"), *outputs]) == 0
    said = capsys.readouterr()
    found = json.loads(data.read_text())
    assert found["objects"] == {"listed": 6, "looked_at": 19, "bytes": found["objects"]["bytes"]}
    assert found["scans"] == 17
    assert found["headers"]["modality"] == {"CR": 15, "CT": 1, "DX": 1, "MR": 1}
    assert found["quarantine"] == {"no-patient-id": 1, "not-dicom": 1}
    assert found["recipe"] == recipe.read_text()
    for told in ("no-patient-id", "Computed Radiography Image Storage: 15", "REAL PATIENTS", "--decode"):
        assert told in said.out
    # Nine pictures stand in two rows of eight places.
    assert Image.open(sheet).width > 8 * 128
    everything = said.out + said.err + data.read_text() + recipe.read_text()
    assert canaries_in(everything) == []
    assert canaries_in(sheet.read_bytes()) == []
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    # The waves of these small scans stand in rows like glyphs.
    chosen = (f"store={tmp_path / 'out'}", "prepare.size_px=32", "prepare.burned_in_text=flag")
    assert prepare.main([str(recipe), *(part for each in chosen for part in ("--set", each))]) == 0
    statistics = open_artefact(str(tmp_path / "out" / "corpus")).manifest.statistics
    assert statistics["rows"] == found["scans"]
    assert statistics["quarantined"] == found["quarantine"]


@pytest.mark.ray
def test_a_recipes_own_source_is_looked_at_with_its_attributes(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\nstore: x\nattributes: [{name: sex, kind: category, source: PatientSex, values: [F, M]}]\n"
        "prepare: {source: {kind: phantoms}}\n"
    )
    data = tmp_path / "found.json"
    arguments = [str(tmp_path / "r.yaml"), "--set", "prepare.source.scans=40", f"--json={data}", "--decode"]
    assert survey.main(arguments) == 0
    assert "prepare:" not in capsys.readouterr().out
    found = json.loads(data.read_text())
    assert (found["kind"], found["scans"], found["pixels_decoded"]) == ("phantoms", 40, True)
    assert [attribute["name"] for attribute in found["attributes"]] == ["sex"]


def test_mistakes_of_a_new_user_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert survey.main([str(tmp_path / "nothing")]) == 2
    assert "no objects under this prefix" in _one_line(capsys)
    assert survey.main([str(tmp_path), "--set", "seed=1"]) == 2
    assert "--set changes a recipe" in _one_line(capsys)
    assert survey.main([str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in _one_line(capsys)


def test_a_sheet_of_nothing_is_a_sheet() -> None:
    from scanloom.scans.survey import Survey

    sheet = survey.sheet([], Survey())
    assert Image.open(io.BytesIO(sheet)).format == "PNG"
