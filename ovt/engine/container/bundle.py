"""From what an instance's owner asked for to the OCI configuration that says it: pure functions, golden-tested.

Nothing here looks at the host: what must be known of it comes in as `Facts`, what must be known of the image's files
as `User` and device `Node`s. The defaults are those people know from podman: its capabilities, its mounts, masked
and read-only paths, private namespaces; `network none` leaves only the loopback device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ovt.engine.container import mount_options, seccomp_default
from ovt.errors import HostError, UsageError
from ovt.kernel.capabilities import NUMBERS
from ovt.model import Limits, Spec, Volume

OCI_VERSION = "1.2.0"
DEFAULT_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
INIT_TARGET = "/dev/ovt-init"  # in the container's own tmpfs: leaves no trace in the root file system
CPU_PERIOD = 100_000  # microseconds

_SELINUX_PARTS = ("user", "role", "type", "level")
_SELINUX_DEFAULT = {"user": "system_u", "role": "system_r", "type": "container_t", "level": "s0"}


class Facts(NamedTuple):
    """What the configuration depends on outside the instance. Mappings are (inside, outside, count)."""

    machine: str = "x86_64"
    capabilities: tuple[str, ...] = tuple(NUMBERS)  # what this process may give away
    cgroup_parent: str = "/ovt"  # empty: cgroups cannot be made here
    device_rules: bool = True  # whether the device controller can be used
    rootless: bool = False
    uid_mappings: tuple[tuple[int, int, int], ...] = ()
    gid_mappings: tuple[tuple[int, int, int], ...] = ()
    init: str = ""  # a static init to put in front of the program
    seccomp: bool = True  # whether filters can be loaded


class User(NamedTuple):
    """Who the program runs as, looked up in the image's own files."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/root"


_ROOT = User()


class Node(NamedTuple):
    """A host device to show: `kind` is `c` or `b`."""

    path: str
    kind: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    permissions: str


def capabilities(spec: Spec, facts: Facts) -> tuple[list[str], list[str]]:
    """The bounding set of the program and, of it, what was asked for by name; UsageError for an unknown name."""
    added, dropped = _capability_names(spec.security.cap_add), _capability_names(spec.security.cap_drop)
    every = [name for name in NUMBERS if name in facts.capabilities]
    if spec.security.privileged or "ALL" in added:
        chosen = set(every)
    else:
        chosen = set() if "ALL" in dropped else set(DEFAULT_CAPABILITIES).intersection(every)
        missing = sorted(added.difference(every))
        if missing:
            raise HostError(
                f"{missing[0]} cannot be given: this process does not have it itself",
                hint="run ovt with more privileges, or leave the capability out",
            )
        chosen |= added
    chosen -= dropped
    named = added & chosen if "ALL" not in added else chosen
    return [name for name in NUMBERS if name in chosen], [name for name in NUMBERS if name in named]


