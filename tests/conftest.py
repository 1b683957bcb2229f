"""What every test can ask for: the runtime, bundles to run with it, and the guards around the whole run.

Guards: a test marked `root` must leave no mount, cgroup, process or descriptor behind (tests/leaks.py), and in
continuous integration (CI=true) a skip that tests/skips.txt does not explain fails the run.
"""

import fnmatch
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.guests.fixtures import debian as debian
from tests.lab import INSIDE

ROOT = Path(__file__).resolve().parent.parent
SKIPS = Path(__file__).with_name("skips.txt")
NEEDS = {"podman": "podman", "containerd": "ctr", "qemu": "qemu-system-x86_64"}
# What podman leaves a runtime with: nothing that could help Python find anything.
BARE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

skipped_key = pytest.StashKey[dict[str, str]]()
serial = itertools.count(1)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[skipped_key] = {}
    os.environ.pop("PYTHONPATH", None)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    leaks.adopt_orphans()
    if not INSIDE:
        from tests.lab import plugin  # inside, under emulation, it would cost a second

        plugin.register(config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
    for marker, program in NEEDS.items():
        if item.get_closest_marker(marker) and not shutil.which(program):
            pytest.skip(f"needs {program}")


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The launcher of the OCI runtime as scripts/setup installed it."""
    path = ROOT / ".venv/bin/ovt-runtime"
    if not path.exists():
        pytest.fail(f"no {path}: run scripts/setup first")
    return path


@pytest.fixture
def run_root(tmp_path: Path) -> Path:
    """A state directory of the test's own, for `ovt-runtime --root`."""
    return tmp_path / "run"


@pytest.fixture
def container_id() -> str:
    """A container id that no other test has, and by which tests/leaks.py recognises what it left behind."""
    return f"{leaks.PREFIX}-{next(serial)}"


Oci = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def oci(runtime: Path, run_root: Path) -> Oci:
    """Call the runtime as podman does: `oci("run", "-b", bundle, id, check=True)`; output is captured as text."""

    def call(*arguments: object, check: bool = False, **options: Any) -> "subprocess.CompletedProcess[str]":
        options = {"env": BARE, "text": True, "capture_output": True, "timeout": 60, **options}
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run([runtime, "--root", run_root, *map(str, arguments)], **options)
        if check:
            assert done.returncode == 0, f"{arguments} → {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return call


def make_rootfs(target: Path) -> Path:
    """A root filesystem of busybox alone, every applet in /bin; no network is needed."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is not installed: run scripts/setup"
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var"):
        (target / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox, target / "bin/busybox")
    for applet in subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if applet != "busybox":
            (target / "bin" / applet).symlink_to("busybox")
    (target / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    (target / "etc/group").write_text("root:x:0:\nnogroup:x:65534:\n")
    return target


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it: objects are merged, everything else is replaced, None removes the key."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


@pytest.fixture(scope="session")
def default_config(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `ovt-runtime spec` writes, read once; use a copy."""
    place = tmp_path_factory.mktemp("spec")
    subprocess.run([runtime, "spec", "--bundle", place], env=BARE, check=True, stdin=subprocess.DEVNULL, timeout=30)
    config: dict[str, Any] = json.loads((place / "config.json").read_text())
    return config


Bundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path, default_config: dict[str, Any]) -> Bundle:
    """Make a bundle: `bundle("sh", "-c", "id", config={"linux": {...}}, edit=function) -> its directory`.

    The words are the process's arguments; `config` is merged over the default configuration (None removes a key) and
    `edit`, if given, gets the result to change in place. No terminal; a cgroup path of the test's own.
    """

    def make(
        *arguments: str, config: dict[str, Any] | None = None, edit: Callable[[dict[str, Any]], object] | None = None
    ) -> Path:
        number = next(serial)
        place = tmp_path / f"bundle-{number}"
        make_rootfs(place / "rootfs")
        ours = {
            "process": {"terminal": False, "args": list(arguments or ["true"])},
            "root": {"path": "rootfs"},
            "linux": {"cgroupsPath": f"/{leaks.PREFIX}/{number}"},
        }
        # Through JSON, so that no two bundles share a list of the default configuration.
        whole = json.loads(json.dumps(merge(merge(default_config, ours), config or {})))
        if edit:
            edit(whole)
        (place / "config.json").write_text(json.dumps(whole))
        return place

    return make


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if request.node.get_closest_marker("root") is None:
        yield
        return
    before = leaks.Snapshot(tmp_path_factory.getbasetemp())
    yield
    left = leaks.left_behind(before)
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


def pytest_unconfigure() -> None:
    leaks.remove_test_cgroups()


# Skips in continuous integration -------------------------------------------------------------------------------------


def explained(nodeid: str) -> bool:
    for line in SKIPS.read_text().splitlines():
        pattern, _, reason = line.partition(" ")
        if not line.startswith("#") and reason.strip() and fnmatch.fnmatch(nodeid, pattern):
            return True
    return False


def note_skip(config: pytest.Config, report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        config.stash[skipped_key][report.nodeid] = reason


class SkipWatch:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        note_skip(self.config, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        note_skip(self.config, report)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexplained() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for nodeid, reason in self.unexplained().items():
            terminalreporter.write_line(f"SKIPPED WITHOUT LEAVE {nodeid}: {reason}", red=True)
        if self.unexplained():
            terminalreporter.write_line("CI=true: make these tests run, or name the reason in tests/skips.txt")

    def unexplained(self) -> dict[str, str]:
        return {n: r for n, r in self.config.stash[skipped_key].items() if not explained(n)}


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("CI") == "true":
        session.config.pluginmanager.register(SkipWatch(session.config), "skip-watch")


def pytest_report_header() -> str:
    return f"ovt: {sys.executable}, uid {os.geteuid()}, CI={os.environ.get('CI', '')}"
