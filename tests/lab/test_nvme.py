"""SR-IOV of something that is no network card: an NVMe controller, whose VFs get their queues by administration.

The commands are those of the NVM Express Base Specification (Virtualization Management, Identify), sent by the ioctl
that every administration tool uses.
"""

import array
import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.conftest import Modprobe
from tests.lab.functions import functions

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PF = Path("/sys/bus/pci/devices/0000:03:00.0")
DRIVERS = Path("/sys/bus/pci")
# linux/nvme_ioctl.h; struct nvme_passthru_cmd
NVME_IOCTL_ADMIN_CMD, NVME_IOCTL_IO_CMD = 0xC0484E41, 0xC0484E43
COMMAND = struct.Struct("=BBHIIIQQIIIIIIIIII")
# NVM Express: opcodes, what to identify, actions and resources of Virtualization Management, status codes
READ, IDENTIFY, VIRTUALIZATION_MANAGEMENT = 0x02, 0x06, 0x1C
PRIMARY_CAPABILITIES, SECONDARY_CONTROLLERS = 0x14, 0x15
OFFLINE, ASSIGN, ONLINE = 7, 8, 9
QUEUES, INTERRUPTS = 0, 1
INVALID_NUMBER_OF_RESOURCES, INVALID_STATE = 0x121, 0x120


@dataclass(frozen=True)
class Resources:
    """What the primary controller can hand out of one kind: in all, handed out, at most to one secondary."""

    flexible: int
    assigned: int
    most: int


@dataclass(frozen=True)
class Secondary:
    """A VF as the primary controller sees it."""

    controller: int
    online: bool
    function: int
    queues: int
    interrupts: int


@dataclass(frozen=True)
class Controller:
    """A controller's character device."""

    fd: int

    def command(self, request: int, opcode: int, namespace: int, data: bytearray | None, *words: int) -> int:
        """Send one command; the status that it ends with, without the bit that says whether to try again."""
        buffer = array.array("B", data or b"")
        address = buffer.buffer_info()[0] if data else 0
        words = (*words, *(0,) * (6 - len(words)))
        packed = COMMAND.pack(opcode, 0, 0, namespace, 0, 0, 0, address, 0, len(buffer), *words, 0, 0)
        status = fcntl.ioctl(self.fd, request, bytearray(packed))
        if data:
            data[:] = buffer.tobytes()
        return int(status) & 0x7FF

    def identify(self, what: int) -> bytes:
        data = bytearray(mmap.PAGESIZE)
        assert self.command(NVME_IOCTL_ADMIN_CMD, IDENTIFY, 0, data, what) == 0
        return bytes(data)

    def resources(self, kind: int) -> Resources:
        data = self.identify(PRIMARY_CAPABILITIES)
        total, assigned, _, _, most, _ = struct.unpack_from("<IIHHHH", data, 32 + 32 * kind)
        return Resources(total, assigned, most)

    def secondaries(self) -> list[Secondary]:
        data = self.identify(SECONDARY_CONTROLLERS)
        entries = (struct.unpack_from("<HHB3xHHH", data, 32 * (1 + index)) for index in range(data[0]))
        return [Secondary(own, state == 1, function, vq, vi) for own, _, state, function, vq, vi in entries]

    def manage(self, secondary: int, action: int, kind: int = 0, number: int = 0) -> int:
        """Virtualization Management of a secondary controller; the status."""
        word = action | kind << 8 | secondary << 16
        return self.command(NVME_IOCTL_ADMIN_CMD, VIRTUALIZATION_MANAGEMENT, 0, None, word, number)


def only(directory: Path) -> str:
    (name,) = os.listdir(directory)
    return name


@pytest.fixture(scope="module")
def primary(modprobe: Modprobe) -> Iterator[Controller]:
    modprobe("nvme")
    wait_for_live(PF)
    fd = os.open(f"/dev/{only(PF / 'nvme')}", os.O_RDONLY | os.O_CLOEXEC)
    yield Controller(fd)
    os.close(fd)


