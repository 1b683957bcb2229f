"""Programs in a guest, through its agent, with our own standard streams.

Two ways. The agent of ovt's own image carries streams and terminals (ovt-exec, ovt-io). Any other qemu-guest-agent can
only start a program and hand over its whole output at the end (guest-exec); there the input is read beforehand, and a
small shell script does what the protocol lacks: working directory, user, and an answer why a program cannot be run.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from ovt.engine.attach import FORWARDED, handlers, raw_terminal, wakeup, write_all
from ovt.engine.base import Process
from ovt.engine.vm.agent import Agent, printable
from ovt.engine.vm.agent_program import (
    FIRST_LOOK,
    LAST_LOOK,
    PATH,
    WAIT,
    Collected,
    Program,
    environment,
    start,
    status,
)
from ovt.errors import PayloadError, StateError, UsageError

INPUT_LIMIT = 8 << 20  # bytes; guest-exec takes the whole input in one message
OUTPUT_LIMIT = 16 << 20  # bytes of each stream that the agent keeps
_CHUNK = 32768
_UNREAD = 1 << 20  # bytes that the program may leave unread before we stop reading for it
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*\$?(:[A-Za-z0-9_.][A-Za-z0-9_.-]*)?")

# $0 is a word that nobody can guess: a line on stderr that begins with it is from here and not from the program.
_SCRIPT = r"""
fail() { printf '%s %s %s\n' "$0" "$1" "$2" >&2; exit "$1"; }
entry() { getent "$1" "$2" 2>/dev/null || grep -E "^$2:|^[^:]*:[^:]*:$2:" "/etc/$1" 2>/dev/null | head -n 1; }
mode=$1 dir=$2 user=$3 group=$4; shift 4
name= uid=0 gid=0 home=/root
if [ -n "$user" ]; then
    line=$(entry passwd "$user")
    if [ -n "$line" ]; then
        IFS=: read -r name _ uid gid _ home _ <<END
$line
END
    else
        case $user in *[!0-9]*) fail 126 "there is no user $user";; esac
        uid=$user home=/
    fi
    case $group in
    '') ;;
    *[!0-9]*) line=$(entry group "$group"); [ -n "$line" ] || fail 126 "there is no group $group"
        IFS=: read -r _ _ gid _ <<END
$line
END
        ;;
    *) gid=$group;;
    esac
