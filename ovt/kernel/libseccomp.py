"""libseccomp.so.2 through `_ctypes`: the dozen functions that turn rules into a BPF program, each one thin.

No policy: names, profiles and caching are in `seccomp.py`, which opens this module only for a profile it has not
compiled before. What libseccomp reports as a negative errno is raised as OSError.
"""

import posix
from _ctypes import CFuncPtr, _SimpleCData, dlopen, dlsym
from _struct import pack

# seccomp.h: enum scmp_filter_attr
FLTATR_CTL_OPTIMIZE = 8

# seccomp.h: enum scmp_compare
COMPARE = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}

ARCH_X86_64 = 0xC000003E
ARCH_X32 = 0x4000003E
ARCH_S390 = 0x16
ARCH_S390X = 0x80000016

_EEXIST = 17


class _UInt(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "I"


class _Int(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Pointer(_SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _ReturnsInt(CFuncPtr):
    _flags_ = 1  # FUNCFLAG_CDECL
    _restype_ = _Int


class _ReturnsUInt(CFuncPtr):
    _flags_ = 1
    _restype_ = _UInt


class _ReturnsPointer(CFuncPtr):
    _flags_ = 1
    _restype_ = _Pointer


class Library:
    """The open library. OSError from the constructor means it is not installed."""

    def __init__(self, path: str) -> None:
        handle = dlopen(path, 2)

        def function(kind: type[CFuncPtr], name: str) -> CFuncPtr:
            return kind(dlsym(handle, name))

        self._version = function(_ReturnsPointer, "seccomp_version")
        self._init = function(_ReturnsPointer, "seccomp_init")
        self._release = function(_ReturnsInt, "seccomp_release")
        self._attr_set = function(_ReturnsInt, "seccomp_attr_set")
        self._arch_add = function(_ReturnsInt, "seccomp_arch_add")
        self._arch_native = function(_ReturnsUInt, "seccomp_arch_native")
        self._arch_resolve = function(_ReturnsUInt, "seccomp_arch_resolve_name")
        self._resolve = function(_ReturnsInt, "seccomp_syscall_resolve_name")
        self._resolve_arch = function(_ReturnsInt, "seccomp_syscall_resolve_name_arch")
        self._rule_add = function(_ReturnsInt, "seccomp_rule_add_array")
        self._export = function(_ReturnsInt, "seccomp_export_bpf")
        self._api_get = function(_ReturnsUInt, "seccomp_api_get")

    def version(self) -> tuple[int, int, int]:
        """(major, minor, micro) of the library that is loaded."""
        from ctypes import c_uint  # the one place that reads memory; only `features` and errors ask

        pointer = self._version()
        fields = [c_uint.from_address(pointer + 4 * index).value for index in range(3)]
        return fields[0], fields[1], fields[2]

    def api_level(self) -> int:
        """What the library found this kernel able to do, see seccomp_api_get(3)."""
        return int(self._api_get())

    def init(self, default_action: int) -> int:
        """A new filter context for the native architecture."""
        context = int(self._init(_UInt(default_action)))
        if not context:
            raise OSError(22, f"libseccomp does not accept the default action {default_action:#x} on this kernel")
        return context

    def release(self, context: int) -> None:
        """Free the context."""
        self._release(_Pointer(context))

    def set_attribute(self, context: int, attribute: int, value: int) -> None:
        """seccomp_attr_set(3)."""
        _check(self._attr_set(_Pointer(context), _Int(attribute), _UInt(value)))

    def native_arch(self) -> int:
        """The token of this machine's architecture."""
        return int(self._arch_native())

    def arch_token(self, name: str) -> int:
        """The token of a libseccomp architecture name such as `x86_64`; 0 when this library does not know it."""
        return int(self._arch_resolve(name.encode()))

    def add_arch(self, context: int, token: int) -> None:
        """seccomp_arch_add(3); an architecture that is there already is fine."""
        result = int(self._arch_add(_Pointer(context), _UInt(token)))
        if result != -_EEXIST:
            _check(result)

    def syscall_number(self, name: str) -> int | None:
        """The number (for other architectures' calls a negative pseudo number), None when unknown to the library."""
        number = int(self._resolve(name.encode()))
        return None if number == -1 else number

    def syscall_number_on(self, token: int, name: str) -> int:
        """The number of `name` on one architecture; negative when it has no such call."""
        return int(self._resolve_arch(_UInt(token), name.encode()))

    def add_rule(
        self, context: int, action: int, number: int, comparisons: list[tuple[int, int, int, int]] | None = None
    ) -> None:
        """Add one rule; `comparisons` are (argument, operator, datum a, datum b), all of which must hold."""
        packed = b"".join(pack("IIQQ", *comparison) for comparison in comparisons or [])
        count = len(comparisons or [])
        _check(self._rule_add(_Pointer(context), _UInt(action), _Int(number), _UInt(count), packed))

    def export(self, context: int) -> bytes:
        """The program as an array of struct sock_filter, in the machine's byte order."""
        fd = posix.memfd_create("seccomp", posix.MFD_CLOEXEC)
        try:
            _check(self._export(_Pointer(context), _Int(fd)))
            size = posix.fstat(fd).st_size
            program = posix.pread(fd, size, 0)
        finally:
            posix.close(fd)
        return program


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, posix.strerror(-result))
