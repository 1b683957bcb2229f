"""The one file of byte code: used when it is current, harmless when it is not, and equal to what it was made from."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BARE

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ["/usr/bin/python3", "-ISXutf8"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of its own with the file just made, and a place of installation that leads to it."""
    for part in ("ovt", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "*.code"))
    (tmp_path / "prefix/bin").mkdir(parents=True)
    shutil.copy(ROOT / "ovt-runtime.py", tmp_path / "prefix/bin")
    packages = tmp_path / "prefix/lib/python3/site-packages"
    packages.mkdir(parents=True)
    (packages / "__editable__.ovt-0.pth").write_text(f"{tmp_path}\n")
    precompile(tmp_path)
    return tmp_path


def precompile(tree: Path) -> str:
    command = ["/usr/bin/python3", "-ISX", "no_debug_ranges", tree / "scripts/precompile.py"]
    return subprocess.run(command, env=BARE, check=True, capture_output=True, text=True, timeout=60).stdout


def run(tree: Path, *words: str, flags: tuple[str, ...] = (), **options: object) -> "subprocess.CompletedProcess[str]":
    command = [*PYTHON, *flags, tree / "prefix/bin/ovt-runtime.py", *words]
    environment = {**BARE, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, **options)  # type: ignore[call-overload, no-any-return]


def searched_for(tree: Path) -> set[str]:
    """The modules that a run imports in the ordinary way."""
    told = run(tree, "--root", str(tree / "state"), "list", flags=("-v",))
    assert told.returncode == 0, told.stderr
    return set(re.findall(r"^# code object from '?(?:\S+/)?ovt/(\S+)\.pyc?'?$", told.stderr, re.MULTILINE))


def test_everything_comes_from_the_file(tree: Path) -> None:
    assert searched_for(tree) == set()
    (file,) = (tree / "ovt/_bin").glob("*.code")
    file.unlink()
    assert {"runtime", "errors", "engine/container/runtime"} <= searched_for(tree)


def test_it_is_made_anew_only_when_a_source_has_changed(tree: Path) -> None:
    assert precompile(tree) == ""
    (tree / "ovt/errors.py").touch()
    assert precompile(tree).startswith("built ovt/_bin/")
    (file,) = (tree / "ovt/_bin").glob("*.code")
    file.write_bytes(b"")
    assert precompile(tree).startswith("built ovt/_bin/")


@pytest.mark.parametrize("name", ["__init__", "runtime", "errors", "engine/container/state"])
def test_an_edited_source_counts_at_once(tree: Path, name: str) -> None:
    path = tree / f"ovt/{name}.py"
    before = path.stat()
    path.write_text(path.read_text() + "\nimport posix\nposix.write(2, b'edited')\n")
    assert run(tree, "--root", str(tree / "state"), "list").stderr == "edited"
    # also when it is as long as before
    path.write_text(path.read_text()[: before.st_size - 1] + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert name in searched_for(tree)


def test_another_version_of_the_loader_does_not_use_it(tree: Path) -> None:
    (tree / "ovt/precompiled.py").touch()
    assert {"__init__", "runtime", "errors"} <= searched_for(tree)


def test_a_closed_stdin_is_not_taken_for_the_file(tree: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *PYTHON, tree / "prefix/bin/ovt-runtime.py", "--version"]
    done = subprocess.run(command, env=BARE, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def names_of_modules(tree: Path, prepare: str) -> str:
    code = f"""
import marshal, posix, sys
sys.path.insert(0, {str(tree)!r})
fd = posix.open({str(next((tree / "ovt/_bin").glob("*.code")))!r}, posix.O_RDONLY)
boot, index = marshal.loads(posix.pread(fd, 16384, 0))
{prepare}
for name in sorted(index):
    __import__(name)
    module = sys.modules[name]
    print(name, module.__file__, module.__package__, list(getattr(module, "__path__", "")))
    print(sorted(set(vars(module)) - {{"annotations", "__annotations__", "__builtins__", "__cached__", "__doc__"}}))
"""
    done = subprocess.run([*PYTHON, "-c", code], env=BARE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_modules_are_the_same(tree: Path) -> None:
    install = f"exec(boot, n := {{'__name__': 'ovt.precompiled'}}); n['install'](fd, index, {str(tree / 'ovt')!r})"
    plain = names_of_modules(tree, "")
    assert plain.count("\n") > 100
    assert names_of_modules(tree, install) == plain


def test_the_tables_fit(tree: Path) -> None:
    """The launcher reads as much of the file's head as precompiled.py says that there is."""
    said = re.search(r"^HEADER = (\d+)", (ROOT / "ovt/precompiled.py").read_text(), re.MULTILINE)
    assert said and f"pread(precompiled, {said[1]}, 0)" in (ROOT / "ovt-runtime.py").read_text()
