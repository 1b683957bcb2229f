"""Linters, types and the rules no linter knows, as tests."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ovt", "ovf", "sriov", "power")
LONG, TOO_LONG, TOO_LONG_TEST = 400, 480, 600
# Paths and names of the one machine somebody worked on have no place in the project.
FOREIGN = ("/work" + "/", "/root" + "/.", "/." + "library", "share" + "d/research", "share" + "d/lab", "bash" + "_jobs")


def tracked() -> list[Path]:
    """Every text file of the project, committed or not, without what .gitignore names."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        files = [ROOT / line for line in done.stdout.splitlines()]
    else:  # an unpacked archive
        files = [p for top in (*PACKAGES, "tests", "scripts") for p in (ROOT / top).rglob("*") if p.is_file()]
        files += [p for p in ROOT.iterdir() if p.is_file()]
    return [p for p in files if p.is_file() and "__pycache__" not in p.parts and b"\0" not in p.read_bytes()[:4096]]


def python_files() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py"]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff() -> None:
    assert run(sys.executable, "-m", "ruff", "check", "--quiet", "--output-format=concise", ".") == ""


@pytest.mark.timeout(300)
def test_mypy_strict() -> None:
    assert run(sys.executable, "-m", "mypy", "--no-error-summary") == ""


def test_files_are_short() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in python_files()}
    long = sorted(((n, name) for name, n in lengths.items() if n > LONG), reverse=True)
    print("worth splitting: " + ", ".join(f"{name} ({n})" for n, name in long))
    limits = {name: TOO_LONG_TEST if name.startswith("tests/") else TOO_LONG for _, name in long}
    assert [f"{name} has {n} lines" for n, name in long if n > limits[name]] == []


def test_every_module_says_what_it_is() -> None:
    modules = [p for top in PACKAGES for p in (ROOT / top).rglob("*.py")]
    assert [str(p.relative_to(ROOT)) for p in modules if not ast.get_docstring(ast.parse(p.read_text()))] == []


def test_every_package_is_one() -> None:
    """A directory without __init__.py is a namespace package: slower to import, and anybody may add to it."""
    holders = {p.parent for top in PACKAGES for p in (ROOT / top).rglob("*.py")}
    assert sorted(str(d.relative_to(ROOT)) for d in holders if not (d / "__init__.py").exists()) == []


def test_nothing_speaks_of_one_machine() -> None:
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {word}" for word in FOREIGN if word in line]
    assert found == []


def test_nothing_is_left_for_later() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    found = []
    for path in [*python_files(), *(p for p in tracked() if p.suffix in (".c", ".h"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {mark}" for mark in marks if f"{mark}" in line]
    assert found == []
