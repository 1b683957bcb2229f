"""One program in a guest, in the words of its agent: start it, ask how it is, carry its streams.

The lower half of agent_exec.py and agent_copy.py, and all that knows what the answers look like: guest-exec of any
qemu-guest-agent, ovt-exec and ovt-io of our own. It touches no stream of ours.
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ovt.engine.base import Process
from ovt.engine.vm.agent import Agent, AgentError
from ovt.errors import OvtError, PayloadError, StateError

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WAIT = 0.25  # seconds that our agent may think about one ovt-io; others get their turn then
FIRST_LOOK, LAST_LOOK = 0.005, 0.1  # seconds between questions whether a program has ended


class Collected(NamedTuple):
    """How a program ended (128 + n for signal n), and all it wrote; `lost` when the agent did not keep all."""

    status: int
    out: bytes
    err: bytes
    lost: bool


class Piece(NamedTuple):
    """What one ovt-io brought: output, how many bytes of input are unread, and the exit status once it has ended."""

    out: bytes
    err: bytes
    unread: int
    status: int | None


def collect(agent: Agent, command: tuple[str, ...], timeout: float = 60.0) -> Collected:
    """Run a program of the guest to its end, without input; AgentError when it takes longer than `timeout` seconds."""
    deadline = time.monotonic() + timeout
    with agent.turn():
        pid = start(agent, command, [PATH], True)
        look = FIRST_LOOK
        while (done := status(agent, pid)) is None:
            if time.monotonic() > deadline:
                raise AgentError(f"{command[0]} has not ended in the guest in {timeout:g} seconds", AgentError.TIMEOUT)
            agent.give_way()
            time.sleep(look)
            look = min(look * 1.5, LAST_LOOK)
    return done


def environment(process: Process) -> list[str]:
    """KEY=VALUE words of a program: a PATH, and TERM with a terminal, unless it brings its own."""
    words = [PATH]
    if process.tty:
        words.append(f"TERM={os.environ.get('TERM') or 'xterm'}")
    pairs = dict(word.partition("=")[::2] for word in (*words, *process.env))
    return [f"{key}={value}" for key, value in pairs.items()]


def introduce(agent: Agent, identity: Mapping[str, Any], process: Process | None, timeout: float) -> None:
    """Tell a guest of the built-in image who it is and start its main program, if `process` is one.

    NoAgent after `timeout` seconds without an answer, PayloadError when the program cannot be run.
    """
    commands = [("ovt-identity", identity)]
    if process is not None:
        commands.append(("ovt-main", _arguments(process)))
    try:
        agent.introduce(commands, timeout)
    except AgentError as error:
        if process is None or not error.message.startswith("ovt-main: "):
            raise
        raise _refusal(error, "ovt-main", process.command[0]) from error


def _arguments(process: Process) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "path": process.command[0],
        "arg": list(process.command[1:]),
        "env": environment(process),
        "tty": process.tty,
    }
    if process.workdir:
        arguments["cwd"] = process.workdir
    if process.user:
        arguments["user"] = process.user
    return arguments


class Program:
    """A program under our own agent, with pipes or a terminal; inside one turn of the agent, or several."""

    def __init__(self, agent: Agent, process: Process, size: tuple[int, int] | None = None) -> None:
        self.agent = agent
        arguments = _arguments(process)
        if size:
            arguments["rows"], arguments["cols"] = size
        self.pid = _pid(_launch(agent, "ovt-exec", arguments, process.command[0]))

    def send(
        self,
        data: bytes = b"",
        *,
        eof: bool = False,
        signal: int = 0,
        size: tuple[int, int] | None = None,
        wait: float = WAIT,
    ) -> None:
        """Ask for output, at most `wait` seconds long until there is some, and bring input, a signal or a size."""
        arguments: dict[str, Any] = {"pid": self.pid, "wait-ms": int(wait * 1000)}
        if data:
            arguments["input"] = base64.b64encode(data).decode()
        if eof:
            arguments["eof"] = True
        if signal:
            arguments["signal"] = signal
        if size:
            arguments["rows"], arguments["cols"] = size
        self.agent.send("ovt-io", arguments)

    def receive(self) -> Piece:
        """The answer to the oldest `send`."""
        answer = _mapping(self.agent.receive(self.agent.timeout + WAIT), "ovt-io")
        unread = answer.get("pending", 0)
        return Piece(
            decoded(answer, "out"),
            decoded(answer, "err"),
            unread if isinstance(unread, int) else 0,
            _exit_status(answer) if answer.get("exited") is True else None,
        )


def start(
    agent: Agent,
    command: tuple[str, ...],
    env: list[str],
    capture: bool,
    data: bytes = b"",
    cwd: str = "",
    user: str = "",
) -> int:
    """guest-exec: the pid in the guest. `cwd` and `user` are of our own agent alone."""
    arguments: dict[str, Any] = {"path": command[0], "arg": list(command[1:]), "capture-output": capture}
    if env:
        arguments["env"] = env
    if data:
        arguments["input-data"] = base64.b64encode(data).decode()
    if cwd:
        arguments["cwd"] = cwd
    if user:
        arguments["user"] = user
    return _pid(_launch(agent, "guest-exec", arguments, command[0]))


def _launch(agent: Agent, name: str, arguments: Mapping[str, Any], program: str) -> Any:
    try:
        return agent.command(name, arguments)
    except AgentError as error:
        raise _refusal(error, name, program) from error


def _refusal(error: AgentError, name: str, program: str) -> OvtError:
    """What an agent's refusal to run a program means; words, of its C library or of GLib, are all that it tells."""
    if error.error_class in (AgentError.TIMEOUT, AgentError.PROTOCOL, "CommandNotFound"):
        return error
    words = error.message.removeprefix(f"{name}: ")
    code = 126
    if "no such user" in words or "cannot enter" in words:  # of our own agent, which has these two as well
        pass
    elif "No such file or directory" in words or "not found" in words:
        words = "no such file or directory" if "/" in program else "executable file not found in $PATH"
        code = 127
    elif "Permission denied" in words:
        words = "permission denied"
    return PayloadError(f'exec: "{program}": {words}', code)


