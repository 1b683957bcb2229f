"""Into the guest through its agent: the engine's exec, cp, top and the wait for a guest that is up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ovt.engine.base import Process
from ovt.engine.vm import agent_copy, agent_exec, agent_program, agent_verbs, guest_info, process
from ovt.engine.vm.agent import Agent, NoAgent, port_open, printable
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Gone
from ovt.errors import OvtError, StateError
from ovt.model import Instance

_BOOT_SECONDS = 300.0  # for an emulated guest with a whole system
_SLOW_SYNC = 15.0  # seconds an agent may take to answer where the processor is emulated
_COLUMNS = "pid=,user=,stat=,time=,rss=,args="


def agent(home: str, emulated: bool | None = None) -> Agent:
    """The agent of the machine in `home`. Nobody waits for it when QEMU knows that nothing in the guest listens."""

    def is_open() -> bool | None:
        try:
            with process.running(home, 5.0) as qmp:
                return port_open(qmp)
        except Gone:
            return False

    if emulated is None:
        emulated = Hardware.load(home).accel == "tcg"
    return Agent(home, sync_timeout=_SLOW_SYNC if emulated else 3.0, is_open=is_open)


def execute(home: str, instance: Instance, program: Process, detach: bool, note: Callable[[str], None]) -> int:
    """Run a program in the guest with this process's streams; see Engine.exec."""
    connection = agent(home)
    _await(connection, instance)
    if instance.rootfs.get("builtin"):  # its environment is the instance's; that of an installed system is its own
        spec = instance.spec
        program = program._replace(
            env=(*spec.env, *program.env), workdir=program.workdir or spec.workdir, user=program.user or spec.user
        )
    return agent_exec.execute(connection, program, detach=detach, note=note)


def copy(home: str, instance: Instance, source: str, target: str, into: bool) -> None:
    """Copy between the host and the guest; see Engine.copy."""
    connection = agent(home)
    _await(connection, instance)
    agent_copy.copy(connection, instance.name, source, target, into)


def processes(home: str, instance: Instance) -> list[dict[str, Any]]:
    """What `ps` says in the guest; see Engine.processes. There are no pids of the host: those are QEMU's."""
    connection = agent(home)
    _await(connection, instance)
    done = agent_program.collect(connection, ("ps", "-eo", _COLUMNS))
    if done.status:
        done = agent_program.collect(connection, ("ps", "-o", "pid,user,stat,time,rss,args"))  # busybox
    if done.status:
        raise StateError("the guest has no `ps` that works", f"ovt exec {instance.name} sh")
    found = []
    for line in done.out.decode(errors="replace").splitlines():
        fields = line.split(None, 5)
        if len(fields) == 6 and fields[0].isdigit():
            pid, user, state, time, rss, command = fields
            found.append(
                {
                    "pid": int(pid),
                    "user": printable(user, 64),
                    "state": state[0],
                    "cpu_seconds": _seconds(time),
                    "memory": _kibibytes(rss),
                    "command": printable(command, 4096),
                }
            )
    return found


def info(home: str, instance: Instance) -> dict[str, Any]:
    """What the guest says of itself; see guest_info."""
    connection = agent(home)
    _await(connection, instance)
    return guest_info.guest_info(connection)


def wait(home: str, instance: Instance, timeout: float, report: Callable[[str], None]) -> None:
    """Wait until the guest's agent answers. NoAgent with what to do when none has in `timeout` seconds."""
    try:
        agent_verbs.wait_for_agent(agent(home), timeout or _BOOT_SECONDS, report, lambda: _alive(home))
    except NoAgent as error:
        raise _named(error, instance) from None


def _await(connection: Agent, instance: Instance) -> None:
    """The agent of the built-in image is about to come, so it is waited for; another's absence is an answer."""
    try:
        if instance.rootfs.get("builtin"):
            agent_verbs.wait_for_agent(connection, _BOOT_SECONDS, alive=lambda: _alive(connection.home))
        else:
            connection.about()
    except NoAgent as error:
        raise _named(error, instance) from None


def _named(error: NoAgent, instance: Instance) -> OvtError:
    error.hint = f"install and start qemu-guest-agent in the guest, or use `ovt console {instance.name}`"
    return error


def _alive(home: str) -> bool:
    try:
        with process.running(home, 5.0) as qmp:
            return bool(qmp.command("query-status")["status"] not in {"shutdown", "guest-panicked"})
    except Gone:
        return False


def _seconds(text: str) -> float:
    """`[[days-]hours:]minutes:seconds` of ps."""
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = total * 60 + int(part) if part.isdigit() else total
    return float(total + (int(days) * 86400 if days.isdigit() else 0))


def _kibibytes(text: str) -> int:
    """Bytes from ps's column rss: KiB, in busybox with a unit."""
    unit = {"m": 1 << 20, "g": 1 << 30}.get(text[-1:], 1 << 10)
    number = text.rstrip("mg")
    return int(float(number) * unit) if number.replace(".", "", 1).isdigit() else 0
