"""Checkpoint and restore: the criu command lines, and with a criu that works on this kernel the real thing."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import checkpoint, criu, init, restoring
from ovt.engine.container.request import Request
from ovt.engine.container.runtime import Runtime
from ovt.engine.container.state import State
from ovt.errors import ConfigError, HostError, NotFound, OvtError, StateError, UsageError

FAKE = """#!/bin/sh
test "$1" = check && { test "$3" != nothing; exit; }
printf '%s\\n' "$@" > CALL
ls -l /proc/$$/fd > CALL.fds
test -e FILE && { printf '(00.01) Error (a.c:1): tolerable\\n(00.02) Error (b.c:2): the reason\\n' > "$(cat FILE)"
  printf '(00.03) Error (c.c:3): Dumping FAILED.\\n' >> "$(cat FILE)"; exit 1; }
while test $# -gt 0; do
  case $1 in --pidfile) echo 4242 > "$2";; --root) ls -R "$2" > CALL.root;; esac
  shift
done
exit 0
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a criu that writes its arguments to `call`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "criu"
    text = FAKE.replace("CALL", str(tmp_path / "call")).replace("FILE", str(tmp_path / "fail"))
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    monkeypatch.setattr(criu, "CONFIG_FILES", ())
    return tmp_path


@pytest.fixture
def state(tmp_path: Path) -> dict[str, Any]:
    """The record of a container whose init is the test itself."""
    (tmp_path / "rootfs").mkdir()
    return {"pid": os.getpid(), "rootfs": str(tmp_path / "rootfs"), "bundle": str(tmp_path), "cgroup": None}


def config(**linux: Any) -> dict[str, Any]:
    return {"process": {"args": ["x"]}, "linux": {"namespaces": [{"type": "network"}, {"type": "mount"}], **linux}}


def argv(calls: Path) -> list[str]:
    return (calls / "call").read_text().replace(str(calls), "TMP").splitlines()


def without_mounts(words: list[str]) -> list[str]:
    """The test process stands in for the init, so its own mounts, which differ by machine, are left out."""
    out: list[str] = []
    for word in words:
        if word.startswith("mnt["):
            out.pop()
        else:
            out.append(word)
    return out


# --- command lines ---


