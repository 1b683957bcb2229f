"""Taps: network devices whose other end is a descriptor, which is then handed to a machine.

None of them outlives its descriptors, so nothing has to be cleaned up, whoever is killed: a tap is not made
persistent, and a macvtap lives in a network namespace that nothing but its descriptors keeps alive. The constants are
those of linux/if_tun.h. Bridges and their addresses are the host's own affair: a tap is only put into one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError, refused
from ovt.kernel import syscalls as sc
from ovt.kernel.netlink import Link, Netlink, interface_name

TUN = "/dev/net/tun"
VHOST = "/dev/vhost-net"
_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE, _IFF_TUN_EXCL = 0x2, 0x1000, 0x4000, 0x100, 0x8000
_FLAGS = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
_EPERM, _ENOENT, _ENXIO, _EBUSY, _ENODEV = 1, 2, 6, 16, 19


def find(name: str) -> Link:
    """The network device `name`; NotFound when there is none, UsageError for what cannot be a name."""
    try:
        interface_name(name)
    except HostError as error:
        raise UsageError(error.message, error.hint) from None
    with Netlink() as netlink:
        link = netlink.find(name)
    if link is None:
        raise NotFound(f"there is no network device {name!r} on this host", "ip link")
    return link


def make(name: str, queues: int, *, mac: str = "", mtu: int = 0, bridge: str = "") -> list[int]:
    """Make a tap, into `bridge` if that is given, and set it up: its descriptors, one for each queue.

    `mac` is the address of the host's side. A bridge whose address nobody has set takes the lowest of its ports', and
    the host is not to change its address because a machine has started: one that begins with fe never is the lowest.
    Conflict when the name is taken, NotFound without the bridge. Nothing is left when this raises.
    """
    with _closing() as fds:
        fds += _open(name, queues, _IFF_TUN_EXCL)
        with Netlink() as netlink:
            link = netlink.link(name)
            try:
                if mac:
                    netlink.set_mac(link.index, mac)
                if mtu:
                    netlink.set_mtu(link.index, mtu)  # before the bridge, which takes the smallest of its ports'
                if bridge:
                    netlink.set_master(link.index, find(bridge).index)
                netlink.set_up(link.index)
            except OSError as error:
                raise refused(f"put tap {name} into {bridge}" if bridge else f"set tap {name} up", error) from None
    return fds


def attach(name: str, queues: int) -> list[int]:
    """The descriptors of an existing tap or macvtap. Conflict when it has another user already."""
    link = find(name)
    if link.kind == "macvtap":
        path = f"/dev/tap{link.index}"
        try:
            return _open_queues(path, queues)
        except OSError as error:
            if error.errno == _EBUSY:
                raise Conflict(f"macvtap {name} is in use already", f"fuser {path} shows by whom") from None
            raise refused(f"open {path} of macvtap {name}", error) from None
    if link.kind != "tun":
        raise UsageError(
            f"network device {name} is no tap" + (f" but a {link.kind}" if link.kind else ""),
            f"bridge:{name} for a bridge, macvtap:{name} to be on the network of {name}",
        )
    if queues > 1 and not link.multi_queue:
        raise HostError(f"tap {name} has one queue, and {queues} are needed", hint="ip tuntap add … multi_queue")
    return _open(name, queues, _IFF_MULTI_QUEUE if link.multi_queue else 0)


def _open(name: str, queues: int, flags: int) -> list[int]:
    if queues > 1:
        flags |= _IFF_MULTI_QUEUE
    with _closing() as fds:
        for _ in range(queues):
            try:
                fds.append(os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            except OSError as error:
                hint = "modprobe tun" if error.errno in {_ENOENT, _ENODEV, _ENXIO} else ""
                raise HostError(f"{TUN}: {error.strerror}", error.errno or 0, hint) from None
            try:
                fcntl.ioctl(fds[-1], _TUNSETIFF, struct.pack("16sH22x", interface_name(name)[:-1], _FLAGS | flags))
            except OSError as error:
                if error.errno == _EBUSY:
                    raise Conflict(f"tap {name} is in use already", "ip -d link show type tun") from None
                hint = "only root makes taps; a user has those made for him: ip tuntap add NAME mode tap user USER"
                raise refused(f"open tap {name}", error, hint if error.errno == _EPERM else "") from None
            flags &= ~_IFF_TUN_EXCL
    return fds


def _open_queues(path: str, queues: int) -> list[int]:
    """A macvtap's: each opening of its file is a queue."""
    flags = _FLAGS | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    with _closing() as fds:
        for _ in range(queues):
            fds.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            fcntl.ioctl(fds[-1], _TUNSETIFF, struct.pack("16sH22x", b"", flags))
    return fds


