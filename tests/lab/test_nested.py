"""Guests inside the lab host: KVM is there, a Linux boots on it, and a VF passed through VFIO works in that Linux."""

import contextlib
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import guest
from tests.lab.conftest import Modprobe
from tests.lab.functions import functions

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(180)]

PF = Path("/sys/bus/pci/devices/0000:01:00.0")  # on QEMU's user network, where 10.0.2.2 answers a ping
MAC = "52:54:00:00:10:ca"
KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CREATE_VCPU = 0xAE00, 0xAE01, 0xAE41


@pytest.fixture(scope="module")
def kvm(modprobe: Modprobe) -> None:
    modprobe("kvm_amd" if "svm" in processor_flags() else "kvm_intel")


def processor_flags() -> list[str]:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return flags.split()


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def virtual_function() -> Iterator[Path]:
    """One VF of the igb that has an administrative MAC and no driver; afterwards the card is as it was."""
    (netdev,) = os.listdir(PF / "net")
    was_up = "UP" in json.loads(ip("-j", "link", "show", netdev))[0]["flags"]
    ip("link", "set", netdev, "up")
    try:
        with functions(PF, 1, autoprobe=False) as (made,):
            ip("link", "set", netdev, "vf", "0", "mac", MAC)
            yield made
    finally:
        if not was_up:
            ip("link", "set", netdev, "down")


def give(vf: Path, driver: str) -> None:
    """Bind a VF to this driver and no other, as driver_override has it."""
    if (vf / "driver").exists():
        (vf / "driver/unbind").write_text(vf.name)
    (vf / "driver_override").write_text(driver)
    Path("/sys/bus/pci/drivers_probe").write_text(vf.name)
    assert os.path.basename(os.readlink(vf / "driver")) == driver


def test_kvm_is_backed_by_the_processor(kvm: None) -> None:
    assert {"svm", "vmx"} & set(processor_flags())
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(device, KVM_GET_API_VERSION) == 12
        machine = fcntl.ioctl(device, KVM_CREATE_VM, 0)
        try:
            os.close(fcntl.ioctl(machine, KVM_CREATE_VCPU, 0))
        finally:
            os.close(machine)
    finally:
        os.close(device)


def test_a_linux_guest_boots_on_kvm(kvm: None) -> None:
    said = guest.boot("uname -sr; busybox dmesg | grep Hypervisor; cat /sys/bus/pci/devices/*/device")
    assert f"Linux {os.uname().release}\n" in said
    assert "Hypervisor detected: KVM" in said
    assert "0x10ca" not in said


def test_a_guest_that_fails_shows_its_console(kvm: None) -> None:
    with pytest.raises(guest.GuestFailed, match=r"(?s)QEMU ended with status 0.*Kernel panic.*sysrq triggered crash"):
        guest.boot("echo c > /proc/sysrq-trigger")


def test_a_virtual_function_works_in_a_guest(kvm: None, modprobe: Modprobe) -> None:
    modprobe("igb", "vfio-pci", "igbvf")
    script = """
        for device in /sys/bus/pci/devices/*; do
            echo "pci $(cat $device/vendor) $(cat $device/device) $(ls $device/net 2>/dev/null)"
        done
        echo "mac $(cat /sys/class/net/eth0/address)"
        ifconfig eth0 10.0.2.77 up
        busybox ping -c 5 -W 2 10.0.2.2
        grep eth0 /proc/interrupts
    """
    with virtual_function() as vf:
        group = Path("/dev/vfio") / os.path.basename(os.readlink(vf / "iommu_group"))
        give(vf, "vfio-pci")
        assert group.is_char_device()
        said = guest.boot(script, devices=[f"vfio-pci,host={vf.name}"], modules=["igbvf"])
        assert "pci 0x8086 0x10ca eth0\n" in said
        assert f"mac {MAC}\n" in said
        # An answer takes DMA both ways through the IOMMU, into the memory of a guest.
        assert "64 bytes from 10.0.2.2" in said
        assert re.search(r"[1-9]\d* +PCI-MSIX-\S+ +\S+ +eth0-rx-0", said), said
        # The host gets it back, with the MAC that was set on the PF.
        give(vf, "igbvf")
        (netdev,) = os.listdir(vf / "net")
        assert (vf / "net" / netdev / "address").read_text().strip() == MAC
        assert not group.exists()
    assert not vf.exists()
    assert (PF / "sriov_numvfs").read_text() == "0\n"
