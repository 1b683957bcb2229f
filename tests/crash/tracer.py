"""Kill a command at its n-th system call: a ptrace(2) loop of its own, so that the place is exact and repeatable.

The command is followed from execve on. `role` says whose calls are counted and who is killed:

    main        the command itself
    builder     its first fork
    init        the first program it spawns (ovt-init)
    container   the clone of that, the container's first process

SIGKILL is sent at the entry of the call, which is then not made.
"""

import ctypes
import os
import signal
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long

TRACEME, CONT, SYSCALL, SETOPTIONS, GETEVENTMSG, GET_SYSCALL_INFO = 0, 7, 24, 0x4200, 0x4201, 0x420E
O_TRACESYSGOOD, O_TRACEFORK, O_TRACEVFORK, O_TRACECLONE, O_TRACEEXEC = 1, 2, 4, 8, 16
EVENT_FORK, EVENT_VFORK, EVENT_CLONE = 1, 2, 3
ENTRY = 1
WALL = 0x40000000
OPTIONS = {
    "main": 0,
    "builder": O_TRACEFORK,
    "init": O_TRACEVFORK,
    "container": O_TRACEVFORK | O_TRACECLONE,
}
BORN = {("main", EVENT_FORK): "builder", ("main", EVENT_VFORK): "init", ("init", EVENT_CLONE): "container"}


def ptrace(request: int, pid: int, data: Any = None, address: int | None = None) -> int:
    result: int = _libc.ptrace(request, pid, address, data)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"ptrace({request:#x}, {pid})")
    return result


class Run:
    """One traced command. `calls` are the system calls of `role` in their order, `status` how the command ended."""

    def __init__(self, command: Sequence[str | Path], role: str, at: int, watch: str = "", **options: Any) -> None:
        """`at` counts from 0; -1 kills nobody. `mark` becomes the first call that names something in `watch`."""
        self.role = role
        self.at = at
        self.watch = os.fsencode(watch)
        self.calls: list[int] = []
        self.mark = -1
        self.killed = False
        self._roles: dict[int, str] = {}
        self._early: set[int] = set()
        process = subprocess.Popen(command, preexec_fn=lambda: _libc.ptrace(TRACEME, 0, None, None), **options)
        self._main = process.pid
        os.waitpid(self._main, 0)
        self._adopt(self._main, "main")
        ptrace(SETOPTIONS, self._main, O_TRACESYSGOOD | O_TRACEEXEC | OPTIONS[role])
        self._go_on(self._main)
        self.status = self._loop()
        process.returncode = self.status
        for pid in list(self._roles):
            self._end(pid)

    def _adopt(self, pid: int, role: str) -> None:
        self._roles[pid] = role

    def _go_on(self, pid: int, number: int = 0) -> None:
        counted = self._roles.get(pid) == self.role and not self.killed
        try:
            ptrace(SYSCALL if counted else CONT, pid, number)
        except ProcessLookupError:
            pass  # killed while it was stopped

    def _end(self, pid: int) -> None:
        """A process that was followed and has not ended by itself: the container that waits for its start."""
        try:
            os.kill(pid, signal.SIGKILL)
            while not os.WIFSIGNALED(os.waitpid(pid, WALL)[1]):
                continue
        except (ProcessLookupError, ChildProcessError):
            pass

    def _loop(self) -> int:
        while True:
            pid, status = os.waitpid(-1, WALL)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                self._roles.pop(pid, None)
                if pid == self._main:
                    return os.waitstatus_to_exitcode(status)
                continue
            number, event = os.WSTOPSIG(status), status >> 16
            if pid not in self._roles:
                self._early.add(pid)  # its parent's event is still to come
            elif number == signal.SIGTRAP | 0x80:
                self._at_call(pid)
                self._go_on(pid)
            elif event in (EVENT_FORK, EVENT_VFORK, EVENT_CLONE):
                self._born(pid, event)
                self._go_on(pid)
            elif event or number in (signal.SIGTRAP, signal.SIGSTOP):
                self._go_on(pid)
            else:
                self._go_on(pid, number)

    def _born(self, parent: int, event: int) -> None:
        message = ctypes.c_ulong()
        ptrace(GETEVENTMSG, parent, ctypes.addressof(message))
        self._adopt(message.value, BORN.get((self._roles[parent], event), "other"))
        if message.value in self._early:
            self._early.discard(message.value)
            self._go_on(message.value)

    def _at_call(self, pid: int) -> None:
        buffer = ctypes.create_string_buffer(88)
        ptrace(GET_SYSCALL_INFO, pid, ctypes.addressof(buffer), len(buffer))
        if buffer.raw[0] != ENTRY or self._roles[pid] != self.role:
            return
        number, *arguments = struct.unpack_from("=7Q", buffer.raw, 24)
        if self.watch and self.mark < 0 and self._names(pid, arguments[:2]):
            self.mark = len(self.calls)
        if len(self.calls) == self.at:
            os.kill(pid, signal.SIGKILL)
            self.killed = True
        self.calls.append(number)

    def _names(self, pid: int, arguments: Sequence[int]) -> bool:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for address in arguments:
                try:
                    memory.seek(address)
                    if memory.read(len(self.watch)) == self.watch:
                        return True
                except (OSError, OverflowError, ValueError):
                    continue
        return False


def points(first: int, length: int, count: int) -> list[int]:
    """`count` places, evenly spread from `first` to the last of `length` calls; fewer where there are fewer calls."""
    last = length - 1
    return sorted({first + (last - first) * i // max(count - 1, 1) for i in range(count)})
