"""Coming and going of instances, the same for containers and machines: create, run, start, stop … delete."""

from __future__ import annotations

import json
import os
import time

import pytest

from tests.verbs.conftest import Open
from tests.verbs.shared import DEAF, Verbs

pytestmark = pytest.mark.root


# run


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("nosuch-program", 127), ("sh -c 'kill -9 $$'; exit $?", 137)]
)
def test_run_ends_with_the_status_of_the_program(ovt: Verbs, script: str, status: int) -> None:
    assert ovt("run", *ovt.flags, "--rm", "busybox", "sh", "-c", script, check=False).returncode == status
    assert ovt.out("ps", "-aq") == ""


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [("nosuch", 127, "executable file not found"), ("/etc/passwd", 126, "permission denied")],
)
def test_run_of_what_is_no_program(ovt: Verbs, program: str, status: int, words: str) -> None:
    done = ovt("run", *ovt.flags, "--rm", "busybox", program, check=False)
    assert done.returncode == status
    assert words in done.stderr
    assert ovt.out("ps", "-aq") == ""


def test_run_passes_everything_through(ovt: Verbs) -> None:
    options = ("-i", "--rm", "-e", "A=1 2", "-w", "/tmp", "-u", "nobody", "--hostname", "other")
    script = 'cat; echo "$A $PWD $(id -u) $(hostname)"; echo err >&2; exit 5'
    done = ovt("run", *ovt.flags, *options, "busybox", "sh", "-c", script, input="in\nput\n", check=False)
    assert done.returncode == 5
    # a machine's console is one stream
    out, err = ("in\nput\n1 2 /tmp 65534 other\n", "err\n")
    assert (done.stdout, done.stderr) == ((out + err, "") if ovt.vm else (out, err))


@pytest.mark.parametrize("text", ["", "one line\n", "no end of line", "a\nb"])
def test_the_end_of_the_input_is_the_programs(ovt: Verbs, text: str) -> None:
    done = ovt("run", *ovt.flags, "-i", "--rm", "busybox", "cat", input=text)
    assert done.stdout == text


def test_input_of_a_machine_that_has_no_template(ovt: Verbs) -> None:
    """Options of its own: a machine with them boots, and what is typed meanwhile must reach the program."""
    done = ovt("run", *ovt.flags, "-i", "--rm", "--memory", "200M", "busybox", "wc", "-l", input="x\n" * 50)
    assert done.stdout.split() == ["50"]


def test_run_at_a_terminal(ovt: Verbs, terminal: Open) -> None:
    shell = terminal("run", *ovt.flags, "-it", "--rm", "--name", "web", "busybox", "sh")
    shell.expect("# ")
    shell.type(b"tty; echo $(( 6 * 7 ))\n")
    shell.expect("/dev/")
    shell.expect("42\n")
    shell.type(b"exit 5\n")
    assert shell.end() == 5


def test_run_in_the_background_and_be_removed(ovt: Verbs) -> None:
    assert ovt.out("run", *ovt.flags, "-d", "--rm", "--name", "web", "busybox", "sh", "-c", "sleep 1; exit 9") == "web"
    assert ovt.out("wait", "web") == "9"
    ovt.wait_for(lambda: ovt.out("ps", "-aq") == "")


def test_a_dry_run_makes_nothing(ovt: Verbs) -> None:
    for verb in ("create", "run"):
        text = ovt.out(verb, *ovt.flags, "--dry-run", "--name", "web", "busybox", "ls")
        assert text.startswith("instance web in ")
    assert os.listdir(ovt.data / "instances") == []


# create, start, stop, kill


def test_create_and_start(ovt: Verbs) -> None:
    options = ("--name", "web", "-l", "a=b")
    assert ovt.out("create", *ovt.flags, *options, "busybox", "sh", "-c", "echo hi; exit 3") == "web"
    assert ovt.status("web") == "created"
    taken = ovt("create", *ovt.flags, "--name", "web", "busybox", "true", check=False)
    assert taken.returncode == 1
    assert "web" in taken.stderr
    done = ovt("start", "--attach", "web", check=False)
    assert (done.returncode, done.stdout) == (3, "hi\n")
    assert ovt.out("start", "web") == "web"
    assert ovt.out("wait", "web") == "3"
    assert ovt.out("logs", "web") == "hi\nhi"
    assert ovt.out("delete", "web") == "web"


