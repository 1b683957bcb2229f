"""Whether this host can run containers, one check for each thing they need, each failure with what mends it.

Every check looks at the thing itself where that is cheap and harmless: the overlay is really mounted (detached, seen
by nobody), the library is really loaded. Nothing is changed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ovt.engine.container import facts, view
from ovt.errors import OvtError
from ovt.kernel import capabilities, procfs


class Check(NamedTuple):
    """One finding: `state` is ok, warn (something optional is missing) or fail."""

    name: str
    state: str
    detail: str
    fix: str = ""


_BIN = f"{os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))}/_bin"
_KERNEL = (5, 12)  # mount_setattr(2); openat2(2) came with 5.6
_USEFUL = ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "CAP_NET_ADMIN", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN")
_LACKS = {
    "CAP_SYS_RESOURCE": "--ulimit cannot raise a hard limit",
    "CAP_NET_ADMIN": "the loopback device of a container stays down",
    "CAP_MKNOD": "device nodes are shown by bind mounts only",
}


def checks(data: str, run: str) -> Iterator[Check]:
    """All findings; `data` is where instances are kept, `run` where their run-time state is."""
    for check in _CHECKS:
        yield from check(data, run)


def _programs(data: str, run: str) -> Iterator[Check]:
    missing = [name for name in ("ovt-init", "ovt-supervisor") if not os.access(f"{_BIN}/{name}", os.X_OK)]
    if missing:
        yield Check(
            "programs", "fail", f"{', '.join(missing)} missing in {_BIN}", "scripts/setup, or install ovt again"
        )
    else:
        yield Check("programs", "ok", "ovt-init, ovt-supervisor")


def _kernel(data: str, run: str) -> Iterator[Check]:
    release = os.uname().release
    major, _, rest = release.partition(".")
    minor = "".join(c for c in rest.split(".")[0] if c.isdigit())
    if (int(major), int(minor or 0)) < _KERNEL:
        wanted = ".".join(map(str, _KERNEL))
        yield Check(
            "kernel", "fail", f"Linux {release} is older than {wanted}", f"install a kernel of {wanted} or later"
        )
    else:
        yield Check("kernel", "ok", f"Linux {release}")


def _namespaces(data: str, run: str) -> Iterator[Check]:
    wanted = ("mnt", "pid", "net", "ipc", "uts", "cgroup", "user")
    missing = [name for name in wanted if not os.path.exists(f"/proc/self/ns/{name}")]
    if missing:
        options = " ".join(f"CONFIG_{name.upper()}_NS" for name in missing)
        yield Check("namespaces", "fail", f"the kernel has no {', '.join(missing)}", f"a kernel with {options}")
    else:
        yield Check("namespaces", "ok", " ".join(wanted))


def _user_namespaces(data: str, run: str) -> Iterator[Check]:
    state, fix = ("fail", "as root: ") if facts.rootless() else ("warn", "")
    if _number("/proc/sys/user/max_user_namespaces", 1) == 0:
        yield Check("user namespaces", state, "forbidden", f"{fix}sysctl -w user.max_user_namespaces=65536")
        return
    if not facts.rootless():
        yield Check("user namespaces", "ok", "allowed")
        return
    for name in ("kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns"):
        wanted = 1 if name.endswith("clone") else 0
        if _number(f"/proc/sys/{name}", wanted) != wanted:
            key = name.replace("/", ".")
            yield Check("user namespaces", "fail", f"{key} forbids them", f"as root: sysctl -w {key}={wanted}")
            return
    yield Check("user namespaces", "ok", "allowed for this user")
    for program in ("newuidmap", "newgidmap"):
        if not shutil.which(program):
            yield Check("id mapping", "fail", f"{program} is missing", "as root: apt-get install uidmap")
            return
    try:
        uids, _ = facts.own_mappings()
    except OvtError as error:
        yield Check("id mapping", "fail", error.message, error.hint)
        return
    count = sum(size for _, _, size in uids) - 1
    if count < 65535:
        yield Check("id mapping", "warn", f"only {count} subordinate ids", "images use up to 65535: see usermod(8)")
    else:
        yield Check("id mapping", "ok", f"{count} subordinate ids")


def _cgroups(data: str, run: str) -> Iterator[Check]:
    version, found = facts.cgroup_version(), facts.find_cgroups(run)
    if version == "none":
        yield Check(
            "cgroup", "warn", "not mounted: no limits, no stats, no pause", "mount -t cgroup2 none /sys/fs/cgroup"
        )
        return
    if found.manager == "disabled":
        fix = "a systemd user session on cgroup v2 delegates one" if facts.rootless() else "mount it writable"
        yield Check("cgroup", "warn", f"{version}, not writable: no limits, no stats, no pause", fix)
        return
    yield Check("cgroup", "ok", f"{version}, by {found.manager} below {found.parent}")
    if version == "v2":
        have = set(procfs.read("/sys/fs/cgroup/cgroup.controllers").split())
        wanted = {"memory", "cpu", "pids", "cpuset", "io"}
    else:
        have = {name for entry in os.listdir("/sys/fs/cgroup") for name in entry.split(",")}
        wanted = {"memory", "cpu", "pids", "cpuset", "blkio", "freezer", "devices"}
    missing = sorted(wanted - have)
    if missing:
        fix = "boot with cgroup_enable=memory" if "memory" in missing else "mount them, or enable them in the kernel"
        yield Check("cgroup controllers", "warn", f"without {', '.join(missing)}", fix)
    else:
        yield Check("cgroup controllers", "ok", " ".join(sorted(wanted)))


def _overlay(data: str, run: str) -> Iterator[Check]:
    try:
        os.makedirs(data, mode=0o700, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".check-", dir=data)
    except OSError as error:
        yield Check("data directory", "fail", f"{data}: {error.strerror}", "choose another with --data-root")
        return
    try:
        for name in ("lower", "upper", "work"):
            os.mkdir(f"{scratch}/{name}")
        if facts.rootless():
            from ovt.kernel.userns import run_mapped

            run_mapped(*facts.own_mappings(), lambda: os.close(_mount(scratch, True)))
        else:
            os.close(_mount(scratch, False))
        yield Check("overlay", "ok", f"works in {data}")
    except OvtError as error:
        fix = "modprobe overlay, or a --data-root on ext4, xfs or tmpfs"
        yield Check("overlay", "fail", error.message, error.hint or fix)
    finally:
        shutil.rmtree(scratch, ignore_errors=facts.rootless())


def _mount(scratch: str, rootless: bool) -> int:
    return view.resting([f"{scratch}/lower"], f"{scratch}/upper", f"{scratch}/work", rootless)


def _seccomp(data: str, run: str) -> Iterator[Check]:
    from ovt.kernel import seccomp

    if not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        yield Check("seccomp", "warn", "the kernel has no filters", "a kernel with CONFIG_SECCOMP_FILTER")
        return
    try:
        seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}, cache_dir=None)
        yield Check("seccomp", "ok", "libseccomp works")
    except OvtError as error:
        yield Check("seccomp", "fail", error.message, error.hint or "apt-get install libseccomp2")


def _capabilities(data: str, run: str) -> Iterator[Check]:
    if facts.rootless():
        return
    line = next(line for line in procfs.read("/proc/self/status").splitlines() if line.startswith("CapEff"))
    have = capabilities.names_of(int(line.split()[1], 16))
    missing = [name for name in _USEFUL if name not in have]
    if "CAP_SYS_ADMIN" in missing:
        yield Check("capabilities", "fail", "without CAP_SYS_ADMIN nothing can be mounted", "run it as real root")
    elif missing:
        reasons = "; ".join(_LACKS.get(name, f"without {name}") for name in missing)
        yield Check("capabilities", "warn", f"without {', '.join(missing)}: {reasons}", "run it outside a container")
    else:
        yield Check("capabilities", "ok", "all that are needed")


def _security_modules(data: str, run: str) -> Iterator[Check]:
    active = [
        name
        for name, path in (
            ("AppArmor", "/sys/module/apparmor/parameters/enabled"),
            ("SELinux", "/sys/fs/selinux/enforce"),
        )
        if os.path.exists(path) and procfs.read(path).strip() in {"Y", "1", "0"}
    ]
    yield Check(
        "security modules", "ok", " ".join(active) or "none: --security-opt apparmor= and label= have no effect"
    )


def _helpers(data: str, run: str) -> Iterator[Check]:
    from ovt.image import busybox

    try:
        yield Check("image busybox", "ok", busybox.find()[0])
    except OvtError as error:
        yield Check("image busybox", "warn", error.message, error.hint)
    init = facts.find_init()
    if init:
        yield Check("--init", "ok", init)
    else:
        yield Check("--init", "warn", "neither catatonit nor tini is installed", "apt-get install catatonit")
    if shutil.which("zstd"):
        yield Check("zstd archives", "ok", shutil.which("zstd") or "")
    else:
        yield Check("zstd archives", "warn", "zstd is not installed", "apt-get install zstd")


def _number(path: str, default: int) -> int:
    try:
        return int(procfs.read(path))
    except FileNotFoundError:
        return default


_CHECKS: tuple[Callable[[str, str], Iterator[Check]], ...] = (
    _programs,
    _kernel,
    _namespaces,
    _user_namespaces,
    _cgroups,
    _overlay,
    _seccomp,
    _capabilities,
    _security_modules,
    _helpers,
)
