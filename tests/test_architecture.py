"""The house's rules that no linter checks: what may lie where, and what must agree with what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in ("platform", "jobs", "serve") for p in (ROOT / folder).rglob("*.py"))
OURS = {"scanloom", "jobs", "serve", "tests"}
BASE_WEIGHTS = "platform/scanloom/base/generator"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(requirement: str) -> str:
    """A distribution's name as PEP 503 spells it, without extras and versions."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement)[0]).lower()


def declared() -> set[str]:
    extras = PROJECT["optional-dependencies"].values()
    return {canonical(r) for group in (PROJECT["dependencies"], *extras) for r in group}


def lines(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def test_no_importable_name_hides_a_standard_module() -> None:
    names = {
        path.stem
        for folder in (ROOT, ROOT / "jobs", ROOT / "serve", ROOT / "tests")
        for path in folder.iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())
    }
    assert names & sys.stdlib_module_names == set()


def test_no_test_folder_makes_a_fake_platform_module() -> None:
    # pytest puts a module named after each folder below tests/ into sys.modules.
    assert {p.name for p in (ROOT / "tests").rglob("*") if p.is_dir()} & sys.stdlib_module_names == set()


def test_platform_holds_the_package_and_nothing_else() -> None:
    # A platform/__init__.py shadows Python's own `platform`; a Ray job then hangs without a word.
    assert {p.name for p in (ROOT / "platform").iterdir()} - {"__pycache__"} == {"scanloom"}


@pytest.mark.parametrize(
    "name, guards",
    [
        (".gitignore", {"/platform/__init__.py", "/.venv/", "*.dcm"}),
        (".rayignore", {"/tests/", "/k8s/", "/docs/", "/.venv/"}),
    ],
)
def test_ignore_files_keep_their_guards(name: str, guards: set[str]) -> None:
    assert guards <= set(lines(name))


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_a_job_stays_readable_from_top_to_bottom(job: Path) -> None:
    assert len(job.read_text().splitlines()) <= 150


def test_no_source_file_grows_past_500_lines() -> None:
    assert [p.name for p in SOURCES if len(p.read_text().splitlines()) > 500] == []


@pytest.mark.parametrize("word", ["utils", "helpers", "common", "misc"])
def test_no_module_is_a_dumping_ground(word: str) -> None:
    assert [p for p in SOURCES if word in (p.stem, p.parent.name)] == []


def test_every_module_says_what_it_is() -> None:
    empty = [p for p in SOURCES if p.read_text().strip() and ast.get_docstring(ast.parse(p.read_text())) is None]
    assert empty == []


def test_every_public_function_of_some_length_has_a_docstring() -> None:
    # A one-liner may speak for itself.
    silent = [
        f"{path.stem}.{node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and node.name != "main"
        and ast.get_docstring(node) is None
        and len(node.body) > 3
    ]
    assert silent == []


def test_every_direct_dependency_is_pinned_to_a_released_version() -> None:
    pins = [line for line in lines("constraints.txt") if line and not line.startswith("#")]
    # A local version (+cpu) or a path exists on one machine only.
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin)] == []
    assert declared() - {canonical(pin) for pin in pins} == set()


def test_every_imported_distribution_is_declared() -> None:
    owners = packages_distributions()
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    imported = {name for path in files for name in top_level_imports(path)} - sys.stdlib_module_names - OURS
    undeclared = {name for name in imported if not {canonical(d) for d in owners.get(name, [name])} & declared()}
    assert undeclared == set()


def top_level_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"scanloom"}
    assert "scanloom/py.typed" in names
    base = [path for path in (ROOT / BASE_WEIGHTS).rglob("*") if path.is_file()]
    assert base
    assert {str(path.relative_to(ROOT / "platform")) for path in base} <= set(names)


def makefile_targets() -> dict[str, list[str]]:
    targets: dict[str, list[str]] = {}
    current: list[str] = []
    for line in lines("Makefile"):
        if found := re.match(r"([\w./-]+):(?!=)", line):
            current = targets.setdefault(found[1], [])
        elif line.startswith("\t"):
            current.append(line)
    return targets


def test_makefile_targets_stay_short() -> None:
    targets = makefile_targets()
    assert {"setup", "demo", "test", "test-all", "lint", "bench", "docs"} <= set(targets)
    assert [name for name, recipe in targets.items() if len(recipe) > 3] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_commands_of_the_documents_exist(page: str) -> None:
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of(page)))
    assert named
    assert named - set(makefile_targets()) == set()


def code_of(page: str) -> str:
    text = (ROOT / page).read_text()
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))


def test_ci_runs_the_readmes_test_command_and_the_linters() -> None:
    commands = [line for line in lines(".ci/run") if line.startswith("make ")]
    assert commands == ["make lint", "make test"]
    assert "make test" in code_of("README.md")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_no_scan_and_no_large_file_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).exists()]
    assert files
    assert [p for p in files if p.suffix.lower() in (".dcm", ".dicom")] == []
    large = [p for p in files if p.stat().st_size > 500 * 1024]
    assert [p for p in large if not p.is_relative_to(ROOT / BASE_WEIGHTS)] == []
