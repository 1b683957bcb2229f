"""The store of instances on a directory of its own, also after commands that were killed in the middle."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ovt import store as stores
from ovt.errors import Conflict, NotFound, OvtError
from ovt.kernel import procfs
from ovt.model import Instance, Kind, Spec, Status
from ovt.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def make(id: str, name: str = "", **members: Any) -> Instance:
    return Instance(id, name or f"n-{id}", Kind.CONTAINER, 1.0, Spec("busybox"), **members)


WEB = make("aaaaaaaaaaa1", "web")


def test_what_is_added_is_found_by_name_id_and_prefix(store: Store) -> None:
    store.add(WEB)
    store.add(make("aaaaaaaaaaa2"))
    store.add(make("bbbbbbbbbbbb"))
    assert store.load(store.resolve("web")) == WEB
    assert store.resolve("aaaaaaaaaaa1") == store.resolve("web") == "aaaaaaaaaaa1"
    assert store.resolve("b") == "bbbbbbbbbbbb"
    with pytest.raises(Conflict, match="2 ids"):
        store.resolve("aaa")


@pytest.mark.parametrize("reference", ["", ".", "..", "../lock", "nosuch", "cccccccccccc", "zz", "x" * 300])
def test_what_is_not_there_is_not_found(store: Store, reference: str) -> None:
    store.add(WEB)
    with pytest.raises(NotFound):
        store.resolve(reference)


def test_an_empty_store(store: Store) -> None:
    assert store.load_all() == []
    assert store.unfinished() == []
    with pytest.raises(NotFound):
        store.resolve("web")


def test_a_name_is_taken_once(store: Store) -> None:
    store.add(WEB)
    with pytest.raises(Conflict, match="aaaaaaaaaaa1"):
        store.add(make("cccccccccccc", "web"))
    assert store.ids() == ["aaaaaaaaaaa1"]


def test_a_name_is_free_again_after_removal(store: Store) -> None:
    store.add(WEB)
    with store.locked("web") as instance:
        store.remove(instance)
    assert os.listdir(store.names) == os.listdir(store.instances) == []
    store.add(make("cccccccccccc", "web"))


def test_rename(store: Store) -> None:
    store.add(WEB)
    store.add(make("cccccccccccc", "db"))
    with store.locked("web") as instance:
        with pytest.raises(Conflict):
            store.rename(instance, "db")
        store.rename(instance, "www")
    assert store.load(store.resolve("www")).name == "www"
    with pytest.raises(NotFound):
        store.resolve("web")


def test_records_are_for_their_owner_only(store: Store) -> None:
    store.add(WEB)
    home = Path(store.home(WEB.id))
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "instance.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_record_is_named_and_can_be_discarded(store: Store) -> None:
    store.add(WEB)
    path = Path(store.home(WEB.id), "instance.json")
    unknown_kind = '{"id":"a","name":"b","kind":"c","created":1,"spec":{}}'
    for text in ("", "{", "[]", "{}", '{"id": 1, "unknown": 2}', unknown_kind):
        path.write_text(text)
        with pytest.raises(OvtError, match="damaged") as caught:
            store.load(WEB.id)
        assert caught.value.hint == f"ovt delete --force {WEB.id}"
    damaged: list[str] = []
    assert store.load_all(damaged) == []
    assert damaged == [WEB.id]
    store.discard(WEB.id)
    assert store.ids() == os.listdir(store.names) == []


# a kill -9 between the steps of a change


def test_a_half_made_instance_is_seen_and_does_not_block_its_name(store: Store) -> None:
    os.makedirs(f"{store.instances}/.new-{WEB.id}")
    os.makedirs(store.names)
    os.symlink(WEB.id, f"{store.names}/web")
    assert store.load_all() == []
    with pytest.raises(NotFound):
        store.load(store.resolve("web"))
    assert len(store.unfinished()) == 2
    store.add(make("cccccccccccc", "web"))
    assert store.resolve("web") == "cccccccccccc"


def test_a_half_removed_instance_is_seen(store: Store) -> None:
    store.add(WEB)
    os.rename(store.home(WEB.id), f"{store.instances}/.gone-{WEB.id}")
    assert store.load_all() == []
    assert {os.path.basename(path) for path in store.unfinished()} == {f".gone-{WEB.id}", "web"}


def test_a_half_written_record_does_not_replace_the_old_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.add(WEB)

    def killed(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stores.os, "fsync", killed)
    with store.locked("web") as instance, pytest.raises(KeyboardInterrupt):
        store.save(instance._replace(pid=99))
    assert store.load(WEB.id) == WEB


# locks


def test_a_lock_keeps_others_out(store: Store) -> None:
    store.add(WEB)
    with store.locked("web"), pytest.raises(Conflict), store.locked("web", wait=False):
        pass
    with store.locked("web", wait=False) as instance:
        assert instance == WEB


def test_who_waits_for_a_deleted_instance_is_told(store: Store) -> None:
    store.add(WEB)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            with store.locked(WEB.id):
                pass
        except NotFound as error:
            errors.append(error)

    with store.locked(WEB.id) as instance:
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        store.remove(instance)
    thread.join()
    assert len(errors) == 1


def _count(root: str, rounds: int) -> None:
    own = Store(root)
    for _ in range(rounds):
        with own.locked("web") as instance:
            own.save(instance._replace(restarts=instance.restarts + 1))


def test_changes_of_several_processes_are_all_kept(store: Store) -> None:
    store.add(WEB)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(store.root, 20)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert store.load(WEB.id).restarts == 60
    assert sorted(os.listdir(store.home(WEB.id))) == ["instance.json", "lock"]


def _take(root: str, id: str, results: Any) -> None:
    try:
        Store(root).add(make(id, "web"))
        results.put(id)
    except Conflict:
        results.put("")


def test_of_several_that_want_a_name_one_gets_it(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ids = [f"{number:012x}" for number in range(5)]
    workers = [context.Process(target=_take, args=(store.root, id, results)) for id in ids]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    won = [result for result in (results.get() for _ in workers) if result]
    assert len(won) == 1
    assert store.resolve("web") == won[0]
    assert store.ids() == won


# what is seen without asking an engine


def test_what_is_observed() -> None:
    me, since = os.getpid(), procfs.start_time(os.getpid()) or 0
    alive, reused = {"pid": me, "start_time": since}, {"pid": me, "start_time": since + 1}
    for status in (Status.RUNNING, Status.PAUSED):
        assert Store("/x").observe(make("a" * 12, status=status, **alive)) is status
        assert Store("/x").observe(make("a" * 12, status=status, **reused)) is Status.STOPPED
    for status in (Status.CREATING, Status.RESTARTING):
        assert Store("/x").observe(make("a" * 12, status=status, **alive)) is status
        assert Store("/x").observe(make("a" * 12, status=status, **reused)) is Status.BROKEN
    for status in (Status.CREATED, Status.STOPPED):
        assert Store("/x").observe(make("a" * 12, status=status)) is status


def test_a_zombie_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    since = procfs.start_time(pid) or 0
    assert not Store.lives(pid, since)
    os.waitpid(pid, 0)


def test_json_is_written_whole_and_compact(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    stores.write_json(str(path), {"a": [1, "ü"]})
    assert json.loads(path.read_text()) == {"a": [1, "ü"]}
    assert os.listdir(tmp_path) == ["a.json"]
