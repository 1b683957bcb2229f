"""The journal of events: order, selection, following, change of files."""

import json
import threading
import time
from pathlib import Path

import pytest

from ovt import journal as journals
from ovt.host import Host
from ovt.journal import Journal
from ovt.model import Instance, Kind, Spec


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path))


def test_events_come_back_in_order_with_their_details(journal: Journal) -> None:
    journal.write("create", "a", "web", image="busybox")
    journal.write("start", "a", "web")
    first, second = journal.read()
    assert (first["event"], first["id"], first["name"], first["image"]) == ("create", "a", "web", "busybox")
    assert second["event"] == "start"
    assert first["time"] <= second["time"]


def test_none_yet(journal: Journal) -> None:
    assert list(journal.read()) == []


def test_a_time_span(journal: Journal) -> None:
    for name in ("one", "two", "three"):
        journal.write("start", "a", name)
        time.sleep(0.002)
    times = [event["time"] for event in journal.read()]
    assert [event["name"] for event in journal.read(since=times[1])] == ["two", "three"]
    assert [event["name"] for event in journal.read(until=times[1])] == ["one"]


def test_a_torn_line_does_not_hide_the_others(journal: Journal) -> None:
    journal.write("start", "a", "one")
    with open(journal.path, "a") as file:
        file.write('{"time": 1, "ev\n')
    journal.write("start", "a", "two")
    assert [event["name"] for event in journal.read()] == ["one", "two"]


def test_a_full_file_makes_room(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 200)
    for number in range(6):
        journal.write("start", "a", str(number), filler="x" * 40)
    names = [event["name"] for event in journal.read()]
    assert names == [str(number) for number in range(6 - len(names), 6)]
    assert 2 <= len(names) < 6


def test_following_sees_old_and_new_events_over_a_change_of_files(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 150)
    monkeypatch.setattr(journals, "_POLL", 0.01)
    seen: list[str] = []

    def follow() -> None:
        for event in journal.read(until=time.time() + 20, follow=True):
            seen.append(event["name"])
            if event["name"] == "last":
                return

    journal.write("start", "a", "first")
    thread = threading.Thread(target=follow)
    thread.start()
    for name in ("second", "third", "last"):
        time.sleep(0.1)
        journal.write("start", "a", name, filler="x" * 60)
    thread.join(10)
    assert seen == ["first", "second", "third", "last"]


def test_events_of_machines_are_among_the_others(tmp_path: Path) -> None:
    host = Host(str(tmp_path / "data"), str(tmp_path / "run"))
    machine = Instance("0123456789ab", "lab", Kind.VM, 1.0, Spec("busybox"))
    host.store.add(machine)
    host.journal.write("start", machine.id, "lab")
    now = time.time()
    lines = [
        {
            "timestamp": {"seconds": int(now) + 5, "microseconds": 500_000},
            "event": "GUEST_PANICKED",
            "data": {"action": "pause"},
        },
        {"timestamp": {"seconds": int(now) - 5, "microseconds": 0}, "event": "RESUME"},
        {"timestamp": {"seconds": int(now), "microseconds": 0}, "event": "RTC_CHANGE"},
        {"event": "SHUTDOWN"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + 'torn\n{"timestamp"'
    (tmp_path / "data/instances" / machine.id / "qmp.log").write_text(text)
    found = list(host.events())
    assert [event["event"] for event in found] == ["vm-resume", "start", "vm-guest-panicked"]
    assert found[2] == {
        "time": int(now) + 5.5, "event": "vm-guest-panicked", "action": "pause", "id": machine.id, "name": "lab",
    }  # fmt: skip
