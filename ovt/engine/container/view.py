"""A descriptor of an instance's root directory, as its own processes see it or would see it.

Of a living container it is /proc/PID/root. Of one that is not alive the layers are mounted again as a detached mount
(fsmount(2)) that is in no namespace: nobody else sees it, and it goes with its last descriptor, also after kill -9.
Whoever gets the descriptor resolves below it with openat2(RESOLVE_IN_ROOT) and never enters it.
"""

from __future__ import annotations

import os
from typing import Any

from ovt.engine.container import mounts
from ovt.errors import HostError, NotFound
from ovt.kernel import procfs
from ovt.kernel.syscalls import O_PATH

_VALUE = 255  # bytes that fsconfig(2) takes as a value
_FLAGS = O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def living(pid: int, start_time: int) -> int:
    """The root of process `pid`; NotFound when it is not the process that began at `start_time` any more."""
    try:
        directory = os.open(f"/proc/{pid}", _FLAGS)
        try:
            # opened first, checked then: the descriptor stays with this process when the pid is used again
            if not procfs.alive(pid, start_time):
                raise NotFound("its process has just ended")
            return os.open("root", _FLAGS, dir_fd=directory)
        finally:
            os.close(directory)
    except (FileNotFoundError, ProcessLookupError):
        raise NotFound("its process has just ended") from None


def resting(layers: list[str], upper: str, work: str, rootless: bool = False) -> int:
    """The root that the directories `layers`, topmost first, make with the instance's own layer `upper` above them;
    without `upper` the one layer itself."""
    if not upper:
        return os.open(layers[0], _FLAGS)
    held = [os.open(path, _FLAGS) for path in (*layers, upper, work)]
    try:
        # by descriptor: a value of fsconfig(2) is at most 255 bytes, and a path may hold the separating colon
        paths = [f"/proc/self/fd/{fd}" for fd in held]
        data = [f"lowerdir={':'.join(paths[:-2])}", f"upperdir={paths[-2]}", f"workdir={paths[-1]}"]
        data += overlay_options(rootless)
        return mounts.new_filesystem("overlay", "overlay", data)
    except OSError as error:
        raise HostError(
            f"cannot put its layers together: {error.filename or error.strerror}", error.errno or 0
        ) from error
    finally:
        for fd in held:
            os.close(fd)


def overlay(layers: list[str], upper: str, work: str, rootless: bool = False) -> dict[str, Any]:
    """The same for the runtime, which mounts it inside the container's own mount namespace."""
    return {"lower": layers, "upper": upper, "work": work, "options": overlay_options(rootless)}


def by_descriptor(overlay: dict[str, Any]) -> dict[str, Any]:
    """The same overlay with descriptors in place of paths, where the paths are too long or hold what separates.

    The descriptors stay open: this is for a process that mounts the overlay, or a copy of it does, and then ends or
    executes something else.
    """
    joined = ":".join(overlay["lower"])
    plain = len(os.fsencode(joined)) <= _VALUE and len(os.fsencode(overlay["upper"])) <= _VALUE
    if plain and joined.count(":") == len(overlay["lower"]) - 1:
        return overlay

    def opened(path: str) -> str:
        return f"/proc/self/fd/{os.open(path, _FLAGS)}"

    lower = [opened(path) for path in overlay["lower"]]
    return {**overlay, "lower": lower, "upper": opened(overlay["upper"]), "work": opened(overlay["work"])}


def overlay_options(rootless: bool) -> list[str]:
    """Without privilege over the host the overlay keeps its notes in user.* attributes (Linux 5.11)."""
    return ["userxattr"] if rootless else []
