"""Directories of the host that a guest mounts: by 9p, which QEMU serves itself, or by virtiofs, which virtiofsd does.

9p        QEMU sees the directory, and nothing else of the host, at /shares/ID of its container. It runs as a user that
          owns nothing, so the mount there is id-mapped: what belongs to the directory's owner belongs to QEMU inside,
          and what the guest makes belongs to the owner on the host. Files of others are what they are to a stranger.
          `security_model=none`: modes and links are the real ones, on both sides the same; a chown in the guest is
          refused. The alternative, mapped-xattr, would let the guest have owners and device nodes of its own,
          kept in extended attributes, but its symbolic links would be files on the host and the host's be unreadable in
          the guest, and a share is there to be used from both sides.
virtiofs  with the volume's option `virtiofs`: faster, can be plugged in while the machine runs, needs virtiofsd and
          memory that QEMU shares with it. virtiofsd ends when QEMU closes their connection.

The built-in image mounts its shares by itself; in another guest it is `guest_command`. Both block live migration.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

from ovt.engine.container import idmap
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.qmp import Qmp, QmpError
from ovt.engine.vm.unplug import plugged, remove_device
from ovt.errors import HostError, NotFound, OvtError, StateError, UsageError
from ovt.kernel import syscalls as sc
from ovt.model import Volume

INSIDE = "/shares"
_GUEST_OPTIONS = {"ro", "rw", "nosuid", "nodev", "noexec", "noatime"}
_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")


def add(hardware: Hardware, volume: Volume) -> dict[str, Any]:
    """Record a share in the hardware; its record. UsageError for what a machine cannot have, NotFound for a directory
    that is not there, HostError where virtiofsd is asked for and is not installed."""
    source, target, options = volume.source, volume.target, set(volume.options)
    if not source:
        raise UsageError(
            f"a machine has no tmpfs volumes (on {target})", "mount one in the guest: mount -t tmpfs tmpfs " + target
        )
    if not target.startswith("/"):
        raise UsageError(f"volume target {target!r} is not an absolute path", f"{source}:/{target}")
    if any(character in target for character in ":,\n"):
        raise UsageError(f"volume target {target!r} has a character that mounts of a machine cannot have: ':' or ','")
    if any(share["target"] == target for share in hardware.shares):
        raise UsageError(f"two volumes are to be mounted on {target}", "give each a target of its own")
    unknown = sorted(options - _GUEST_OPTIONS - {"virtiofs", "bind", "rbind", "rprivate", "private"})
    if unknown:
        raise UsageError(
            f"volume option {unknown[0]!r} is not known for a machine", ", ".join(sorted({*_GUEST_OPTIONS, "virtiofs"}))
        )
    source = os.path.realpath(source)
    if not os.path.exists(source):
        raise NotFound(f"there is no directory {volume.source}", f"mkdir {volume.source}")
    if not os.path.isdir(source):
        raise UsageError(f"{volume.source} is no directory, and only those are shared", "share the one that it is in")
    virtiofs = "virtiofs" in options
    if virtiofs:
        virtiofsd()
        hardware.shared_memory = True
    record = {
        "id": hardware.new_id("share"),
        "port": hardware.take_port(),
        "kind": "virtiofs" if virtiofs else "9p",
        "source": source,
        "target": target,
        "read_only": "ro" in options,
        "options": ",".join(sorted(options & _GUEST_OPTIONS | ({"virtiofs"} & options))),
    }
    hardware.shares.append(record)
    return record


def guest_command(share: Mapping[str, Any]) -> str:
    """What mounts the share in a guest that does not do it by itself."""
    if share["kind"] == "virtiofs":
        options = " -o ro" if share["read_only"] else ""
        return f"mount -t virtiofs{options} {share['id']} {share['target']}"
    options = "trans=virtio,version=9p2000.L,msize=262144" + (",ro" if share["read_only"] else "")
    return f"mount -t 9p -o {options} {share['id']} {share['target']}"


def describe(share: Mapping[str, Any]) -> str:
    """One line for people."""
    mode = "read-only" if share["read_only"] else "writable"
    return f"share {share['id']}: {share['source']} on {share['target']}, {mode}; {guest_command(share)}"


# 9p


def mounts(hardware: Hardware, uid: int) -> list[dict[str, Any]]:
    """OCI mounts of QEMU's container. `uid` is the user and group that QEMU runs as, 0 for an owner without privileges,
    as whom it can write to what is his anyway.

    NotFound for a directory that has vanished, HostError where the guest could not write to one.
    """
    found = []
    for share in hardware.shares:
        if share["kind"] != "9p":
            continue
        directory = share["source"]
        try:
            info = os.stat(directory)
        except FileNotFoundError:
            raise NotFound(f"{directory} has vanished, and the machine shares it", "make it again") from None
        options = ["rbind", "rprivate", "nosuid", "nodev", "noexec", *(["ro"] if share["read_only"] else [])]
        mount: dict[str, Any] = {
            "destination": f"{INSIDE}/{share['id']}",
            "type": "bind",
            "source": directory,
            "options": options,
        }
        if uid:
            uids, gids = _mapping(info.st_uid, uid), _mapping(info.st_gid, uid)
            recursive = _can_map(directory, uids, gids, recursive=True)
            if recursive or _can_map(directory, uids, gids, recursive=False):
                mount |= {"uidMappings": uids, "gidMappings": gids}
                options[0] = "rbind" if recursive else "bind"
            elif not share["read_only"]:
                raise HostError(
                    f"the guest could not write to {directory}: its filesystem or the kernel has no id-mapped mounts",
                    hint=f"share it read-only ({directory}:{share['target']}:ro), or a directory of ext4, xfs or btrfs",
                )
        found.append(mount)
    return found


def _mapping(owner: int, uid: int) -> list[dict[str, int]]:
    """The owner on the disk is `uid` inside."""
    return [{"containerID": owner, "hostID": uid, "size": 1}]


def _can_map(directory: str, uids: list[dict[str, int]], gids: list[dict[str, int]], recursive: bool) -> bool:
    """Whether the directory can be mounted so, tried on a mount that nobody sees."""
    lines = ["".join(f"{m['containerID']} {m['hostID']} {m['size']}\n" for m in one) for one in (uids, gids)]
    try:
        namespace = idmap.make(lines[0], lines[1])
    except OvtError:
        return False
    try:
        flags = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | (sc.AT_RECURSIVE if recursive else 0)
        tree = sc.open_tree(sc.AT_FDCWD, directory, flags)
        try:
            sc.mount_setattr(tree, set_=sc.MOUNT_ATTR_IDMAP, userns_fd=namespace, recursive=recursive)
        finally:
            os.close(tree)
    except OSError:
        return False
    finally:
        os.close(namespace)
    return True


def words(hardware: Hardware) -> list[str]:
    """The 9p shares' part of QEMU's command line, behind the root ports: QEMU cannot add their backends later."""
    result: list[str] = []
    for share in hardware.shares:
        if share["kind"] == "9p":
            backend = f"local,id={share['id']}-fs,path={INSIDE}/{share['id']},security_model=none,multidevs=remap"
            result += ["-fsdev", backend + (",readonly=on" if share["read_only"] else "")]
            device = {"driver": "virtio-9p-pci", "id": share["id"], "bus": share["port"], "fsdev": f"{share['id']}-fs"}
            result += ["-device", json.dumps({**device, "mount_tag": share["id"]})]
    return result


# virtiofs


def virtiofsd() -> str:
    """The program; HostError where it is not installed."""
    path = shutil.which("virtiofsd") or next((path for path in _VIRTIOFSD if os.access(path, os.X_OK)), "")
    if not path:
        raise HostError(
            "virtiofsd is not installed, and the volume has the option virtiofs",
            hint="apt-get install virtiofsd, or leave the option out: 9p needs nothing",
        )
    return path


def plug(qmp: Qmp, hardware: Hardware, share: Mapping[str, Any]) -> None:
    """Connect a virtiofs share; nothing of it is left when this raises. A 9p share is on the command line already:
    StateError for one that is not. HostError with virtiofsd's own words when that does not work."""
    id = share["id"]
    if share["kind"] == "9p":
        if not plugged(qmp, id):
            raise StateError("a 9p share cannot be added to a running machine", "stop it first, or use virtiofs")
        return
    if not hardware.shared_memory:
        raise StateError("its memory is not shared, which virtiofs needs", "stop it first, then add the volume")
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.memfd_create("errors", os.MFD_CLOEXEC), "r+b") as errors:
        daemon = _start_virtiofsd(share, theirs, errors.fileno())
        theirs.close()  # else its end would not be the end of the connection
        try:
            _connect(qmp, share, ours)
        except BaseException as error:
            daemon.kill()
            daemon.wait()
            if not isinstance(error, QmpError):
                raise
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or [error.message]
            raise HostError(f"virtiofsd does not serve {share['source']}: {said[-1]}") from None
        daemon.returncode = 0  # it ends with QEMU, and is reaped by whoever is its parent by then