def config(
    spec: Spec,
    id: str,
    name: str,
    rootfs: str,
    *,
    facts: Facts,
    user: User = _ROOT,
    nodes: Sequence[Node] = (),
    files: Sequence[tuple[str, str]] = (),
    seccomp: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The OCI configuration (config.json) of an instance.

    `files` are (host path, path inside) of generated files such as /etc/hosts; `seccomp` is the profile read from
    the owner's file, used instead of the default one.
    """
    bounding, named = capabilities(spec, facts)
    security = spec.security
    privileged = security.privileged
    network_host = spec.network == "host"
    result: dict[str, Any] = {
        "ociVersion": OCI_VERSION,
        "process": process(spec, name, facts, user, bounding, named),
        "root": {"path": rootfs, "readonly": spec.read_only},
        "hostname": spec.hostname or name,
        "mounts": _mounts(spec, facts, files),
    }
    linux: dict[str, Any] = {"namespaces": _namespaces(facts, network_host)}
    if facts.uid_mappings:
        linux["uidMappings"] = _mappings(facts.uid_mappings)
        linux["gidMappings"] = _mappings(facts.gid_mappings)
    if facts.cgroup_parent:
        # below a directory, or for the systemd manager SLICE:PREFIX:NAME
        linux["cgroupsPath"] = f"{facts.cgroup_parent}{'/' if facts.cgroup_parent.startswith('/') else ':'}{id}"
    resources = limits(spec.limits)
    if resources and not facts.cgroup_parent:
        raise HostError(
            f"limits ({', '.join(sorted(resources))}) need a cgroup, and none can be made here",
            hint="ovt check, or leave the limits out",
        )
    if facts.device_rules and facts.cgroup_parent:
        resources["devices"] = [{"allow": privileged, "access": "rwm"}] + [
            {"allow": True, "type": node.kind, "major": node.major, "minor": node.minor, "access": node.permissions}
            for node in nodes
        ]
    if resources:
        linux["resources"] = resources
    if nodes:
        linux["devices"] = [
            {
                "path": node.path,
                "type": node.kind,
                "major": node.major,
                "minor": node.minor,
                "fileMode": node.mode,
                "uid": 0 if facts.uid_mappings else node.uid,
                "gid": 0 if facts.uid_mappings else node.gid,
            }
            for node in nodes
        ]
    if spec.sysctls:
        linux["sysctl"] = dict(pair.split("=", 1) for pair in spec.sysctls)
    if not privileged:
        linux["maskedPaths"] = list(MASKED_PATHS)
        linux["readonlyPaths"] = list(READONLY_PATHS)
    if facts.seccomp and security.seccomp != "unconfined" and (seccomp is not None or not privileged):
        linux["seccomp"] = seccomp if seccomp is not None else seccomp_default.profile(facts.machine, bounding)
    label = selinux_label(security.label)
    if label:
        linux["mountLabel"] = label.replace(":container_t:", ":container_file_t:")
    result["linux"] = linux
    return result


def process(spec: Spec, name: str, facts: Facts, user: User, bounding: list[str], named: list[str]) -> dict[str, Any]:
    """The `process` object of the instance's own program."""
    command = [*(spec.entrypoint or ()), *spec.command]
    if not command:
        raise UsageError("the image names no program to run", f"give one: ovt run {spec.image} COMMAND")
    if spec.init:
        command = [INIT_TARGET, "--", *command]
    result: dict[str, Any] = {
        "terminal": spec.tty,
        "user": {"uid": user.uid, "gid": user.gid},
        "args": command,
        "env": environment(spec.env, spec.tty, user.home, spec.hostname or name),
        "cwd": spec.workdir or "/",
        "capabilities": capability_sets(user.uid, bounding, named),
        "noNewPrivileges": spec.security.no_new_privileges,
    }
    if user.groups:
        result["user"]["additionalGids"] = list(user.groups)
    if spec.ulimits:
        result["rlimits"] = [
            {"type": f"RLIMIT_{limit.name.upper()}", "soft": _rlimit(limit.soft), "hard": _rlimit(limit.hard)}
            for limit in spec.ulimits
        ]
    if spec.security.apparmor:
        result["apparmorProfile"] = spec.security.apparmor
    label = selinux_label(spec.security.label)
    if label:
        result["selinuxLabel"] = label
    return result


def capability_sets(uid: int, bounding: list[str], named: list[str]) -> dict[str, list[str]]:
    """The five sets. A program that is not root has only what was asked for by name; inheritable stays empty unless
    a program that is not root needs it for its ambient set (capabilities(7))."""
    if uid == 0:
        return {"bounding": bounding, "effective": bounding, "permitted": bounding, "inheritable": [], "ambient": []}
    return {"bounding": bounding, "effective": named, "permitted": named, "inheritable": named, "ambient": named}


def environment(pairs: Sequence[str], tty: bool, home: str, hostname: str) -> list[str]:
    """KEY=VALUE strings: the usual ones below `pairs`, where the last of a key wins."""
    result = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, "HOME": home, "container": "ovt"}
    if tty:
        result["TERM"] = "xterm"
    for pair in pairs:
        key, _, value = pair.partition("=")
        result[key] = value
    return [f"{key}={value}" for key, value in result.items()]


def limits(limits: Limits) -> dict[str, Any]:
    """The OCI `resources` object for limits; a limit that is not set is not in it."""
    result: dict[str, Any] = {}
    if limits.memory or limits.memory_swap:
        memory: dict[str, int] = {}
        if limits.memory:
            memory["limit"] = limits.memory
        if limits.memory_swap:
            memory["swap"] = limits.memory_swap
        result["memory"] = memory
    cpu: dict[str, Any] = {}
    if limits.cpus:
        cpu = {"quota": round(limits.cpus * CPU_PERIOD), "period": CPU_PERIOD}
    if limits.cpuset_cpus:
        cpu["cpus"] = limits.cpuset_cpus
    if cpu:
        result["cpu"] = cpu
    if limits.pids:
        result["pids"] = {"limit": limits.pids}
    return result


def limit_changes(before: Limits, after: Limits) -> dict[str, Any]:
    """The OCI `resources` object that turns the limits `before` into `after`; a limit taken away becomes -1."""
    result = limits(after)
    for section, old in limits(before).items():
        new = result.get(section)
        if new is None:
            new = result[section] = {}
        for key in old:
            if key not in new:
                new[key] = "" if key == "cpus" else -1
        if section == "cpu" and new.get("quota") == -1:
            new["period"] = CPU_PERIOD
        if new == old:
            del result[section]
    return result


