"""The protocol between the host and what runs its guests, implemented by the engines for containers and machines.

An engine knows how a guest is made and reached; it keeps no list of instances and decides no policy: the store, names,
restart policies and locks belong to the host. `home` is the instance's directory, for the engine to keep files in
beside the store's own. Everything raises OvtError with the reason alone; the caller knows verb and instance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ovt.model import Instance, Kind, Limits, Spec, Status


class Guest(NamedTuple):
    """The processes of a guest that has been made; pid and start time in clock ticks since boot."""

    pid: int
    start_time: int
    supervisor_pid: int
    supervisor_start_time: int


class Process(NamedTuple):
    """A program to run inside a guest beside its own."""

    command: tuple[str, ...]
    env: tuple[str, ...] = ()  # KEY=VALUE, above the instance's own
    workdir: str = ""
    user: str = ""
    tty: bool = False
    stdin: bool = False
    privileged: bool = False


class Stats(NamedTuple):
    """What a guest uses now. Bytes, seconds and counts since its start; 0 limits mean none."""

    cpu_seconds: float
    memory: int
    memory_limit: int
    pids: int
    pids_limit: int
    block_read: int
    block_write: int
    network_received: int
    network_sent: int
    exits: int = 0  # of a machine under KVM, to the host


class Leftover(NamedTuple):
    """Something that no instance owns any more."""

    kind: str  # container, cgroup, instance, image …
    name: str
    reason: str


class Engine(Protocol):
    """One way to run guests."""

    kind: Kind

    def prepare(self, spec: Spec) -> tuple[Spec, dict[str, Any]]:
        """Resolve the image and check everything that can be checked before the first start.

        The spec with the image's defaults filled in, and what the engine wants kept as `Instance.rootfs`.
        """

    def plan(self, instance: Instance, home: str) -> list[str]:
        """What `create` would do, one line each, without doing it."""

    def create(self, instance: Instance, home: str, exit_command: list[str], env: dict[str, str]) -> Guest:
        """Make the guest under a supervisor, up to the point where only `start` is missing.

        The supervisor runs `exit_command` with `env` when the guest has ended. Nothing is left when it raises.
        """

    def start(self, instance: Instance) -> None:
        """Let the made guest run its program."""

    def status(self, instance: Instance) -> Status:
        """RUNNING, PAUSED or STOPPED, asked of the guest itself."""

    def signal(self, instance: Instance, signal: int, everyone: bool = False) -> None:
        """Send a signal to the guest's first process, or to every process; nothing happens when it has ended."""

    def freeze(self, instance: Instance, frozen: bool) -> None:
        """Stop all processes of the guest where they are, or let them go on."""

    def update(self, instance: Instance, limits: Limits) -> None:
        """Put new limits on a living guest."""

    def exec(self, instance: Instance, home: str, process: Process, detach: bool) -> int:
        """Run a program in the guest with this process's standard streams; its exit status.

        With `detach` it has no streams, is not waited for, and the answer is its pid.
        """

    def processes(self, instance: Instance) -> list[dict[str, Any]]:
        """All processes in the guest: `pid` inside, `host_pid`, `host_uid`, `state` as in proc(5), `cpu_seconds`,
        `memory` in bytes, `command`. For a machine the host's are None, and `user` is a name in the guest."""

    def stats(self, instance: Instance) -> Stats:
        """What the guest uses now."""

    def copy(self, instance: Instance, home: str, alive: bool, source: str, target: str, into: bool) -> None:
        """Copy a file or tree between the host and the guest, alive or not.

        `into`: `source` is the host's and `target` the guest's path; otherwise the other way round.
        """

    def cleanup(self, instance: Instance, home: str) -> bool:
        """After the guest's end, or to make an end of it: kill what still runs and remove its run-time state.

        The instance's files stay. Safe to repeat; also finishes what a killed `create` left. True when the kernel has
        killed processes of the guest because its memory limit was reached.
        """

    def exit_code(self, instance: Instance, home: str, code: int) -> int:
        """The exit status to tell of a guest whose first process has ended with `code`."""

    def destroy(self, instance: Instance, home: str) -> None:
        """Remove the engine's files in `home`; only after `cleanup`."""

    def leftovers(self, owned: Callable[[str], bool], remove: bool = False) -> list[Leftover]:
        """Run-time state of ids that no instance has (`owned` says which); with `remove` it is taken away.

        `owned` is asked after the state was seen: an instance that comes into being meanwhile keeps its own.
        """
