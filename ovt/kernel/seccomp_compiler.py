"""From the rules of an OCI profile to BPF: checks every field, drives libseccomp, puts the ENOSYS part in front.

Opened by `seccomp.py` only when the cache has no answer; that module's docstring lists the semantics.
"""

from _struct import pack

from ovt.errors import ConfigError, HostError
from ovt.kernel import libseccomp
from ovt.kernel.seccomp import (
    ACTIONS,
    ARCHITECTURES,
    FLAG_NEW_LISTENER,
    FLAG_SPEC_ALLOW,
    FLAG_TSYNC,
    FLAG_TSYNC_ESRCH,
    FLAG_WAIT_KILLABLE_RECV,
    FLAGS,
    find_library,
    flag_supported,
)

_PATH = "$.linux.seccomp"
_EPERM = 1
_ENOSYS = 38
_MAX_ERRNO = 4095
_MAX_INSTRUCTIONS = 4096  # linux/bpf_common.h: BPF_MAXINSNS
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
# From this many rules on, a decision tree beats the chain of comparisons that libseccomp makes otherwise.
_TREE_FROM = 33

# struct sock_filter codes of linux/filter.h
_LD_ABS = 0x20
_JA = 0x05
_JEQ = 0x15
_JGT = 0x25
_JGE = 0x35
_RET = 0x06
_RET_ENOSYS = ACTIONS["SCMP_ACT_ERRNO"] | _ENOSYS
_X32_BIT = 0x40000000

Comparison = tuple[int, int, int, int]
Rule = tuple[str, int, list[Comparison]]


def build(profile: dict[str, object]) -> tuple[bytes, int, bool]:
    """(program, seccomp(2) flags, whether a listener is needed) of a profile; ConfigError or HostError."""
    default = _action(profile, "defaultAction", "defaultErrnoRet", _PATH)
    if default == ACTIONS["SCMP_ACT_NOTIFY"]:
        raise ConfigError(
            f"{_PATH}.defaultAction",
            "SCMP_ACT_NOTIFY cannot be the default action",
            hint="the container's init could not finish; list the system calls that the agent handles",
        )
    rules = _rules(profile)
    architectures = _architectures(profile)
    flags = _flags(profile)
    notify = any(action == ACTIONS["SCMP_ACT_NOTIFY"] for _, action, _ in rules)
    if notify:
        flags |= FLAG_NEW_LISTENER
        if flags & FLAG_TSYNC:  # the plain pair could not tell a thread id from a descriptor (Linux 5.7)
            flags |= FLAG_TSYNC_ESRCH
    else:
        flags &= ~FLAG_WAIT_KILLABLE_RECV  # the kernel refuses it without a listener

    try:
        library = libseccomp.Library(find_library()[0])
    except OSError as error:
        raise HostError(
            f"cannot open libseccomp: {error}", hint="install libseccomp2, or leave linux.seccomp out"
        ) from error
    library.api_level()  # makes the library ask the kernel which actions exist
    tokens = {library.native_arch(): "native"}
    for index, name in architectures:
        token = library.arch_token(name.removeprefix("SCMP_ARCH_").lower())
        if token:  # an architecture newer than the library is not this machine's: no filter entry, so it is killed
            tokens.setdefault(token, f"{_PATH}.architectures[{index}]")
    try:
        context = library.init(default)
    except OSError as error:
        raise HostError(f"cannot make a seccomp filter: {error.strerror}", error.errno or 0) from error
    try:
        program = _assemble(library, context, tokens, default, rules)
    finally:
        library.release(context)
    if profile["defaultAction"] not in _PERMISSIVE and default != _RET_ENOSYS:
        program = _enosys(library, list(tokens), {name for name, _, _ in rules}) + program
    if not 0 < len(program) <= 8 * _MAX_INSTRUCTIONS:
        raise ConfigError(
            f"{_PATH}.syscalls",
            f"give {len(program) // 8} BPF instructions, the kernel takes {_MAX_INSTRUCTIONS}",
            hint="use fewer rules with arguments, or fewer architectures",
        )
    return program, flags, notify


def _assemble(
    library: libseccomp.Library, context: int, tokens: dict[int, str], default: int, rules: list[Rule]
) -> bytes:
    for token, where in tokens.items():
        try:
            library.add_arch(context, token)
        except OSError as error:  # EDOM: other byte order
            raise ConfigError(where, f"does not go with this machine's architecture: {error.strerror}") from error
    added = 0
    for name, action, comparisons in rules:
        number = library.syscall_number(name) if action != default else None
        if number is None:
            continue
        arguments = [comparison[0] for comparison in comparisons]
        alternatives = [comparisons] if len(set(arguments)) == len(arguments) else [[one] for one in comparisons]
        for alternative in alternatives:
            try:
                library.add_rule(context, action, number, alternative)
            except OSError as error:
                raise ConfigError(
                    f"{_PATH}.syscalls", f"libseccomp refuses the rule for {name}: {error.strerror}"
                ) from error
            added += 1
    if added >= _TREE_FROM:
        library.set_attribute(context, libseccomp.FLTATR_CTL_OPTIMIZE, 2)
    return library.export(context)


