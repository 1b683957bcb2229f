"""`linux.seccomp` of an OCI configuration, turned into the BPF program and flags that seccomp(2) takes.

It does not load a filter: the container's init does, as its last act before the payload. Compiled programs are
kept in a directory (`seccomp_cache.py`), because a default profile has 400 rules on three architectures and
costs tens of milliseconds, and nearly every container of a host uses the same one.

Semantics follow the runtime specification (config-linux.md, Seccomp) and, where that is silent, the practice
that engines' default profiles count on:
- a system call name that libseccomp does not know is skipped;
- a rule whose action is the default action says nothing and is skipped;
- two comparisons of one argument are alternatives: each becomes a rule of its own;
- without `flags` at all, SECCOMP_FILTER_FLAG_SPEC_ALLOW is set; an empty list sets none;
- system calls newer than the profile (a number above its highest) give ENOSYS, not the profile's EPERM or death:
  C libraries try the new call and fall back only on ENOSYS. Permissive defaults are left as they are;
- NOTIFY is refused for `write` and as default action: the init still has to write before it becomes the payload.
"""

import posix

from ovt.errors import ConfigError, HostError

ACTIONS = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_NOTIFY": 0x7FC00000,
}
OPERATORS = (
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
)
ARCHITECTURES = (
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
)
# linux/seccomp.h
FLAG_TSYNC = 1 << 0
FLAG_LOG = 1 << 1
FLAG_SPEC_ALLOW = 1 << 2
FLAG_NEW_LISTENER = 1 << 3
FLAG_TSYNC_ESRCH = 1 << 4
FLAG_WAIT_KILLABLE_RECV = 1 << 5
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": FLAG_TSYNC,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": FLAG_SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_LOG": FLAG_LOG,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": FLAG_WAIT_KILLABLE_RECV,
}

_PATH = "$.linux.seccomp"


class Program:
    """A compiled filter and all that is needed to load it.

    bpf                array of struct sock_filter, 8 bytes each, 1 to 4096 of them
    flags              SECCOMP_FILTER_FLAG_* bits for seccomp(2); has NEW_LISTENER exactly when `notify`
    notify             some rule asks a listener: seccomp(2) returns its descriptor, to be sent to `listener_path`
    listener_path      unix stream socket of the agent, None when the configuration has none
    listener_metadata  opaque text for the agent, None when the configuration has none
    cached             the program came from the cache
    """

    __slots__ = ("bpf", "cached", "flags", "listener_metadata", "listener_path", "notify")

    def __init__(
        self, bpf: bytes, flags: int, notify: bool, profile: dict[str, object], receiver: str, cached: bool
    ) -> None:
        self.bpf = bpf
        self.flags = flags
        self.notify = notify
        self.listener_path = _optional_string(profile, "listenerPath") or receiver or None
        self.listener_metadata = _optional_string(profile, "listenerMetadata")
        self.cached = cached
        if self.listener_metadata is not None and self.listener_path is None:
            raise ConfigError(f"{_PATH}.listenerMetadata", "is set without listenerPath")
        if notify and self.listener_path is None:
            raise ConfigError(
                f"{_PATH}.listenerPath",
                "is not set, but a rule uses SCMP_ACT_NOTIFY",
                hint="name the unix socket of the agent that answers the notifications",
            )


def compile(profile: object, *, cache_dir: str | None = None, receiver: str = "") -> Program:
    """Compile `profile` (the object at `$.linux.seccomp`), or take it from the cache below `cache_dir`.

    `receiver` is the agent's socket for a profile without listenerPath (annotation run.oci.seccomp.receiver).
    Raises ConfigError with the JSON path of the first fault, and HostError when libseccomp is missing or refuses.
    A cache that cannot be read or written only costs time.
    """
    if not isinstance(profile, dict):
        raise ConfigError(_PATH, f"must be an object, not {_kind(profile)}")
    key = b""
    if cache_dir is not None:
        from ovt.kernel import seccomp_cache

        path, identity = find_library()
        if identity:  # without one, an upgrade of the library would go unseen
            key = seccomp_cache.key(profile, (path, *identity))
            entry = seccomp_cache.load(cache_dir, key)
            if entry is not None:
                return Program(*entry, profile, receiver, cached=True)
    from ovt.kernel import seccomp_compiler

    bpf, flags, notify = seccomp_compiler.build(profile)
    program = Program(bpf, flags, notify, profile, receiver, cached=False)
    if cache_dir is not None and key:
        seccomp_cache.store(cache_dir, key, (bpf, flags, notify))
    return program


def find_library() -> tuple[str, tuple[int, ...]]:
    """The path of libseccomp and its identity (device, inode, size, mtime in ns), which keys the cache.

    Where no distribution puts it, the path is the bare soname, for the dynamic loader to find, and there is no
    identity. The library is opened by this very path, so that identity and code cannot be of two files.
    """
    machine = posix.uname().machine
    for directory in (f"/usr/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib", f"/lib/{machine}-linux-gnu", "/lib"):
        path = f"{directory}/libseccomp.so.2"
        try:
            found = posix.stat(path)
        except OSError:
            continue
        return path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return "libseccomp.so.2", ()


def supported_flags() -> list[str]:
    """The names of FLAGS that the running kernel takes, for `features`."""
    return [name for name, bit in FLAGS.items() if flag_supported(bit)]


def flag_supported(bit: int) -> bool:
    """Whether seccomp(2) knows this flag: with a null program it answers EFAULT if so, EINVAL if not."""
    from ovt.kernel.syscalls import syscall

    if bit == FLAG_WAIT_KILLABLE_RECV:
        bit |= FLAG_NEW_LISTENER  # the kernel takes the one only with the other
    try:
        syscall(317 if posix.uname().machine == "x86_64" else 277, 1, bit, None)
    except OSError as error:
        return error.errno == 14
    raise HostError("seccomp(2) loaded a null program")


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _optional_string(profile: dict[str, object], name: str) -> str | None:
    value = profile.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or "\0" in value:
        raise ConfigError(f"{_PATH}.{name}", "must be a string without NUL bytes")
    return value
