"""The verbs of the host over an engine of `sleep` processes: states, policies, and what killed commands leave."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt import exits
from ovt import host as hosts
from ovt.engine.base import Process
from ovt.errors import Conflict, HostError, NotFound, OvtError, StateError, UsageError
from ovt.host import Host
from ovt.model import Limits, Restart, Spec, Status
from tests.fakes import FakeEngine


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.close()


@pytest.fixture
def host(tmp_path: Path, engine: FakeEngine) -> Host:
    return Host(str(tmp_path / "data"), str(tmp_path / "run"), engine=engine)


def up(host: Host, name: str = "web", **options: Any) -> str:
    return host.launch("busybox", ["sleep"], name=name, **options).id


def status(host: Host, reference: str = "web") -> Status:
    return host.get(reference)[1]


def events(host: Host) -> list[str]:
    return [event["event"] for event in host.events()]


def test_a_life(host: Host) -> None:
    host.create(Spec("busybox"), "web")
    assert status(host) is Status.CREATED
    host.start("web")
    assert status(host) is Status.RUNNING
    host.pause("web")
    assert status(host) is Status.PAUSED
    host.resume("web")
    host.stop("web")
    assert status(host) is Status.STOPPED
    assert host.get("web")[0].exit_code == 143
    host.start("web")
    host.restart("web")
    host.kill("web")
    assert host.wait("web") == 137
    host.delete("web")
    assert host.list() == []
    assert events(host) == [
        *("create", "start", "pause", "resume", "stop", "exit"),
        *("start", "stop", "exit", "start", "kill", "exit", "delete"),
    ]


def test_names(host: Host) -> None:
    up(host)
    with pytest.raises(Conflict):
        host.create(Spec("busybox"), "web")
    with pytest.raises(UsageError):
        host.create(Spec("busybox"), "not a name")
    made_up = host.create(Spec("busybox"))
    assert "-" in made_up.name
    host.rename("web", "www")
    assert host.get("www")[0].name == "www"
    with pytest.raises(NotFound):
        host.get("web")


def test_verbs_in_the_wrong_state(host: Host) -> None:
    up(host)
    for verb in (host.start, host.resume, host.delete):
        with pytest.raises(StateError, match="it is running"):
            verb("web")
    host.stop("web")
    for verb in (host.pause, host.resume, host.kill):
        with pytest.raises(StateError, match="it is stopped"):
            verb("web")
    with pytest.raises(StateError):
        host.exec("web", Process(("true",)))


def test_stop_kills_what_does_not_listen(host: Host, engine: FakeEngine) -> None:
    engine.stubborn = True
    up(host)
    begin = time.monotonic()
    host.stop("web", 0.2)
    assert 0.2 <= time.monotonic() - begin < 5
    assert host.get("web")[0].exit_code == 137
    assert host.stop("web").exit_code == 137  # again, which is fine


def test_stop_uses_the_signal_that_was_asked_for(host: Host, engine: FakeEngine) -> None:
    id = up(host, stop_signal=2)
    host.stop("web", 0.0)
    assert ("signal", id, 2) in engine.calls


def test_stop_lets_a_paused_guest_hear_the_signal(host: Host, engine: FakeEngine) -> None:
    engine.stubborn = True
    id = up(host)
    host.pause("web")
    host.stop("web", 0.0)
    assert ("freeze", id, False) in engine.calls
    assert status(host) is Status.STOPPED


def test_an_end_by_itself_is_written_down_by_whoever_looks(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    engine.finish(id, 3)
    assert status(host) is Status.STOPPED
    assert host.wait("web") == 3
    assert ("cleanup", id) in engine.calls


def test_an_end_nobody_recorded(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    engine.finish(id, 3, record=False)
    host.settle(id)
    assert host.get("web")[0].exit_code == exits.UNKNOWN_EXIT


def test_a_guest_that_is_removed_at_its_end(host: Host, engine: FakeEngine) -> None:
    id = up(host, auto_remove=True)
    with pytest.raises(StateError, match="--rm"):
        host.restart("web")
    engine.finish(id, 0)
    assert host.wait(id) == 0
    assert host.list() == []
    assert not os.path.exists(host.store.home(id))


def test_a_start_that_fails_leaves_the_reason(host: Host, engine: FakeEngine) -> None:
    host.create(Spec("busybox"), "web")
    for method in ("create", "start"):
        engine.fail = {method: HostError("no room")}
        with pytest.raises(HostError, match="no room"):
            host.start("web")
        instance, now = host.get("web")
        assert (now, instance.error, instance.pid) == (Status.CREATED, "no room", 0)
        assert engine.guests == {}
    engine.fail = {}
    host.start("web")
    assert host.get("web")[0].error == ""


def test_update(host: Host, engine: FakeEngine) -> None:
    id = up(host, limits=Limits(memory=1 << 20))
    host.update("web", {"pids": 7}, Restart("always"))
    assert ("update", id, Limits(memory=1 << 20, pids=7)) in engine.calls
    spec = host.get("web")[0].spec
    assert (spec.limits, spec.restart) == (Limits(memory=1 << 20, pids=7), Restart("always"))
    engine.fail = {"update": HostError("too low")}
    with pytest.raises(HostError):
        host.update("web", {"memory": 1})
    assert host.get("web")[0].spec.limits.memory == 1 << 20
    engine.fail = {}
    host.stop("web")
    engine.calls.clear()
    host.update("web", {"memory": 5})
    assert engine.calls == []


def test_inside(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    assert host.exec("web", Process(("true",))) == 7
    assert host.exec("web", Process(("true",)), detach=True) == 4242
    host.copy_into("/a", "web", "/b")
    host.stop("web")
    host.copy_from("web", "/b", "/a")
    assert [call for call in engine.calls if call[0] == "copy"] == [
        ("copy", id, True, "/a", "/b", True),
        ("copy", id, False, "/b", "/a", False),
    ]


# restart policies: what the supervisor's exit command does


def ended(host: Host, engine: FakeEngine, id: str, code: int) -> None:
    """As the supervisor does it: leave the record, then run the exit command."""
    engine.finish(id, code)
    exits_main(host, id)


def exits_main(host: Host, id: str) -> None:
    waiting = exits.settle(host, id, restart=True)
    if waiting is not None:
        exits.start_again(host, waiting)


def test_on_failure_gives_up_after_so_many(host: Host, engine: FakeEngine) -> None:
    id = up(host, restart=Restart("on-failure", 2))
    for restarts in (1, 2):
        ended(host, engine, id, 1)
        assert (status(host), host.get("web")[0].restarts) == (Status.RUNNING, restarts)
    ended(host, engine, id, 1)
    assert status(host) is Status.STOPPED


def test_on_failure_leaves_success_alone(host: Host, engine: FakeEngine) -> None:
    ended(host, engine, up(host, restart=Restart("on-failure")), 0)
    assert status(host) is Status.STOPPED


def test_always_starts_again_unless_stopped_by_hand(host: Host, engine: FakeEngine) -> None:
    id = up(host, restart=Restart("always"))
    ended(host, engine, id, 0)
    assert status(host) is Status.RUNNING
    host.stop("web")
    exits_main(host, id)
    assert status(host) is Status.STOPPED


def test_a_long_run_begins_with_a_short_delay_again(host: Host, engine: FakeEngine) -> None:
    id = up(host, restart=Restart("always"))
    with host.store.locked(id) as instance:
        host.store.save(instance._replace(restarts=9, started=time.time() - 60))
    ended(host, engine, id, 0)
    assert host.get("web")[0].restarts == 1


def test_stop_and_delete_while_a_restart_is_due(host: Host, engine: FakeEngine) -> None:
    for verb in (host.stop, lambda name: host.delete(name, force=True)):
        id = up(host, restart=Restart("always"))
        with host.store.locked(id) as instance:
            host.store.save(instance._replace(restarts=4))
        engine.finish(id, 1)
        waiting = exits.settle(host, id, restart=True)
        assert waiting is not None
        assert waiting.status is status(host) is Status.RESTARTING
        thread = threading.Thread(target=exits.start_again, args=(host, waiting))
        thread.start()
        verb("web")
        thread.join()
        assert engine.guests == {}
        if host.list():
            assert status(host) is Status.STOPPED
            host.delete("web")


def test_a_restart_that_fails_is_tried_again(host: Host, engine: FakeEngine) -> None:
    id = up(host, restart=Restart("on-failure", 2))
    engine.fail = {"create": HostError("no room")}
    ended(host, engine, id, 1)
    instance, now = host.get("web")
    assert (now, instance.error, instance.restarts) == (Status.STOPPED, "no room", 2)


def test_who_waits_leaves_a_restart_to_the_exit_command(host: Host, engine: FakeEngine) -> None:
    id = up(host, restart=Restart("always"))
    engine.finish(id, 1)
    host.settle(id)
    ended = exits.settle(host, id, restart=True)
    assert ended is not None
    assert ended.status is Status.RESTARTING


def test_an_end_for_lack_of_memory_is_remembered(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    engine.starved.add(id)
    engine.finish(id, 137, 9)
    ended = host.settle(id)
    assert ended is not None
    assert ended.oom_killed
    host.start("web")
    engine.starved.clear()
    engine.finish(id, 0)
    host.settle(id)
    assert not host.get("web")[0].oom_killed


def test_the_exit_command_is_this_very_ovt(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    assert engine.exit_commands[id][-3:] == [host.data, host.run_root, id]
    assert "-P" in engine.exit_commands[id]  # the directory it runs in is no place to import from
    assert os.path.exists(f"{exits.env()['PYTHONPATH']}/ovt/exits.py")


# after kill -9


def test_a_command_that_died_while_it_made_a_guest(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    with host.store.locked(id) as instance:
        host.store.save(instance._replace(status=Status.CREATING, pid=instance.pid, start_time=1))
    assert status(host) is Status.BROKEN
    with pytest.raises(StateError):
        host.exec("web", Process(("true",)))
    assert [leftover.name for leftover in host.leftovers()] == ["web"]
    assert [leftover.name for leftover in host.leftovers(fix=True)] == ["web"]
    assert status(host) is Status.STOPPED
    assert engine.guests == {}
    assert host.leftovers() == []


def test_a_broken_instance_can_simply_be_started(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    with host.store.locked(id) as instance:
        host.store.save(instance._replace(status=Status.CREATING, start_time=1))
    host.start("web")
    assert status(host) is Status.RUNNING
    assert len(engine.guests) == 1


def test_a_guest_whose_supervisor_is_gone(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    path = Path(host.store.home(id), "supervisor.json")
    path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999'))
    found = host.leftovers(fix=True)
    assert [(leftover.name, "supervisor" in leftover.reason) for leftover in found] == [("web", True)]
    assert status(host) is Status.STOPPED


def test_half_made_and_half_removed_instances(host: Host, engine: FakeEngine) -> None:
    up(host)
    os.makedirs(f"{host.store.instances}/.new-{'a' * 12}")
    os.makedirs(f"{host.store.instances}/.gone-{'b' * 12}/upper")
    os.symlink("c" * 12, f"{host.store.names}/ghost")
    assert {leftover.name for leftover in host.leftovers(fix=True)} == {"a" * 12, "b" * 12, "ghost"}
    assert host.leftovers() == []
    assert status(host) is Status.RUNNING


def test_what_is_being_changed_is_no_leftover(host: Host) -> None:
    id = up(host)
    with host.store.locked(id) as instance:
        host.store.save(instance._replace(status=Status.CREATING, start_time=1))
        assert host.leftovers() == []


def test_a_guest_without_an_instance(host: Host, engine: FakeEngine) -> None:
    id = up(host)
    host.store.discard(id)
    assert [leftover.name for leftover in host.leftovers(fix=True)] == [id]
    assert engine.guests == {}


def test_a_damaged_record_goes_with_force(host: Host) -> None:
    id = up(host)
    Path(host.store.home(id), "instance.json").write_text("{")
    with pytest.raises(OvtError, match="damaged"):
        host.delete("web")
    assert [leftover.kind for leftover in host.leftovers()] == ["record"]
    assert host.delete("web", force=True) is None
    assert host.leftovers() == []
    assert os.listdir(host.store.names) == []


# where things are kept


def test_root_keeps_things_where_the_system_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 0)
    assert (hosts.default_data(), hosts.default_run()) == ("/var/lib/ovt", "/run/ovt/people")


def test_others_keep_things_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hosts.os, "geteuid", lambda: 1234)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert (hosts.default_data(), hosts.default_run()) == ("/home/me/.local/share/ovt", f"{tmp_path}/ovt/people")