def selinux_label(options: Sequence[str]) -> str:
    """The SELinux label for `type:…`, `level:…`, `user:…`, `role:…`; empty when none was asked for or `disable`."""
    if not options or "disable" in options:
        return ""
    parts = dict(_SELINUX_DEFAULT)
    for option in options:
        key, colon, value = option.partition(":")
        if not colon or key not in _SELINUX_PARTS:
            raise UsageError(
                f"label option {option!r} is not known", "disable, or one of user:, role:, type:, level: with a value"
            )
        parts[key] = value
    return ":".join(parts[key] for key in _SELINUX_PARTS)


def hosts_file(hostname: str, entries: Sequence[str]) -> str:
    """The text of /etc/hosts; `entries` are NAME:ADDRESS."""
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", f"127.0.1.1\t{hostname}"]
    for entry in entries:
        name, _, address = entry.partition(":")
        lines.append(f"{address}\t{name}")
    return "\n".join(lines) + "\n"


def _capability_names(names: Sequence[str]) -> set[str]:
    result = set()
    for name in names:
        upper = name.upper()
        if upper != "ALL":
            upper = upper if upper.startswith("CAP_") else f"CAP_{upper}"
            if upper not in NUMBERS:
                raise UsageError(f"there is no capability {name!r}", "capabilities(7) lists them")
        result.add(upper)
    return result


def _rlimit(value: int) -> int:
    return (1 << 64) - 1 if value < 0 else value


def _mappings(mappings: Sequence[tuple[int, int, int]]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": count} for inside, outside, count in mappings]


def _namespaces(facts: Facts, network_host: bool) -> list[dict[str, str]]:
    kinds = ["pid", "ipc", "uts", "mount"]
    if not network_host:
        kinds.append("network")
    if facts.cgroup_parent:
        kinds.append("cgroup")
    if facts.uid_mappings:
        kinds.append("user")
    return [{"type": kind} for kind in kinds]


def _mounts(spec: Spec, facts: Facts, files: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    privileged = spec.security.privileged
    writable = "rw" if privileged else "ro"
    terminal_gid = [] if facts.rootless and _inside(facts.gid_mappings) <= 5 else ["gid=5"]
    mounts = [
        _mount("proc", "/proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("tmpfs", "/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "devpts",
            "/dev/pts",
            "devpts",
            "nosuid",
            "noexec",
            "newinstance",
            "ptmxmode=0666",
            "mode=0620",
            *terminal_gid,
        ),
        _mount("shm", "/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", f"size={spec.shm_size}"),
        _mount("mqueue", "/dev/mqueue", "mqueue", "nosuid", "noexec", "nodev"),
    ]
    if spec.network == "host" and facts.uid_mappings:
        # a sysfs belongs to the owner of its network namespace: with the host's only the host's own can be shown
        mounts.append(_mount("/sys", "/sys", "bind", "rbind", "rprivate", "nosuid", "noexec", "nodev", "rro"))
    else:
        mounts.append(_mount("sysfs", "/sys", "sysfs", "nosuid", "noexec", "nodev", writable))
        if facts.cgroup_parent:
            flags = ("nosuid", "noexec", "nodev", "relatime", writable)
            mounts.append(_mount("cgroup", "/sys/fs/cgroup", "cgroup", *flags))
    if spec.init:
        if not facts.init:
            raise HostError("--init needs catatonit or tini on the host", hint="apt-get install catatonit")
        mounts.append(_mount(facts.init, INIT_TARGET, "bind", "bind", "ro", "nosuid", "nodev"))
    taken = {volume.target for volume in spec.volumes}
    for source, target in files:
        if target not in taken:
            mounts.append(_mount(source, target, "bind", "bind", "rprivate", "nosuid", "noexec", "nodev"))
    if spec.read_only:
        for target in ("/run", "/tmp", "/var/tmp"):
            if target not in taken:
                mounts.append(_mount("tmpfs", target, "tmpfs", "nosuid", "nodev", "mode=1777"))
    # a shallower target first: a volume must not cover one that lies below it
    for volume in sorted(spec.volumes, key=lambda volume: volume.target.rstrip("/").count("/")):
        mounts.append(_volume(volume))
    return mounts


def _mount(source: str, target: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _inside(mappings: Sequence[tuple[int, int, int]]) -> int:
    return sum(count for _, _, count in mappings)


def _volume(volume: Volume) -> dict[str, Any]:
    if not volume.source:
        return _mount("tmpfs", volume.target, "tmpfs", "nosuid", "nodev", *volume.options)
    unknown = [option for option in volume.options if option.partition("=")[0] not in mount_options.NAMES]
    if unknown:
        raise UsageError(f"volume option {unknown[0]!r} is not known", "such as ro, nodev, noexec, rshared, idmap")
    options = list(volume.options)
    if not {"bind", "rbind"}.intersection(options):
        options.insert(0, "rbind")
    if not any(option.endswith(("private", "shared", "slave", "unbindable")) for option in options):
        options.append("rprivate")
    return _mount(volume.source, volume.target, "bind", *options)
