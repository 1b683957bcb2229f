"""Attacks by links and renames in the image or a volume on whatever the runtime makes or mounts in the rootfs."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

from ovt.engine.container import copy
from tests.conftest import Bundle, Oci
from tests.security.conftest import Container, naive_python, refused, runs

pytestmark = pytest.mark.root

RACE_SECONDS = 2.5
RENAME_EXCHANGE = 2


def bind(source: Path, destination: str) -> dict[str, Any]:
    return {"source": str(source), "destination": destination, "type": "bind", "options": ["rbind"]}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of the host that every attack of this file is after; it must stay empty."""
    place = tmp_path / "outside"
    place.mkdir()
    return place


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    place = tmp_path / "volume"
    place.mkdir()
    (place / "mark").write_text("volume\n")
    return place


@contextmanager
def swapping(directory: Path, link_target: Path) -> Iterator[None]:
    """Meanwhile exchange `directory` and a link to `link_target` for one another, as fast as it goes."""
    link = directory.with_name("link")
    end = threading.Event()
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    exchanged = 0

    def swap() -> None:
        nonlocal exchanged
        while not end.is_set() or exchanged % 2:
            assert rename(-1, os.fsencode(directory), -1, os.fsencode(link), RENAME_EXCHANGE) == 0
            exchanged += 1
            time.sleep(0.0002)

    link.symlink_to(link_target)
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        assert link.is_symlink() and exchanged > 1
        link.unlink()


def test_cve_2021_30465_a_volumes_target_is_exchanged(
    oci: Oci, bundle: Bundle, container_id: str, volume: Path, outside: Path
) -> None:
    """The target is a directory when it is looked up and a link to the host when it is mounted on, or the reverse."""

    def mount(config: dict[str, Any]) -> None:
        config["mounts"].append(bind(volume, "/shared/target/deep"))

    place = bundle("sleep", "60", edit=mount)
    target = place / "rootfs/shared/target"
    (target / "deep").mkdir(parents=True)
    (outside / "deep").mkdir()
    naive = set()
    good = bad = 0
    deadline = time.monotonic() + RACE_SECONDS
    with swapping(target, outside):
        while time.monotonic() < deadline:
            naive.add(os.path.islink(target))
            quiet: dict[str, Any] = {"capture_output": False, "stdout": DEVNULL, "stderr": DEVNULL}
            if oci("create", "-b", place, container_id, **quiet).returncode:
                bad += 1
            else:
                good += 1
                mounts = Container(oci, container_id).mounts()
                assert [m for m in mounts if m.startswith(("/shared", str(outside)))] in (
                    ["/shared/target/deep"],
                    ["/shared/link/deep"],  # the directory that was found has been exchanged since
                    [f"{outside}/deep"],  # the link, taken as one inside the root
                )
                oci("delete", container_id, check=True)
    assert naive == {True, False}, "a look-up by path is fooled"
    assert good, "now and then the directory is where it belongs"
    assert os.listdir(outside) == ["deep"] and not os.listdir(outside / "deep")


def test_cve_2024_45310_a_missing_target_is_made(
    oci: Oci, bundle: Bundle, container_id: str, volume: Path, outside: Path, tmp_path: Path
) -> None:
    """While the runtime makes the directories and the file to mount on, their parent becomes a link to the host."""
    names = ["a", "b", "c", "d"]

    def mount(config: dict[str, Any]) -> None:
        config["mounts"] += [bind(volume, f"/shared/target/{name}/x/y/z") for name in names]
        config["mounts"] += [bind(volume / "mark", f"/shared/target/{name}/file") for name in names]

    place = bundle("true", edit=mount)
    target = place / "rootfs/shared/target"
    target.mkdir(parents=True)
    deadline = time.monotonic() + RACE_SECONDS
    tries = 0
    with swapping(target, outside):
        while time.monotonic() < deadline:
            oci("run", "-b", place, container_id)
            tries += 1
        # the trap is set: makedirs by path does end up outside
        trap = tmp_path / "trap"
        trap.mkdir()
    assert tries > 3 and not os.listdir(outside)
    with swapping(target, trap):
        code = "import os,sys,itertools\nfor i in itertools.count():\n os.makedirs(sys.argv[1] + f'/{i}/x/y')\n"
        code = code.replace(" os.makedirs", " try: os.makedirs").replace("/y')\n", "/y')\n except OSError: pass\n")
        code += f" if os.listdir({str(trap)!r}): break\n"
        assert naive_python(code, target).returncode == 0
    assert os.listdir(trap)


@pytest.mark.parametrize("link", ["../rootfs-evil", "/../rootfs-evil", "ABSOLUTE", "ABSOLUTE-NORMAL"])
def test_cve_2019_18837_a_root_whose_name_is_a_prefix(
    oci: Oci, bundle: Bundle, container_id: str, volume: Path, link: str
) -> None:
    """The neighbour of /b/rootfs is /b/rootfs-evil, whose name begins alike; a link leads there."""

    def mount(config: dict[str, Any]) -> None:
        config["mounts"].append(bind(volume, "/mnt/volume"))

    place = bundle("cat", "/mnt/volume/mark", edit=mount)
    evil = place / "rootfs-evil"
    evil.mkdir()
    absolute = {"ABSOLUTE": f"{place}/rootfs/../rootfs-evil", "ABSOLUTE-NORMAL": str(evil)}
    (place / "rootfs/mnt").symlink_to(absolute.get(link, link))
    assert os.path.realpath(place / "rootfs/mnt") in (str(evil), "/rootfs-evil"), "by path it leads out"
    assert runs(oci, place, container_id) == "volume\n"
    assert not os.listdir(evil)


