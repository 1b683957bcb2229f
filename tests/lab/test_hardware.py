"""The lab host has the hardware that CONTRIBUTING.md names, seen through the kernel's own interfaces."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.conftest import Modprobe

pytestmark = pytest.mark.lab


def read(path: str) -> str:
    return Path(path).read_text().strip()


def network_card(address: str) -> str:
    """The name of the network interface of a PCI device."""
    (name,) = os.listdir(next(Path("/sys/bus/pci/devices").glob(f"{address}/**/net")))
    return name


def virtio_network_card() -> str:
    """The name of the virtio network interface; virtio_net comes as a module."""
    for device in Path("/sys/bus/virtio/devices").iterdir():
        if int((device / "device").read_text(), 16) == 1:
            return os.listdir(device / "net")[0]
    raise AssertionError("there is no virtio network card")


def test_two_processors_and_no_more_memory_than_igb_bears() -> None:
    assert os.cpu_count() == 2
    total = int(next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line))
    assert 1_900_000 < total <= 2_621_440  # KiB


def test_cgroup_v2_alone() -> None:
    controllers = set(read("/sys/fs/cgroup/cgroup.controllers").split())
    assert {"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc"} <= controllers
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if line.split()[2] == "cgroup"]


def test_iommu_with_interrupt_remapping() -> None:
    assert os.listdir("/sys/class/iommu") == ["dmar0"]
    assert "DMAR-IR: Enabled IRQ remapping" in subprocess.run(["dmesg"], capture_output=True, text=True).stdout
    for card in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        assert Path(f"/sys/bus/pci/devices/{card}/iommu_group").exists()


@pytest.mark.parametrize("address", ["0000:01:00.0", "0000:02:00.0"])
def test_network_cards_with_seven_virtual_functions(modprobe: Modprobe, address: str) -> None:
    modprobe("igb")
    assert read(f"/sys/bus/pci/devices/{address}/sriov_totalvfs") == "7"
    assert network_card(address)


def test_nvme_with_virtual_functions_and_a_namespace(modprobe: Modprobe) -> None:
    modprobe("nvme")
    assert read("/sys/bus/pci/devices/0000:03:00.0/sriov_totalvfs") == "4"
    assert Path("/sys/bus/pci/devices/0000:03:00.0/nvme").is_dir()


def test_virtio_network_card_with_several_queues(modprobe: Modprobe) -> None:
    modprobe("virtio_net")
    name = virtio_network_card()
    queues = sorted(os.listdir(f"/sys/class/net/{name}/queues"))
    if queues == ["rx-0", "tx-0"]:
        pytest.skip("the machine that emulates the lab could not make a tap device")
    assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"]
    subprocess.run(["ip", "address", "add", "192.0.2.2/24", "dev", name], check=True)
    subprocess.run(["ip", "link", "set", name, "up"], check=True)
    try:
        done = subprocess.run(["busybox", "ping", "-c", "2", "-W", "10", "192.0.2.1"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    finally:
        subprocess.run(["ip", "link", "set", name, "down"], check=True)
        subprocess.run(["ip", "address", "flush", "dev", name], check=True)


def test_kvm_answers_with_its_version(modprobe: Modprobe) -> None:
    modprobe("kvm-amd" if "svm" in read("/proc/cpuinfo").split() else "kvm-intel")
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(kvm, 0xAE00, 0) == 12  # KVM_GET_API_VERSION
    finally:
        os.close(kvm)


def test_the_projects_own_programs_and_packages() -> None:
    """What was installed on the machine is there, without an image having been built."""
    assert Path(sys.executable).parent.name == "bin" and ".venv" in sys.executable
    for program in ("podman", "runc", "qemu-system-x86_64", "ip", "busybox"):
        found = subprocess.run(["sh", "-c", f"command -v {program}"], check=False, capture_output=True)
        assert found.returncode == 0, program


def test_everything_can_be_written_and_nothing_is_read_only() -> None:
    for directory in ("/etc", "/usr/lib", "/root", "/tmp", "/run", "/var/lib", str(Path(__file__).parent)):
        file = Path(directory) / ".lab-test"
        file.write_text("text")
        file.unlink()
