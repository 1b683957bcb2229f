"""Who a machine is: all that must differ between a machine and its copies.

Made anew for each new machine, clone and fork: UUID, generation (vmgenid's GUID, at whose change Linux and Windows
reseed their random numbers), vsock CID, the addresses of its network cards, cloud-init's instance-id, and inside the
guest the host name, /etc/machine-id, random state and clock. The SMBIOS UUID that a fork's guest has read at its boot
stays what it was until it boots again; the generation changes at once.

The functions are pure but for the random bytes, whose source can be given.
"""

from __future__ import annotations

import base64
import os
import time
import uuid
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

from ovt.engine.vm.hardware import Hardware
from ovt.errors import HostError
from ovt.model import Seed

Random = Callable[[int], bytes]
_T = TypeVar("_T")

_FIRST_CID, _LAST_CID = 3, 0xFFFFFFFE  # 0 to 2 and the highest have meanings (linux/vm_sockets.h)
_TRIES = 64
_ENTROPY = 64  # bytes; the kernel's pool takes in 32


class Identity(NamedTuple):
    """One machine's. `cid` 0: it has no vsock."""

    uuid: str
    generation: str
    cid: int
    macs: tuple[str, ...] = ()  # one for each card, in the order of Hardware.nics

    def kept(self) -> dict[str, Any]:
        """What hardware.freeze takes and Instance.rootfs keeps."""
        return {"uuid": self.uuid, "generation": self.generation, "cid": self.cid}


def fresh(
    cards: int = 0,
    *,
    vsock: bool = True,
    cids: Collection[int] = (),
    macs: Collection[str] = (),
    random: Random = os.urandom,
) -> Identity:
    """A new identity, with none of the `cids` and `macs` that are taken on this host."""
    chosen: list[str] = []
    for _ in range(cards):
        chosen.append(_unused(lambda: new_mac(random), {*(mac.lower() for mac in macs), *chosen}, "network address"))
    cid = _unused(lambda: _cid(random), cids, "vsock address") if vsock else 0
    return Identity(_guid(random), _guid(random), cid, tuple(chosen))


def renew(hardware: Hardware, identity: Identity) -> Hardware:
    """The same hardware as another machine's; `identity` has an address for each of its cards."""
    copy = hardware.copy()
    copy.uuid = identity.uuid
    copy.generation = identity.generation
    copy.cid = identity.cid if hardware.cid else 0
    copy.nics = [{**nic, "mac": mac} for nic, mac in zip(hardware.nics, identity.macs, strict=True)]
    return copy


def rewound(hardware: Hardware, random: Random = os.urandom) -> Hardware:
    """The same machine taken back to an earlier moment: only its generation is new, so that its guest reseeds."""
    copy = hardware.copy()
    copy.generation = _guid(random)
    return copy


def reseeded(seed: Seed, id: str) -> Seed:
    """A clone's seed: cloud-init takes it for a new machine and does its work once more."""
    return seed._replace(instance_id=f"ovt-{id}")


def guest_arguments(hostname: str, macs: Collection[str] = (), random: Random = os.urandom) -> dict[str, Any]:
    """The arguments of the built-in guest agent's `ovt-identity`, to be sent after `cont`.

    The first card's address goes along although it has that already: the agent then asks for an IP address on it.
    """
    found: dict[str, Any] = {
        "hostname": hostname,
        "machine-id": machine_id(random),
        "entropy": base64.b64encode(random(_ENTROPY)).decode(),
        "time": time.time_ns(),
    }
    for mac in list(macs)[:1]:
        found["mac"] = mac
    return found


# The same with what every Linux guest has, for `guest-exec` of qemu-guest-agent: /bin/sh -c GUEST_SCRIPT, with the
# environment of guest_environment. Values come by the environment, so no quoting can go wrong.
GUEST_SCRIPT = """set -eu
printf %s "$OVT_ENTROPY" > /dev/urandom
printf '%s\\n' "$OVT_HOSTNAME" > /etc/hostname
if command -v hostname >/dev/null; then hostname "$OVT_HOSTNAME"; else hostnamectl set-hostname "$OVT_HOSTNAME"; fi
[ ! -e /etc/machine-id ] || printf '%s\\n' "$OVT_MACHINE_ID" > /etc/machine-id
rm -f /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub
[ ! -d /etc/ssh ] || ! command -v ssh-keygen >/dev/null || ssh-keygen -A >/dev/null 2>&1
"""


def guest_environment(hostname: str, random: Random = os.urandom) -> list[str]:
    """KEY=VALUE for GUEST_SCRIPT."""
    entropy = base64.b64encode(random(_ENTROPY)).decode()
    return [f"OVT_HOSTNAME={hostname}", f"OVT_MACHINE_ID={machine_id(random)}", f"OVT_ENTROPY={entropy}"]


def new_mac(random: Random = os.urandom) -> str:
    """An address of the range that virtual cards use, 52:54:00 (locally administered, of one card)."""
    return ":".join(["52:54:00", *(f"{byte:02x}" for byte in random(3))])


def machine_id(random: Random = os.urandom) -> str:
    """A new machine-id(5): a UUID of version 4 without hyphens."""
    return uuid.UUID(bytes=random(16), version=4).hex


def _guid(random: Random) -> str:
    return str(uuid.UUID(bytes=random(16), version=4))


def _cid(random: Random) -> int:
    return _FIRST_CID + int.from_bytes(random(4), "little") % (_LAST_CID - _FIRST_CID + 1)


def _unused(make: Callable[[], _T], taken: Collection[_T], what: str) -> _T:
    for _ in range(_TRIES):
        if (found := make()) not in taken:
            return found
    raise HostError(f"no free {what} was found in {_TRIES} tries")
