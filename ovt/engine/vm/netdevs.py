"""What is behind a machine's network card on the host: nothing, a user network, or a tap.

    user             connections made by passt where that is installed, else by QEMU itself (slirp)
    tap:NAME         a tap or macvtap that is there
    bridge:NAME      a tap in that bridge, for as long as QEMU runs
    macvtap:DEVICE   beside the host on the network of DEVICE, for as long as QEMU runs
    none             a card without a cable

All but slirp come to QEMU as descriptors, and end with them: a tap that was made for a machine is gone when QEMU is,
and passt ends when its connection to QEMU does. Nothing here changes a bridge, an uplink or an address.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from typing import Any, NamedTuple

from ovt.engine.vm.features import Features
from ovt.errors import Conflict, HostError, StateError, UsageError
from ovt.kernel import tap
from ovt.kernel.netlink import Netlink

KINDS = ("user", "none", "tap", "bridge", "macvtap")
_HINT = "user, none, bridge:NAME, tap:NAME or macvtap:DEVICE"
_PASST_SECONDS = 30.0


class Network(NamedTuple):
    """What a network can do for a card; MTU in bytes, 0 where there is none of its own."""

    multi_queue: bool
    mtu: int


class Netdev(NamedTuple):
    """Arguments of netdev_add, and the descriptors that go with them by the argument that names them."""

    arguments: dict[str, Any]
    fds: dict[str, list[int]]

    def close(self) -> None:
        """Close this side's descriptors."""
        for fds in self.fds.values():
            tap.close(fds)

    def name(self, arguments: dict[str, Any], key: str, names: list[str]) -> None:
        """Put the names of the descriptors `key` into `arguments`."""
        if key == "addr":
            arguments["addr"] = {"type": "fd", "str": names[0]}
        elif len(names) == 1:
            arguments[key.removesuffix("s")] = names[0]
        else:
            arguments[key] = ":".join(names)


def kind(network: str) -> str:
    """The sort of network that the text names; UsageError when there is no such sort."""
    name, colon, rest = network.partition(":")
    if name not in KINDS or bool(colon) != (name in {"tap", "bridge", "macvtap"}) or (colon and not rest):
        raise UsageError(f"network {network!r} is not known", _HINT)
    return name


def inspect(network: str) -> Network:
    """What the network can do. NotFound when the host's part is not there, UsageError when it is of another sort."""
    sort, _, name = network.partition(":")
    if kind(network) in {"user", "none"}:
        return Network(False, 0)
    link = tap.find(name)
    if sort == "bridge":
        if link.kind != "bridge":
            raise UsageError(
                f"network device {name} is no bridge",
                f"macvtap:{name} puts a machine on the network of {name}; ip link add NAME type bridge makes a bridge",
            )
        return Network(True, link.mtu)
    if sort == "macvtap":
        return Network(True, link.mtu)
    if link.kind not in {"tun", "macvtap"}:
        raise UsageError(f"network device {name} is no tap", f"ip tuntap add {name} mode tap multi_queue makes one")
    return Network(link.multi_queue or link.kind == "macvtap", link.mtu)


def parse_forward(text: str) -> tuple[str, str, int, int]:
    """(protocol, address, port of the host, port of the guest) of PROTOCOL:ADDRESS:PORT:GUEST_PORT; an empty address
    is every IPv4 address of the host."""
    parts = text.split(":")
    try:
        protocol, address, port, guest = parts[0], ":".join(parts[1:-2]).strip("[]"), int(parts[-2]), int(parts[-1])
        if len(parts) < 4:
            raise ValueError
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        socket.inet_pton(family, address or "0.0.0.0")
        if protocol not in {"tcp", "udp"} or not (0 < port < 65536 and 0 < guest < 65536):
            raise ValueError
    except (ValueError, IndexError, OSError):
        raise UsageError(
            f"port forward {text!r} is not understood", "such as tcp:127.0.0.1:2222:22: the host's, then the guest's"
        ) from None
    return protocol, address, port, guest


def passt() -> str | None:
    """The program, or None where it is not installed."""
    return shutil.which("passt")


def tap_name(owner: str, number: int) -> str:
    """The tap of card `number` of the instance with the id `owner`; at most 15 characters."""
    return f"ovt-{owner[:8]}" + (f"-{number}" if number else "")


