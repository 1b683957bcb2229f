"""Why a machine cannot move: everything that can be found before anything starts, on both hosts, each with a remedy.

What QEMU alone knows is asked of QEMU; what it would only tell half-way (a missing bridge, a full disk, a name that is
taken) is looked up here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ovt.engine.vm import features, migration
from ovt.engine.vm.hardware import VERSION
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.errors import NotFound, OvtError
from ovt.machines.moving import Blocker, Plan

if TYPE_CHECKING:
    from ovt.host import Host

USERFAULTFD = "/dev/userfaultfd"
_OVERHEAD = 256 << 20  # bytes that QEMU needs beside the guest's memory


def at_source(qmp: Qmp, hardware: Mapping[str, Any], home: str) -> list[Blocker]:
    """What this host knows, disks apart (moving.arrange)."""
    found = []
    for device in hardware.get("hostdevs", ()):
        why = "a device of this host cannot move with the machine"
        found.append(Blocker(f"host device {device['id']}", why, f"detach {device['id']}"))
    for share in hardware.get("shares", ()):
        why = "a shared directory belongs to this host"
        found.append(Blocker(f"share {share.get('id', '')}".rstrip(), why, "detach it, or use a network file system"))
    with suppress(FileNotFoundError):
        if count := len(os.listdir(f"{home}/snapshots")):
            why = f"its {count} snapshot{'s' if count > 1 else ''} would stay behind"
            found.append(Blocker("snapshots", why, "delete them, or export them first"))
    known = bool(found)
    for reason in migration.blocked_reasons(qmp):
        if not known:  # else QEMU says of the same device that it cannot be migrated
            found.append(Blocker("QEMU", reason[:1].lower() + reason[1:], "detach that device"))
    return found


def settings_refused(qmp: Qmp, settings: migration.Settings) -> list[Blocker]:
    """Whether QEMU takes these settings; they are not in force afterwards."""
    before = migration.parameters(qmp)
    try:
        migration.configure(qmp, settings)
    except QmpError as error:
        return [Blocker("settings", error.message, "other options of migrate")]
    finally:
        migration.deconfigure(qmp, before)
    return []


def cpu_flags(path: str = "/proc/cpuinfo") -> tuple[str, ...]:
    """What this host's processors can do, in the kernel's words."""
    with open(path, encoding="ascii", errors="replace") as file:
        line = next((line for line in file if line.startswith(("flags", "Features"))), ":")
    return tuple(sorted(line.partition(":")[2].split()))


def at_target(host: Host, plan: Plan) -> list[Blocker]:
    """What the receiving host lacks for this machine."""
    hardware = plan.hardware
    found = _names(host, plan)
    if hardware.get("version") != VERSION:
        why = f"its hardware record has version {hardware.get('version')}, ovt here knows {VERSION}"
        return [*found, Blocker("ovt", why, "the same ovt on both hosts")]
    found += _qemu(host, plan)
    found += _room(host, plan)
    found += _networks(hardware.get("nics", ()))
    if hardware.get("cid") and not os.path.exists("/dev/vhost-vsock"):
        found.append(Blocker("vsock", "there is no /dev/vhost-vsock", "modprobe vhost_vsock"))
    if hardware.get("hugepages"):
        free = _huge()
        if free < hardware["memory"]:
            why = f"{free >> 20} MiB of free huge pages, and {hardware['memory'] >> 20} are needed"
            found.append(Blocker("huge pages", why, "sysctl vm.nr_hugepages=N"))
    return found


def _names(host: Host, plan: Plan) -> list[Blocker]:
    found = []
    name, id = plan.instance.name, plan.instance.id
    with suppress(NotFound):
        taken = host.store.resolve(name)
        if taken != id or not plan.new_id:
            found.append(Blocker("name", f"{name!r} is taken by {taken}", f"rename or delete {name} there"))
            return found
    if not plan.new_id and os.path.isdir(host.store.home(id)):
        found.append(Blocker("id", f"{id} is there already", "--new-id gives it another there"))
    return found


def _qemu(host: Host, plan: Plan) -> list[Blocker]:
    hardware = plan.hardware
    try:
        known = host.vms.features
    except OvtError as error:
        return [Blocker("QEMU", error.message, error.hint)]
    found = []
    if hardware["machine"] not in known.machines:
        version = ".".join(map(str, known.version))
        why = f"QEMU {version} there has no {hardware['machine']}"
        found.append(Blocker("machine type", why, "a QEMU that is not older than this host's"))
    reason = features.why_no_kvm() if hardware["accel"] == "kvm" else ""
    if reason or hardware["accel"] not in known.accels:
        why = f"the machine runs on {hardware['accel']}: {reason or 'QEMU there does not have it'}"
        found.append(Blocker("accelerator", why, "a host with it"))
    missing = sorted(set(plan.flags) - set(cpu_flags()))
    if missing:
        shown = " ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
        why = f"the guest has this host's own processor (host), and the other lacks {shown}"
        found.append(Blocker("processor", why, "a CPU model that both have (--cpu) at the machine's next start"))
    if plan.settings.postcopy and not known.postcopy:
        found.append(Blocker("post-copy", "QEMU there cannot", "leave out --postcopy"))
    elif plan.settings.postcopy and not _faults_by_user():
        why = f"there is no {USERFAULTFD}, and vm.unprivileged_userfaultfd is 0"
        found.append(Blocker("post-copy", why, "sysctl vm.unprivileged_userfaultfd=1 there, or leave out --postcopy"))
    if plan.settings.multifd and not known.multifd:
        found.append(Blocker("multifd", "QEMU there cannot", "leave out --multifd"))
    return found


def _faults_by_user() -> bool:
    """Whether QEMU, which has no privilege, may fetch pages when the guest touches them (userfaultfd(2))."""
    if os.path.exists(USERFAULTFD):
        return True
    with suppress(FileNotFoundError), open("/proc/sys/vm/unprivileged_userfaultfd", encoding="ascii") as file:
        return file.read().strip() == "1"
    return False


def _room(host: Host, plan: Plan) -> list[Blocker]:
    found = []
    needed = plan.hardware["memory"] + _OVERHEAD
    free = _meminfo("MemAvailable") + _meminfo("SwapFree")
    if not plan.hardware.get("hugepages") and needed > free:
        found.append(Blocker("memory", f"{needed >> 20} MiB are needed, {free >> 20} are free", "a larger host"))
    os.makedirs(host.data, mode=0o700, exist_ok=True)
    info = os.statvfs(host.data)
    needed = sum(image.size for image in plan.images) + sum(file.size for file in plan.files)
    if needed > info.f_bavail * info.f_frsize:
        space = f"{needed >> 20} MiB are needed in {host.data}, {info.f_bavail * info.f_frsize >> 20} are free"
        found.append(Blocker("disk space", space, "make room, or another --data-root there"))
    return found


def _networks(nics: Iterable[Mapping[str, Any]]) -> list[Blocker]:
    found = []
    for nic in nics:
        kind, _, name = str(nic.get("network", "")).partition(":")
        if kind in {"bridge", "tap", "macvtap"} and not os.path.exists(f"/sys/class/net/{name}"):
            what = {"bridge": "bridge", "tap": "tap device", "macvtap": "network device"}[kind]
            found.append(Blocker(f"network card {nic['id']}", f"there is no {what} {name}", "make it there"))
        elif kind == "bridge" and not os.path.isdir(f"/sys/class/net/{name}/bridge"):
            found.append(Blocker(f"network card {nic['id']}", f"{name} is no bridge there", "another network"))
        for forward in nic.get("forwards", ()):
            if not _bindable(forward):
                why = f"{forward}: that port of the other host is taken"
                found.append(Blocker(f"network card {nic['id']}", why, "free it there, or remove the forwarding"))
    return found


def _bindable(forward: str) -> bool:
    protocol, _, rest = forward.partition(":")
    address, _, ports = rest.rpartition(":")[0].rpartition(":")
    address = address.strip("[]") or "0.0.0.0"
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, int(ports)))
        except OSError:
            return False
    return True


def _meminfo(key: str) -> int:
    """Bytes of an entry of /proc/meminfo in kB, 0 without it."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) << 10
    return 0


def _huge() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        values = dict(line.split(":", 1) for line in file)
    free = int(values.get("HugePages_Free", "0").split()[0])
    return free * (int(values.get("Hugepagesize", "0").split()[0]) << 10)
