"""What goes wrong around a machine: killed commands, supervisors and QEMUs, files that vanish or rot, a full disk.

Each gives one clear error, loses no guest that could go on, and leaves nothing that `ovt` cannot see and remove.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.image import busybox, initramfs, kernel
from tests.ovt.cli.place import Place

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.timeout(180)]

# Runs an ovt command and dies by SIGKILL at one step of it: module, class or "", function, before or after.
DIE = """
import importlib, os, sys
module, owner, name, when, *words = sys.argv[1:]
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
step = getattr(place, name)
def die(*args, **options):
    if when == "after":
        step(*args, **options)
    os.kill(os.getpid(), 9)
setattr(place, name, die)
from ovt.cli import run
run(words)
"""


@pytest.fixture
def ovt(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    ids = place.out("ps", "-aq", check=False).split()
    if ids:
        place("delete", "--force", *ids)
    place.nothing_left()


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A kernel and an initramfs for a guest that says `up` once and has no agent."""
    program, _ = busybox.find()
    init = b"#!/bin/busybox sh\n/bin/busybox echo up\nwhile :; do /bin/busybox sleep 1; done\n"
    entries = [
        *(initramfs.directory("bin"), initramfs.directory("dev"), initramfs.device("dev/console", 5, 1)),
        *(initramfs.file("bin/busybox", Path(program).read_bytes()), initramfs.file("init", init)),
    ]
    path = tmp_path_factory.mktemp("mute") / "initrd"
    path.write_bytes(initramfs.archive(entries))
    return str(kernel.get(lambda line: None).vmlinux), str(path)


def make(ovt: Place, mute: tuple[str, str], name: str, *words: str) -> str:
    """A machine that needs no boot for what is done to it."""
    options = ("--kernel", mute[0], "--initrd", mute[1], "--cmdline", "console=ttyS0 quiet", "--memory", "128M")
    return ovt.out("create", "--vm", "--name", name, "--network", "none", *options, *words, "none")


def pids(ovt: Place, name: str) -> tuple[int, int]:
    """QEMU's and its supervisor's."""
    (record,) = json.loads(ovt.out("inspect", name))
    (home,) = (ovt.data / "instances").glob(f"{record['id']}*")
    info = json.loads((home / "supervisor.json").read_text())
    return int(record["pid"]), int(info["pid"])


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}") or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def test_qemu_is_killed(ovt: Place, mute: tuple[str, str]) -> None:
    make(ovt, mute, "a")
    ovt("start", "a")
    os.kill(pids(ovt, "a")[0], signal.SIGKILL)
    assert ovt.out("wait", "a") == "137"
    assert ovt.status("a") == "stopped"
    ovt("start", "a")
    assert ovt.status("a") == "running"


def test_the_supervisor_is_killed_and_the_guest_goes_on(ovt: Place, mute: tuple[str, str]) -> None:
    make(ovt, mute, "a")
    ovt("start", "a")
    qemu, supervisor = pids(ovt, "a")
    os.kill(supervisor, signal.SIGKILL)
    ovt.wait_for(lambda: gone(supervisor))
    time.sleep(0.5)
    assert not gone(qemu)
    assert ovt.status("a") == "running"
    ovt("pause", "a")
    assert ovt.status("a") == "paused"
    ovt("resume", "a")
    told = ovt("check", "--fix", check=False)
    assert "its supervisor was killed while it ran: ovt save a, then ovt start a" in told.stdout
    assert not gone(qemu)
    ovt("save", "a")
    assert gone(qemu)
    ovt("start", "a")
    assert ovt.status("a") == "running"
    qemu = pids(ovt, "a")[0]
    ovt("delete", "--force", "a")
    assert gone(qemu)


@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "unsupervised"])
def test_a_guest_has_its_time_to_stop(ovt: Place, mute: tuple[str, str], supervised: bool) -> None:
    """This one knows no power button; the plug is pulled after the time given, whoever tells of its end, or nobody."""
    make(ovt, mute, "a")
    ovt("start", "a")
    qemu, supervisor = pids(ovt, "a")
    if not supervised:
        os.kill(supervisor, signal.SIGKILL)
        ovt.wait_for(lambda: gone(supervisor))
    began = time.monotonic()
    ovt("stop", "-t", "2", "a")
    assert 2 <= time.monotonic() - began < 20
    assert gone(qemu)
    assert ovt.status("a") == "stopped"
    assert f"exit_code={137 if supervised else 255}" in ovt.out("events")  # written down now, not at the next look


START = [
    ("ovt.engine.vm.process", "", "launch", "before"),
    ("ovt.engine.vm.process", "", "launch", "after"),
    ("ovt.engine.vm.devices", "", "plug_all", "before"),
    ("ovt.engine.vm.engine", "VmEngine", "start", "before"),
    ("ovt.engine.vm.engine", "VmEngine", "start", "after"),
]


