"""Which kernel parameters a container may have set for it, and the one file below /proc/sys that a name means.

/proc/sys is only partly namespaced: a parameter is allowed only when the namespace that holds it is the container's
and not the runtime's own, because everything else would change the host (CVE-2022-0811). Writes nothing.
"""

import posix

from ovt.engine.container.schema import Fault, member

_IPC = (
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
)
_NAMESPACE_FILES = {"network": "net", "ipc": "ipc", "uts": "uts", "user": "user"}
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


def file_of(name: str) -> str:
    """The path below /proc/sys of a parameter, `net/ipv4/conf/eth0.100/rp_filter`, from either spelling of sysctl(8).

    The first separator decides which one separates: `net.ipv4.conf.eth0/100.rp_filter` and
    `net/ipv4/conf/eth0.100/rp_filter` are the same file. Raises Fault for a name that is not one plain path.
    """
    swap = {".": "/", "/": "."}
    separators = [letter for letter in name if letter in swap]
    path = "".join(swap.get(letter, letter) for letter in name) if separators[:1] == ["."] else name
    for part in path.split("/"):
        if part in ("", ".", "..") or not _LETTERS.issuperset(part):
            raise Fault("is not a kernel parameter's name", member(name))
    return path


def check(values: dict[str, str], namespaces: dict[str, str], domainname: str) -> None:
    """Raises Fault for a parameter that is the host's, or that two entries set.

    `namespaces` maps each type in the configuration to the path of the one to join, or to "" for a new one.
    """
    seen: dict[str, str] = {}
    for name, value in values.items():
        path = file_of(name)
        if path in seen:
            raise Fault(f"sets the same kernel parameter as {seen[path]}", member(name))
        seen[path] = name
        kind = _namespace_of(path)
        if not kind:
            raise Fault(f'sysctl "{name}" is not in a separate kernel namespace', member(name))
        if path == "kernel/hostname":
            raise Fault(f'sysctl "{name}" conflicts with the field hostname', member(name))
        if path == "kernel/domainname" and domainname and value != domainname:
            raise Fault(f'sysctl "{name}" conflicts with the field domainname', member(name))
        if kind not in namespaces or _is_own(kind, namespaces[kind]):
            raise Fault(f'sysctl "{name}" is not allowed in the host\'s {kind} namespace', member(name))


def _namespace_of(path: str) -> str:
    if path in _IPC or path.startswith("fs/mqueue/"):
        return "ipc"
    if path.startswith("net/"):
        return "network"
    if path in ("kernel/domainname", "kernel/hostname"):
        return "uts"
    return "user" if path.startswith("user/") else ""


def _is_own(kind: str, path: str) -> bool:
    if not path:
        return False
    try:
        theirs = posix.stat(path)
    except OSError:
        return False  # joining it will fail with a better message
    ours = posix.stat(f"/proc/self/ns/{_NAMESPACE_FILES[kind]}")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
