"""Mount options, propagation, tmpfs, id-mapped mounts, masked and read-only paths of real containers."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.ovt.live import WAITING, Create, Run, bind, namespaces, refused, wait_for, with_mounts

pytestmark = pytest.mark.root
MAPS: dict[str, Any] = {
    "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
}


def line_of(info: str, point: str) -> list[str]:
    return next(line.split() for line in reversed(info.splitlines()) if line.split()[4] == point)


def flags(info: str, point: str) -> set[str]:
    """The options of the mount at `point`, from a mountinfo."""
    return set(line_of(info, point)[5].split(","))


def peers(info: str, point: str) -> list[str]:
    """Its propagation: of shared, master, unbindable."""
    optional = line_of(info, point)[6:]
    return [word.split(":")[0] for word in optional[: optional.index("-")]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host with a file in it."""
    place = tmp_path / "source"
    place.mkdir()
    (place / "file").write_text("of the host\n")
    return place


@pytest.fixture
def nested(source: Path) -> Iterator[Path]:
    """A directory of the host with a tmpfs mounted below it."""
    (source / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "below"], check=True)
    (source / "below/deep").write_text("deep\n")
    yield source
    subprocess.run(["umount", "-l", source / "below"], check=True)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A mount of the host in a peer group of its own."""
    place = tmp_path / "shared"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    subprocess.run(["mount", "--make-shared", place], check=True)
    (place / "point").mkdir()
    yield place
    subprocess.run(["umount", "-l", "-R", place], check=True)


@pytest.mark.parametrize(
    ("option", "present", "absent"),
    [
        ("ro", "ro", "rw"),
        ("nosuid", "nosuid", ""),
        ("nodev", "nodev", ""),
        ("noexec", "noexec", ""),
        ("nodiratime", "nodiratime", ""),
        ("noatime", "noatime", "relatime"),
        ("relatime", "relatime", "noatime"),
        ("strictatime", "rw", "relatime"),
        ("nosymfollow", "nosymfollow", ""),
    ],
)
def test_option(run: Run, option: str, present: str, absent: str) -> None:
    mount = {"type": "tmpfs", "source": "none", "destination": "/mnt", "options": [option]}
    found = flags(run("cat", "/proc/self/mountinfo", edit=with_mounts(mount)), "/mnt")
    assert present in found and absent not in found, found


@pytest.mark.parametrize("option", ["size=64k", "mode=711", "uid=12", "nr_inodes=7", "sync"])
def test_option_of_the_filesystem(run: Run, option: str) -> None:
    mount = {"type": "tmpfs", "source": "none", "destination": "/mnt", "options": [option]}
    line = line_of(run("cat", "/proc/self/mountinfo", edit=with_mounts(mount)), "/mnt")
    assert option in line[-1].split(",")


@pytest.mark.parametrize("word", ["suid", "dev", "exec", "rw", "diratime", "symfollow", "atime"])
def test_the_later_of_two_contrary_options_wins(run: Run, word: str) -> None:
    contrary = "ro" if word == "rw" else f"no{word}"
    mount = {"type": "tmpfs", "source": "none", "destination": "/mnt", "options": [contrary, word]}
    found = flags(run("cat", "/proc/self/mountinfo", edit=with_mounts(mount)), "/mnt")
    assert contrary not in found and (word not in ("rw",) or "rw" in found)


def test_an_option_the_filesystem_does_not_know(oci: Oci, bundle: Bundle, container_id: str) -> None:
    mount = {"type": "tmpfs", "source": "none", "destination": "/mnt", "options": ["colour=blue"]}
    message = refused(oci("run", "-b", bundle(edit=with_mounts(mount)), container_id))
    assert "/mnt" in message and "invalid argument" in message and "Unknown parameter 'colour'" in message


@pytest.mark.parametrize("word", ["ro", "nosuid", "nodev", "noexec", "noatime", "nosymfollow"])
def test_recursive_option(run: Run, nested: Path, word: str) -> None:
    info = run("cat", "/proc/self/mountinfo", edit=with_mounts(bind(nested, "/mnt", "rbind", f"r{word}")))
    assert word in flags(info, "/mnt") and word in flags(info, "/mnt/below")


def test_ro_alone_is_not_recursive(run: Run, nested: Path) -> None:
    info = run("cat", "/proc/self/mountinfo", edit=with_mounts(bind(nested, "/mnt", "rbind", "ro")))
    assert "ro" in flags(info, "/mnt") and "ro" not in flags(info, "/mnt/below")


def test_bind_without_r_leaves_out_what_is_below(run: Run, nested: Path) -> None:
    assert run("ls", "/mnt/below", edit=with_mounts(bind(nested, "/mnt"))) == ""
    assert run("ls", "/mnt/below", edit=with_mounts(bind(nested, "/mnt", "rbind"))) == "deep"


def test_remount(run: Run, source: Path) -> None:
    again = {"type": "bind", "destination": "/mnt", "source": "none", "options": ["bind", "remount", "ro"]}
    info = run("cat", "/proc/self/mountinfo", edit=with_mounts(bind(source, "/mnt"), again))
    assert "ro" in flags(info, "/mnt")


@pytest.mark.parametrize(
    ("options", "field"),
    [(("private",), []), (("slave",), ["master"]), (("rslave",), ["master"]), (("shared",), ["shared"]),
     (("rshared",), ["shared"]), (("unbindable",), ["unbindable"]), (("slave", "shared"), ["shared", "master"])],
)  # fmt: skip
def test_propagation_of_a_mount(run: Run, shared: Path, options: tuple[str, ...], field: list[str]) -> None:
    root = {"linux": {"rootfsPropagation": "shared"}} if "shared" in "".join(options) else {}
    info = run("cat", "/proc/self/mountinfo", config=root, edit=with_mounts(bind(shared, "/mnt", *options)))
    assert peers(info, "/mnt") == field


@pytest.mark.parametrize(
    ("kind", "field"),
    [("private", ""), ("rprivate", ""), ("slave", "master"), ("rslave", "master"), ("shared", "shared"),
     ("rshared", "shared"), ("unbindable", "unbindable"), ("runbindable", "unbindable")],
)  # fmt: skip
def test_propagation_of_the_root(create: Create, bundle: Bundle, shared: Path, kind: str, field: str) -> None:
    config: dict[str, Any] = {"linux": {"rootfsPropagation": kind}}
    place = bundle("cat", "/proc/self/mountinfo", config=config)
    target = shared / "bundle"
    subprocess.run(["cp", "-a", place, target], check=True)
    container = create(place=target).start()
    wait_for(lambda: container.status == "stopped")
    assert peers(container.output(), "/")[:1] == ([field] if field else [])


def test_a_mount_of_the_host_arrives_in_a_slave(create: Create, shared: Path) -> None:
    container = create(*WAITING, edit=with_mounts(bind(shared, "/mnt", "rbind", "rslave"))).start()
    subprocess.run(["mount", "-t", "tmpfs", "none", shared / "point"], check=True)
    (shared / "point/late").write_text("")
    assert container.ask("ls", "/mnt/point") == "late"


def test_what_the_container_mounts_stays_inside(create: Create, shared: Path) -> None:
    admin = ["CAP_SYS_ADMIN"]
    capabilities = dict.fromkeys(("bounding", "effective", "permitted"), admin)
    container = create(
        *WAITING, config={"process": {"capabilities": capabilities}}, edit=with_mounts(bind(shared, "/mnt", "rbind"))
    ).start()
    container.ask("mount", "-t", "tmpfs", "none", "/mnt/point")
    assert not os.path.ismount(shared / "point")


@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o700, 0o2750])
def test_a_tmpfs_has_the_mode_it_hides(create: Create, bundle: Bundle, mode: int) -> None:
    tmpfs = {"type": "tmpfs", "source": "none", "destination": "/tmp"}
    other = {"type": "tmpfs", "source": "none", "destination": "/var", "options": ["mode=711"]}
    place = bundle("stat", "-c", "%a", "/tmp", "/var", edit=with_mounts(tmpfs, other))
    (place / "rootfs/tmp").chmod(mode)
    container = create(place=place).start()
    wait_for(lambda: container.status == "stopped")
    assert container.output().split() == [f"{mode:o}", "711"]


def test_tmpcopyup(create: Create, bundle: Bundle) -> None:
    mount = {"type": "tmpfs", "source": "none", "destination": "/data", "options": ["tmpcopyup"]}
    script = "cat /data/file; stat -c '%a %u' /data /data/file /data/dir; readlink /data/link; touch /data/new"
    place = bundle("sh", "-c", script, edit=with_mounts(mount))
    data = place / "rootfs/data"
    (data / "dir").mkdir(parents=True)
    (data / "dir").chmod(0o1777)
    (data / "file").write_text("copied\n")
    (data / "file").chmod(0o604)
    os.chown(data / "file", 5, 5)
    (data / "link").symlink_to("file")
    data.chmod(0o711)
    container = create(place=place).start()
    wait_for(lambda: container.status == "stopped")
    assert container.output().split("\n") == ["copied", "711 0", "604 5", "1777 0", "file", ""]
    assert not (data / "new").exists()


def test_id_mapped_by_the_mounts_own_mappings(run: Run, source: Path) -> None:
    mappings = {
        "uidMappings": [{"containerID": 0, "hostID": 7000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 8000, "size": 10}],
    }
    out = run("stat", "-c", "%u %g", "/mnt/file", edit=with_mounts(bind(source, "/mnt", **mappings)))
    assert out == "7000 8000"


def test_id_mapped_by_the_container(run: Run, source: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        namespaces(config, user="")
        config["linux"] |= MAPS
        config["mounts"] += [bind(source, "/tmp"), bind(source, "/var", "idmap")]

    assert run("stat", "-c", "%u", "/tmp/file", "/var/file", edit=edit).split() == ["65534", "0"]


def test_id_mapped_in_the_words_of_crun(run: Run, source: Path) -> None:
    mount = bind(source, "/mnt", "idmap=uids=0-1000-10;gids=0-2000-10")
    assert run("stat", "-c", "%u %g", "/mnt/file", edit=with_mounts(mount)) == "1000 2000"


def test_an_id_mapped_tmpfs(run: Run) -> None:
    options = ["mode=777", "idmap=uids=0-1000-10;gids=0-2000-10"]
    mount = {"type": "tmpfs", "source": "none", "destination": "/mnt", "options": options}
    user = {"process": {"user": {"uid": 1003, "gid": 2004}}}
    out = run(
        "sh", "-c", "stat -c %u:%g /mnt; touch /mnt/x; stat -c %u:%g /mnt/x", config=user, edit=with_mounts(mount)
    )
    assert out.split() == ["1000:2000", "1003:2004"]


def test_a_filesystem_that_cannot_be_id_mapped(oci: Oci, bundle: Bundle, container_id: str) -> None:
    options = ["idmap=uids=0-1000-10;gids=0-2000-10"]
    mount = {"type": "sysfs", "source": "sysfs", "destination": "/mnt", "options": options}
    assert "invalid argument" in refused(oci("run", "-b", bundle(edit=with_mounts(mount)), container_id))


def test_id_mapped_recursively(run: Run, nested: Path) -> None:
    once = bind(nested, "/once", "rbind", "idmap=uids=0-1000-10;gids=0-1000-10")
    every = bind(nested, "/every", "rbind", "ridmap=uids=0-1000-10;gids=0-1000-10")
    out = run("stat", "-c", "%u", "/once/file", "/once/below/deep", "/every/below/deep", edit=with_mounts(once, every))
    assert out.split() == ["1000", "0", "1000"]


def test_idmap_without_any_mapping_is_refused(oci: Oci, bundle: Bundle, container_id: str, source: Path) -> None:
    place = bundle(edit=with_mounts(bind(source, "/mnt", "idmap")))
    assert "idmap needs uidMappings" in refused(oci("run", "-b", place, container_id))


def test_read_only_root(run: Run) -> None:
    config = {"root": {"readonly": True}}
    assert run("sh", "-c", "touch /new 2>&1 || echo refused", config=config).endswith("refused")
    assert run("sh", "-c", "touch /new && echo made", config={"root": {"readonly": False}}) == "made"


@pytest.mark.parametrize("flag", [(), ("--no-pivot",)])
def test_the_old_root_is_out_of_reach(run: Run, flag: tuple[str, ...]) -> None:
    out = run("sh", "-c", "ls /; ls /..; cat /proc/self/mountinfo", flags=flag)
    assert "bin\ndev\netc\nproc\nroot\nsys\ntmp\nvar" in out and "/usr" not in out.split(" - ")[0]


def test_exec_after_no_pivot(create: Create) -> None:
    container = create(*WAITING, flags=("--no-pivot",)).start()
    assert container.ask("ls", "/").split()[:3] == ["bin", "dev", "etc"]


def test_masked_paths(run: Run, source: Path) -> None:
    paths = ["/hide/file", "/hide/dir", "/hide/dir2", "/hide/missing", "/proc/kcore"]
    for name in ("dir", "dir2"):
        (source / name).mkdir()
        (source / name / "secret").write_text("")
    script = "cat /hide/file; ls /hide/dir /hide/dir2; touch /hide/dir/x || touch /hide/dir2/x || echo read-only"
    out = run("sh", "-c", f"({script}) 2>/dev/null", config={"linux": {"maskedPaths": paths}},
              edit=with_mounts(bind(source, "/hide")))  # fmt: skip
    assert "secret" not in out and "of the host" not in out and out.endswith("read-only")


def test_readonly_paths(run: Run, nested: Path) -> None:
    paths = ["/data/file", "/data/below", "/data/missing"]
    script = "echo x > /data/file; touch /data/below/x; touch /data/made && cat /data/file"
    out = run("sh", "-c", f"({script}) 2>/dev/null", config={"linux": {"readonlyPaths": paths}},
              edit=with_mounts(bind(nested, "/data", "rbind")))  # fmt: skip
    assert out == "of the host" and not (nested / "below/x").exists()
