"""QEMU as a person starts it: the argument list that ovt makes and the same QMP commands, with nothing around it.

No container, no user of its own, no supervisor, no record; the baseline of what those cost.
"""

import os
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from ovt.engine.vm import arguments, devices, process
from ovt.engine.vm.engine import VmEngine
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.migration import Settings, configure
from ovt.engine.vm.qmp import Qmp
from ovt.model import Instance
from tests.bench.measure import Failed

_PATIENCE = 60.0


class Raw:
    """One QEMU with the frozen hardware in `home`, which nobody else runs meanwhile; kills it at the end of `with`."""

    def __init__(self, engine: VmEngine, instance: Instance, home: str, incoming: bool = False) -> None:
        hardware = Hardware.load(home)
        job = engine.job(instance, home, hardware)
        with ExitStack() as stack:
            given = process._descriptors(job, stack)
            ours, theirs = process.socket.socketpair()
            stack.enter_context(theirs)
            given["events"] = theirs.fileno()
            words = arguments.arguments(engine.features.program, hardware, given, name=instance.name, incoming=incoming)
            if "exit" in given:
                words += ["-add-fd", f"fd={given['exit']},set={arguments.EXIT_SET}"]
            with open(f"{home}/raw.log", "wb") as log:
                self.process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=tuple(given.values())
                )
        self.log = Path(f"{home}/raw.log")
        self.qmp = Qmp(ours)
        try:
            self.qmp.negotiate(_PATIENCE)
            devices.plug_all(self.qmp, hardware, home, engine.features, incoming, instance.id)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *ignored: object) -> None:
        self.end()

    def go(self) -> None:
        self.qmp.command("cont")

    def end(self) -> None:
        self.qmp.close()
        self.process.kill()
        self.process.wait()


def move(source: Raw, target: Raw, path: Path) -> tuple[float, float, float]:
    """Migrate over a unix socket: milliseconds in all, and QEMU's own total and downtime."""
    began = time.perf_counter()
    for side in (target, source):
        configure(side.qmp, Settings())
    target.qmp.command("migrate-incoming", {"uri": f"unix:{path}"})
    source.qmp.command("migrate", {"uri": f"unix:{path}"})
    while (info := source.qmp.command("query-migrate"))["status"] != "completed":
        if info["status"] in {"failed", "cancelled"} or time.perf_counter() - began > _PATIENCE:
            raise Failed(f"the migration is {info['status']}: {info.get('error-desc', 'no reason given')}")
        time.sleep(0.002)
    target.go()
    taken = (time.perf_counter() - began) * 1000
    path.unlink(missing_ok=True)
    return taken, float(info["total-time"]), float(info["downtime"])


def copy_home(source: str, target: Path) -> str:
    """The hardware of a machine without images of its own, for a second QEMU beside it."""
    os.makedirs(target, mode=0o700, exist_ok=True)
    Hardware.load(source).save(str(target))
    return str(target)
