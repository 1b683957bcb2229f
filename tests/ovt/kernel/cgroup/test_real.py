"""The hierarchies of this machine: making, joining, freezing, killing, removing."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.errors import HostError
from ovt.kernel import cgroup
from ovt.kernel.cgroup.base import remove_tree
from ovt.kernel.cgroup.hierarchy import current

from .conftest import Child

pytestmark = [pytest.mark.root, pytest.mark.twice]


def test_a_life(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    first, second = child(), child()
    group.attach(first.pid)
    group = cgroup.restore(group.record())
    group.attach(second.pid)
    assert group.pids() == sorted([first.pid, second.pid])
    assert Path(f"/proc/{first.pid}/cgroup").read_text().count("/box") == len(set(directories(group)))
    group.kill()
    assert (first.wait(), second.wait()) == (-9, -9)
    group.remove()
    assert not any(Path(directory).exists() for directory in directories(group))
    group.remove()


def directories(group: cgroup.Cgroup) -> list[str]:
    return list(dict.fromkeys(group.record()["paths"].values()))


def test_freezing_and_killing_while_frozen(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    counter = child("n = 0\nwhile True:\n    n += 1; print(n, flush=True)")
    group.attach(counter.pid)
    counter.start()
    counter.line()
    group.freeze()
    assert group.frozen()
    group.freeze()
    stat = Path(f"/proc/{counter.pid}/stat")
    before = stat.read_text().split()[13:15]
    time.sleep(0.1)
    assert stat.read_text().split()[13:15] == before
    group.kill(signal.SIGUSR1)
    # on v2 a signal that ends a process does so while it is frozen, on v1 once it is thawed
    assert group.frozen() and (group.mode == "v2" or counter.process.poll() is None)
    group.kill(signal.SIGKILL)
    assert counter.wait() in (-signal.SIGKILL, -signal.SIGUSR1)
    assert not group.frozen()
    group.remove()


def test_thawing_lets_run_on(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child("print('on', flush=True)")
    group.attach(process.pid)
    group.freeze()
    process.start()
    group.thaw()
    assert process.line() == "on\n"


def test_a_fork_bomb_is_killed(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    group.apply({"pids": {"limit": 60}})
    bomb = child(
        "import signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nprint('go', flush=True)\n"
        "while True:\n    try: os.fork()\n    except OSError: pass"
    )
    group.attach(bomb.pid)
    bomb.start()
    bomb.line()
    time.sleep(0.1)
    group.kill()
    assert bomb.wait() == -9
    group.remove()


def test_a_signal_reaches_everybody_but_the_sender(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    one, two = child(), child()
    group.attach(one.pid)
    group.attach(two.pid)
    group.kill(signal.SIGTERM)
    assert (one.wait(), two.wait()) == (-15, -15)
    group.kill(signal.SIGTERM)


def test_cgroups_the_container_made_go_too(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    for directory in directories(group):
        os.makedirs(f"{directory}/sub/deeper")
    process = child()
    group.attach(process.pid, sub="sub/deeper" if group.mode == "v2" else "")
    if group.mode == "v1":
        Path(str(group.path_for("")), "sub/deeper/cgroup.procs").write_text(str(process.pid))
    assert group.pids() == [process.pid]
    assert group.pids(recursive=False) == []
    group.kill()
    process.wait()
    group.remove()
    assert not any(Path(directory).exists() for directory in directories(group))


def test_what_is_left_is_named(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child()
    group.attach(process.pid)
    directory = str(group.path_for(""))
    with pytest.raises(HostError, match=rf"cannot remove cgroup {directory}: .*busy.*{process.pid} \(.*, state S\)"):
        remove_tree(directory, 0.05)


def test_a_cgroup_in_use_is_refused_and_left_alone(place: str, child: Callable[..., Child]) -> None:
    stranger = child()
    theirs = cgroup.new(place + "/shared", "a")
    theirs.create()
    theirs.attach(stranger.pid)
    ours = cgroup.new(place + "/shared", "b")
    with pytest.raises(HostError, match=r"container's cgroup is not empty: 1 process\(es\) found in"):
        ours.create()
    for group in (ours, cgroup.restore(ours.record())):
        group.kill()
        group.remove()
    assert stranger.process.poll() is None
    assert theirs.pids() == [stranger.pid]


def test_an_empty_cgroup_is_used_and_kept(place: str) -> None:
    theirs = cgroup.new(place + "/shared", "a")
    theirs.create()
    ours = cgroup.new(place + "/shared", "b")
    ours.create()
    cgroup.restore(ours.record()).remove()
    assert all(Path(directory).is_dir() for directory in directories(theirs))


def test_a_frozen_cgroup_is_refused(place: str) -> None:
    theirs = cgroup.new(place + "/cold", "a")
    theirs.create()
    theirs.freeze()
    with pytest.raises(HostError, match="unexpectedly frozen") as caught:
        cgroup.new(place + "/cold", "b").create()
    assert "thaw it" in caught.value.hint
    theirs.thaw()


def test_an_interrupted_creation_is_cleared_away(place: str) -> None:
    group = cgroup.new(place + "/half", "a")
    record = group.record()
    group.create()
    cgroup.restore(record).remove()
    assert not any(Path(directory).exists() for directory in directories(group))


def test_a_process_that_has_ended_cannot_join(group: cgroup.Cgroup, child: Callable[..., Child]) -> None:
    process = child()
    process.close()
    with pytest.raises(HostError, match=f"cannot move process {process.pid} into cgroup .*has ended"):
        group.attach(process.pid)


UNPRIVILEGED = """
os.setgid(65534); os.setuid(65534)
sys.path.insert(0, sys.argv[1])
from ovt.kernel import cgroup
from ovt.errors import HostError
group = cgroup.new(sys.argv[2], 'web')
group.create()
group.attach(os.getpid())
group.apply({'devices': [{'allow': False}], 'pids': {'limit': -1}})
group = cgroup.restore(group.record())
try:
    group.apply({'memory': {'limit': 1 << 20}})
except HostError as error:
    print(error, '|', error.hint)
group.kill(); group.remove()
print(group.pids())
"""


def test_a_user_without_delegation(place: str, child: Callable[..., Child]) -> None:
    source = str(Path(cgroup.__file__).parents[3])
    out = child(UNPRIVILEGED, source, place + "/box").go().splitlines()
    if current().mode == "v1":
        assert out[0].startswith("cannot set linux.resources.memory.limit: cannot make cgroup /sys/fs/cgroup/memory/")
        assert "Permission denied" in out[0] and "drop the limit" in out[0]
    assert out[1:] == ["[]"]