fi
[ -n "${HOME-}" ] || { HOME=$home; export HOME; }
cd -- "${dir:-/}" 2>/dev/null || fail 126 "the guest has no directory $dir"
case $1 in
*/*) [ -e "$1" ] || fail 127 "no such file or directory"
    { [ -f "$1" ] && [ -x "$1" ]; } || fail 126 "permission denied";;
*) command -v -- "$1" >/dev/null 2>&1 || fail 127 'executable file not found in $PATH';;
esac
set -- "$mode" "$@"; groups=--clear-groups; [ -z "$name" ] || groups=--init-groups
if [ -n "$user" ]; then
    if setpriv --reuid "$uid" --regid "$gid" "$groups" true 2>/dev/null; then how=setpriv
    elif [ -n "$name" ] && [ -z "$group" ] && command -v su >/dev/null 2>&1; then how=su
    else fail 126 "the guest has no setpriv (util-linux) to become user $user"
    fi
fi
shift; [ "$mode" = run ] || exit 0
case ${how-} in
'') exec "$@";;
su) exec su -s /bin/sh -c 'exec "$@"' -- "$name" sh "$@";;
*) exec setpriv --reuid "$uid" --regid "$gid" "$groups" -- "$@";;
esac
"""


class Streams(NamedTuple):
    """The descriptors that the program's streams are joined to."""

    stdin: int = 0
    stdout: int = 1
    stderr: int = 2


def execute(
    agent: Agent,
    process: Process,
    *,
    streams: Streams = Streams(),  # noqa: B008 (immutable)
    detach: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> int:
    """Run `process` in the guest until it ends: its exit status, 128 + n for signal n; with `detach` its pid there.

    Signals that come to us go to the program. `note` hears of output that was lost. PayloadError when the program
    cannot be run (126) or is not there (127), StateError when the agent cannot do it, UsageError for a user or
    directory that cannot be one; NoAgent and AgentError as the agent raises them.
    """
    if process.user and not _USER.fullmatch(process.user):
        raise UsageError(f"{process.user!r} is no user", "NAME, UID, NAME:GROUP or UID:GID")
    if process.workdir and not process.workdir.startswith("/"):
        raise UsageError(f"working directory {process.workdir!r} is not absolute")
    if not process.command:
        raise UsageError("there is no program to run")
    own = "ovt-exec" in agent.about().commands
    if own and not detach:
        return _Session(agent, process, streams).run()
    agent.need("guest-exec", "running a program in the guest")
    if process.tty and not own:
        raise StateError(
            "this guest's agent has no terminals",
            "leave out --tty; or use `ovt console`, or ssh where the guest has a network",
        )
    if own:
        return start(agent, process.command, environment(process), False, cwd=process.workdir, user=process.user)
    return _Plain(agent, process, note).run(streams, detach)


class _Session:
    """A program under our own agent, joined to our streams."""

    def __init__(self, agent: Agent, process: Process, streams: Streams) -> None:
        self.agent = agent
        self.process = process
        self.stdin = streams.stdin if process.stdin else -1
        self.outputs = {"out": streams.stdout, "err": streams.stderr}
        terminals = (streams.stdin, streams.stdout, streams.stderr)
        self.terminal = next((fd for fd in terminals if process.tty and os.isatty(fd)), -1)
        self.signals: list[int] = []
        self.resized = False
        self.unread = 0

    def run(self) -> int:
        with ExitStack() as stack:
            stack.enter_context(self.agent.turn())
            program = Program(self.agent, self.process, self._size())
            woken = stack.enter_context(wakeup())
            stack.enter_context(handlers(FORWARDED, self.signals.append))
            if self.terminal >= 0:
                stack.enter_context(handlers((signal.SIGWINCH,), lambda _: setattr(self, "resized", True)))
            if self.process.tty and self.stdin >= 0 and os.isatty(self.stdin):
                stack.enter_context(raw_terminal(self.stdin))
            if not self.process.stdin:
                program.send(eof=not self.process.tty, wait=0.0)
            while True:
                status = self._step(program, woken)
                if status is not None:
                    return status

    def _step(self, program: Program, woken: int) -> int | None:
        if not self.agent.pending:
            self.agent.give_way()
            # what it has not read yet leaves without a sign, so look again soon
            program.send(wait=0.02 if self.unread > _UNREAD else WAIT)
        while self.signals:
            program.send(signal=self.signals.pop(0))
        if self.resized:
            self.resized = False
            program.send(size=self._size())
        if not self.agent.answered():
            poll = select.poll()
            poll.register(self.agent, select.POLLIN)
            if woken >= 0:
                poll.register(woken, select.POLLIN)
            # two under way: one that waits for output, one that brings input and makes the first one answer at once
            if self.stdin >= 0 and self.agent.pending < 3 and self.unread <= _UNREAD:
                poll.register(self.stdin, select.POLLIN)
            ready = [fd for fd, _ in poll.poll((self.agent.timeout + WAIT) * 1000)]
            if woken in ready:
                os.read(woken, _CHUNK)
            if self.stdin in ready:
                self._read(program)
            if ready and self.agent.fileno() not in ready:
                return None
        piece = program.receive()
        self.unread = piece.unread
        self._write(program, "out", piece.out)
        self._write(program, "err", piece.err)
        return piece.status

    def _read(self, program: Program) -> None:
        try:
            data = os.read(self.stdin, _CHUNK)
        except BlockingIOError:
            return
        except OSError:  # EIO: our terminal was hung up
            data = b""
        if not data:
            self.stdin = -1
        program.send(data, eof=not data)

    def _write(self, program: Program, name: str, data: bytes) -> None:
        try:
            write_all(self.outputs.get(name), data)
        except OSError:  # whoever read it is gone: the program learns of it as it would from a pipe or a terminal
            del self.outputs[name]
            self.signals.append(signal.SIGHUP if self.process.tty else signal.SIGPIPE)

    def _size(self) -> tuple[int, int] | None:
        if self.terminal < 0:
            return None
        size = os.get_terminal_size(self.terminal)
        return (size.lines, size.columns) if size.lines and size.columns else None


class _Plain:
    """A program under any qemu-guest-agent."""

    def __init__(self, agent: Agent, process: Process, note: Callable[[str], None]) -> None:
        self.agent = agent
        self.process = process
        self.note = note
        self.token = f"ovt-{secrets.token_hex(8)}:"
        self.signals: list[int] = []

    def run(self, streams: Streams, detach: bool) -> int:
        data = _whole_input(streams.stdin) if self.process.stdin and not detach else b""
        if detach:
            done = self._finish(self._launch("check", b"", True), -1)
            self._check(done)
            return self._launch("run", b"", False)
        with ExitStack() as stack:
            woken = stack.enter_context(wakeup())
            stack.enter_context(handlers(FORWARDED, self.signals.append))
            stack.enter_context(self.agent.turn())
            done = self._finish(self._launch("run", data, True), woken)
        self._check(done)
        try:
            write_all(streams.stdout, done.out)
            write_all(streams.stderr, done.err)
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        if done.lost:
            self.note(f"the guest's agent keeps {OUTPUT_LIMIT >> 20} MiB of output: the rest is lost")
        return done.status

    def _launch(self, mode: str, data: bytes, capture: bool) -> int:
        user, _, group = self.process.user.partition(":")
        wrapped = (
            *("/bin/sh", "-c", _SCRIPT, self.token, mode, self.process.workdir, user, group),
            *self.process.command,
        )
        try:
            return start(self.agent, wrapped, environment(self.process), capture, data)
        except PayloadError:
            if user or self.process.workdir:
                raise StateError(
                    "the guest has no /bin/sh, which choosing a user or directory needs", "leave out both"
                ) from None
        # a guest that is no Linux: the program by itself, in the agent's own environment
        command = self.process.command if mode == "run" else ("true",)
        return start(self.agent, command, list(self.process.env), capture, data)

    def _finish(self, pid: int, woken: int) -> Collected:
        look = FIRST_LOOK
        while (done := status(self.agent, pid)) is None:
            self.agent.give_way()
            while self.signals:
                number = str(self.signals.pop(0))
                start(self.agent, ("/bin/sh", "-c", 'kill -s "$0" "$1"', number, str(pid)), [PATH], False)
            poll = select.poll()
            if woken >= 0:
                poll.register(woken, select.POLLIN)
            if poll.poll(look * 1000) and woken >= 0:
                os.read(woken, _CHUNK)
            look = min(look * 1.5, LAST_LOOK)
        return done

    def _check(self, done: Collected) -> None:
        """PayloadError when the script says that it could not start the program."""
        if done.status not in (126, 127) or not done.err.startswith(self.token.encode() + b" "):
            return
        words = done.err.decode(errors="replace").partition("\n")[0].split(" ", 2)[2]
        raise PayloadError(f'exec: "{self.process.command[0]}": {printable(words)}', done.status)


def _whole_input(fd: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size <= INPUT_LIMIT:
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll()
            continue
        if not data:
            return b"".join(parts)
        parts.append(data)
        size += len(data)
    raise StateError(
        f"this guest's agent takes no input of more than {INPUT_LIMIT >> 20} MiB",
        "copy it into the guest with `ovt cp`, and redirect it from there: sh -c 'PROGRAM <FILE'",
    )
