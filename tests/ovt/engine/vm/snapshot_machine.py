"""A machine for the tests of snapshots and clones: a home with hardware and disks, and a QEMU that a test may kill.

Its guest is never run: what a guest would write is written through QEMU's own block layer, at the device, by `qemu-io`.
"""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

from ovt.engine.vm import disks as block_devices
from ovt.engine.vm import saved
from ovt.engine.vm import snapshot_live as live
from ovt.engine.vm.features import Features, find_program, probe
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp
from ovt.engine.vm.snapshot_tree import written
from ovt.image import disk as images
from ovt.kernel import syscalls

SIZE = 16 << 20
CHUNK = 64 << 10


def features(tmp: Path) -> Features:
    return probe(str(tmp / "features"))


def hardware(*disks: dict[str, Any], uefi: bool = False) -> Hardware:
    return Hardware(
        machine="q35",
        accel="tcg",
        cpu="qemu64",
        vcpus=1,
        max_vcpus=1,
        sockets=1,
        cores=1,
        threads=1,
        memory=64 << 20,
        max_memory=64 << 20,
        firmware="bios",
        uuid="11111111-1111-4111-8111-111111111111",
        generation="22222222-2222-4222-8222-222222222222",
        cid=77,
        uefi={"vars": "nvram.qcow2"} if uefi else {},
        disks=list(disks),
        nics=[{"id": "nic0", "mac": "52:54:00:00:00:01", "model": "virtio", "network": "none", "port": "rp9"}],
    )


class Machine:
    """One home, and perhaps a QEMU."""

    def __init__(self, home: Path, known: Features, uefi: bool = False, count: int = 1, direct: bool = False) -> None:
        self.home = str(home)
        self.features = known
        self.process: subprocess.Popen[bytes] | None = None
        self.qmp: Qmp | None = None
        home.mkdir(parents=True, exist_ok=True)
        (home / "disks").mkdir()
        records = []
        for number in range(count):
            id = f"disk{number}"
            base = str(home.parent / f"{home.name}-base{number}.raw")
            Path(base).write_bytes(b"B" * CHUNK)
            os.truncate(base, SIZE)
            chain = [{"path": base, "format": "raw"}]
            if not direct:
                chain.append({"path": f"disks/{id}.qcow2", "format": "qcow2"})
                images.create_overlay(f"{home}/disks/{id}.qcow2", base, "raw")
            records.append({"id": id, "device": "disk", "bus": "virtio", "port": f"rp{number}", "chain": chain})
        if uefi:
            images.create(f"{home}/nvram.qcow2", 512 << 10)
        hardware(*records, uefi=uefi).save(self.home)

    @property
    def hardware(self) -> Hardware:
        return Hardware.load(self.home)

    def disk(self, number: int = 0) -> dict[str, Any]:
        return written(self.hardware.pack())[number]

    def start(self) -> Qmp:
        """As the engine does: QEMU at -S, the disks over QMP, saved memory if there is any, `cont`."""
        ours, theirs = socket.socketpair()
        given = [theirs.fileno()]
        words = [find_program(), "-S", "-nodefaults", "-no-user-config", "-display", "none"]
        words += ["-m", "64", "-accel", "tcg", "-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny"]
        words += ["-chardev", f"socket,id=q,fd={theirs.fileno()}", "-mon", "chardev=q,mode=control"]
        machine = "q35"
        opened = []
        if self.hardware.uefi:
            code = Path(self.home, "code.bin")
            code.write_bytes(bytes(512 << 10))
            for node, path, driver in (("code", str(code), "raw"), ("vars", f"{self.home}/nvram.qcow2", "qcow2")):
                fd = os.open(path, os.O_RDWR if node == "vars" else os.O_RDONLY)
                opened.append(fd)
                number = 500 + len(opened)
                words += ["-add-fd", f"fd={fd},set={number}"]
                file = {"driver": "file", "filename": f"/dev/fdset/{number}"}
                options = {"driver": driver, "node-name": f"firmware-{node}", "file": file, "read-only": node == "code"}
                words += ["-blockdev", json.dumps(options)]
            machine += ",pflash0=firmware-code,pflash1=firmware-vars"
        for number in range(4):
            words += ["-device", f"pcie-root-port,id=rp{number},chassis={number + 1}"]
        if saved.exists(self.home):
            words += ["-incoming", "defer"]
        with open(f"{self.home}/said", "wb") as said:
            self.process = subprocess.Popen(
                [*words, "-machine", machine],
                pass_fds=[*given, *opened],
                stdout=said,
                preexec_fn=lambda: syscalls.prctl(1, signal.SIGKILL),  # it does not outlive the tests
            )
        theirs.close()
        for fd in opened:
            os.close(fd)
        qmp = self.qmp = Qmp(ours)
        qmp.negotiate(60)
        for disk in self.hardware.disks:
            block_devices.plug(qmp, self.home, disk, io_uring=self.features.io_uring)
        if saved.exists(self.home):
            saved.load(qmp, self.features, self.home, saved.read(self.home)[1])
        saved.discard(self.home)
        qmp.command("cont")
        return qmp

    def kill(self) -> None:
        """As if by kill -9: nothing is flushed that was not."""
        if self.qmp:
            self.qmp.close()
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = self.qmp = None

    def stop(self) -> None:
        """As if the guest had shut down."""
        if self.qmp and self.process:
            self.qmp.command("quit")
            self.process.wait(30)
            self.qmp.close()
        self.process = self.qmp = None

    # what a guest would do

    def write(self, value: int, at: int = 0, number: int = 0, length: int = CHUNK) -> None:
        """Fill a part of a disk with one byte."""
        said = self._io(f"write -P {value} {at} {length}", number, writable=True)
        assert "wrote" in said, said
        if self.qmp:  # what a guest has not flushed may be lost with QEMU
            self._io("flush", number, writable=True)

    def reads(self, value: int, at: int = 0, number: int = 0, length: int = CHUNK) -> bool:
        """Whether a part of a disk has nothing but that byte."""
        said = self._io(f"read -P {value} {at} {length}", number)
        assert "read " in said, said
        return "verification failed" not in said

    def _io(self, words: str, number: int, writable: bool = False) -> str:
        disk = self.disk(number)
        if self.qmp:
            node = live.nodes(self.qmp, disk)[-1]
            if writable:  # by the device, as a guest would
                path = f"/machine/peripheral/{disk['id']}/virtio-backend"
                line = f'qemu-io -d {path} "{words}"'
            else:
                line = f'qemu-io {node} "{words}"'
            said = Path(self.home, "said")
            before = said.stat().st_size
            refused = self.qmp.command("human-monitor-command", {"command-line": line})
            return said.read_text()[before:] + str(refused)
        chain = [(os.path.join(self.home, entry["path"]), entry["format"]) for entry in disk["chain"]]
        return image_io(chain, words, writable)


def image_io(chain: list[tuple[str, str]], words: str, writable: bool = False) -> str:
    """What qemu-io says to a command on a chain of images (path, format)."""
    name = "json:" + json.dumps(images.node(chain))
    done = subprocess.run(
        ["qemu-io", *([] if writable else ["-r"]), "-c", words, name], capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr
