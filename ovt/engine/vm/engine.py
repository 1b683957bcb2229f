"""The engine for virtual machines: implements `ovt.engine.base.Engine` with QEMU in a container, under a supervisor.

A machine is a container whose one process is QEMU, so its namespaces, cgroup, user and clean-up are those of the
container engine, and its console is the supervisor's log and attach socket. What only machines can do (snapshots,
templates, migration …) is in the modules beside this one and called by `ovt.machines`; they start machines through
`start_machine`, which is what all starts have in common.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ovt.engine.base import Guest, Leftover, Process, Stats
from ovt.engine.container import facts, usage
from ovt.engine.vm import (
    devices,
    firmware,
    forks,
    guest_view,
    hostdevs,
    jail,
    nics,
    process,
    resize,
    saved,
    seed,
    snapshot_changes,
    source,
)
from ovt.engine.vm.features import Features, choose_accel, probe
from ovt.engine.vm.hardware import FILE, Hardware, freeze
from ovt.engine.vm.qmp import Gone, Qmp
from ovt.errors import NotFound, OvtError, StateError, UsageError
from ovt.model import Instance, Kind, Limits, Machine, Spec, Status

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ovt.engine.container.engine import ContainerEngine

_SIGKILL, _SIGTERM = 9, 15
_USERFAULTFD = "/dev/userfaultfd"
MOVING = "outgoing.json"  # in the home of a machine that ovt.machines.outgoing moves
_POWER_SIGNALS = {_SIGTERM, 2, 3}  # TERM, INT and QUIT are the power button
_RUN_STATES = {
    "running": Status.RUNNING,
    "paused": Status.PAUSED,
    "suspended": Status.RUNNING,  # asleep (S3): a key press or `ovt wake` goes on
    "io-error": Status.PAUSED,
    "watchdog": Status.PAUSED,
    "guest-panicked": Status.PAUSED,
    "postmigrate": Status.PAUSED,  # its memory has been written to the disk
    "prelaunch": Status.CREATED,
    "inmigrate": Status.CREATED,
}


class VmEngine:
    """Machines beside the containers of `containers`; `data` is where instances, images and templates are kept."""

    kind = Kind.VM

    def __init__(
        self, containers: ContainerEngine, data: str, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.containers = containers
        self.data = data
        self.report = report
        self._features: Features | None = None

    @property
    def features(self) -> Features:
        """What this host's QEMU can do."""
        if self._features is None:
            self._features = probe(self.containers.run)
        return self._features

    # before and after life

    def prepare(self, spec: Spec) -> tuple[Spec, dict[str, Any]]:
        choose_accel(spec.machine.accel)
        if spec.machine.seed is not None:
            seed.check(spec.machine.seed)
        plain = spec.machine == Machine() and not spec.volumes
        spec, found = source.resolve(spec, f"{self.data}/images", self.report)
        identity = {
            "uuid": str(uuid.UUID(bytes=os.urandom(16), version=4)),
            "generation": str(uuid.UUID(bytes=os.urandom(16), version=4)),
            "cid": 3 + int.from_bytes(os.urandom(4), "little") % 0xFFFFFFF0,
        }
        if plain and (template := forks.find_idle(self, spec)):
            found |= {"template": template, "idle": True}
        rootfs = {**found, **identity}
        # everything that can be wrong with the options is found now and not at the first start
        self._freeze(Instance("0" * 12, "new", Kind.VM, 0.0, spec, rootfs=rootfs), "", dry=True)
        return spec, rootfs

    def plan(self, instance: Instance, home: str) -> list[str]:
        hardware = self._freeze(instance, home, dry=True)
        accel, why = choose_accel(instance.spec.machine.accel)
        lines = [f"machine {hardware.machine}, {accel}{f' ({why})' if why else ''}, processor {hardware.cpu}"]
        lines.append(
            f"{hardware.vcpus} of at most {hardware.max_vcpus} processors, {hardware.memory >> 20} MiB of memory"
        )
        if hardware.kernel:
            lines.append(f"kernel {hardware.kernel}, started directly: {hardware.cmdline}")
        else:
            lines.append(f"firmware: {hardware.firmware}")
        lines += devices.describe(hardware, home)
        lines.append(f"run {self.features.program} in a container of its own, as a user of its own")
        return lines

    def create(
        self, instance: Instance, home: str, exit_command: list[str], env: dict[str, str], incoming: bool = False
    ) -> Guest:
        """See Engine.create. With `incoming` the machine waits for a migration; its hardware is in `home` already."""
        if incoming:
            job = self.job(instance, home, Hardware.load(home))
            job.incoming = True
            return self.start_machine(job, exit_command, env)
        snapshot_changes.recover(home, None)  # else the guest would write to what a killed command made a snapshot of
        if saved.exists(home):
            hardware, state = saved.read(home)
            hardware.forked = False  # all of its memory is in the state
            job = self.job(instance, home, hardware)
            job.incoming = True
            job.load = lambda qmp: saved.load(qmp, self.features, home, state)
            hardware.save(home)
            return self.start_machine(job, exit_command, env)
        if instance.rootfs.get("template") and not os.path.exists(f"{home}/{FILE}"):
            return forks.start(self, instance, home, exit_command, env)
        if os.path.exists(f"{home}/{FILE}"):
            hardware = Hardware.load(home)
            resize.at_cold_start(hardware, instance.spec.limits)
            hardware.grow_ports()
        else:
            hardware = self._freeze(instance, home, dry=False)
        hardware.save(home)
        job = self.job(instance, home, hardware)
        return self.start_machine(job, exit_command, env)

    def job(self, instance: Instance, home: str, hardware: Hardware) -> process.Launch:
        """What a cold start of this machine is; others change it before `start_machine`."""
        spec = instance.spec
        job = process.Launch(instance.id, instance.name, home, self.features, hardware)
        job.cpuset = spec.limits.cpuset_cpus
        job.cpus = spec.limits.cpus if spec.limits.cpus % 1 else 0.0
        job.host_network = nics.need_host_network(nic["network"] for nic in hardware.nics)
        job.initrd_extra = source.main_archive(instance, hardware)
        if hardware.accel == "kvm":
            job.nodes.append(jail.node("/dev/kvm"))
        if os.path.exists(_USERFAULTFD):
            job.nodes.append(jail.node(_USERFAULTFD))  # what post-copy migration fetches missing memory with
        devices.prepare_launch(job)
        job.plug = lambda qmp: devices.plug_all(qmp, hardware, home, self.features, job.incoming, job.id)
        return job

    def start_machine(self, job: process.Launch, exit_command: list[str], env: dict[str, str]) -> Guest:
        """Start QEMU with all its devices, up to where only `start` is missing."""
        rootless = self.containers.rootless
        known = facts.gather(self.containers.cgroups, *(facts.own_mappings() if rootless else ((), ())))
        try:
            made = process.launch(job, self.containers.runtime, known, exit_command, env, self._parent_lock)
        except BaseException:
            hostdevs.release(job.home)
            raise
        return Guest(made.child_pid, made.child_start_time, made.pid, made.start_time)

    def _parent_lock(self) -> AbstractContextManager[None]:
        return self.containers.parent_lock(fcntl.LOCK_SH)

    def _freeze(self, instance: Instance, home: str, dry: bool) -> Hardware:
        """The hardware of a machine that has none yet; with `dry` no file is made for it."""
        spec = instance.spec
        accel, _ = choose_accel(spec.machine.accel)
        hardware = freeze(spec, self.features, accel, instance.rootfs["firmware"], instance.rootfs)
        hardware.main_port = bool(instance.rootfs.get("builtin"))
        if hardware.firmware == "uefi":
            found = firmware.find(hardware.machine)
            hardware.uefi = firmware.record(found) if dry else firmware.prepare(found, home)
        devices.add_all(hardware, instance, home, dry)
        hardware.grow_ports()
        return hardware

    def start(self, instance: Instance) -> None:
        home = self.home(instance)
        restored = saved.exists(home)
        self._go_on(instance)
        if restored:
            guest_view.set_clock(home)
        if Hardware.load(home).forked:
            forks.introduce(self, instance, home)
        elif instance.rootfs.get("builtin") and instance.spec.stdin and not restored:
            guest_view.await_program(home)  # what is typed into a booting console is lost or shown twice

    def _go_on(self, instance: Instance) -> None:
        if os.path.exists(f"{self.home(instance)}/{MOVING}"):
            raise StateError(
                "it is being moved to another host and may run there", f"ovt migrate --resolve {instance.name}"
            )
        with self.qmp(instance) as qmp:
            saved.discard(self.home(instance))  # before the guest changes what it describes
            qmp.command("cont")

    def cleanup(self, instance: Instance, home: str) -> bool:
        starved = self.containers.cleanup(instance, home)
        hostdevs.release(home)
        saved.tidy(home)
        for name in (process.QMP_SOCKET, process.AGENT_SOCKET):
            if process.is_socket(f"{home}/{name}"):
                os.unlink(f"{home}/{name}")
        return starved

    def exit_code(self, instance: Instance, home: str, code: int) -> int:
        said = process.read_exit_status(home) if instance.rootfs.get("builtin") else None
        return code if code or said is None else said

    def destroy(self, instance: Instance, home: str) -> None:
        for name in ("disks", "vm", "saved", "snapshots"):
            if os.path.isdir(f"{home}/{name}"):
                shutil.rmtree(f"{home}/{name}")

    def leftovers(self, owned: Callable[[str], bool], remove: bool = False) -> list[Leftover]:
        return []  # a machine's traces are those of its container, which the containers' engine finds

    # life

    def qmp(self, instance: Instance, timeout: float = 30.0) -> AbstractContextManager[Qmp]:
        """A command connection to the machine, one command of ovt at a time."""
        return process.running(self.home(instance), timeout)

    def home(self, instance: Instance) -> str:
        """The instance's directory, as its container's record knows it."""
        state = self.containers.runtime.state(instance.id)
        return str(state["bundle"])

    def status(self, instance: Instance) -> Status:
        if self.containers.status(instance) is Status.STOPPED:
            return Status.STOPPED
        try:
            with self.qmp(instance, 5.0) as qmp:
                return _RUN_STATES.get(qmp.command("query-status")["status"], Status.RUNNING)
        except (Gone, NotFound):
            return Status.STOPPED

    def signal(self, instance: Instance, signal: int, everyone: bool = False) -> None:
        if signal == _SIGKILL:
            self.containers.signal(instance, _SIGKILL, everyone)
            return
        if signal not in _POWER_SIGNALS:
            raise UsageError(
                "a machine knows only KILL (power off at once) and TERM (its power button)",
                f"ovt exec {instance.name} kill -{signal} PID signals a process in it",
            )
        try:
            with self.qmp(instance) as qmp:
                qmp.command("system_powerdown")
        except (Gone, NotFound):
            pass  # it has ended, which is what was wanted

    def freeze(self, instance: Instance, frozen: bool) -> None:
        if not frozen:
            self._go_on(instance)
            return
        with self.qmp(instance) as qmp:
            qmp.command("stop")

    def update(self, instance: Instance, limits: Limits) -> None:
        with self.qmp(instance) as qmp:
            resize.update(self, qmp, instance, limits)

    def processes(self, instance: Instance) -> list[dict[str, Any]]:
        return guest_view.processes(self.home(instance), instance)

    def stats(self, instance: Instance) -> Stats:
        data = self.containers.runtime.stats(instance.id) if self.containers.cgroups.parent else {}
        read = usage.stats(data, instance.pid, [instance.pid])
        return devices.stats(self, instance, read)

    def exec(self, instance: Instance, home: str, process: Process, detach: bool) -> int:
        return guest_view.execute(home, instance, process, detach, self.report)

    def copy(self, instance: Instance, home: str, alive: bool, source: str, target: str, into: bool) -> None:
        if not alive:
            raise StateError(
                "files of a machine are reached through its agent, and it is not running", "ovt start NAME"
            )
        guest_view.copy(home, instance, source, target, into)


__all__ = ["OvtError", "VmEngine"]