def _start_virtiofsd(share: Mapping[str, Any], connection: socket.socket, errors: int) -> subprocess.Popen[bytes]:
    command = [virtiofsd(), "--fd", str(connection.fileno()), "--shared-dir", share["source"]]
    command += ["--sandbox", "namespace", "--seccomp", "kill", "--log-level", "error"]
    if share["read_only"]:
        command.append("--readonly")
    return subprocess.Popen(
        command,
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )


def _connect(qmp: Qmp, share: Mapping[str, Any], connection: socket.socket) -> None:
    id = share["id"]
    qmp.get_fd(connection.fileno(), f"{id}-fd")
    backend = {"type": "socket", "data": {"addr": {"type": "fd", "data": {"str": f"{id}-fd"}}, "server": False}}
    try:
        qmp.command("chardev-add", {"id": f"{id}-fs", "backend": backend})
    except QmpError:
        with contextlib.suppress(QmpError):
            qmp.command("closefd", {"fdname": f"{id}-fd"})
        raise
    device = {"driver": "vhost-user-fs-pci", "id": id, "bus": share["port"], "chardev": f"{id}-fs", "tag": id}
    try:
        qmp.command("device_add", device)
    except QmpError:
        qmp.command("chardev-remove", {"id": f"{id}-fs"})
        raise


def unplug(qmp: Qmp, share: Mapping[str, Any], timeout: float) -> None:
    """Take a share out. StateError when the guest has not let go within `timeout` seconds: then it stays."""
    remove_device(qmp, share["id"], timeout, f"umount {share['target']} in the guest and try again")
    if share["kind"] == "virtiofs":
        qmp.command("chardev-remove", {"id": f"{share['id']}-fs"})
