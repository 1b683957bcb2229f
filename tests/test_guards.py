"""The guards of tests/conftest.py, each shown a run that it must fail: a guard that never barks guards nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_tests(place: Path, source: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A pytest run of its own over `source`, under the guards."""
    (place / "test_inner.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", ROOT / "pyproject.toml"]
    base = {k: v for k, v in os.environ.items() if k not in ("CI", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS")}
    return subprocess.run(
        [*command, "--rootdir", place, "-p", "no:cacheprovider", f"--basetemp={place}/tmp", place],
        cwd=ROOT, capture_output=True, text=True, env={**base, **environment}, timeout=60,
    )  # fmt: skip


SKIPPING = "import pytest\ndef test_runs(): pass\n@pytest.mark.skip(reason='no moon')\ndef test_skips(): pass\n"


def test_an_unexplained_skip_fails_continuous_integration(tmp_path: Path) -> None:
    here = run_tests(tmp_path, SKIPPING)
    assert here.returncode == 0, here.stdout
    there = run_tests(tmp_path, SKIPPING, CI="true")
    assert there.returncode == 1
    assert "SKIPPED WITHOUT LEAVE test_inner.py::test_skips: " in there.stdout
    assert "no moon" in there.stdout


def test_a_module_that_skips_itself_is_seen_too(tmp_path: Path) -> None:
    source = "import pytest\npytest.importorskip('no_such_module_anywhere')\ndef test_a(): pass\n"
    (tmp_path / "test_other.py").write_text("def test_b(): pass\n")
    done = run_tests(tmp_path, source, CI="true")
    assert done.returncode == 1
    assert "SKIPPED WITHOUT LEAVE test_inner.py: " in done.stdout


def test_an_expected_failure_is_no_skip(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.xfail(reason='r')\ndef test_a(): assert 0\n"
    assert run_tests(tmp_path, source, CI="true").returncode == 0


def test_no_tests_at_all_is_a_failure(tmp_path: Path) -> None:
    assert run_tests(tmp_path, "").returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_every_line_of_the_skip_list_has_a_reason() -> None:
    lines = [line for line in (ROOT / "tests/skips.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not line.partition(" ")[2].strip()] == []


HEAD = "import os, subprocess, pytest\nfrom tests import leaks\npytestmark = pytest.mark.root\n"
LEAKS = {
    "process": "def test_a(): subprocess.run(['sh', '-c', 'sleep 300 >/dev/null 2>&1 &'], check=True)\n",
    "mount": "def test_a(tmp_path): subprocess.run(['mount', '-t', 'tmpfs', 'leak', tmp_path], check=True)\n",
    "descriptor": "def test_a(): os.open('/dev/null', 0)\n",
    "cgroup": "def test_a(): os.makedirs(f'{leaks.hierarchies()[0]}/{leaks.PREFIX}/left')\n",
}


@pytest.mark.root
@pytest.mark.parametrize("kind", LEAKS)
def test_what_is_left_behind_is_found(tmp_path: Path, kind: str) -> None:
    done = run_tests(tmp_path, HEAD + LEAKS[kind])
    assert done.returncode == 1
    assert "the test left behind:" in done.stdout
    (line,) = (x for x in done.stdout.splitlines() if x.startswith((f"E     {kind} ", f"  {kind} ")))
    if kind == "cgroup":
        assert not os.path.exists(line.split()[-1])  # cleared away when the run ends


@pytest.mark.root
def test_what_goes_away_by_itself_is_no_leak(tmp_path: Path) -> None:
    source = HEAD + "def test_a(): subprocess.run(['sh', '-c', 'sleep 0.3 >/dev/null 2>&1 &'], check=True)\n"
    done = run_tests(tmp_path, source)
    assert done.returncode == 0, done.stdout
