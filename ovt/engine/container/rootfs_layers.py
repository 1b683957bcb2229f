"""An instance's own root file system: the image's layers, which nobody changes, below a layer of its own in `home`.

    home/upper, home/work   the instance's layer and the overlay's scratch directory
    home/rootfs             a whole copy instead, when the instance has a range of ids of its own

The overlay is mounted by the runtime inside the container's mount namespace, and by `view` without any: nothing of it
is ever visible on the host, so nothing of it can be left behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ovt.engine.container import copy, view
from ovt.kernel.userns import Mapping
from ovt.model import Instance

SHIFT = 65536  # how many ids an instance of its own range gets
_FIRST = 0x80000  # above the ids of people and, by their usual defaults, of subordinate ranges
_RANGES = 32000


def own_range(instance: Instance) -> tuple[Mapping, ...]:
    """The ids of an instance with `userns auto` made by root: a range that its id picks."""
    return ((0, _FIRST + int(instance.id, 16) % _RANGES * SHIFT, SHIFT),)


def prepare(instance: Instance, home: str, mappings: tuple[Mapping, ...], rootless: bool) -> dict[str, Any] | None:
    """Make what the root file system needs before it can be mounted; the runtime's overlay, or None without one."""
    if instance.rootfs.get("in_place"):
        return None
    layers = instance.rootfs["layers"]
    if mappings and not rootless:
        _shifted_copy(layers, home, mappings[0][1])
        return None
    for name in ("upper", "work", "bundle/rootfs"):
        os.makedirs(f"{home}/{name}", exist_ok=True)
    mode = os.stat(layers[0]).st_mode & 0o7777
    os.chmod(f"{home}/upper", mode)  # the merged root has the mode of its topmost layer
    return view.overlay(layers, f"{home}/upper", f"{home}/work", rootless)


def path(instance: Instance, home: str, shifted: bool) -> str:
    """What `root.path` of the configuration says."""
    if instance.rootfs.get("in_place"):
        return str(instance.rootfs["layers"][0])
    if shifted:
        return f"{home}/rootfs"
    return f"{home}/bundle/rootfs"


def open_resting(instance: Instance, home: str, rootless: bool) -> int:
    """A descriptor of the root directory of an instance that is not alive."""
    layers = instance.rootfs["layers"]
    if instance.rootfs.get("in_place"):
        return view.resting(layers, "", "")
    if os.path.isdir(f"{home}/rootfs"):
        return view.resting([f"{home}/rootfs"], "", "")
    for name in ("upper", "work"):
        os.makedirs(f"{home}/{name}", exist_ok=True)
    return view.resting(layers, f"{home}/upper", f"{home}/work", rootless)


def destroy(home: str, mapped: Callable[[Callable[[], None]], None]) -> None:
    """Remove the instance's layer; `mapped` runs what may touch files of other owners."""
    present = [path for name in ("upper", "work", "rootfs", "rootfs.new") if os.path.isdir(path := f"{home}/{name}")]

    def remove() -> None:
        import shutil

        for path in present:
            shutil.rmtree(path)

    if present:
        mapped(remove)


def _shifted_copy(layers: list[str], home: str, first: int) -> None:
    """The image with every owner moved by `first`: for kernels and file systems without id-mapped overlays."""
    final, temporary = f"{home}/rootfs", f"{home}/rootfs.new"
    if os.path.isdir(final):
        return
    if os.path.isdir(temporary):
        import shutil

        shutil.rmtree(temporary)
    os.mkdir(temporary)
    target = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for layer in reversed(layers):
            source = os.open(layer, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                copy.copy_tree(source, target, lambda uid, gid: (first + uid % SHIFT, first + gid % SHIFT), layer)
            finally:
                os.close(source)
    finally:
        os.close(target)
    os.rename(temporary, final)
