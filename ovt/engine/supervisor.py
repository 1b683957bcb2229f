"""The process beside every detached guest, seen from Python: launch it, ask whether it lives, wait for its exit.

`launch` forks, lets `make_child` create the guest as a direct child of the fork and then replaces that fork by
`ovt-supervisor` (supervisor.c), which needs no Python: it writes the log, serves `attach.sock`, reaps the guest
and leaves `exit.json`. The instance directory holds

    supervisor.json   pid and start time of the supervisor and of the guest; written before the supervisor runs
    attach.sock       for `attach`; gone or refusing once the guest has ended
    log, log.1 …      for `read_log`; the path is the caller's choice
    qmp.log           what came from `Stdio.events`
    exit.json         the guest's end; complete or absent, never torn

It is not a manager: restart policies, `--rm` and cleaning up belong to the exit command. It knows no containers;
virtual machines use it in the same way.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from ovt import errors
from ovt.engine.attach import DETACHED, Detached, attach
from ovt.engine.guest_log import LogRecord, read_log
from ovt.engine.supervised import (
    EXIT,
    INFO,
    SOCKET,
    ExitRecord,
    SupervisorInfo,
    alive,
    exit_record,
    info,
    start_time,
    wait,
)
from ovt.kernel.syscalls import prctl

if TYPE_CHECKING:
    from socket import socket

__all__ = [
    "DETACHED", "Detached", "ExitRecord", "LogRecord", "Stdio", "SupervisorInfo",
    "alive", "attach", "exit_record", "info", "launch", "read_log", "wait",
]  # fmt: skip

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_bin", "ovt-supervisor")
SUN_PATH = 107
PR_SET_CHILD_SUBREAPER = 36
CONSOLE_TIMEOUT = 10.0


class Stdio:
    """The guest's ends of its standard streams, for `make_child`; valid only inside that call.

    Without a terminal, `stdin`, `stdout` and `stderr` are descriptors (stdin is /dev/null unless the guest has an
    open one). With one, all three are /dev/null, and make_child does exactly one of
      - give `console_socket()` to an OCI runtime, which sends the terminal's master there;
      - give `slave()` to a guest that uses a terminal of the host.
    All descriptors are close-on-exec, so the guest gets only what make_child hands on.
    """

    def __init__(self, directory: str, tty: bool, stdin: bool) -> None:
        self.tty = tty
        self._open_stdin = stdin
        self._directory = directory
        self._listener: socket | None = None
        self._master = -1
        self._guest_ends: list[int] = []
        self._arguments: dict[str, int] = {}
        self.events = -1  # set by make_child: a QMP connection, read into qmp.log from then on
        self.stdin = self.stdout = self.stderr = null = os.open(os.devnull, os.O_RDWR)
        self._guest_ends.append(null)
        if tty:
            return
        if stdin:
            self.stdin, self._arguments["--stdin"] = os.pipe()
            self._guest_ends.append(self.stdin)
        self._arguments["--stdout"], self.stdout = os.pipe()
        self._arguments["--stderr"], self.stderr = os.pipe()
        self._guest_ends += [self.stdout, self.stderr]

    def console_socket(self) -> str:
        """The path of a listening unix socket that takes one terminal master by SCM_RIGHTS."""
        import socket

        path = os.path.join(self._directory, "console.sock")
        if len(os.fsencode(path)) > SUN_PATH:
            import tempfile

            path = os.path.join(tempfile.mkdtemp(prefix="ovt-"), "console.sock")
        if os.path.lexists(path):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        return path

    def slave(self) -> int:
        """The descriptor of the user's side of a new terminal of the host."""
        self._master, slave = os.openpty()
        self._guest_ends.append(slave)
        return slave

    def supervisor_arguments(self) -> dict[str, int]:
        """Close the guest's ends and name the supervisor's, once the guest exists; HostError without a terminal."""
        for fd in self._guest_ends:
            os.close(fd)
        if self.tty:
            if self._listener:
                self._master = self._receive_master(self._listener)
            if self._master < 0:
                raise errors.HostError("the guest was made without the terminal it should have")
            self._arguments["--pty"] = self._master
            if self._open_stdin:
                self._arguments["--stdin"] = self._master
        if self.events >= 0:
            self._arguments["--events"] = self.events
        return self._arguments

    def _receive_master(self, listener: socket) -> int:
        import socket

        path = listener.getsockname()
        try:
            listener.settimeout(CONSOLE_TIMEOUT)
            with listener, listener.accept()[0] as sender:
                sender.settimeout(CONSOLE_TIMEOUT)
                descriptors = socket.recv_fds(sender, 4096, 1)[1]
        except TimeoutError:
            raise errors.HostError("the runtime did not send the guest's terminal to the console socket") from None
        finally:
            os.unlink(path)
            if os.path.dirname(path) != self._directory:
                os.rmdir(os.path.dirname(path))
        if not descriptors or not os.isatty(descriptors[0]):
            raise errors.HostError("the runtime sent something that is no terminal to the console socket")
        return descriptors[0]


