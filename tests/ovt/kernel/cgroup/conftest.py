"""What the cgroup tests share: a place in the real hierarchies, empty again afterwards, and processes to put in."""

import itertools
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovt.kernel import cgroup
from ovt.kernel.cgroup.base import remove_tree, signal_processes
from ovt.kernel.cgroup.hierarchy import current

serial = itertools.count(1)


_PROLOGUE = "import os, sys\nprint('up', flush=True)\nsys.stdin.readline()\n"


class Child:
    """A Python process that waits for a line on its standard input before it runs `code`."""

    def __init__(self, code: str, arguments: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROLOGUE + code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout and self.process.stdin
        assert self.process.stdout.readline() == "up\n"
        self.pid = self.process.pid

    def go(self, timeout: float = 30) -> str:
        """Let the code run to its end; what it printed."""
        return self.process.communicate("\n", timeout=timeout)[0]

    def start(self) -> None:
        """Let the code run and do not wait."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def line(self, timeout: float = 10) -> str:
        """The next line the code prints."""
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], timeout)[0], "the child printed nothing"
        return self.process.stdout.readline()

    def wait(self) -> int:
        """The exit status: negative for a signal."""
        return self.process.wait(timeout=10)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    """Make a Child; it is gone after the test."""
    made: list[Child] = []

    def make(code: str = "sys.stdin.readline()", *arguments: str) -> Child:
        made.append(Child(code, arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def place() -> Iterator[str]:
    """A cgroup path nobody else uses, for linux.cgroupsPath; all of it is gone after the test, in every hierarchy."""
    path = f"/ovt-test-{os.getpid()}-{next(serial)}"
    yield path
    found = current()
    for mount in {*found.v1.values(), found.unified}:
        directory = f"{mount}{path}"
        if mount and Path(directory).is_dir():
            freezers = list(Path(directory).rglob("freezer.state"))
            for file in freezers:
                file.write_text("THAWED")
            signal_processes(directory, 9)
            remove_tree(directory)


@pytest.fixture
def group(place: str) -> cgroup.Cgroup:
    """A created cgroup of this machine's hierarchies."""
    made = cgroup.new(place + "/box", "box", "cgroupfs")
    made.create()
    return made


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    """The address of a real message bus of the test's own."""
    if not shutil.which("dbus-daemon"):
        pytest.skip("needs dbus-daemon")
    config = tmp_path / "bus.conf"
    config.write_text(
        f"""<busconfig><type>session</type><listen>unix:path={tmp_path}/bus.socket</listen>
        <auth>EXTERNAL</auth><policy context="default"><allow send_destination="*"/><allow eavesdrop="true"/>
        <allow own="*"/></policy></busconfig>"""
    )
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address"], stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout
    address = daemon.stdout.readline().strip()
    yield address
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