def _enosys(library: libseccomp.Library, tokens: list[int], names: set[str]) -> bytes:
    """Instructions to run before the filter: numbers above the profile's highest, per architecture, give ENOSYS."""
    highest = {}
    for token in tokens:
        number = max((library.syscall_number_on(token, name) for name in names), default=-1)
        if number > 0:
            highest[token] = number
    x32 = highest.pop(libseccomp.ARCH_X32, None)
    blocks = []
    for token, limit in highest.items():
        checks = []
        if token == libseccomp.ARCH_X86_64:
            # x32 shares the architecture; its numbers have bit 30. Number -1 is a tracer's "skip this call".
            if x32 is not None:
                checks = [(_JGE, 0, 3, _X32_BIT), (_JEQ, 4, 0, 0xFFFFFFFF), (_JGT, 2, 0, x32), (_JA, 0, 0, 2)]
            else:
                checks = [(_JGE, 2, 0, _X32_BIT)]
        elif token in (libseccomp.ARCH_S390, libseccomp.ARCH_S390X):
            # Numbers the kernel does not know arrive as 0, once setup(2), which nothing calls any more.
            checks = [(_JEQ, 1, 0, 0)]
        checks += [(_JGT, 0, 1, limit), (_RET, 0, 0, _RET_ENOSYS)]
        blocks.append([(_JEQ, 0, len(checks) + 2, token), (_LD_ABS, 0, 0, 0), *checks, (_JA, 0, 0, 0)])
    if not blocks:
        return b""
    instructions = [(_LD_ABS, 0, 0, 4), *(instruction for block in blocks for instruction in block)]
    position = 1
    for block in blocks:
        position += len(block)
        instructions[position - 1] = (_JA, 0, 0, len(instructions) - position)
    return b"".join(pack("=HBBI", *instruction) for instruction in instructions)


def _action(holder: dict[str, object], name: str, errno_name: str, path: str) -> int:
    action = holder.get(name)
    if action is None:
        raise ConfigError(f"{path}.{name}", "is required")
    if not isinstance(action, str) or action not in ACTIONS:
        raise ConfigError(f"{path}.{name}", f"{action!r} is not a seccomp action")
    value = holder.get(errno_name)
    if action not in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        if value is not None:
            raise ConfigError(f"{path}.{errno_name}", f"does not go with {action}, which returns no errno")
        return ACTIONS[action]
    highest = _MAX_ERRNO if action == "SCMP_ACT_ERRNO" else 0xFFFF
    return ACTIONS[action] | (_EPERM if value is None else _unsigned(value, highest, f"{path}.{errno_name}"))


def _rules(profile: dict[str, object]) -> list[Rule]:
    rules: list[Rule] = []
    for path, entry in _objects(profile.get("syscalls"), f"{_PATH}.syscalls"):
        action = _action(entry, "action", "errnoRet", path)
        comparisons = [_comparison(*argument) for argument in _objects(entry.get("args"), f"{path}.args")]
        names = entry.get("names")
        if not isinstance(names, list) or not names:
            raise ConfigError(f"{path}.names", "must be a list with at least one system call name")
        for index, name in enumerate(names):
            if not isinstance(name, str) or not name or not name.isascii() or "\0" in name:
                raise ConfigError(f"{path}.names[{index}]", f"{name!r} is not a system call name")
            if name == "write" and action == ACTIONS["SCMP_ACT_NOTIFY"]:
                raise ConfigError(
                    f"{path}.names[{index}]",
                    "SCMP_ACT_NOTIFY cannot be used for the write system call",
                    hint="the container's init reports through write before the agent can answer",
                )
            rules.append((name, action, comparisons))
    return rules


def _comparison(path: str, argument: dict[str, object]) -> Comparison:
    operator = argument.get("op")
    if not isinstance(operator, str) or operator not in libseccomp.COMPARE:
        raise ConfigError(f"{path}.op", f"{operator!r} is not a comparison operator")
    return (
        _unsigned(argument.get("index"), 5, f"{path}.index"),
        libseccomp.COMPARE[operator],
        _unsigned(argument.get("value"), (1 << 64) - 1, f"{path}.value"),
        _unsigned(argument.get("valueTwo", 0), (1 << 64) - 1, f"{path}.valueTwo"),
    )


def _architectures(profile: dict[str, object]) -> list[tuple[int, str]]:
    names = _strings(profile.get("architectures"), f"{_PATH}.architectures")
    for index, name in enumerate(names):
        if name not in ARCHITECTURES:
            raise ConfigError(f"{_PATH}.architectures[{index}]", f"{name!r} is not an architecture")
    return list(enumerate(names))


def _flags(profile: dict[str, object]) -> int:
    if profile.get("flags") is None:
        return FLAG_SPEC_ALLOW
    bits = 0
    for index, name in enumerate(_strings(profile["flags"], f"{_PATH}.flags")):
        if name not in FLAGS:
            raise ConfigError(f"{_PATH}.flags[{index}]", f"{name!r} is not a seccomp flag")
        if not flag_supported(FLAGS[name]):
            raise HostError(f"this kernel has no {name}", hint=f"take it out of {_PATH}.flags")
        bits |= FLAGS[name]
    return bits


def _objects(value: object, path: str) -> list[tuple[str, dict[str, object]]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(path, "must be a list of objects")
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}[{index}]", "must be an object")
    return [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]


def _strings(value: object, path: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(path, "must be a list of strings")
    return value


def _unsigned(value: object, highest: int, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= highest:
        raise ConfigError(path, f"must be an integer from 0 to {highest}")
    return value
