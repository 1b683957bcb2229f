"""The rtnetlink client and the moving of devices, on veth pairs in namespaces of the tests' own."""

import os
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from ovt.errors import Conflict, HostError, NotFound
from ovt.kernel import netdevice, netlink, syscalls
from ovt.kernel.netlink import Netlink

root = pytest.mark.root


class Namespace:
    """A network namespace that lives as long as its descriptor."""

    def __init__(self) -> None:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            syscalls.setns(home, syscalls.CLONE_NEWNET)
        finally:
            os.close(home)

    def ip(self, *args: str) -> str:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        syscalls.setns(self.fd, syscalls.CLONE_NEWNET)
        try:
            return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout
        finally:
            syscalls.setns(home, syscalls.CLONE_NEWNET)
            os.close(home)

    def inside(self) -> "Inside":
        return Inside(self.fd)


class Inside:
    """The calling thread is in the namespace for the time of a `with`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> None:
        self.home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        syscalls.setns(self.fd, syscalls.CLONE_NEWNET)

    def __exit__(self, *_: object) -> None:
        syscalls.setns(self.home, syscalls.CLONE_NEWNET)
        os.close(self.home)


@pytest.fixture
def host() -> Iterator[Namespace]:
    """Stands for the host, so that no test touches the machine's own devices."""
    namespace = Namespace()
    namespace.ip("link", "add", "nic0", "address", "02:00:00:00:00:01", "type", "veth", "peer", "name", "wire0")
    with namespace.inside():
        yield namespace
    os.close(namespace.fd)


@pytest.fixture
def container() -> Iterator[Namespace]:
    namespace = Namespace()
    yield namespace
    os.close(namespace.fd)


# --- the client ---


@root
def test_links_as_the_kernel_has_them(host: Namespace) -> None:
    with Netlink() as client:
        assert {link.name for link in client.links()} >= {"lo", "nic0", "wire0"}
        nic = client.link("nic0")
        assert (nic.mac, nic.mtu, nic.kind, nic.parent, nic.up) == ("02:00:00:00:00:01", 1500, "veth", "", False)
        assert client.link_at(nic.index).name == "nic0"
        assert client.link("lo").flags & netlink.IFF_LOOPBACK
        assert client.find("nothere") is None
        with pytest.raises(OSError) as caught:
            client.link("nothere")
        assert caught.value.errno == 19


@root
def test_changes_of_a_link(host: Namespace) -> None:
    with Netlink() as client:
        index = client.link("nic0").index
        client.set_mtu(index, 1400)
        client.set_mac(index, "02:00:00:00:00:99")
        client.set_name(index, "nic9")
        client.set_up(index)
        nic = client.link("nic9")
        assert (nic.index, nic.mac, nic.mtu, nic.up) == (index, "02:00:00:00:00:99", 1400, True)
        client.set_down(index)
        assert not client.link("nic9").up


@root
def test_loopback_up(host: Namespace) -> None:
    assert "UP" not in host.ip("link", "show", "lo").split(">")[0]
    netlink.link_up("lo")
    assert "UP" in host.ip("link", "show", "lo").split(">")[0]


@root
def test_addresses_round_trip(host: Namespace) -> None:
    with Netlink() as client:
        index = client.link("nic0").index
        client.add_address(index, "192.0.2.1", 24, broadcast="192.0.2.255", priority=77)
        client.add_address(index, "192.0.2.9", 32, peer="192.0.2.10")
        client.add_address(index, "2001:db8::1", 64, flags=netlink.IFA_F_NODAD)
        client.set_up(index)
        host.ip("addr", "add", "169.254.7.7/16", "scope", "link", "dev", "nic0")
        host.ip("addr", "add", "2001:db8::2/64", "valid_lft", "1000", "preferred_lft", "1000", "dev", "nic0")
        found = {str(entry["address"]): entry for entry in client.addresses(index)}
        assert set(found) == {"192.0.2.1", "192.0.2.9", "2001:db8::1"}, "neither link scope nor limited lifetime"
        assert (found["192.0.2.1"]["prefix"], found["192.0.2.1"]["broadcast"]) == (24, "192.0.2.255")
        assert found["192.0.2.1"]["priority"] == 77
        assert found["192.0.2.9"]["peer"] == "192.0.2.10"
        assert int(found["2001:db8::1"]["flags"]) & netlink.IFA_F_NODAD
        with pytest.raises(OSError) as caught:
            client.add_address(index, "192.0.2.1", 24)
        assert caught.value.errno == 17


