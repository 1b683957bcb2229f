"""The last steps of a container process, written as a tape: from "in its namespaces" to execve.

`prepare` and `finish` are shared by the container's first process and by `exec`. What can be set from outside
(limits, OOM score, scheduling) is set from outside by `apply_from_outside`, with the runtime's rights.
"""

from __future__ import annotations

import posix
from _struct import pack
from errno import EACCES, ENOENT, EPERM

from ovt.errors import ConfigError, HostError, refused
from ovt.kernel import capabilities
from ovt.kernel import syscalls as sc

from .devices import host_id
from .tape import IGNORE_ERROR, SKIP_IF_OK, Pointer, Tape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .labels import Labels

PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
_CLOSE_RANGE_CLOEXEC = 4
_SECCOMP_SET_MODE_FILTER = 1
_POLLIN = 1
_INTERNAL_SIGNALS = (32, 33)  # posix_spawn of glibc leaves the two it uses itself ignored in the child
_TIOCSCTTY = 0x540E

RLIMITS = {
    name: number
    for number, name in enumerate(
        (
            "RLIMIT_CPU",
            "RLIMIT_FSIZE",
            "RLIMIT_DATA",
            "RLIMIT_STACK",
            "RLIMIT_CORE",
            "RLIMIT_RSS",
            "RLIMIT_NPROC",
            "RLIMIT_NOFILE",
            "RLIMIT_MEMLOCK",
            "RLIMIT_AS",
            "RLIMIT_LOCKS",
            "RLIMIT_SIGPENDING",
            "RLIMIT_MSGQUEUE",
            "RLIMIT_NICE",
            "RLIMIT_RTPRIO",
            "RLIMIT_RTTIME",
        )
    )
}
_POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
_SCHED_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
_PERSONALITIES = {"LINUX": 0x0, "LINUX32": 0x8}
_MEMORY_MODES = {
    "MPOL_DEFAULT": 0,
    "MPOL_PREFERRED": 1,
    "MPOL_BIND": 2,
    "MPOL_INTERLEAVE": 3,
    "MPOL_LOCAL": 4,
    "MPOL_PREFERRED_MANY": 5,
    "MPOL_WEIGHTED_INTERLEAVE": 6,
}
_MEMORY_FLAGS = {"MPOL_F_STATIC_NODES": 1 << 15, "MPOL_F_RELATIVE_NODES": 1 << 14, "MPOL_F_NUMA_BALANCING": 1 << 13}


def apply_from_outside(pid: int, process: dict[str, Any]) -> None:
    """Set what the runtime may set on another process: rlimits, OOM score, I/O priority, scheduler."""
    for limit in process.get("rlimits") or []:
        try:
            sc.prlimit(pid, RLIMITS[limit["type"]], limit["soft"], limit["hard"])
        except OSError as error:
            hint = "raising a hard limit needs CAP_SYS_RESOURCE on the host" if error.errno == EPERM else ""
            raise HostError(
                f"error setting rlimit {limit['type']} to {limit['soft']}:{limit['hard']}: "
                f"{posix.strerror(error.errno or 0).lower()}",
                error.errno or 0,
                hint,
            ) from None
    score = process.get("oomScoreAdj")
    if score is not None:
        _write_oom_score(pid, score)
    priority = process.get("ioPriority")
    if priority:
        try:
            sc.ioprio_set(pid, _IO_CLASSES[priority["class"]] << 13 | (priority.get("priority") or 0))
        except OSError as error:
            raise refused("set ioPriority", error) from None
    if process.get("scheduler"):
        _set_scheduler(pid, process["scheduler"])


def _write_oom_score(pid: int, score: int) -> None:
    from ovt.kernel import procfs

    try:
        procfs.write(f"/proc/{pid}/oom_score_adj", str(score))
    except OSError as error:
        if error.errno == EACCES and posix.geteuid() != 0:
            return  # rootless: a score below the caller's own cannot be had, and engines ask for it by habit
        raise refused(f"set oomScoreAdj to {score}", error) from None


def _set_scheduler(pid: int, scheduler: dict[str, Any]) -> None:
    flags = 0
    for name in scheduler.get("flags") or []:
        flags |= _SCHED_FLAGS[name]
    policy = scheduler["policy"]
    try:
        sc.sched_setattr(
            pid,
            _POLICIES[policy],
            flags,
            scheduler.get("nice") or 0,
            scheduler.get("priority") or 0,
            scheduler.get("runtime") or 0,
            scheduler.get("deadline") or 0,
            scheduler.get("period") or 0,
        )
    except OSError as error:
        hint = ""
        if error.errno == EPERM and policy in ("SCHED_FIFO", "SCHED_RR"):
            hint = "a cgroup of version 1 needs linux.resources.cpu.realtimeRuntime, the host CAP_SYS_NICE"
        raise refused(f"sched_setattr: {policy}", error, hint) from None


