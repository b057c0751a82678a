"""docs/client.md: its examples run, in their order, against the service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import scanloom.client
from scanloom.api_key import PATTERN
from scanloom.artefact import open_artefact, verify
from scanloom.client.session import AGAIN, PATIENCE_S
from tests.served_gateway import served
from tests.tiny_generator import publish_generator

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "client.md").read_text(encoding="utf-8")


def test_the_examples_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = publish_generator(str(tmp_path / "generator")).uri
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with served(generator, str(tmp_path / "store")) as service, service.finishing():
        monkeypatch.setenv("SCANLOOM_URL", service.url)
        monkeypatch.setenv("SCANLOOM_API_KEY", service.key)
        for code in re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
            exec(compile(code, "docs/client.md", "exec"), names)
        names["client"].close()
    assert [path.name for path in sorted(Path("images").iterdir())] == [
        f"tiny-{names['images'].seed}-{n}.png" for n in range(4)
    ]
    assert [instance.PatientSex for instance in names["instances"]] == ["M", "M"]
    assert names["table"].num_rows == 2
    assert list(verify(open_artefact("dataset", "dataset"))) == []
    assert len(names["files"]) == len(open_artefact("dataset").manifest.files) + 1
    assert names["known"].state == "finished"


def test_what_the_page_says_of_errors_retries_and_keys_is_so() -> None:
    table = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) | {"NotFound", "ServiceError"}
    errors = {name for name in scanloom.client.__all__ if issubclass(getattr(scanloom.client, name), Exception)}
    assert table == errors
    assert f"answers {', '.join(map(str, sorted(AGAIN)[:-1]))} and {max(AGAIN)}," in " ".join(TEXT.split())
    assert f"Client(patience_s={PATIENCE_S:g})" in TEXT
    assert f"`{PATTERN}`" in TEXT
