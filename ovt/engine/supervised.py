"""What a supervised guest leaves to be seen from outside: supervisor.json, attach.sock and exit.json in its directory.

Reading and waiting only: supervisor.py makes these guests, supervisor.c describes the packets of the socket.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovt.errors import NotFound, StateError

if TYPE_CHECKING:
    from socket import socket

INFO = "supervisor.json"
EXIT = "exit.json"
SOCKET = "attach.sock"
LOSSLESS = 1
QUIET = 2
PACKET = 16384
POLL = 0.02


@dataclass(frozen=True)
class SupervisorInfo:
    """Who supervises a guest: process ids in the caller's pid namespace, start times in clock ticks after boot."""

    pid: int
    start_time: int
    child_pid: int
    child_start_time: int


@dataclass(frozen=True)
class ExitRecord:
    """How a guest ended: `code` is 0..255, and 128 + n (like a shell's) for one killed by `signal` n.

    `finished` is RFC 3339 in UTC with nanoseconds.
    """

    pid: int
    code: int
    signal: int | None
    finished: str


def start_time(pid: int) -> int | None:
    """When process `pid` started, in clock ticks after boot (proc(5), stat field 22); None for none or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def info(directory: str) -> SupervisorInfo:
    """What launch recorded in `directory`; NotFound when no supervisor was ever launched there."""
    try:
        with open(os.path.join(directory, INFO), encoding="ascii") as file:
            return SupervisorInfo(**json.load(file))
    except FileNotFoundError:
        raise NotFound(f"no guest was ever started in {directory}") from None


def alive(directory: str) -> bool:
    """Whether the supervisor of `directory` runs, by pid and start time.

    False with an `exit_record` is a guest that ended. False without one means that the supervisor was killed (kill
    -9, out of memory) before its guest ended: the guest may still run, its output goes nowhere and its exit status
    will never be known. The caller then stops the guest by other means (its cgroup), records the exit as unknown and
    runs by itself what the exit command would have done. The exit command runs under the same pid, so this stays
    true until it has finished. NotFound without a supervisor.
    """
    known = info(directory)
    return start_time(known.pid) == known.start_time


def exit_record(directory: str) -> ExitRecord | None:
    """How the guest of `directory` ended, None while it has not."""
    try:
        with open(os.path.join(directory, EXIT), encoding="ascii") as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    return ExitRecord(record["pid"], record["code"], record.get("signal"), record["finished"])


def connect(directory: str, flags: int, timeout: float | None = None) -> tuple[socket, int] | None:
    """A greeted connection to the supervisor and the flags of its answer; None when it takes no (more) clients.

    TimeoutError when it does not answer within `timeout` seconds, which then holds for the connection as well.
    """
    import socket

    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.settimeout(timeout)
    try:
        # sun_path holds 107 characters, instance directories may be longer
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            client.connect(f"/proc/self/fd/{fd}/{SOCKET}")
        finally:
            os.close(fd)
        client.send(bytes((ord("H"), flags)))
        answer = client.recv(PACKET + 1)
    except (FileNotFoundError, ConnectionError):
        answer = b""
    except BaseException:
        client.close()
        raise
    if answer[:1] == b"A":
        return client, answer[1]
    client.close()
    return None


def wait(directory: str, timeout: float | None = None) -> ExitRecord:
    """Wait for the guest's end at most `timeout` seconds (None: forever).

    TimeoutError when it still runs then; StateError when its supervisor is gone without having recorded an exit
    (see `alive`); NotFound without a supervisor.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        running = alive(directory)  # before the record: a supervisor that is gone now has written it before
        record = exit_record(directory)
        if record:
            return record
        if not running:
            raise StateError(
                f"the supervisor in {directory} was killed: the exit status of its guest is unknown",
                "stop what is left of the guest with `ovt kill`, then start it again",
            )
        left = None if deadline is None else deadline - time.monotonic()
        try:
            if left is not None and left <= 0:
                raise TimeoutError
            connection = connect(directory, QUIET, left)
            if connection:
                with connection[0] as client:
                    client.recv(PACKET + 1)  # the exit or the end of the connection: look again in both cases
                continue
        except TimeoutError:
            raise TimeoutError(f"the guest in {directory} did not end within {timeout:g} seconds") from None
        except ConnectionError:
            pass
        time.sleep(POLL)  # starting, ending, or serving as many clients as it can