def parse_cpus(text: str) -> set[int]:
    """A list such as `0-3,7` as a set of CPU numbers; OvtError when it is not one."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError("$.process.execCPUAffinity", f"{text!r} is not a list of CPUs")
        cpus.update(range(int(first), int(last if dash else first) + 1))
    return cpus


def set_affinity(pid: int, cpus: str | None) -> None:
    """sched_setaffinity for execCPUAffinity's `initial` or `final`."""
    if not cpus:
        return
    try:
        posix.sched_setaffinity(pid, parse_cpus(cpus))
    except OSError as error:
        raise refused(f"set execCPUAffinity {cpus}", error, "are these CPUs there, and in the cpuset?") from None


class Final:
    """What `finish` needs besides config.process."""

    __slots__ = (
        "process",
        "program",
        "user_namespace",
        "no_setgroups",
        "fifo",
        "error_file",
        "seccomp",
        "lowest",
        "labels",
    )

    def __init__(self, process: dict[str, Any], program: str, lowest: int) -> None:
        self.process = process
        self.program = program  # the path to execute, already found
        self.lowest = lowest  # descriptors from here on are closed
        self.user_namespace = False
        self.no_setgroups = False
        self.fifo = -1  # wait for a byte here before execve
        self.error_file = -1  # failures after the wait are written here
        self.seccomp: tuple[bytes, int, bool] | None = None  # BPF program, flags, has a listener
        self.labels: Labels | None = None  # of AppArmor and SELinux


def own_null(tape: Tape, stdio: tuple[int, int, int]) -> None:
    """Put the container's own /dev/null in the place of the host's: CRIU cannot save a file of a foreign mount."""
    for number, fd in enumerate(stdio):
        status = posix.fstat(fd)
        if status.st_mode & 0o170000 == 0o020000 and status.st_rdev == posix.makedev(1, 3):
            # an image's own idea of /dev/null must not block us
            flags = posix.O_RDWR | posix.O_NONBLOCK | posix.O_NOFOLLOW
            path = tape.text("/dev/null")
            null = tape.call("open /dev/null", "openat", sc.AT_FDCWD, path, flags, flags=IGNORE_ERROR)
            tape.call("reopen /dev/null", "dup3", null, number, 0, flags=IGNORE_ERROR)
            tape.call("close", "close", null, flags=IGNORE_ERROR)


def own_stdio(stdio: tuple[int, int, int], process: dict[str, Any], linux: dict[str, Any]) -> None:
    """Give pipes and files that the process gets as 0, 1 and 2 to its user, who must be able to reopen them.

    Devices are left alone: /dev/null above all is the host's (CVE-2026-47766).
    """
    user = process.get("user") or {}
    uid, gid = user.get("uid") or 0, user.get("gid") or 0
    if not uid:
        return
    uid, gid = host_id(uid, linux.get("uidMappings")), host_id(gid, linux.get("gidMappings"))
    for fd in stdio:
        status = posix.fstat(fd)
        if status.st_mode & 0o170000 in (0o100000, 0o010000) and status.st_uid != uid:
            try:
                posix.chown(fd, uid, gid)
            except OSError:
                pass  # a read-only or foreign filesystem: the descriptor itself still works


def become_session(tape: Tape, terminal: bool) -> None:
    """A session of its own; with a terminal, which rides along as descriptor 0, as its controlling one."""
    from .tape import Received

    tape.call("setsid", "setsid")
    if terminal:
        for fd in range(3):
            tape.call("dup terminal", "dup3", Received(0), fd, 0)
        tape.call("set controlling terminal", "ioctl", 0, _TIOCSCTTY, 0)
        tape.call("close", "close", Received(0), flags=IGNORE_ERROR)