def test_dump(calls: Path, state: dict[str, Any]) -> None:
    checkpoint.checkpoint(state, config(), {"image-path": f"{calls}/images", "work-path": f"{calls}/work"})
    assert without_mounts(argv(calls)) == [
        *("dump", "--tree", str(os.getpid()), "--root", "TMP/rootfs"),
        *("--images-dir", "TMP/images", "--work-dir", "TMP/work", "--log-file", "dump.log", "-v4"),
        *("--manage-cgroups=soft", "--empty-ns", "net"),
    ]
    descriptors = json.loads((calls / "images/descriptors.json").read_text())
    assert descriptors == [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
    assert (calls / "images").stat().st_mode & 0o777 == 0o700


def test_every_flag_of_dump(calls: Path, state: dict[str, Any]) -> None:
    (calls / "images/before").mkdir(parents=True)
    read, write = os.pipe()
    options = {
        **dict.fromkeys(checkpoint._FLAGS, True),
        "image-path": f"{calls}/images",
        "parent-path": "before",
        "page-server": "[::1]:1234",
        "manage-cgroups-mode": "ignore",
        "empty-ns": ["network"],
        "status-fd": write,
    }
    checkpoint.checkpoint(state, config(), options)
    assert without_mounts(argv(calls)) == [
        *("dump", "--tree", str(os.getpid()), "--root", "TMP/rootfs"),
        *("--images-dir", "TMP/images", "--work-dir", "TMP/images", "--log-file", "dump.log", "-v4"),
        *("--leave-running", "--tcp-established", "--skip-in-flight", "--tcp-close", "--link-remap", "--ext-unix-sk"),
        *("--shell-job", "--file-locks", "--auto-dedup", "--lazy-pages", "--manage-cgroups=ignore"),
        *("--empty-ns", "net", "--prev-images-dir", "before", "--track-mem"),
        *("--page-server", "--address", "::1", "--port", "1234", "--status-fd", str(write)),
    ]
    assert f" {write} -> " in (calls / "call.fds").read_text(), "criu has the status descriptor"
    os.close(read)
    os.close(write)


def test_pre_dump_records_no_mounts(calls: Path, state: dict[str, Any]) -> None:
    checkpoint.checkpoint(state, config(), {"image-path": f"{calls}/images", "pre-dump": True})
    assert argv(calls)[0] == "pre-dump"
    assert "--external" not in argv(calls)
    assert not (calls / "images/mounts.json").exists()


def test_namespaces_joined_by_path_are_external(calls: Path, state: dict[str, Any]) -> None:
    joined = config(
        namespaces=[{"type": "network", "path": "/proc/self/ns/net"}, {"type": "ipc", "path": "/proc/self/ns/ipc"}]
    )
    options = {"image-path": f"{calls}/images"}
    checkpoint.checkpoint(state, joined, options)
    words = without_mounts(argv(calls))
    assert words[-2:] == ["--external", f"net[{os.stat('/proc/self/ns/net').st_ino}]:extRootNetNS"]
    assert "--empty-ns" not in words
    (calls / "images/mounts.json").write_text("[]")
    (calls / "images/descriptors.json").write_text('["/dev/null", "pipe:[77]", "socket:[78]"]')
    checkpoint.restore(state, joined, options, directory=str(calls))
    words = argv(calls)
    assert (
        words[-10:]
        == [
            *("--inherit-fd", "fd[1]:pipe:[77]", "--inherit-fd", "fd[2]:socket:[78]"),
            *("--inherit-fd", "fd[3]:extRootNetNS", "--join-ns", "ipc:/proc/self/ns/ipc"),
            *("--cgroup-root", words[-1]),
        ]
        or words[-2] == "--cgroup-root"
    )
    assert "fd[3]:extRootNetNS" in words and "ipc:/proc/self/ns/ipc" in words
    assert " 3 -> net:[" in (calls / "call.fds").read_text()


@pytest.mark.root
def test_restore(calls: Path, state: dict[str, Any]) -> None:
    images = calls / "images"
    images.mkdir()
    (calls / "hosts").write_text("")
    external = [{"destination": "/etc/hosts", "root": "/x", "type": "ext4", "options": "rw"}]
    external.append({"destination": "/proc/kcore", "root": "/null", "type": "devtmpfs", "options": "rw"})
    (images / "mounts.json").write_text(json.dumps(external))
    (images / "descriptors.json").write_text('["/dev/null", "pipe:[1]", "pipe:[1]"]')
    whole = config(maskedPaths=["/proc/kcore"])
    whole["mounts"] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/etc/hosts", "type": "bind", "source": str(calls / "hosts"), "options": ["bind", "ro"]},
    ]
    entered: list[int] = []
    options = {"image-path": str(images), "manage-cgroups-mode": "ignore", "leave-running": True, "tcp-close": True}
    options.update({"lsm-profile": "apparmor:web", "lsm-mount-context": "ctx"})
    read, write = os.pipe()
    pid = checkpoint.restore(
        state, whole, options, directory=str(calls), stdio=(write, write, write), enter_cgroup=entered.append
    )
    assert pid == 4242
    assert len(entered) == 1 and entered[0] > 1
    assert argv(calls) == [
        *("restore", "--restore-detached", "--restore-sibling", "--pidfile", "TMP/criu.pid"),
        *("--root", "TMP/criu-root", "--images-dir", "TMP/images", "--work-dir", "TMP/images"),
        *("--log-file", "restore.log", "-v4", "--evasive-devices", "--tcp-close", "--manage-cgroups=ignore"),
        *("--empty-ns", "net", "--lsm-profile=apparmor:web", "--lsm-mount-context=ctx"),
        *("--external", "mnt[/etc/hosts]:TMP/hosts", "--external", "mnt[/proc/kcore]:/dev/null"),
        *("--inherit-fd", "fd[1]:pipe:[1]", "--inherit-fd", "fd[2]:pipe:[1]"),
    ]
    assert {"dev", "etc", "proc", "hosts"} <= set((calls / "call.root").read_text().split())
    assert not (Path(state["rootfs"]) / "dev/shm").exists(), "what lies on a tmpfs comes with it"
    assert not (calls / "criu-root").exists() and not (calls / "criu.pid").exists()
    assert str(calls / "criu-root") not in Path("/proc/self/mountinfo").read_text()
    inherited = (calls / "call.fds").read_text()
    pipe = os.readlink(f"/proc/self/fd/{write}")
    assert [line.split(" -> ")[1] for line in inherited.splitlines() if " 0 -> " in line] == [pipe]
    os.close(read)
    os.close(write)


