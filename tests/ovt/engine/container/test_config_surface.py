"""The whole declared surface of the tables, written a second time by hand from the specification and the kernel.

Each member has its kind; each range its two ends; each vocabulary its words; each form its good and bad strings. A
member, range, vocabulary or form that the tables declare and this file does not (or the other way round) fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ovt.engine.container import tables
from ovt.engine.container.schema import Array, Boolean, Choice, Fault, Integer, Map, Node, Object, String
from tests.conformance.mutations import Step, values
from tests.conformance.sample import full_config


def declared(node: Node = tables.CONFIG, path: str = "") -> Iterator[tuple[str, Node]]:
    yield path, node
    for part, child in node.children():
        yield from declared(child, (path + part).removeprefix("."))


SURFACE = dict(declared())


def of_kind(kind: type[Node]) -> set[str]:
    return {path for path, node in SURFACE.items() if type(node) is kind}


def pattern(steps: tuple[Step, ...]) -> str:
    """The declared path of a value of the sample; the names in a map are `{}`."""
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += "[]"
        elif isinstance(SURFACE[path], Map):
            path += "{}"
        else:
            path += f".{step}"
        path = path.removeprefix(".")
    return path


def refuses(node: Node, value: Any) -> bool:
    try:
        node.check(value)
    except Fault:
        return True
    return False


def test_the_sample_has_every_member() -> None:
    assert {pattern(steps) for steps, _ in values(full_config())} | {"linux.personality.flags[]"} == set(SURFACE)


I63, U64, U32, ID = (-1, 2**63 - 1), (0, 2**64 - 1), (0, 2**32 - 1), (0, 2**32 - 2)
WEIGHT, MAJOR, MINOR, RULE = (0, 1000), (0, 4095), (0, 1048575), (-1, 2**32 - 1)
THROTTLES = ("throttleReadBpsDevice", "throttleWriteBpsDevice", "throttleReadIOPSDevice", "throttleWriteIOPSDevice")
HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")

RANGES: dict[str, tuple[int, int]] = {
    "process.consoleSize.height": U64,
    "process.consoleSize.width": U64,
    "process.user.uid": ID,
    "process.user.gid": ID,
    "process.user.umask": (0, 0o7777),
    "process.user.additionalGids[]": ID,
    "process.rlimits[].soft": U64,
    "process.rlimits[].hard": U64,
    "process.oomScoreAdj": (-1000, 1000),
    "process.scheduler.nice": (-20, 19),
    "process.scheduler.priority": (0, 99),
    "process.scheduler.runtime": U64,
    "process.scheduler.deadline": U64,
    "process.scheduler.period": U64,
    "process.ioPriority.priority": (0, 7),
    **{f"hooks.{name}[].timeout": (1, 2**31 - 1) for name in HOOKS},
    **{
        f"{place}{kind}Mappings[].{name}": (1, 2**32 - 1) if name == "size" else U32
        for place in ("mounts[].", "linux.")
        for kind in ("uid", "gid")
        for name in ("containerID", "hostID", "size")
    },
    "linux.timeOffsets{}.secs": (-(2**63), 2**63 - 1),
    "linux.timeOffsets{}.nanosecs": (0, 999999999),
    "linux.devices[].major": MAJOR,
    "linux.devices[].minor": MINOR,
    "linux.devices[].fileMode": (0, 0o177777),
    "linux.devices[].uid": ID,
    "linux.devices[].gid": ID,
    "linux.resources.devices[].major": RULE,
    "linux.resources.devices[].minor": RULE,
    **{f"linux.resources.memory.{name}": I63 for name in ("limit", "reservation", "swap", "kernel", "kernelTCP")},
    "linux.resources.memory.swappiness": (0, 100),
    **{f"linux.resources.cpu.{name}": U64 for name in ("shares", "burst", "period", "realtimePeriod")},
    "linux.resources.cpu.quota": I63,
    "linux.resources.cpu.realtimeRuntime": I63,
    "linux.resources.cpu.idle": (0, 1),
    "linux.resources.pids.limit": I63,
    "linux.resources.blockIO.weight": WEIGHT,
    "linux.resources.blockIO.leafWeight": WEIGHT,
    "linux.resources.blockIO.weightDevice[].major": MAJOR,
    "linux.resources.blockIO.weightDevice[].minor": MINOR,
    "linux.resources.blockIO.weightDevice[].weight": WEIGHT,
    "linux.resources.blockIO.weightDevice[].leafWeight": WEIGHT,
    **{f"linux.resources.blockIO.{name}[].major": MAJOR for name in THROTTLES},
    **{f"linux.resources.blockIO.{name}[].minor": MINOR for name in THROTTLES},
    **{f"linux.resources.blockIO.{name}[].rate": U64 for name in THROTTLES},
    "linux.resources.hugepageLimits[].limit": U64,
    "linux.resources.network.classID": U32,
    "linux.resources.network.priorities[].priority": U32,
    "linux.resources.rdma{}.hcaHandles": U32,
    "linux.resources.rdma{}.hcaObjects": U32,
    "linux.seccomp.defaultErrnoRet": (0, 65535),
    "linux.seccomp.syscalls[].errnoRet": (0, 65535),
    "linux.seccomp.syscalls[].args[].index": (0, 5),
    "linux.seccomp.syscalls[].args[].value": U64,
    "linux.seccomp.syscalls[].args[].valueTwo": U64,
}


def test_every_integer_has_its_two_ends() -> None:
    assert set(RANGES) == of_kind(Integer)
    for path, (low, high) in RANGES.items():
        node = SURFACE[path]
        assert not refuses(node, low), path
        assert not refuses(node, high), path
        for bad in (low - 1, high + 1, True, False, float(low), str(low), None, [low]):
            assert refuses(node, bad), (path, bad)


ACTIONS = (
    "SCMP_ACT_KILL SCMP_ACT_KILL_PROCESS SCMP_ACT_KILL_THREAD SCMP_ACT_TRAP SCMP_ACT_ERRNO SCMP_ACT_TRACE "
    "SCMP_ACT_ALLOW SCMP_ACT_LOG SCMP_ACT_NOTIFY"
)
WORDS: dict[str, str] = {
    "process.rlimits[].type": (
        "RLIMIT_AS RLIMIT_CORE RLIMIT_CPU RLIMIT_DATA RLIMIT_FSIZE RLIMIT_LOCKS RLIMIT_MEMLOCK RLIMIT_MSGQUEUE "
        "RLIMIT_NICE RLIMIT_NOFILE RLIMIT_NPROC RLIMIT_RSS RLIMIT_RTPRIO RLIMIT_RTTIME RLIMIT_SIGPENDING RLIMIT_STACK"
    ),
    "process.scheduler.policy": ("SCHED_OTHER SCHED_FIFO SCHED_RR SCHED_BATCH SCHED_ISO SCHED_IDLE SCHED_DEADLINE"),
    "process.scheduler.flags[]": (
        "SCHED_FLAG_RESET_ON_FORK SCHED_FLAG_RECLAIM SCHED_FLAG_DL_OVERRUN SCHED_FLAG_KEEP_POLICY "
        "SCHED_FLAG_KEEP_PARAMS SCHED_FLAG_UTIL_CLAMP_MIN SCHED_FLAG_UTIL_CLAMP_MAX"
    ),
    "process.ioPriority.class": "IOPRIO_CLASS_RT IOPRIO_CLASS_BE IOPRIO_CLASS_IDLE",
    "linux.namespaces[].type": "pid network mount ipc uts user cgroup time",
    "linux.devices[].type": "c b u p",
    "linux.rootfsPropagation": "private rprivate shared rshared slave rslave unbindable runbindable",
    "linux.resources.devices[].type": "a b c",
    "linux.seccomp.defaultAction": ACTIONS,
    "linux.seccomp.syscalls[].action": ACTIONS,
    "linux.seccomp.architectures[]": (
        "SCMP_ARCH_X86 SCMP_ARCH_X86_64 SCMP_ARCH_X32 SCMP_ARCH_ARM SCMP_ARCH_AARCH64 SCMP_ARCH_MIPS SCMP_ARCH_MIPS64 "
        "SCMP_ARCH_MIPS64N32 SCMP_ARCH_MIPSEL SCMP_ARCH_MIPSEL64 SCMP_ARCH_MIPSEL64N32 SCMP_ARCH_PPC SCMP_ARCH_PPC64 "
        "SCMP_ARCH_PPC64LE SCMP_ARCH_S390 SCMP_ARCH_S390X SCMP_ARCH_PARISC SCMP_ARCH_PARISC64 SCMP_ARCH_RISCV64 "
        "SCMP_ARCH_LOONGARCH64 SCMP_ARCH_M68K SCMP_ARCH_SH SCMP_ARCH_SHEB"
    ),
    "linux.seccomp.flags[]": (
        "SECCOMP_FILTER_FLAG_TSYNC SECCOMP_FILTER_FLAG_LOG SECCOMP_FILTER_FLAG_SPEC_ALLOW "
        "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"
    ),
    "linux.seccomp.syscalls[].args[].op": (
        "SCMP_CMP_NE SCMP_CMP_LT SCMP_CMP_LE SCMP_CMP_EQ SCMP_CMP_GE SCMP_CMP_GT SCMP_CMP_MASKED_EQ"
    ),
    "linux.memoryPolicy.mode": (
        "MPOL_DEFAULT MPOL_BIND MPOL_INTERLEAVE MPOL_WEIGHTED_INTERLEAVE MPOL_PREFERRED MPOL_PREFERRED_MANY MPOL_LOCAL"
    ),
    "linux.memoryPolicy.flags[]": "MPOL_F_NUMA_BALANCING MPOL_F_RELATIVE_NODES MPOL_F_STATIC_NODES",
    "linux.personality.domain": "LINUX LINUX32",
}
# what Go's writers leave out, others write as ""
EMPTY_WORD = {"linux.rootfsPropagation", "linux.resources.devices[].type"}


def test_every_vocabulary_has_its_words() -> None:
    assert set(WORDS) == of_kind(Choice)
    for path, words in WORDS.items():
        node = SURFACE[path]
        assert isinstance(node, Choice)
        assert set(node.values) == set(words.split()) | ({""} if path in EMPTY_WORD else set()), path
        for bad in ("bogus", words.split()[0].swapcase(), words.split()[0] + " ", 5, None, True, [words.split()[0]]):
            assert refuses(node, bad), (path, bad)
        assert refuses(node, "") == (path not in EMPTY_WORD)


ABSOLUTE = (("/", "/a b", "/é"), ("", "a", "./a", "~"))
ABSOLUTE_OR_EMPTY = (("/a", ""), ("a", "./a"))
NUMBERS = (("", "0", "0-3", "0-3,7", "1, 2", "0-31:2/4"), ("a", "-", "1-", "-1", "3-1", "1.5", "0-1-2", "1:1/2", "²"))
NODES = ((*NUMBERS[0], "1023"), (*NUMBERS[1], "1024", "0-1024"))
LINE = (("", "a b:c"), ("a\nb", "\n"))
HOST = (("", "a", "x" * 64), ("x" * 65, "é" * 33))
INTERFACE = (("eth0", "a", "x" * 15, "eth%d", "a.b-c"), ("x" * 16, ".", "..", "a/b", "a b", "a:b", "a\tb"))

FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ociVersion": (
        ("1.0.0", "1.0.2-dev", "1.3.0+dev"),
        ("", "1", "1.0", "2.0.0", "0.1.0", "1.0.0-", "1.0.x", "1.0.0é"),
    ),
    "root.path": (("rootfs", "/x"), ("",)),
    "hostname": HOST,
    "domainname": HOST,
    "process.cwd": ABSOLUTE,
    "process.env[]": (("A=", "A=b", "A=b=c", "a b=c"), ("", "A", "=", "=a")),
    "process.apparmorProfile": LINE,
    "process.selinuxLabel": LINE,
    "process.execCPUAffinity.initial": NUMBERS,
    "process.execCPUAffinity.final": NUMBERS,
    "mounts[].destination": (("/a", "a"), ("",)),
    **{f"hooks.{name}[].path": ABSOLUTE for name in HOOKS},
    "linux.namespaces[].path": ABSOLUTE_OR_EMPTY,
    "linux.devices[].path": ABSOLUTE,
    "linux.netDevices{}.name": (("", *INTERFACE[0]), INTERFACE[1]),
    "linux.cgroupsPath": (("", "/a/b", "a", "a.slice:b:c", "/a..b"), ("..", "/../a", "/a/..", "a\nb")),
    "linux.maskedPaths[]": ABSOLUTE,
    "linux.readonlyPaths[]": ABSOLUTE,
    "linux.mountLabel": LINE,
    "linux.resources.devices[].access": (("", "r", "rw", "rwm"), ("x", "rwx", "RW")),
    "linux.resources.cpu.cpus": NUMBERS,
    "linux.resources.cpu.mems": NODES,
    "linux.resources.hugepageLimits[].pageSize": (
        ("64KB", "2MB", "1GB"),
        ("", "MB", "2", "2M", "2mb", "0MB", "-1MB", "1TB", "2 MB", "²MB"),
    ),
    "linux.resources.network.priorities[].name": (INTERFACE[0], ("", *INTERFACE[1])),
    "linux.seccomp.listenerPath": ABSOLUTE_OR_EMPTY,
    "linux.intelRdt.closID": (("", "/", "gold"), (".", "..", "a/b", "/a", "a\nb")),
    "linux.intelRdt.schemata[]": LINE,
    "linux.intelRdt.l3CacheSchema": LINE,
    "linux.intelRdt.memBwSchema": (("MB:0=1",), ("", "L3:0=1", "MB:0=1\nMB:1=1")),
    "linux.memoryPolicy.nodes": NODES,
}
PLAIN = {
    "process.args[]",
    *(f"process.capabilities.{name}[]" for name in ("bounding", "effective", "inheritable", "permitted", "ambient")),
    *(f"mounts[].{name}" for name in ("type", "source", "options[]")),
    *(f"hooks.{name}[].{strings}[]" for name in HOOKS for strings in ("args", "env")),
    "annotations{}",
    "linux.sysctl{}",
    "linux.seccomp.listenerMetadata",
    "linux.seccomp.syscalls[].names[]",
    "linux.personality.flags[]",
    "linux.resources.unified{}",
}


def test_every_string_has_its_form() -> None:
    assert set(FORMS) | PLAIN == of_kind(String)
    plain: tuple[tuple[str, ...], tuple[str, ...]] = (("", "a", "é\n"), ())
    for path, (good, bad) in {**FORMS, **dict.fromkeys(PLAIN, plain)}.items():
        node = SURFACE[path]
        for text in good:
            assert not refuses(node, text), (path, text)
        for value in (*bad, good[0] + "\0", 5, None, True, [good[0]], {good[0]: 1}):
            assert refuses(node, value), (path, value)


NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "annotations": (("a", "a.b/c"), ("", "\0")),
    "linux.timeOffsets": (("monotonic", "boottime"), ("", "realtime", "MONOTONIC")),
    "linux.netDevices": (INTERFACE[0], ("", *INTERFACE[1])),
    "linux.resources.rdma": (("mlx5_0",), ("", "..", "a/b")),
    "linux.resources.unified": (("memory.max", "io.max"), ("", ".", "..", "../x", "a/b", "/a")),
    "linux.sysctl": (("anything; rules.py looks at it",), ("\0",)),
}


def test_every_map_has_its_names() -> None:
    assert set(NAMES) == of_kind(Map)
    samples = dict(values(full_config()))
    for path, (good, bad) in NAMES.items():
        item = next(iter(samples[tuple(path.split("."))].values()))
        for name in good:
            assert not refuses(SURFACE[path], {name: item}), (path, name)
        for name in bad:
            assert refuses(SURFACE[path], {name: item}), (path, name)
        for value in ([], "x", 1, None):
            assert refuses(SURFACE[path], value), (path, value)


REQUIRED: dict[str, str] = {
    "": "ociVersion root",
    "root": "path",
    "process": "cwd args",
    "process.consoleSize": "height width",
    "process.rlimits[]": "type soft hard",
    "process.scheduler": "policy",
    "process.ioPriority": "class",
    "mounts[]": "destination",
    **{f"hooks.{name}[]": "path" for name in HOOKS},
    **{
        f"{place}{kind}Mappings[]": "containerID hostID size"
        for place in ("mounts[].", "linux.")
        for kind in ("uid", "gid")
    },
    "linux.namespaces[]": "type",
    "linux.devices[]": "type path",
    "linux.resources.devices[]": "allow",
    "linux.resources.blockIO.weightDevice[]": "major minor",
    **{f"linux.resources.blockIO.{name}[]": "major minor rate" for name in THROTTLES},
    "linux.resources.hugepageLimits[]": "pageSize limit",
    "linux.resources.network.priorities[]": "name priority",
    "linux.seccomp": "defaultAction",
    "linux.seccomp.syscalls[]": "names action",
    "linux.seccomp.syscalls[].args[]": "index value op",
    "linux.memoryPolicy": "mode",
    "linux.personality": "domain",
}


def test_every_object_has_its_required_members() -> None:
    needed = {path: set(node.required) for path, node in SURFACE.items() if isinstance(node, Object) and node.required}
    assert needed == {path: set(names.split()) for path, names in REQUIRED.items()}
    for steps, value in values(full_config()):
        for name in REQUIRED.get(pattern(steps), "").split():
            if name in value:
                without = {key: item for key, item in value.items() if key != name}
                with pytest.raises(Fault, match="is required") as caught:
                    SURFACE[pattern(steps)].check(without)
                assert caught.value.location("$") == f"$.{name}"


AT_LEAST_ONE = {"process.args", "linux.seccomp.syscalls[].names"}


def test_arrays_objects_and_booleans_are_no_other_kind() -> None:
    for path in of_kind(Array):
        assert refuses(SURFACE[path], []) == (path in AT_LEAST_ONE), path
        for bad in ({}, "x", 1, None, True, [None]):
            assert refuses(SURFACE[path], bad), (path, bad)
    for path in of_kind(Object):
        for bad in ([], "x", 1, None, True):
            assert refuses(SURFACE[path], bad), (path, bad)
    for path in of_kind(Boolean):
        for bad in (0, 1, "true", None, []):
            assert refuses(SURFACE[path], bad), (path, bad)
        assert not refuses(SURFACE[path], True)
        assert not refuses(SURFACE[path], False)
