"""What is asked of a guest agent in one command: is it there, shut down, sleep, set the clock, freeze the file systems.

Programs, files and descriptions of the guest have modules of their own. Nothing here knows QEMU: whether the guest
really went down or fell asleep is seen in QEMU's events.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ovt.engine.attach import handlers
from ovt.engine.vm.agent import Agent, NoAgent
from ovt.errors import HostError, OvtError, UsageError

SHUTDOWN_MODES = ("powerdown", "halt", "reboot")
_REFUSES = 3.0  # seconds in which a refusal of a command that answers nothing else would have come
_SLICE = 1.0
_THAW_AGAIN = 1.0


def ping(agent: Agent) -> None:
    """Return when the agent answers; NoAgent, AgentError when it does not."""
    agent.command("guest-ping", timeout=agent.sync_timeout)


def wait_for_agent(
    agent: Agent,
    timeout: float,
    report: Callable[[str], None] = lambda line: None,
    alive: Callable[[], bool] = lambda: True,
) -> None:
    """Return as soon as an agent answers; NoAgent after `timeout` seconds, or when the VM is not `alive` any more.

    `report` hears once what is waited for. An agent that starts meanwhile finds our question in its port and answers
    at once.
    """
    deadline = time.monotonic() + timeout
    told = False
    pause = 0.005
    while True:
        left = deadline - time.monotonic()
        try:
            agent.sync(max(0.05, min(_SLICE, left)))
            return
        except NoAgent:
            pass
        if not alive():
            raise NoAgent("the VM ended before its guest agent answered")
        if time.monotonic() >= deadline:
            raise NoAgent(f"no guest agent has answered in {timeout:g} seconds")
        if not told:
            report("waiting for the guest's agent")
            told = True
        time.sleep(pause)
        pause = min(pause * 1.3, 0.1)


def shutdown(agent: Agent, mode: str = "powerdown") -> None:
    """Have the guest end (`powerdown`, `halt`) or start again (`reboot`); it is under way when this returns."""
    if mode not in SHUTDOWN_MODES:
        raise UsageError(f"{mode!r} is no way to shut down", f"one of {', '.join(SHUTDOWN_MODES)}")
    agent.command("guest-shutdown", {"mode": mode}, timeout=_REFUSES, answers=False)


def suspend(agent: Agent) -> None:
    """Have the guest sleep (ACPI S3); QEMU's event SUSPEND says when it does."""
    agent.need("guest-suspend-ram", "suspending")
    agent.command("guest-suspend-ram", timeout=_REFUSES, answers=False)


def set_time(agent: Agent, seconds: float | None = None) -> None:
    """Set the guest's clock, by default to the host's now; after a guest was paused, saved or cloned."""
    now = time.time_ns() if seconds is None else int(seconds * 1e9)
    agent.command("guest-set-time", {"time": now})


@contextmanager
def fsfreeze(
    agent: Agent,
    timeout: float = 30.0,
    *,
    thaw_timeout: float = 60.0,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[int]:
    """While this lasts nothing is written to the guest's file systems; gives their number.

    The freeze takes at most `timeout` seconds, else AgentError; whatever happens, also ^C and SIGTERM, the thaw
    follows, and is tried for `thaw_timeout` seconds when the agent is silent, which `report` hears. HostError when
    that was in vain: the guest may hang then until it is reset. Inside, use no other command of the agent: it knows
    that programs it would start could block for ever.
    """
    for name in ("guest-fsfreeze-freeze", "guest-fsfreeze-thaw"):
        agent.need(name, "freezing the guest's file systems")
    with handlers(tuple(n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL), _leave):
        try:
            count = agent.command("guest-fsfreeze-freeze", timeout=timeout)
            yield count if isinstance(count, int) and count >= 0 else 0
        finally:
            _thaw(agent, thaw_timeout, report)


def _leave(number: int) -> None:
    raise SystemExit(128 + number)


def _thaw(agent: Agent, seconds: float, report: Callable[[str], None]) -> None:
    """Thaw until it is true. What is raised from outside meanwhile (^C, SIGTERM) is raised at the end."""
    deadline = time.monotonic() + seconds
    interrupted: BaseException | None = None
    why = ""
    while True:
        try:
            agent.command("guest-fsfreeze-thaw", timeout=max(1.0, min(10.0, deadline - time.monotonic())))
            break
        except (KeyboardInterrupt, SystemExit) as outside:
            interrupted, why = outside, "interrupted"
        except OvtError as error:
            why = str(error)
        if time.monotonic() > deadline:
            raise HostError(
                f"the guest's file systems may be frozen: its agent could not be told to thaw them ({why})",
                hint="ovt console, then fsfreeze --unfreeze DIRECTORY in the guest; or ovt reset",
            )
        try:
            report(f"the guest's file systems are still frozen, thawing them again: {why}")
            time.sleep(_THAW_AGAIN)
        except (KeyboardInterrupt, SystemExit) as outside:
            interrupted = outside
    if interrupted:
        raise interrupted