@pytest.mark.parametrize("kind", ["file", "parent"])
def test_cve_2025_24965_a_file_is_made_through_a_link(
    oci: Oci, bundle: Bundle, container_id: str, volume: Path, outside: Path, kind: str
) -> None:
    """A file the runtime makes in the root, to mount on, is a link of the image that leads out; krun is not obeyed."""
    destination = "/etc/made" if kind == "file" else "/etc/dir/made"

    def mount(config: dict[str, Any]) -> None:
        config["mounts"].append(bind(volume / "mark", destination))
        config["annotations"] = {"run.oci.handler": "krun"}

    place = bundle("cat", destination, edit=mount)
    (place / "rootfs/.krun_config.json").symlink_to(outside / "krun")
    link = place / "rootfs" / ("etc/made" if kind == "file" else "etc/dir")
    link.symlink_to(outside / "file" if kind == "file" else outside)
    done = oci("run", "-b", place, container_id)
    if done.returncode:
        refused(done)
    else:
        assert done.stdout == "volume\n"
    assert not os.listdir(outside)


def no_dev_mount(config: dict[str, Any]) -> None:
    config["mounts"] = [mount for mount in config["mounts"] if not mount["destination"].startswith("/dev")]
    config["root"]["readonly"] = False


@pytest.mark.parametrize("kind", ["absolute", "relative", "dangling", "inside"])
def test_cve_2026_41579_dev_is_a_link(oci: Oci, bundle: Bundle, container_id: str, outside: Path, kind: str) -> None:
    """The image's /dev leads to the host: no device, no link (fd, stdin, ptmx) and no console is made there."""
    place = bundle("true", edit=no_dev_mount)
    up = "../" * 20
    target = {
        "absolute": str(outside),
        "relative": f"{up}{str(outside)[1:]}",
        "dangling": f"{outside}/missing",
        "inside": "/elsewhere",
    }[kind]
    (place / "rootfs/dev").rmdir()
    (place / "rootfs/dev").symlink_to(target)
    (place / "rootfs/elsewhere").mkdir()
    if kind != "dangling":
        assert os.path.realpath(place / "rootfs/dev") in (str(outside), "/elsewhere"), "by path it leads out"
    done = oci("run", "-b", place, container_id)
    if done.returncode:
        refused(done)
    elif kind == "inside":
        assert {"null", "fd", "ptmx"} <= set(os.listdir(place / "rootfs/elsewhere"))
    assert not os.listdir(outside) and not Path("/elsewhere").exists()


@pytest.mark.parametrize("name", ["null", "ptmx", "fd", "tty"])
def test_cve_2026_47766_and_2026_88265_an_entry_of_dev_is_a_link(
    oci: Oci, bundle: Bundle, container_id: str, outside: Path, name: str
) -> None:
    """The image's /dev/null is a link to a file: of the image, of the host. No file is made, opened or given away."""
    user = {"user": {"uid": 1000, "gid": 1000}}
    place = bundle("true", config={"process": user}, edit=no_dev_mount)
    inside = place / "rootfs/etc/shadow"
    inside.write_text("secret")
    before = inside.stat()
    entry = place / "rootfs/dev" / name
    for target in ("/etc/shadow", str(outside / "made")):
        entry.symlink_to(target)
        done = oci("run", "-b", place, container_id)
        if name in ("null", "tty"):
            assert f"/dev/{name}" in refused(done)
        after = inside.stat()
        assert (after.st_uid, after.st_mode, after.st_mtime_ns) == (before.st_uid, before.st_mode, before.st_mtime_ns)
        entry.unlink()
    assert not os.listdir(outside)


@pytest.mark.parametrize("kind", ["file", "fifo", "block device", "zero device"])
def test_cve_2026_88265_something_else_named_null(oci: Oci, bundle: Bundle, container_id: str, kind: str) -> None:
    """What the image has at /dev/null must be the null device in type and number, or the container is refused."""
    place = bundle("true", edit=no_dev_mount)
    entry = place / "rootfs/dev/null"
    if kind == "file":
        entry.write_text("")
    elif kind == "fifo":
        os.mkfifo(entry)
    elif kind == "block device":
        os.mknod(entry, 0o060666, os.makedev(1, 3))
    else:
        os.mknod(entry, 0o020666, os.makedev(1, 5))
    assert "/dev/null" in refused(oci("run", "-b", place, container_id))
    entry.unlink()
    os.mknod(entry, 0o020666, os.makedev(1, 3))
    oci("run", "-b", place, f"{container_id}-2", check=True)


@pytest.mark.parametrize("path", ["/..", "..", "/a/../..", "/a/../../.."])
def test_copying_never_goes_above_the_root(tmp_path: Path, path: str) -> None:
    """Of our own: `ovt cp` with a path that ends in `..`, which no descriptor of a directory stops by itself."""
    guest, host = tmp_path / "guest", tmp_path / "host"
    (guest / "a").mkdir(parents=True)
    (host / "from").mkdir(parents=True)
    (host / "from/file").touch()
    (tmp_path / "secret").touch()
    top, root = os.open("/", os.O_PATH), os.open(guest, os.O_PATH)
    try:
        copy.copy(copy.Side(root, path, "web:"), copy.Side(top, f"{host}/to", "to"), lambda uid, gid: (uid, gid))
        copy.copy(copy.Side(top, f"{host}/from", "from"), copy.Side(root, path, "web:"), lambda uid, gid: (uid, gid))
    finally:
        os.close(top)
        os.close(root)
    assert os.listdir(host / "to") == ["a"]
    assert sorted(os.listdir(guest)) == ["a", "from"] and sorted(os.listdir(tmp_path)) == ["guest", "host", "secret"]