@pytest.mark.parametrize("step", START, ids="-".join)
def test_a_start_is_killed(ovt: Place, mute: tuple[str, str], step: tuple[str, ...]) -> None:
    make(ovt, mute, "a", "--disk", "new,size=16M")
    die(ovt, step, "start", "a")
    ovt("check", "--fix", check=False)
    ovt.wait_for(lambda: ovt.status("a") in {"created", "stopped"})
    ovt("start", "a")
    assert ovt.status("a") == "running"


SAVE = [
    ("ovt.engine.vm.memory_state", "", "save_file", "before"),
    ("ovt.engine.vm.memory_state", "", "save_file", "after"),
    ("ovt.engine.vm.saved", "", "save", "after"),
    ("ovt.store", "Store", "save", "before"),
]


@pytest.mark.parametrize("step", SAVE, ids="-".join)
def test_a_save_is_killed_and_the_guest_is_not_lost(ovt: Place, mute: tuple[str, str], step: tuple[str, ...]) -> None:
    make(ovt, mute, "a")
    ovt("start", "a")
    qemu = pids(ovt, "a")[0]
    die(ovt, step, "save", "a")
    (home,) = (ovt.data / "instances").iterdir()
    if not gone(qemu):  # it stands still, or never stood
        ovt("resume" if ovt.status("a") == "paused" else "reset", "a")
        assert ovt.status("a") == "running"
        assert not (home / "saved").exists()
    else:
        assert (home / "saved/memory").exists()
        ovt.wait_for(lambda: ovt.status("a") in {"stopped", "saved"})
        ovt("start", "a")
        assert ovt.status("a") == "running"


def die(ovt: Place, step: tuple[str, ...], *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", DIE, *step, *ovt.words[1:], *words],
        env=environment, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if step[2] == "plug_all":  # that is in the process which becomes the supervisor: the command sees it die
        assert done.returncode in {0, 1} and "was killed while it started" in done.stderr, done.stderr
    else:
        assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kernel_and_an_image_vanish(ovt: Place, mute: tuple[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "vmlinux"
    copy.write_bytes(Path(mute[0]).read_bytes())
    image = tmp_path / "data.img"
    image.write_bytes(bytes(1 << 20))
    make(ovt, (str(copy), mute[1]), "a", "--disk", f"{image},id=data")
    for path in (image, copy):
        kept = path.read_bytes()
        ovt("start", "a")
        ovt("kill", "a")
        ovt("wait", "a")
        path.unlink()
        failed = ovt("start", "a", check=False)
        assert (failed.returncode, failed.stderr.count("ovt:")) == (1, 1)
        assert str(path) in failed.stderr and "vanished" in failed.stderr
        path.write_bytes(kept)


def test_an_image_is_damaged(ovt: Place, mute: tuple[str, str]) -> None:
    make(ovt, mute, "a", "--disk", "new,size=16M,id=data")
    ovt("start", "a")
    ovt("kill", "a")
    ovt("wait", "a")
    (own,) = (ovt.data / "instances").glob("*/disks/data.qcow2")
    with own.open("r+b") as file:
        file.write(b"\0" * 512)
    failed = ovt("start", "a", check=False)
    assert (failed.returncode, failed.stderr.count("ovt:")) == (1, 1)
    assert "Traceback" not in failed.stderr and "data" in failed.stderr
    assert ovt.status("a") == "stopped"


def test_a_guest_without_an_agent_is_told_at_once(ovt: Place, mute: tuple[str, str]) -> None:
    make(ovt, mute, "a")
    ovt("start", "a")
    began = time.monotonic()
    for words in (("exec", "a", "true"), ("cp", "a:/x", "."), ("guest", "a"), ("top", "a")):
        failed = ovt(*words, check=False)
        assert failed.returncode in {1, 125}
        assert "ovt console a" in failed.stderr
    assert time.monotonic() - began < 30


def test_the_disk_is_full(mute: tuple[str, str], tmp_path: Path) -> None:
    """In a mount namespace of its own, so that the small file system is nobody else's."""
    script = f"""
set -e
mount -t tmpfs -o size=24M,mode=700 small {tmp_path}
cd {tmp_path}
ovt() {{ {" ".join(Place(tmp_path).words)} "$@"; }}
ovt create --vm --name a --network none --kernel {mute[0]} --initrd {mute[1]} --cmdline 'console=ttyS0 quiet' \
    --memory 128M none
ovt start a
until ovt logs a | grep -q up; do sleep 0.2; done
if ovt save a; then exit 9; fi
test "$(ovt ps --format '{{{{.status}}}}')" = running
test -z "$(find data/instances -name '*saved*')"
ovt delete --force a
"""
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=150,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
