"""Profiles compiled by ovt.kernel.seccomp, run by a reference interpreter and loaded into real processes."""

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovt.errors import ConfigError, HostError
from ovt.kernel import seccomp

X86_64 = 0xC000003E
I386 = 0x40000003
ALLOW = 0x7FFF0000
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers below are x86-64's")
NR = {"read": 0, "write": 1, "getpid": 39, "getppid": 110, "chmod": 90, "getcwd": 79, "personality": 135}

libc = ctypes.CDLL(None, use_errno=True)


def profile(default: str = "SCMP_ACT_ALLOW", *rules: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"defaultAction": default, "syscalls": list(rules), **rest}


def rule(names: str | list[str], action: str, *args: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"names": [names] if isinstance(names, str) else names, "action": action, "args": list(args), **rest}


def arg(index: int, op: str, value: int, two: int = 0) -> dict[str, Any]:
    return {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": two}


def run_bpf(program: bytes, number: int, arch: int, args: tuple[int, ...] = ()) -> int:
    """What `program` returns for a struct seccomp_data, for filters of any architecture."""
    data = struct.pack("<iIQ6Q", number if number < 1 << 31 else number - (1 << 32), arch, 0, *(*args, *[0] * 6)[:6])
    code: list[tuple[int, int, int, int]] = [
        struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)
    ]
    accumulator, position = 0, 0
    scratch = [0] * 16
    while True:
        op, jump_true, jump_false, k = code[position]
        position += 1
        if op == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif op == 0x06:
            return k
        elif op == 0x05:
            position += k
        elif op in (0x15, 0x25, 0x35, 0x45):
            taken = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[op]
            position += jump_true if taken else jump_false
        elif op == 0x54:
            accumulator &= k
        elif op == 0x02:
            scratch[k] = accumulator
        elif op == 0x60:
            accumulator = scratch[k]
        else:
            raise ValueError(f"instruction {op:#x}")


