"""One lab host, and a second that is wired to it: a network between their second igb cards, and a control cable.

The cable joins the first host's port lab.cable to the second one's agent, so that a test in the first runs commands in
the second without anything of the outside taking part (tests/lab/second.py).
"""

import socket
from collections.abc import Callable
from typing import Any

from tests.lab.machine import Machine


class Hosts:
    """`first` boots at once, `second` from `start_second` on. A context manager that kills both."""

    def __init__(self) -> None:
        self.second: Machine | None = None
        self.wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.cable = socket.socketpair()
        try:
            self.first = Machine(1, self.wire[0], self.cable[0])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start_second(self) -> None:
        """Boot the second one if that has not been done. On two processors two hosts that boot at once take four
        times as long as one, so it comes when it is asked for; who uses the cable waits for it."""
        if self.second is None:
            self.second = Machine(2, self.wire[1], control=self.cable[1])

    def kill(self) -> None:
        for machine in (self.first, self.second):
            if machine:
                machine.kill()
        self.close()

    def close(self) -> None:
        # An end whose other end is held by nobody would count as hung up, so all are kept until now.
        for end in (*self.wire, *self.cable):
            end.close()

    def wait_for_boot(self, tick: Callable[[float], Any] = lambda _: None) -> float:
        """Wait for the first one. Seconds it took."""
        return self.first.wait_for_boot(tick)

    def cpu_seconds(self) -> float:
        """Processor time that the QEMUs have used, seconds."""
        return sum(machine.cpu_seconds() for machine in (self.first, self.second) if machine)

    def check(self) -> None:
        """Raises Failed when the second host is gone."""
        if self.second and self.second.process.poll() is not None:
            raise self.second.failure("ended")
