"""An engine whose guests are `sleep` processes: everything above the engine is tested with it, without privileges.

A guest ends when it gets TERM (unless it is stubborn), KILL, or when the test says so with `finish`. The exit command
is not run: a test that wants the restart policy calls `ovt.exits` itself, in the place of the supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

from ovt.engine.base import Guest, Leftover, Process, Stats
from ovt.errors import OvtError
from ovt.kernel import procfs
from ovt.model import Instance, Kind, Limits, Spec, Status


class FakeEngine:
    """Implements ovt.engine.base.Engine; `calls` is what was asked of it, `fail` maps a method to what it raises."""

    kind = Kind.CONTAINER

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, OvtError] = {}
        self.stubborn = False
        self.guests: dict[str, subprocess.Popen[bytes]] = {}
        self.homes: dict[str, str] = {}
        self.frozen: set[str] = set()
        self.traces: set[str] = set()
        self.starved: set[str] = set()
        self.exit_commands: dict[str, list[str]] = {}

    def _note(self, method: str, *details: Any) -> None:
        self.calls.append((method, *details))
        if method in self.fail:
            raise self.fail[method]

    def prepare(self, spec: Spec) -> tuple[Spec, dict[str, Any]]:
        self._note("prepare", spec.image)
        return spec._replace(command=spec.command or ("sh",)), {"layers": ["/image"]}

    def plan(self, instance: Instance, home: str) -> list[str]:
        return [f"run {' '.join(instance.spec.command)}"]

    def create(self, instance: Instance, home: str, exit_command: list[str], env: dict[str, str]) -> Guest:
        self._note("create", instance.id)
        if os.path.exists(f"{home}/exit.json"):
            os.unlink(f"{home}/exit.json")
        guest = self.guests[instance.id] = subprocess.Popen(["sleep", "1000"])
        self.homes[instance.id] = home
        self.traces.add(instance.id)
        self.exit_commands[instance.id] = exit_command
        started, own, since = procfs.start_time(guest.pid) or 0, os.getpid(), procfs.start_time(os.getpid()) or 0
        record = {"pid": own, "start_time": since, "child_pid": guest.pid, "child_start_time": started}
        with open(f"{home}/supervisor.json", "w") as file:
            json.dump(record, file)
        return Guest(guest.pid, started, own, since)

    def start(self, instance: Instance) -> None:
        self._note("start", instance.id)

    def status(self, instance: Instance) -> Status:
        if instance.id not in self.guests:
            return Status.STOPPED
        return Status.PAUSED if instance.id in self.frozen else Status.RUNNING

    def signal(self, instance: Instance, signal: int, everyone: bool = False) -> None:
        self._note("signal", instance.id, signal)
        if signal == 9 or (signal == 15 and not self.stubborn):
            self.finish(instance.id, 128 + signal, signal)

    def finish(self, id: str, code: int, number: int | None = None, record: bool = True) -> None:
        """End a guest, with the record that a supervisor would leave."""
        guest = self.guests.pop(id, None)
        if guest is None:
            return
        guest.send_signal(signal.SIGKILL)
        guest.wait()
        self.frozen.discard(id)
        if record:
            data = {"pid": guest.pid, "code": code, "signal": number, "finished": "2026-01-01T00:00:00.000000000Z"}
            with open(f"{self.homes[id]}/exit.json", "w") as file:
                json.dump(data, file)

    def freeze(self, instance: Instance, frozen: bool) -> None:
        self._note("freeze", instance.id, frozen)
        (self.frozen.add if frozen else self.frozen.discard)(instance.id)

    def update(self, instance: Instance, limits: Limits) -> None:
        self._note("update", instance.id, limits)

    def exec(self, instance: Instance, home: str, process: Process, detach: bool) -> int:
        self._note("exec", instance.id, process, detach)
        return 4242 if detach else 7

    def processes(self, instance: Instance) -> list[dict[str, Any]]:
        pid = self.guests[instance.id].pid
        row = {"pid": 1, "host_pid": pid, "host_uid": 0, "state": "S", "cpu_seconds": 61.5, "memory": 4096}
        return [{**row, "command": "sleep 1000"}]

    def stats(self, instance: Instance) -> Stats:
        self._note("stats", instance.id)
        return Stats(1.0, 3 << 20, 64 << 20, 2, 0, 1024, 2048, 10, 20)

    def copy(self, instance: Instance, home: str, alive: bool, source: str, target: str, into: bool) -> None:
        self._note("copy", instance.id, alive, source, target, into)

    def cleanup(self, instance: Instance, home: str) -> bool:
        self._note("cleanup", instance.id)
        self.finish(instance.id, 137, 9)
        self.traces.discard(instance.id)
        return instance.id in self.starved

    def exit_code(self, instance: Instance, home: str, code: int) -> int:
        return code

    def destroy(self, instance: Instance, home: str) -> None:
        self._note("destroy", instance.id)

    def leftovers(self, owned: Callable[[str], bool], remove: bool = False) -> list[Leftover]:
        found = [Leftover("container", id, "running") for id in sorted(self.traces) if not owned(id)]
        if remove:
            for leftover in found:
                self.finish(leftover.name, 137, 9, record=False)
                self.traces.discard(leftover.name)
        return found

    def close(self) -> None:
        """End every guest."""
        for id in list(self.guests):
            self.finish(id, 137, 9)