def make_macvtap(device: str, mac: str, queues: int) -> list[int]:
    """A macvtap with the address `mac` on the network of `device`: its descriptors, one for each queue.

    It is made in a network namespace of its own, which its descriptors hold (each belongs to the namespace that it was
    opened in) and whose end is its own. NotFound without the device, HostError where it cannot be.
    """
    lower = find(device)
    if not lower.up:
        raise HostError(f"network device {device} is down", hint=f"ip link set {device} up")
    ours, theirs = socket.socketpair()
    with ours, theirs, Netlink() as here:
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                _send_macvtap(theirs, here, lower, mac, queues)
            except OSError as error:
                theirs.send(b"-" + str(error).encode())
            except OvtError as error:
                theirs.send(b"-" + error.message.encode())
            finally:
                os._exit(0)
        theirs.close()
        try:
            said, fds, _, _ = socket.recv_fds(ours, 4096, queues)
        finally:
            os.waitpid(pid, 0)
    if said == b"+" and len(fds) == queues:
        for fd in fds:
            os.set_inheritable(fd, False)
        return fds
    for fd in fds:
        os.close(fd)
    reason = said[1:].decode(errors="replace") or "the process that makes it ended early"
    hint = "modprobe macvtap" if "not supported" in reason else ""
    raise HostError(f"macvtap on {device}: {reason}", hint=hint)


def _send_macvtap(to: socket.socket, here: Netlink, lower: Link, mac: str, queues: int) -> None:
    """In a process of its own: its sysfs and its device node are nowhere else."""
    sc.unshare(sc.CLONE_NEWNET | sc.CLONE_NEWNS)
    sc.mount(None, "/", None, sc.MS_REC | sc.MS_PRIVATE)
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    here.add_macvtap("vm", lower.index, mac, own)
    with Netlink() as there:
        index = there.link("vm").index
        there.set_up(index)
    sc.mount("sysfs", "/sys", "sysfs", sc.MS_NOSUID | sc.MS_NOEXEC | sc.MS_NODEV)
    with open(f"/sys/class/net/vm/tap{index}/dev", encoding="ascii") as file:
        major, minor = map(int, file.read().split(":"))
    sc.mount("tmpfs", "/sys", "tmpfs", sc.MS_NOSUID | sc.MS_NOEXEC)
    os.mknod("/sys/tap", 0o020600, os.makedev(major, minor))
    fds = _open_queues("/sys/tap", queues)
    socket.send_fds(to, [b"+"], fds)


def open_vhost(queues: int) -> list[int]:
    """Descriptors for the kernel to move the packets itself, one for each queue; none where it cannot."""
    with _closing() as fds:
        try:
            for _ in range(queues):
                fds.append(os.open(VHOST, os.O_RDWR | os.O_CLOEXEC))
        except OSError:  # not there, no module for it, or not for this user: QEMU moves them
            close(fds)
            fds.clear()
    return fds


def name_of(fd: int) -> str:
    """The name of the tap behind a descriptor."""
    return fcntl.ioctl(fd, _TUNGETIFF, bytes(40))[:16].split(b"\0", 1)[0].decode()


def close(fds: list[int]) -> None:
    """Close all of them."""
    for fd in fds:
        os.close(fd)


@contextmanager
def _closing() -> Iterator[list[int]]:
    """A list of descriptors that is closed when the block raises."""
    fds: list[int] = []
    try:
        yield fds
    except BaseException:
        close(fds)
        raise
