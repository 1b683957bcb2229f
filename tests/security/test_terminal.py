"""Attacks by what the image has in the place of terminals, of /etc/passwd and of other things the runtime opens."""

import array
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.security.conftest import Create, refused, runs, wait_for

pytestmark = pytest.mark.root

TERMINAL = {"process": {"terminal": True}, "root": {"readonly": False}}


class ConsoleSocket:
    """Takes terminals as conmon and containerd do: the masters that came in, by descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.masters: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                channel = self._socket.accept()[0]
            except OSError:
                return
            fds = array.array("i")
            for _, _, raw in channel.recvmsg(256, 64)[1]:
                fds.frombytes(raw)
            self.masters += fds
            channel.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        for fd in self.masters:
            os.close(fd)


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ConsoleSocket]:
    there = ConsoleSocket(tmp_path / "console")
    yield there
    there.close()


def no_dev_mount(config: dict[str, Any]) -> None:
    """/dev is the image's own, with a devpts in it."""
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/dev"]


def no_devpts(config: dict[str, Any]) -> None:
    config["mounts"] = [mount for mount in config["mounts"] if not mount["destination"].startswith("/dev")]


@pytest.mark.parametrize("target", ["/dev/pts/0", "/etc/decoy", "/dev/missing"])
def test_cve_2025_52565_and_2026_88264_console_is_a_link(
    oci: Oci, bundle: Bundle, container_id: str, console: ConsoleSocket, target: str
) -> None:
    """The image's /dev/console is a link: nothing is mounted on what it points to."""
    place = bundle("true", config=TERMINAL, edit=no_dev_mount)
    (place / "rootfs/etc/decoy").write_text("decoy")
    (place / "rootfs/dev/pts").mkdir()
    (place / "rootfs/dev/console").symlink_to(target)
    arguments = ["create", "-b", place, "--console-socket", console.path]
    assert "console" in refused(oci(*arguments, container_id))
    assert (place / "rootfs/etc/decoy").read_text() == "decoy" and not console.masters
    # without the link the same image gets its console
    (place / "rootfs/dev/console").unlink()
    oci(*arguments, f"{container_id}-2", check=True)
    oci("delete", "--force", f"{container_id}-2", check=True)
    wait_for(lambda: console.masters)


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "host ptmx", "other device"])
def test_cve_2025_52565_ptmx_is_something_else(
    oci: Oci, bundle: Bundle, container_id: str, console: ConsoleSocket, kind: str
) -> None:
    """No devpts, but an image's own /dev/pts/ptmx and /dev/ptmx. Nothing but a multiplexer is opened at all."""
    place = bundle("true", config=TERMINAL, edit=no_devpts)
    pts = place / "rootfs/dev/pts"
    pts.mkdir()
    opened = []
    waiting: threading.Thread | None = None
    for ptmx in (pts / "ptmx", place / "rootfs/dev/ptmx"):
        if kind == "link":
            ptmx.symlink_to("/etc/passwd")
        elif kind == "file":
            ptmx.write_text("")
        elif kind == "fifo":
            os.mkfifo(ptmx)
        elif kind == "host ptmx":
            os.mknod(ptmx, 0o020666, os.makedev(5, 2))
        else:
            os.mknod(ptmx, 0o020666, os.makedev(10, 130))  # a watchdog: opening it is the attack
    if kind == "fifo":
        waiting = threading.Thread(target=lambda: opened.append(os.open(pts / "ptmx", os.O_WRONLY)))
        waiting.start()
    message = refused(oci("create", "-b", place, "--console-socket", console.path, container_id))
    assert "ptmx" in message
    if waiting:
        assert not opened, "the runtime opened the image's FIFO"
        fd = os.open(pts / "ptmx", os.O_RDONLY)
        waiting.join()
        os.close(fd)
        os.close(opened[0])
    assert not console.masters


def test_the_password_file_is_something_else(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """Of our own: HOME is looked up in the image's /etc/passwd, which is opened only if it is a regular file."""
    place = bundle("sh", "-c", "echo $HOME")
    passwd = place / "rootfs/etc/passwd"
    assert runs(oci, place, container_id) == "/root\n"
    passwd.unlink()
    os.mkfifo(passwd)
    opened: list[int] = []
    writer = threading.Thread(target=lambda: opened.append(os.open(passwd, os.O_WRONLY)))
    writer.start()
    assert runs(oci, place, f"{container_id}-2") == "/\n"
    assert not opened, "the runtime opened the image's FIFO"
    reader = os.open(passwd, os.O_RDONLY)
    writer.join()
    os.close(reader)
    os.close(opened[0])
    passwd.unlink()
    secret = place / "secret"
    secret.write_text("root:x:0:0::/leaked:/bin/sh\n")
    passwd.symlink_to(secret)
    assert runs(oci, place, f"{container_id}-3") == "/\n"


def test_the_password_file_is_huge_or_odd(oci: Oci, create: Create, bundle: Bundle) -> None:
    """Of our own: no more than a megabyte is read, bytes that are no text and fields that are missing do no harm."""
    place = bundle("sleep", "60")
    container = create(place).start()
    for content, home in [
        (b"x" * (3 << 20) + b"\nroot:x:0:0::/late:/bin/sh\n", "/"),
        (b"\xff\xfe:x:1:1\nroot:x:0\nroot:x:0:0::/odd\xff:\n", "/odd\ufffd"),
        (b"root:x:0:0::/one\0two:/bin/sh\n", "/one"),
        (b"", "/"),
    ]:
        (place / "rootfs/etc/passwd").write_bytes(content)
        assert oci("exec", container.id, "sh", "-c", "echo $HOME", check=True).stdout == f"{home}\n"
