"""Malformed configurations, each with one fault and the JSON path that the error must name: the same list every time.

Three sources: documents that are no JSON object, every value of the full sample replaced by values of other types,
and hand-written faults of range, vocabulary, presence and combination.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.conformance.sample import full_config

Step = str | int


class Mutation(NamedTuple):
    """One malformed document: a name for the test report, its bytes, and where the fault is."""

    name: str
    document: bytes
    path: str


def mutations() -> list[Mutation]:
    """All of them; names are unique."""
    return [*_documents(), *_wrong_types(), *_missing(), *_replaced(), *_combined()]


def json_path(steps: tuple[Step, ...]) -> str:
    """`("linux", "namespaces", 2)` as `$.linux.namespaces[2]`."""
    return "$" + "".join(_part(step) for step in steps)


def values(node: Any, steps: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Any]]:
    """Every value inside a JSON value, itself first, with the way to it."""
    yield steps, node
    if isinstance(node, dict):
        for name, item in node.items():
            yield from values(item, (*steps, name))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from values(item, (*steps, index))


def replaced(steps: tuple[Step, ...], value: Any) -> dict[str, Any]:
    """The full sample with one value set."""
    config = full_config()
    parent: Any = config
    for step in steps[:-1]:
        parent = parent[step]
    parent[steps[-1]] = value
    return config


def steps_of(path: str) -> tuple[Step, ...]:
    """`linux.namespaces.2.type` as steps; a member whose name has dots stands in brackets: `linux.sysctl.[a.b]`."""
    steps: list[Step] = []
    rest = path
    while rest:
        if rest.startswith("["):
            name, _, rest = rest[1:].partition("]")
            steps.append(name)
            rest = rest.removeprefix(".")
        else:
            name, _, rest = rest.partition(".")
            steps.append(int(name) if name.isdigit() else name)
    return tuple(steps)


def _part(step: Step) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if step.isidentifier() else f"[{json.dumps(step)}]"


def _documents() -> Iterator[Mutation]:
    whole = json.dumps(full_config())
    for tenth in range(10):
        yield Mutation(f"truncated-{tenth}0%", whole[: len(whole) * tenth // 10].encode(), "$")
    for name, text in (
        ("blank", " \n\t"),
        ("null", "null"),
        ("array", "[]"),
        ("string", '"config"'),
        ("number", "12"),
        ("false", "false"),
        ("words", "not json"),
        ("single-quotes", "{'ociVersion': '1.0.0'}"),
        ("trailing-comma", '{"ociVersion": "1.0.0",}'),
        ("trailing-text", whole + " }"),
        ("two-documents", whole + whole),
        ("comment", "// config\n" + whole),
        ("nan", whole[:-1] + ', "x": NaN}'),
        ("infinity", whole[:-1] + ', "x": -Infinity}'),
        ("huge-float", whole[:-1] + ', "x": 1e999}'),
        ("huge-integer", whole[:-1] + ', "x": ' + "9" * 5000 + "}"),
        ("raw-newline", whole[:-1] + ', "x": "a\nb"}'),
        ("bad-escape", whole[:-1] + ', "x": "\\q"}'),
        ("half-surrogate", whole[:-1] + ', "x": "\\ud800"}'),
        ("deep-arrays", '{"x": ' + "[" * 100_000),
        ("deep-objects", '{"x":' * 100_000),
        ("deep-and-closed", '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    ):
        yield Mutation(f"document-{name}", text.encode(), "$")
    yield Mutation("document-latin-1", whole[:-1].encode() + b', "x": "\xe9"}', "$")
    yield Mutation("document-utf-16", whole.encode("utf-16"), "$")
    yield Mutation("document-binary", bytes(range(256)), "$")


_OTHER_TYPES: dict[type, tuple[Any, ...]] = {
    str: (7, True, ["x"], {"x": "y"}),
    bool: ("true", 1, 0, []),
    int: ("5", 1.5, 1.0, True, [1], 2**70, -(2**70)),
    list: ("x", {}, 3, True),
    dict: ("x", [], 3, False),
}


def _wrong_types() -> Iterator[Mutation]:
    for steps, value in values(full_config()):
        if not steps:
            continue
        others = list(_OTHER_TYPES[type(value)])
        if isinstance(value, str):
            others.append(value + "\0")
        if isinstance(steps[-1], int):
            others.append(None)  # a null member is absent, a null item is not an item
        path = json_path(steps)
        for other in others:
            document = json.dumps(replaced(steps, other)).encode()
            yield Mutation(f"{path}={json.dumps(other)[:24]}", document, path)


_REQUIRED = """
    ociVersion root root.path process.cwd process.args process.consoleSize.height process.consoleSize.width
    process.rlimits.0.type process.rlimits.0.soft process.rlimits.1.hard process.scheduler.policy
    process.ioPriority.class mounts.0.destination mounts.1.uidMappings mounts.1.gidMappings
    mounts.1.uidMappings.0.containerID mounts.1.gidMappings.0.hostID mounts.1.gidMappings.0.size hooks.prestart.0.path
    hooks.createRuntime.0.path hooks.createContainer.0.path hooks.startContainer.0.path hooks.poststart.0.path
    hooks.poststop.0.path linux.namespaces.3.type linux.uidMappings linux.gidMappings
    linux.uidMappings.0.containerID linux.uidMappings.0.hostID linux.uidMappings.0.size
    linux.gidMappings.0.containerID linux.gidMappings.0.hostID linux.gidMappings.0.size
    linux.devices.0.type linux.devices.1.path linux.devices.0.major linux.devices.0.minor
    linux.resources.devices.1.allow linux.resources.blockIO.weightDevice.0.major
    linux.resources.blockIO.throttleReadBpsDevice.0.minor linux.resources.blockIO.throttleWriteIOPSDevice.0.rate
    linux.resources.hugepageLimits.0.pageSize linux.resources.hugepageLimits.0.limit
    linux.resources.network.priorities.0.name linux.resources.network.priorities.0.priority
    linux.seccomp.defaultAction linux.seccomp.syscalls.0.names linux.seccomp.syscalls.1.action
    linux.seccomp.syscalls.1.args.0.index linux.seccomp.syscalls.1.args.0.value linux.seccomp.syscalls.1.args.0.op
    linux.memoryPolicy.mode linux.memoryPolicy.nodes linux.personality.domain
    process.scheduler.runtime process.scheduler.deadline
