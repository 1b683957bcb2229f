"""Two lab hosts: commands run in the second from a test in the first, and frames go over the wire between them."""

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from tests.lab.channel import TimedOut
from tests.lab.conftest import Modprobe
from tests.lab.second import SecondHost

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]
WIRED = "0000:02:00.0"  # the igb card whose other end is the second host
FIND = f"basename $(echo /sys/bus/pci/devices/{WIRED}/net/*)"


RECEIVE = """
import hashlib, socket
digest = hashlib.sha256()
with socket.create_connection(("198.51.100.1", 7000), 60) as stream:
    while data := stream.recv(65536):
        digest.update(data)
print(digest.hexdigest())
"""


def send(server: socket.socket, data: bytes) -> None:
    with server.accept()[0] as stream:
        stream.sendall(data)


def here(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture(scope="module")
def wire(modprobe: Modprobe, second_host: SecondHost) -> Iterator[tuple[str, str]]:
    """The names of the wired network cards, here and there, both up with 198.51.100.1 and .2."""
    modprobe("igb")
    second_host("modprobe", "igb")
    names = here("sh", "-c", FIND).strip(), second_host("sh", "-c", FIND).stdout.strip()
    for address, name, run in (("1", names[0], here), ("2", names[1], second_host)):
        run("ip", "address", "add", f"198.51.100.{address}/24", "dev", name)
        run("ip", "link", "set", name, "up")
    yield names
    for name, run in ((names[0], here), (names[1], second_host)):
        run("ip", "address", "flush", "dev", name)
        run("ip", "link", "set", name, "down")


def test_the_second_host_is_another_one_with_the_same_kernel(second_host: SecondHost) -> None:
    assert second_host("uname", "-n").stdout == "lab2\n"
    assert here("uname", "-n") == "lab1\n"
    assert second_host("uname", "-r").stdout == here("uname", "-r")
    boot_id = "/proc/sys/kernel/random/boot_id"
    assert second_host("cat", boot_id).stdout != here("cat", boot_id)


def test_status_and_errors_of_a_command_there(second_host: SecondHost) -> None:
    done = second_host("sh", "-c", "echo out; echo err >&2; exit 3", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(AssertionError, match="no-such-program"):
        second_host("no-such-program")


def test_files_written_there_stay_there(second_host: SecondHost) -> None:
    second_host("sh", "-c", "echo text > /etc/only-there")
    assert not Path("/etc/only-there").exists()


def test_frames_go_over_the_wire_both_ways(wire: tuple[str, str], second_host: SecondHost) -> None:
    assert ", 0% packet loss" in here("busybox", "ping", "-c", "3", "-W", "10", "198.51.100.2")
    assert ", 0% packet loss" in second_host("busybox", "ping", "-c", "3", "-W", "10", "198.51.100.1").stdout
    neighbour = here("ip", "neighbour", "show", "198.51.100.2")
    assert second_host("cat", f"/sys/class/net/{wire[1]}/address").stdout.strip() in neighbour


def test_a_stream_arrives_whole(wire: tuple[str, str], second_host: SecondHost) -> None:
    """Two megabytes by TCP, in segments that the cards may cut and join."""
    data = Path("/proc/self/exe").read_bytes()[: 2 << 20]
    with socket.create_server(("198.51.100.1", 7000)) as server:
        server.settimeout(60)
        sender = Thread(target=lambda: send(server, data))
        sender.start()
        there = second_host("/usr/bin/python3", "-ISc", RECEIVE)
        sender.join()
    assert there.stdout.strip() == hashlib.sha256(data).hexdigest()


def test_a_command_that_does_not_end_is_given_up(second_host: SecondHost) -> None:
    with pytest.raises(TimedOut, match="no end after 1 s"):
        second_host("sleep", "5", timeout=1)
    assert second_host("echo", "still there").stdout == "still there\n"
