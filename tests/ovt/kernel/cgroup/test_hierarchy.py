"""Finding the hierarchies: parsing of /proc/self/mountinfo and /proc/self/cgroup, and nested roots."""

from pathlib import Path

from ovt.kernel.cgroup import hierarchy
from ovt.kernel.cgroup.hierarchy import Hierarchies, parse

V1 = """\
23 1 0:22 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
34 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
"""
V1_OWN = "4:memory:/user/a\n3:cpu,cpuacct:/\n1:name=systemd:/user/b\n"
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_v1_with_controllers_mounted_together() -> None:
    found = parse(V1, V1_OWN)
    assert found.mode == "v1"
    assert found.v1 == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory",
        "name=systemd": "/sys/fs/cgroup/systemd",
    }
    assert found.unified is None
    assert found.own_directory("memory") == "/user/a"
    assert found.own_directory("cpu") == ""


def test_hybrid_counts_as_v1() -> None:
    found = parse(V1 + UNIFIED, V1_OWN + "0::/x\n")
    assert found.mode == "v1"
    assert found.unified == "/sys/fs/cgroup/unified"
    assert found.own_directory("") == "/x"


def test_v2() -> None:
    found = parse(V2, "0::/user.slice/session\n")
    assert (found.mode, found.unified, found.v1) == ("v2", "/sys/fs/cgroup", {})
    assert found.own_directory("") == "/user.slice/session"


def test_v2_beside_a_bookkeeping_hierarchy_of_v1() -> None:
    only_named = V1.splitlines(keepends=True)[-1]
    assert parse(only_named + V2, "1:name=systemd:/\n0::/\n").mode == "v2"


def test_a_mount_over_the_others_hides_them() -> None:
    found = parse(V1 + UNIFIED + "70 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", V1_OWN + "0::/\n")
    assert (found.mode, found.unified, found.v1) == ("v2", "/sys/fs/cgroup", {})


def test_no_cgroup_file_system() -> None:
    assert parse("23 1 0:22 / / rw - ext4 /dev/vda rw\n", "").mode == "none"


def test_a_mount_of_a_subtree_shortens_the_own_path() -> None:
    nested = parse("31 23 0:28 /docker/c1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/docker/c1/app\n")
    assert nested.own_directory("") == "/app"


def test_the_mounted_cgroup_itself_is_the_mount() -> None:
    nested = parse("31 23 0:28 /docker/c1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/docker/c1\n")
    assert nested.own_directory("") == ""


def test_a_mount_from_outside_the_cgroup_namespace() -> None:
    foreign = parse("31 23 0:28 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/\n")
    assert foreign.own_directory("") == ""


def test_a_bind_mount_elsewhere_is_not_taken() -> None:
    elsewhere = "60 1 0:30 /x /var/lib/root/memory rw - cgroup cgroup rw,memory\n"
    for text in (elsewhere + V1, V1 + elsewhere):
        assert parse(text, V1_OWN).v1["memory"] == "/sys/fs/cgroup/memory"


def test_spaces_in_a_mount_point() -> None:
    assert parse(r"31 23 0:28 / /mnt/my\040cgroup rw - cgroup2 cgroup2 rw" + "\n", "0::/\n").unified == "/mnt/my cgroup"


def test_a_truncated_line_is_ignored() -> None:
    assert parse("31 23 - cgroup2\n" + V2, "0::/\n").unified == "/sys/fs/cgroup"


def test_this_machine_is_read_once(monkeypatch: object) -> None:
    hierarchy.forget()
    first = hierarchy.current()
    assert first.mode in ("v1", "v2")
    assert hierarchy.current() is first
    whole = parse(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    assert (first.v1, first.unified, first.own) == (whole.v1, whole.unified, whole.own)


def test_hierarchies_are_empty_by_default() -> None:
    assert Hierarchies().mode == "none"
