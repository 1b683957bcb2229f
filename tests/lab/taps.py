"""A multiqueue tap device that no one else sees: made in a network namespace of its own, handed over as descriptors.

    taps.py SOCKET QUEUES      sends QUEUES descriptors of one tap device over the inherited Unix socket SOCKET

QEMU's user network has one queue; only a tap gives a guest's virtio-net card several. The namespace and the device in
it live exactly as long as the descriptors. The host's end has the address 192.0.2.1/24. Needs no privilege where users
may make user namespaces.
"""

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

NAME = "lab0"
ADDRESS = "192.0.2.1/24"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100


def make(queues: int) -> list[int]:
    """Enter a new network namespace and open the queues of a tap device in it."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    fds = []
    for _ in range(queues):
        fds.append(os.open("/dev/net/tun", os.O_RDWR))
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
        fcntl.ioctl(fds[-1], TUNSETIFF, struct.pack("16sH22x", NAME.encode(), flags))
    subprocess.run(["ip", "address", "add", ADDRESS, "dev", NAME], check=True)
    subprocess.run(["ip", "link", "set", NAME, "up"], check=True)
    return fds


def taps(queues: int) -> list[int]:
    """Descriptors of the queues, made by a process of its own; none where the machine cannot make a tap device."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-ISs", __file__, str(theirs.fileno()), str(queues)],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            check=False,
        )
        return socket.recv_fds(ours, 1, queues)[1] if done.returncode == 0 else []


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as wire:
        socket.send_fds(wire, [b"t"], make(int(sys.argv[2])))