@root
def test_the_kernels_own_words_are_in_the_error(host: Namespace) -> None:
    with Netlink() as client, pytest.raises(OSError, match=r"\(.*mtu.*\)"):
        client.set_mtu(client.link("nic0").index, 10)


@root
def test_many_links_fit(host: Namespace) -> None:
    for number in range(60):
        host.ip("link", "add", f"many{number}", "type", "veth", "peer", "name", f"other{number}")
    with Netlink() as client:
        assert len([link for link in client.links() if link.name.startswith(("many", "other"))]) == 120


@pytest.mark.parametrize("name", ["", "x" * 16, "a/b", "a b", "a\0b", ".", "..", "a:b", "a\nb"])
def test_bad_names_never_reach_the_kernel(name: str) -> None:
    with pytest.raises(HostError, match="not a network device name"):
        netlink.interface_name(name)


@pytest.mark.parametrize("call", [
    lambda c: c.set_mtu(1, -1),
    lambda c: c.set_mtu(1, 1 << 40),
    lambda c: c.set_mac(1, "zz"),
    lambda c: c.set_mac(1, ""),
    lambda c: c.set_mac(1, "00" * 70000),
    lambda c: c.set_up(0),
    lambda c: c.link_at(1 << 40),
    lambda c: c.add_address(1, "192.0.2.300", 24),
    lambda c: c.add_address(1, "192.0.2.1", 33),
    lambda c: c.add_address(1, "192.0.2.1", 24, peer="::1"),
])  # fmt: skip
def test_bad_values_never_reach_the_kernel(call: Any) -> None:
    with Netlink() as client, pytest.raises(HostError):
        call(client)


class Liar:
    """In place of the socket: answers every request with `data`, from port `port`."""

    def __init__(self, data: bytes, port: int = 0, flags: int = 0) -> None:
        self.answers = [(data, port, flags)]

    def send(self, data: bytes) -> int:
        return len(data)

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        if not self.answers:
            raise BlockingIOError(11, "timed out")
        data, port, flags = self.answers.pop(0)
        return data, [], flags, (port, 0)

    def close(self) -> None:
        pass


def message(payload: bytes, kind: int = 16, length: int | None = None, flags: int = 0, sequence: int = 1) -> bytes:
    return struct.pack("IHHII", 16 + len(payload) if length is None else length, kind, flags, sequence, 0) + payload


IFINFO = struct.pack("BxHiII", 0, 0, 7, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(3),
        message(IFINFO)[:-3],
        message(IFINFO, length=0),
        message(IFINFO, length=15),
        message(IFINFO, length=0xFFFFFFFF),
        message(IFINFO[:8]),
        message(IFINFO + b"\x01"),
        message(IFINFO + struct.pack("HH", 0, 3)),
        message(IFINFO + struct.pack("HH", 3, 3)),
        message(IFINFO + struct.pack("HH", 400, 3)),
        message(IFINFO + struct.pack("HHH", 6, 4, 1)),
        message(b"\xff\xff", kind=2),
        message(IFINFO) + message(IFINFO),
        message(IFINFO, sequence=99),
    ],
)
def test_lying_replies_are_refused(data: bytes) -> None:
    client = Netlink()
    client._socket.close()
    client._socket = Liar(data)  # type: ignore[assignment]
    with pytest.raises(HostError) as caught:
        client.link("x")
    assert "\n" not in str(caught.value)


