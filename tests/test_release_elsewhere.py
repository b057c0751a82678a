"""A bundle is checked on a machine that has the wheel alone: no Ray, no store, no credentials, no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.released import Chain
from tests.test_release import PUBLIC_PEM, released

ROOT = Path(__file__).resolve().parents[1]
# What `verify` imports, and all that these import; pip of the bare environment gets nothing from elsewhere.
HAS = (
    "cryptography", "cffi", "pycparser", "pydantic", "pydantic_core", "annotated_types", "typing_extensions",
    "typing_inspection", "typer", "click", "rich", "markdown_it", "mdurl", "pygments", "shellingham", "yaml", "_yaml",
    "pyarrow", "numpy", "boto3", "botocore", "s3transfer", "jmespath", "dateutil", "urllib3", "six", "_cffi_backend",
    "annotated_doc",
)  # fmt: skip


@pytest.mark.slow
def test_with_the_wheel_alone_each_changed_file_is_named(tmp_path: Path) -> None:
    bundle = Path(released(Chain.made(tmp_path)).uri)
    (tmp_path / "public.pem").write_bytes(PUBLIC_PEM)
    command = _installed(tmp_path)

    def verify() -> subprocess.CompletedProcess[str]:
        # A home and an environment of its own: no configuration, no credentials.
        bare = {"PATH": os.defpath, "HOME": str(tmp_path / "nobody"), "COLUMNS": "200"}
        told = [*command, "verify", str(bundle), "--public-key", str(tmp_path / "public.pem")]
        return subprocess.run(told, env=bare, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    good = verify()
    assert good.returncode == 0, good.stderr
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    assert len(files) > 15
    for file in files:
        kept = file.read_bytes()
        file.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        bad = verify()
        assert bad.returncode == 1, file
        assert file.relative_to(bundle).as_posix() in bad.stdout, file
        file.write_bytes(kept)
    assert verify().returncode == 0


def _installed(folder: Path) -> list[str]:
    """The command of an environment into which the wheel, made here, was installed."""
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(wheel, check=True, capture_output=True, timeout=120)
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    here = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for name in HAS:
        for found in (here / name, here / f"{name}.libs", here / f"{name}.py", *here.glob(f"{name}*.so")):
            if found.is_dir():
                shutil.copytree(found, site / found.name, symlinks=True, dirs_exist_ok=True)
            elif found.is_file():
                shutil.copy(found, site / found.name)
    shutil.unpack_archive(next(folder.glob("scanloom-*.whl")), site, format="zip")
    python = str(folder / "venv" / "bin" / "python")
    return [python, "-I", "-c", "from scanloom.cli import main; raise SystemExit(main())"]
