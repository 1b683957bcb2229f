"""Rules of the unified hierarchy that only a kernel has: also a hybrid host's cgroup2 mount, whatever is in it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.hierarchy import current
from ovt.kernel.cgroup.v2 import V2

from .conftest import Child

pytestmark = [pytest.mark.root, pytest.mark.twice]

SOURCE = str(Path(cgroup.__file__).parents[3])


@pytest.fixture
def mount() -> str:
    found = current().unified
    if found is None:
        pytest.skip("needs a cgroup2 mount")
    return found


@pytest.fixture
def controller(mount: str) -> str:
    """A controller of the mount that follows the rule of no internal processes."""
    there = Path(mount, "cgroup.controllers").read_text().split()
    for name in ("memory", "io", "hugetlb", "rdma", "misc"):
        if name in there:
            return name
    pytest.skip("needs a domain controller in the cgroup2 mount")


@pytest.fixture
def box(mount: str, place: str) -> V2:
    made = V2(mount, place + "/box")
    made.create()
    return made


FILES = {"memory": "memory.max", "io": "io.max", "hugetlb": "hugetlb.2MB.max", "rdma": "rdma.max", "misc": "misc.max"}


def test_controllers_are_on(box: V2, controller: str) -> None:
    assert controller in Path(box.directory, "cgroup.controllers").read_text().split()


def test_a_controller_kept_back_by_a_process_above(
    mount: str, place: str, controller: str, child: Callable[..., Child]
) -> None:
    stranger = child()
    above = V2(mount, place + "/above")
    above.create()
    above.attach(stranger.pid)
    below = V2(mount, place + "/above/box")
    below.create()
    assert Path(below.directory, "cgroup.type").read_text() == "domain\n"
    with pytest.raises(HostError) as caught:
        below.apply({"unified": {FILES[controller]: "max"}}, update=True)
    assert f"the requested cgroup controller `{controller}` is not available" in str(caught.value)
    assert f"{above.directory} holds processes itself" in str(caught.value)
    assert "no internal processes" in caught.value.hint


def test_a_controller_that_becomes_possible_later_is_enabled_by_apply(
    mount: str, place: str, controller: str, child: Callable[..., Child]
) -> None:
    stranger = child()
    above = V2(mount, place + "/above")
    above.create()
    above.attach(stranger.pid)
    below = V2(mount, place + "/above/box")
    below.create()
    stranger.close()
    if controller in ("hugetlb", "memory"):
        below.apply({"unified": {FILES[controller]: "max"}}, update=True)
        assert Path(below.directory, FILES[controller]).read_text().startswith("max")


def test_a_controller_that_does_not_exist(box: V2, mount: str) -> None:
    with pytest.raises(HostError, match=rf"controller `foo` is not available under {mount}$"):
        box.apply({"unified": {"foo.bar": "x"}}, update=True)


def test_an_exec_follows_an_init_that_closed_the_cgroup(box: V2, controller: str, child: Callable[..., Child]) -> None:
    init, exec_ = child(), child()
    inner = Path(box.directory, "init.scope")
    inner.mkdir()
    (inner / "cgroup.procs").write_text(str(init.pid))
    Path(box.directory, "cgroup.subtree_control").write_text("+" + controller)
    with pytest.raises(HostError, match=r"so it may hold no process itself"):
        box.attach(exec_.pid)
    box.attach(exec_.pid, init=init.pid)
    assert sorted(map(int, (inner / "cgroup.procs").read_text().split())) == sorted([init.pid, exec_.pid])
    assert box.pids() == sorted([init.pid, exec_.pid])


def test_below_a_threaded_cgroup(mount: str, place: str, child: Callable[..., Child]) -> None:
    process = child()
    top = V2(mount, place)
    top.create()
    top.attach(process.pid)
    Path(top.directory, "threads").mkdir()
    Path(top.directory, "threads/cgroup.type").write_text("threaded")
    box = V2(mount, place + "/threads/box")
    box.create()
    assert Path(box.directory, "cgroup.type").read_text() == "domain invalid\n"
    box.attach(process.pid)
    assert Path(box.directory, "cgroup.type").read_text() == "threaded\n"
    assert f"{place}/threads/box" in Path(f"/proc/{process.pid}/cgroup").read_text()
    assert top.pids() == [process.pid]


def test_threaded_by_configuration(mount: str, place: str) -> None:
    os.mkdir(mount + place)
    box = V2(mount, place + "/box")
    box.adopt()  # without domain controllers, which a threaded cgroup cannot have
    box.apply({"unified": {"cgroup.type": "threaded"}}, update=True)
    assert Path(box.directory, "cgroup.type").read_text() == "threaded\n"


CLONE = """
sys.path.insert(0, sys.argv[1])
from struct import pack
from ovt.kernel.cgroup.v2 import V2
from ovt.kernel.syscalls import syscall, CLONE_INTO_CGROUP
fd = V2(sys.argv[2], sys.argv[3]).fd()
args = pack('QQQQQQQQQQQ', CLONE_INTO_CGROUP, 0, 0, 0, 17, 0, 0, 0, 0, 0, fd)
if not syscall(435, args, len(args)):
    os.write(1, open('/proc/self/cgroup').read().splitlines()[-1].encode())
    os._exit(0)
