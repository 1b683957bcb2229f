"""The simulated network device: 256 VFs and all that can be set of them, the eswitch, channels and rings.

What the kernel does here is the ground on which this project's SR-IOV code stands: it is asked with bytes packed by
hand and with the distribution's own tools, not with that code. What needs a VF that is a PCI device is not tested here.
"""

import array
import errno
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab import netdevsim

pytestmark = pytest.mark.lab

VFS = 256
QUEUES = 4
BUS = Path("/sys/bus/netdevsim")

# linux/netlink.h, linux/rtnetlink.h
NLMSG_ERROR, NLMSG_DONE, RTM_NEWLINK, RTM_GETLINK, RTM_SETLINK = 2, 3, 16, 18, 19
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
RTEXT_FILTER_VF, RTEXT_FILTER_SKIP_STATS = 1, 8
# linux/if_link.h
IFLA_NUM_VF, IFLA_VFINFO_LIST, IFLA_EXT_MASK = 21, 22, 29
IFLA_VF_INFO = IFLA_VF_VLAN_INFO = 1
IFLA_VF_MAC, IFLA_VF_SPOOFCHK, IFLA_VF_LINK_STATE, IFLA_VF_RATE, IFLA_VF_RSS_QUERY_EN = 1, 4, 5, 6, 7
IFLA_VF_TRUST, IFLA_VF_VLAN_LIST = 9, 12
AUTO, ENABLE, DISABLE = range(3)
DOT1Q, DOT1AD = 0x8100, 0x88A8
# linux/sockios.h, linux/ethtool.h
SIOCETHTOOL = 0x8946
ETHTOOL_GRINGPARAM, ETHTOOL_SRINGPARAM, ETHTOOL_GCHANNELS, ETHTOOL_SCHANNELS = 0x10, 0x11, 0x3C, 0x3D

# Netlink -----------------------------------------------------------------------------------------------------------


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= 4:
        length, kind = struct.unpack_from("HH", data)
        if length < 4:
            return  # a list that was cut short is followed by its own rest
        yield kind & 0x3FFF, data[4:length]
        data = data[length + -length % 4 :]


