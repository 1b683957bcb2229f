"""Run in this order by tests/lab/test_lab.py: outcomes of every kind, a crash of the host, a hang of it."""

import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab


def test_passes() -> None:
    print("this goes unseen")


@pytest.mark.parametrize("word", ["a b", "ü"])
def test_fails(word: str) -> None:
    print("printed inside", word)
    assert os.uname().nodename == "elsewhere"


def test_skips() -> None:
    pytest.skip("no such thing")


@pytest.fixture
def dirty() -> object:
    yield
    raise RuntimeError("while cleaning up")


def test_tears_down_badly(dirty: object) -> None:
    pass


def test_crashes() -> None:
    Path("/dev/kmsg").write_text("<0>ovt: about to crash\n")
    Path("/proc/sysrq-trigger").write_text("c")


def test_after_the_crash() -> None:
    assert os.getpid() > 1


@pytest.mark.timeout(3)
def test_hangs() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # so that no timeout inside helps
    Path("/dev/kmsg").write_text("<0>ovt: about to hang\n")
    time.sleep(1000)


def test_after_the_hang() -> None:
    assert os.getpid() > 1
