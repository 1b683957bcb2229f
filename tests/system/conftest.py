"""Fixtures of the tests with real podman and real containerd: private installations on one chosen runtime.

OVT_TEST_RUNTIME names the runtime to test instead of .venv/bin/ovt-runtime; the same tests must pass with runc, except
for what runc cannot do (fixture `is_ovt`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.system import busybox_image, leaks
from tests.system.containerd_host import ContainerdHost
from tests.system.podman_host import PodmanHost

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534


def missing(*programs: str) -> str:
    """Say why these tests cannot run here, or return an empty string."""
    if os.geteuid() != 0:
        return "needs root: containers are made without a user namespace here"
    if not busybox_image.BUSYBOX.exists():
        return f"{busybox_image.BUSYBOX} is missing: apt-get install busybox-static"
    absent = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The OCI runtime under test."""
    path = Path(os.environ.get("OVT_TEST_RUNTIME", REPOSITORY / ".venv/bin/ovt-runtime"))
    assert os.access(path, os.X_OK), f"{path} is not there: scripts/setup makes it"
    return path


@pytest.fixture(scope="session")
def is_ovt(runtime: Path) -> bool:
    """Whether the runtime under test is ovt's own, which can do more than runc."""
    return runtime.name == "ovt-runtime"


@pytest.fixture(scope="session")
def podman_installation(runtime: Path) -> Iterator[PodmanHost]:
    """The session's podman, with the busybox image imported."""
    if why := missing("podman", "conmon"):
        pytest.skip(why)
    host = PodmanHost(runtime)
    yield host
    host.close()


@pytest.fixture
def podman(podman_installation: PodmanHost) -> Iterator[PodmanHost]:
    """The session's podman; after the test all its containers are removed and nothing of them may be left."""
    yield from watched(podman_installation)


@pytest.fixture(scope="session")
def rootless_installation(runtime: Path) -> Iterator[PodmanHost]:
    """The session's podman of the user nobody, with the busybox image imported."""
    if why := missing("podman", "conmon", "setpriv"):
        pytest.skip(why)
    host = PodmanHost(runtime, uid=NOBODY)
    yield host
    host.close()


@pytest.fixture
def rootless(rootless_installation: PodmanHost) -> Iterator[PodmanHost]:
    """The rootless podman; after the test all its containers are removed and nothing of them may be left."""
    yield from watched(rootless_installation)


def watched(host: PodmanHost) -> Iterator[PodmanHost]:
    """Hand out `host`, then clean up and look for leaks."""
    host.calls.clear()
    before = len(host.created())
    yield host
    host.remove_all()
    ids = host.created()[before:]
    left = leaks.until_none(lambda: host.leaks_of(ids))
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture(scope="session")
def containerd_installation(runtime: Path) -> Iterator[ContainerdHost]:
    """The session's containerd daemon, with the busybox image imported."""
    if why := missing("containerd", "ctr", "containerd-shim-runc-v2"):
        pytest.skip(why)
    host = ContainerdHost(runtime)
    yield host
    host.close()


@pytest.fixture
def containerd(containerd_installation: ContainerdHost) -> Iterator[ContainerdHost]:
    """The session's containerd; after the test all its containers are removed and nothing of them may be left."""
    host = containerd_installation
    host.calls.clear()
    host.ids.clear()
    yield host
    ids = list(host.ids)
    host.remove_all()
    left = leaks.until_none(lambda: host.leaks_of(ids))
    assert not left, "left behind: " + "; ".join(left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add every call of a failed test and what the runtime logged to its report."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for name in ("podman", "rootless", "containerd"):
            host = item.funcargs.get(name)
            if isinstance(host, PodmanHost | ContainerdHost):
                report.sections.append((f"{name} calls", "\n".join(host.calls)))
                report.sections.append((f"{name} runtime log", host.runtime_log()))
    return report
