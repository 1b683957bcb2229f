"""What this host's QEMU can do and whether the processor helps it: probed once, kept beside the run-time state.

Features come from QMP's own description of itself (query-qmp-schema), never from version numbers; the answer is kept
under the program's path, size and modification time, because asking costs a start of QEMU (about 100 ms).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from typing import Any, NamedTuple

from ovt.engine.vm.qmp import Qmp
from ovt.errors import HostError, OvtError, UsageError

OLDEST = (7, 2)
_LAYOUT = 1  # counts changes of what is kept
_PROBE_SECONDS = 30.0
_HINT = "apt-get install qemu-system-x86 qemu-utils"


class Features(NamedTuple):
    """Of one QEMU."""

    program: str
    version: tuple[int, int, int]
    machines: tuple[str, ...]  # versioned names
    q35: str  # the versioned machine type that `q35` means
    accels: tuple[str, ...]
    io_uring: bool  # aio=io_uring of file nodes
    mapped_ram: bool
    ignore_shared: bool
    multifd: bool
    postcopy: bool
    background_snapshot: bool
    stream_netdev: bool  # netdev stream, for passt
    user_netdev: bool  # slirp is compiled in
    vfio_fd: bool  # VFIO devices by descriptor (iommufd)
    devices: tuple[str, ...]  # of those that ovt may use


_DEVICES = (
    "virtio-blk-pci", "virtio-scsi-pci", "nvme", "virtio-net-pci", "e1000e", "e1000", "igb", "rtl8139",
    "virtio-rng-pci", "virtio-balloon-pci", "virtio-mem-pci", "virtio-9p-pci", "vhost-user-fs-pci", "vhost-vsock-pci",
    "pvpanic-pci", "i6300esb", "vmgenid", "vfio-pci", "pc-dimm", "VGA", "virtio-serial-pci",
)  # fmt: skip


def find_program() -> str:
    """The QEMU of this host: $OVT_QEMU or qemu-system-ARCHITECTURE; HostError without one."""
    name = os.environ.get("OVT_QEMU") or f"qemu-system-{os.uname().machine}"
    path = shutil.which(name) or next(
        (f"{d}/{name}" for d in ("/usr/bin", "/usr/libexec") if os.access(f"{d}/{name}", os.X_OK)), ""
    )
    if not path:
        raise HostError(f"there is no {name} on this host, and virtual machines run on it", hint=_HINT)
    return os.path.realpath(path)


def probe(cache: str) -> Features:
    """The features of this host's QEMU; the answer is kept in the directory `cache`. HostError when it is too old."""
    program = find_program()
    info = os.stat(program)
    key = [_LAYOUT, program, info.st_size, info.st_mtime_ns]
    path = f"{cache}/qemu.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(path, encoding="utf-8") as file:
            kept = json.load(file)
        if kept["key"] == key:
            return _unpack(kept["features"])
    features = _ask(program)
    os.makedirs(cache, mode=0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"key": key, "features": features._asdict()}, file)
    os.rename(temporary, path)
    return features


def _unpack(data: dict[str, Any]) -> Features:
    tupled: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    return Features(**tupled)


def _ask(program: str) -> Features:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        command = [
            program, "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S",
            "-chardev", f"socket,id=qmp,fd={number}", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        with subprocess.Popen(
            command, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as qemu:
            theirs.close()
            try:
                features = _questions(program, Qmp(ours))
            except (OvtError, TimeoutError) as error:
                qemu.kill()
                said = qemu.stderr.read().decode(errors="replace").strip() if qemu.stderr else ""
                raise HostError(f"{program} does not start: {said or error}", hint=_HINT) from None
            finally:
                qemu.kill()
    if features.version[:2] < OLDEST:
        raise HostError(
            f"{program} is version {'.'.join(map(str, features.version))}, and {OLDEST[0]}.{OLDEST[1]} is needed",
            hint="use a newer release of the distribution, or set OVT_QEMU",
        )
    return features


def _questions(program: str, qmp: Qmp) -> Features:
    qmp.negotiate(_PROBE_SECONDS)
    schema = {entry["name"]: entry for entry in qmp.command("query-qmp-schema")}
    commands = {name: entry for name, entry in schema.items() if entry["meta-type"] == "command"}
    machines = qmp.command("query-machines")
    q35 = next((entry["name"] for entry in machines if entry.get("alias") == "q35"), "q35")
    types = {entry["name"] for entry in qmp.command("qom-list-types", {"abstract": False})}
    capabilities = _values(schema, _member(schema, commands["migrate-set-capabilities"]["arg-type"], "capabilities"))
    netdevs = _values(schema, _member(schema, commands["netdev_add"]["arg-type"], "type"))
    vfio: list[str] = []
    with contextlib.suppress(OvtError):
        vfio = [entry["name"] for entry in qmp.command("device-list-properties", {"typename": "vfio-pci"})]
    return Features(
        program,
        qmp.version,
        tuple(sorted(entry["name"] for entry in machines)),
        q35,
        tuple(sorted(name.removesuffix("-accel") for name in types if name.endswith("-accel"))),
        any("io_uring" in entry.get("values", ()) for entry in schema.values() if "native" in entry.get("values", ())),
        "mapped-ram" in capabilities,
        "x-ignore-shared" in capabilities,
        "multifd" in capabilities,
        "postcopy-ram" in capabilities,
        "background-snapshot" in capabilities,
        "stream" in netdevs,
        "user" in netdevs,
        "fd" in vfio and "iommufd" in vfio,
        tuple(name for name in _DEVICES if name in types),
    )


def _member(schema: dict[str, Any], type: str, name: str) -> str:
    return str(next(member["type"] for member in schema[type]["members"] if member["name"] == name))


def _values(schema: dict[str, Any], type: str) -> set[str]:
    """The values of an enumeration, or of the member `capability` of a list's elements."""
    entry = schema[type]
    if entry["meta-type"] == "array":
        return _values(schema, _member(schema, entry["element-type"], "capability"))
    return set(entry.get("values", ()))


def choose_accel(wanted: str = "", cpuinfo: str = "/proc/cpuinfo") -> tuple[str, str]:
    """The accelerator to use and, where that is not KVM, the reason; HostError when `wanted` cannot be had."""
    if wanted not in {"", "kvm", "tcg"}:
        raise UsageError(f"accelerator {wanted!r} is not known", "kvm or tcg")
    if wanted == "tcg":
        return "tcg", "it was asked for"
    reason = why_no_kvm(cpuinfo)
    if not reason:
        return "kvm", ""
    if wanted == "kvm":
        raise HostError(f"KVM cannot be used: {reason}", hint="ovt check, or leave out --accel kvm")
    return "tcg", reason


def why_no_kvm(cpuinfo: str = "/proc/cpuinfo") -> str:
    """Why guests cannot run on the processor itself here; empty when they can."""
    with open(cpuinfo, encoding="ascii", errors="replace") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    if not os.path.exists("/dev/kvm"):
        if "vmx" in flags or "svm" in flags:
            return "there is no /dev/kvm although the processor could: modprobe kvm_intel or kvm_amd"
        return "the processor has neither VT-x nor AMD-V, or the firmware or the hypervisor hides it"
    if "vmx" not in flags and "svm" not in flags:
        # such a /dev/kvm runs nothing but real mode or is a hypervisor's own interface
        return "there is a /dev/kvm, but the processor shows neither VT-x nor AMD-V"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}: be a member of its group (usermod -aG kvm)"
    return ""
