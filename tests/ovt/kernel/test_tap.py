"""Taps in a network namespace of the test's own."""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator

import pytest

from ovt.errors import Conflict, HostError, NotFound, UsageError
from ovt.kernel import syscalls, tap
from ovt.kernel.netlink import Netlink

pytestmark = pytest.mark.root

MAC = "fe:54:00:12:34:56"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    """The calling thread is in a new network namespace, so no device of the machine is touched."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        yield
    finally:
        syscalls.setns(home, syscalls.CLONE_NEWNET)
        os.close(home)


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


def names() -> list[str]:
    with Netlink() as netlink:
        return sorted(link.name for link in netlink.links())


def test_a_tap_lasts_as_long_as_its_descriptors() -> None:
    fds = tap.make("ovt-t", 3, mac=MAC, mtu=1400)
    link = tap.find("ovt-t")
    assert (link.kind, link.mtu, link.mac, link.up, link.multi_queue) == ("tun", 1400, MAC, True, True)
    assert [tap.name_of(fd) for fd in fds] == ["ovt-t"] * 3
    tap.close(fds[:2])
    assert "ovt-t" in names()
    tap.close(fds[2:])
    assert "ovt-t" not in names()


def test_one_queue_is_an_ordinary_tap() -> None:
    fds = tap.make("ovt-t", 1)
    assert not tap.find("ovt-t").multi_queue
    tap.close(fds)


def test_a_bridge_keeps_its_mtu_and_address() -> None:
    ip("link add br0 type bridge")
    ip("link add up0 type veth peer name up1")
    ip("link set up0 address 02:00:00:00:00:01 mtu 1600 master br0")
    bridge = tap.find("br0")
    assert (bridge.mtu, bridge.mac) == (1600, "02:00:00:00:00:01")
    fds = tap.make("ovt-t", 1, mac=MAC, mtu=bridge.mtu, bridge="br0")
    assert tap.find("ovt-t").master == bridge.index
    assert (tap.find("br0").mtu, tap.find("br0").mac) == (1600, "02:00:00:00:00:01")
    tap.close(fds)


def test_counters_are_of_the_host_s_side() -> None:
    fds = tap.make("ovt-t", 1)
    frame = bytes(10) + b"\xff" * 6 + bytes.fromhex("525400000001") + b"\x88\xb5" + bytes(46)
    os.write(fds[0], frame)
    assert tap.find("ovt-t").received == len(frame) - 10  # without the virtio header
    tap.close(fds)


def test_nothing_is_left_when_there_is_no_such_bridge() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotFound, match="no network device 'br9'"):
        tap.make("ovt-t", 2, bridge="br9")
    assert names() == ["lo"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_bridge_is_refused() -> None:
    ip("link add v0 type veth peer name v1")
    with pytest.raises(HostError, match="put tap ovt-t into v0"):
        tap.make("ovt-t", 1, bridge="v0")
    assert names() == ["lo", "v0", "v1"]


def test_a_name_that_is_taken() -> None:
    fds = tap.make("ovt-t", 1)
    with pytest.raises(Conflict, match="tap ovt-t is in use already"):
        tap.make("ovt-t", 1)
    assert names() == ["lo", "ovt-t"]
    tap.close(fds)


@pytest.mark.parametrize("name", ["", "a/b", "a" * 16, "a b"])
def test_what_cannot_be_a_name(name: str) -> None:
    with pytest.raises(UsageError, match="not a network device name"):
        tap.find(name)


def test_an_existing_tap_of_one_queue() -> None:
    ip("tuntap add dev pt0 mode tap")
    with pytest.raises(HostError, match="tap pt0 has one queue, and 2 are needed"):
        tap.attach("pt0", 2)
    fds = tap.attach("pt0", 1)
    with pytest.raises(Conflict, match="in use"):
        tap.attach("pt0", 1)
    tap.close(fds)
    assert "pt0" in names()


def test_an_existing_tap_of_many_queues_also_takes_one() -> None:
    ip("tuntap add dev pt0 mode tap multi_queue")
    for queues in (1, 4):
        fds = tap.attach("pt0", queues)
        assert len(fds) == queues
        flags = struct.unpack_from("16xH", fcntl.ioctl(fds[0], 0x800454D2, bytes(40)))[0]
        assert flags & 0x4000, "without virtio's header QEMU would have to do without offloads"
        tap.close(fds)


def test_what_is_no_tap() -> None:
    ip("link add br0 type bridge")
    with pytest.raises(UsageError, match="network device br0 is no tap but a bridge") as caught:
        tap.attach("br0", 1)
    assert caught.value.hint.startswith("bridge:br0")
    with pytest.raises(NotFound):
        tap.attach("nothing", 1)


def test_a_macvtap_needs_a_device_that_is_up() -> None:
    with pytest.raises(NotFound):
        tap.make_macvtap("nothing", MAC, 1)
    ip("link add v0 type veth peer name v1")
    with pytest.raises(HostError, match="network device v0 is down"):
        tap.make_macvtap("v0", MAC, 1)
