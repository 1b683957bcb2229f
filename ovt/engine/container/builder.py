"""The builder: a fork of the runtime that joins a new container's namespaces, all but its pid namespace, and builds.

It never enters the container's pid namespace, so no process of the container can see or trace a Python; it keeps the
host's root until `Rootfs.finish`, after which it only sends its report and ends. It talks to the runtime over a
SOCK_SEQPACKET channel: JSON messages, the terminal's descriptors riding along with the last one.
"""

from __future__ import annotations

import posix
from _socket import (
    AF_UNIX,
    SCM_RIGHTS,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    sethostname,
    socket,
    socketpair,
)
from _struct import pack, unpack

from ovt.errors import HostError, OvtError, PayloadError
from ovt.kernel import jsonc
from ovt.kernel import syscalls as sc

from . import devices, paths
from .rootfs import Rootfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PR_SET_PDEATHSIG = 1
_SIGKILL = 9
_LIMIT = 128 << 10  # bytes of a message


class Job:
    """What the builder has to do; plain data that the fork inherits."""

    __slots__ = ("rootfs", "config", "init_pid", "join", "new", "cgroup", "pivot", "state", "map_root")

    def __init__(self, rootfs: Rootfs | None, config: dict[str, Any], init_pid: int, join: int, new: int) -> None:
        self.rootfs = rootfs
        self.config = config
        self.init_pid = init_pid
        self.join = join  # CLONE_NEW* of the namespaces to join
        self.new = new  # those that were made for this container
        self.cgroup: dict[str, Any] | None = None
        self.pivot = True
        self.map_root = False  # become uid 0 of a user namespace
        self.state: dict[str, Any] = {}


class Built:
    """What came of it."""

    __slots__ = ("program", "home", "master", "slave")

    def __init__(self, message: dict[str, Any], fds: list[int]) -> None:
        self.program: str = message["program"]
        self.home: str = message["home"]
        self.master, self.slave = fds if fds else (-1, -1)


class Builder:
    """The running fork, seen from the runtime."""

    def __init__(self, job: Job) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
        self._channel = ours
        self.pid = posix.fork()
        if self.pid == 0:
            try:
                ours.close()
                _main(job, theirs)
            finally:
                posix._exit(1)
        theirs.close()

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message; the builder's failure is raised as its own error."""
        data, ancillary, _, _ = self._channel.recvmsg(_LIMIT, 64)
        fds: list[int] = []
        for level, kind, raw in ancillary:
            if level == SOL_SOCKET and kind == SCM_RIGHTS:
                fds += unpack(f"{len(raw) // 4}i", raw)
        if not data:
            status = posix.waitstatus_to_exitcode(posix.waitpid(self.pid, 0)[1])
            self.pid = 0
            raise HostError(f"the builder of the container ended unexpectedly ({status})", hint="out of memory?")
        message: dict[str, Any] = jsonc.loads(data.decode())
        if "error" in message:
            self.reap()
            if message.get("exit_status"):
                raise PayloadError(message["error"], message["exit_status"], message["hint"])
            raise HostError(message["error"], message["errno"], message["hint"])
        return message, fds

    def proceed(self) -> None:
        """Let the builder go on after the runtime's hooks have run."""
        self._channel.send(b"go")

    def reap(self) -> None:
        """Wait for its end; killing it if it has not come to one."""
        self._channel.close()
        if self.pid:
            try:
                posix.kill(self.pid, _SIGKILL)
            except ProcessLookupError:
                pass
            posix.waitpid(self.pid, 0)
            self.pid = 0