def status(agent: Agent, pid: int) -> Collected | None:
    """guest-exec-status: how the program ended, None while it has not; it can be asked only once after that."""
    try:
        answer = _mapping(agent.command("guest-exec-status", {"pid": pid}), "guest-exec-status")
    except AgentError as error:
        if error.error_class != "GenericError":
            raise
        raise StateError(
            "the guest or its agent was started again meanwhile: how the program ended is not known"
        ) from error
    if answer.get("exited") is not True:
        return None
    lost = bool(answer.get("out-truncated") or answer.get("err-truncated"))
    return Collected(_exit_status(answer), decoded(answer, "out-data"), decoded(answer, "err-data"), lost)


def _exit_status(answer: Mapping[str, Any]) -> int:
    number, code = answer.get("signal"), answer.get("exitcode", 0)
    if isinstance(number, int) and 0 < number < 128:
        return 128 + number
    return code if isinstance(code, int) and 0 <= code <= 255 else 255


def _pid(answer: Any) -> int:
    pid = _mapping(answer, "guest-exec").get("pid")
    if not isinstance(pid, int) or pid <= 0:
        raise AgentError("guest-exec: the agent does not name the process", AgentError.PROTOCOL)
    return pid


def _mapping(answer: Any, name: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise AgentError(f"{name}: the agent's answer is no object", AgentError.PROTOCOL)
    return answer


def decoded(answer: Any, key: str) -> bytes:
    """The bytes that an answer holds as base64 under `key`, none when it has no such; AgentError for anything else."""
    try:
        return base64.b64decode(_mapping(answer, key).get(key, ""), validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise AgentError(f"the agent's answer is damaged: {key} is not base64", AgentError.PROTOCOL) from None
