"""QEMU's argument list: a pure function of the frozen hardware and of the descriptors that QEMU is given.

On the list is what cannot be changed while the machine runs: machine, processors, memory, the root ports, serial
console, agent port, and small fixed devices at fixed addresses on the root bus. Disks, NICs, shares and host devices
are plugged in over QMP before the guest's first instruction, by the same code as later.

Addresses on pcie.0: 01–0f fixed devices, 10–13 up to 32 root ports (8 functions each), 1f the chipset's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ovt.engine.vm import firmware
from ovt.engine.vm.hardware import SLOTS, Hardware

MEMORY_ID = "m0"
AGENT_PORT = "org.qemu.guest_agent.0"
EXIT_PORT = "org.ovt.exit.0"
EXIT_SET = 1000  # the fdset of the file that takes the exit status
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def arguments(
    program: str,
    hardware: Hardware,
    fds: Mapping[str, int],
    *,
    name: str,
    incoming: bool = False,
    private_memory: bool = False,
) -> list[str]:
    """The command line. `fds` are descriptors by what they are for:

    events, commands (QMP; the second listens), agent (listens), exit (a file), kernel, initrd, code and vars
    (of UEFI), memory (a file that is guest memory; with `private_memory` never written to), vsock.
    With `incoming` QEMU waits for a machine state instead of starting one.
    """
    words = [program, "-S", "-name", f"{_text(name)},debug-threads=on", "-nodefaults", "-no-user-config"]
    words += ["-display", "none", "-sandbox", SANDBOX, "-msg", "timestamp=on"]
    words += ["-machine", _machine(hardware), "-accel", hardware.accel, "-cpu", hardware.cpu]
    words += ["-uuid", hardware.uuid, "-smp", _smp(hardware), "-m", _memory_size(hardware)]
    words += _memory(hardware, fds.get("memory"), private_memory)
    words += ["-rtc", "base=utc,driftfix=slew", "-action", _actions(hardware)]
    words += ["-global", "ICH9-LPC.disable_s4=1"]  # a suspend to disk inside would be undone by snapshots
    words += _boot(hardware, fds)
    words += _chardevs(fds)
    words += _fixed_devices(hardware, fds)
    for number in range(hardware.ports):
        words += _device("pcie-root-port", f"rp{number}", **_port(number))
    if incoming:
        words += ["-incoming", "defer"]
    return words


def _device(driver: str, id: str = "", **properties: Any) -> list[str]:
    return ["-device", json.dumps({"driver": driver, **({"id": id} if id else {}), **properties})]


def _text(text: str) -> str:
    """Escaped for an option of the form key=value,…"""
    return text.replace(",", ",,")


def _machine(hardware: Hardware) -> str:
    options = [hardware.machine, "vmport=off", "hpet=off"]
    if hardware.numa <= 1:
        options.append(f"memory-backend={MEMORY_ID}")
    if hardware.uefi:
        options += firmware.machine_options()
    return ",".join(options)


def _smp(hardware: Hardware) -> str:
    return (
        f"cpus={hardware.vcpus},maxcpus={hardware.max_vcpus},sockets={hardware.sockets},cores={hardware.cores},"
        f"threads={hardware.threads}"
    )


def _memory_size(hardware: Hardware) -> str:
    size = f"size={hardware.memory >> 20}M"
    if hardware.max_memory > hardware.memory:
        size += f",slots={SLOTS},maxmem={hardware.max_memory >> 20}M"
    return size


def _memory(hardware: Hardware, file: int | None, private: bool) -> list[str]:
    backend: dict[str, Any] = {"id": MEMORY_ID, "size": hardware.memory}
    if file is not None:
        backend |= {"qom-type": "memory-backend-file", "mem-path": f"/proc/self/fd/{file}", "share": not private}
        if private:
            backend |= {"readonly": True, "rom": "off"}
    elif hardware.shared_memory or hardware.hugepages:
        backend |= {"qom-type": "memory-backend-memfd", "share": hardware.shared_memory}
        if hardware.hugepages:
            backend |= {"hugetlb": True, "hugetlbsize": 2 << 20}
    else:
        backend["qom-type"] = "memory-backend-ram"
    words = ["-object", json.dumps(backend)]
    if hardware.numa > 1:
        words = _numa(hardware, backend)
    return words


def _numa(hardware: Hardware, backend: dict[str, Any]) -> list[str]:
    """Memory and processors in equal parts; then the machine takes its memory from the nodes."""
    words = []
    share = hardware.memory // hardware.numa >> 20 << 20
    for node in range(hardware.numa):
        size = share if node else hardware.memory - share * (hardware.numa - 1)
        words += ["-object", json.dumps({**backend, "id": f"{MEMORY_ID}-{node}", "size": size})]
        words += ["-numa", f"node,nodeid={node},memdev={MEMORY_ID}-{node}"]
    for cpu in range(hardware.sockets):
        words += ["-numa", f"cpu,node-id={cpu * hardware.numa // hardware.sockets},socket-id={cpu}"]
    return words


def _actions(hardware: Hardware) -> str:
    """What QEMU does of its own accord; a guest that has crashed is an exit with a status, unless asked otherwise."""
    actions = ["reboot=reset", "shutdown=poweroff", f"panic={hardware.panic or 'exit-failure'}"]
    if hardware.watchdog:
        actions.append(f"watchdog={hardware.watchdog}")
    return ",".join(actions)


def _boot(hardware: Hardware, fds: Mapping[str, int]) -> list[str]:
    words = firmware.arguments(hardware.uefi, fds["code"], fds["vars"]) if hardware.uefi else []
    if hardware.kernel:
        words += ["-kernel", f"/proc/self/fd/{fds['kernel']}"]
        if "initrd" in fds:
            words += ["-initrd", f"/proc/self/fd/{fds['initrd']}"]
        if hardware.cmdline:
            words += ["-append", hardware.cmdline]
    return words


def _chardevs(fds: Mapping[str, int]) -> list[str]:
    words = ["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]
    words += ["-chardev", f"socket,id=events,fd={fds['events']}", "-mon", "chardev=events,mode=control"]
    words += [
        "-chardev",
        f"socket,id=commands,fd={fds['commands']},server=on,wait=off",
        "-mon",
        "chardev=commands,mode=control",
    ]
    words += ["-chardev", f"socket,id=qga,fd={fds['agent']},server=on,wait=off"]
    return words


def _fixed_devices(hardware: Hardware, fds: Mapping[str, int]) -> list[str]:
    words = _device("virtio-serial-pci", "serial0", bus="pcie.0", addr="01")
    words += _device("virtserialport", "agent0", bus="serial0.0", nr=1, chardev="qga", name=AGENT_PORT)
    if hardware.main_port:
        # a machine that goes on somewhere else has told nobody yet
        target = f"file,id=exit,path=/dev/fdset/{EXIT_SET}" if "exit" in fds else "null,id=exit"
        words += ["-chardev", target]
        words += _device("virtserialport", "exit0", bus="serial0.0", nr=2, chardev="exit", name=EXIT_PORT)
    if hardware.balloon:
        # free pages are given back to the host as they become free (free page reporting)
        words += _device(
            "virtio-balloon-pci",
            "balloon0",
            bus="pcie.0",
            addr="02",
            **{"deflate-on-oom": True, "free-page-reporting": True},
        )
    words += ["-object", json.dumps({"qom-type": "rng-random", "id": "entropy", "filename": "/dev/urandom"})]
    words += _device("virtio-rng-pci", "rng0", bus="pcie.0", addr="03", rng="entropy")
    if hardware.cid and "vsock" in fds:
        words += _device(
            "vhost-vsock-pci",
            "vsock0",
            bus="pcie.0",
            addr="04",
            **{"guest-cid": hardware.cid, "vhostfd": str(fds["vsock"])},
        )
    words += _device("pvpanic-pci", "panic0", bus="pcie.0", addr="05")
    if hardware.watchdog:
        words += _device("i6300esb", "watchdog0", bus="pcie.0", addr="06")
    if hardware.graphics:
        # viewers' connections are handed in one by one (QMP add_client)
        words += ["-vnc", "none", *_device("VGA", "video0", bus="pcie.0", addr="07")]
    words += _device("vmgenid", "generation0", guid=hardware.generation)
    return words


def _port(number: int) -> dict[str, Any]:
    place = {"bus": "pcie.0", "addr": f"{0x10 + number // 8:02x}.{number % 8:x}", "chassis": number + 1}
    return {**place, "multifunction": True} if number % 8 == 0 else place
