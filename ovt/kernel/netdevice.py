"""`linux.netDevices`: a host's network device given to a container, and taken back with its old name, MTU and MAC.

After config-linux.md, "Network Devices": the device keeps its permanent global addresses, moves and is renamed in
one step, is up afterwards; a taken name is an error unless the new name is a template such as `eth%d`.

When a network namespace ends the kernel returns physical devices to the initial namespace under the name the
container gave them, and destroys virtual ones. `restore_device` is for after that, or for a namespace that lives
on. It does not put addresses back: they belonged to whoever configured the host, and that service sees the device
come. A device is recognised by its hardware, not by its name, which the container may have changed.
"""

from __future__ import annotations

import posix
import time

from ovt.errors import Conflict, HostError, NotFound
from ovt.kernel.netlink import (
    IFA_F_MANAGETEMPADDR,
    IFA_F_MCAUTOJOIN,
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFF_LOOPBACK,
    Link,
    Netlink,
    interface_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# What an administrator chose for an address; the other flags are the kernel's own state.
_KEPT_FLAGS = IFA_F_NODAD | IFA_F_MANAGETEMPADDR | IFA_F_NOPREFIXROUTE | IFA_F_MCAUTOJOIN
_ENODEV = 19
_HIGHEST_TEMPLATE = 4096
_POLL_SECONDS = 0.02


def move_device(
    name: str, netns_fd: int, new_name: str = "", announce: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Move the device `name` of the caller's namespace to `netns_fd`, rename it, and set it up there.

    `new_name` may hold one `%d`, for which the lowest free number is taken; empty keeps the name. Returns the
    record for `restore_device`, plain JSON; `announce` gets it before anything changes, to be kept in case that the
    caller is killed, and the same dict is completed afterwards. On failure the device is back where it was, or the
    error says that it could not be brought back. Raises NotFound, Conflict (the name is taken in the container) or
    HostError.
    """
    interface_name(name)
    template = new_name or name
    interface_name(template.replace("%d", "0", 1))
    if "%" in template.replace("%d", "", 1):
        raise HostError(f"{template!r} is not a network device name: only one %d is allowed", 22)
    _refuse_own_namespace(name, netns_fd)
    with Netlink() as here, Netlink(netns_fd) as there:
        link = here.find(name)
        if link is None:
            raise NotFound(f"no network device {name} to give to the container", hint="see: ip link")
        if link.flags & IFF_LOOPBACK:
            raise HostError(f"{name} is a loopback device, which cannot change its namespace", 22)
        record: dict[str, Any] = {
            "name": link.name,
            "mtu": link.mtu,
            "mac": link.mac,
            "up": link.up,
            "addresses": here.addresses(link.index),
            "kind": link.kind,
            "parent": link.parent,
            "permanentMac": link.permanent_mac,
            "index": link.index,  # which the kernel keeps if it is free over there
            "newName": template,
        }
        if announce is not None:
            announce(record)
        record["newName"] = _move(here, there, link, netns_fd, template, record)
        moved = there.link(record["newName"])
        record["index"] = moved.index
        try:
            for address in record["addresses"]:
                there.add_address(moved.index, **{**address, "flags": address["flags"] & _KEPT_FLAGS})
            there.set_up(moved.index)
        except (OSError, HostError) as error:
            _bring_back(here, there, moved, record)
            raise HostError(
                f"cannot configure {name} as {record['newName']} in the container: {_reason(error)}",
                getattr(error, "errno", 0) or 0,
            ) from error
        return record


def undo_move(record: dict[str, Any], netns_fd: int) -> bool:
    """Take a device back as if it had never left, addresses and all: for a container that could not be made.

    False when it is not in the namespace `netns_fd` (any more). Raises HostError when it is lost on the way.
    """
    with Netlink() as here, Netlink(netns_fd) as there:
        link = _recognise(there.links(), record)
        if link is None:
            return False
        _bring_back(here, there, link, record)
        return True


def restore_device(record: dict[str, Any], netns_fd: int, back_to_fd: int = -1, wait: float = 2.0) -> bool:
    """Give a device that `move_device` moved its old name, MTU and MAC in the namespace `back_to_fd`.

    `netns_fd` is the container's namespace if it still exists, from which the device is fetched; -1 when it has
    ended, and then the device is looked for in `back_to_fd` (-1: the caller's) for up to `wait` seconds, as the
    kernel returns it some time after the last process. True when done, False when there is no such device: it was
    a virtual one and has ended with its namespace. Raises Conflict when the old name is taken by another device,
    which leaves ours in place, down, under the name that the error tells; HostError when the kernel refuses.
    """
    with Netlink(back_to_fd) as home:
        if netns_fd < 0:
            link = _wait_for(home, record, wait)
            if link is None:
                return False
            if (link.name, link.mtu, link.mac) == (record["name"], record["mtu"], record["mac"]):
                return True  # it never left, or somebody was quicker: it may be in use
            _configure(home, link, record)
            if link.name != record["name"]:
                _refuse_taken(home, record["name"], link.name)
                home.set_name(link.index, record["name"])
            return True
        with Netlink(netns_fd) as there:
            link = _recognise(there.links(), record)
            if link is None:
                return False
            _configure(there, link, record)
            _refuse_taken(home, record["name"], link.name)
            target = _own_namespace()
            try:
                there.move(link.index, back_to_fd if back_to_fd >= 0 else target, record["name"])
            except OSError as error:
                raise HostError(
                    f"cannot take {link.name} back as {record['name']}: {error.strerror}", error.errno or 0
                ) from error
            finally:
                posix.close(target)
            return True


def _move(here: Netlink, there: Netlink, link: Link, netns_fd: int, template: str, record: dict[str, Any]) -> str:
    """The one message that moves and renames; returns the name the device has now."""
    while True:
        name = _free_name(there, template)
        try:
            # The kernel takes the device down itself; doing it before would only lose the addresses if it refuses.
            here.move(link.index, netns_fd, name)
        except OSError as error:
            # Kernels check the new name only after the move: a name taken since we looked leaves the device
            # over there under its old name.
            stranded = there.find(link.name) if here.find(link.name) is None else None
            if stranded is not None:
                _bring_back(here, there, stranded, record)
                link = here.link(link.name)
            if error.errno == 17 and "%d" in template:
                continue
            raise HostError(
                f"cannot move {link.name} to the container: {error.strerror}",
                error.errno or 0,
                hint="bridges, tunnels' base devices and the like belong to one namespace",
            ) from error
        return name


def _free_name(there: Netlink, template: str) -> str:
    if "%d" not in template:
        if there.find(template) is not None:
            numbered = template.rstrip("0123456789") + "%d"
            raise Conflict(
                f"the container already has a network device {template}",
                hint=f"name it otherwise in linux.netDevices, or let a number be chosen: {numbered}",
            )
        return template
    taken = {link.name for link in there.links()}
    for number in range(_HIGHEST_TEMPLATE):
        name = template.replace("%d", str(number))
        if name not in taken:
            interface_name(name)
            return name
    raise HostError(f"no free number for {template}", 17)


def _bring_back(here: Netlink, there: Netlink, moved: Link, record: dict[str, Any]) -> None:
    """Undo a move after a failure; what fails here is told together with the name of the device."""
    fd = _own_namespace()
    try:
        there.move(moved.index, fd, record["name"])
        index = here.link(record["name"]).index
        for address in record["addresses"]:
            here.add_address(index, **{**address, "flags": address["flags"] & _KEPT_FLAGS})
        if record["up"]:
            here.set_up(index)
    except OSError as error:
        raise HostError(
            f"cannot take {record['name']} back after a failure: {_reason(error)}",
            error.errno or 0,
            hint=f"it is in the container as {moved.name}, or here without its addresses",
        ) from error
    finally:
        posix.close(fd)


def _configure(netlink: Netlink, link: Link, record: dict[str, Any]) -> None:
    """MTU and MAC as recorded; the device is left down, as the kernel leaves a returned one."""
    try:
        if link.up:
            netlink.set_down(link.index)
        if link.mac != record["mac"] and record["mac"]:
            netlink.set_mac(link.index, record["mac"])
        if link.mtu != record["mtu"]:
            netlink.set_mtu(link.index, record["mtu"])
    except OSError as error:
        raise HostError(
            f"cannot give {record['name']} (now {link.name}) its MTU and MAC back: {error.strerror}", error.errno or 0
        ) from error


def _recognise(links: list[Link], record: dict[str, Any]) -> Link | None:
    """The recorded device: by hardware where it has any, else by number and kind, which outlive a rename."""
    for link in links:
        same = link.parent == record["parent"] and link.kind == record["kind"]
        if same and link.permanent_mac == record["permanentMac"] and (link.parent or link.index == record["index"]):
            return link
    return None


def _wait_for(home: Netlink, record: dict[str, Any], wait: float) -> Link | None:
    if not record["parent"] and record["kind"]:
        return None
    deadline = time.monotonic() + wait
    while True:
        link = _recognise(home.links(), record)
        if link is not None or time.monotonic() >= deadline:
            return link
        time.sleep(_POLL_SECONDS)


def _refuse_taken(home: Netlink, name: str, present: str) -> None:
    if home.find(name) is not None:
        raise Conflict(
            f"cannot give the network device {present} its old name {name}: another device has it now",
            hint=f"rename that one first, then: ip link set {present} name {name}",
        )


def _refuse_own_namespace(name: str, netns_fd: int) -> None:
    fd = _own_namespace()
    try:
        ours, theirs = posix.fstat(fd), posix.fstat(netns_fd)
    finally:
        posix.close(fd)
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise HostError(
            f"cannot move {name} to the container: it shares the runtime's network namespace",
            22,
            hint="add a network namespace to linux.namespaces, or take linux.netDevices out",
        )


def _own_namespace() -> int:
    return posix.open("/proc/thread-self/ns/net", posix.O_RDONLY | posix.O_CLOEXEC)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
