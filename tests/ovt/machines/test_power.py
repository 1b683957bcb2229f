"""Screen, reset and sleep of machines that have nothing to boot: QEMU and its firmware are enough."""

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ovt.cli.place import Place

pytestmark = [pytest.mark.root, pytest.mark.qemu]
OPTIONS = ("--vm", "--disk", "new,size=1M", "--memory", "64M", "--network", "none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("power"))
    yield place
    place.nothing_left()


@pytest.fixture
def ovt(place: Place) -> Iterator[Place]:
    place("run", "-d", "--name", "screen", "--graphics", *OPTIONS, "none")
    place("create", "--name", "blind", *OPTIONS, "none")
    yield place
    place("delete", "--force", "screen", "blind")


def test_a_screen_is_shown_and_pictured(ovt: Place, tmp_path: Path) -> None:
    with subprocess.Popen([*ovt.words, "console", "--vnc", "screen"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            address = re.fullmatch(r"vnc://127\.0\.0\.1:(\d+)\n", server.stdout.readline())
            assert address
            for _ in range(2):  # one viewer after the other
                with socket.create_connection(("127.0.0.1", int(address[1])), 10) as viewer:
                    assert viewer.recv(12) == b"RFB 003.008\n"  # RFC 6143, 7.1.1
        finally:
            server.terminate()
    picture = tmp_path / "screen.png"
    ovt("screenshot", "screen", str(picture))
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["screen.png"]


def test_without_a_screen(ovt: Place, tmp_path: Path) -> None:
    ovt("start", "blind")
    for words in (("screenshot", "blind", str(tmp_path / "x.png")), ("console", "--vnc", "blind")):
        refused = ovt(*words, check=False)
        assert refused.returncode == 1
        assert "it has no screen" in refused.stderr and "--graphics" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_reset_and_its_event(ovt: Place) -> None:
    ovt("reset", "screen")
    ovt.wait_for(lambda: "vm-reset" in ovt.out("events"))
    assert ovt.status("screen") == "running"


def test_sleep_needs_uefi(ovt: Place) -> None:
    refused = ovt("suspend", "screen", check=False)
    assert refused.returncode == 1
    assert "UEFI" in refused.stderr and "ovt pause" in refused.stderr


def test_what_is_for_machines_alone(ovt: Place) -> None:
    ovt("create", "--name", "box", "busybox")
    try:
        for verb in ("reset", "suspend", "wake", "save"):
            refused = ovt(verb, "box", check=False)
            assert refused.returncode in {1, 2} and "it is a container" in refused.stderr
    finally:
        ovt("delete", "box")
