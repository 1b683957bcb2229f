"""A tape: system calls written down now, to be made later by ovt-init (init.c) inside a container.

What it is: an assembler. Each method appends one call, its arguments and the words an error message begins with;
`encode` gives the bytes ovt-init plays. What it is not: it makes no call itself and knows no policy.
The numbers are those of the Linux system call tables of x86_64 and of the generic table (aarch64).
"""

import posix
from _struct import Struct, pack, pack_into
from errno import E2BIG

from ovt.kernel.syscalls import CLONE_INTO_CGROUP

MAGIC = 0x3154564F
IGNORE_ERROR = 1
PARENT_ENDS = 2
SKIP_IF_OK = 4
_REPORT = -1
_CHECK_BYTE = -2
_REPORT_TO = -3
_LONGEST = 16 << 20

TAPE_DONE = 0xFFFFFFFF
REPORTED = 0xFFFFFFFD
REPORT = Struct("=Iiq")

_OP = Struct("=iII8sI6Qq")
_MASK = 0xFFFFFFFFFFFFFFFF

# name: (x86_64, aarch64)
_NUMBERS = {
    "capset": (126, 91),
    "chdir": (80, 49),
    "chroot": (161, 51),
    "clone3": (435, 435),
    "close": (3, 57),
    "close_range": (436, 436),
    "dup3": (292, 24),
    "execve": (59, 221),
    "fchdir": (81, 50),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "getcwd": (79, 17),
    "ioctl": (16, 29),
    "keyctl": (250, 219),
    "openat": (257, 56),
    "personality": (135, 92),
    "poll": (271, 73),  # ppoll: aarch64 has no poll
    "prctl": (157, 167),
    "read": (0, 63),
    "rt_sigaction": (13, 134),
    "seccomp": (317, 277),
    "set_mempolicy": (238, 237),
    "setgroups": (116, 159),
    "setns": (308, 268),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "setsid": (112, 157),
    "socket": (41, 198),
    "umask": (95, 166),
    "unshare": (272, 97),
    "write": (1, 64),
}
_COLUMN = 0 if posix.uname().machine == "x86_64" else 1


class Pointer:
    """The address, at play time, of an offset in the tape's data."""

    __slots__ = ("offset",)

    def __init__(self, offset: int) -> None:
        self.offset = offset


class Result:
    """What an earlier operation returned, at play time."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Received:
    """The n-th descriptor that was sent along with the tape."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


Argument = int | Pointer | Result | Received


class Tape:
    """A list of operations with the data they point to."""

    def __init__(self) -> None:
        self.whats: list[str] = []
        self._ops: list[tuple[int, int, int, tuple[Argument, ...]]] = []
        self._data = bytearray()
        self._relocations: list[tuple[int, int]] = []

    # data

    def data(self, raw: bytes) -> Pointer:
        """Store `raw`, 8-byte aligned."""
        self._data += bytes(-len(self._data) % 8)
        offset = len(self._data)
        self._data += raw
        return Pointer(offset)

    def text(self, text: str | bytes) -> Pointer:
        """Store a NUL-terminated string (names and paths keep undecodable bytes)."""
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        return self.data(raw + b"\0")

    def vector(self, items: list[str]) -> Pointer:
        """Store a NULL-terminated array of strings, as execve takes it."""
        targets = [self.text(item).offset for item in items]
        at = self.data(bytes(8 * (len(items) + 1)))
        self._relocations += [(at.offset + 8 * i, target) for i, target in enumerate(targets)]
        return at

    def relocate(self, where: Pointer, displacement: int, target: Pointer) -> None:
        """Make the 64-bit word at `where`+`displacement` the address of `target` when the tape is loaded."""
        self._relocations.append((where.offset + displacement, target.offset))

    # operations

    def call(self, what: str, name: str, *args: Argument, flags: int = 0, other: int = 0) -> Result:
        """Append system call `name`; `what` begins the error message if it fails."""
        return self._add(what, _NUMBERS[name][_COLUMN], flags, other, args)

    def _add(self, what: str, number: int, flags: int, other: int, args: tuple[Argument, ...]) -> Result:
        self._ops.append((number, flags, other, args))
        self.whats.append(what)
        return Result(len(self._ops) - 1)

    def report(self, value: Argument = 0) -> None:
        """Tell the runtime that the tape has come this far, with a value such as a descriptor number."""
        self._add("report", _REPORT, 0, 0, (value,))

    def report_to(self, fd: int) -> None:
        """From here on, write failures to descriptor `fd`, a file, because the runtime will have gone."""
        self._add("report", _REPORT_TO, 0, 0, (fd,))

    def check_byte(self, what: str, at: Pointer, expected: int, errno: int) -> None:
        """Fail with `errno` unless the byte at `at` is `expected`."""
        self._add(what, _CHECK_BYTE, 0, 0, (at, expected, errno))

    def clone(self, what: str, flags: int, cgroup_fd: int = -1) -> None:
        """clone3(2): the parent reports the child's pid (in its own pid namespace) and ends; the child plays on.

        With `cgroup_fd` (a cgroup2 directory) the child is born there: no migration, no wait for a grace period.
        """
        flags |= CLONE_INTO_CGROUP if cgroup_fd >= 0 else 0
        raw = pack("=11Q", flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, max(cgroup_fd, 0))
        self.call(what, "clone3", self.data(raw), len(raw), flags=PARENT_ENDS)

    def execve(self, what: str, path: str, args: list[str], env: list[str]) -> None:
        """execve(2): nothing after it is played."""
        self.call(what, "execve", self.text(path), self.vector(args), self.vector(env))

    def encode(self) -> bytes:
        """The tape as ovt-init reads it; OSError (E2BIG) beyond the 16 MiB that it takes."""
        if len(self._data) > _LONGEST:
            raise OSError(E2BIG, posix.strerror(E2BIG), "arguments and environment")
        out = bytearray(pack("=4I", MAGIC, len(self._ops), len(self._relocations), len(self._data)))
        for number, flags, other, args in self._ops:
            kinds = bytearray(8)
            values = [0] * 6
            for i, arg in enumerate(args):
                if isinstance(arg, int):
                    values[i] = arg & _MASK
                elif isinstance(arg, Pointer):
                    kinds[i], values[i] = 1, arg.offset
                elif isinstance(arg, Result):
                    kinds[i], values[i] = 2, arg.index
                else:
                    kinds[i], values[i] = 3, arg.number
            out += _OP.pack(number, flags, other, bytes(kinds), 0, *values, 0)
        at = len(out)
        out += bytes(8 * len(self._relocations))
        for i, (where, target) in enumerate(self._relocations):
            pack_into("=II", out, at + 8 * i, where, target)
        return bytes(out + self._data)
