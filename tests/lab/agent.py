"""PID 1 of a lab host: runs the commands that come over the control port and reaps what nobody waits for.

Not a test and not imported by one: tests/lab/boot.sh starts it by its path, with nothing but the standard library.
"""

import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
import channel  # next to this file, alone: the package is not importable here


class Command:
    """A command that runs: its pid, where its input goes, where its output comes from."""

    def __init__(self, request: dict) -> None:
        terminal = request.get("terminal")
        if terminal:
            master, slave = os.openpty()
            resize(master, terminal)
            inside = [slave, slave, slave]
            self.input = master
            self.outputs = {master: b"O"}
        else:
            pipes = [os.pipe(), os.pipe(), os.pipe()]
            inside = [pipes[0][0], pipes[1][1], pipes[2][1]]
            self.input = pipes[0][1]
            self.outputs = {pipes[1][0]: b"O", pipes[2][0]: b"E"}
        problem, report = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self.become(request, inside, bool(terminal), report)
        for fd in {*inside, report}:
            os.close(fd)
        os.set_blocking(self.input, False)
        self.pending = b""
        self.closing = False
        self.terminal = bool(terminal)
        with os.fdopen(problem) as words:
            self.problem = words.read()

    def become(self, request: dict, stdio: list[int], terminal: bool, report: int) -> None:
        try:
            os.setsid()
            if terminal:
                fcntl.ioctl(stdio[0], termios.TIOCSCTTY, 0)
            for number, fd in enumerate(stdio):
                os.dup2(fd, number)
            for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.SIG_DFL)
            os.chdir(request["cwd"])
            os.execvpe(request["argv"][0], request["argv"], {**os.environ, **request["env"]})
        except Exception as error:  # whatever it is, nobody else would tell
            os.write(report, f"{request['argv'][0]} in {request['cwd']}: {error}".encode())
        finally:
            os._exit(127)

    def feed(self, data: bytes) -> None:
        """Queue bytes for its input; none means end of file."""
        if data:
            self.pending += data
        else:
            self.closing = True

    def write(self) -> None:
        """Give it as much input as it takes now."""
        try:
            if self.pending:
                self.pending = self.pending[os.write(self.input, self.pending) :]
        except BlockingIOError:
            return
        except OSError:  # it does not read any more
            self.pending, self.closing = b"", True
        if self.closing and not self.pending and not self.terminal and self.input >= 0:
            os.close(self.input)
            self.input = -1

    def wants_input(self) -> bool:
        return self.input >= 0 and bool(self.pending or (self.closing and not self.terminal))

    def close(self) -> None:
        for fd in {self.input, *self.outputs} - {-1}:
            os.close(fd)


def resize(fd: int, size: list[int]) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))


def reap(command: "Command | None") -> int | None:
    """Wait for every child that has ended; the command's exit status if it was among them."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if command and pid == command.pid:
            code = os.waitstatus_to_exitcode(wait_status)
            status = code if code >= 0 else 128 - code


def serve(line: "channel.Channel", wake: int) -> None:
    command: Command | None = None
    status: int | None = None
    after = 0  # bytes of output since its end
    while True:
        readable = [line.fd, wake, *(command.outputs if command else ())]
        writable = [command.input] if command and command.wants_input() else []
        ready, able, _ = select.select(readable, writable, [])
        if wake in ready:
            os.read(wake, 4096)
        if line.fd in ready:
            line.fill()
        while frame := line.next():
            kind, payload = frame
            if kind == b"R":
                if command:  # given up by who asked for it
                    command.close()
                command, status, after = Command(json.loads(payload)), None, 0
                if command.problem:
                    line.send_json(b"!", command.problem)
            elif command is None:
                continue  # input for a command that has just ended
            elif kind == b"I":
                command.feed(payload)
            elif kind == b"W" and command.terminal:
                resize(command.input, json.loads(payload))
            elif kind == b"S" and status is None:
                os.killpg(command.pid, json.loads(payload))
        ended = reap(command)
        status = ended if ended is not None else status
        if command is None:
            continue
        if command.input in able or command.closing:
            command.write()
        for fd in [fd for fd in ready if fd in command.outputs]:
            try:
                data = os.read(fd, channel.CHUNK)
            except OSError:  # a terminal whose last user is gone
                data = b""
            if data:
                line.send(command.outputs[fd], data)
                after += len(data) if status is not None else 0
            elif fd != command.input:
                os.close(fd)
                del command.outputs[fd]
            else:
                del command.outputs[fd]
        # A process that outlives its parent may hold the output open for ever. What is there already is passed on, and
        # of what it goes on writing no more than two pipes can have held.
        if status is not None and (after > 1 << 18 or not select.select(list(command.outputs), [], [], 0)[0]):
            command.close()
            line.send_json(b"D", status)
            command = None


def main() -> None:
    for name in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    with open("/proc/cmdline") as file:
        words = dict(word.partition("=")[::2] for word in file.read().split())
    with open("/proc/sys/kernel/hostname", "w") as file:
        file.write(words["lab.host"])
    line = channel.Channel(os.open(channel.port("lab.control"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    line.send_json(b"H", {"host": words["lab.host"], "kernel": os.uname().release})
    serve(line, wake)


main()
