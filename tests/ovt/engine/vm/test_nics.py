"""Network cards: what is recorded, and what becomes of it in a real QEMU and on a bridge of the test's own."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.engine.vm import netdevs, nics
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import QmpError
from ovt.errors import Conflict, NotFound, StateError, UsageError
from ovt.kernel import syscalls
from ovt.model import Nic
from tests.ovt.engine.vm import bare

root = pytest.mark.root
qemu = pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")
OWNER = "abcdef012345"


def hardware(vcpus: int = 2) -> Hardware:
    return Hardware(
        "pc-q35-7.2", "tcg", "max", vcpus, vcpus, vcpus, 1, 1, 1 << 26, 1 << 26, "bios", "u", "g", ports=6
    )  # fmt: skip


def ports(number: int = 6) -> list[str]:
    words = []
    for port in range(number):
        words += ["-device", f"pcie-root-port,id=rp{port},bus=pcie.0,addr={0x10 + port:#x},chassis={port + 1}"]
    return words


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[None]:
    """A host's network of the test's own, with the bridge br0 and the tap pt0."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        syscalls.unshare(syscalls.CLONE_NEWNET)
        for words in (
            "link set lo up",
            "link add br0 type bridge",
            "link set br0 mtu 4000 up",
            "addr add 10.77.0.1/24 dev br0",
            "tuntap add dev pt0 mode tap",
        ):
            ip(*words.split())
        yield
    finally:
        syscalls.setns(home, syscalls.CLONE_NEWNET)
        os.close(home)


def taps() -> list[str]:
    return [line.split()[0] for line in ip("-br", "link").splitlines() if line.startswith("ovt-")]


def no_taps() -> bool:
    deadline = time.monotonic() + 10
    while taps() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not taps()


# records


def test_a_card_of_a_user_network() -> None:
    made = hardware()
    record = nics.add(made, Nic(forwards=("tcp:127.0.0.1:2222:22",)))
    assert record == made.nics[0]
    assert (record["id"], record["port"], record["queues"], record["mtu"]) == ("nic0", "rp0", 1, 0)
    assert record["mac"].startswith("52:54:00:")


@pytest.mark.parametrize(
    ("nic", "said"),
    [
        (Nic("bridge"), "network 'bridge' is not known"),
        (Nic("user:x"), "network 'user:x' is not known"),
        (Nic("tap:"), "network 'tap:' is not known"),
        (Nic(model="ne2k"), "model 'ne2k' is not known"),
        (Nic(mac="01:00:5e:00:00:01"), "is not the address of a network card"),
        (Nic(mac="52:54:00"), "is not the address of a network card"),
        (Nic(queues=2), "has one queue"),
        (Nic("none", forwards=("tcp::1:2",)), "forwards no ports"),
        (Nic(forwards=("tcp:1:2",)), "port forward 'tcp:1:2' is not understood"),
        (Nic(forwards=("tcp::70000:2",)), "is not understood"),
        (Nic(forwards=("sctp::1:2",)), "is not understood"),
        (Nic(forwards=("tcp:host:1:2",)), "is not understood"),
    ],
)
def test_what_no_card_can_be(nic: Nic, said: str) -> None:
    made = hardware()
    with pytest.raises(UsageError, match=said):
        nics.add(made, nic)
    assert made.nics == []


def test_two_cards_need_two_addresses_and_ids() -> None:
    made = hardware()
    nics.add(made, Nic("none", id="lan", mac="52:54:00:00:00:01"))
    with pytest.raises(UsageError, match="two network cards have the address"):
        nics.add(made, Nic("none", mac="52:54:00:00:00:01"))
    with pytest.raises(UsageError, match="two devices with the id 'lan'"):
        nics.add(made, Nic("none", id="lan"))
    assert nics.add(made, Nic("none"))["number"] == 1


def test_names_of_taps_fit_the_kernel() -> None:
    assert netdevs.tap_name(OWNER, 0) == "ovt-abcdef01"
    assert len(netdevs.tap_name(OWNER, 31)) <= 15


def test_forwards_are_taken_apart() -> None:
    assert netdevs.parse_forward("udp::53:5353") == ("udp", "", 53, 5353)
    assert netdevs.parse_forward("tcp:[::1]:80:8080") == ("tcp", "::1", 80, 8080)


def test_the_guest_s_counts_fill_the_gaps() -> None:
    cards = [{"id": "a", "mac": "m1"}, {"id": "b", "mac": "m2"}, {"id": "c", "mac": "m3"}]
    told = [{"mac": "m1", "received": 9, "sent": 9}, {"mac": "m2", "received": 3, "sent": 4}, {"mac": "m3"}]
    assert nics.merge({"a": (1, 2), "b": None, "c": None}, cards, told) == {"a": (1, 2), "b": (3, 4)}


@root
def test_the_bridge_decides_queues_and_mtu(namespace: None) -> None:
    made = hardware(vcpus=4)
    bridged = nics.add(made, Nic("bridge:br0"))
    assert (bridged["queues"], bridged["mtu"]) == (4, 4000)
    assert nics.add(hardware(16), Nic("bridge:br0"))["queues"] == 8
    assert nics.add(made, Nic("bridge:br0", queues=2))["queues"] == 2
    old = nics.add(made, Nic("bridge:br0", model="e1000e"))
    assert (old["queues"], old["mtu"]) == (1, 0)
    assert nics.add(made, Nic("tap:pt0"))["queues"] == 1
    with pytest.raises(NotFound):
        nics.add(made, Nic("bridge:br9"))
    with pytest.raises(UsageError, match="lo is no bridge"):
        nics.add(made, Nic("bridge:lo"))
    with pytest.raises(UsageError, match="br0 is no tap"):
        nics.add(made, Nic("tap:br0"))


