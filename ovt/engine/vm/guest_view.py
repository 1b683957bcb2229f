"""Into the guest through its agent: the engine's exec, cp, top and the wait for a guest that is up."""

from __future__ import annotations

import itertools
import re
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
# One program for all files, because a guest may need a hundredth of a second to start one.
_READ_PROC = "head -c 4000 /proc/[0-9]*/stat /proc/[0-9]*/status /proc/[0-9]*/cmdline"
_HEADER = re.compile(r"(?:\A|\n)==> (?=/proc/\d)|(?<=/stat) <==\n|(?<=/status) <==\n|(?<=/cmdline) <==\n")
_FILE = re.compile(r"/proc/(\d+)/(stat|status|cmdline)")
_TICKS, _PAGE = 100, 4096  # USER_HZ and the page size of x86


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
    """The guest's processes, read from its /proc (proc(5)); see Engine.processes. StateError for one that has none."""
    connection = agent(home)
    _await(connection, instance)
    done = agent_program.collect(connection, ("sh", "-c", _READ_PROC))
    files: dict[tuple[int, str], str] = {}
    for header, content in itertools.pairwise([*_HEADER.split(done.out.decode(errors="replace"))[1:], ""]):
        if (known := _FILE.fullmatch(header)) is not None:
            files[int(known[1]), known[2]] = content
    found = [_process(pid, files) for pid, name in sorted(files) if name == "stat"]
    if not found:
        raise StateError("the guest does not show its processes as Linux does", f"ovt exec {instance.name} ps")
    return [entry for entry in found if entry]


def _process(pid: int, files: dict[tuple[int, str], str]) -> dict[str, Any]:
    """One process; empty when it ended while it was read."""
    name, _, rest = files[pid, "stat"].partition("(")[2].rpartition(")")
    fields = rest.split()
    uid = re.search(r"^Uid:\s+(\d+)", files.get((pid, "status"), ""), re.MULTILINE)
    if len(fields) < 22 or uid is None:
        return {}
    command = files.get((pid, "cmdline"), "").rstrip("\0\n").replace("\0", " ")
    return {
        "pid": pid,
        "host_pid": None,
        "host_uid": None,
        "user": uid[1],
        "state": printable(fields[0], 1),
        "cpu_seconds": round((int(fields[11]) + int(fields[12])) / _TICKS, 2),
        "memory": int(fields[21]) * _PAGE,
        "command": printable(command or f"[{name}]", 4096),
    }


def info(home: str, instance: Instance) -> dict[str, Any]:
    """What the guest says of itself; see guest_info."""
    connection = agent(home)
    _await(connection, instance)
    return guest_info.guest_info(connection)


def set_clock(home: str) -> None:
    """Tell a guest that has stood still what time it is; one without an agent finds out by itself, or not."""
    connection = agent(home, emulated=False)
    try:
        agent_verbs.set_time(connection)
    except OvtError:
        pass  # nothing depends on it, and the guest runs


def wait(home: str, instance: Instance, timeout: float, report: Callable[[str], None]) -> None:
    """Wait until the guest's agent answers. NoAgent with what to do when none has in `timeout` seconds."""
    try:
        agent_verbs.wait_for_agent(agent(home), timeout or _BOOT_SECONDS, report, lambda: _alive(home))
    except NoAgent as error:
        raise _named(error, instance) from None


def await_program(home: str) -> None:
    """Wait until the built-in image has started its program: its agent answers only then. Fine when it has ended."""
    try:
        agent_verbs.wait_for_agent(agent(home), _BOOT_SECONDS, alive=lambda: _alive(home))
    except OvtError:
        pass  # the program has ended already, or whoever joins the console sees what it is that does not come


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