def test_the_annotation_names_criu_s_configuration(calls: Path, state: dict[str, Any]) -> None:
    options = {"image-path": f"{calls}/images"}
    whole = {**config(), "annotations": {"org.criu.config": "/etc/mine.conf"}}
    checkpoint.checkpoint(state, whole, options)
    assert argv(calls)[argv(calls).index("--config") + 1] == "/etc/mine.conf"
    checkpoint.checkpoint(state, {**config(), "annotations": {"org.criu.config": ""}}, options)
    assert "--config" not in argv(calls)


# --- faults ---


def test_without_criu_the_error_says_what_to_install(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="criu is not installed") as caught:
        checkpoint.checkpoint(state, config(), {})
    assert "install" in caught.value.hint


def test_a_failure_quotes_the_reason_from_the_log(calls: Path, state: dict[str, Any]) -> None:
    (calls / "fail").write_text(f"{calls}/images/dump.log")
    with pytest.raises(HostError, match=r"criu dump failed: Error \(b.c:2\): the reason$") as caught:
        checkpoint.checkpoint(state, config(), {"image-path": f"{calls}/images"})
    assert caught.value.hint.endswith("images/dump.log")


@pytest.mark.parametrize("options", [{"pre-dump": True}, {"parent-path": "before"}])
def test_steps_that_the_kernel_is_missing_a_feature_for(
    calls: Path, state: dict[str, Any], options: dict[str, Any]
) -> None:
    program = calls / "bin/criu"
    program.write_text(program.read_text().replace("!= nothing", "!= mem_dirty_track"))
    with pytest.raises(HostError, match="in steps is not possible on this kernel: mem_dirty_track is missing"):
        checkpoint.checkpoint(state, config(), {"image-path": f"{calls}/images", **options})
    assert not (calls / "call").exists()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"bogus": True}, UsageError),
        ({"manage-cgroups-mode": "hard"}, UsageError),
        ({"empty-ns": ["pid"]}, UsageError),
        ({"page-server": "nowhere"}, UsageError),
        ({"page-server": "a:99999"}, UsageError),
        ({"parent-path": "/abs"}, UsageError),
        ({"parent-path": "missing"}, NotFound),
    ],
)
def test_bad_options(calls: Path, state: dict[str, Any], options: dict[str, Any], kind: type[OvtError]) -> None:
    with pytest.raises(kind):
        checkpoint.checkpoint(state, config(), {"image-path": f"{calls}/images", **options})
    assert not (calls / "call").exists()


def test_what_cannot_be_restored(calls: Path, state: dict[str, Any]) -> None:
    options = {"image-path": f"{calls}/images"}
    with pytest.raises(NotFound, match="no checkpoint"):
        checkpoint.restore(state, config(), options, directory=str(calls))
    (calls / "images").mkdir()
    with pytest.raises(NotFound, match="not a checkpoint"):
        checkpoint.restore(state, config(), options, directory=str(calls))
    (calls / "images/descriptors.json").write_text("[]")
    (calls / "images/mounts.json").write_text(
        json.dumps([{"destination": "/data", "root": "/x", "type": "ext4", "options": "rw"}])
    )
    with pytest.raises(HostError, match=r"/data that config\.json does not name"):
        checkpoint.restore(state, config(), options, directory=str(calls))
    (calls / "images/mounts.json").write_text("[]")
    joined = config(namespaces=[{"type": "cgroup", "path": "/proc/self/ns/cgroup"}])
    with pytest.raises(ConfigError, match="cgroup namespace"):
        checkpoint.restore(state, joined, options, directory=str(calls))


def test_a_terminal_is_refused(calls: Path, state: dict[str, Any]) -> None:
    with pytest.raises(StateError, match="terminal"):
        checkpoint.checkpoint(state, {"process": {"terminal": True}}, {})


# --- which mounts are the host's ---

