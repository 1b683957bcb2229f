"""kill -9 of `ovt` while it works: what is left can be seen, and finished by `check --fix` and `delete --force`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ovt.cli.place import Place

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]

POINTS = 14


def killed_after(place: Place, seconds: float, *words: str) -> bool:
    """Start `ovt` and kill it; whether it was still at work then."""
    process = subprocess.Popen(
        [*place.words, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def duration(place: Place, *words: str) -> float:
    begin = time.monotonic()
    place(*words)
    return time.monotonic() - begin


def reap() -> None:
    """What a killed command leaves becomes a child of this test run, as it would become one of init."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def finish(place: Place) -> None:
    """What a person does after a crash."""
    deadline = time.monotonic() + 20
    while True:  # a supervisor may still be at work on the end of a guest whose maker was killed
        reap()
        done = place("check", "--fix", check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        left = place("check", check=False)
        if left.returncode == 0:
            break
        assert time.monotonic() < deadline, left.stdout
        time.sleep(0.1)
    ids = place.out("ps", "-aq").split()
    if ids:
        place("delete", "-f", *ids)
    reap()
    place.nothing_left()
    (place.run / "containers").mkdir(exist_ok=True)


def test_run(real_ovt: Place) -> None:
    whole = duration(real_ovt, "run", "-d", "--name", "first", "busybox", "sleep", "100")
    finish(real_ovt)
    at_work = 0
    for point in range(POINTS):
        at_work += killed_after(
            real_ovt, whole * point / POINTS, "run", "-d", "--name", "web", "busybox", "sleep", "100"
        )
        finish(real_ovt)
    assert at_work >= 3  # the others had done their work: how fast it goes depends on the machine


def test_start_leaves_an_instance_that_can_be_started(real_ovt: Place) -> None:
    real_ovt("create", "--name", "web", "busybox", "sleep", "100")
    whole = duration(real_ovt, "start", "web")
    real_ovt("stop", "-t", "0", "web")
    for point in range(POINTS):
        killed_after(real_ovt, whole * point / POINTS, "start", "web")
        reap()
        real_ovt.wait_for(lambda: real_ovt.status("web") != "creating")
        if real_ovt.status("web") != "running":
            real_ovt("start", "web")
        assert real_ovt.out("exec", "web", "echo", "alive") == "alive"
        real_ovt("stop", "-t", "0", "web")
    finish(real_ovt)


def test_delete(real_ovt: Place) -> None:
    real_ovt("run", "-d", "--name", "first", "busybox", "sleep", "100")
    whole = duration(real_ovt, "delete", "-f", "first")
    for point in range(POINTS):
        real_ovt("run", "-d", "--name", "web", "busybox", "sleep", "100")
        killed_after(real_ovt, whole * point / POINTS, "delete", "-f", "web")
        finish(real_ovt)


def test_a_killed_supervisor(real_ovt: Place) -> None:
    real_ovt("run", "-d", "--name", "web", "busybox", "sleep", "100")
    os.kill(int(real_ovt.out("inspect", "--format", "{{.supervisor_pid}}", "web")), signal.SIGKILL)
    real_ovt.wait_for(lambda: reap() or "supervisor" in real_ovt("check", check=False).stdout)
    assert real_ovt.out("exec", "web", "echo", "alive") == "alive"
    finish(real_ovt)


def test_a_killed_guest(real_ovt: Place) -> None:
    real_ovt("run", "-d", "--name", "web", "busybox", "sleep", "100")
    os.kill(int(real_ovt.out("inspect", "--format", "{{.pid}}", "web")), signal.SIGKILL)
    assert real_ovt.out("wait", "web") == "137"
    assert Path(real_ovt.home("web"), "exit.json").exists()