def launch(
    directory: str,
    make_child: Callable[[Stdio], int],
    *,
    name: str = "",
    tty: bool = False,
    stdin: bool = False,
    log: str | None = None,
    log_max: int = 16 << 20,
    log_files: int = 2,
    exit_command: list[str] | None = None,
    env: Mapping[str, str] | None = None,
) -> SupervisorInfo:
    """Create a guest under a supervisor of its own and return once that supervisor serves attach clients.

    `make_child` runs in a forked process without terminal (0, 1 and 2 are /dev/null, own session) and returns the
    pid of the guest's first process, which must be a direct child of that process: `Runtime.create(…)` in a lambda.
    It may return before the guest's program runs (created, not started): the caller attaches first, then starts it.
    `stdin` opens the guest's standard input for attach clients. `log` None writes no log; `log_max` is bytes per
    file, `log_files` how many files are kept. `exit_command` is an absolute argv executed in the supervisor's place
    after exit.json is there, with exactly `env` as environment (default: PATH, HOME and XDG_* of the caller).

    Any exception of make_child is raised here: OvtError and its subclasses as themselves, OSError as HostError,
    everything else as OvtError naming the class. When anything fails the guest is killed and reaped before this
    raises. If the caller dies before the supervisor is ready the guest is killed, and exit.json and the exit command
    follow as usual.
    """
    directory = os.path.abspath(directory)
    if exit_command and not os.path.isabs(exit_command[0]):
        raise ValueError(f"the exit command is not an absolute path: {exit_command[0]}")
    if not os.access(PROGRAM, os.X_OK):
        raise errors.HostError(f"{PROGRAM} is missing", hint="build it with scripts/setup")
    options: dict[str, object] = {"--name": name} if name else {}
    if log is not None:
        options |= {"--log": os.path.abspath(log), "--log-max": log_max, "--log-files": log_files}
    if env is None:
        env = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME") or key.startswith("XDG_")}
    for stale in (EXIT, SOCKET, INFO):
        if os.path.lexists(path := os.path.join(directory, stale)):
            os.unlink(path)

    def supervise(report: int, mask: set[int]) -> NoReturn:
        stdio_options = (directory, tty, stdin)
        _become_supervisor(stdio_options, make_child, options, exit_command or [], env, report, mask)

    said = _fork_twice(supervise)
    if said == b"R\n":
        return info(directory)
    if said.startswith(b"E"):
        raise errors.HostError(f"ovt-supervisor cannot start: {said[1:-1].decode(errors='replace')}")
    if not said:
        raise errors.HostError("ovt-supervisor was killed while it started")
    raise _exception(json.loads(said))


def _fork_twice(body: Callable[[int, set[int]], NoReturn]) -> bytes:
    """Run `body` in a grandchild, so that init and not a long-lived caller reaps it; the line that it reports."""
    answer, report = os.pipe()
    with open(answer, "rb") as answers:
        # blocked: no handler of the caller may run in the copies
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            child = os.fork()
            if child == 0:
                try:
                    answers.close()  # a report must fail when the caller is gone
                    if os.fork() == 0:
                        body(report, mask)
                finally:
                    os._exit(0)
        finally:
            os.close(report)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.waitpid(child, 0)
        return answers.readline()


def _become_supervisor(
    stdio_options: tuple[str, bool, bool],
    make_child: Callable[[Stdio], int],
    options: dict[str, object],
    exit_command: list[str],
    env: Mapping[str, str],
    report: int,
    mask: set[int],
) -> NoReturn:
    """The forked process: without the caller's terminal, create the guest, then execute ovt-supervisor."""
    guest = 0
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)  # the guest inherits these; Python's own SIGPIPE is ignored
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        directory = stdio_options[0]
        # ovt-supervisor does so too, but the guest's orphans may be there before it
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        stdio = Stdio(*stdio_options)
        guest = make_child(stdio)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # the caller may be gone when we report
        descriptors = stdio.supervisor_arguments() | {"--ready": report}
        _write_info(directory, guest)
        for fd in descriptors.values():
            os.set_inheritable(fd, True)
        options = {"--pid": guest, "--dir": directory, **options, **descriptors}
        arguments = [str(word) for option in options.items() for word in option]
        if exit_command:
            arguments += ["--exit-command", *exit_command]
        os.execve(PROGRAM, ["ovt-supervisor", *arguments], env)
    except BaseException as error:
        if guest > 0:
            os.kill(guest, signal.SIGKILL)
            os.waitpid(guest, 0)
        os.write(report, json.dumps(_record(error)).encode() + b"\n")
    finally:
        os._exit(1)


def _write_info(directory: str, guest: int) -> None:
    started = start_time(guest)
    if started is None:
        with open(f"/proc/{guest}/stat", "rb") as file:  # a guest that ended at once is a zombie; no guest raises
            started = int(file.read().rpartition(b")")[2].split()[19])
    record = SupervisorInfo(os.getpid(), start_time(os.getpid()) or 0, guest, started)
    path = os.path.join(directory, INFO)
    with open(path + ".tmp", "w", encoding="ascii") as file:
        json.dump(vars(record), file)
    os.rename(path + ".tmp", path)


def _record(error: BaseException) -> dict[str, Any]:
    """What crosses the pipe of an exception; `_exception` is the inverse."""
    if isinstance(error, errors.OvtError):
        # a class of another module crosses as the nearest one that `errors` has
        known = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        return {"class": known.__name__, "args": error.args, "state": vars(error)}
    if isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        return {"class": "HostError", "args": [message], "state": vars(errors.HostError(message, error.errno or 0))}
    import traceback

    message = f"{type(error).__name__}: {error}"
    state = vars(errors.OvtError(message, "this is a fault of ovt itself: please report it"))
    return {"class": "OvtError", "args": [message], "state": state, "note": "".join(traceback.format_exception(error))}


def _exception(record: dict[str, Any]) -> errors.OvtError:
    kind: type[errors.OvtError] = getattr(errors, record["class"])
    error = kind.__new__(kind, *record["args"])
    vars(error).update(record["state"])
    if "note" in record:
        error.add_note(record["note"])
    return error