def test_a_life(ovt: Verbs) -> None:
    ovt.start()
    assert ovt.out("ps", "--format", "{{.name}} {{.kind}} {{.status}}") == f"web {ovt.kind} running"
    assert ovt("pause", "web").stdout == "web\n"
    assert ovt.status("web") == "paused"
    ovt("resume", "web")
    ovt("rename", "web", "www")
    assert ovt.out("exec", "www", "hostname") == "web"
    ovt("stop", "www")
    assert ovt.out("wait", "www") == "7"
    assert ovt.out("logs", "www") == "started\nbye"
    assert ovt.out("stop", "www") == "www"  # fine when it has ended
    ovt("start", "www")
    ovt("restart", "-t", "5s", "www")
    assert ovt.status("www") == "running"
    ovt("kill", "www")
    assert ovt.out("wait", "www") == "137"
    assert ovt("delete", "www").stdout == "www\n"


def test_stop_kills_what_does_not_listen(ovt: Verbs) -> None:
    ovt.start(DEAF)
    begin = time.monotonic()
    ovt("stop", "-t", "0.5", "web")
    assert 0.5 <= time.monotonic() - begin < 8
    assert ovt.out("wait", "web") == "137"


def test_a_paused_one_is_stopped(ovt: Verbs) -> None:
    ovt.start()
    ovt("pause", "web")
    ovt("stop", "web")
    assert ovt.out("wait", "web") == "7"


def test_kill_asks_politely_too(ovt: Verbs) -> None:
    ovt.start()
    ovt("kill", "-s", "TERM", "web")
    assert ovt.out("wait", "web") == "7"


def test_delete_by_force(ovt: Verbs) -> None:
    ovt.start()
    refused = ovt("delete", "web", check=False)
    assert refused.returncode == 1
    assert ovt.status("web") == "running"
    ovt("delete", "--force", "web")
    assert ovt.out("ps", "-aq") == ""


def test_a_restart_policy(ovt: Verbs) -> None:
    script = "echo try; exit 9"
    ovt("run", *ovt.flags, "-d", "--name", "web", "--restart", "on-failure:1", "busybox", "sh", "-c", script)
    state = ("inspect", "--format", "{{.status}} {{.restarts}} {{.exit_code}}", "web")
    ovt.wait_for(lambda: ovt.out(*state) == "stopped 1 9", 40)
    assert ovt.out("logs", "web").split().count("try") == 2


# update


def test_limits_change_while_it_runs(ovt: Verbs) -> None:
    ovt.start()
    ovt("update", "--memory", "200M", "--restart", "on-failure:3", "web")
    (record,) = json.loads(ovt.out("stats", "--no-stream", "--format", "json", "web"))
    # a machine's balloon gets there as the guest gives memory back
    ovt.wait_for(lambda: json.loads(ovt.out("stats", "--no-stream", "--format", "json", "web"))[0]["memory_limit"]
                 <= 200 << 20)  # fmt: skip
    ovt("update", "--cpus", "1", "web")
    (shown,) = json.loads(ovt.out("inspect", "web"))
    assert (shown["limits"]["memory"], shown["limits"]["cpus"], shown["restart"]) == (200 << 20, 1.0, "on-failure:3")
    assert record["memory"] > 0


# what is refused, in the same words


@pytest.mark.parametrize(
    "verb", ["start", "stop", "kill", "pause", "resume", "wait", "delete", "inspect", "logs", "top"]
)
def test_a_name_that_nobody_has(ovt: Verbs, verb: str) -> None:
    done = ovt(verb, "nobody", check=False)
    assert done.returncode != 0
    assert "no instance" in done.stderr
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "status", "words"),
    [
        (["pause", "web"], 1, "ovt: cannot pause web: it is created"),
        (["resume", "web"], 1, "ovt: cannot resume web: it is created"),
        (["kill", "web"], 1, "ovt: cannot kill web: it is created"),
        (["exec", "web", "true"], 125, "ovt: cannot exec web: it is created"),
        (["attach", "web"], 125, "ovt: cannot attach web: it is created"),
        (["top", "web"], 1, "ovt: cannot top web: it is created"),
    ],
)
def test_wrong_for_one_that_was_not_started(ovt: Verbs, verb: list[str], status: int, words: str) -> None:
    ovt("create", *ovt.flags, "--name", "web", "busybox", "true")
    done = ovt(*verb, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (status, words)


def test_wrong_for_one_that_lives(ovt: Verbs) -> None:
    ovt.start()
    refused = {verb: ovt(verb, "web", check=False) for verb in ("start", "resume", "delete")}
    assert {done.returncode for done in refused.values()} == {1}
    assert all(done.stderr.startswith(f"ovt: cannot {verb} web: it is running") for verb, done in refused.items())
    ovt("pause", "web")
    done = ovt("exec", "web", "true", check=False)
    assert (done.returncode, done.stderr) == (125, "ovt: cannot exec web: it is paused\n  try: ovt resume web\n")
