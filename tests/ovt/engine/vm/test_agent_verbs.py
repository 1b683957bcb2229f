"""What is asked of an agent in one command: waiting for it, ending and sleeping, the clock, frozen file systems."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import agent_verbs
from ovt.engine.vm.agent import Agent, AgentError, NoAgent
from ovt.engine.vm.agent_verbs import fsfreeze, ping, set_time, shutdown, suspend, wait_for_agent
from ovt.errors import HostError, StateError, UsageError
from tests.ovt.engine.vm.agents import fake, supporting

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"


class Freezable:
    """Answers as an agent with two file systems; `refusals` are answers to thaw that come first."""

    def __init__(self, *refusals: Any) -> None:
        self.frozen = 0
        self.refusals = list(refusals)

    def __call__(self, request: dict[str, Any]) -> Any:
        match request["execute"]:
            case "guest-info":
                return supporting(FREEZE, THAW)
            case "guest-fsfreeze-freeze":
                self.frozen = 2
                return {"return": 2}
            case "guest-fsfreeze-thaw":
                if self.refusals:
                    return self.refusals.pop(0)
                self.frozen = 0
                return {"return": 2}
        return {"return": {}}


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_verbs, "_THAW_AGAIN", 0.01)
    monkeypatch.setattr(agent_verbs, "_REFUSES", 0.3)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Freezable]:
    guest = Freezable()
    with fake(tmp_path, guest):
        yield guest


def test_ping(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: {"return": {}}):
        ping(Agent(str(tmp_path)))
    with pytest.raises(NoAgent):
        ping(Agent(str(tmp_path)))


def test_wait_for_an_agent_that_comes_later(tmp_path: Path) -> None:
    heard: list[str] = []
    late = time.monotonic() + 0.3
    is_open = lambda: time.monotonic() > late  # noqa: E731
    with fake(tmp_path, lambda request: {"return": {}}) as peer:
        wait_for_agent(Agent(str(tmp_path), is_open=is_open), 20.0, heard.append)
        assert time.monotonic() > late
        assert peer.seen == ["guest-sync-delimited"]
    assert heard == ["waiting for the guest's agent"]


def test_wait_for_an_agent_that_finds_the_question_in_its_port(tmp_path: Path) -> None:
    answers = threading.Event()

    def sync(request: dict[str, Any]) -> bytes:
        answers.wait(20)
        return b'\xff{"return": %d}\n' % request["arguments"]["id"]

    threading.Timer(0.2, answers.set).start()
    with fake(tmp_path, sync=sync) as peer:
        wait_for_agent(Agent(str(tmp_path)), 20.0)
        assert peer.clients == 1


def test_wait_in_vain(tmp_path: Path) -> None:
    with pytest.raises(NoAgent, match=r"in 0\.2 seconds"):
        wait_for_agent(Agent(str(tmp_path)), 0.2)
    with pytest.raises(NoAgent, match="ended before"):
        wait_for_agent(Agent(str(tmp_path)), 60.0, alive=lambda: False)


def test_shutdown_needs_no_answer(tmp_path: Path) -> None:
    with fake(tmp_path) as peer:
        for mode in ("powerdown", "halt", "reboot"):
            shutdown(Agent(str(tmp_path)), mode)
        asked = [request["arguments"]["mode"] for request in peer.requests if request["execute"] == "guest-shutdown"]
        assert asked == ["powerdown", "halt", "reboot"]
        with pytest.raises(UsageError, match="'explode' is no way"):
            shutdown(Agent(str(tmp_path)), "explode")


def test_refused_shutdown(tmp_path: Path) -> None:
    refusal = {"error": {"class": "CommandNotFound", "desc": "disabled"}}
    with fake(tmp_path, lambda request: refusal), pytest.raises(AgentError, match="disabled"):
        shutdown(Agent(str(tmp_path)))


def test_suspend_needs_an_agent_that_can(tmp_path: Path) -> None:
    can = supporting("guest-suspend-ram")
    with fake(tmp_path, lambda request: can if request["execute"] == "guest-info" else None) as peer:
        suspend(Agent(str(tmp_path)))
        assert peer.seen[-1] == "guest-suspend-ram"
    with fake(tmp_path), pytest.raises(StateError, match=r"suspending needs guest-suspend-ram"):
        suspend(Agent(str(tmp_path)))


def test_set_time(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: {"return": {}}) as peer:
        set_time(Agent(str(tmp_path)), 1000.5)
        set_time(Agent(str(tmp_path)))
        given, now = [request["arguments"]["time"] for request in peer.requests if "time" in str(request)][:2]
        assert given == 1_000_500_000_000
        assert abs(now - time.time_ns()) < 60e9


def test_frozen_while_it_lasts(tmp_path: Path, guest: Freezable) -> None:
    with fsfreeze(Agent(str(tmp_path))) as count:
        assert count == guest.frozen == 2
    assert guest.frozen == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_thaw_follows_whatever_happens(tmp_path: Path, guest: Freezable, error: type[BaseException]) -> None:
    with pytest.raises(error), fsfreeze(Agent(str(tmp_path))):
        assert guest.frozen
        raise error
    assert not guest.frozen


def test_thaw_follows_a_freeze_that_was_not_answered_in_time(tmp_path: Path) -> None:
    guest = Freezable()

    def slow(request: dict[str, Any]) -> Any:
        if request["execute"] == FREEZE:
            time.sleep(0.5)
        return guest(request)

    with fake(tmp_path, slow):
        with pytest.raises(AgentError, match="not answered guest-fsfreeze-freeze"):
            with fsfreeze(Agent(str(tmp_path), sync_timeout=0.2), 0.1):
                pytest.fail("it was not known to be frozen")
        assert not guest.frozen


def test_thaw_follows_a_refused_freeze(tmp_path: Path) -> None:
    guest = Freezable()

    def refuse(request: dict[str, Any]) -> Any:
        done = guest(request)
        return {"error": {"desc": "half of them"}} if request["execute"] == FREEZE else done

    with fake(tmp_path, refuse), pytest.raises(AgentError, match="half of them"), fsfreeze(Agent(str(tmp_path))):
        pytest.fail("it was not frozen")
    assert not guest.frozen


def test_thaw_is_tried_again_and_told(tmp_path: Path) -> None:
    guest = Freezable(b"", b"junk\n", {"error": {"desc": "busy"}})
    heard: list[str] = []
    with fake(tmp_path, guest), fsfreeze(Agent(str(tmp_path)), report=heard.append):
        pass
    assert not guest.frozen
    assert len(heard) == 3 and "busy" in heard[2] and "still frozen" in heard[0]


def test_thaw_in_vain_says_what_to_do(tmp_path: Path) -> None:
    guest = Freezable(*[{"error": {"desc": "never"}}] * 1000)
    with fake(tmp_path, guest), pytest.raises(HostError, match=r"may be frozen.*never") as caught:
        with fsfreeze(Agent(str(tmp_path)), thaw_timeout=0.1):
            pass
    assert "ovt reset" in caught.value.hint


def test_interrupt_during_the_thaw_waits_for_its_end(tmp_path: Path) -> None:
    def interrupting(request: dict[str, Any]) -> Any:
        if request["execute"] == THAW and guest.refusals:
            guest.refusals.pop()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        return guest(request)

    guest = Freezable(None)
    with fake(tmp_path, interrupting), pytest.raises(KeyboardInterrupt), fsfreeze(Agent(str(tmp_path))):
        pass
    assert not guest.frozen


def test_termination_thaws_first(tmp_path: Path, guest: Freezable) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    with pytest.raises(SystemExit) as caught, fsfreeze(Agent(str(tmp_path))):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert caught.value.code == 143
    assert not guest.frozen
    assert signal.getsignal(signal.SIGTERM) is before


def test_agent_that_cannot_freeze_is_not_asked_to(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: supporting(FREEZE)) as peer:
        with pytest.raises(StateError, match=r"freezing.*guest-fsfreeze-thaw"), fsfreeze(Agent(str(tmp_path))):
            pytest.fail("it cannot thaw")
        assert FREEZE not in peer.seen
