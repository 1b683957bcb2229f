"""Compiled filters kept on disk: used again when nothing changed, never when anything is wrong with them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ovt.errors import ConfigError
from ovt.kernel import seccomp, seccomp_cache, seccomp_compiler


def profile(*rules: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": list(rules), **rest}


def rule(name: str, action: str) -> dict[str, Any]:
    return {"names": [name], "action": action}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_second_time_comes_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = profile(rule("getppid", "SCMP_ACT_ERRNO"))
    first = seccomp.compile(wanted, cache_dir=str(cache))
    monkeypatch.setattr(seccomp_compiler, "build", None)
    second = seccomp.compile(wanted, cache_dir=str(cache))
    assert (first.cached, second.cached) == (False, True)
    assert (first.bpf, first.flags, first.notify) == (second.bpf, second.flags, second.notify)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_listener_fields_are_the_configurations_not_the_caches(cache: Path) -> None:
    body = rule("getppid", "SCMP_ACT_NOTIFY")
    for path in ("/a", "/b"):
        program = seccomp.compile(profile(body, listenerPath=path), cache_dir=str(cache))
        assert program.listener_path == path
    assert program.cached and program.notify
    with pytest.raises(ConfigError, match="listenerPath"):
        seccomp.compile(profile(body), cache_dir=str(cache))


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip", "grow", "swap", "symlink", "fifo", "directory"])
def test_a_damaged_entry_is_compiled_again(cache: Path, damage: str, tmp_path: Path) -> None:
    wanted = profile(rule("getppid", "SCMP_ACT_ERRNO"))
    good = seccomp.compile(wanted, cache_dir=str(cache))
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    if damage == "truncate":
        entry.write_bytes(content[:-8])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "flip":
        entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "grow":
        entry.write_bytes(content + bytes(8))
    elif damage == "swap":
        entry.unlink()
        seccomp.compile(profile(), cache_dir=str(cache))
        (other,) = cache.iterdir()
        other.rename(entry)
    elif damage == "symlink":
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    elif damage == "fifo":
        entry.unlink()
        os.mkfifo(entry)
    elif damage == "directory":
        entry.unlink()
        entry.mkdir()
    again = seccomp.compile(wanted, cache_dir=str(cache))
    assert not again.cached
    assert again.bpf == good.bpf
    if damage != "directory":
        assert seccomp.compile(wanted, cache_dir=str(cache)).cached, "the damaged entry was replaced"


@pytest.mark.parametrize("fault", ["open to all", "a symbolic link", "a file", "no parent", "another owner"])
def test_a_directory_that_is_not_ours_alone_is_not_used(cache: Path, fault: str, tmp_path: Path) -> None:
    if fault == "open to all":
        cache.mkdir()
        cache.chmod(0o755)
    elif fault == "a symbolic link":
        (tmp_path / "real").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "real")
    elif fault == "a file":
        cache.write_text("")
    elif fault == "no parent":
        cache = tmp_path / "a" / "b"
    elif fault == "another owner":
        if os.geteuid():
            pytest.skip("needs root")
        cache.mkdir(mode=0o700)
        os.chown(cache, 12345, 12345)
    for _ in range(2):
        assert not seccomp.compile(profile(), cache_dir=str(cache)).cached
    assert not (tmp_path / "real").exists() or not list((tmp_path / "real").iterdir())


def test_the_cache_is_bounded_and_drops_the_oldest(cache: Path) -> None:
    for number in range(seccomp_cache.MAX_ENTRIES):
        key = bytes([number]) * 32
        assert seccomp_cache.store(str(cache), key, (bytes(8), number, False))
        os.utime(cache / key.hex(), (1000 + number, 1000 + number))
    assert len(list(cache.iterdir())) == seccomp_cache.MAX_ENTRIES
    assert seccomp_cache.store(str(cache), b"\xff" * 32, (bytes(8), 0, False))
    assert len(list(cache.iterdir())) < seccomp_cache.MAX_ENTRIES
    assert seccomp_cache.load(str(cache), b"\xff" * 32) == (bytes(8), 0, False)
    assert seccomp_cache.load(str(cache), bytes(32)) is None, "the oldest went"
    last = bytes([seccomp_cache.MAX_ENTRIES - 1]) * 32
    assert seccomp_cache.load(str(cache), last) is not None
    assert (cache / last.hex()).stat().st_mtime > 2000, "a use counts as young"


def test_equal_content_has_equal_keys_and_other_content_other_keys() -> None:
    library = ("/lib/x", 1, 2, 3, 4)
    base = profile(rule("read", "SCMP_ACT_ERRNO"))
    copy = json.loads(json.dumps(base))
    assert seccomp_cache.key(base, library) == seccomp_cache.key(copy, library)
    for changed in (
        {**base, "flags": []},
        {**base, "defaultAction": "SCMP_ACT_LOG"},
        {**base, "architectures": ["SCMP_ARCH_X86"]},
    ):
        assert seccomp_cache.key(changed, library) != seccomp_cache.key(base, library)
    assert seccomp_cache.key(base, ("/lib/x", 1, 2, 3, 5)) != seccomp_cache.key(base, library)


def test_a_hit_imports_next_to_nothing(cache: Path) -> None:
    seccomp.compile(profile(), cache_dir=str(cache))
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "from ovt.kernel import seccomp\n"
        "program = seccomp.compile({'defaultAction': 'SCMP_ACT_ALLOW', 'syscalls': []}, cache_dir=sys.argv[2])\n"
        "assert program.cached; print(*sorted(set(sys.modules) - before))"
    )
    root = Path(seccomp.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(root), str(cache)], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    builtin = {"_blake2", "_struct", "time", "marshal", "posix"}
    assert loaded - builtin <= {"ovt", "ovt.errors", "ovt.kernel", "ovt.kernel.seccomp", "ovt.kernel.seccomp_cache"}
