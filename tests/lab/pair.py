"""One lab host or two that are wired together: a network between their second igb cards, and a control cable.

The cable joins the first host's port lab.cable to the second one's agent, so that a test in the first runs commands in
the second without anything of the outside taking part (tests/lab/second.py).
"""

import socket
from collections.abc import Callable
from typing import Any

from tests.lab.machine import Machine


class Hosts:
    """`first`, and where `two` was asked for `second`, which boots at the same time. A context manager."""

    def __init__(self, *, two: bool = False) -> None:
        self.second: Machine | None = None
        if not two:
            self.first = Machine()
            return
        wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        cable = socket.socketpair()
        try:
            self.first = Machine(1, wire[0], cable[0])
            self.second = Machine(2, wire[1], control=cable[1])
        finally:
            for end in (*wire, *cable):
                end.close()

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        for machine in (self.first, self.second):
            if machine:
                machine.kill()

    def wait_for_boot(self, tick: Callable[[float], Any] = lambda _: None) -> float:
        """Wait for the first one; the second is waited for by whoever uses the cable. Seconds it took."""
        return self.first.wait_for_boot(tick)

    def cpu_seconds(self) -> float:
        """Processor time that the QEMUs have used, seconds."""
        return sum(machine.cpu_seconds() for machine in (self.first, self.second) if machine)

    def check(self) -> None:
        """Raises Failed when the second host is gone."""
        if self.second and self.second.process.poll() is not None:
            raise self.second.failure("ended")
