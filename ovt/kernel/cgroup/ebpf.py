"""Device rules as a BPF program of type CGROUP_DEVICE: generated here, attached to a v2 cgroup, replaced in one step.

The kernel calls the program at every open and mknod below the cgroup and asks for all the access at once; the program
walks the rules from the last to the first, strikes out what a rule allows and stops at the first denial. Programs of
others (systemd attaches its own for DeviceAllow) stay where they are: all attached programs must agree.
Instruction encoding: linux/bpf.h and the kernel's Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import posix
from _ctypes import _SimpleCData
from _struct import pack, unpack_from
from errno import EINVAL, ENOENT, EPERM

from ovt.errors import HostError
from ovt.kernel.cgroup.devices import ANY, EVERYTHING, Rule
from ovt.kernel.cgroup.files import read_or
from ovt.kernel.syscalls import bpf

NAME = b"ovt_devices"

_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 5, 8, 9, 13, 15, 16
_TYPE_CGROUP_DEVICE = 15  # enum bpf_prog_type
_CGROUP_DEVICE = 6  # enum bpf_attach_type
_ALLOW_MULTI, _REPLACE = 2, 4
_KIND = {"b": 1, "c": 2}  # BPF_DEVCG_DEV_*

# Opcodes: class | source | operation
_LOAD_WORD, _MOVE, _MOVE_REGISTER, _AND, _SHIFT_RIGHT = 0x61, 0xB7, 0xBC, 0x54, 0x74
_JUMP_EQUAL, _JUMP_NOT_EQUAL, _EXIT = 0x15, 0x55, 0x95
# Registers: the result, the context, then the device asked for and the access not yet decided
_RESULT, _CONTEXT, _KIND_OF, _ACCESS, _MAJOR, _MINOR, _SCRATCH = range(7)


def _instruction(code: int, target: int, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return pack("<BBhi", code, source << 4 | target, offset, value)


def _answer(allow: bool) -> list[bytes]:
    return [_instruction(_MOVE, _RESULT, value=int(allow)), _instruction(_EXIT, 0)]


def program(rules: list[Rule]) -> bytes:
    """The instructions that decide as `rules` do: 1 allows, 0 denies with EPERM."""
    code = [
        _instruction(_LOAD_WORD, _KIND_OF, _CONTEXT, 0),  # struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor
        _instruction(_MOVE_REGISTER, _ACCESS, _KIND_OF),
        _instruction(_AND, _KIND_OF, value=0xFFFF),
        _instruction(_SHIFT_RIGHT, _ACCESS, value=16),
        _instruction(_LOAD_WORD, _MAJOR, _CONTEXT, 4),
        _instruction(_LOAD_WORD, _MINOR, _CONTEXT, 8),
    ]
    for rule in reversed(rules):
        code += _block(rule)
        if rule.universal:  # nothing before it counts, and the verifier refuses what cannot be reached
            return b"".join(code)
    return b"".join(code + _answer(False))


def _block(rule: Rule) -> list[bytes]:
    """One rule: its tests jump to the block's end, the next rule, when it does not apply."""
    tests = []
    if rule.kind != "a":
        tests.append((_KIND_OF, _KIND[rule.kind]))
    if rule.major != ANY:
        tests.append((_MAJOR, rule.major))
    if rule.minor != ANY:
        tests.append((_MINOR, rule.minor))
    body = _answer(rule.allow)
    if rule.access != EVERYTHING:
        if rule.allow:  # what this rule allows is settled; go on with the rest
            body = [
                _instruction(_AND, _ACCESS, value=EVERYTHING & ~rule.access),
                _instruction(_JUMP_NOT_EQUAL, _ACCESS, offset=2, value=0),
                *body,
            ]
        else:
            body = [
                _instruction(_MOVE_REGISTER, _SCRATCH, _ACCESS),
                _instruction(_AND, _SCRATCH, value=rule.access),
                _instruction(_JUMP_EQUAL, _SCRATCH, offset=2, value=0),
                *body,
            ]
    length = len(tests) + len(body)
    return [
        _instruction(_JUMP_NOT_EQUAL, register, offset=length - index - 1, value=value)
        for index, (register, value) in enumerate(tests)
    ] + body


