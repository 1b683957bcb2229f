"""Memory and devices of a machine as a file: written while the guest stands still, loaded into a QEMU that waits.

Three forms, and a record of class Saved beside each file says which one it is:

    mapped-ram  every page has its place in a sparse file, so that several threads read it (QEMU 9.0)
    stream      pages in the order in which they were sent; for an older QEMU
    devices     devices only, for a QEMU whose memory is a file already (`x-ignore-shared`; see template.py)

QEMU itself detects neither a file that ends early nor, with mapped-ram, one of a machine with less memory: it loads
what there is and lets the guest run into it. Hence the checks here. This module knows no paths of its own and no
instances. Facts: docs/devel/migration/mapped-ram.rst, qapi/migration.json and tries with QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

from ovt.engine.vm.features import Features
from ovt.engine.vm.qmp import Gone, Qmp, QmpError
from ovt.errors import HostError, OvtError, StateError

MAPPED, STREAM, DEVICES = "mapped-ram", "stream", "devices"
Progress = Callable[[int, int], None]  # bytes of memory done, bytes in all

_MAGIC = bytes.fromhex("5145564d00000003")  # "QEVM", version 3
_ENDS = 1 << 20  # bytes at either end of a file that are digested: descriptions of pages, and all devices
_ENDED = frozenset({"completed", "failed", "cancelled"})
_UNLIMITED = 1 << 50  # bytes per second; what QEMU does on its own is 128 MiB/s
_THREADS = 4
_CANCEL_SECONDS = 30.0
_NAME = "ovt-state"  # of the descriptor that an older QEMU is given


class Saved(NamedTuple):
    """What is known of a state file, to be kept beside it."""

    format: str
    size: int  # bytes; apparent, as the file may have holes
    digest: str  # SHA-256 of both ends, hexadecimal
    memory: int  # bytes of the guest's memory, with what was plugged in
    qemu: str = ""  # version that wrote it

    @classmethod
    def unpack(cls, data: Mapping[str, Any]) -> Self:
        """From the JSON object (`_asdict()`); OvtError when it is none of ours."""
        try:
            return cls(**data)
        except TypeError as error:
            raise OvtError(f"the record of a saved state is damaged: {error}") from None


def blockers(qmp: Qmp) -> list[str]:
    """What keeps this machine's state from being saved, in QEMU's words; empty when nothing does."""
    return list(qmp.command("query-migrate").get("blocked-reasons", ()))


def save(qmp: Qmp, features: Features, fd: int, *, progress: Progress | None = None, timeout: float = 3600.0) -> Saved:
    """Write the state to the empty file `fd`, flushed to the disk. The guest is stopped then: `quit`, or `cont`.

    When it raises, also by ^C, a guest that ran goes on, and removing the file is left to the caller (see save_file).
    StateError names what blocks; HostError for a full disk and after `timeout` seconds.
    """
    if reasons := blockers(qmp):
        raise StateError(f"its memory cannot be saved: {'; '.join(reasons)}", "detach the device, or stop the guest")
    status = qmp.command("query-status")
    if status["status"] == "postmigrate":
        qmp.command("cont")  # QEMU refuses to save twice without this
    running = bool(status["running"])
    try:
        if running or status["status"] == "postmigrate":
            qmp.command("stop")
        form = MAPPED if features.mapped_ram else STREAM
        return write(qmp, features, fd, form, progress=progress, timeout=timeout)
    except BaseException:
        if running:
            with contextlib.suppress(OvtError):  # the first error is the one to tell
                qmp.command("cont")
        raise


def save_file(
    qmp: Qmp, features: Features, path: str, *, progress: Progress | None = None, timeout: float = 3600.0
) -> Saved:
    """`save` to a new file at `path`, mode 0600, which is there whole or not at all."""
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        saved = save(qmp, features, fd, progress=progress, timeout=timeout)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return saved


def write(
    qmp: Qmp,
    features: Features,
    fd: int,
    form: str,
    *,
    progress: Progress | None = None,
    timeout: float = 3600.0,
) -> Saved:
    """Have a QEMU whose guest is stopped write its state in one of the three forms; HostError when it fails."""
    writable = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)  # QEMU takes no descriptor of another mode
    try:
        with _settings(qmp, form, False), _lent(qmp, features, writable) as uri:
            try:
                qmp.command("migrate", {"uri": uri})
                _watch(qmp, progress, timeout, "saved")
            except BaseException:
                _cancel(qmp)
                raise
    finally:
        os.close(writable)
    os.fsync(fd)
    return _seal(qmp, fd, form)


def check(fd: int, saved: Saved, features: Features) -> None:
    """Whether the file `fd` is the one that `saved` describes and this QEMU can load it; OvtError says why not."""
    if saved.format == MAPPED and not features.mapped_ram:
        raise HostError("the state was saved by QEMU 9.0 or later, this one is older", hint="upgrade QEMU")
    if saved.format == DEVICES and not features.ignore_shared:
        raise HostError("this QEMU cannot take a machine's memory from a file (x-ignore-shared)")
    if saved.format not in {MAPPED, STREAM, DEVICES}:
        raise OvtError(f"the state has a form that is not known here, {saved.format!r}", "use a newer ovt")
    size = os.fstat(fd).st_size
    if size != saved.size:
        raise OvtError(f"the saved state is damaged: it has {size} bytes and was written with {saved.size}")
    head, digest = _ends(fd)
    if not head.startswith(_MAGIC):
        raise OvtError("the file is no saved state of a machine")
    if digest != saved.digest:
        raise OvtError("the saved state is damaged: its content has changed since it was written")


def load(
    qmp: Qmp,
    features: Features,
    fd: int,
    saved: Saved,
    *,
    progress: Progress | None = None,
    timeout: float = 3600.0,
) -> None:
    """Load the state into a QEMU that was started with `-incoming defer`; the guest stands still until `cont`.

    OvtError for a damaged file or one of another machine, HostError when QEMU refuses it. That QEMU is of no use then.
    """
    check(fd, saved, features)
    memory = _memory(qmp)
    if memory != saved.memory:
        raise OvtError(
            f"the state is of a machine with {saved.memory >> 20} MiB of memory, this one has {memory >> 20} MiB"
        )
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # an offset of its own
    try:
        with _settings(qmp, saved.format, features.multifd), _lent(qmp, features, readable) as uri:
            try:
                qmp.command("migrate-incoming", {"uri": uri, "exit-on-error": False})
            except QmpError as error:
                if "exit-on-error" not in error.message:
                    raise
                qmp.command("migrate-incoming", {"uri": uri})  # before QEMU 9.1 it ends when this fails
            _watch(qmp, progress, timeout, "loaded")
    except Gone:
        raise HostError("the state cannot be loaded: QEMU ended", hint="its own words are in qemu.log") from None
    finally:
        os.close(readable)


# How QEMU is told


@contextlib.contextmanager
def _settings(qmp: Qmp, form: str, threads: bool) -> Iterator[None]:
    """Capabilities and parameters for one file, and afterwards those of before: a live migration may come later.

    Several threads (multifd) are for loading only. QEMU 10.0 cleans up after a migration some time later, and leaves
    the threads' part out if `multifd` is off by then; the next migration aborts by an assertion, and the guest is gone.
    For the same reason `multifd` is never on again afterwards: the clean-up would look for threads that never were.
    """
    wanted = {
        "events": True,
        "mapped-ram": form == MAPPED,
        "multifd": form == MAPPED and threads,
        "x-ignore-shared": form == DEVICES,
    }
    before = {entry["capability"]: entry["state"] for entry in qmp.command("query-migrate-capabilities")}
    rate = qmp.command("query-migrate-parameters")["max-bandwidth"]
    parameters = {"max-bandwidth": _UNLIMITED}
    if wanted["multifd"]:
        parameters["multifd-channels"] = max(2, min(_THREADS, os.cpu_count() or 1))
    # Everything else off: what a live migration that failed has left on fits no file.
    _capabilities(qmp, {name: wanted.get(name, False) for name in before})
    try:
        qmp.command("migrate-set-parameters", parameters)
        yield
    finally:
        with contextlib.suppress(OvtError):  # QEMU may have ended
            qmp.command("migrate-set-parameters", {"max-bandwidth": rate})
            _capabilities(qmp, {**before, "multifd": False})


def _capabilities(qmp: Qmp, states: Mapping[str, bool]) -> None:
    listed = [{"capability": name, "state": state} for name, state in states.items()]
    qmp.command("migrate-set-capabilities", {"capabilities": listed})


@contextlib.contextmanager
def _lent(qmp: Qmp, features: Features, fd: int) -> Iterator[str]:
    """The URI by which QEMU reaches `fd`: `file:` came before mapped-ram, and `fd:` of a file is deprecated since."""
    if not features.mapped_ram:
        qmp.get_fd(fd, _NAME)  # the command that uses it closes it
        yield f"fd:{_NAME}"
        return
    number = qmp.add_fd(fd)
    try:
        yield f"file:/dev/fdset/{number}"
    finally:
        with contextlib.suppress(OvtError):  # QEMU may have ended
            qmp.command("remove-fd", {"fdset-id": number})


def _watch(qmp: Qmp, progress: Progress | None, timeout: float, what: str) -> None:
    """Until the file is done; HostError with QEMU's reason."""
    deadline = time.monotonic() + timeout
    while True:
        info = qmp.command("query-migrate")
        status = info.get("status", "none")
        if progress and (ram := info.get("ram")):
            progress(ram["total"] - ram["remaining"], ram["total"])
        if status == "completed":
            return
        if status in _ENDED:
            reason = info.get("error-desc", "QEMU gives no reason")
            full = "No space left" in reason
            hint = "free some space, or put the data elsewhere" if full else "QEMU's own words are in qemu.log"
            raise HostError(f"the state cannot be {what}: {reason}", hint=hint)
        if time.monotonic() > deadline:
            raise HostError(f"the state has not been {what} within {timeout:g} seconds")
        with contextlib.suppress(TimeoutError):
            qmp.wait_event("MIGRATION", timeout=0.1)


