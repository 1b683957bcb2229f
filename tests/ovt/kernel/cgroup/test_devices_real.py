"""Device rules in force: this kernel's BPF verifier and cgroup2 mount, and the devices hierarchy of v1."""

import os
import random
from collections.abc import Callable

import pytest

from ovt.errors import HostError
from ovt.kernel.cgroup import devices, ebpf
from ovt.kernel.cgroup.hierarchy import current
from ovt.kernel.cgroup.v2 import V2

from .conftest import Child
from .test_devices import ALLOW_ALL, DENY_ALL, random_rule

pytestmark = [pytest.mark.root, pytest.mark.twice]

PROBE = """
for path, flags in (('/dev/null', os.O_RDWR), ('/dev/kmsg', os.O_RDONLY), ('/dev/kmsg', os.O_WRONLY)):
    try:
        os.close(os.open(path, flags)); print('yes', end=' ')
    except PermissionError:
        print('no', end=' ')
"""
KMSG_READ = {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"}
KMSG_WRITE = {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "w"}


def programs(directory: str) -> list[int]:
    fd = os.open(directory, os.O_RDONLY)
    try:
        return ebpf.attached(fd)
    finally:
        os.close(fd)


@pytest.fixture
def unified(place: str) -> V2:
    mount = current().unified
    if mount is None:
        pytest.skip("needs a cgroup2 mount")
    group = V2(mount, place)
    group.create()
    return group


def test_the_verifier_takes_every_program() -> None:
    source = random.Random(11)
    for _ in range(60):
        listed = [random_rule(source) for _ in range(source.randrange(0, 20))]
        os.close(ebpf.load(ebpf.program(listed + list(devices.DEFAULT_RULES))))


def test_a_program_the_verifier_refuses_gives_its_words() -> None:
    with pytest.raises(OSError) as caught:
        ebpf.load(ebpf.program([])[:-8])
    assert caught.value.filename == "last insn is not an exit or jmp"


def test_v2_really_denies_and_updates_replace_the_program(unified: V2, child: Callable[..., Child]) -> None:
    def probe() -> str:
        process = child(PROBE)
        unified.attach(process.pid)
        return process.go().strip()

    assert probe() == "yes yes yes"
    devices.restrict_v2(unified.directory, [DENY_ALL])
    first = programs(unified.directory)
    assert probe() == "yes no no"
    devices.restrict_v2(unified.directory, [DENY_ALL, KMSG_READ])
    second = programs(unified.directory)
    assert probe() == "yes yes no"
    devices.restrict_v2(unified.directory, [DENY_ALL, KMSG_READ, KMSG_WRITE])
    assert probe() == "yes yes yes"
    assert len(first) == len(second) == len(programs(unified.directory)) == 1
    assert first != second
    devices.restrict_v2(unified.directory, [ALLOW_ALL])
    assert programs(unified.directory) == []
    assert probe() == "yes yes yes"


def test_apply_restricts_a_new_container_and_leaves_an_update_alone(unified: V2) -> None:
    unified.apply({})
    before = programs(unified.directory)
    assert len(before) == 1
    unified.apply({"devices": None}, update=True)
    assert programs(unified.directory) == before


def test_programs_of_others_stay(unified: V2) -> None:
    from _struct import pack

    from ovt.kernel.syscalls import bpf

    def foreign() -> int:
        name, ebpf.NAME = ebpf.NAME, b"sd_devices"
        try:
            return ebpf.load(ebpf.program([devices.Rule(True)]))
        finally:
            ebpf.NAME = name

    fd = foreign()
    directory = os.open(unified.directory, os.O_RDONLY)
    bpf(8, pack("IIIII", directory, fd, 6, 2, 0))
    os.close(directory)
    os.close(fd)
    for listed in ([DENY_ALL], [DENY_ALL, KMSG_READ], [ALLOW_ALL]):
        devices.restrict_v2(unified.directory, listed)
        assert len(programs(unified.directory)) == (1 if listed == [ALLOW_ALL] else 2)


def test_several_programs_of_ours_become_one(unified: V2) -> None:
    directory = os.open(unified.directory, os.O_RDONLY)
    for major in (1, 2):
        fd = ebpf.load(ebpf.program([devices.Rule(True, "c", major)]))
        ebpf._attach(directory, fd, -1)
        os.close(fd)
    os.close(directory)
    assert len(programs(unified.directory)) == 2
    devices.restrict_v2(unified.directory, [DENY_ALL])
    assert len(programs(unified.directory)) == 1


def test_no_descriptor_is_left(unified: V2) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        devices.restrict_v2(unified.directory, [DENY_ALL])
    with pytest.raises(HostError):
        devices.restrict_v2(unified.directory + "/absent", [DENY_ALL])
    assert len(os.listdir("/proc/self/fd")) == before
