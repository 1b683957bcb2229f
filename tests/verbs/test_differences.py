"""Where a machine differs from a container on purpose; everything else in this directory is the same for both."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.verbs.shared import Verbs

pytestmark = pytest.mark.root


class Difference(NamedTuple):
    """A command on `web`, what it answers for each kind (status, words in its output), and why."""

    words: tuple[str, ...]
    container: tuple[int, str]
    machine: tuple[int, str]
    reason: str


RUNNING = [
    Difference(("kill", "-s", "HUP", "web"), (0, "web"), (2, "a machine knows only KILL"),
               "signals are of processes; a machine has a power button and a plug"),
    Difference(("reset", "web"), (2, "it is a container"), (0, "web"), "a container has no reset button"),
    Difference(("save", "web"), (2, "it is a container"), (0, "web"), "the memory of a machine is one file"),
    Difference(("exec", "web", "sh", "-c", "uname -r | grep -c -- -amd64"), (1, "0"), (0, "1"),
               "a machine has a kernel of its own, the distribution's"),
    Difference(("exec", "web", "cat", "/proc/1/comm"), (0, "sh"), (0, "init"),
               "the first process of a machine is its init"),
]  # fmt: skip
STOPPED = [
    Difference(("cp", "web:/etc/passwd", "{tmp}/p"), (0, ""), (1, "reached through its agent"),
               "the disk of a machine is known to its own kernel alone"),
]  # fmt: skip


def check(ovt: Verbs, difference: Difference, tmp: Path) -> None:
    done = ovt(*(word.format(tmp=tmp) for word in difference.words), check=False)
    status, words = difference.machine if ovt.vm else difference.container
    assert done.returncode == status, difference.reason + done.stderr
    assert words in done.stdout + done.stderr, difference.reason


@pytest.mark.parametrize("difference", RUNNING, ids=lambda difference: "-".join(difference.words[:2]))
def test_of_running_ones(ovt: Verbs, difference: Difference, tmp_path: Path) -> None:
    ovt.start("trap '' HUP; echo started; while :; do sleep 0.1; done")
    check(ovt, difference, tmp_path)


@pytest.mark.parametrize("difference", STOPPED, ids=lambda difference: "-".join(difference.words[:1]))
def test_of_stopped_ones(ovt: Verbs, difference: Difference, tmp_path: Path) -> None:
    ovt.start()
    ovt("stop", "web")
    check(ovt, difference, tmp_path)


def test_a_first_process_that_kills_itself(ovt: Verbs) -> None:
    """The kernel spares the first process of a pid namespace; in a machine that is its init, not the program."""
    done = ovt("run", *ovt.flags, "--rm", "busybox", "sh", "-c", "kill -9 $$", check=False)
    assert done.returncode == (137 if ovt.vm else 0)


def test_a_shared_directory(ovt: Verbs, tmp_path: Path) -> None:
    """-v is a bind mount in a container and a 9p file system in a machine: both show and take files."""
    share = tmp_path / "share"
    share.mkdir()
    (share / "file").write_text("shared\n")
    share.chmod(0o777)
    script = "cat /s/file; grep ' /s ' /proc/mounts | cut -d ' ' -f 3; echo new > /s/new"
    text = ovt.out("run", *ovt.flags, "--rm", "-v", f"{share}:/s", "busybox", "sh", "-c", script)
    assert text.split()[0] == "shared"
    assert (text.split()[1] == "9p") == ovt.vm
    assert (share / "new").read_text() == "new\n"
