"""Subordinate ids, and functions run in a user namespace that maps them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ovt.errors import HostError, NotFound, OvtError
from ovt.kernel import userns


def test_ranges_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "subuid").write_text(
        "me:100:10\nyou:200:10\n1000:300:5\nme:x:10\nme:1\n\n# me:400:1\nme:-5:10\nme:500:20\n"
    )
    path = str(tmp_path / "subuid")
    assert userns.subordinate(path, "me", 1000) == [(100, 10), (300, 5), (500, 20)]
    assert userns.subordinate(path, "nobody", 65534) == []
    assert userns.subordinate(str(tmp_path / "none"), "me", 1000) == []


def test_root_inside_is_the_caller_outside() -> None:
    assert userns.mappings(1000, [(100000, 10), (300000, 5)]) == ((0, 1000, 1), (1, 100000, 10), (11, 300000, 5))


MAPS = ((0, 1000, 1), (1, 100000, 10))


@pytest.mark.root
def test_files_get_the_owners_that_are_mapped(tmp_path: Path) -> None:
    os.chown(tmp_path, 1000, 1000)
    for directory in (tmp_path.parent, tmp_path.parent.parent, tmp_path.parent.parent.parent):
        if directory != Path("/tmp") and directory != Path("/"):
            assert directory.stat().st_uid == 0
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)  # the way there is for root only

    def make() -> None:
        assert (os.getuid(), os.getgid()) == (0, 0)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.chown("file", 5, 6, dir_fd=fd)

    userns.run_mapped(MAPS, MAPS, make)
    os.close(fd)
    info = (tmp_path / "file").stat()
    assert (info.st_uid, info.st_gid) == (100004, 100005)


@pytest.mark.root
def test_failures_come_back() -> None:
    def not_found() -> None:
        raise NotFound("there is no such thing", "make one")

    def system() -> None:
        os.stat("/no/such/file")

    def other() -> None:
        raise ValueError("odd")

    with pytest.raises(NotFound, match="no such thing") as caught:
        userns.run_mapped(MAPS, MAPS, not_found)
    assert caught.value.hint == "make one"
    with pytest.raises(HostError, match="/no/such/file: No such file"):
        userns.run_mapped(MAPS, MAPS, system)
    with pytest.raises(OvtError, match="ValueError: odd"):
        userns.run_mapped(MAPS, MAPS, other)
    with pytest.raises(HostError, match="status"):
        userns.run_mapped(MAPS, MAPS, lambda: os._exit(3))


@pytest.mark.root
def test_mappings_that_the_kernel_refuses() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        userns.run_mapped(((0, 1000, 1), (0, 2000, 1)), MAPS, lambda: None)
