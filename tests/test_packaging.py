"""What pip installs: launcher untouched, static programs, byte code that is used; and nobody can slip code in."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import BARE

ROOT = Path(__file__).resolve().parent.parent
SYSTEM_PYTHON = Path("/usr/bin/python3")

PROGRAMS = ("ovt/_bin/ovt-init", "ovt/_bin/ovt-supervisor", "ovt/_bin/ovt-guest")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, so that no build directory appears in it; needs no network."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    names = [*("ovt", "ovf", "sriov", "power", "scripts", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md")]
    names += ["LICENSE", "ovt-runtime.py", "CHANGELOG.md", "CONTRIBUTING.md"]
    subprocess.run(["cp", "-a", *[ROOT / n for n in names], source], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", place, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a fresh environment of the system's Python holding the wheel and nothing else."""
    prefix = tmp_path_factory.mktemp("installed") / "prefix"
    subprocess.run([SYSTEM_PYTHON, "-I", "-m", "venv", "--without-pip", prefix], check=True)
    command = [sys.executable, "-m", "pip", "-q", "--python", prefix / "bin/python", "install", "--no-deps"]
    subprocess.run([*command, "--no-index", wheel], check=True, env={**BARE, "HOME": str(prefix)})
    return prefix


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = {n.rpartition("/")[0] for n in names if ".data/scripts/" in n}
        assert {n for n in names if n.startswith(scripts)} == {f"{scripts}/ovt-runtime", f"{scripts}/ovt-runtime.py"}
        assert archive.read(f"{scripts}/ovt-runtime.py") == (ROOT / "ovt-runtime.py").read_bytes()
        assert archive.read(f"{scripts}/ovt-runtime").startswith(b"\x7fELF")
    assert not any(n == "ovt/_bin/ovt-runtime" or n.endswith(".code") for n in names)
    assert re.search(r"-py3-none-linux_\w+\.whl$", wheel.name)
    assert {*PROGRAMS, "ovt/runtime.py", "ovt/py.typed"} <= names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if ".d" not in t} == {"ovt", "ovf", "sriov", "power"}
    assert [n for n in names if n.endswith(".pyc") or "/." in n] == []


@pytest.mark.parametrize("program", [*PROGRAMS, "bin/ovt-runtime"])
def test_programs_are_static_and_need_no_executable_stack(installed: Path, program: str) -> None:
    (path,) = [*installed.glob(f"lib/python3*/site-packages/{program}"), *installed.glob(program)]
    assert os.access(path, os.X_OK)
    headers = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    assert "INTERP" not in headers and "DYNAMIC" not in headers
    (stack,) = (line for line in headers.splitlines() if "GNU_STACK" in line)
    assert "RW " in stack and "RWE" not in stack


def byte_code(launcher: Path) -> tuple[list[str], list[str]]:
    """(modules of ovt loaded from byte code, modules of ovt compiled from source) in a run of `--version`."""
    command = [SYSTEM_PYTHON, "-ISXutf8", "-v", launcher, "--version"]
    # PYTHONDONTWRITEBYTECODE is a habit of container images; here it must neither help nor harm.
    environment = {**BARE, "PYTHONDONTWRITEBYTECODE": "1"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd="/").stderr
    cached = re.findall(r"^# (\S+/ovt/\S+\.pyc) matches", told, re.MULTILINE)
    compiled = re.findall(r"^# code object from (\S+/ovt/\S+\.py)$", told, re.MULTILINE)
    return cached, compiled


def test_the_first_start_after_pip_uses_byte_code(installed: Path) -> None:
    cached, compiled = byte_code(installed / "bin/ovt-runtime.py")
    assert compiled == []
    assert any("/ovt/__pycache__/runtime." in name for name in cached)


def test_the_source_tree_uses_byte_code(runtime: Path) -> None:
    script = runtime.with_name("ovt-runtime.py")
    byte_code(script)  # a file may have been edited since scripts/setup; the first start then writes it
    assert byte_code(script)[1] == []


