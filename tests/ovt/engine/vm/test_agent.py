"""The talk with a guest's agent: honest ones, and all the ways in which one can be silent, slow or lie."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.vm import agent as agent_module
from ovt.engine.vm.agent import LOCK, SOCKET, Agent, AgentError, NoAgent, port_open, printable
from ovt.errors import Conflict, OvtError, StateError
from tests.ovt.engine.vm.agents import fake, supporting, sync_answer

PONG: dict[str, Any] = {"return": {}}


def quick(home: Path, **options: Any) -> Agent:
    """An agent that is not waited for long."""
    return Agent(str(home), **{"sync_timeout": 0.3, "timeout": 0.5, **options})


def test_result_of_a_command(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: {"return": {"host-name": "box", "asked": request.get("arguments")}}):
        assert Agent(str(tmp_path)).command("guest-get-host-name", {"a": 1}) == {
            "host-name": "box",
            "asked": {"a": 1},
        }


def test_one_connection_and_one_sync_for_a_turn(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: PONG) as peer:
        agent = Agent(str(tmp_path))
        with agent.turn():
            for _ in range(3):
                agent.command("guest-get-users")
        agent.command("guest-get-users")
        assert peer.clients == 2
        assert peer.seen.count("guest-sync-delimited") == 2


def test_introduction_is_one_greeting_with_all_commands_in_order(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: {"return": request.get("arguments")}) as peer:
        agent = Agent(str(tmp_path))
        assert agent.introduce([("ovt-identity", {"hostname": "a"}), ("ovt-main", {"path": "b"})], 5.0) == [
            {"hostname": "a"},
            {"path": "b"},
        ]
        assert peer.seen == ["guest-sync-delimited", "ovt-identity", "ovt-main"]
        assert agent.command("guest-ping") is None  # the agent is free again


def test_introduction_tells_which_command_failed_and_is_not_repeated(tmp_path: Path) -> None:
    refused = {"error": {"class": "GenericError", "desc": "No such file or directory"}}
    with fake(tmp_path, lambda request: refused if request["execute"] == "ovt-main" else PONG) as peer:
        with pytest.raises(AgentError, match="ovt-main: No such file"):
            Agent(str(tmp_path)).introduce([("ovt-identity", {}), ("ovt-main", {"path": "b"})], 5.0)
        assert peer.seen.count("ovt-main") == 1


def test_introduction_to_nobody(tmp_path: Path) -> None:
    with fake(tmp_path, sync=lambda request: None), pytest.raises(NoAgent, match=r"within 0\.3 s"):
        Agent(str(tmp_path)).introduce([("ovt-identity", {})], 0.3)


def test_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    home = tmp_path.joinpath(*["long-directory-name"] * 8)
    home.mkdir(parents=True)
    with fake(home, lambda request: PONG):
        assert Agent(str(home)).command("guest-ping") == {}


def test_refusal_is_an_error_with_the_agents_words_made_printable(tmp_path: Path) -> None:
    answer = {"error": {"class": "GenericError", "desc": "no\x1b[2J room\u202e" + "x" * 9999}}
    with fake(tmp_path, lambda request: answer), pytest.raises(AgentError) as caught:
        Agent(str(tmp_path)).command("guest-get-users")
    assert caught.value.error_class == "GenericError"
    assert str(caught.value).startswith("guest-get-users: no�[2J room�xxx")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("error", [None, "text", {}, {"class": 5, "desc": ["a"]}])
def test_refusal_without_words(tmp_path: Path, error: Any) -> None:
    with fake(tmp_path, lambda request: {"error": error}), pytest.raises(AgentError, match="does not say why"):
        Agent(str(tmp_path)).command("guest-get-users")


def test_about_lists_what_is_known_and_what_is_forbidden(tmp_path: Path) -> None:
    listed = [{"name": "guest-ping", "enabled": True}, {"name": "guest-exec", "enabled": False}, {"name": 5}, "junk"]
    told = {"return": {"version": "7.2\x07", "supported_commands": listed}}
    with fake(tmp_path, lambda request: told) as peer:
        agent = Agent(str(tmp_path))
        about = agent.about()
        assert about.commands == {"guest-ping"} and about.forbidden == {"guest-exec"} and about.version == "7.2�"
        with pytest.raises(StateError, match=r"running.*guest-exec, which is forbidden"):
            agent.need("guest-exec", "running a program")
        with pytest.raises(StateError, match=r"guest-fstrim, which the guest's agent \(version 7.2�\) does not know"):
            agent.need("guest-fstrim", "trimming")
        agent.need("guest-ping", "asking")
        assert peer.seen.count("guest-info") == 1


@pytest.mark.parametrize("told", [[], {}, {"supported_commands": 5}, "x"])
def test_about_that_says_nothing(tmp_path: Path, told: Any) -> None:
    with fake(tmp_path, lambda request: {"return": told}), pytest.raises(AgentError, match="does not say what"):
        Agent(str(tmp_path)).about()


# nobody there


def test_no_socket(tmp_path: Path) -> None:
    with pytest.raises(NoAgent, match="no channel"):
        quick(tmp_path).command("guest-ping")


def test_nobody_listens_at_the_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / SOCKET))
    with pytest.raises(NoAgent, match="does not run"):
        quick(tmp_path).command("guest-ping")


def test_silence_is_no_agent_and_says_what_to_do(tmp_path: Path) -> None:
    with fake(tmp_path, sync=lambda request: None):
        with pytest.raises(NoAgent) as caught:
            quick(tmp_path).command("guest-get-users")
    assert "within 0.3 s" in str(caught.value)
    assert "qemu-guest-agent" in caught.value.hint and "ovt console" in caught.value.hint
    assert isinstance(caught.value, StateError)


def test_closed_port_is_known_at_once_and_nothing_is_sent(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: PONG) as peer:
        before = time.monotonic()
        with pytest.raises(NoAgent, match="does not run"):
            Agent(str(tmp_path), sync_timeout=60.0, is_open=lambda: False).command("guest-ping")
        assert time.monotonic() - before < 30
        assert not peer.seen
        assert Agent(str(tmp_path), is_open=lambda: True).command("guest-ping") == {}


def test_what_changes_the_guest_is_not_left_in_the_port(tmp_path: Path) -> None:
    """An agent that comes later reads what is there: no shutdown of yesterday may be among it."""
    with fake(tmp_path, sync=lambda request: None) as peer:
        for name in ("guest-shutdown", "guest-exec", "guest-fsfreeze-freeze", "guest-get-users"):
            with pytest.raises(NoAgent):
                quick(tmp_path, sync_timeout=0.05).command(name)
        assert set(peer.seen) == {"guest-sync-delimited"}
        with pytest.raises(NoAgent):
            quick(tmp_path, sync_timeout=0.05).command("guest-fsfreeze-thaw")
        assert peer.seen[-1] == "guest-fsfreeze-thaw"


# lies


@pytest.mark.parametrize(
    "noise",
    [
        b'{"return": 1}\n',
        b'{"return": {"half": ',
        b"\xff" * 1000,
        b"\xff\xff\n\xff\n",
        b"\x00\x01\xfe binary \x80\n" * 50,
        b"[" * 100_000 + b"\n",
        b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}\n',
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_what_comes_before_the_answer_to_sync_does_not_matter(tmp_path: Path, noise: bytes) -> None:
    def sync(request: dict[str, Any]) -> bytes:
        return noise + sync_answer(request)

    with fake(tmp_path, lambda request: PONG, sync):
        assert Agent(str(tmp_path)).command("guest-get-users") == {}


def test_sync_with_another_id_only(tmp_path: Path) -> None:
    with fake(tmp_path, sync=lambda request: b'\xff{"return": 42}\n'), pytest.raises(NoAgent):
        quick(tmp_path).command("guest-ping")


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\n",
        b"\x00\x80\xfe\n",
        b"[1, 2]\n",
        b"{}\n",
        b'"return"\n',
        b'{"return": NaN}\n',
        b"[" * 100_000 + b"]" * 100_000 + b"\n",
        b'{"return": ' + b"9" * 10_000 + b"}\n",
        b"\n",
    ],
)
def test_no_answer_but_noise_is_one_error_and_the_next_command_works(tmp_path: Path, answer: bytes) -> None:
    answers = iter([answer, b'{"return": "good"}\n'])
    with fake(tmp_path, lambda request: next(answers)):
        agent = quick(tmp_path)
        with agent.turn():
            with pytest.raises(AgentError, match="no answer") as caught:
                agent.command("guest-get-users")
            assert caught.value.error_class == AgentError.PROTOCOL
            assert str(caught.value).isprintable()
            assert agent.command("guest-get-users") == "good"


def test_flood_without_end_of_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "LONGEST", 1 << 20)
    with fake(tmp_path, lambda request: b"x" * (8 << 20)), pytest.raises(AgentError, match="more than 1 MiB"):
        Agent(str(tmp_path)).command("guest-get-users")


def test_flood_in_place_of_an_answer_to_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "LONGEST", 1 << 20)
    with fake(tmp_path, sync=lambda request: b'{"return": 1}\n' * 400_000):
        with pytest.raises(AgentError, match="without end"):
            Agent(str(tmp_path)).command("guest-get-users")


def test_hang_up_in_the_middle(tmp_path: Path) -> None:
    replies = iter([b"", b'{"return": 7}\n'])
    with fake(tmp_path, lambda request: next(replies)):
        agent = quick(tmp_path)
        with pytest.raises(AgentError, match="has ended before it answered guest-get-users"):
            agent.command("guest-get-users")
        assert agent.command("guest-get-users") == 7


def test_half_an_answer(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: b'{"return": {"a"'), pytest.raises(AgentError, match="not answered") as caught:
        quick(tmp_path).command("guest-get-users")
    assert caught.value.error_class == AgentError.TIMEOUT


def test_two_answers_to_one_question_are_not_taken_for_the_next(tmp_path: Path) -> None:
    numbers = iter(range(1, 10))

    def twice(request: dict[str, Any]) -> bytes:
        line = json.dumps({"return": next(numbers)}).encode() + b"\n"
        return line + b'{"return": "stale"}\n'

    with fake(tmp_path, twice):
        agent = Agent(str(tmp_path))
        with agent.turn():
            assert [agent.command("guest-get-users") for _ in range(3)] == [1, 2, 3]


def test_late_answer_is_not_taken_for_the_next(tmp_path: Path) -> None:
    names = iter(["late", "right"])

    def handler(request: dict[str, Any]) -> dict[str, Any]:
        name = next(names)
        time.sleep(0.4 if name == "late" else 0)
        return {"return": name}

    with fake(tmp_path, handler):
        agent = Agent(str(tmp_path), sync_timeout=5.0, timeout=0.1)
        with agent.turn():
            with pytest.raises(AgentError, match=r"not answered guest-get-users for 0\.1 seconds"):
                agent.command("guest-get-users")
            assert agent.command("guest-get-users", timeout=5.0) == "right"


def test_answer_in_single_bytes(tmp_path: Path) -> None:
    def slowly(request: dict[str, Any]) -> bytes:
        for byte in b'{"return": "slow"':
            assert peer.client
            peer.client.sendall(bytes((byte,)))
            time.sleep(0.002)
        return b"}\n"

    with fake(tmp_path, slowly) as peer:
        assert Agent(str(tmp_path)).command("guest-get-users") == "slow"


def test_agent_that_reads_nothing(tmp_path: Path) -> None:
    def stuck(request: dict[str, Any]) -> None:
        time.sleep(1.0)

    with fake(tmp_path, stuck):
        agent = quick(tmp_path)
        with agent.turn():
            agent.sync(1.0)
            with pytest.raises(AgentError) as caught:
                agent.command("guest-file-write", {"buf-b64": "x" * (16 << 20)})
    assert caught.value.error_class == AgentError.TIMEOUT


def test_command_that_answers_only_failure(tmp_path: Path) -> None:
    replies: list[Any] = [None, b"", {"error": {"class": "GenericError", "desc": "no"}}]
    with fake(tmp_path, lambda request: replies.pop(0)):
        agent = quick(tmp_path)
        assert agent.command("guest-shutdown", answers=False) is None
        assert agent.command("guest-shutdown", answers=False) is None
        with pytest.raises(AgentError, match="guest-shutdown: no"):
            agent.command("guest-shutdown", answers=False)


# turns


def test_commands_take_turns(tmp_path: Path) -> None:
    errors: list[OvtError] = []

    def ask() -> None:
        try:
            agent = Agent(str(tmp_path), sync_timeout=20.0)
            for _ in range(5):
                assert agent.command("guest-get-users") == "yes"
        except OvtError as error:
            errors.append(error)

    def handler(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(0.01)
        return {"return": "yes"}

    with fake(tmp_path, handler) as peer:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert peer.clients == 20
    assert not errors


def test_long_turn_gives_way(tmp_path: Path) -> None:
    done = threading.Event()

    def ask() -> None:
        Agent(str(tmp_path)).command("guest-get-host-name")
        done.set()

    with fake(tmp_path, lambda request: PONG) as peer:
        agent = Agent(str(tmp_path))
        with agent.turn():
            agent.command("guest-get-users")
            agent.give_way()
            assert peer.clients == 1  # nobody waits: nothing is given up
            other = threading.Thread(target=ask)
            other.start()
            deadline = time.monotonic() + 20
            while not done.is_set():
                assert time.monotonic() < deadline
                agent.give_way()
                agent.command("guest-get-users")
        other.join()
        at = peer.seen.index("guest-get-host-name")
        assert "guest-get-users" in peer.seen[:at] and "guest-get-users" in peer.seen[at:]


def test_turn_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "TURN", 0.05)
    with fake(tmp_path, lambda request: PONG), (tmp_path / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Conflict, match="another ovt command"):
            Agent(str(tmp_path)).command("guest-ping")
        fcntl.flock(held, fcntl.LOCK_UN)
        assert Agent(str(tmp_path)).command("guest-ping") == {}


def test_nothing_stays_open(tmp_path: Path) -> None:
    replies = iter([PONG, b"junk\n", None, b""])
    with fake(tmp_path, lambda request: next(replies)):
        agent = quick(tmp_path)
        before = len(os.listdir("/proc/self/fd"))
        agent.command("guest-get-users")
        for _ in range(3):
            with pytest.raises(AgentError):
                agent.command("guest-get-users")
        time.sleep(0.1)  # the other end is in this process too
        assert len(os.listdir("/proc/self/fd")) == before


def test_more_than_one_command_under_way(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: {"return": request["arguments"]["n"]}):
        agent = Agent(str(tmp_path))
        with agent.turn():
            agent.send("guest-a", {"n": 1})
            agent.send("guest-b", {"n": 2})
            assert agent.pending == 2
            assert [agent.receive(), agent.receive()] == [1, 2]
            assert agent.pending == 0 and not agent.answered()


# words


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain ünïcode", "plain ünïcode"),
        ("\x1b]0;title\x07", "�]0;title�"),
        ("a\u202eb\ud800c\nd\te", "a�b�c�d�e"),
        (None, ""),
        (5, ""),
        ("y" * 300, "y" * 255 + "…"),
    ],
)
def test_printable(text: object, clean: str) -> None:
    assert printable(text) == clean


def test_port_open() -> None:
    class Qmp:
        def command(self, name: str) -> list[dict[str, Any]]:
            assert name == "query-chardev"
            return [{"label": "serial0", "frontend-open": True}, {"label": "qga", "frontend-open": False}]

    qmp: Any = Qmp()
    assert port_open(qmp) is False
    assert port_open(qmp, "serial0") is True
    assert port_open(qmp, "other") is None


def test_supporting_is_understood(tmp_path: Path) -> None:
    with fake(tmp_path, lambda request: supporting("guest-a", "guest-b")):
        assert Agent(str(tmp_path)).about().commands == {"guest-a", "guest-b"}
