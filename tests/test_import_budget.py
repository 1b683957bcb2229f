"""What a start of each program loads, asserted on the list of modules and not on a clock.

`ovt-runtime` is started three to five times per container, so its list is closed: whatever is not named here was paid
for by every container. `ovt` serves people and may load click and a few comfortable modules, but nothing slow before
the command that needs it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import BARE, Bundle

ROOT = Path(__file__).resolve().parent.parent

# What a bare `python3 -I -S` loads before the first line of ours, on 3.11 to 3.13.
BARE_PYTHON = {
    *("sys", "builtins", "posix", "time", "winreg", "nt", "zipimport", "marshal", "io", "abc", "codecs", "_codecs"),
    *("_abc", "_io", "_imp", "_thread", "_warnings", "_weakref", "_signal", "_frozen_importlib", "encodings"),
    *("_frozen_importlib_external", "encodings.aliases", "encodings.utf_8", "_sitebuiltins", "linecache"),
}
# Small modules in C, and only those.
BUDGET = {
    *("_ctypes", "_json", "_socket", "_struct", "_signal", "_posixsubprocess", "_blake2"),
    *("errno", "fcntl", "select", "gc", "__future__"),
}
SLOW = {
    *("asyncio", "dataclasses", "email", "http", "importlib.metadata", "inspect", "logging", "lxml", "multiprocessing"),
    *("psutil", "pyroute2", "pyudev", "socket", "sqlite3", "ssl", "subprocess", "tarfile", "tempfile", "unittest"),
    *("urllib.request", "xml", "yaml", "zipfile", "ctypes", "uuid", "platform", "decimal", "random"),
}


def imported(command: list[object], **options: object) -> set[str]:
    """The modules that a run of an interpreter loads from start to end, late imports included (-X importtime)."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", done.stderr, re.MULTILINE)
    assert "encodings" in names
    return set(names)


def runtime_imports(runtime: Path, *arguments: object) -> set[str]:
    script = runtime.with_name("ovt-runtime.py")
    return imported(["/usr/bin/python3", "-ISXutf8", "-X", "importtime", script, *arguments], env=BARE, timeout=60)


def foreign(names: set[str]) -> set[str]:
    return {n for n in names - BARE_PYTHON - BUDGET if n != "ovt" and not n.startswith("ovt.")}


def test_bare_python_is_what_we_think() -> None:
    command: list[object] = ["/usr/bin/python3", "-ISXutf8", "-X", "importtime", "-c", "pass"]
    assert imported(command, env=BARE) <= BARE_PYTHON


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("list",)], ids=" ".join)
def test_runtime_verbs_without_a_container(runtime: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert foreign(runtime_imports(runtime, "--root", tmp_path, *arguments)) == set()


@pytest.mark.root
def test_runtime_verbs_on_a_container(runtime: Path, run_root: Path, bundle: Bundle, container_id: str) -> None:
    place = bundle("sleep", "100")
    script = runtime.with_name("ovt-runtime.py")
    verbs: list[tuple[object, ...]] = [
        ("create", "--bundle", place, "--pid-file", place / "pid", container_id),
        ("start", container_id),
        ("state", container_id),
        ("ps", "--format", "json", container_id),
        ("exec", container_id, "true"),
        ("kill", container_id, "KILL"),
        ("delete", "--force", container_id),
    ]
    paid_for = {}
    for verb in verbs:
        # The container keeps stdio: a pipe that subprocess waits for would wait for the container's end.
        log = run_root.with_name(f"{verb[0]}.importtime")
        with log.open("w") as stderr:
            done = subprocess.run(
                ["/usr/bin/python3", "-ISXutf8", "-X", "importtime", script, "--root", run_root, *map(str, verb)],
                env=BARE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, timeout=60,
            )  # fmt: skip
        text = log.read_text()
        assert done.returncode == 0, f"{verb[0]}: {text}"
        paid_for[verb[0]] = foreign(set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", text, re.MULTILINE)))
    assert paid_for == {verb[0]: set() for verb in verbs}


def people_imports(tmp_path: Path, *arguments: str) -> set[str]:
    code = "import sys; from ovt.cli import main; sys.argv[0] = 'ovt'; sys.exit(main())"
    environment = {**BARE, "HOME": str(tmp_path), "OVT_DATA_ROOT": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    return imported([sys.executable, "-X", "importtime", "-c", code, *arguments], env=environment, timeout=60)


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("ps",)], ids=" ".join)
def test_people_commands_load_nothing_slow(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    plain = imported([sys.executable, "-X", "importtime", "-c", "import click"], env=os.environ)
    loaded = people_imports(tmp_path, *arguments) - plain
    assert {n for n in loaded if any(n == s or n.startswith(s + ".") for s in SLOW)} == set()


def test_an_unneeded_command_is_not_loaded(tmp_path: Path) -> None:
    """`ovt --version` loads the frame of the command line and not one of its verbs."""
    assert {n for n in people_imports(tmp_path, "--version") if n.startswith("ovt.engine")} == set()