def test_only_the_kernel_is_believed() -> None:
    client = Netlink()
    client._socket.close()
    client._socket = Liar(message(IFINFO), port=1234)  # type: ignore[assignment]
    with pytest.raises(HostError, match="did not answer"):
        client.link("x")
    client._socket = Liar(message(IFINFO), flags=0x20)  # type: ignore[assignment]
    with pytest.raises(HostError, match="longer than the buffer"):
        client.link("x")


# --- devices of a container ---


@root
def test_a_device_moves_with_its_addresses_and_comes_back(host: Namespace, container: Namespace) -> None:
    host.ip("link", "set", "nic0", "mtu", "1450", "up")
    host.ip("addr", "add", "192.0.2.1/24", "dev", "nic0")
    host.ip("addr", "add", "2001:db8::1/64", "nodad", "dev", "nic0")
    record = netdevice.move_device("nic0", container.fd, "eth0")
    with Netlink(container.fd) as there, Netlink() as here:
        moved = there.link("eth0")
        assert moved.up and moved.mtu == 1450 and moved.mac == "02:00:00:00:00:01"
        assert {entry["address"] for entry in there.addresses(moved.index)} == {"192.0.2.1", "2001:db8::1"}
        assert here.find("nic0") is None and here.find("eth0") is None
        there.set_down(moved.index)
        there.set_mtu(moved.index, 1300)
        there.set_mac(moved.index, "02:00:00:00:00:66")
        there.set_name(moved.index, "hidden")
    assert netdevice.restore_device(record, container.fd)
    with Netlink() as here:
        nic = here.link("nic0")
        assert (nic.mtu, nic.mac, nic.up) == (1450, "02:00:00:00:00:01", False)


@root
def test_the_record_is_there_before_the_device_leaves(host: Namespace, container: Namespace) -> None:
    announced = []

    def announce(record: dict[str, Any]) -> None:
        with Netlink() as here:
            announced.append((here.find("nic0") is not None, dict(record)))

    record = netdevice.move_device("nic0", container.fd, "eth%d", announce)
    ((present, early),) = announced
    assert present
    assert record["newName"] == "eth0"
    assert netdevice.restore_device(early, container.fd), "what was announced is enough to take it back"


