"""Linux capabilities: names, numbers and masks. Nothing here changes a process; the init's tape does that.

A name that this table or this kernel does not know is left out of the mask, as runc does: engines send the list
they were built with, and a newer engine on an older kernel must still get its containers. What has no `CAP_`
prefix is a mistake in the configuration, not a newer kernel, and is refused.
"""

import posix

from ovt.errors import ConfigError

# linux/capability.h, in the order of their numbers
NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
NUMBERS = {name: number for number, name in enumerate(NAMES)}


def last_cap(root: str = "/") -> int:
    """The highest capability number of the running kernel (/proc/sys/kernel/cap_last_cap)."""
    try:
        fd = posix.open(root.rstrip("/") + "/proc/sys/kernel/cap_last_cap", posix.O_RDONLY | posix.O_CLOEXEC)
    except FileNotFoundError:  # no procfs here, or a kernel without the file (before 3.2)
        return len(NAMES) - 1
    try:
        return int(posix.read(fd, 16))
    finally:
        posix.close(fd)


def mask(names: object, path: str = "$.process.capabilities", last: int | None = None) -> int:
    """The bit mask of `names`, a list from a configuration; None counts as an empty list.

    `last` is the kernel's highest capability (`last_cap()` when not given); names above it and names that are
    not in the table are left out. Raises ConfigError, naming `path`, for anything but a list of CAP_* strings.
    """
    if names is None:
        return 0
    if not isinstance(names, list):
        raise ConfigError(path, f"must be a list of capability names, not {type(names).__name__}")
    bits = 0
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.upper().startswith("CAP_"):
            raise ConfigError(
                f"{path}[{index}]",
                f"{name!r} is not a capability name",
                hint="names are written like CAP_NET_BIND_SERVICE, see capabilities(7)",
            )
        number = NUMBERS.get(name.upper())
        if number is not None:
            bits |= 1 << number
    return bits & ((1 << ((last_cap() if last is None else last) + 1)) - 1)


def unknown(names: list[str], last: int | None = None) -> list[str]:
    """The members of `names` that `mask` leaves out, for a caller that wants to warn about them."""
    highest = last_cap() if last is None else last
    return [name for name in names if NUMBERS.get(name.upper(), highest + 1) > highest]


def names_of(bits: int) -> list[str]:
    """The names of the capabilities in `bits`, by number."""
    return [name for number, name in enumerate(NAMES) if bits >> number & 1]


def supported(root: str = "/") -> list[str]:
    """The names this kernel knows, as the `features` command lists them."""
    return list(NAMES[: last_cap(root) + 1])