HOST = """\
20 1 254:0 / / rw - ext4 /dev/vda rw
21 20 0:5 / /dev rw - devtmpfs dev rw
22 20 0:22 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
23 20 0:23 / /proc rw - proc proc rw
24 20 0:24 / /with\\040space rw - tmpfs t rw
"""
CONTAINER = """\
100 99 254:0 /bundle/rootfs / rw - ext4 /dev/vda rw
101 100 0:23 / /proc rw - proc proc rw
102 100 0:90 / /dev rw shared:5 - tmpfs tmpfs rw
103 101 0:5 /null /proc/kcore rw - devtmpfs dev rw
104 100 254:0 /etc/h /etc/hosts ro - ext4 /dev/vda rw
105 100 0:24 / /a\\040b rw master:7 - tmpfs t rw
106 100 0:22 /ct /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory
"""


def test_external_mounts_are_those_of_the_hosts_filesystems() -> None:
    found = checkpoint.external_mounts(CONTAINER, HOST, cgroup_namespace=False)
    assert [mount["destination"] for mount in found] == ["/proc/kcore", "/etc/hosts", "/a b", "/sys/fs/cgroup/memory"]
    assert found[1] == {"destination": "/etc/hosts", "root": "/etc/h", "type": "ext4", "options": "rw"}
    own = checkpoint.external_mounts(CONTAINER, HOST, cgroup_namespace=True)
    assert [mount["destination"] for mount in own] == ["/proc/kcore", "/etc/hosts", "/a b"]
    with pytest.raises(HostError):
        checkpoint.external_mounts("garbage", HOST, cgroup_namespace=False)


# --- the real thing ---


def criu_works() -> bool:
    """Whether a criu is installed that runs on this kernel (3.17 does not on Linux 6.13 and newer)."""
    try:
        return subprocess.run([criu.find(), "check"], capture_output=True).returncode == 0
    except HostError:
        return False


COUNT = "i=0; while true; do i=$((i+1)); echo $i; echo $i > /tmp/last; /bin/busybox sleep 0.05; done"


@pytest.fixture(scope="module")
def stub() -> None:
    """The engine keeps one descriptor of its init for the life of the process; have it before a test is watched."""
    init._memfd()


def read_number(pipe: int) -> int:
    """The next whole number that the container prints."""
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(pipe, 1)
    return int(text)


@pytest.mark.root
@pytest.mark.skipif(not criu_works(), reason="no criu that works on this kernel")
def test_a_counting_container_goes_on_counting(tmp_path: Path, stub: None) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", bundle / "rootfs/bin/busybox")
    (tmp_path / "shared").mkdir()
    spec: dict[str, Any] = {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"args": ["/bin/busybox", "sh", "-c", COUNT], "cwd": "/", "noNewPrivileges": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/shared", "type": "bind", "source": str(tmp_path / "shared"), "options": ["rbind"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": ["/proc/keys", "/proc/scsi"],
            "readonlyPaths": ["/proc/sys"],
            "cgroupsPath": f"/ovt-test-{os.getpid()}",
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["chroot"], "action": "SCMP_ACT_ERRNO"}],
            },
        },
    }
    (bundle / "config.json").write_text(json.dumps(spec))
    root = str(tmp_path / "state")
    runtime = Runtime(root)
    null = os.open("/dev/null", os.O_RDWR)
    options = {"image-path": str(tmp_path / "images")}
    read, write = os.pipe()
    try:
        first = runtime.create("count", str(bundle), stdio=(null, write, write)).pid
        runtime.start("count")
        assert [read_number(read) for _ in range(3)] == [1, 2, 3]
        restoring.checkpoint(State.load(root, "count"), options)
        os.waitpid(first, 0)
        os.close(write)
        printed = [int(line) for line in os.read(read, 65536).split()]
        os.close(read)
        assert not (tmp_path / "state/count").exists()

        read, write = os.pipe()
        request = Request(str(bundle))
        request.stdio = (null, write, write)
        state = restoring.restore(root, "count", spec, request, options)
        assert read_number(read) == (printed[-1] if printed else 3) + 1
        assert state.status() == "running"
        status = Path(f"/proc/{state.pid}/status").read_text()
        assert f"PPid:\t{os.getpid()}\n" in status and "Seccomp:\t2\n" in status
        assert int(Path(f"/proc/{state.pid}/root/tmp/last").read_text()) > 3
        assert f"/ovt-test-{os.getpid()}" in Path(f"/proc/{state.pid}/cgroup").read_text()
        runtime.kill("count", 9)
        os.waitpid(state.pid, 0)
        runtime.delete("count")
    finally:
        runtime.delete("count", force=True)
        for fd in (read, write, null):
            os.close(fd)
