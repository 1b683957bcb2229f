"""A virtual function of a network card in a machine of ovt, and back at the host; macvtaps, which need this kernel."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel import tap
from tests.lab.conftest import Modprobe
from tests.lab.functions import functions

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(240)]

PF = Path("/sys/bus/pci/devices/0000:01:00.0")
MAC = "52:54:00:00:10:cb"
CPU = "host,tsc-deadline=off"  # in the lab host a guest's timer in TSC-deadline mode never fires


@pytest.fixture(scope="module")
def kvm(modprobe: Modprobe) -> None:
    modprobe("kvm_amd" if " svm " in Path("/proc/cpuinfo").read_text() else "kvm_intel")


@pytest.fixture
def vf(modprobe: Modprobe) -> Iterator[Path]:
    """One VF of the igb with an administrative MAC, in the hands of its driver."""
    modprobe("igb", "igbvf", "vfio-pci")
    (netdev,) = os.listdir(PF / "net")
    was_up = "UP" in json.loads(ip("-j", "link", "show", netdev))[0]["flags"]
    ip("link", "set", netdev, "up")
    try:
        with functions(PF, 1, autoprobe=True) as (made,):
            ip("link", "set", netdev, "vf", "0", "mac", MAC)
            yield made
    finally:
        if not was_up:
            ip("link", "set", netdev, "down")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def driver(device: Path) -> str:
    return os.path.basename(os.readlink(device / "driver"))


def ovt(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OVT_DATA_ROOT": f"{tmp_path}/data", "OVT_RUN_ROOT": f"{tmp_path}/run"}
    program = Path(sys.executable).parent / "ovt"
    return subprocess.run([program, *words], env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def machine(tmp_path: Path, vf: Path, script: str) -> subprocess.CompletedProcess[str]:
    options = ["--cpu", CPU, "--memory", "192M", "--network", "none", "--hostdev", vf.name]
    return ovt(tmp_path, "run", "--vm", "--rm", *options, "busybox", "--", "sh", "-c", script)


def test_a_virtual_function_works_in_a_machine_and_comes_back(kvm: None, vf: Path, tmp_path: Path) -> None:
    script = """
        modprobe igbvf
        for device in /sys/class/net/eth*; do
            echo "driver $(basename $(readlink $device/device/driver)) mac $(cat $device/address)"
        done
    """
    done = machine(tmp_path, vf, script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"driver igbvf mac {MAC}" in done.stdout.replace("\r", "")
    # the host has it back, with its driver and its address, and nothing is left on VFIO
    assert driver(vf) == "igbvf"
    assert (vf / "driver_override").read_text().strip() == "(null)"
    (netdev,) = os.listdir(vf / "net")
    assert (vf / "net" / netdev / "address").read_text().strip() == MAC
    assert os.listdir("/dev/vfio") == ["vfio"]


def test_a_virtual_function_that_the_host_uses_stays(kvm: None, vf: Path, tmp_path: Path) -> None:
    (netdev,) = os.listdir(vf / "net")
    ip("addr", "add", "192.0.2.7/24", "dev", netdev)
    ip("link", "set", netdev, "up")
    done = machine(tmp_path, vf, "true")
    assert done.returncode != 0
    assert f"device {vf.name} is in use by the host: network device {netdev} is up and has an address" in done.stderr
    assert driver(vf) == "igbvf"


def test_a_macvtap_is_gone_with_its_descriptors(modprobe: Modprobe) -> None:
    modprobe("macvtap", "dummy")
    ip("link", "add", "lab-mv", "type", "dummy")
    try:
        with pytest.raises(HostError, match="network device lab-mv is down"):
            tap.make_macvtap("lab-mv", MAC, 1)
        ip("link", "set", "lab-mv", "up")
        fds = tap.make_macvtap("lab-mv", MAC, 2)
        # In the host's namespace there is no trace of it but this: its address is taken on the device.
        with pytest.raises(HostError, match="in use"):
            tap.make_macvtap("lab-mv", MAC, 1)
        frame = bytes(10) + b"\xff" * 6 + bytes.fromhex(MAC.replace(":", "")) + b"\x88\xb5" + bytes(46)
        before = int(Path("/sys/class/net/lab-mv/statistics/tx_packets").read_text())
        assert os.write(fds[0], frame) == len(frame)
        assert int(Path("/sys/class/net/lab-mv/statistics/tx_packets").read_text()) > before
        tap.close(fds)
        again = wait_for_macvtap()
        tap.close(again)
    finally:
        ip("link", "del", "lab-mv")


def wait_for_macvtap() -> list[int]:
    """The kernel ends a network namespace some time after its last user."""
    import time

    deadline = time.monotonic() + 30
    while True:
        try:
            return tap.make_macvtap("lab-mv", MAC, 1)
        except HostError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