os.wait()
"""


def test_a_process_is_born_in_the_cgroup(box: V2, mount: str, child: Callable[..., Child]) -> None:
    process = child(CLONE, SOURCE, mount, box.directory[len(mount) :])
    assert process.go().endswith(box.directory[len(mount) :])


def test_freezing_and_killing(box: V2, child: Callable[..., Child]) -> None:
    process = child()
    box.attach(process.pid)
    box.freeze()
    assert "frozen 1" in Path(box.directory, "cgroup.events").read_text()
    box.thaw()
    assert "frozen 0" in Path(box.directory, "cgroup.events").read_text()
    box.kill(0)
    assert not box.frozen()
    box.freeze()
    box.kill(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not box.frozen()
    Path(box.directory, "a/b").mkdir(parents=True)
    box.remove()
    assert not Path(box.directory).exists()


DELEGATED = """
os.setgid(65534); os.setuid(65534)
os.mkdir(sys.argv[1] + '/own')
open(sys.argv[1] + '/own/cgroup.procs', 'w').write('0')
print(open('/proc/self/cgroup').read().splitlines()[-1].rpartition('/')[2])
try:
    open(sys.argv[1] + '/cgroup.freeze', 'w')
except PermissionError:
    print('but not what limits it')
"""


def test_a_delegated_cgroup_may_be_divided_but_not_widened(box: V2, child: Callable[..., Child]) -> None:
    process = child(DELEGATED, box.directory)
    box.attach(process.pid)
    box.delegate(65534, 65534)
    assert process.go().splitlines() == ["own", "but not what limits it"]


def test_a_cgroup_below_is_given_away(box: V2, child: Callable[..., Child]) -> None:
    process = child()
    box.attach(process.pid)
    box.delegate(65534, 65533, "guest/inner")
    box.attach(process.pid, sub="guest/inner")
    owners = [(os.stat(box.directory + path).st_uid, os.stat(box.directory + path).st_gid) for path in _PLACES]
    assert owners == [(0, 0), (0, 0), (65534, 65533), (65534, 65533), (0, 0)]
    assert box.pids() == [process.pid]


_PLACES = ("", "/guest", "/guest/inner", "/guest/inner/cgroup.procs", "/guest/inner/cgroup.freeze")


def test_everything_imports_only_what_the_hot_path_may() -> None:
    import subprocess

    listed = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _HOT, SOURCE], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(listed) <= {
        "__future__", "errno", "_struct", "_socket", "_ctypes", "fcntl", "math", "select",
    }  # fmt: skip


_HOT = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
from ovt.kernel import cgroup
from ovt.kernel.cgroup import limits_v1, limits_v2, devices
group = cgroup.new('/ovt/none', 'none')
limits_v1.plan({'memory': {'limit': 5}, 'pids': {'limit': 3}, 'cpu': {'shares': 3}})
devices.rules([{'allow': False}])
cgroup.restore(group.record()).pids()
heavy = {'ovt.kernel.cgroup.' + name for name in ('stats', 'events', 'systemd', 'dbus', 'ebpf', 'gvariant')}
assert not heavy & set(sys.modules)
print(*[name for name in set(sys.modules) - before if not name.startswith('ovt')])
"""


def test_no_descriptor_is_left(box: V2, child: Callable[..., Child]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    process = child()
    during = len(os.listdir("/proc/self/fd"))
    box.attach(process.pid)
    box.apply({"pids": {"limit": 0}})
    box.freeze()
    box.thaw()
    os.close(box.fd())
    box.kill()
    process.wait()
    box.remove()
    assert len(os.listdir("/proc/self/fd")) == during
    process.close()
    assert len(os.listdir("/proc/self/fd")) == before