def _main(job: Job, channel: socket) -> None:
    sc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    fds: tuple[int, ...] = ()
    try:
        message, fds = _build(job, channel)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        text = f"set up the container{where}: {posix.strerror(error.errno or 0).lower()}"
        message = {"error": text, "errno": error.errno, "hint": ""}
    except PayloadError as error:
        message = {"error": error.message, "errno": 0, "hint": error.hint, "exit_status": error.exit_status}
    except OvtError as error:
        message = {"error": error.message, "errno": getattr(error, "errno", 0), "hint": error.hint}
    except BaseException as error:  # a fault of ours; tell it in one line, a traceback would read files
        message = {"error": f"internal error: {type(error).__name__}: {error}", "errno": 0, "hint": "please report it"}
    if "error" in message:
        message["error"] = message["error"][: _LIMIT // 16]  # a program's name can be longer than a message
    ancillary = [(SOL_SOCKET, SCM_RIGHTS, pack(f"{len(fds)}i", *fds))] if fds else []
    try:
        channel.sendmsg([jsonc.dumps(message).encode()], ancillary)
    except BrokenPipeError:
        pass  # the runtime was killed; the init ends by itself
    posix._exit(0)


def _build(job: Job, channel: socket) -> tuple[dict[str, Any], tuple[int, ...]]:
    config = job.config
    place = _join(job)
    if job.map_root:
        posix.setresgid(0, 0, 0)
        posix.setresuid(0, 0, 0)
    if config.get("hostname"):
        sethostname(config["hostname"])
    if config.get("domainname"):
        sc.setdomainname(config["domainname"])
    rootfs = job.rootfs
    if rootfs is None:
        return _without_mount_namespace(config, channel, job)
    rootfs.build(place, job.cgroup)
    process = config.get("process") or {}
    fds = _terminal(rootfs.tree, process)
    if fds:
        devices.make_console(rootfs.tree, fds[1])
    _hooks(job, channel)
    _make_cwd(rootfs.tree, process.get("cwd") or "/")
    home = _home(rootfs.tree, process)  # before the host's /proc goes out of reach
    rootfs.finish(job.pivot)
    return _found(rootfs.tree, process, home), fds


def _join(job: Job) -> int:
    """Join the namespaces; returns the directory in the container's mount namespace where its root is mounted."""
    pidfd = posix.pidfd_open(job.init_pid, 0)
    privileged = posix.geteuid() == 0 and job.join & sc.CLONE_NEWUSER and job.join & sc.CLONE_NEWNS
    place = -1
    if privileged:
        # the way to the rootfs may be closed to the ids of the user namespace: open it before becoming one of them
        sc.setns(pidfd, sc.CLONE_NEWNS)
        place = _open_place(job)
        sc.setns(pidfd, job.join & ~sc.CLONE_NEWNS)
    elif job.join:
        sc.setns(pidfd, job.join)
    posix.close(pidfd)
    return place if place >= 0 or job.rootfs is None else _open_place(job)


def _open_place(job: Job) -> int:
    path = job.rootfs.path if job.rootfs else "/"
    return posix.open(path, paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)


def _without_mount_namespace(
    config: dict[str, Any], channel: socket, job: Job
) -> tuple[dict[str, Any], tuple[int, ...]]:
    _hooks(job, channel)
    root = posix.open(job.state["rootfs"], paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
    process = config.get("process") or {}
    return _found(root, process, _home(root, process)), _terminal(root, process)


def _terminal(root: int, process: dict[str, Any]) -> tuple[int, ...]:
    """(master, slave), or nothing where none is asked for."""
    if not process.get("terminal"):
        return ()
    from . import console

    return console.open_pair(root, process.get("consoleSize"), (process.get("user") or {}).get("uid") or 0)


def _hooks(job: Job, channel: socket) -> None:
    wanted = job.config.get("hooks") or {}
    if not (wanted.get("prestart") or wanted.get("createRuntime") or wanted.get("createContainer")):
        return
    channel.send(b'{"hooks": true}')
    if channel.recv(16) != b"go":
        posix._exit(1)
    from . import hooks

    hooks.run(wanted, "createContainer", job.state)


def _make_cwd(root: int, cwd: str) -> None:
    """The working directory is made where the image lacks it, as runc does; a read-only root may not have it."""
    try:
        posix.close(paths.make_directory(root, cwd))
    except (OSError, HostError):
        pass  # chdir gives the error, with its own words


def _home(root: int, process: dict[str, Any]) -> str:
    return paths.home_of(root, (process.get("user") or {}).get("uid") or 0) if process.get("args") else ""


def _found(root: int, process: dict[str, Any], home: str) -> dict[str, Any]:
    args = process.get("args") or []
    if not args:
        return {"program": "", "home": ""}
    program, why = paths.find_program(root, args[0], process.get("cwd") or "/", process.get("env") or [])
    if not program:
        raise PayloadError(why, 126 if "permission denied" in why else 127)
    return {"program": program, "home": home}
