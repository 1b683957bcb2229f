"""What the attacks of this directory share: the host files they are after, hostile programs, container handles."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import BARE, ROOT, Oci

SOURCES = Path(__file__).parent
# What CVE-2019-5736 is about: the programs of the host that run on behalf of a container.
HOST_PROGRAMS = [
    Path("/usr/bin/python3").resolve(),
    ROOT / "ovt/_bin/ovt-init",
    ROOT / "ovt/_bin/ovt-supervisor",
    *sorted((ROOT / ".venv/bin").glob("ovt-runtime*")),
]


def fingerprint() -> dict[str, tuple[str, int]]:
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in HOST_PROGRAMS
    }


@pytest.fixture
def host_programs() -> Iterator[None]:
    """The programs of the host are the same after the test as before, to the byte."""
    before = fingerprint()
    yield
    assert fingerprint() == before


def compile_c(source: Path, target: Path, *flags: str) -> Path:
    subprocess.run(["cc", "-O1", "-o", target, source, *flags], check=True, timeout=60)
    return target


@pytest.fixture(scope="session")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """watch.c as a static program, to be copied into a root filesystem."""
    return compile_c(SOURCES / "watch.c", tmp_path_factory.mktemp("watch") / "watch", "-static")


class Container:
    """A container that was created; deleted by force when the test is over."""

    def __init__(self, oci: Oci, container_id: str) -> None:
        self.oci = oci
        self.id = container_id

    @property
    def pid(self) -> int:
        pid: int = json.loads(self.oci("state", self.id, check=True).stdout)["pid"]
        return pid

    def start(self) -> "Container":
        self.oci("start", self.id, check=True)
        return self

    def mounts(self) -> list[str]:
        """Mount points as the container sees them."""
        return [line.split()[4] for line in Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()]


Create = Callable[..., Container]


@pytest.fixture
def create(oci: Oci, container_id: str, tmp_path: Path) -> Iterator[Create]:
    """`create(bundle, "--flag", ...)`: create a container whose output goes to the file `<tmp_path>/<id>.out`."""
    made: list[Container] = []

    def make(bundle: Path, *flags: str, **options: Any) -> Container:
        container = Container(oci, f"{container_id}-{len(made)}")
        made.append(container)
        with open(tmp_path / f"{container.id}.out", "wb") as out:
            # not captured by pipes: the container inherits them, and their end would be waited for
            done = oci(
                "create", *flags, "-b", bundle, container.id,
                capture_output=False, stdout=out, stderr=subprocess.STDOUT, **options,
            )
        assert done.returncode == 0, (tmp_path / f"{container.id}.out").read_text()
        return container

    yield make
    for container in reversed(made):
        leaks.reap()  # a namespace's first process cannot end while another of its processes is a zombie of ours
        oci("delete", "--force", container.id, check=True)


def output(tmp_path: Path, container: Container) -> str:
    return (tmp_path / f"{container.id}.out").read_text()


def wait_for(condition: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def runs(oci: Oci, bundle: Path, container_id: str, **options: Any) -> str:
    """Run to the end and return what it printed; the exit status must be 0."""
    return oci("run", "-b", bundle, container_id, check=True, **options).stdout


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    """The one line with which the runtime refused."""
    assert done.returncode != 0, done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ovt-runtime: "), done.stderr
    assert "internal error" not in lines[0] and "Traceback" not in lines[0]
    return lines[0]


def naive_python(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run `code` in a plain interpreter: how a careless runtime would do it, to show that a trap is set."""
    return subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", code, *map(str, arguments)],
        env=BARE, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False,
    )


def nobody(path: Path) -> None:
    os.chown(path, 65534, 65534)