def _cancel(qmp: Qmp) -> None:
    """End a migration that may or may not be under way, so that `cont` is allowed."""
    with contextlib.suppress(OvtError):  # also the reason to come here may be that QEMU has ended
        qmp.command("migrate_cancel")
        deadline = time.monotonic() + _CANCEL_SECONDS
        while qmp.command("query-migrate").get("status", "none") not in {*_ENDED, "none"}:
            if time.monotonic() > deadline:
                return
            with contextlib.suppress(TimeoutError):
                qmp.wait_event("MIGRATION", timeout=0.1)


# What a file is known by


def _seal(qmp: Qmp, fd: int, form: str) -> Saved:
    version = ".".join(map(str, qmp.version))
    readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Saved(form, os.fstat(readable).st_size, _ends(readable)[1], _memory(qmp), version)
    finally:
        os.close(readable)


def _ends(fd: int) -> tuple[bytes, str]:
    """The first bytes, and the digest of both ends. Not of all: that would take longer than loading it."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, _ENDS, 0)
    tail = os.pread(fd, _ENDS, max(size - _ENDS, len(head)))
    return head, hashlib.sha256(head + tail).hexdigest()


def _memory(qmp: Qmp) -> int:
    sizes = qmp.command("query-memory-size-summary")
    return int(sizes["base-memory"]) + int(sizes.get("plugged-memory", 0))
