"""A machine whose memory is on the disk: `save` ends it there, its next start goes on from there.

    home/saved/memory         the state, see memory_state
    home/saved/saved.json     what is known of the file, and the machine's hardware at that moment

The directory is there whole or not at all, and only while its guest stands still: whatever lets the guest go on removes
it first. So a directory that is there is always the newest that there is of the guest, whoever was killed and when.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable

from ovt.engine.vm import memory_state
from ovt.engine.vm.features import Features
from ovt.engine.vm.hardware import Hardware, replace_json
from ovt.engine.vm.qmp import Qmp
from ovt.errors import NotFound, OvtError

DIRECTORY = "saved"


def exists(home: str) -> bool:
    """Whether the machine in `home` has a saved state."""
    return os.path.isdir(f"{home}/{DIRECTORY}")


def save(
    qmp: Qmp, features: Features, hardware: Hardware, home: str, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write the state; the guest stands still afterwards, for good. When this raises, it goes on as before."""
    final, temporary = f"{home}/{DIRECTORY}", f"{home}/.{DIRECTORY}"
    shutil.rmtree(temporary, ignore_errors=True)
    os.mkdir(temporary, 0o700)
    running = bool(qmp.command("query-status")["running"])
    try:
        record = memory_state.save_file(qmp, features, f"{temporary}/memory", progress=progress)
        replace_json(f"{temporary}/saved.json", {"state": record._asdict(), "hardware": hardware.pack()})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(home)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if running and not exists(home):
            with contextlib.suppress(OvtError):  # the first error is the one to tell
                qmp.command("cont")
        raise


def read(home: str) -> tuple[Hardware, memory_state.Saved]:
    """The hardware that the state is of, and what is known of its file. OvtError for a damaged record."""
    path = f"{home}/{DIRECTORY}/saved.json"
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        return Hardware.unpack(data["hardware"]), memory_state.Saved.unpack(data["state"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OvtError(
            f"the saved state in {home}/{DIRECTORY} cannot be read: {error}",
            "ovt start --discard starts the machine without it",
        ) from None


def load(qmp: Qmp, features: Features, home: str, record: memory_state.Saved) -> None:
    """Fill a machine that was started with `-incoming defer`; its guest stands still until `cont`."""
    path = f"{home}/{DIRECTORY}/memory"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise NotFound(f"{path} has vanished", "ovt start --discard starts the machine without it") from None
    try:
        memory_state.load(qmp, features, fd, record)
    finally:
        os.close(fd)


def discard(home: str) -> None:
    """Forget the state: the guest goes on, or is not wanted any more."""
    if exists(home):
        gone = f"{home}/.{DIRECTORY}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(f"{home}/{DIRECTORY}", gone)
        _sync(home)
        shutil.rmtree(gone)


def tidy(home: str) -> None:
    """After the end of QEMU: take away what killed commands have left half-written or half-removed."""
    for name in (f".{DIRECTORY}", f".{DIRECTORY}.gone"):
        if os.path.isdir(f"{home}/{name}"):
            shutil.rmtree(f"{home}/{name}")


def _sync(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