def open_network(nic: dict[str, Any], owner: str, features: Features | None, pid: int) -> Netdev | None:
    """Make or open what is behind the card; None for a card without a network. See `nics.plug` for the arguments."""
    sort, _, name = nic["network"].partition(":")
    if sort == "none":
        return None
    if sort == "user":
        return _user(nic, features, pid)
    queues = nic["queues"]
    if sort == "bridge":
        mtu = inspect(nic["network"]).mtu
        own = tap_name(owner or os.urandom(4).hex(), nic.get("number", 0))
        fds = tap.make(own, queues, mac=f"fe{nic['mac'][2:]}", mtu=mtu, bridge=name)
    elif sort == "macvtap":
        fds = tap.make_macvtap(name, nic["mac"], queues)
    else:
        fds = tap.attach(name, queues)
    arguments: dict[str, Any] = {"type": "tap"}
    given = {"fds": fds}
    vhost = tap.open_vhost(queues) if nic["model"] == "virtio" else []
    if vhost:
        arguments["vhost"] = True
        given["vhostfds"] = vhost
    return Netdev(arguments, given)


def _user(nic: dict[str, Any], features: Features | None, pid: int) -> Netdev:
    for text in nic["forwards"]:
        _check_free(*parse_forward(text)[:3])
    program = passt()
    if program and (features is None or features.stream_netdev):
        return Netdev({"type": "stream", "server": False}, {"addr": [_start_passt(program, nic["forwards"])]})
    if features is not None and not features.user_netdev:
        raise HostError("this QEMU was built without user networks", hint="apt-get install passt, or use a bridge")
    if pid and not os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net"):
        raise StateError(
            "it was started without a user network, and is cut off from the host's connections",
            "stop it first, or use a bridge; with passt installed it works at once",
        )
    return Netdev({"type": "user", "hostfwd": [{"str": _slirp(text)} for text in nic["forwards"]]}, {})


def _slirp(text: str) -> str:
    """QEMU's own form of a forward."""
    protocol, address, port, guest = parse_forward(text)
    if ":" in address:
        raise HostError("QEMU's user network forwards IPv4 only", hint="apt-get install passt")
    return f"{protocol}:{address}:{port}-:{guest}"


def _check_free(protocol: str, address: str, port: int) -> None:
    """Conflict when the port is taken: QEMU and passt say no more than that they could not."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    tcp = protocol == "tcp"
    with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as trial:
        if tcp:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
        try:
            trial.bind((address, port))
            if tcp:
                trial.listen(1)
        except OSError as error:
            where = f"port {port}/{protocol}" + (f" of {address}" if address else "")
            if error.errno == errno.EADDRINUSE:
                flag = "t" if tcp else "u"
                raise Conflict(f"{where} is taken by another program", f"ss -ln{flag}p sport = :{port}") from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(f"{address} is not an address of this host", "ip address") from None
            raise HostError(f"{where} cannot be opened: {error.strerror}", error.errno or 0) from None


def _start_passt(program: str, forwards: list[str]) -> int:
    """A connection to a passt of its own, which ends with that connection; it goes to the background once ready."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [program, "--quiet", "--one-off", "--fd", str(theirs.fileno())]
        for text in forwards:
            protocol, address, port, guest = parse_forward(text)
            command += [f"--{protocol}-ports", f"{address}/{port}:{guest}" if address else f"{port}:{guest}"]
        for protocol in ("tcp", "udp"):
            if not any(text.startswith(protocol) for text in forwards):
                command += [f"--{protocol}-ports", "none"]
        failure = ""
        try:
            done = subprocess.run(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=_PASST_SECONDS,
            )
            if done.returncode:
                lines = done.stderr.decode(errors="replace").strip().splitlines()
                failure = lines[-1] if lines else f"it ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            failure = "it does not become ready"
    if failure:
        ours.close()
        raise HostError(f"{program}: {failure}", hint="a user network without it: remove passt, and QEMU makes one")
    return ours.detach()


def counters(nic: dict[str, Any], owner: str) -> tuple[int, int] | None:
    """Bytes that the guest has received and sent, as the host counts them; None where it does not."""
    sort, _, name = nic["network"].partition(":")
    if sort == "bridge":
        name = tap_name(owner, nic.get("number", 0))
    elif sort != "tap":
        return (0, 0) if sort == "none" else None
    try:
        with Netlink() as netlink:
            link = netlink.find(name)
    except OSError:
        link = None
    if link is None:
        return None
    return link.sent, link.received
