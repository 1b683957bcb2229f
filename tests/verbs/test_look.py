"""Looking at instances, the same for containers and machines: ps, inspect, logs, stats, top, events."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from tests.verbs.shared import Verbs

pytestmark = pytest.mark.root


def test_ps_and_its_filters(ovt: Verbs) -> None:
    ovt.start()
    ovt("create", *ovt.flags, "--name", "idle", "busybox", "true")
    other = "container" if ovt.vm else "vm"

    def names(*words: str) -> set[str]:
        return set(ovt.out("ps", "--format", "{{.name}}", *words).split())

    assert names() == {"web"}
    assert names("-a") == {"web", "idle"}
    assert names("-a", "--filter", f"kind={ovt.kind}") == {"web", "idle"}
    assert names("-a", "--filter", f"kind={other}") == set()
    assert names("-a", "--filter", "status=created") == {"idle"}
    assert len(ovt.out("ps", "-aq").split()) == 2


def test_inspect(ovt: Verbs) -> None:
    ovt("create", *ovt.flags, "--name", "web", "-l", "a=b", "-e", "X=1", "busybox", "ls", "-l")
    (shown,) = json.loads(ovt.out("inspect", "web"))
    assert (shown["name"], shown["kind"], shown["status"]) == ("web", ovt.kind, "created")
    assert (shown["labels"], shown["command"], shown["exit_code"]) == ({"a": "b"}, ["ls", "-l"], None)


def test_logs(ovt: Verbs) -> None:
    script = "for i in 1 2 3; do echo $i; sleep 0.2; done"
    ovt("run", *ovt.flags, "-d", "--name", "web", "busybox", "sh", "-c", script)
    assert ovt("logs", "--follow", "web").stdout == "1\n2\n3\n"
    assert ovt("logs", "--tail", "1", "web").stdout == "3\n"
    lines = ovt.out("logs", "--timestamps", "web").splitlines()
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z \d", line) for line in lines)
    assert lines == sorted(lines)


def test_stats(ovt: Verbs) -> None:
    ovt.start()
    (record,) = json.loads(ovt.out("stats", "--no-stream", "--format", "json", "web"))
    assert record["name"] == "web"
    assert record["memory"] > 0
    assert record["pids"] >= 1
    assert "web" in ovt.out("stats", "--no-stream")


def test_top(ovt: Verbs) -> None:
    ovt.start()
    rows = {row["pid"]: row for row in json.loads(ovt.out("top", "--format", "json", "web"))}
    assert min(rows) == 1
    (own,) = [row for row in rows.values() if row["command"].startswith("sh -c trap ")]
    assert own["state"] in {"S", "R"}
    assert own["memory"] > 0


def test_events(ovt: Verbs) -> None:
    ovt.start()
    ovt("pause", "web")
    ovt("resume", "web")
    ovt("stop", "web")
    ovt("rename", "web", "www")
    ovt("delete", "www")
    told = ovt.out("events", "--format", "{{.event}}").split()
    common = {"create", "start", "pause", "resume", "stop", "exit", "rename", "delete"}
    ours = [event for event in told if event in common]
    assert ours[:5] == ["create", "start", "pause", "resume", "stop"]
    assert set(ours) == common


def test_following_events(ovt: Verbs) -> None:
    words = [*ovt.words, "events", "-f", "--filter", "name=web", "--format", "{{.event}}"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ovt("run", *ovt.flags, "--rm", "--name", "web", "busybox", "true")
        told: list[str] = []
        while "delete" not in told:
            told.append(process.stdout.readline().strip())
        assert [event for event in told if event in {"create", "start", "exit", "delete"}] == [
            "create", "start", "exit", "delete",
        ]  # fmt: skip
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