"""


def _missing() -> Iterator[Mutation]:
    for path in _REQUIRED.split():
        steps = steps_of(path)
        for how in ("missing", "null"):
            config = replaced(steps, None)
            if how == "missing":
                parent: Any = config
                for step in steps[:-1]:
                    parent = parent[step]
                del parent[steps[-1]]
            yield Mutation(f"{path}-{how}", json.dumps(config).encode(), json_path(steps))


_VALUES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("ociVersion", ("", "1", "1.0", "1.x.0", "2.0.0", "0.1.0", "01", "v1.0.0", "1.0.0-", "1.0.0 ", "1.0.0\n")),
    ("root.path", ("",)),
    ("process.cwd", ("", "home", "./x")),
    ("process.args", ([],)),
    ("process.env.0", ("NOVALUE", "=x", "")),
    ("process.user.uid", (-1, 2**32 - 1, 2**32, 65536)),
    ("process.user.gid", (-1, 2**32 - 1, 65536)),
    ("process.user.umask", (-1, 0o10000)),
    ("process.user.additionalGids.1", (-1, 2**32, 70000)),
    ("process.consoleSize.height", (-1, 65536)),
    ("process.consoleSize.width", (-1, 65536)),
    ("process.rlimits.0.type", ("NOFILE", "RLIMIT_FOO", "rlimit_nofile", "")),
    ("process.rlimits.0.soft", (-1, 4097, 2**64)),
    ("process.rlimits.0.hard", (-1, 2**64)),
    ("process.oomScoreAdj", (-1001, 1001)),
    ("process.scheduler.policy", ("SCHED_FAST", "", "SCHED_OTHER\n")),
    ("process.scheduler.nice", (-21, 20)),
    ("process.scheduler.priority", (-1, 100, 5)),
    ("process.scheduler.flags.0", ("SCHED_FLAG_FOO",)),
    ("process.scheduler.runtime", (0, 1023, 20_000_001)),
    ("process.scheduler.deadline", (0, 30_000_001)),
    ("process.ioPriority.class", ("IOPRIO_CLASS_NONE", "")),
    ("process.ioPriority.priority", (-1, 8)),
    ("process.execCPUAffinity.initial", ("a", "3-1", "0-", "-1", "0-3:2", "1:2/4", "0x1")),
    ("process.execCPUAffinity.final", ("0;1", "99999999999")),
    ("process.apparmorProfile", ("a\nb",)),
    ("process.selinuxLabel", ("a\nb",)),
    ("hostname", ("x" * 65, "é" * 33)),
    ("domainname", ("x" * 65,)),
    ("mounts.0.destination", ("",)),
    ("mounts.1.uidMappings.0.size", (0, 2**32, 2**32 - 100000)),
    ("hooks.prestart.0.path", ("", "bin/true")),
    ("hooks.poststop.0.timeout", (0, -5, 2**31)),
    ("annotations.[]", ("x",)),
    ("linux.namespaces.0.type", ("foo", "net", "", "PID")),
    ("linux.namespaces.1.type", ("pid",)),
    ("linux.namespaces.1.path", ("run/netns/blue",)),
    ("linux.uidMappings.0.size", (0, -1, 2**32 - 100000)),
    ("linux.uidMappings.0.hostID", (-1, 2**32)),
    ("linux.gidMappings.0.containerID", (-1, 2**32)),
    ("linux.timeOffsets.realtime", ({"secs": 1},)),
    ("linux.timeOffsets.monotonic.nanosecs", (-1, 10**9)),
    ("linux.devices.0.type", ("x", "a", "cb", "")),
    ("linux.devices.0.path", ("dev/fuse", "")),
    ("linux.devices.0.major", (-1, 4096)),
    ("linux.devices.0.minor", (-1, 1 << 20)),
    ("linux.devices.0.fileMode", (-1, 0o200000)),
    ("linux.devices.0.uid", (-1, 2**32 - 1)),
    ("linux.netDevices.[a/b]", ({},)),
    ("linux.netDevices.[]", ({},)),
    ("linux.netDevices.[sixteen-letters-]", ({},)),
    ("linux.netDevices.eth7.name", ("a b", "..", "x" * 16, "a:b")),
    ("linux.cgroupsPath", ("/a/../../b", "..", "a\nb")),
    ("linux.rootfsPropagation", ("none", "SHARED")),
    ("linux.maskedPaths.0", ("proc/kcore", "")),
    ("linux.readonlyPaths.0", ("proc/sys", "")),
    ("linux.mountLabel", ("a\nb",)),
    ("linux.intelRdt.closID", ("..", ".", "a/b", "/x")),
    ("linux.intelRdt.schemata.0", ("L3:0=f\nMB:0=1",)),
    ("linux.intelRdt.l3CacheSchema", ("a\nb",)),
    ("linux.intelRdt.memBwSchema", ("L3:0=f", "MB:0=1\nx")),
    ("linux.memoryPolicy.mode", ("BIND", "")),
    ("linux.memoryPolicy.nodes", ("x", "1-0", "1024", "")),
    ("linux.memoryPolicy.flags.0", ("MPOL_F_FOO",)),
    ("linux.personality.domain", ("BSD", "")),
    ("linux.seccomp.defaultAction", ("ALLOW", "", "SCMP_ACT_NOTIFY")),
    ("linux.seccomp.defaultErrnoRet", (-1, 65536)),
    ("linux.seccomp.architectures.1", ("x86", "SCMP_ARCH_Z80")),
    ("linux.seccomp.flags.0", ("SECCOMP_FILTER_FLAG_FOO",)),
    ("linux.seccomp.listenerPath", ("agent.sock",)),
    ("linux.seccomp.syscalls.0.names", ([],)),
    ("linux.seccomp.syscalls.0.action", ("SCMP_ACT_FOO",)),
    ("linux.seccomp.syscalls.0.errnoRet", (1,)),
    ("linux.seccomp.syscalls.1.args.0.index", (-1, 6)),
    ("linux.seccomp.syscalls.1.args.0.value", (-1, 2**64)),
    ("linux.seccomp.syscalls.1.args.0.op", ("SCMP_CMP_FOO", "==")),
    ("linux.sysctl.[kernel.shmall ]", ("1",)),
    ("linux.sysctl.[kernel.hostname]", ("x",)),
    ("linux.sysctl.[kernel.domainname]", ("other.org",)),
    ("linux.sysctl.[kernel.core_pattern]", ("|/x",)),
    ("linux.sysctl.[vm.swappiness]", ("1",)),
    ("linux.sysctl.[net.ipv4.ip_forward+kernel.core_pattern]", ("|/x",)),
    ("linux.sysctl.[net.ipv4.ip_forward=1]", ("1",)),
    ("linux.sysctl.[net/../kernel/core_pattern]", ("|/x",)),
    ("linux.sysctl.[net/ipv4/ip_forward]", ("1",)),
    ("linux.sysctl.[net..x]", ("1",)),
    ("linux.sysctl.[/net/ipv4/x]", ("1",)),
    ("linux.sysctl.[net.ipv4.a\nb]", ("1",)),
    ("linux.sysctl.[]", ("1",)),
    ("linux.resources.devices.1.type", ("x", "p")),
    ("linux.resources.devices.1.access", ("rwx", "a")),
    ("linux.resources.devices.1.major", (-2, 2**32)),
    ("linux.resources.memory.limit", (-2, 2**63)),
    ("linux.resources.memory.swap", (-2,)),
    ("linux.resources.memory.swappiness", (-1, 101)),
    ("linux.resources.cpu.shares", (-1, 2**64)),
    ("linux.resources.cpu.quota", (-2, 2**63)),
    ("linux.resources.cpu.burst", (100001,)),
    ("linux.resources.cpu.cpus", ("all", "1-", "2-1")),
    ("linux.resources.cpu.mems", ("a", "5000")),
    ("linux.resources.cpu.idle", (2, -1)),
    ("linux.resources.pids.limit", (-2, 2**63)),
    ("linux.resources.blockIO.weight", (-1, 1001)),
    ("linux.resources.blockIO.weightDevice.0", ({"major": 8, "minor": 0},)),
    ("linux.resources.blockIO.throttleReadBpsDevice.0.rate", (-1, 2**64)),
    ("linux.resources.hugepageLimits.0.pageSize", ("2M", "0MB", "MB", "2mb", "2TB", "-2MB", "../../x")),
    ("linux.resources.network.classID", (-1, 2**32)),
    ("linux.resources.network.priorities.0.name", ("", "a/b", "x" * 16)),
    ("linux.resources.rdma.mlx5_1", ({},)),
    ("linux.resources.rdma.[a/b]", ({"hcaHandles": 1},)),
    ("linux.resources.unified.[../memory.max]", ("1",)),
    ("linux.resources.unified.[cgroup.procs/x]", ("1",)),
    ("linux.resources.unified.[..]", ("1",)),
)


def _replaced() -> Iterator[Mutation]:
    for path, bad in _VALUES:
        steps = steps_of(path)
        for value in bad:
            document = json.dumps(replaced(steps, value)).encode()
            yield Mutation(f"{path}={json.dumps(value)[:40]}", document, json_path(steps))


def _without_namespace(kind: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        spaces = config["linux"]["namespaces"]
        spaces.remove(next(space for space in spaces if space["type"] == kind))

    return change


def _at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        parent: Any = config
        *way, last = steps_of(path)
        for step in way:
            parent = parent[step]
        parent[last] = value

    return change


def _pop(path: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        parent: Any = config
        *way, last = steps_of(path)
        for step in way:
            parent = parent[step]
        del parent[last]

    return change


_MAPS = [{"containerID": 0, "hostID": 0, "size": 10}, {"containerID": 5, "hostID": 100, "size": 10}]
_HOST_MAPS = [{"containerID": 0, "hostID": 0, "size": 10}, {"containerID": 10, "hostID": 9, "size": 10}]
_LIMIT = {"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1}

_COMBINATIONS: tuple[tuple[str, str, tuple[Callable[[dict[str, Any]], None], ...]], ...] = (
    ("hostname-without-uts", "$.hostname", (_without_namespace("uts"),)),
    ("domainname-without-uts", "$.domainname", (_without_namespace("uts"), _pop("hostname"))),
    ("paths-without-mount", "$.linux.maskedPaths", (_without_namespace("mount"),)),
    ("readonly-without-mount", "$.linux.readonlyPaths", (_without_namespace("mount"), _pop("linux.maskedPaths"))),
    ("offsets-without-time", "$.linux.timeOffsets", (_without_namespace("time"),)),
    ("offsets-joined-time", "$.linux.timeOffsets", (_at("linux.namespaces.7.path", "/proc/1/ns/time"),)),
    ("mappings-without-user", "$.linux.uidMappings", (_without_namespace("user"),)),
    ("gid-mappings-without-user", "$.linux.gidMappings", (_without_namespace("user"), _pop("linux.uidMappings"))),
    ("nic-without-network", "$.linux.netDevices", (_without_namespace("network"),)),
    (
        "net-sysctl-without-network",
        '$.linux.sysctl["net.ipv4.ip_forward"]',
        (_without_namespace("network"), _pop("linux.netDevices")),
    ),
    (
        "net-sysctl-in-host-network",
        '$.linux.sysctl["net.ipv4.ip_forward"]',
        (_at("linux.namespaces.1.path", "/proc/self/ns/net"),),
    ),
    ("ipc-sysctl-without-ipc", '$.linux.sysctl["kernel.msgmax"]', (_without_namespace("ipc"),)),
    (
        "user-sysctl-without-user",
        '$.linux.sysctl["user.max_user_namespaces"]',
        (
            _without_namespace("user"),
            _pop("linux.uidMappings"),
            _pop("linux.gidMappings"),
            _at("linux.sysctl", {"user.max_user_namespaces": "1"}),
        ),
    ),
    (
        "uts-sysctl-without-uts",
        '$.linux.sysctl["kernel.domainname"]',
        (
            _without_namespace("uts"),
            _pop("hostname"),
            _pop("domainname"),
            _at("linux.sysctl", {"kernel.domainname": "x"}),
        ),
    ),
    ("two-nics-one-name", "$.linux.netDevices.eth8.name", (_at("linux.netDevices.eth8", {"name": "eth0"}),)),
    ("rlimit-twice", "$.process.rlimits[2].type", (lambda config: config["process"]["rlimits"].append(_LIMIT),)),
    ("overlapping-uids", "$.linux.uidMappings[1].containerID", (_at("linux.uidMappings", _MAPS),)),
    ("overlapping-host-gids", "$.linux.gidMappings[1].hostID", (_at("linux.gidMappings", _HOST_MAPS),)),
    ("mount-overlapping", "$.mounts[1].uidMappings[1].containerID", (_at("mounts.1.uidMappings", _MAPS),)),
    (
        "too-many-mappings",
        "$.linux.uidMappings",
        (_at("linux.uidMappings", [{"containerID": i, "hostID": i, "size": 1} for i in range(341)]),),
    ),
    (
        "idmap-without-anything",
        "$.mounts[1].options[1]",
        (
            _pop("mounts.1.uidMappings"),
            _pop("mounts.1.gidMappings"),
            _without_namespace("user"),
            _pop("linux.uidMappings"),
            _pop("linux.gidMappings"),
        ),
    ),
    ("user-without-mappings", "$.process.user.uid", (_pop("linux.uidMappings"), _pop("linux.gidMappings"))),
    ("realtime-times", "$.process.scheduler.runtime", (_at("process.scheduler.policy", "SCHED_RR"),)),
    (
        "idle-priority",
        "$.process.scheduler.priority",
        (_at("process.scheduler", {"policy": "SCHED_IDLE", "priority": 1}),),
    ),
    ("short-period", "$.process.scheduler.deadline", (_at("process.scheduler.period", 1024),)),
    (
        "endless-period",
        "$.process.scheduler.period",
        (_at("process.scheduler.period", 2**63),),
    ),
    ("notify-without-agent", "$.linux.seccomp.listenerMetadata", (_pop("linux.seccomp.listenerPath"),)),
    (
        "notify-without-listener",
        "$.linux.seccomp.syscalls[2].action",
        (_pop("linux.seccomp.listenerPath"), _pop("linux.seccomp.listenerMetadata")),
    ),
    (
        "errno-of-allow",
        "$.linux.seccomp.defaultErrnoRet",
        (_at("linux.seccomp.defaultAction", "SCMP_ACT_ALLOW"),),
    ),
    ("nodes-of-local", "$.linux.memoryPolicy.nodes", (_at("linux.memoryPolicy.mode", "MPOL_LOCAL"),)),
    (
        "static-and-relative",
        "$.linux.memoryPolicy.flags",
        (_at("linux.memoryPolicy.flags", ["MPOL_F_STATIC_NODES", "MPOL_F_RELATIVE_NODES"]),),
    ),
    (
        "balancing-interleave",
        "$.linux.memoryPolicy.flags",
        (_at("linux.memoryPolicy", {"mode": "MPOL_INTERLEAVE", "nodes": "0", "flags": ["MPOL_F_NUMA_BALANCING"]}),),
    ),
)


def _combined() -> Iterator[Mutation]:
    for name, path, changes in _COMBINATIONS:
        config = copy.deepcopy(full_config())
        for change in changes:
            change(config)
        yield Mutation(name, json.dumps(config).encode(), path)