@root
def test_a_device_that_never_left_is_left_alone(host: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    host.ip("link", "set", "nic0", "up")
    with Netlink() as here:
        nic = here.link("nic0")
    record = {"name": "nic0", "mtu": nic.mtu, "mac": nic.mac, "parent": "pci/0000:01:00.0", "kind": "veth"}
    monkeypatch.setattr(netdevice, "_recognise", lambda links, record: nic)
    assert netdevice.restore_device(record, -1)
    with Netlink() as here:
        assert here.link("nic0").up


@root
def test_the_name_is_kept_without_a_new_one(host: Namespace, container: Namespace) -> None:
    assert netdevice.move_device("nic0", container.fd)["newName"] == "nic0"
    with Netlink(container.fd) as there:
        assert there.link("nic0").up


@root
def test_a_taken_name_is_refused_before_anything_moves(host: Namespace, container: Namespace) -> None:
    container.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    host.ip("link", "set", "nic0", "up")
    host.ip("addr", "add", "192.0.2.1/24", "dev", "nic0")
    with pytest.raises(Conflict, match="already has a network device eth0"):
        netdevice.move_device("nic0", container.fd, "eth0")
    with Netlink() as here:
        assert here.link("nic0").up
        assert here.addresses(here.link("nic0").index)
    assert netdevice.move_device("nic0", container.fd, "eth%d")["newName"] == "eth2"


@root
def test_a_name_taken_in_the_last_moment_brings_the_device_back(
    host: Namespace, container: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.ip("link", "set", "nic0", "up")
    host.ip("addr", "add", "192.0.2.1/24", "dev", "nic0")
    container.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    monkeypatch.setattr(netdevice, "_free_name", lambda there, template: template)
    with pytest.raises(HostError, match="cannot move nic0"):
        netdevice.move_device("nic0", container.fd, "eth0")
    with Netlink() as here:
        nic = here.link("nic0")
        assert nic.up
        assert [entry["address"] for entry in here.addresses(nic.index)] == ["192.0.2.1"]


@root
def test_a_failure_inside_the_container_brings_the_device_back(
    host: Namespace, container: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.ip("link", "set", "nic0", "up")
    host.ip("addr", "add", "192.0.2.1/24", "dev", "nic0")

    def refuse(self: Netlink, index: int) -> None:
        monkeypatch.undo()
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Netlink, "set_up", refuse)
    with pytest.raises(HostError, match="cannot configure nic0 as eth0"):
        netdevice.move_device("nic0", container.fd, "eth0")
    with Netlink() as here:
        assert here.link("nic0").up
        assert here.addresses(here.link("nic0").index)
    with Netlink(container.fd) as there:
        assert there.find("eth0") is None


@root
def test_what_cannot_be_given_away(host: Namespace, container: Namespace) -> None:
    with pytest.raises(NotFound):
        netdevice.move_device("nic7", container.fd)
    with pytest.raises(HostError, match="loopback"):
        netdevice.move_device("lo", container.fd)
    with pytest.raises(HostError, match="shares the runtime's network namespace"):
        netdevice.move_device("nic0", host.fd)
    with pytest.raises(HostError, match="not a network device name"):
        netdevice.move_device("nic0", container.fd, "x" * 40)
    with pytest.raises(HostError, match="only one"):
        netdevice.move_device("nic0", container.fd, "%d%d")


@root
def test_a_taken_old_name_is_told(host: Namespace, container: Namespace) -> None:
    record = netdevice.move_device("nic0", container.fd, "eth0")
    host.ip("link", "add", "nic0", "type", "veth", "peer", "name", "wire1")
    with pytest.raises(Conflict, match="another device has it now"):
        netdevice.restore_device(record, container.fd)
    with Netlink(container.fd) as there:
        assert there.find("eth0") is not None


@root
def test_virtual_devices_end_with_their_namespace(host: Namespace) -> None:
    gone = Namespace()
    record = netdevice.move_device("nic0", gone.fd, "eth0")
    os.close(gone.fd)
    assert netdevice.restore_device(record, -1) is False


@root
def test_another_device_under_the_containers_name_is_not_taken(host: Namespace, container: Namespace) -> None:
    record = netdevice.move_device("nic0", container.fd, "eth0")
    container.ip("link", "del", "eth0")
    container.ip("link", "add", "eth0", "index", str(record["index"] + 50), "type", "veth", "peer", "name", "eth1")
    assert netdevice.restore_device(record, container.fd) is False
    with Netlink(container.fd) as there:
        assert there.find("eth0") is not None


@root
def test_hardware_that_the_kernel_returned_is_found_by_what_it_is(
    host: Namespace, container: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A veth plays the physical NIC: its hardware identity is laid over what the kernel reports."""
    listed = Netlink.links

    def with_hardware(self: Netlink) -> list[netlink.Link]:
        links = listed(self)
        for link in links:
            if link.kind == "veth" and link.mac.startswith("02:00:00:00:00:0"):
                link.kind, link.parent, link.permanent_mac = "", "pci/0000:03:10.2", "02:00:00:00:00:01"
        return links

    record = netdevice.move_device("nic0", container.fd, "eth0")
    record.update(kind="", parent="pci/0000:03:10.2", permanentMac="02:00:00:00:00:01")
    monkeypatch.setattr(Netlink, "links", with_hardware)
    with Netlink(container.fd) as there:
        index = there.link("eth0").index
        there.set_mac(index, "02:00:00:00:00:07")
        there.set_mtu(index, 1300)
        there.move(index, host.fd, "dev5")  # as the kernel does when the namespace ends
    assert netdevice.restore_device(record, -1)
    with Netlink() as here:
        nic = here.link("nic0")
        assert (nic.mac, nic.mtu) == ("02:00:00:00:00:01", 1500)
        assert here.find("dev5") is None
