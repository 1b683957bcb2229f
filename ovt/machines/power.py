"""reset, suspend, wake, save, screenshot, console and the wait for a guest: verbs that only machines have."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ovt import exits
from ovt.engine.vm import attached, guest_view, process, saved
from ovt.engine.vm.agent_verbs import suspend as suspend_by_agent
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Gone, QmpError
from ovt.errors import HostError, StateError, UsageError
from ovt.model import LIVE, Instance, Kind, Status, require

if TYPE_CHECKING:
    from ovt.engine.vm.engine import VmEngine
    from ovt.host import Host

_QUIT_SECONDS = 30.0
_SLEEP_SECONDS = 60.0
PROMISES = ("boot", "agent", "exit")


def machine(host: Host, verb: str, reference: str) -> Instance:
    """The instance, if it is a virtual machine in a state that `verb` is for; UsageError, StateError otherwise."""
    instance, status = host.get(reference)
    if instance.kind is not Kind.VM:
        raise UsageError(f"it is a container, and {verb} is for virtual machines", "ovt ps shows which is which")
    require(verb, instance.name, status)
    return instance


def reset(host: Host, reference: str) -> Instance:
    """Press the reset button: the guest boots anew, whatever it was doing."""
    instance = machine(host, "reset", reference)
    with host.vms.qmp(instance) as qmp:
        qmp.command("system_reset")
    host.journal.write("reset", instance.id, instance.name)
    return instance


def suspend(host: Host, reference: str) -> Instance:
    """Have the guest go to sleep (ACPI S3) through its agent; `wake` ends it. StateError when it cannot sleep.

    Only with UEFI. SeaBIOS, which also serves kernels that are started directly, does not give q35 its ACPI registers
    back at the wake-up (measured with 1.16.3): the guest wakes to a clock that stands still and a dead power button.
    """
    instance = machine(host, "suspend", reference)
    home = host.store.home(instance.id)
    if Hardware.load(home).firmware != "uefi":
        raise StateError(
            "its BIOS would wake it without clock and power button: only machines with UEFI can sleep",
            f"ovt pause {instance.name}, ovt save {instance.name}, or create it with --firmware uefi",
        )
    suspend_by_agent(guest_view.agent(home))
    deadline = time.monotonic() + _SLEEP_SECONDS
    while _run_state(host.vms, instance) != "suspended":
        if time.monotonic() > deadline:
            raise StateError(f"the guest has not gone to sleep in {_SLEEP_SECONDS:g} seconds", "look at its console")
        time.sleep(0.05)
    host.journal.write("suspend", instance.id, instance.name)
    return instance


def wake(host: Host, reference: str) -> Instance:
    """Wake a guest that sleeps; StateError when it does not."""
    instance = machine(host, "wake", reference)
    if _run_state(host.vms, instance) != "suspended":
        raise StateError("its guest is not asleep", f"ovt resume {instance.name} is for one that was paused")
    with host.vms.qmp(instance) as qmp:
        qmp.command("system_wakeup")
    host.journal.write("wake", instance.id, instance.name)
    return instance


def save(host: Host, reference: str, progress: Callable[[int, int], None] | None = None) -> Instance:
    """Write the machine's memory to the disk and end it; its next start goes on from there.

    When this raises, the guest goes on. A command that is killed leaves a guest that stands still, with or without its
    whole state on the disk: `resume` lets it go on, `save` again ends it.
    """
    with host.store.locked(reference) as instance:
        if instance.kind is not Kind.VM:
            raise UsageError("it is a container, and save is for virtual machines", "ovt-runtime checkpoint")
        require("save", instance.name, host.store.observe(instance))
        home = host.store.home(instance.id)
        engine = host.vms
        with engine.qmp(instance) as qmp:
            hardware = attached.settle(qmp, home, instance.started)
            # first, so that `resume` is there for it when this command is killed
            paused = host.store.save(instance._replace(status=Status.PAUSED))
            try:
                saved.save(qmp, engine.features, hardware, home, progress)
            except BaseException:
                host.store.save(paused._replace(status=instance.status))
                raise
            with contextlib.suppress(Gone):  # it may end before it answers
                qmp.command("quit")
        if exits.wait_for_record(home, _QUIT_SECONDS) is None:
            engine.signal(instance, 9, everyone=True)
            exits.wait_for_record(home, _QUIT_SECONDS)
        engine.cleanup(instance, home)
        ended = instance._replace(status=Status.SAVED, pid=0, start_time=0, finished=time.time(), restart_at=0.0)
        instance = host.store.save(ended, durable=True)
    host.journal.write("save", instance.id, instance.name)
    return instance


def screenshot(host: Host, reference: str, path: str) -> Instance:
    """Write what is on the machine's screen to the PNG file `path`, whole or not at all."""
    instance = machine(host, "screenshot", reference)
    if not Hardware.load(host.store.home(instance.id)).graphics:
        raise StateError("it has no screen", "ovt create --graphics; its text console is `ovt logs` and `ovt console`")
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # QEMU opens it for writing alone, and takes no descriptor of another mode
        writable = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            with host.vms.qmp(instance) as qmp:
                number = qmp.add_fd(writable)
                try:
                    qmp.command("screendump", {"filename": f"/dev/fdset/{number}", "format": "png"})
                finally:
                    with contextlib.suppress(QmpError):
                        qmp.command("remove-fd", {"fdset-id": number})
        finally:
            os.close(writable)
        if not os.fstat(fd).st_size:
            raise HostError("QEMU has written no picture")
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    return instance