# in QEMU


@qemu
@root
def test_killed_qemu_leaves_no_tap(namespace: None) -> None:
    made = hardware(vcpus=4)
    cards = [nics.add(made, Nic("bridge:br0")), nics.add(made, Nic("tap:pt0")), nics.add(made, Nic("bridge:br0"))]
    fds = len(os.listdir("/proc/self/fd"))
    with bare.qemu(more=ports(), uid=65534) as qmp:
        inside = len(os.listdir("/proc/self/fd"))
        for card in cards:
            nics.plug(qmp, made, card, owner=OWNER)
        assert len(os.listdir("/proc/self/fd")) == inside, "a descriptor of ours would keep the tap"
        assert taps() == ["ovt-abcdef01", "ovt-abcdef01-2"]
        assert qmp.command("qom-get", {"path": "/machine/peripheral/nic0", "property": "vectors"}) == 10
        assert qmp.command("qom-get", {"path": "/machine/peripheral/nic0", "property": "host_mtu"}) == 4000
        assert set(nics.stats(made.nics, OWNER)) == {"nic0", "nic1", "nic2"}
        os.kill(qmp.pid, 9)
    assert no_taps()
    assert "pt0" in ip("-br", "link")
    assert len(os.listdir("/proc/self/fd")) == fds


@qemu
@root
def test_a_card_that_qemu_refuses_leaves_nothing(namespace: None) -> None:
    made = hardware()
    card = nics.add(made, Nic("bridge:br0"))
    with bare.qemu(more=ports()) as qmp:
        with pytest.raises(QmpError):
            nics.plug(qmp, made, {**card, "port": "rp99"}, owner=OWNER)
        assert no_taps()
        nics.plug(qmp, made, card, owner=OWNER)
        with pytest.raises(QmpError):  # the place is taken
            nics.plug(qmp, made, {**card, "id": "nic7", "number": 7}, owner=OWNER)
        assert taps() == ["ovt-abcdef01"]
        with pytest.raises(Conflict, match="tap ovt-abcdef01 is in use"):
            nics.plug(qmp, made, {**card, "id": "nic8", "port": "rp5"}, owner=OWNER)


@qemu
def test_a_port_that_is_taken_is_a_conflict() -> None:
    made = hardware()
    with socket.create_server(("127.0.0.1", 0)) as taken, bare.qemu(more=ports()) as qmp:
        port = taken.getsockname()[1]
        card = nics.add(made, Nic(forwards=(f"tcp:127.0.0.1:{port}:22",)))
        with pytest.raises(Conflict, match=f"port {port}/tcp of 127.0.0.1 is taken by another program"):
            nics.plug(qmp, made, card)
        taken.close()
        nics.plug(qmp, made, card)
        with socket.create_connection(("127.0.0.1", port), 5):
            pass


@qemu
def test_a_card_without_a_network_and_a_link_that_is_down() -> None:
    made = hardware()
    with bare.qemu(more=ports()) as qmp:
        card = nics.add(made, Nic("none", link=False))
        nics.plug(qmp, made, card)
        nics.set_link(qmp, card, True)
        assert card["link"]
        with pytest.raises(StateError, match="has not given nic0 back"):
            nics.unplug(qmp, card, 0.5)  # there is no guest that could


@root
def test_user_network_of_qemu_needs_the_host_s(namespace: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netdevs, "passt", lambda: None)
    made = hardware()
    card = nics.add(made, Nic())
    assert nics.need_host_network(["none", "user"])
    assert not nics.need_host_network(["bridge:br0"])
    with pytest.raises(StateError, match="was started without a user network"):
        netdevs.open_network(card, OWNER, None, os.getppid())


def test_passt_gets_the_forwards_and_ends_with_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "passt"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/said\n')
    program.chmod(0o755)
    monkeypatch.setattr(netdevs, "passt", lambda: str(program))
    card = nics.add(hardware(), Nic(forwards=("tcp:127.0.0.1:22822:22", "tcp::22823:80")))
    made = netdevs.open_network(card, OWNER, None, 0)
    assert made is not None and made.arguments == {"type": "stream", "server": False}
    with socket.socket(fileno=made.fds["addr"][0]) as connection:
        assert connection.recv(1) == b"", "the other end is passt's alone"
    said = (tmp_path / "said").read_text()
    assert "--tcp-ports 127.0.0.1/22822:22 --tcp-ports 22823:80 --udp-ports none" in said


def test_passt_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho no route to anywhere >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(netdevs, "passt", lambda: str(program))
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Exception, match="no route to anywhere"):
        netdevs.open_network(nics.add(hardware(), Nic()), OWNER, None, 0)
    assert len(os.listdir("/proc/self/fd")) == fds


# in a machine with a guest


@qemu
@root
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_guest_reaches_its_bridge_by_several_queues(namespace: None, tmp_path: Path) -> None:
    env = {**os.environ, "OVT_DATA_ROOT": f"{tmp_path}/data", "OVT_RUN_ROOT": f"{tmp_path}/run"}
    script = """
        ls -d /sys/class/net/eth0/queues/rx-*; cat /sys/class/net/eth0/mtu
        for attempt in 1 2 3 4 5; do
            ifconfig eth0 10.77.0.2 up  # the guest's DHCP client may take it away once
            ping -c 1 -W 4 10.77.0.1 && exit 0
        done
        exit 1
    """
    options = ["--vm", "--rm", "--cpus", "2", "--memory", "192M", "--nic", "bridge:br0"]
    done = subprocess.run(
        [Path(sys.executable).parent / "ovt", "run", *options, "busybox", "--", "sh", "-c", script],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.replace("\r", "")
    assert "queues/rx-1\n4000\n" in said
    assert "1 packets received" in said
    assert no_taps()
