"""The journal of events: order, selection, following, change of files."""

import threading
import time
from pathlib import Path

import pytest

from ovt import journal as journals
from ovt.journal import Journal


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
