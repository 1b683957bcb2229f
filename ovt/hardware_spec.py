"""What the owner of a virtual machine asked for: plain records, part of `ovt.model.Spec`. No I/O.

What was left open is an empty string or 0; it is chosen when the machine first starts and then frozen in the
instance's hardware.json, so that later versions of QEMU or ovt give the guest the same machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self


def _tupled(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


class Disk(NamedTuple):
    """One disk or CD-ROM drive. Sizes in bytes."""

    source: str = ""  # absolute path of an image; empty: a new disk of `size`, or an empty drive
    id: str = ""  # root, disk1, cdrom1 …
    device: str = "disk"  # disk | cdrom
    format: str = ""  # raw, qcow2, vmdk, vhdx, vpc, vdi
    size: int = 0  # 0: as the image
    bus: str = "virtio"  # virtio | scsi | nvme | sata
    mode: str = "overlay"  # overlay: written to a file of the instance's own above the image; direct; readonly
    cache: str = ""  # writeback (default), none, writethrough, directsync, unsafe
    aio: str = ""  # threads, native, io_uring; empty: the best that QEMU and the kernel have
    discard: bool = True
    iothread: bool = False
    iops: int = 0  # operations per second at most; 0: no limit
    bps: int = 0  # bytes per second at most
    serial: str = ""

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        return cls(**data)


class Nic(NamedTuple):
    """One network card."""

    network: str = "user"  # user | none | tap:NAME | bridge:NAME | macvtap:DEVICE
    id: str = ""  # nic0 …
    mac: str = ""
    model: str = "virtio"  # virtio | e1000e | e1000 | rtl8139 | igb
    queues: int = 0  # pairs of queues; 0: one for each vCPU where the network can
    link: bool = True  # whether the cable is in
    forwards: tuple[str, ...] = ()  # of a user network: PROTOCOL:ADDRESS:PORT:GUEST_PORT

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        return cls(**_tupled(data))


class Seed(NamedTuple):
    """What cloud-init finds in the guest (data source NoCloud): texts, not paths."""

    user_data: str = ""
    network_config: str = ""
    ssh_keys: tuple[str, ...] = ()
    instance_id: str = ""
    vendor_data: str = ""

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        return cls(**_tupled(data))


class Machine(NamedTuple):
    """The virtual hardware beside memory and processors, which are the instance's limits."""

    accel: str = ""  # kvm | tcg
    type: str = ""  # q35, microvm or a versioned machine type of QEMU
    cpu: str = ""  # value of QEMU's -cpu
    topology: str = ""  # sockets=1,cores=2,threads=1
    max_vcpus: int = 0  # as far as processors can be added
    max_memory: int = 0  # bytes, as far as memory can be added
    hugepages: bool = False
    numa: int = 0  # nodes of the guest; 0: none
    firmware: str = ""  # bios | uefi | none (the kernel is started directly)
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    hostdevs: tuple[str, ...] = ()  # PCI addresses of the host, dddd:bb:dd.f
    seed: Seed | None = None
    watchdog: str = ""  # what a watchdog that fires does: reset, shutdown, poweroff, pause, none; empty: no watchdog
    panic: str = ""  # what a panic of the guest does: exit-failure (default), shutdown, pause, none
    vsock: bool = True
    graphics: str = ""  # vnc
    balloon: bool = True
    root_size: int = 0  # bytes: the first disk larger than its image

    @classmethod
    def unpack(cls, data: dict[str, Any]) -> Self:
        data = _tupled(data)
        data["disks"] = tuple(Disk.unpack(item) for item in data.get("disks", ()))
        data["nics"] = tuple(Nic.unpack(item) for item in data.get("nics", ()))
        if data.get("seed") is not None:
            data["seed"] = Seed.unpack(data["seed"])
        return cls(**data)