def load(program: seccomp.Program) -> int:
    """seccomp(2) with the program, in the calling process."""
    code = ctypes.create_string_buffer(program.bpf, len(program.bpf))
    fprog = struct.pack("HxxxxxxQ", len(program.bpf) // 8, ctypes.addressof(code))
    libc.prctl(38, 1, 0, 0, 0)
    return int(libc.syscall(317, 1, program.flags, fprog))


def in_child(program: seccomp.Program, action: Callable[[], int]) -> int:
    """The wait status of a child that loads the filter and then exits with what `action` returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            if load(program) >= 0:
                status = action()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def raw_errno(number: int, *args: int) -> int:
    ctypes.set_errno(0)
    libc.syscall(number, *args)
    return ctypes.get_errno()


# --- every action, seen to happen ---


@pytest.mark.parametrize(
    ("action", "extra", "expected"),
    [
        ("SCMP_ACT_ERRNO", {}, errno.EPERM),
        ("SCMP_ACT_ERRNO", {"errnoRet": errno.ENOTNAM}, errno.ENOTNAM),
        ("SCMP_ACT_ERRNO", {"errnoRet": 0}, 0),
        ("SCMP_ACT_TRACE", {}, errno.ENOSYS),  # what the kernel answers when nobody traces
        ("SCMP_ACT_LOG", {}, 0),
    ],
)
def test_actions_that_let_the_caller_live(action: str, extra: dict[str, int], expected: int) -> None:
    program = seccomp.compile(profile("SCMP_ACT_ALLOW", rule("getppid", action, **extra)))
    status = in_child(program, lambda: raw_errno(NR["getppid"]))
    assert os.waitstatus_to_exitcode(status) == expected


@pytest.mark.parametrize("action", ["SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"])
def test_actions_that_end_in_sigsys(action: str) -> None:
    program = seccomp.compile(profile("SCMP_ACT_ALLOW", rule("getppid", action)))
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(NR["getppid"]))) == -signal.SIGSYS


def test_allow_under_a_default_of_errno() -> None:
    names = ["write", "exit_group", "exit", "getpid"]
    program = seccomp.compile(profile("SCMP_ACT_ERRNO", rule(names, "SCMP_ACT_ALLOW"), defaultErrnoRet=errno.EXDEV))
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(NR["getpid"]))) == 0
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(NR["getppid"]))) == errno.EXDEV


def test_notify_opens_a_listener_that_answers() -> None:
    program = seccomp.compile(
        profile("SCMP_ACT_ALLOW", rule("getppid", "SCMP_ACT_NOTIFY"), listenerPath="/run/agent", listenerMetadata="M")
    )
    assert program.notify and program.flags & seccomp.FLAG_NEW_LISTENER
    assert (program.listener_path, program.listener_metadata) == ("/run/agent", "M")
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        listener = load(program)
        socket.send_fds(theirs, [b"x"], [listener])
        os._exit(42 if libc.syscall(NR["getppid"]) == 777 else 1)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    notification = ctypes.create_string_buffer(80)
    assert libc.ioctl(fds[0], ctypes.c_ulong(0xC0502100), notification) == 0
    request_id, request_pid, _, number = struct.unpack_from("QIIi", notification)
    assert (request_pid, number) == (pid, NR["getppid"])
    reply = ctypes.create_string_buffer(struct.pack("QqiI", request_id, 777, 0, 0), 24)
    assert libc.ioctl(fds[0], ctypes.c_ulong(0xC0182101), reply) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    os.close(fds[0])
    ours.close()
    theirs.close()


def test_a_receiver_stands_in_for_a_listener_path() -> None:
    body = rule("getppid", "SCMP_ACT_NOTIFY")
    assert seccomp.compile(profile("SCMP_ACT_ALLOW", body), receiver="/r").listener_path == "/r"
    named = seccomp.compile(profile("SCMP_ACT_ALLOW", body, listenerPath="/l"), receiver="/r")
    assert named.listener_path == "/l"


def test_tsync_with_a_listener_loads() -> None:
    program = seccomp.compile(
        profile(
            "SCMP_ACT_ALLOW",
            rule("getppid", "SCMP_ACT_NOTIFY"),
            listenerPath="/x",
            flags=["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        )
    )
    assert program.flags & seccomp.FLAG_TSYNC_ESRCH
    assert os.waitstatus_to_exitcode(in_child(program, lambda: 7)) == 7


def test_no_listener_without_a_notify_rule() -> None:
    program = seccomp.compile(
        profile("SCMP_ACT_ALLOW", listenerPath="/x", flags=["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"])
    )
    assert not program.notify
    assert program.flags == 0
    assert os.waitstatus_to_exitcode(in_child(program, lambda: 7)) == 7


# --- flags ---


def test_flags() -> None:
    assert seccomp.compile(profile()).flags == seccomp.FLAG_SPEC_ALLOW
    assert seccomp.compile(profile(flags=[])).flags == 0
    every = ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    program = seccomp.compile(profile(flags=every))
    assert program.flags == 7
    assert os.waitstatus_to_exitcode(in_child(program, lambda: 7)) == 7
    assert set(every) <= set(seccomp.supported_flags())
    assert not seccomp.flag_supported(1 << 30)


# --- arguments ---

VALUES = [0, 1, 5, 6, 0xFFFFFFFF, 0x100000000, 0x100000005, (1 << 63) + 5, (1 << 64) - 1]


@pytest.mark.parametrize("op", ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"])
@pytest.mark.parametrize("datum", [0, 5, 0x100000005, (1 << 63) + 5, (1 << 64) - 1])
def test_operators_compare_64_bits_unsigned(op: str, datum: int) -> None:
    mask = datum if op == "MASKED_EQ" else 0
    two = datum & 0x100000004 if op == "MASKED_EQ" else 0
    comparison = arg(2, op, mask if op == "MASKED_EQ" else datum, two)
    program = seccomp.compile(profile("SCMP_ACT_ALLOW", rule("getcwd", "SCMP_ACT_ERRNO", comparison, errnoRet=9)))
    for value in VALUES:
        expected = {
            "NE": value != datum,
            "LT": value < datum,
            "LE": value <= datum,
            "EQ": value == datum,
            "GE": value >= datum,
            "GT": value > datum,
            "MASKED_EQ": value & mask == two,
        }[op]
        got = run_bpf(program.bpf, NR["getcwd"], X86_64, (0, 0, value))
        assert got == (0x00050009 if expected else ALLOW), f"{value:#x} {op} {datum:#x}"


def test_different_arguments_must_all_match() -> None:
    program = seccomp.compile(
        profile("SCMP_ACT_ALLOW", rule("getcwd", "SCMP_ACT_ERRNO", arg(0, "EQ", 1), arg(1, "GT", 5), errnoRet=9))
    )
    seen = {(a, b): run_bpf(program.bpf, NR["getcwd"], X86_64, (a, b)) == 0x00050009 for a in (0, 1) for b in (5, 6)}
    assert seen == {(0, 5): False, (0, 6): False, (1, 5): False, (1, 6): True}


def test_comparisons_of_one_argument_are_alternatives() -> None:
    program = seccomp.compile(
        profile("SCMP_ACT_ERRNO", rule("personality", "SCMP_ACT_ALLOW", arg(0, "EQ", 0), arg(0, "EQ", 8)))
    )
    allowed = [value for value in range(12) if run_bpf(program.bpf, NR["personality"], X86_64, (value,)) == ALLOW]
    assert allowed == [0, 8]


def test_arguments_in_a_real_process() -> None:
    program = seccomp.compile(
        profile("SCMP_ACT_ALLOW", rule("personality", "SCMP_ACT_ERRNO", arg(0, "EQ", 0x20000), errnoRet=77))
    )
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(NR["personality"], 0x20000))) == 77
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(NR["personality"], 0))) == 0


# --- names, architectures, ENOSYS ---


def test_names_unknown_to_the_library_are_skipped() -> None:
    program = seccomp.compile(
        profile("SCMP_ACT_ALLOW", rule(["no_such_call", "getppid"], "SCMP_ACT_ERRNO", errnoRet=9))
    )
    assert run_bpf(program.bpf, NR["getppid"], X86_64) == 0x00050009


def test_sub_architectures_have_the_rules_and_others_are_killed() -> None:
    getppid_on_i386 = 64
    body = rule("getppid", "SCMP_ACT_ERRNO", errnoRet=9)
    both = seccomp.compile(profile("SCMP_ACT_ALLOW", body, architectures=["SCMP_ARCH_X86"]))
    assert run_bpf(both.bpf, getppid_on_i386, I386) == 0x00050009
    assert run_bpf(both.bpf, NR["getppid"], X86_64) == 0x00050009, "the native architecture is always kept"
    native = seccomp.compile(profile("SCMP_ACT_ALLOW", body))
    assert run_bpf(native.bpf, getppid_on_i386, I386) == 0


def test_an_architecture_of_other_byte_order_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"architectures\[1\]"):
        seccomp.compile(profile(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_S390X"]))


@pytest.mark.parametrize("default", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP"])
def test_calls_newer_than_the_profile_give_enosys(default: str) -> None:
    archs = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    program = seccomp.compile(profile(default, rule(["getppid", "statx"], "SCMP_ACT_ALLOW"), architectures=archs))
    refused = seccomp.ACTIONS[default] | (1 if default == "SCMP_ACT_ERRNO" else 0)
    enosys = 0x00050000 | errno.ENOSYS
    for arch, highest, offset in [(X86_64, 332, 0), (I386, 383, 0), (X86_64, 332, 0x40000000)]:
        assert run_bpf(program.bpf, highest + offset, arch) == ALLOW
        assert run_bpf(program.bpf, highest + 1 + offset, arch) == enosys
        assert run_bpf(program.bpf, highest - 1 + offset, arch) == refused
    assert run_bpf(program.bpf, 0xFFFFFFFF, X86_64) != enosys, "-1 is a tracer's skipped call"
    without_x32 = seccomp.compile(profile(default, rule("statx", "SCMP_ACT_ALLOW")))
    assert run_bpf(without_x32.bpf, 0x40000000 + 400, X86_64) == 0, "x32 is not in this filter, so it is killed"


def test_permissive_defaults_get_no_enosys() -> None:
    for default, value in [("SCMP_ACT_ALLOW", ALLOW), ("SCMP_ACT_LOG", 0x7FFC0000), ("SCMP_ACT_TRACE", 0x7FF00001)]:
        program = seccomp.compile(profile(default, rule("getppid", "SCMP_ACT_ERRNO")))
        assert run_bpf(program.bpf, 999, X86_64) == value


def test_enosys_in_a_real_process() -> None:
    program = seccomp.compile(profile("SCMP_ACT_ERRNO", rule(["exit_group", "getppid"], "SCMP_ACT_ALLOW")))
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(440))) == errno.ENOSYS
    assert os.waitstatus_to_exitcode(in_child(program, lambda: raw_errno(NR["getcwd"]))) == errno.EPERM


# --- a profile as engines send it ---


def engine_profile() -> dict[str, Any]:
    """The host's default profile (containers-common), resolved for x86-64 and CAP_SYS_CHROOT as an engine does."""
    path = Path("/usr/share/containers/seccomp.json")
    if not path.exists():
        pytest.skip("containers-common is not installed")
    source = json.loads(path.read_text())
    rules = []
    for entry in source["syscalls"]:
        includes, excludes = entry.get("includes") or {}, entry.get("excludes") or {}
        if includes.get("arches") and "amd64" not in includes["arches"]:
            continue
        if includes.get("caps") and "CAP_SYS_CHROOT" not in includes["caps"]:
            continue
        if "CAP_SYS_CHROOT" in excludes.get("caps", []) or "amd64" in excludes.get("arches", []):
            continue
        rules.append({key: entry[key] for key in ("names", "action", "errnoRet", "args") if entry.get(key)})
    return {
        "defaultAction": source["defaultAction"],
        "defaultErrnoRet": source["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": rules,
    }


def test_the_engines_default_profile() -> None:
    program = seccomp.compile(engine_profile())
    assert run_bpf(program.bpf, NR["read"], X86_64) == ALLOW
    assert run_bpf(program.bpf, NR["chmod"], X86_64) == ALLOW
    assert run_bpf(program.bpf, 161, X86_64) == ALLOW  # chroot
    assert run_bpf(program.bpf, 175, X86_64) == 0x00050001  # init_module
    assert run_bpf(program.bpf, 9999, X86_64) == 0x00050000 | errno.ENOSYS
    assert run_bpf(program.bpf, NR["personality"], X86_64, (0x20008,)) == ALLOW
    status = in_child(program, lambda: raw_errno(175, 0, 0, 0))
    assert os.waitstatus_to_exitcode(status) == errno.EPERM
    pid = os.fork()
    if pid == 0:
        load(program)
        os.execv("/bin/true", ["true"])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- faults ---


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        ([], "$.linux.seccomp"),
        ({}, "$.linux.seccomp.defaultAction"),
        (profile("SCMP_ACT_NOPE"), "$.linux.seccomp.defaultAction"),
        (profile("SCMP_ACT_NOTIFY"), "$.linux.seccomp.defaultAction"),
        (profile(defaultErrnoRet=1), "$.linux.seccomp.defaultErrnoRet"),
        (profile("SCMP_ACT_ERRNO", defaultErrnoRet=4096), "$.linux.seccomp.defaultErrnoRet"),
        (profile("SCMP_ACT_ERRNO", defaultErrnoRet=-1), "$.linux.seccomp.defaultErrnoRet"),
        (profile("SCMP_ACT_ERRNO", defaultErrnoRet=True), "$.linux.seccomp.defaultErrnoRet"),
        (profile(architectures=["SCMP_ARCH_Z80"]), "$.linux.seccomp.architectures[0]"),
        (profile(architectures="SCMP_ARCH_X86"), "$.linux.seccomp.architectures"),
        (profile(flags=["SECCOMP_FILTER_FLAG_NOPE"]), "$.linux.seccomp.flags[0]"),
        (profile(flags=[1]), "$.linux.seccomp.flags"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}, "$.linux.seccomp.syscalls"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [1]}, "$.linux.seccomp.syscalls[0]"),
        (profile("SCMP_ACT_ALLOW", rule([], "SCMP_ACT_KILL")), "$.linux.seccomp.syscalls[0].names"),
        (profile("SCMP_ACT_ALLOW", rule(["a", ""], "SCMP_ACT_KILL")), "$.linux.seccomp.syscalls[0].names[1]"),
        (profile("SCMP_ACT_ALLOW", rule(["a\0b"], "SCMP_ACT_KILL")), "$.linux.seccomp.syscalls[0].names[0]"),
        (profile("SCMP_ACT_ALLOW", rule("read", "KILL")), "$.linux.seccomp.syscalls[0].action"),
        (profile("SCMP_ACT_ERRNO", rule("a", "SCMP_ACT_ALLOW", errnoRet=1)), "$.linux.seccomp.syscalls[0].errnoRet"),
        (
            profile("SCMP_ACT_ALLOW", rule("write", "SCMP_ACT_NOTIFY"), listenerPath="/x"),
            "$.linux.seccomp.syscalls[0].names[0]",
        ),
        (profile("SCMP_ACT_ALLOW", rule("read", "SCMP_ACT_NOTIFY")), "$.linux.seccomp.listenerPath"),
        (profile(listenerMetadata="m"), "$.linux.seccomp.listenerMetadata"),
        (profile(listenerPath=3), "$.linux.seccomp.listenerPath"),
        (
            profile("SCMP_ACT_ALLOW", rule("read", "SCMP_ACT_KILL", arg(6, "EQ", 1))),
            "$.linux.seccomp.syscalls[0].args[0].index",
        ),
        (
            profile("SCMP_ACT_ALLOW", rule("read", "SCMP_ACT_KILL", arg(0, "LIKE", 1))),
            "$.linux.seccomp.syscalls[0].args[0].op",
        ),
        (
            profile("SCMP_ACT_ALLOW", rule("read", "SCMP_ACT_KILL", arg(0, "EQ", 1 << 64))),
            "$.linux.seccomp.syscalls[0].args[0].value",
        ),
        (
            profile("SCMP_ACT_ALLOW", rule("read", "SCMP_ACT_KILL", {"index": 0, "op": "SCMP_CMP_EQ"})),
            "$.linux.seccomp.syscalls[0].args[0].value",
        ),
    ],
)
def test_faults_name_their_json_path(bad: Any, path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        seccomp.compile(bad, cache_dir=str(tmp_path / "cache"))
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_a_filter_too_large_for_the_kernel_is_refused_by_name() -> None:
    rules = [rule("getcwd", "SCMP_ACT_ERRNO", arg(0, "EQ", value << 33 | value)) for value in range(1, 2000)]
    with pytest.raises(ConfigError, match="the kernel takes 4096"):
        seccomp.compile(profile("SCMP_ACT_ALLOW", *rules))


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovt.kernel import seccomp_compiler

    monkeypatch.setattr(seccomp_compiler, "find_library", lambda: ("/nowhere/libseccomp.so.2", ()))
    with pytest.raises(HostError) as caught:
        seccomp.compile(profile())
    assert "libseccomp" in str(caught.value) and "install" in caught.value.hint