def version(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"ovt-runtime version \d", done.stdout)
    return str(done.stdout)


@pytest.mark.parametrize("environment", [{}, {"XDG_RUNTIME_DIR": "/run/user/0"}, {"LC_ALL": "tr_TR.ISO-8859-9"}])
def test_starts_from_anywhere_with_nothing(installed: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    launcher = installed / "bin/ovt-runtime"
    link = tmp_path / "ovt-runtime"
    link.symlink_to(os.path.relpath(launcher, tmp_path))
    second = tmp_path / "second"
    second.symlink_to("ovt-runtime")
    plain = version([str(launcher), "--version"], env=environment, cwd="/")
    assert version([str(link), "--version"], env=environment, cwd="/") == plain
    assert version([str(second), "--version"], env=environment, cwd="/proc/self") == plain
    assert version(["./ovt-runtime", "--version"], env=environment, cwd=launcher.parent) == plain
    assert version(["./second", "--version"], env=environment, cwd=tmp_path) == plain


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory full of modules that leave a mark when anything imports them."""
    place = tmp_path / "trap"
    place.mkdir()
    mark = f"open({str(tmp_path / 'caught')!r}, 'a').write(__name__ + ' ')\n"
    for name in ("ovt", "encodings"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text(mark)
    (place / "ovt/runtime.py").write_text(mark)
    names = ("os", "errno", "fcntl", "select", "_json", "_ctypes", "_socket", "json", "re", "typing", "site", "posix")
    for name in (*names, "sitecustomize", "usercustomize", "_struct", "_signal", "struct", "signal", "warnings"):
        (place / f"{name}.py").write_text(mark)
    return place


def test_nothing_of_the_caller_is_imported(installed: Path, trap: Path, tmp_path: Path) -> None:
    launcher = str(installed / "bin/ovt-runtime")
    hostile = {
        **BARE,
        "PYTHONPATH": str(trap),
        "PYTHONSTARTUP": str(trap / "os.py"),
        "PYTHONHOME": str(trap),
        "PYTHONUSERBASE": str(trap),
        "PYTHONINSPECT": "1",
        "PYTHONPLATLIBDIR": str(trap),
        "HOME": str(trap),
    }
    plain = version([launcher, "--version"], env=BARE, cwd="/")
    assert version([launcher, "--version"], env=hostile, cwd=trap) == plain
    # A link to the launcher in a hostile directory is the launcher still.
    (trap / "ovt-runtime").symlink_to(launcher)
    assert version(["./ovt-runtime", "--version"], env=hostile, cwd=trap) == plain
    assert not (tmp_path / "caught").exists()


def test_an_interpreter_without_isolation_is_left_at_once(installed: Path, trap: Path, tmp_path: Path) -> None:
    """`python3 ovt-runtime.py` would have the caller's paths; the launcher starts over with flags of its own."""
    launcher = installed / "bin/ovt-runtime.py"
    plain = version([str(launcher), "--version"], env=BARE, cwd="/")
    (trap / "sitecustomize.py").unlink()  # what Python itself loads before our first line is the caller's own doing
    (trap / "usercustomize.py").unlink()
    for name in ("os", "site", "posix", "errno", "re", "warnings"):
        (trap / f"{name}.py").unlink()
    subprocess.run(["rm", "-r", trap / "encodings"], check=True)
    environment = {**BARE, "PYTHONPATH": str(trap)}
    assert version([str(SYSTEM_PYTHON), str(launcher), "--version"], env=environment, cwd=trap) == plain
    assert not (tmp_path / "caught").exists()


def test_without_the_package_the_launcher_says_so(runtime: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    for part in (runtime, runtime.with_name("ovt-runtime.py")):
        shutil.copy(part, tmp_path / "bin")
    copy = tmp_path / "bin/ovt-runtime"
    done = subprocess.run([copy, "--version"], capture_output=True, text=True, env=BARE)
    assert done.returncode == 1
    assert done.stderr == f"ovt-runtime: no package ovt below {tmp_path}/lib; run scripts/setup or pip install\n"