def finish(tape: Tape, final: Final, sync_fd: int) -> None:
    """Append everything from the umask to execve, in the order in which rights are given up."""
    process = final.process
    user = process.get("user") or {}
    no_new_privs = bool(process.get("noNewPrivileges"))
    labels = final.labels.open(tape) if final.labels else []
    default = tape.data(bytes(32))
    for number in _INTERNAL_SIGNALS:
        tape.call(f"reset signal {number}", "rt_sigaction", number, default, 0, 8)
    umask = user.get("umask")
    tape.call("set umask", "umask", 0o022 if umask is None else umask)
    if final.seccomp and not no_new_privs:
        _seccomp(tape, final.seccomp, sync_fd)  # needs CAP_SYS_ADMIN, so before it is dropped
    cwd = process.get("cwd") or "/"
    # as root first, for directories the user may not reach but was put into, as runc does; then as the user
    as_root = tape.call("chdir", "chdir", tape.text(cwd), flags=IGNORE_ERROR)
    _identity(tape, final, user, process.get("capabilities") or {})
    what = f'chdir to cwd ("{cwd}") set in config.json failed'
    tape.call(what, "chdir", tape.text(cwd), flags=SKIP_IF_OK, other=as_root.index)
    # a directory outside the container's root reads "(unreachable)…" (CVE-2024-21626)
    buffer = tape.data(bytes(4096))
    tape.call(f"current directory {cwd}", "getcwd", buffer, 4096)
    tape.check_byte(f"current directory {cwd} is outside of the container's root", buffer, ord("/"), ENOENT)
    if no_new_privs:
        tape.call("set no_new_privs", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for fd, text in labels:
        from .labels import write

        write(tape, fd, text)
    tape.call("close_range", "close_range", final.lowest, 0xFFFFFFFF, _CLOSE_RANGE_CLOEXEC)
    listener = bool(final.seccomp and final.seccomp[2])
    if final.seccomp and no_new_privs and listener:
        _seccomp(tape, final.seccomp, sync_fd)
    tape.report()
    if final.fifo >= 0:
        tape.report_to(final.error_file)
        pollfd = tape.data(pack("ihh", final.fifo, _POLLIN, 0))
        tape.call("wait for start", "poll", pollfd, 1, 0, 0, 8)
        tape.call("read start", "read", final.fifo, buffer, 1)
    if final.seccomp and no_new_privs and not listener:
        _seccomp(tape, final.seccomp, sync_fd)  # last, so that the filter need allow execve only
    name = process["args"][0]
    tape.execve(f'exec: "{name}"', final.program, process["args"], process.get("env") or [])


def _seccomp(tape: Tape, seccomp: tuple[bytes, int, bool], sync_fd: int) -> None:
    bpf, flags, listener = seccomp
    if not bpf:
        return
    fprog = tape.data(pack("=HHIQ", len(bpf) // 8, 0, 0, 0))
    tape.relocate(fprog, 8, tape.data(bpf))
    fd = tape.call("load seccomp filter", "seccomp", _SECCOMP_SET_MODE_FILTER, flags, fprog)
    if listener:
        # the runtime takes the listener with pidfd_getfd and then sends a byte
        tape.report(fd)
        tape.call("wait for the seccomp agent", "read", sync_fd, tape.data(bytes(8)), 1)


def _identity(tape: Tape, final: Final, user: dict[str, Any], sets: dict[str, Any]) -> None:
    """Groups, ids and the five capability sets (capabilities(7)); nothing is inheritable that is not configured."""
    allowed = ~0 if final.user_namespace else sc.capget()
    mask = {
        name: capabilities.mask(sets.get(name) or []) & allowed
        for name in ("bounding", "effective", "permitted", "inheritable", "ambient")
    }
    for number in range(capabilities.last_cap() + 1):
        if not mask["bounding"] >> number & 1:
            tape.call("drop bounding capability", "prctl", PR_CAPBSET_DROP, number, 0, 0, 0)
    tape.call("keep capabilities", "prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    groups = user.get("additionalGids") or []
    if not final.no_setgroups:
        tape.call("setgroups", "setgroups", len(groups), tape.data(pack(f"{len(groups)}I", *groups)))
    uid, gid = user.get("uid") or 0, user.get("gid") or 0
    tape.call(f"set gid {gid}", "setresgid", gid, gid, gid)
    tape.call(f"set uid {uid}", "setresuid", uid, uid, uid)
    header = tape.data(pack("Ii", 0x20080522, 0))
    three = (mask["effective"] & mask["permitted"], mask["permitted"], mask["inheritable"])
    low = [value & 0xFFFFFFFF for value in three]
    high = [value >> 32 & 0xFFFFFFFF for value in three]
    tape.call("set capabilities", "capset", header, tape.data(pack("6I", *low, *high)))
    tape.call("clear ambient capabilities", "prctl", PR_CAP_AMBIENT, 4, 0, 0, 0, flags=IGNORE_ERROR)
    ambient = mask["ambient"] & mask["permitted"] & mask["inheritable"]
    for number in range(ambient.bit_length()):
        if ambient >> number & 1:
            tape.call("raise ambient capability", "prctl", PR_CAP_AMBIENT, 2, number, 0, 0)


def personality(tape: Tape, linux: dict[str, Any]) -> None:
    """linux.personality: the execution domain."""
    entry = linux.get("personality")
    if entry:
        tape.call("set personality", "personality", _PERSONALITIES[entry["domain"]])


def memory_policy(tape: Tape, linux: dict[str, Any]) -> None:
    """linux.memoryPolicy: set_mempolicy(2)."""
    entry = linux.get("memoryPolicy")
    if not entry or not entry.get("mode"):
        return
    mode = _MEMORY_MODES[entry["mode"]]
    for flag in entry.get("flags") or []:
        mode |= _MEMORY_FLAGS[flag]
    nodes = parse_cpus(entry["nodes"]) if entry.get("nodes") else set()
    mask: int | Pointer = 0
    length = 0
    if nodes:
        words = max(nodes) // 64 + 1
        bits = sum(1 << node for node in nodes)
        mask = tape.data(bits.to_bytes(8 * words, "little"))
        length = 64 * words + 1  # the kernel counts one bit more than it reads (set_mempolicy(2), BUGS)
    tape.call("set memory policy", "set_mempolicy", mode, mask, length)