def with_screen(host: Host, reference: str) -> Instance:
    """The machine, if it has a screen; StateError otherwise."""
    instance = machine(host, "console", reference)
    if not Hardware.load(host.store.home(instance.id)).graphics:
        raise StateError("it has no screen", "ovt create --graphics, or `ovt console` without --vnc")
    return instance


def viewer(host: Host, reference: str, connection: int) -> None:
    """Hand a viewer's connection (a stream socket) to the machine's VNC server."""
    instance = with_screen(host, reference)
    with host.vms.qmp(instance) as qmp:
        qmp.get_fd(connection, "viewer")
        qmp.command("add_client", {"protocol": "vnc", "fdname": "viewer", "skipauth": True})


def guest(host: Host, reference: str) -> dict[str, Any]:
    """What the guest says of itself through its agent: system, addresses, file systems, users."""
    instance = machine(host, "guest", reference)
    return guest_view.info(host.store.home(instance.id), instance)


def wait_for(host: Host, reference: str, what: str, timeout: float, report: Callable[[str], None]) -> Instance:
    """Wait until a machine has booted (`boot`: its first output, or its agent) or its agent answers (`agent`).

    StateError after `timeout` seconds (0: five minutes), saying what did not come and where to look.
    """
    instance = machine(host, "console", reference)
    home = host.store.home(instance.id)
    if what == "agent":
        guest_view.wait(home, instance, timeout, report)
        return instance
    deadline = time.monotonic() + (timeout or 300.0)
    report(f"waiting for the first output of {instance.name}'s guest")
    while not _has_output(home) and not _agent_seen(home):
        if host.store.observe(host.get(reference)[0]) not in LIVE:
            raise StateError("it ended before its guest showed any life", f"ovt logs {instance.name}")
        if time.monotonic() > deadline:
            raise StateError(
                f"its guest has shown no life for {timeout or 300.0:g} seconds: no output on the console, no agent",
                f"does it boot from {instance.spec.image}? ovt console {instance.name}",
            )
        time.sleep(0.02)
    return instance


def _has_output(home: str) -> bool:
    return os.path.exists(f"{home}/log") and os.path.getsize(f"{home}/log") > 0


def _agent_seen(home: str) -> bool:
    try:
        with open(f"{home}/{process.EVENTS}", "rb") as file:
            return b"VSERPORT_CHANGE" in file.read()
    except FileNotFoundError:
        return False


def _run_state(engine: VmEngine, instance: Instance) -> str:
    with engine.qmp(instance) as qmp:
        return str(qmp.command("query-status")["status"])
