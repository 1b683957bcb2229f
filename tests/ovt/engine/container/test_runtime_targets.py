"""Where the mounts of real containers end up: files, directories, links, dangling links, places inside /proc."""

import os
from pathlib import Path

import pytest

from tests.conftest import Bundle, Oci
from tests.ovt.live import Create, bind, refused, wait_for, with_mounts

pytestmark = pytest.mark.root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "source"
    (place / "dir").mkdir(parents=True)
    (place / "dir/inner").write_text("inner\n")
    (place / "file").write_text("of the host\n")
    (place / "link").symlink_to("file")
    (place / "dangling").symlink_to("/nowhere/at/all")
    return place


def output(create: Create, place: Path) -> list[str]:
    container = create(place=place).start()
    wait_for(lambda: container.status == "stopped")
    return container.output().splitlines()


@pytest.mark.parametrize("destination", ["/new", "/new/deep/er", "/etc/./x/../passwd"])
def test_a_file_on_a_target_that_may_be_missing(create: Create, bundle: Bundle, source: Path, destination: str) -> None:
    place = bundle("cat", destination.replace("/./x/..", ""), edit=with_mounts(bind(source / "file", destination)))
    assert output(create, place) == ["of the host"]


def test_a_directory_on_a_target_that_is_missing(create: Create, bundle: Bundle, source: Path) -> None:
    place = bundle("cat", "/new/deep/inner", edit=with_mounts(bind(source / "dir", "/new/deep")))
    assert output(create, place) == ["inner"]


def test_a_source_relative_to_the_bundle(create: Create, bundle: Bundle) -> None:
    place = bundle("cat", "/mnt", edit=with_mounts(bind("beside", "/mnt")))
    (place / "beside").write_text("relative\n")
    assert output(create, place) == ["relative"]


def test_a_link_as_source_is_followed(create: Create, bundle: Bundle, source: Path) -> None:
    place = bundle("cat", "/mnt", edit=with_mounts(bind(source / "link", "/mnt")))
    assert output(create, place) == ["of the host"]


def test_src_nofollow_mounts_the_link_itself(create: Create, bundle: Bundle, source: Path) -> None:
    # a link can only cover a link: that of the image is not followed either
    mount = bind(source / "dangling", "/mnt", "src-nofollow", "dest-nofollow")
    place = bundle("readlink", "/mnt", edit=with_mounts(mount))
    (place / "rootfs/mnt").symlink_to("elsewhere")
    assert output(create, place) == ["/nowhere/at/all"]


def test_copy_symlink_makes_the_link_anew(create: Create, bundle: Bundle, source: Path) -> None:
    mounts = [bind(source / name, f"/made/{name}", "copy-symlink") for name in ("link", "dangling", "file")]
    script = "readlink /made/link; readlink /made/dangling; cat /made/file"
    place = bundle("sh", "-c", script, edit=with_mounts(*mounts))
    assert output(create, place) == ["file", "/nowhere/at/all", "of the host"]
    assert os.readlink(place / "rootfs/made/link") == "file"


def test_copy_symlink_where_the_same_link_is(create: Create, bundle: Bundle, source: Path) -> None:
    place = bundle("readlink", "/mnt", edit=with_mounts(bind(source / "link", "/mnt", "copy-symlink")))
    (place / "rootfs/mnt").symlink_to("file")
    assert output(create, place) == ["file"]


def test_copy_symlink_over_something_else(oci: Oci, bundle: Bundle, container_id: str, source: Path) -> None:
    place = bundle(edit=with_mounts(bind(source / "link", "/mnt", "copy-symlink")))
    (place / "rootfs/mnt").symlink_to("other")
    assert "file exists" in refused(oci("run", "-b", place, container_id))


def test_dest_nofollow_covers_the_link(create: Create, bundle: Bundle, source: Path) -> None:
    mount = bind(source / "link", "/mnt", "src-nofollow", "dest-nofollow")
    place = bundle("sh", "-c", "readlink /mnt; cat /target", edit=with_mounts(mount))
    (place / "rootfs/mnt").symlink_to("/target")
    (place / "rootfs/target").write_text("untouched\n")
    assert output(create, place) == ["file", "untouched"]