class _Pointer(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "z"


def _address(buffer: bytes) -> int:
    """Where `buffer` lies; the caller keeps it alive for as long as the kernel uses the number."""
    return int.from_bytes(bytes(memoryview(_Pointer(buffer))), "little")


def load(code: bytes) -> int:
    """BPF_PROG_LOAD: a descriptor of the verified program. OSError, its filename the verifier's last words."""
    licence = b"Apache-2.0\0"

    def attempt(level: int, log: bytes) -> int:
        return bpf(
            _PROG_LOAD,
            pack(
                "IIQQIIQII16sII",
                _TYPE_CGROUP_DEVICE, len(code) // 8, _address(code), _address(licence),
                level, len(log), _address(log) if log else 0, 0, 0, NAME, 0, 0,
            ),
        )  # fmt: skip

    try:
        return attempt(0, b"")
    except OSError as error:
        if error.errno == EPERM:
            raise
    log = bytes(1 << 16)
    try:
        return attempt(1, log)
    except OSError as error:
        said = log.rstrip(b"\0").decode("utf-8", "replace").splitlines()
        error.filename = ([""] + [line for line in said if not line.startswith("processed ")])[-1]
        raise


def attached(cgroup: int) -> list[int]:
    """The ids of the device programs attached to exactly this cgroup (a directory descriptor)."""
    room = 64
    while True:
        ids = bytes(4 * room)
        attr = pack("IIIIQIIQQQQ", cgroup, _CGROUP_DEVICE, 0, 0, _address(ids), room, 0, 0, 0, 0, 0)
        try:
            bpf(_PROG_QUERY, attr)
        except OSError as error:
            if error.errno != 28:  # ENOSPC: more programs than room
                raise
            room *= 8
            continue
        return list(unpack_from(f"{unpack_from('I', attr, 24)[0]}I", ids))


def _ours(cgroup: int) -> list[int]:
    """Descriptors of the attached programs that bear our name."""
    found = []
    for number in attached(cgroup):
        try:
            fd = bpf(_PROG_GET_FD_BY_ID, pack("III", number, 0, 0))
        except OSError as error:
            if error.errno != ENOENT:  # detached and freed since
                raise
            continue
        info = bytes(128)  # struct bpf_prog_info, of which the name lies at 64
        bpf(_OBJ_GET_INFO_BY_FD, pack("IIQ", fd, len(info), _address(info)))
        if info[64:80].rstrip(b"\0") == NAME:
            found.append(fd)
        else:
            posix.close(fd)
    return found


def install(directory: str, code: bytes | None) -> None:
    """Make `code` the one program of ours on the cgroup, in place of what is there; None: no program of ours.

    The new program takes over in one step (BPF_F_REPLACE, Linux 5.6), or is attached before the old one goes: at no
    moment is there none, and none is left behind. A user without CAP_BPF on the host installs nothing: such a user
    cannot make device nodes either.
    """
    try:
        _install(directory, code)
    except OSError as error:
        if error.errno == EPERM and not _privileged():
            return
        said = f" ({error.filename})" if error.filename else ""
        raise HostError(
            f"cannot set linux.resources.devices: bpf on cgroup {directory}: {error.strerror}{said}",
            error.errno or 0,
            "the kernel needs CONFIG_CGROUP_BPF, the caller CAP_BPF and CAP_NET_ADMIN, or CAP_SYS_ADMIN",
        ) from error


def _privileged() -> bool:
    return posix.geteuid() == 0 and read_or("/proc/self/uid_map").split() == ["0", "0", "4294967295"]


def _install(directory: str, code: bytes | None) -> None:
    cgroup = posix.open(directory, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    descriptors = [cgroup]
    try:
        if code is not None:
            program_fd = load(code)
            descriptors.append(program_fd)
        old = _ours(cgroup)
        descriptors += old
        if code is not None:
            replaced = _attach(cgroup, program_fd, old[0] if len(old) == 1 else -1)
            old = old[1:] if replaced else old
        for fd in old:
            bpf(_PROG_DETACH, pack("IIII", cgroup, fd, _CGROUP_DEVICE, 0))
    finally:
        for fd in descriptors:
            posix.close(fd)


def _attach(cgroup: int, program_fd: int, old: int) -> bool:
    """Attach, in place of `old` where that is not -1; whether `old` is gone by that."""
    if old != -1:
        try:
            bpf(
                _PROG_ATTACH,
                pack("IIIII", cgroup, program_fd, _CGROUP_DEVICE, _ALLOW_MULTI | _REPLACE, old),
            )
            return True
        except OSError as error:
            if error.errno != EINVAL:  # before 5.6 the flag is unknown
                raise
    bpf(_PROG_ATTACH, pack("IIIII", cgroup, program_fd, _CGROUP_DEVICE, _ALLOW_MULTI, 0))
    return False
