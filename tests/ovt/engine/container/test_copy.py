"""Copying between a host and a root directory that may be hostile, and the views of instances that it reads."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovt.engine.container import copy, view
from ovt.engine.container.copy import Side
from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError
from ovt.kernel import procfs

Copy = Callable[[str, str], None]


def keep_owner(uid: int, gid: int) -> tuple[int, int]:
    return uid, gid


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A guest's root; beside it `secret`, which nothing in it may reach."""
    (tmp_path / "guest").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("secret")
    (tmp_path / "host").mkdir()
    return tmp_path / "guest"


@pytest.fixture
def sides(guest: Path) -> Iterator[tuple[int, int]]:
    fds = os.open("/", os.O_PATH), os.open(guest, os.O_PATH)
    yield fds
    for fd in fds:
        os.close(fd)


@pytest.fixture
def into(sides: tuple[int, int], guest: Path) -> Copy:
    host = f"{guest.parent}/host"
    return lambda source, target: copy.copy(
        Side(sides[0], f"{host}/{source}", source), Side(sides[1], target, f"web:{target}"), keep_owner
    )


@pytest.fixture
def out(sides: tuple[int, int], guest: Path) -> Copy:
    host = f"{guest.parent}/host"
    return lambda source, target: copy.copy(
        Side(sides[1], source, f"web:{source}"), Side(sides[0], f"{host}/{target}", target), keep_owner, setid=False
    )


def tree(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"→ {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "dir"
        else:
            found[name] = path.read_text() if path.is_file() else "other"
    return found


# the rules of cp


@pytest.fixture
def host(guest: Path) -> Path:
    host = guest.parent / "host"
    (host / "file").write_text("content")
    (host / "dir/sub").mkdir(parents=True)
    (host / "dir/sub/a").write_text("a")
    (host / "dir/link").symlink_to("sub/a")
    (guest / "tmp").mkdir()
    return host


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("file", "/tmp", {"tmp/file": "content"}),
        ("file", "/tmp/", {"tmp/file": "content"}),
        ("file", "/tmp/new", {"tmp/new": "content"}),
        ("file", "/new", {"new": "content"}),
        ("dir", "/tmp", {"tmp/dir": "dir", "tmp/dir/sub/a": "a", "tmp/dir/link": "→ sub/a"}),
        ("dir", "/new", {"new": "dir", "new/sub/a": "a"}),
        ("dir/.", "/tmp", {"tmp/sub/a": "a", "tmp/link": "→ sub/a"}),
        ("dir/.", "/new", {"new/sub/a": "a"}),
    ],
)
def test_as_cp_does_it(host: Path, guest: Path, into: Copy, source: str, target: str, expected: dict[str, str]) -> None:
    into(source, target)
    assert expected.items() <= tree(guest).items()


def test_out_again(host: Path, guest: Path, into: Copy, out: Copy) -> None:
    into("dir", "/tmp")
    out("/tmp/dir", "back")
    assert tree(host / "back") == tree(host / "dir")
    out("/tmp/dir/sub/a", ".")
    assert (host / "a").read_text() == "a"


def test_modes_and_times(host: Path, guest: Path, into: Copy) -> None:
    os.chmod(host / "file", 0o4711)
    os.utime(host / "file", ns=(1, 2_000_000_001))
    os.chmod(host / "dir", 0o700)
    into("file", "/tmp")
    into("dir", "/tmp")
    made = (guest / "tmp/file").stat()
    assert (stat.S_IMODE(made.st_mode), made.st_mtime_ns) == (0o4711, 2_000_000_001)
    assert stat.S_IMODE((guest / "tmp/dir").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("source", "target", "error", "words"),
    [
        ("none", "/tmp", NotFound, "there is no none"),
        ("file", "/none/new", NotFound, "no directory for"),
        ("file", "/none/", NotFound, "no directory web:/none/"),
        ("file/", "/tmp", UsageError, "not a directory"),
        ("dir", "/file", Conflict, "not a directory"),
        ("file", "/file/new", OvtError, "no directory for"),
    ],
)
def test_what_cannot_be_copied(
    host: Path, guest: Path, into: Copy, source: str, target: str, error: type[Exception], words: str
) -> None:
    (guest / "file").write_text("")
    with pytest.raises(error, match=words):
        into(source, target)


def test_devices_and_sockets_are_left_out(host: Path, guest: Path, into: Copy) -> None:
    os.mkfifo(host / "dir/fifo")
    os.mknod(host / "dir/socket", stat.S_IFSOCK | 0o600)
    into("dir", "/tmp")
    assert set(os.listdir(guest / "tmp/dir")) == {"sub", "link", "fifo"}


# attacks


