"""The virtual hardware of one machine, frozen: chosen at its first start, kept in `home`/hardware.json ever after.

Everything that a guest can see, and that QEMU's or ovt's defaults would otherwise decide anew at each start, is in
here: machine type with its version, processor model and topology, addresses of devices, numbers of queues. A saved
memory or a live migration fits only a machine that is the same in all of this. Hotplug changes the record.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

from ovt.engine.vm.features import Features
from ovt.errors import HostError, NotFound, OvtError, UsageError
from ovt.model import Machine, Spec

FILE = "hardware.json"
VERSION = 1
MIB = 1 << 20
DEFAULT_MEMORY = 1 << 30  # bytes
LEAST_MEMORY = 16 * MIB
SPARE_PORTS = 4  # places for devices that are plugged in later
SLOTS = 8  # for memory that is plugged in later
MEMORY_UNIT = 128 * MIB  # what Linux adds memory in on x86_64 (memory_block_size_bytes)
TCG_CPU = "Nehalem"  # x86-64-v2, all of which is emulated: what present distributions are compiled for


@dataclasses.dataclass
class Hardware:
    """See the module. Sizes in bytes; `disks`, `nics`, `shares`, `hostdevs` and `dimms` are one dict for each device,
    with its `id` and the root port `port` that it sits in."""

    machine: str  # versioned type
    accel: str
    cpu: str
    vcpus: int  # at the start; more may have been plugged in: `plugged_vcpus`
    max_vcpus: int
    sockets: int
    cores: int
    threads: int
    memory: int
    max_memory: int
    firmware: str  # bios | uefi | none
    uuid: str
    generation: str  # vmgenid's GUID
    cid: int = 0  # vsock address; 0: no vsock
    ports: int = SPARE_PORTS
    numa: int = 0
    hugepages: bool = False
    shared_memory: bool = False  # for devices that are other processes (virtiofs)
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    uefi: dict[str, Any] = dataclasses.field(default_factory=dict)  # see firmware.py
    watchdog: str = ""
    panic: str = ""
    balloon: bool = True
    graphics: str = ""
    main_port: bool = False  # the port on which the built-in image tells its program's exit status
    seed: bool = False
    forked: bool = False  # its memory is a template's, copied on write, until its next cold start
    disks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    nics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shares: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    hostdevs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    dimms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    plugged_vcpus: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    controllers: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # such as virtio-scsi's
    version: int = VERSION

    @classmethod
    def load(cls, home: str) -> Hardware:
        """What was frozen in `home`. NotFound before the first start; OvtError for a damaged file."""
        path = f"{home}/{FILE}"
        try:
            with open(path, encoding="utf-8") as file:
                return cls.unpack(json.load(file))
        except FileNotFoundError:
            raise NotFound("it has not been started yet: it has no hardware", "ovt start NAME") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise OvtError(f"{path} is damaged: {error}", "ovt delete --force NAME removes the machine") from None

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Hardware:
        """From the JSON object; OvtError when it was written by a later version."""
        if data.get("version") != VERSION:
            raise OvtError(f"hardware of version {data.get('version')} is not known here", "use a newer ovt")
        return cls(**data)

    def pack(self) -> dict[str, Any]:
        """The JSON object."""
        return dataclasses.asdict(self)

    def save(self, home: str) -> None:
        """Replace `home`/hardware.json at once and durably."""
        replace_json(f"{home}/{FILE}", self.pack())

    def copy(self) -> Hardware:
        """One that can be changed without changing this."""
        return Hardware.unpack(json.loads(json.dumps(self.pack())))

    def devices(self) -> list[dict[str, Any]]:
        """Every device that sits in a root port."""
        return [*self.controllers, *self.disks, *self.nics, *self.shares, *self.hostdevs]

    def find(self, id: str) -> dict[str, Any]:
        """The device with this id, of any sort; NotFound with the ids that there are."""
        every = [*self.devices(), *self.dimms]
        for device in every:
            if device["id"] == id:
                return device
        there = ", ".join(device["id"] for device in every) or "none"
        raise NotFound(f"it has no device {id!r}", f"its devices: {there}")

    def take_port(self) -> str:
        """A root port that no device sits in; HostError when all are taken."""
        taken = {device.get("port") for device in self.devices()}
        for number in range(self.ports):
            if f"rp{number}" not in taken:
                return f"rp{number}"
        raise HostError(
            f"all {self.ports} places for devices are taken",
            hint="detach one, or stop the machine: at its next start it gets new places for what is attached then",
        )

    def grow_ports(self) -> None:
        """Before a cold start: leave SPARE_PORTS places free."""
        taken = sum(1 for device in self.devices() if device.get("port"))
        self.ports = min(32, max(self.ports, taken + SPARE_PORTS))

    def new_id(self, prefix: str) -> str:
        """`prefix` and the smallest number that makes an unused id."""
        taken = {device["id"] for device in [*self.devices(), *self.dimms]}
        return next(f"{prefix}{n}" for n in range(len(taken) + 1) if f"{prefix}{n}" not in taken)


def replace_json(path: str, data: Any) -> None:
    """Write JSON to `path`: the old or the new content is there, whenever the host fails."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def freeze(spec: Spec, features: Features, accel: str, firmware: str, identity: dict[str, Any]) -> Hardware:
    """Choose everything that the owner left open. UsageError for what contradicts itself or QEMU does not have.

    `identity` has uuid, generation and cid. Devices are added by their own modules.
    """
    machine: Machine = spec.machine
    vcpus = max(1, math.ceil(spec.limits.cpus or 1))
    max_vcpus = machine.max_vcpus or max(vcpus, min(2 * vcpus, 8, max(vcpus, os.cpu_count() or 1)))
    if max_vcpus < vcpus:
        raise UsageError(f"--max-cpus {max_vcpus} is less than the {vcpus} processors it starts with")
    memory = spec.limits.memory or DEFAULT_MEMORY
    if memory < LEAST_MEMORY:
        raise UsageError(f"{memory >> 20} MiB of memory are too few for a machine", "--memory 256M")
    memory = -(-memory // MIB) * MIB
    max_memory = machine.max_memory or max(4 * memory, 4 << 30)
    if max_memory < memory:
        raise UsageError("--max-memory is less than --memory")
    sockets, cores, threads = _topology(machine.topology, max_vcpus)
    return Hardware(
        machine=_machine_type(machine.type, features, accel),
        accel=accel,
        cpu=machine.cpu or ("host" if accel == "kvm" else TCG_CPU),
        vcpus=vcpus,
        max_vcpus=max_vcpus,
        sockets=sockets,
        cores=cores,
        threads=threads,
        memory=memory,
        max_memory=-(-max_memory // MEMORY_UNIT) * MEMORY_UNIT,
        firmware=firmware,
        uuid=identity["uuid"],
        generation=identity["generation"],
        cid=identity["cid"] if machine.vsock else 0,
        numa=machine.numa,
        hugepages=machine.hugepages,
        kernel=machine.kernel,
        initrd=machine.initrd,
        cmdline=machine.cmdline,
        watchdog=machine.watchdog,
        panic=machine.panic,
        balloon=machine.balloon and "virtio-balloon-pci" in features.devices,
        graphics=machine.graphics,
    )


def _machine_type(wanted: str, features: Features, accel: str) -> str:
    if wanted in {"", "q35"}:
        return features.q35
    if wanted.startswith("microvm") and accel != "kvm":
        raise UsageError("a microvm needs KVM: it does not boot reliably under emulation", "leave out --machine")
    if wanted not in features.machines:
        raise UsageError(f"this QEMU has no machine type {wanted!r}", f"{features.program} -machine help lists them")
    if not wanted.startswith("pc-q35"):
        raise UsageError(f"machine type {wanted!r} has no PCI Express", "a version of q35, such as " + features.q35)
    return wanted


def _topology(text: str, max_vcpus: int) -> tuple[int, int, int]:
    """(sockets, cores, threads): sockets of one core unless asked for otherwise, so that any number can be plugged."""
    if not text:
        return max_vcpus, 1, 1
    parts = {"sockets": 0, "cores": 1, "threads": 1}
    for pair in text.split(","):
        key, equals, value = pair.partition("=")
        if key not in parts or not equals or not value.isdigit() or int(value) < 1:
            raise UsageError(f"topology {text!r} is not understood", "sockets=1,cores=2,threads=1")
        parts[key] = int(value)
    sockets = parts["sockets"] or max_vcpus // (parts["cores"] * parts["threads"])
    if sockets * parts["cores"] * parts["threads"] != max_vcpus:
        raise UsageError(
            f"topology {text!r} has {sockets * parts['cores'] * parts['threads']} processors, the machine at most "
            f"{max_vcpus}",
            "set --max-cpus to the same number",
        )
    return sockets, parts["cores"], parts["threads"]