def request(kind: int, flags: int, body: bytes) -> list[bytes]:
    """Send one message; the payloads of the replies. OSError if the kernel refuses."""
    replies: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(30)
        sock.send(struct.pack("IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body)
        while True:
            data = sock.recv(1 << 20)
            while data:
                length, reply = struct.unpack_from("IH", data)
                payload, data = data[16:length], data[length + -length % 4 :]
                if reply == NLMSG_DONE:
                    return replies
                if reply == NLMSG_ERROR:
                    (number,) = struct.unpack_from("i", payload)
                    if number:
                        raise OSError(-number, os.strerror(-number))
                    return replies
                replies.append(payload)
                if not flags:
                    return replies


@dataclass(frozen=True)
class Vf:
    """What can be set of a VF, with the values that netdevsim begins with."""

    mac: str = "00:00:00:00:00:00"
    vlan: int = 0
    qos: int = 0
    protocol: int = 0
    min_rate: int = 0
    max_rate: int = 0
    spoofchk: int = 0
    link_state: int = AUTO
    rss_query: int = 0
    trust: int = 0

    def pack(self, number: int) -> bytes:
        def pair(value: int) -> bytes:
            return struct.pack("II", number, value)

        tag = struct.pack("III", number, self.vlan, self.qos) + struct.pack(">H2x", self.protocol)
        return attribute(
            IFLA_VF_INFO,
            attribute(IFLA_VF_MAC, struct.pack("I32s", number, bytes.fromhex(self.mac.replace(":", ""))))
            + attribute(IFLA_VF_VLAN_LIST, attribute(IFLA_VF_VLAN_INFO, tag))
            + attribute(IFLA_VF_RATE, struct.pack("III", number, self.min_rate, self.max_rate))
            + attribute(IFLA_VF_SPOOFCHK, pair(self.spoofchk))
            + attribute(IFLA_VF_LINK_STATE, pair(self.link_state))
            + attribute(IFLA_VF_RSS_QUERY_EN, pair(self.rss_query))
            + attribute(IFLA_VF_TRUST, pair(self.trust)),
        )

    @classmethod
    def unpack(cls, data: bytes) -> "Vf":
        found = dict(attributes(data))
        _, vlan, qos = struct.unpack_from("III", dict(attributes(found[IFLA_VF_VLAN_LIST]))[IFLA_VF_VLAN_INFO])
        (protocol,) = struct.unpack_from(">H", dict(attributes(found[IFLA_VF_VLAN_LIST]))[IFLA_VF_VLAN_INFO], 12)
        _, min_rate, max_rate = struct.unpack("III", found[IFLA_VF_RATE])

        def second(kind: int) -> int:
            return int(struct.unpack("II", found[kind])[1])

        return cls(
            found[IFLA_VF_MAC][4:10].hex(":"),
            vlan,
            qos,
            protocol,
            min_rate,
            max_rate,
            second(IFLA_VF_SPOOFCHK),
            second(IFLA_VF_LINK_STATE),
            second(IFLA_VF_RSS_QUERY_EN),
            second(IFLA_VF_TRUST),
        )


# The device --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A simulated PF: `handle` is its name to devlink, `pf` its network device."""

    handle: str
    sysfs: Path
    pf: str

    def set_number(self, number: int) -> None:
        (self.sysfs / "sriov_numvfs").write_text(str(number))

    def information(self, mask: int) -> tuple[int, list[bytes]]:
        """How many VFs the kernel says there are, and those that it lists."""
        header = struct.pack("BBHiII", 0, 0, 0, socket.if_nametoindex(self.pf), 0, 0)
        (reply,) = request(RTM_GETLINK, 0, header + attribute(IFLA_EXT_MASK, struct.pack("I", mask)))
        return listed(reply)

    def vfs(self) -> list[Vf]:
        count, entries = self.information(RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS)
        assert len(entries) == count
        return [Vf.unpack(entry) for entry in entries]

    def set(self, vfs: dict[int, Vf]) -> None:
        """Set everything of many VFs with one message."""
        body = struct.pack("BBHiII", 0, 0, 0, socket.if_nametoindex(self.pf), 0, 0)
        listing = b"".join(vf.pack(number) for number, vf in vfs.items())
        request(RTM_SETLINK, NLM_F_ACK, body + attribute(IFLA_VFINFO_LIST, listing))

    def ethtool(self, command: int, *values: int) -> list[int]:
        """One of the ethtool requests that carry eight numbers."""
        numbers = array.array("I", [command, *values, *[0] * (8 - len(values))])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            address, _ = numbers.buffer_info()
            fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sQ16x", self.pf.encode(), address))
        return numbers[1:].tolist()


def listed(payload: bytes) -> tuple[int, list[bytes]]:
    count, entries = 0, None
    for kind, value in attributes(payload[16:]):
        if kind == IFLA_NUM_VF:
            (count,) = struct.unpack("I", value)
        elif kind == IFLA_VFINFO_LIST and entries is None:
            entries = [entry for inner, entry in attributes(value) if inner == IFLA_VF_INFO]
    return count, entries or []


@pytest.fixture
def device(modprobe: Callable[..., None]) -> Iterator[Device]:
    """A PF with 256 VFs and four queues, as new; nothing of it is left."""
    reason = netdevsim.why_missing(Path("/lib/modules") / os.uname().release)
    if reason:
        pytest.skip(f"netdevsim: {reason}")
    modprobe("netdevsim")
    before = set(os.listdir("/sys/class/net"))
    (BUS / "new_device").write_text(f"10 1 {QUEUES}")
    try:
        sysfs = BUS / "devices/netdevsim10"
        Path("/sys/kernel/debug/netdevsim/netdevsim10/max_vfs").write_text(str(VFS))
        (pf,) = os.listdir(sysfs / "net")
        made = Device("netdevsim/netdevsim10", sysfs, pf)
        made.set_number(VFS)
        yield made
    finally:
        (BUS / "del_device").write_text("10")
    assert set(os.listdir("/sys/class/net")) == before


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


# VFs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "changed", "words_back"),
    [
        ("mac 02:00:00:00:01:ff", {"mac": "02:00:00:00:01:ff"}, "mac 00:00:00:00:00:00"),
        ("vlan 4095 qos 7", {"vlan": 4095, "qos": 7, "protocol": DOT1Q}, "vlan 0"),
        ("vlan 100 proto 802.1ad", {"vlan": 100, "protocol": DOT1AD}, "vlan 0"),
        ("max_tx_rate 1000 min_tx_rate 100", {"max_rate": 1000, "min_rate": 100}, "max_tx_rate 0 min_tx_rate 0"),
        ("spoofchk on", {"spoofchk": 1}, "spoofchk off"),
        ("state enable", {"link_state": ENABLE}, "state auto"),
        ("state disable", {"link_state": DISABLE}, "state auto"),
        ("query_rss on", {"rss_query": 1}, "query_rss off"),
        ("trust on", {"trust": 1}, "trust off"),
    ],
)
def test_an_attribute_of_the_last_vf(device: Device, words: str, changed: dict[str, Any], words_back: str) -> None:
    run("ip", "link", "set", device.pf, "vf", str(VFS - 1), *words.split())
    assert device.vfs() == [Vf()] * (VFS - 1) + [replace(Vf(), **changed)]
    run("ip", "link", "set", device.pf, "vf", str(VFS - 1), *words_back.split())
    (last,) = device.vfs()[-1:]
    assert replace(last, protocol=0) == Vf()


def test_every_attribute_of_every_vf_with_one_message(device: Device) -> None:
    wanted = {
        number: Vf(
            mac=f"02:00:00:00:00:{number:02x}",
            vlan=1 + number,
            qos=number % 8,
            protocol=(DOT1Q, DOT1AD)[number % 2],
            min_rate=number,
            max_rate=1000 + number,
            spoofchk=number % 2,
            link_state=number % 3,
            rss_query=number // 2 % 2,
            trust=number // 4 % 2,
        )
        for number in range(VFS)
    }
    device.set(wanted)
    assert device.vfs() == list(wanted.values())
    device.set(dict.fromkeys(range(VFS), replace(Vf(), protocol=DOT1Q)))
    assert device.vfs() == [replace(Vf(), protocol=DOT1Q)] * VFS


def test_the_list_of_vfs_is_cut_short_where_statistics_are_asked_for(device: Device) -> None:
    """Its length has 16 bits and wraps silently. The number of VFs stays right, so that a reader can notice."""
    count, entries = device.information(RTEXT_FILTER_VF)
    assert count == VFS
    assert len(entries) < VFS // 2
    count, entries = device.information(RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS)
    assert (count, len(entries)) == (VFS, VFS)


def test_half_as_many_vfs_are_all_listed_with_statistics(device: Device) -> None:
    half = VFS // 2
    device.set_number(0)
    device.set_number(half)
    count, entries = device.information(RTEXT_FILTER_VF)
    assert (count, len(entries)) == (half, half)
    device.set({number: Vf(mac=f"02:00:00:00:00:{number:02x}", protocol=DOT1Q) for number in range(half)})
    (shown,) = json.loads(run("ip", "-json", "link", "show", device.pf))
    assert [vf["address"] for vf in shown["vfinfo_list"]] == [vf.mac for vf in device.vfs()]
    assert shown["vfinfo_list"][-1]["address"] == "02:00:00:00:00:7f"


def test_all_vfs_are_in_a_dump_of_all_links(device: Device) -> None:
    mask = struct.pack("I", RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS)
    replies = request(RTM_GETLINK, NLM_F_DUMP, bytes(16) + attribute(IFLA_EXT_MASK, mask))
    index = socket.if_nametoindex(device.pf)
    (reply,) = [reply for reply in replies if struct.unpack_from("i", reply, 4)[0] == index]
    count, entries = listed(reply)
    assert (count, len(entries)) == (VFS, VFS)


def test_what_precedes_a_refused_vf_stays(device: Device) -> None:
    """The kernel goes through the list, stops at the first error and takes nothing back."""
    with pytest.raises(OSError) as refused:
        device.set({0: Vf(vlan=5, protocol=DOT1Q), VFS: Vf(protocol=DOT1Q), 1: Vf(vlan=6, protocol=DOT1Q)})
    assert refused.value.errno == errno.EINVAL
    assert [vf.vlan for vf in device.vfs()[:2]] == [5, 0]


def test_the_number_of_vfs_changes_through_none_alone(device: Device) -> None:
    with pytest.raises(OSError) as refused:
        device.set_number(VFS // 2)
    assert refused.value.errno == errno.EBUSY
    device.set_number(VFS)
    device.set_number(0)
    assert device.vfs() == []
    device.set_number(1)
    assert len(device.vfs()) == 1


# The eswitch -------------------------------------------------------------------------------------------------------


def ports(device: Device) -> dict[str, str]:
    """The network devices of the PF and of its representors: what they say they are, and of which switch."""
    found = {}
    for path in (device.sysfs / "net").iterdir():
        found[(path / "phys_port_name").read_text().strip()] = (path / "phys_switch_id").read_text().strip()
    return found


def test_switchdev_mode_has_a_representor_of_every_vf(device: Device) -> None:
    if not shutil.which("devlink"):
        pytest.skip("needs devlink (Debian package iproute2)")
    run("devlink", "dev", "eswitch", "set", device.handle, "mode", "switchdev")
    (mode,) = json.loads(run("devlink", "-j", "dev", "eswitch", "show", device.handle))["dev"].values()
    assert mode["mode"] == "switchdev"
    found = ports(device)
    representors = {name for name in found if name.startswith("pf0vf")}
    assert representors == {f"pf0vf{number}" for number in range(VFS)}
    assert len(found) == 1 + VFS
    assert len(set(found.values())) == 1

    with pytest.raises(OSError) as refused:  # rates are set at the representors' ports in this mode
        device.set({0: replace(Vf(), protocol=DOT1Q, max_rate=1)})
    assert refused.value.errno == errno.EOPNOTSUPP

    run("devlink", "dev", "eswitch", "set", device.handle, "mode", "legacy")
    assert os.listdir(device.sysfs / "net") == [device.pf]
    device.set({0: replace(Vf(), protocol=DOT1Q, max_rate=1)})
    assert device.vfs()[0].max_rate == 1


def test_the_rate_of_a_representor_is_set_by_devlink(device: Device) -> None:
    if not shutil.which("devlink"):
        pytest.skip("needs devlink (Debian package iproute2)")
    device.set_number(0)
    device.set_number(2)
    run("devlink", "dev", "eswitch", "set", device.handle, "mode", "switchdev")
    found = json.loads(run("devlink", "-j", "port", "show"))["port"]
    (port,) = [handle for handle, port in found.items() if handle.startswith(device.handle) and port.get("vfnum") == 1]
    run("devlink", "port", "function", "rate", "set", port, "tx_share", "1mbit", "tx_max", "1gbit")
    (rate,) = json.loads(run("devlink", "-j", "port", "function", "rate", "show", port))["rate"].values()
    assert (rate["tx_share"], rate["tx_max"]) == (125_000, 125_000_000)  # bytes a second


# Queues ------------------------------------------------------------------------------------------------------------


def queues(device: Device) -> list[str]:
    return sorted(os.listdir(device.sysfs / "net" / device.pf / "queues"))


def test_channels(device: Device) -> None:
    assert device.ethtool(ETHTOOL_GCHANNELS) == [0, 0, 0, QUEUES, 0, 0, 0, QUEUES]
    device.ethtool(ETHTOOL_SCHANNELS, 0, 0, 0, 0, 0, 0, 0, 2)
    assert device.ethtool(ETHTOOL_GCHANNELS)[7] == 2
    assert queues(device) == ["rx-0", "rx-1", "tx-0", "tx-1"]
    for wrong in (0, QUEUES + 1):
        with pytest.raises(OSError) as refused:
            device.ethtool(ETHTOOL_SCHANNELS, 0, 0, 0, 0, 0, 0, 0, wrong)
        assert refused.value.errno == errno.EINVAL
    device.ethtool(ETHTOOL_SCHANNELS, 0, 0, 0, 0, 0, 0, 0, QUEUES)
    assert len(queues(device)) == 2 * QUEUES


def test_rings(device: Device) -> None:
    *most, _, _, _, _ = device.ethtool(ETHTOOL_GRINGPARAM)
    assert most == [4096] * 4
    device.ethtool(ETHTOOL_SRINGPARAM, *most, 1024, 0, 0, 512)
    assert device.ethtool(ETHTOOL_GRINGPARAM) == [*most, 1024, 0, 0, 512]
    with pytest.raises(OSError) as refused:
        device.ethtool(ETHTOOL_SRINGPARAM, *most, 4097, 0, 0, 512)
    assert refused.value.errno == errno.EINVAL
    assert device.ethtool(ETHTOOL_GRINGPARAM) == [*most, 1024, 0, 0, 512]
