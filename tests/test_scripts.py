"""The set-up on machines that lack something, with stand-ins for Debian's tools: what it calls and what it says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BARE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["scripts/setup", "scripts/test", "scripts/demo", "scripts/lab", ".ci/run"]

DPKG_QUERY = """#!/bin/sh
for package; do :; done
case " $LACKING " in *" $package "*) ;; *) printf installed ;; esac
"""
APT_GET = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in *update*) touch "$CALLS.updated"; exit "$UPDATE" ;; esac
[ -e "$CALLS.updated" ] && exit "$INSTALL"
exit 100
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The set-up script in a tree of its own, and stand-ins for dpkg-query, apt-get and sleep before the real ones."""
    place = tmp_path / "tree"
    shutil.copytree(ROOT / "scripts", place / "scripts")
    shutil.copy(ROOT / "pyproject.toml", place)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"dpkg-query": DPKG_QUERY, "apt-get": APT_GET, "sleep": "#!/bin/sh\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return place


def setup(tree: Path, *arguments: str, user: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    calls = tree.parent / "calls"
    base = {"LACKING": "", "CALLS": str(calls), "UPDATE": "0", "INSTALL": "0"}
    path = f"{tree.parent}/tools:{BARE['PATH']}"
    words = ["setpriv", f"--reuid={user}", "--clear-groups"] if user else []
    return subprocess.run(
        [*words, tree / "scripts/setup", *arguments],
        cwd="/", env={"PATH": path, **base, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def calls(tree: Path) -> list[str]:
    log = tree.parent / "calls"
    lines = log.read_text().splitlines() if log.exists() else []
    return [" ".join(w for w in line.split() if not w.startswith(("-q", "-o", "DPkg::", "Dpkg::"))) for line in lines]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_bash(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.root
def test_only_what_is_missing_is_installed(tree: Path) -> None:
    """Then it stops at pip, for which this tree has no network."""
    done = setup(tree, LACKING="uidmap gcc podman", PIP_NO_INDEX="1", PIP_CONFIG_FILE="/dev/null")
    install = "install -y --no-install-recommends gcc uidmap"
    assert calls(tree) == [install, "update", install]  # lists of packages are fetched only when they are too old
    assert done.returncode == 1
    assert "setup: pip could not install (see its message above): setuptools>=77 click>=8.1.7\n" in done.stderr
    assert "PIP_FIND_LINKS" in done.stderr


@pytest.mark.root
def test_without_a_network_apt_is_not_blamed_on_python(tree: Path) -> None:
    done = setup(tree, LACKING="uidmap", UPDATE="100", INSTALL="100")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "setup: apt-get could not install: uidmap (see its message above)",
        "  try: check the network and /etc/apt/sources.list, then: apt-get install --no-install-recommends uidmap",
    ]
    assert not (tree / ".venv").exists()


@pytest.mark.root
def test_without_root_it_says_what_root_must_do(tree: Path) -> None:
    for place in [tree, *tree.parents][:4]:
        place.chmod(0o755)  # pytest's directories are closed to others
    done = setup(tree, "--test", user="65534", LACKING="podman runc")
    assert calls(tree) == []
    assert done.returncode == 1
    assert done.stderr == (
        "setup: Debian packages are missing and this is not root: podman runc\n"
        "  try: sudo apt-get install --no-install-recommends podman runc\n"
    )


def test_an_unknown_word_is_a_usage_error(tree: Path) -> None:
    done = setup(tree, "--tset")
    assert (done.returncode, done.stderr) == (2, "usage: scripts/setup [--test]\n")
