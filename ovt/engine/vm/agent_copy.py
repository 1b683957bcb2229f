"""Files and trees between the host and a running guest, as a tar stream through the guest's agent.

The rules are those of a copy from and to a container (ovt/engine/container/copy.py): into a directory that exists,
else under the new name; `DIR/.` is what is in DIR. Our own agent carries the stream as it is made; with any other it
lies in a file of the guest's for a while. What comes out of a guest is unpacked by untar.py, which trusts nothing.
"""

from __future__ import annotations

import base64
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from ovt.engine.base import Process
from ovt.engine.vm.agent import Agent, AgentError, printable
from ovt.engine.vm.agent_program import Program, collect, decoded
from ovt.engine.vm.untar import Cut, Target, unpack
from ovt.errors import Conflict, HostError, NotFound, OvtError, PayloadError, StateError, UsageError, refused

_CHUNK = 256 << 10
_BEHIND = 1 << 20  # bytes that the guest's tar may leave unread before we wait for it
_FOREVER = 7 * 86400.0
_ERRORS = 4096  # bytes of what tar complains of that are kept
_TEMPORARY = re.compile(r"/[a-z]+(/[a-z]+)?/ovt\.[A-Za-z0-9]{8,12}")

_PROBE = r"""
kind() { if [ -d "$1" ]; then echo dir; elif [ -e "$1" ]; then echo file; else echo none; fi; }
if [ -L "$0" ]; then echo link; else kind "$0"; fi
kind "$0"
kind "$1"
if tar --version 2>/dev/null | grep -q GNU; then echo gnu; elif command -v tar >/dev/null; then echo tar; else echo none; fi
"""  # noqa: E501
_PATTERN = "ovt." + "X" * 10  # of mktemp(1)
_MAKE_TEMPORARY = f"umask 077; mktemp /var/tmp/{_PATTERN} 2>/dev/null || mktemp /tmp/{_PATTERN}"


class _End(NamedTuple):
    """One end of a copy: the path, its words for people, and what is there: dir, file, link or none."""

    path: str
    shown: str
    itself: str
    followed: str
    above: str  # what the directory above it is
    tar: str = ""  # of a guest: gnu, tar or none


class _Plan(NamedTuple):
    """Take `last` in `above` (`.`: what is in it), and put it into `directory` as `name` (empty: its entries)."""

    above: str
    last: str
    directory: str
    name: str


def copy(agent: Agent, instance: str, source: str, target: str, into: bool) -> None:
    """Copy `source` to `target`: with `into` from the host to the guest, otherwise the other way round.

    `instance` is the name in messages. NotFound, Conflict and UsageError before anything is changed; StateError for
    a guest without tar or an agent that cannot do it; HostError when it fails on the way.
    """
    source, target = _dotted(source), _dotted(target)
    inner = target if into else source
    guest = _guest_end(agent, inner, f"{instance}:{inner}")
    outer = _host_end(source if into else target)
    if guest.tar == "none":
        raise StateError("the guest has no tar, which copying needs", "install tar in the guest")
    if into:
        _put(agent, _plan(outer, guest), guest.tar == "gnu", outer.shown)
    else:
        _get(agent, _plan(guest, outer), guest.tar == "gnu", guest.shown)


def _dotted(path: str) -> str:
    return f"{path}/." if path.rsplit("/", 1)[-1] == ".." else path


def _plan(source: _End, target: _End) -> _Plan:
    contents = source.path.endswith("/.") or source.path == "."
    path = source.path.rstrip("/") or "/"
    follow = contents or source.path.endswith("/")
    kind = source.followed if follow else source.itself
    if kind == "none":
        raise NotFound(f"there is no {source.shown}")
    if follow and kind != "dir":
        raise UsageError(f"{source.shown} is not a directory", "leave out the slash at its end")
    if target.followed == "dir":
        directory = target.path
        name = "" if contents or path == "/" else path.rsplit("/", 1)[-1]
    else:
        if target.path.endswith("/"):
            raise NotFound(f"there is no directory {target.shown}", "make it first, or leave out the slash at its end")
        if target.followed != "none" and kind == "dir":
            raise Conflict(f"{target.shown} is not a directory, {source.shown} is one")
        if target.above != "dir":
            raise NotFound(f"there is no directory for {target.shown}", "make it first: ovt exec NAME mkdir -p DIR")
        directory, name = _above(target.path), target.path.rsplit("/", 1)[-1]
    if follow or path == "/":
        return _Plan(path, ".", directory, name)
    return _Plan(_above(path), path.rsplit("/", 1)[-1], directory, name)


def _above(path: str) -> str:
    head, slash, _ = path.rstrip("/").rpartition("/")
    return head or ("/" if slash else ".")


