"""A synchronous rtnetlink client: links and their addresses, one request at a time.

Not a network library: no routes, no qdiscs, no events. It is import-light (`_socket`, not `socket`) and free of
global state, because it runs between a container's setns and its exec. A socket belongs to the network namespace
it was made in for life; `Netlink(netns_fd)` makes one in another namespace than the caller's.

What the kernel refuses is OSError, with the kernel's own extended message where it sent one. What does not parse is
HostError: no length, of a reply or of the caller's, is used before it was compared with what is really there.
"""

from __future__ import annotations

import _socket
import posix
from _struct import pack, unpack_from

from ovt.errors import HostError

# linux/netlink.h
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLM_F_DUMP_INTR = 0x10
_NLM_F_DUMP = 0x300
_NLM_F_EXCL = 0x200
_NLM_F_CREATE = 0x400
_NLM_F_CAPPED = 0x100
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_NETLINK_GET_STRICT_CHK = 12

# linux/rtnetlink.h
_RTM_NEWLINK = 16
_RTM_GETLINK = 18
_RTM_NEWADDR = 20
_RTM_GETADDR = 22
_RT_SCOPE_UNIVERSE = 0

# linux/if_link.h
_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_LINK = 5
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_IFLA_STATS64 = 23
_IFLA_NET_NS_FD = 28
_IFLA_MACVLAN_MODE = 1
_IFLA_TUN_MULTI_QUEUE = 7
_MACVLAN_MODE_BRIDGE = 4
_IFLA_PERM_ADDRESS = 54
_IFLA_PARENT_DEV_NAME = 56
_IFLA_PARENT_DEV_BUS_NAME = 57

# linux/if_addr.h
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_BROADCAST = 4
_IFA_FLAGS = 8
_IFA_RT_PRIORITY = 9
IFA_F_NODAD = 0x02
IFA_F_PERMANENT = 0x80
IFA_F_MANAGETEMPADDR = 0x100
IFA_F_NOPREFIXROUTE = 0x200
IFA_F_MCAUTOJOIN = 0x400

IFF_UP = 0x1
IFF_LOOPBACK = 0x8

_AF_INET = 2
_AF_INET6 = 10
_ADDRESS_BYTES = {_AF_INET: 4, _AF_INET6: 16}

# The kernel builds a dump's messages for the reader's buffer, up to 32 KiB; one link without VFs is below 8 KiB.
_BUFFER_BYTES = 65536
_REQUEST_BYTES = 4096
_TIMEOUT_SECONDS = 10
_DUMP_ATTEMPTS = 10


class Link:
    """A network device as the kernel reported it.

    mac, permanent_mac  `aa:bb:cc:dd:ee:ff`, '' where the device has none
    kind                the kind of a virtual device (`veth`, `macvlan` …), '' for hardware
    parent              `bus/device` of the hardware below (`pci/0000:03:10.2`, Linux 5.14), '' where there is none
    master              interface number of the bridge or bond that it is in, 0 for none
    multi_queue         whether a tap takes more than one descriptor (Linux 4.16)
    received, sent      bytes, as this side of it counts them
    """

    __slots__ = (
        *("flags", "index", "kind", "mac", "master", "mtu", "multi_queue", "name", "parent", "permanent_mac"),
        *("received", "sent"),
    )

    def __init__(self, index: int, flags: int, attributes: dict[int, bytes]) -> None:
        self.index = index
        self.flags = flags
        self.name = _text(attributes.get(_IFLA_IFNAME, b""))
        self.mtu = _u32(attributes.get(_IFLA_MTU, bytes(4)))
        self.mac = attributes.get(_IFLA_ADDRESS, b"").hex(":")
        self.permanent_mac = attributes.get(_IFLA_PERM_ADDRESS, b"").hex(":")
        self.master = _u32(attributes.get(_IFLA_MASTER, bytes(4)))
        info = _attributes(attributes.get(_IFLA_LINKINFO, b""), 0)
        self.kind = _text(info.get(_IFLA_INFO_KIND, b""))
        self.multi_queue = False
        if self.kind == "tun":
            self.multi_queue = any(_attributes(info.get(_IFLA_INFO_DATA, b""), 0).get(_IFLA_TUN_MULTI_QUEUE, b""))
        counters = attributes.get(_IFLA_STATS64, b"")  # packets received and sent, bytes received and sent, …
        self.received, self.sent = unpack_from("QQ", counters, 16) if len(counters) >= 32 else (0, 0)
        bus = _text(attributes.get(_IFLA_PARENT_DEV_BUS_NAME, b""))
        device = _text(attributes.get(_IFLA_PARENT_DEV_NAME, b""))
        self.parent = f"{bus}/{device}" if device else ""

    @property
    def up(self) -> bool:
        """Whether it is set up (which says nothing about a cable)."""
        return bool(self.flags & IFF_UP)


