"""SR-IOV of a real driver, igb: what sysfs, netlink and VFIO say and refuse, with VFs that are PCI devices.

The kernel and the card are what is tested, as the ground for code that drives them; 256 VFs and every attribute are in
test_netdevsim.py, VFs in guests in test_nested.py.
"""

import array
import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Modprobe
from tests.lab.functions import functions

pytestmark = [pytest.mark.lab, pytest.mark.slow]

BUS = Path("/sys/bus/pci")
VFS = 3
# linux/sockios.h, linux/ethtool.h
SIOCETHTOOL = 0x8946
ETHTOOL_GRXRINGS, ETHTOOL_GRXFHINDIR, ETHTOOL_GCHANNELS, ETHTOOL_SCHANNELS = 0x2D, 0x38, 0x3C, 0x3D
# linux/vfio.h
VFIO_GET_API_VERSION, VFIO_CHECK_EXTENSION, VFIO_GROUP_GET_STATUS = 0x3B64, 0x3B65, 0x3B67
VFIO_TYPE1_IOMMU, VFIO_GROUP_FLAGS_VIABLE = 1, 1


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def refused(*words: str) -> str:
    """What `ip` says when the kernel refuses."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    assert done.returncode == 2, (words, done)
    return done.stderr.strip().removeprefix("RTNETLINK answers: ")


@dataclass(frozen=True)
class Card:
    """A PF, up and with a carrier; what a test asks of it."""

    path: Path

    @property
    def netdev(self) -> str:
        (name,) = os.listdir(self.path / "net")
        return name

    def read(self, name: str) -> str:
        return (self.path / name).read_text().strip()

    def write(self, name: str, value: object) -> None:
        (self.path / name).write_text(str(value))

    def refusal(self, name: str, value: object) -> int:
        """The errno that writing this attribute ends with."""
        with pytest.raises(OSError) as caught:
            self.write(name, value)
        assert caught.value.errno
        return caught.value.errno

    def vfs(self) -> list[Path]:
        links = sorted(self.path.glob("virtfn*"), key=lambda link: int(link.name.removeprefix("virtfn")))
        return [BUS / "devices" / os.path.basename(os.readlink(link)) for link in links]

    def attributes(self, vf: int) -> dict[str, Any]:
        """What the kernel reports of a VF over netlink."""
        return dict(json.loads(ip("-j", "link", "show", self.netdev))[0]["vfinfo_list"][vf])

    def change(self, vf: int, changes: str) -> None:
        """Set attributes of a VF, in the words of `ip link set PF vf N`."""
        ip("link", "set", self.netdev, "vf", str(vf), *changes.split())

    def wait_for_carrier(self) -> None:
        deadline = time.monotonic() + 30
        while self.read(f"net/{self.netdev}/carrier") != "1":
            assert time.monotonic() < deadline, f"{self.netdev} has no carrier"
            time.sleep(0.1)


@contextlib.contextmanager
def card_up(address: str) -> Iterator[Card]:
    card = Card(BUS / "devices" / address)
    was_up = int(card.read(f"net/{card.netdev}/flags"), 16) & 1
    ip("link", "set", card.netdev, "up")
    try:
        card.wait_for_carrier()
        yield card
    finally:
        if not was_up:
            ip("link", "set", card.netdev, "down")


@pytest.fixture(scope="module")
def igb(modprobe: Modprobe) -> Iterator[Card]:
    modprobe("igb", "igbvf", "vfio-pci")
    with card_up("0000:01:00.0") as card:
        yield card


@pytest.fixture(scope="module")
def other_igb(igb: Card) -> Iterator[Card]:
    with card_up("0000:02:00.0") as card:
        yield card


@pytest.fixture(scope="module")
def vfs(igb: Card) -> Iterator[list[Path]]:
    """VFs without a driver, for several tests: making and removing them takes seconds."""
    with functions(igb.path, VFS, autoprobe=False) as made:
        yield made
    assert not igb.vfs()


def driver(device: Path) -> str | None:
    return os.path.basename(os.readlink(device / "driver")) if (device / "driver").exists() else None


def iommu_group(device: Path) -> Path:
    return Path("/sys/kernel/iommu_groups") / os.path.basename(os.readlink(device / "iommu_group"))


def ethtool(netdev: str, words: list[int], size: int) -> list[int]:
    """The ethtool ioctl on a structure of `size` 32-bit words that begins with `words`; what the kernel made of it."""
    data = array.array("I", words + [0] * (size - len(words)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sQ16x", netdev.encode(), data.buffer_info()[0]))
    return data.tolist()


# The card without VFs --------------------------------------------------------------------------------------------


def test_what_the_card_can_do(igb: Card) -> None:
    names = ("sriov_totalvfs", "sriov_numvfs", "sriov_offset", "sriov_stride", "sriov_vf_device")
    assert [igb.read(name) for name in names] == ["7", "0", "128", "2", "10ca"]
    assert driver(igb.path) == "igb"


def test_more_than_all_is_out_of_range(igb: Card) -> None:
    assert igb.refusal("sriov_numvfs", 8) == errno.ERANGE
    assert igb.read("sriov_numvfs") == "0"


def test_channels_and_receive_side_scaling(igb: Card) -> None:
    def channels() -> dict[str, int]:
        words = ethtool(igb.netdev, [ETHTOOL_GCHANNELS], 9)
        return {"most": words[4], "other": words[7], "combined": words[8]}

    def indirection() -> list[int]:
        size = ethtool(igb.netdev, [ETHTOOL_GRXFHINDIR], 2)[1]
        return ethtool(igb.netdev, [ETHTOOL_GRXFHINDIR, size], 2 + size)[2:]

    assert channels() == {"most": 8, "other": 1, "combined": os.cpu_count()}
    assert indirection() == [0] * 64 + [1] * 64
    ethtool(igb.netdev, [ETHTOOL_SCHANNELS, 0, 0, 0, 0, 0, 0, 1, 1], 9)
    try:
        assert channels()["combined"] == 1
        assert set(indirection()) == {0}
        assert ethtool(igb.netdev, [ETHTOOL_GRXRINGS], 4)[2] == 1
        assert sorted(os.listdir(igb.path / "net" / igb.netdev / "queues")) == ["rx-0", "tx-0"]
    finally:
        ethtool(igb.netdev, [ETHTOOL_SCHANNELS, 0, 0, 0, 0, 0, 0, 1, 2], 9)
    assert channels()["combined"] == 2


def test_interrupts_are_remapped(igb: Card) -> None:
    kernel_log = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert "DMAR-IR: Enabled IRQ remapping" in kernel_log
    interrupts = Path("/proc/interrupts").read_text()
    assert re.search(rf"IR-PCI-MSIX-{igb.path.name}\s.*{igb.netdev}", interrupts)


# VFs without a driver ----------------------------------------------------------------------------------------------


def test_functions_without_autoprobe_have_no_driver(igb: Card, vfs: list[Path]) -> None:
    bus = igb.path.name.removesuffix("00.0")
    assert [vf.name for vf in vfs] == [f"{bus}10.{function}" for function in (0, 2, 4)]
    assert {(vf / "device").read_text() for vf in vfs} == {"0x10ca\n"}
    assert {os.path.basename(os.readlink(vf / "physfn")) for vf in vfs} == {igb.path.name}
    assert {driver(vf) for vf in vfs} == {None}
    # It is not only that nobody asks: the kernel does not let any driver have them.
    with pytest.raises(OSError) as caught:
        (BUS / "drivers/igbvf/bind").write_text(vfs[0].name)
    assert caught.value.errno == errno.ENODEV


def test_the_number_changes_only_through_none(igb: Card, vfs: list[Path]) -> None:
    assert igb.refusal("sriov_numvfs", VFS + 1) == errno.EBUSY
    assert igb.refusal("sriov_numvfs", VFS - 1) == errno.EBUSY
    assert igb.refusal("sriov_numvfs", 8) == errno.ERANGE
    igb.write("sriov_numvfs", VFS)  # which is what it has
    assert igb.vfs() == vfs


def test_every_function_is_an_iommu_group_of_its_own(igb: Card, vfs: list[Path]) -> None:
    for device in (igb.path, *vfs):
        assert os.listdir(iommu_group(device) / "devices") == [device.name]
    assert len({iommu_group(device) for device in (igb.path, *vfs)}) == 1 + VFS


def test_attributes_are_set_on_the_pf_and_read_back(igb: Card, vfs: list[Path]) -> None:
    igb.wait_for_carrier()  # the rate is a share of the link's speed
    untouched = igb.attributes(0)
    assert untouched["spoofchk"] is True
    assert untouched["trust"] is False
    igb.change(1, "mac 52:54:00:00:00:99 vlan 100 qos 3 spoofchk off trust on max_tx_rate 50")
    try:
        assert igb.attributes(1) == untouched | {
            "vf": 1,
            "address": "52:54:00:00:00:99",
            "vlan_list": [{"vlan": 100, "qos": 3}],
            "spoofchk": False,
            "trust": True,
            "tx_rate": 50,
            "rate": {"max_tx": 50, "min_tx": 0},
        }
        assert igb.attributes(0) == untouched
    finally:
        igb.change(1, "vlan 0 spoofchk on trust off max_tx_rate 0")
    assert igb.attributes(1) == untouched | {"vf": 1, "address": "52:54:00:00:00:99"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("vlan 100 proto 802.1ad", "Protocol not supported"),
        ("min_tx_rate 10", "Invalid argument"),
        ("state disable", "Operation not supported"),
        ("max_tx_rate 1001", "Invalid argument"),
    ],
)
def test_what_this_driver_cannot_do_it_refuses(igb: Card, vfs: list[Path], change: str, words: str) -> None:
    igb.wait_for_carrier()
    before = igb.attributes(2)
    assert refused("link", "set", igb.netdev, "vf", "2", *change.split()) == words
    assert igb.attributes(2) == before


def test_a_function_given_to_vfio(igb: Card, vfs: list[Path]) -> None:
    vf = vfs[2]
    group = Path("/dev/vfio") / iommu_group(vf).name
    assert not group.exists()
    (vf / "driver_override").write_text("vfio-pci")
    (BUS / "drivers_probe").write_text(vf.name)
    try:
        assert driver(vf) == "vfio-pci"
        assert group.is_char_device()
        with open("/dev/vfio/vfio", "r+b", buffering=0) as container, open(group, "r+b", buffering=0) as file:
            assert fcntl.ioctl(container, VFIO_GET_API_VERSION) == 0
            assert fcntl.ioctl(container, VFIO_CHECK_EXTENSION, VFIO_TYPE1_IOMMU) == 1
            status = bytearray(struct.pack("II", 8, 0))
            fcntl.ioctl(file, VFIO_GROUP_GET_STATUS, status)
            assert struct.unpack("II", status)[1] & VFIO_GROUP_FLAGS_VIABLE
            with pytest.raises(OSError) as caught:
                open(group, "r+b", buffering=0)
            assert caught.value.errno == errno.EBUSY  # one user at a time
    finally:
        (vf / "driver/unbind").write_text(vf.name)
        (vf / "driver_override").write_text("\n")
    assert not group.exists()
    assert driver(vf) is None


# VFs with their driver ---------------------------------------------------------------------------------------------


@pytest.fixture
def namespace() -> Iterator[str]:
    ip("netns", "add", "lab-sriov")
    yield "lab-sriov"
    ip("netns", "del", "lab-sriov")


def test_functions_with_autoprobe_are_network_devices(other_igb: Card, namespace: str) -> None:
    with functions(other_igb.path, 2, autoprobe=True) as vfs:
        assert [driver(vf) for vf in vfs] == ["igbvf", "igbvf"]
        names = [os.listdir(vf / "net")[0] for vf in vfs]
        assert len({*names, other_igb.netdev}) == 3
        # One of them leaves for a network namespace. It is a PCI device of the host all the same, and comes back.
        ip("link", "set", names[0], "netns", namespace)
        assert not (vfs[0] / "net").exists() or not os.listdir(vfs[0] / "net")
        assert not Path("/sys/class/net", names[0]).exists()
        (there,) = json.loads(ip("-n", namespace, "-d", "-j", "link", "show", names[0]))
        assert there["parentdev"] == vfs[0].name
        ip("-n", namespace, "link", "set", names[0], "netns", "1")
        assert os.listdir(vfs[0] / "net") == [names[0]]
    assert not Path("/sys/class/net", names[1]).exists()