def _host_end(path: str) -> _End:
    def kind(path: str, look: Callable[[str], os.stat_result]) -> str:
        try:
            mode = look(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return "none"
        except OSError as error:
            raise HostError(f"{path}: {(error.strerror or '').lower()}", error.errno or 0) from error
        return "dir" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "file"

    itself = kind(path.rstrip("/") or "/", os.lstat)
    return _End(path, path, itself, kind(path.rstrip("/") or "/", os.stat), kind(_above(path), os.stat))


def _guest_end(agent: Agent, path: str, shown: str) -> _End:
    path = path if path.startswith("/") else f"/{path}"
    agent.need("guest-exec", "copying")
    try:
        done = collect(agent, ("/bin/sh", "-c", _PROBE, path.rstrip("/") or "/", _above(path)))
    except PayloadError as error:
        raise StateError("the guest has no /bin/sh, which copying needs") from error
    words = done.out.decode(errors="replace").split()
    kinds = {"dir", "file", "link", "none"}
    if len(words) != 4 or not kinds.issuperset(words[:3]) or words[3] not in ("gnu", "tar", "none"):
        raise HostError(f"{shown}: cannot find out what is there: {printable(done.err.decode(errors='replace'))}")
    return _End(path, shown, *words)


# from the guest


def _get(agent: Agent, plan: _Plan, gnu: bool, shown: str) -> None:
    options = ("-H", "posix", "--hard-dereference", "--numeric-owner") if gnu else ()
    command = ("tar", "-C", plan.above, "-cf", "-", *options, "--", plan.last)
    old = "" if plan.last == "." else plan.last
    try:
        directory = os.open(plan.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise refused(plan.directory, error) from error
    try:
        with _reading(agent, command, shown) as source:
            try:
                unpack(source, Target(directory, old, plan.name), shown)
            except Cut:
                source.finish()  # the guest's tar may have said why
                raise
            source.finish()
    finally:
        os.close(directory)


class _Source(Protocol):
    def read(self, size: int) -> bytes: ...

    def finish(self) -> None:
        """HostError when the guest's tar has failed."""


@contextmanager
def _reading(agent: Agent, command: tuple[str, ...], shown: str) -> Iterator[_Source]:
    if "ovt-exec" in agent.about().commands:
        with agent.turn(), _running(agent, command, shown) as stream:
            stream.finish_input()
            yield stream
        return
    for name in ("guest-file-open", "guest-file-read", "guest-file-close"):
        agent.need(name, "copying")
    with _temporary(agent) as path:
        # 1 is GNU tar's word for a file that changed meanwhile
        script = 'out=$0; "$@" >"$out"; s=$?; [ $s -le 1 ] || exit $s'
        done = collect(agent, ("/bin/sh", "-c", script, path, *command), _FOREVER)
        with _opened(agent, path, "r") as handle:
            yield _FileSource(agent, handle, done.status, done.err, shown)


class _FileSource:
    """The archive in a file of the guest."""

    def __init__(self, agent: Agent, handle: int, status: int, errors: bytes, shown: str) -> None:
        self.agent = agent
        self.handle = handle
        self.status = status
        self.errors = errors
        self.shown = shown
        self.buffer = b""

    def read(self, size: int) -> bytes:
        if not self.buffer:
            answer = self.agent.command("guest-file-read", {"handle": self.handle, "count": _CHUNK})
            self.buffer = decoded(answer, "buf-b64")
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def finish(self) -> None:
        if self.status:
            raise _failed(self.shown, self.status, self.errors)


# into the guest


def _put(agent: Agent, plan: _Plan, gnu: bool, shown: str) -> None:
    # a rootfs over a guest's own must not turn its /lib from a link into a directory
    words = ("--keep-directory-symlink", "--numeric-owner") if gnu else ()
    command = ("tar", "-C", plan.directory, "-xpf", "-", *words)
    # the newer format has times below a second, busybox knows the older one
    format = tarfile.PAX_FORMAT if gnu else tarfile.GNU_FORMAT
    options: dict[str, Any] = {"bufsize": _CHUNK, "format": format, "encoding": "utf-8", "errors": "surrogateescape"}
    with _writing(agent, command, shown) as sink:
        stream: Any = sink  # of a file it needs `write` alone
        with tarfile.open(mode="w|", fileobj=stream, **options) as archive:
            try:
                if plan.name:
                    _add(archive, os.path.join(plan.above, plan.last), plan.name)
                else:
                    for name in sorted(os.listdir(plan.above)):
                        _add(archive, os.path.join(plan.above, name), name)
            except OSError as error:
                why = error.strerror or str(error)
                raise HostError(f"{error.filename or shown}: {why.lower()}", error.errno or 0) from error


def _add(archive: tarfile.TarFile, path: str, name: str) -> None:
    info = os.lstat(path)
    entry = tarfile.TarInfo(name)
    entry.mode = stat.S_IMODE(info.st_mode)
    entry.mtime = int(info.st_mtime)
    if archive.format == tarfile.PAX_FORMAT and info.st_mtime_ns >= 0:
        seconds, rest = divmod(info.st_mtime_ns, 10**9)
        entry.pax_headers = {"mtime": f"{seconds}.{rest:09}"}
    if stat.S_ISDIR(info.st_mode):
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
        for inner in sorted(os.listdir(path)):
            _add(archive, f"{path}/{inner}", f"{name}/{inner}")
    elif stat.S_ISLNK(info.st_mode):
        entry.type, entry.linkname = tarfile.SYMTYPE, os.readlink(path)
        archive.addfile(entry)
    elif stat.S_ISFIFO(info.st_mode):
        entry.type = tarfile.FIFOTYPE
        archive.addfile(entry)
    elif stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            entry.size = os.fstat(file.fileno()).st_size
            archive.addfile(entry, file)


class _Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...


@contextmanager
def _writing(agent: Agent, command: tuple[str, ...], shown: str) -> Iterator[_Sink]:
    if "ovt-exec" in agent.about().commands:
        with agent.turn(), _running(agent, command, shown) as stream:
            yield stream
            stream.finish_input()
            stream.finish()
        return
    for name in ("guest-file-open", "guest-file-write", "guest-file-flush", "guest-file-close"):
        agent.need(name, "copying")
    with _temporary(agent) as path:
        with _opened(agent, path, "w") as handle:
            yield _FileSink(agent, handle)
            agent.command("guest-file-flush", {"handle": handle})
        done = collect(agent, ("/bin/sh", "-c", 'in=$0; exec "$@" <"$in"', path, *command), _FOREVER)
        if done.status:
            raise _failed(shown, done.status, done.err)


class _FileSink:
    def __init__(self, agent: Agent, handle: int) -> None:
        self.agent = agent
        self.handle = handle

    def write(self, data: bytes, /) -> int:
        left = memoryview(data)
        while left:
            piece = base64.b64encode(left[:_CHUNK]).decode()
            answer = self.agent.command("guest-file-write", {"handle": self.handle, "buf-b64": piece})
            count = answer.get("count") if isinstance(answer, dict) else None
            if not isinstance(count, int) or not 0 < count <= len(left):
                raise AgentError("guest-file-write: the agent does not say how much it wrote", AgentError.PROTOCOL)
            left = left[count:]
        return len(data)


# both ways


class _Running:
    """A tar under our own agent: its output as a source, its input as a sink."""

    def __init__(self, agent: Agent, program: Program, shown: str) -> None:
        self.agent = agent
        self.program = program
        self.shown = shown
        self.output = bytearray()
        self.errors = b""
        self.status: int | None = None
        self.unread = 0

    def read(self, size: int) -> bytes:
        while not self.output and self.status is None:
            self._exchange()
        data = bytes(self.output[:size])
        del self.output[:size]
        return data

    def write(self, data: bytes, /) -> int:
        for at in range(0, len(data), _CHUNK):
            self._exchange(data[at : at + _CHUNK], wait=0.0)
            while self.unread > _BEHIND:
                self._exchange(wait=0.02)
            self.output.clear()
        return len(data)

    def finish_input(self) -> None:
        self._exchange(eof=True, wait=0.0)

    def finish(self) -> None:
        while self.status is None:
            self.output.clear()
            self._exchange()
        if self.status:
            raise _failed(self.shown, self.status, self.errors)

    def _exchange(self, data: bytes = b"", **how: Any) -> None:
        if self.status is not None:
            if data and self.status:
                raise _failed(self.shown, self.status, self.errors)
            return
        self.agent.give_way()
        self.program.send(data, **how)
        piece = self.program.receive()
        self.output += piece.out
        self.errors = (self.errors + piece.err)[:_ERRORS]
        self.unread = piece.unread
        self.status = piece.status


@contextmanager
def _running(agent: Agent, command: tuple[str, ...], shown: str) -> Iterator[_Running]:
    stream = _Running(agent, Program(agent, Process(command)), shown)
    try:
        yield stream
    except BaseException:
        _try(lambda: stream._exchange(signal=9, wait=0.0))
        _try(stream.finish)
        raise


@contextmanager
def _temporary(agent: Agent) -> Iterator[str]:
    done = collect(agent, ("/bin/sh", "-c", _MAKE_TEMPORARY))
    path = done.out.decode(errors="replace").strip()
    if done.status or not _TEMPORARY.fullmatch(path):
        words = printable(done.err.decode(errors="replace").strip())
        raise HostError(f"the guest has no room for a temporary file: {words or done.status}")
    try:
        yield path
    except BaseException:
        _try(lambda: collect(agent, ("rm", "-f", path)))
        raise
    collect(agent, ("rm", "-f", path))


@contextmanager
def _opened(agent: Agent, path: str, mode: str) -> Iterator[int]:
    handle = agent.command("guest-file-open", {"path": path, "mode": mode})
    if not isinstance(handle, int):
        raise AgentError("guest-file-open: the agent gives no handle", AgentError.PROTOCOL)
    with agent.turn():
        try:
            yield handle
        except BaseException:
            _try(lambda: agent.command("guest-file-close", {"handle": handle}))
            raise
        agent.command("guest-file-close", {"handle": handle})


def _try(step: Callable[[], object]) -> None:
    """A step of clearing up after a failure, which is what the caller has to hear of and not this one's."""
    try:
        step()
    except OvtError:
        pass


def _failed(shown: str, status: int, errors: bytes) -> HostError:
    words = errors.decode(errors="replace").strip().splitlines()
    why = printable(words[0]) if words else f"status {status}"
    return HostError(f"{shown}: tar in the guest failed: {why}")