@pytest.mark.parametrize(("link", "real"), [("/data/real", "data/real"), ("../../../real", "real"), ("real", "real")])
def test_a_link_of_the_image_is_followed_in_the_root(
    create: Create, bundle: Bundle, source: Path, link: str, real: str
) -> None:
    place = bundle("cat", "/mnt/inner", edit=with_mounts(bind(source / "dir", "/mnt")))
    (place / "rootfs/mnt").symlink_to(link)
    (place / "rootfs" / real).mkdir(parents=True)
    assert output(create, place) == ["inner"]


@pytest.mark.parametrize("kind", ["dir", "file"])
@pytest.mark.parametrize("link", ["/fresh/real", "../../fresh/real"])
def test_a_dangling_link_of_the_image_says_where_to_make_it(
    create: Create, bundle: Bundle, source: Path, kind: str, link: str
) -> None:
    inner = "/mnt/inner" if kind == "dir" else "/mnt"
    place = bundle("cat", inner, edit=with_mounts(bind(source / kind, "/mnt")))
    (place / "rootfs/mnt").symlink_to(link)
    assert output(create, place) == ["inner" if kind == "dir" else "of the host"]
    assert (place / "rootfs/fresh/real").exists()


def test_a_link_on_the_way_is_followed_in_the_root(create: Create, bundle: Bundle, source: Path) -> None:
    place = bundle("cat", "/run/lock/new", edit=with_mounts(bind(source / "file", "/run/lock/new")))
    (place / "rootfs/run").symlink_to("/var/run")
    assert output(create, place) == ["of the host"]
    assert (place / "rootfs/var/run/lock/new").exists()


@pytest.mark.parametrize("name", ["sys", "1", "version"])
def test_nothing_is_mounted_inside_proc(oci: Oci, bundle: Bundle, container_id: str, source: Path, name: str) -> None:
    kind = "file" if name == "version" else "dir"
    place = bundle(edit=with_mounts(bind(source / kind, f"/proc/{name}")))
    message = refused(oci("run", "-b", place, container_id))
    assert f"/proc/{name} cannot be mounted because it is inside /proc" in message


def test_files_that_lxcfs_provides_may_be(create: Create, bundle: Bundle, source: Path) -> None:
    place = bundle("cat", "/proc/uptime", edit=with_mounts(bind(source / "file", "/proc/uptime")))
    assert output(create, place) == ["of the host"]


def test_mounts_are_made_in_their_order(create: Create, bundle: Bundle, source: Path) -> None:
    tmpfs = {"type": "tmpfs", "source": "none", "destination": "/mnt"}
    place = bundle("cat", "/mnt/inner", edit=with_mounts(tmpfs, bind(source / "dir/inner", "/mnt/inner")))
    assert output(create, place) == ["inner"]
    place = bundle("ls", "/mnt", edit=with_mounts(bind(source / "dir/inner", "/mnt/inner"), tmpfs))
    assert output(create, place) == []


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (bind("/no/such", "/mnt"), "mount /no/such to /mnt: no such file or directory"),
        ({"type": "nosuchfs", "source": "x", "destination": "/mnt"}, "mount x to /mnt: no such device"),
    ],
)
def test_what_cannot_be_mounted(
    oci: Oci, bundle: Bundle, container_id: str, mount: dict[str, object], words: str
) -> None:
    assert words in refused(oci("run", "-b", bundle(edit=with_mounts(mount)), container_id))


def test_a_directory_over_a_file(oci: Oci, bundle: Bundle, container_id: str, source: Path) -> None:
    place = bundle(edit=with_mounts(bind(source / "dir", "/etc/passwd")))
    assert "not a directory" in refused(oci("run", "-b", place, container_id))


def test_a_missing_rootfs(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle(config={"root": {"path": "nowhere"}})
    message = refused(oci("run", "-b", place, container_id))
    assert "$.root.path" in message and "nowhere: no such file or directory" in message