def test_a_link_does_not_lead_out_of_the_guest(host: Path, guest: Path, into: Copy, out: Copy) -> None:
    for target in (str(guest.parent / "secret"), "../secret", "../../../../../../../.." + str(guest.parent / "secret")):
        (guest / "way").symlink_to(target)
        with pytest.raises(NotFound):
            out("/way/key", "stolen")
        with pytest.raises(NotFound):
            into("file", "/way/key")
        (guest / "way").unlink()
    assert (guest.parent / "secret/key").read_text() == "secret"
    assert os.listdir(guest.parent / "secret") == ["key"]


def test_a_link_as_the_source_stays_a_link(host: Path, guest: Path, out: Copy) -> None:
    (guest / "way").symlink_to(guest.parent / "secret/key")
    out("/way", "copied")
    assert os.readlink(host / "copied") == str(guest.parent / "secret/key")


def test_a_link_as_the_target_is_replaced_and_not_followed(host: Path, guest: Path, into: Copy) -> None:
    (guest / "tmp/file").symlink_to("/tmp/elsewhere")
    into("file", "/tmp/")
    assert (guest / "tmp/file").read_text() == "content"
    assert not (guest / "tmp/elsewhere").exists()


def test_a_link_in_the_place_of_a_directory_is_refused(host: Path, guest: Path, into: Copy, out: Copy) -> None:
    (guest / "tmp/dir").symlink_to("/")
    with pytest.raises(HostError):
        into("dir", "/tmp")
    (guest / "src/dir").mkdir(parents=True)
    (guest / "src/dir/x").write_text("x")
    (host / "to").mkdir()
    (host / "to/dir").symlink_to(guest.parent / "secret")
    with pytest.raises(HostError):
        out("/src/dir", "to")
    assert os.listdir(guest.parent / "secret") == ["key"]


def test_a_fifo_swapped_in_does_not_block(guest: Path, host: Path, out: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    (guest / "file").write_text("x")
    real, looks = os.stat, []

    def swap(path: object, **options: object) -> os.stat_result:
        result: os.stat_result = real(path, **options)  # type: ignore[call-overload]
        if path == "file" and "dir_fd" in options:
            looks.append(path)
            if len(looks) == 2:  # the last look before it is opened
                (guest / "file").unlink()
                os.mkfifo(guest / "file")
        return result

    monkeypatch.setattr(copy.os, "stat", swap)
    out("/file", "copied")
    assert len(looks) == 2
    assert not (host / "copied").exists()


def test_no_set_id_program_comes_out(guest: Path, host: Path, out: Copy) -> None:
    (guest / "dir").mkdir()
    (guest / "dir/su").write_text("#!")
    (guest / "dir/su").chmod(0o6755)
    (guest / "dir").chmod(0o2755)
    out("/dir", "copied")
    assert stat.S_IMODE((host / "copied/su").stat().st_mode) == 0o755
    assert stat.S_IMODE((host / "copied").stat().st_mode) == 0o755


# views


@pytest.mark.root
def test_a_resting_instance_is_its_layers(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/base").write_text("base")
    for _ in range(2):
        fd = view.resting([str(tmp_path / "lower")], str(tmp_path / "upper"), str(tmp_path / "work"))
        assert "base" in os.listdir(f"/proc/self/fd/{fd}")
        Path(f"/proc/self/fd/{fd}/new").write_text("new")
        os.close(fd)
    assert os.listdir(tmp_path / "lower") == ["base"]
    assert os.listdir(tmp_path / "upper") == ["new"]
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.root
def test_layers_with_long_names_and_colons(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 200) / ("y:z" * 60)
    for name in ("lower", "upper", "work"):
        (long / name).mkdir(parents=True)
    (long / "lower/base").write_text("base")
    fd = view.resting([str(long / "lower")], str(long / "upper"), str(long / "work"))
    assert os.listdir(f"/proc/self/fd/{fd}") == ["base"]
    os.close(fd)


def test_an_overlay_is_named_by_descriptors_where_paths_do_not_do(tmp_path: Path) -> None:
    plain = view.overlay(["/lower", "/lower2"], "/upper", "/work")
    assert view.by_descriptor(plain) == plain
    for odd in (tmp_path / "a:b", tmp_path / ("x" * 150) / ("y" * 150)):
        for name in ("lower", "upper", "work"):
            (odd / name).mkdir(parents=True)
        made = view.by_descriptor(view.overlay([f"{odd}/lower"], f"{odd}/upper", f"{odd}/work", True))
        fds = [*made["lower"], made["upper"], made["work"]]
        assert [os.readlink(fd) for fd in fds] == [f"{odd}/lower", f"{odd}/upper", f"{odd}/work"]
        assert made["options"] == ["userxattr"]
        for fd in fds:
            os.close(int(fd.rpartition("/")[2]))


def test_a_living_process_is_checked_by_its_start_time() -> None:
    since = procfs.start_time(os.getpid()) or 0
    fd = view.living(os.getpid(), since)
    assert os.path.samestat(os.fstat(fd), os.stat("/"))
    os.close(fd)
    with pytest.raises(NotFound):
        view.living(os.getpid(), since + 1)
    with pytest.raises(NotFound):
        view.living(999_999_999, since)