class Netlink:
    """One NETLINK_ROUTE socket; a context manager."""

    __slots__ = ("_sequence", "_socket")

    def __init__(self, netns_fd: int = -1) -> None:
        """A socket in the caller's network namespace, or in that of the descriptor `netns_fd`."""
        self._socket = _open() if netns_fd < 0 else _in_namespace(netns_fd)
        self._sequence = 0
        for option, value in ((_NETLINK_EXT_ACK, 1), (_NETLINK_CAP_ACK, 1), (_NETLINK_GET_STRICT_CHK, 1)):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, value)
            except OSError as error:
                if error.errno != 92:  # ENOPROTOOPT: a kernel before 4.12, 4.3 or 4.20; each is only a refinement
                    self._socket.close()
                    raise
        # A lost reply must become an error, not a container that hangs in `creating`.
        self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, pack("ll", _TIMEOUT_SECONDS, 0))

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    # --- links ---

    def links(self) -> list[Link]:
        """Every link of the namespace, by index."""
        return [_link(reply) for reply in self._request(_RTM_GETLINK, _NLM_F_DUMP, _ifinfo(0))]

    def link(self, name: str) -> Link:
        """The link called `name`; OSError ENODEV when there is none."""
        return self._one(_ifinfo(0) + _attribute(_IFLA_IFNAME, interface_name(name)), name)

    def link_at(self, index: int) -> Link:
        """The link with interface number `index`; OSError ENODEV when there is none."""
        return self._one(_ifinfo(index), str(index))

    def find(self, name: str) -> Link | None:
        """The link called `name`, or None."""
        try:
            return self.link(name)
        except OSError as error:
            if error.errno == 19:
                return None
            raise

    def set_up(self, index: int) -> None:
        """Set a link up."""
        self._change(index, b"", flags=IFF_UP, change=IFF_UP)

    def set_down(self, index: int) -> None:
        """Set a link down; the kernel drops its IPv6 addresses."""
        self._change(index, b"", flags=0, change=IFF_UP)

    def set_name(self, index: int, name: str) -> None:
        """Rename a link, which must be down on kernels before 6.2."""
        self._change(index, _attribute(_IFLA_IFNAME, interface_name(name)))

    def set_mtu(self, index: int, mtu: int) -> None:
        """Set the MTU, in bytes."""
        if not 0 <= mtu < 1 << 31:
            raise HostError(f"{mtu} is not an MTU", 22)
        self._change(index, _attribute(_IFLA_MTU, pack("I", mtu)))

    def set_mac(self, index: int, mac: str) -> None:
        """Set the hardware address, `aa:bb:cc:dd:ee:ff`; many drivers want the link down."""
        try:
            raw = bytes.fromhex(mac.replace(":", ""))
        except ValueError:
            raw = b""
        if not 0 < len(raw) <= 32:  # MAX_ADDR_LEN
            raise HostError(f"{mac!r} is not a hardware address", 22)
        self._change(index, _attribute(_IFLA_ADDRESS, raw))

    def move(self, index: int, netns_fd: int, name: str) -> None:
        """Move a link to another network namespace and give it its new name there, in one message."""
        target = _attribute(_IFLA_NET_NS_FD, pack("i", netns_fd))
        self._change(index, target + _attribute(_IFLA_IFNAME, interface_name(name)))

    def set_master(self, index: int, master: int) -> None:
        """Put a link into the bridge with interface number `master`; 0 takes it out."""
        self._change(index, _attribute(_IFLA_MASTER, pack("I", master)))

    def add_macvtap(self, name: str, lower: int, mac: str, netns_fd: int) -> None:
        """Make a macvtap of mode bridge above the link `lower`, in the network namespace `netns_fd`."""
        data = _attribute(_IFLA_MACVLAN_MODE, pack("I", _MACVLAN_MODE_BRIDGE))
        info = _attribute(_IFLA_INFO_KIND, b"macvtap") + _attribute(_IFLA_INFO_DATA, data)
        body = _ifinfo(0) + _attribute(_IFLA_IFNAME, interface_name(name)) + _attribute(_IFLA_LINK, pack("I", lower))
        body += _attribute(_IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))) + _attribute(_IFLA_LINKINFO, info)
        body += _attribute(_IFLA_NET_NS_FD, pack("i", netns_fd))
        self._request(_RTM_NEWLINK, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL, body)

    # --- addresses ---

    def addresses(self, index: int) -> list[dict[str, str | int]]:
        """The permanent addresses of global scope of a link, IPv4 and IPv6.

        Each is {"address", "prefix", "flags", "priority"} and, where it has them, "peer" and "broadcast": all that
        `add_address` needs to make the same again.
        """
        found = []
        request = pack("BBBBi", 0, 0, 0, 0, index)
        for reply in self._request(_RTM_GETADDR, _NLM_F_DUMP, request):
            if len(reply) < 8:
                raise HostError("the kernel sent a truncated address message")
            family, prefix, short_flags, scope, at = unpack_from("BBBBi", reply)
            attributes = _attributes(reply, 8)
            flags = _u32(attributes[_IFA_FLAGS]) if _IFA_FLAGS in attributes else short_flags
            size = _ADDRESS_BYTES.get(family)
            # Kernels without strict checking dump every link's addresses.
            if at != index or size is None or not flags & IFA_F_PERMANENT or scope != _RT_SCOPE_UNIVERSE:
                continue
            address = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
            peer = attributes.get(_IFA_ADDRESS, address)
            broadcast = attributes.get(_IFA_BROADCAST, b"")
            if len(address) != size or len(peer) != size or len(broadcast) not in (0, size) or prefix > 8 * size:
                raise HostError(f"the kernel sent an address of impossible length on interface {index}")
            entry: dict[str, str | int] = {
                "address": _socket.inet_ntop(family, address),
                "prefix": prefix,
                "flags": flags,
                "priority": _u32(attributes.get(_IFA_RT_PRIORITY, bytes(4))),
            }
            if peer != address:
                entry["peer"] = _socket.inet_ntop(family, peer)
            if broadcast:
                entry["broadcast"] = _socket.inet_ntop(family, broadcast)
            found.append(entry)
        return found

    def add_address(
        self,
        index: int,
        address: str,
        prefix: int,
        peer: str = "",
        broadcast: str = "",
        flags: int = 0,
        priority: int = 0,
    ) -> None:
        """Add an IPv4 or IPv6 address; `flags` are IFA_F_*, `priority` the metric of its prefix route (0: default)."""
        family, raw = _parse_address(address)
        size = len(raw)
        if not 0 <= prefix <= 8 * size:
            raise HostError(f"/{prefix} is not a prefix length of {address}", 22)
        body = pack("BBBBi", family, prefix, flags & 0xFF, _RT_SCOPE_UNIVERSE, index)
        body += _attribute(_IFA_LOCAL, raw) + _attribute(_IFA_ADDRESS, _same_family(peer, family) if peer else raw)
        if broadcast:
            body += _attribute(_IFA_BROADCAST, _same_family(broadcast, family))
        body += _attribute(_IFA_FLAGS, pack("I", flags))
        if priority:
            body += _attribute(_IFA_RT_PRIORITY, pack("I", priority))
        self._request(_RTM_NEWADDR, _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL, body)

    # --- the protocol ---

    def _one(self, body: bytes, what: str) -> Link:
        replies = self._request(_RTM_GETLINK, 0, body)
        if len(replies) != 1:
            raise HostError(f"the kernel sent {len(replies)} links where {what} was asked for")
        return _link(replies[0])

    def _change(self, index: int, attributes: bytes, flags: int = 0, change: int = 0) -> None:
        if index <= 0:
            raise HostError(f"{index} is not an interface number", 22)
        self._request(_RTM_NEWLINK, _NLM_F_ACK, _ifinfo(index, flags, change) + attributes)

    def _request(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Send one message and collect the payloads of its replies."""
        if len(body) > _REQUEST_BYTES:
            raise HostError("a netlink request is too long", 90)
        for _ in range(_DUMP_ATTEMPTS):
            self._sequence += 1
            header = pack("IHHII", 16 + len(body), kind, _NLM_F_REQUEST | flags, self._sequence, 0)
            self._socket.send(header + body)
            replies = self._replies(bool(flags & _NLM_F_ACK), (flags & _NLM_F_DUMP) == _NLM_F_DUMP)
            if replies is not None:
                return replies
        raise HostError("the network devices change faster than the kernel can list them", 4)

    def _replies(self, acknowledged: bool, dump: bool) -> list[bytes] | None:
        """The payloads up to the end of the answer; None when a dump was interrupted by a change."""
        replies: list[bytes] = []
        interrupted = False
        while True:
            try:
                data, _, message_flags, sender = self._socket.recvmsg(_BUFFER_BYTES)
            except BlockingIOError as error:
                raise HostError("the kernel did not answer a netlink request", error.errno or 0) from error
            if message_flags & _socket.MSG_TRUNC:
                raise HostError("a netlink reply is longer than the buffer")
            if sender[0] != 0:  # only port 0 is the kernel; any local process may send to our port
                continue
            for kind, flags, sequence, payload in messages(data):
                if sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(flags & _NLM_F_DUMP_INTR)
                if kind == _NLMSG_ERROR:
                    _raise_for(flags, payload)
                    return replies
                if kind == _NLMSG_DONE:
                    if len(payload) >= 4 and unpack_from("i", payload)[0] < 0:
                        _raise(-unpack_from("i", payload)[0], "")
                    return None if interrupted else replies
                replies.append(payload)
            if replies and not acknowledged and not dump:
                return replies


def link_up(name: str) -> None:
    """Set the link `name` of the calling process's network namespace up, such as a new namespace's `lo`."""
    with Netlink() as netlink:
        netlink._request(
            _RTM_NEWLINK, _NLM_F_ACK, _ifinfo(0, IFF_UP, IFF_UP) + _attribute(_IFLA_IFNAME, interface_name(name))
        )


def interface_name(name: str) -> bytes:
    """`name` for a message, NUL-terminated; HostError for what the kernel's dev_valid_name refuses."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 0 < len(raw) < 16 or raw in (b".", b"..") or any(byte in b"/:\0 \t\n\v\f\r" for byte in raw):
        raise HostError(
            f"{name!r} is not a network device name", 22, hint="1 to 15 bytes, without spaces, slashes and colons"
        )
    return raw + b"\0"


def messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of each message in a datagram; HostError when the lengths do not add up."""
    found = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < 16:
            raise HostError("the kernel sent a truncated netlink header")
        length, kind, flags, sequence = unpack_from("IHHI", data, offset)
        if not 16 <= length <= len(data) - offset:
            raise HostError(f"the kernel sent a netlink message that claims {length} of {len(data) - offset} bytes")
        found.append((kind, flags, sequence, data[offset + 16 : offset + length]))
        offset += (length + 3) & ~3
    return found


def _attributes(data: bytes, offset: int) -> dict[int, bytes]:
    found = {}
    while offset < len(data):
        if len(data) - offset < 4:
            raise HostError("the kernel sent a truncated netlink attribute")
        length, kind = unpack_from("HH", data, offset)
        if not 4 <= length <= len(data) - offset:
            raise HostError(f"the kernel sent a netlink attribute that claims {length} of {len(data) - offset} bytes")
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _attribute(kind: int, value: bytes) -> bytes:
    if len(value) > 0xFFFF - 4:
        raise HostError(f"a netlink attribute of {len(value)} bytes does not fit", 90)
    return pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _raise_for(flags: int, payload: bytes) -> None:
    if len(payload) < 20:
        raise HostError("the kernel sent a truncated netlink error")
    number, original = unpack_from("iI", payload)
    if number == 0:
        return
    text = ""
    if flags & _NLM_F_ACK_TLVS:
        start = 20 if flags & _NLM_F_CAPPED else 4 + ((original + 3) & ~3)
        text = _text(_attributes(payload, start).get(_NLMSGERR_ATTR_MSG, b""))
    _raise(-number, text)


def _raise(number: int, text: str) -> None:
    meaning = posix.strerror(number)
    raise OSError(number, f"{meaning} ({text})" if text else meaning)


def _link(payload: bytes) -> Link:
    if len(payload) < 16:
        raise HostError("the kernel sent a truncated link message")
    _, _, index, flags, _ = unpack_from("BxHiII", payload)
    return Link(index, flags, _attributes(payload, 16))


def _ifinfo(index: int, flags: int = 0, change: int = 0) -> bytes:
    if not -(1 << 31) <= index < 1 << 31:
        raise HostError(f"{index} is not an interface number", 22)
    return pack("BxHiII", 0, 0, index, flags, change)


def _parse_address(address: str) -> tuple[int, bytes]:
    for family in (_AF_INET, _AF_INET6):
        try:
            return family, _socket.inet_pton(family, address)
        except (OSError, ValueError):
            continue
    raise HostError(f"{address!r} is not an IP address", 22)


def _same_family(address: str, family: int) -> bytes:
    found, raw = _parse_address(address)
    if found != family:
        raise HostError(f"{address} is of the other address family", 22)
    return raw


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _u32(value: bytes) -> int:
    if len(value) < 4:
        raise HostError("the kernel sent a truncated number")
    return int(unpack_from("I", value)[0])


def _open() -> _socket.socket:
    return _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0)


def _in_namespace(netns_fd: int) -> _socket.socket:
    """A socket made in another network namespace; only the calling thread is there, and only for that moment."""
    from ovt.kernel.syscalls import CLONE_NEWNET, setns

    home = posix.open("/proc/thread-self/ns/net", posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        setns(netns_fd, CLONE_NEWNET)
        try:
            return _open()
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        posix.close(home)