def wait_for_live(function: Path) -> None:
    """Probing a controller goes on after the write, or the modprobe, that asked for it."""
    deadline = time.monotonic() + 30
    while [path.read_text() for path in function.glob("nvme/nvme*/state")] != ["live\n"]:
        assert time.monotonic() < deadline, f"{function.name} is not live"
        time.sleep(0.1)


@pytest.fixture
def vf(primary: Controller) -> Iterator[Path]:
    """VF 1, offline and without a driver; afterwards there is none, and what it was given is the primary's again."""
    try:
        with functions(PF, 1, autoprobe=False) as (made,):
            yield DRIVERS / "devices" / made.name
    finally:
        for kind in (QUEUES, INTERRUPTS):
            primary.manage(1, ASSIGN, kind, 0)


def test_four_functions_and_something_to_give_them(primary: Controller) -> None:
    assert (PF / "sriov_totalvfs").read_text() == "4\n"
    assert primary.secondaries() == [Secondary(number, False, number, 0, 0) for number in (1, 2, 3, 4)]
    for kind in (QUEUES, INTERRUPTS):
        assert primary.resources(kind) == Resources(flexible=8, assigned=0, most=2)


def test_a_function_is_online_once_it_has_queues(primary: Controller, vf: Path) -> None:
    assert not (vf / "driver").exists()
    assert primary.manage(1, ONLINE) == INVALID_STATE
    assert primary.manage(1, ASSIGN, QUEUES, 3) == INVALID_NUMBER_OF_RESOURCES
    assert primary.manage(1, ASSIGN, QUEUES, 2) == 0
    assert primary.manage(1, ASSIGN, INTERRUPTS, 2) == 0
    assert primary.manage(1, ONLINE) == 0
    assert primary.secondaries()[0] == Secondary(1, True, 1, queues=2, interrupts=2)
    assert primary.resources(QUEUES).assigned == 2
    assert primary.manage(1, OFFLINE) == 0
    assert not primary.secondaries()[0].online


def test_a_function_is_a_controller_of_the_same_namespace(primary: Controller, vf: Path) -> None:
    for kind in (QUEUES, INTERRUPTS):
        assert primary.manage(1, ASSIGN, kind, 2) == 0
    assert primary.manage(1, ONLINE) == 0
    (vf / "driver_override").write_text("nvme")
    (DRIVERS / "drivers_probe").write_text(vf.name)
    wait_for_live(vf)
    name = only(vf / "nvme")
    assert (vf / "nvme" / name / "cntlid").read_text() == "1\n"
    assert f"IR-PCI-MSIX-{vf.name}" in Path("/proc/interrupts").read_text()
    # What is written through the PF is read through the VF.
    sample = os.urandom(mmap.PAGESIZE)
    assert Path("/sys/block/nvme0n1/queue/logical_block_size").read_text() == "512\n"
    with mmap.mmap(-1, mmap.PAGESIZE) as page:  # O_DIRECT wants it aligned
        page.write(sample)
        disk = os.open("/dev/nvme0n1", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            assert os.pwrite(disk, page, 0) == mmap.PAGESIZE
        finally:
            os.close(disk)
    fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = bytearray(mmap.PAGESIZE)
        blocks = mmap.PAGESIZE // 512
        assert Controller(fd).command(NVME_IOCTL_IO_CMD, READ, 1, data, 0, 0, blocks - 1) == 0
    finally:
        os.close(fd)
    assert data == sample


def test_more_than_all_is_out_of_range(primary: Controller, vf: Path) -> None:
    for number, expected in ((5, errno.ERANGE), (2, errno.EBUSY)):
        with pytest.raises(OSError) as caught:
            (PF / "sriov_numvfs").write_text(str(number))
        assert caught.value.errno == expected
