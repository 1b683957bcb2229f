"""`--user` against /etc/passwd and /etc/group of an image, hostile ones too."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.engine.container import users
from ovt.engine.container.bundle import User
from ovt.errors import NotFound, OvtError, UsageError

PASSWD = """root:x:0:0:root:/root:/bin/sh
www:x:33:34:web:/srv:/bin/sh
12:x:40:41:a name of digits:/twelve:/bin/sh
nohome:x:50:50:::
torn
"""
GROUP = "root:x:0:\nwww:x:34:\nextra:x:60:other,www\nmore:x:61:www\nstaff:x:70:\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.fixture
def root(image: Path) -> Iterator[int]:
    fd = os.open(image, os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", User()),
        ("root", User()),
        ("0", User()),
        ("www", User(33, 34, (60, 61), "/srv")),
        ("33", User(33, 34, (60, 61), "/srv")),
        ("www:staff", User(33, 70, (), "/srv")),
        ("www:5", User(33, 5, (), "/srv")),
        ("1000", User(1000, 0, (), "/")),
        ("1000:1001", User(1000, 1001, (), "/")),
        ("12", User(12, 0, (), "/")),
        ("nohome", User(50, 50, (), "/")),
        ("4294967294", User(4294967294, 0, (), "/")),
    ],
)
def test_who_is_meant(root: int, text: str, expected: User) -> None:
    assert users.lookup(root, text) == expected


@pytest.mark.parametrize(
    "text", ["nobody", " 1", "+1", "-1", "1x", "0x1", "1_0", "１", "www:nogroup", "www:-1", "ro ot"]
)
def test_who_is_not_there(root: int, text: str) -> None:
    with pytest.raises(NotFound):
        users.lookup(root, text)


@pytest.mark.parametrize("text", [":", "www:", ":www", "4294967295", "99999999999"])
def test_what_cannot_be_meant(root: int, text: str) -> None:
    with pytest.raises(UsageError):
        users.lookup(root, text)


def test_an_image_without_the_files(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    assert users.lookup(fd, "5:6") == User(5, 6, (), "/")
    with pytest.raises(NotFound):
        users.lookup(fd, "www")
    os.close(fd)


def test_links_are_followed_inside_the_image_only(
    image: Path, root: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "passwd"
    outside.write_text("evil:x:0:0::/:/bin/sh\n")
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to(outside)
    with pytest.raises(NotFound):
        users.lookup(root, "evil")
    (image / "real").write_text(PASSWD)
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("/real")
    assert users.lookup(root, "www").uid == 33


def test_hostile_files(image: Path, root: int) -> None:
    (image / "etc/passwd").write_text("www:x:0x0:0::/:/bin/sh\n")
    with pytest.raises(OvtError, match="0x0"):
        users.lookup(root, "www")
    (image / "etc/passwd").write_text("a" * (users._LIMIT + 10))
    with pytest.raises(OvtError, match="longer"):
        users.lookup(root, "www")
    (image / "etc/passwd").unlink()
    os.mkfifo(image / "etc/passwd")
    with pytest.raises(NotFound):  # and does not wait for a writer
        users.lookup(root, "www")
