"""The commands over a fake engine: words in, words and exit status out."""

import json
import re
from pathlib import Path

import click
import pytest

from ovt import cli
from ovt.cli import COMMANDS
from ovt.errors import HostError, PayloadError
from ovt.host import Host
from ovt.model import TRANSITIONS, Limits, Restart, Spec
from tests.fakes import FakeEngine
from tests.ovt.cli.conftest import Ovt

ID = re.compile(r"\b[0-9a-f]{12}\b")


@pytest.fixture
def web(ovt: Ovt) -> str:
    assert ovt("run", "-d", "--name", "web", "busybox", "sleep", "9").status == 0
    return "web"


# the table of commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_its_help_agrees_with_the_list(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.name == name
    assert (command.help or "").startswith(COMMANDS[name].help)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    options = [param for param in command.params if isinstance(param, click.Option)]
    assert [option.name for option in options if not option.help and name not in {"create", "run", "kill"}] == []


def test_help(ovt: Ovt) -> None:
    done = ovt("--help")
    assert done.status == 0
    assert all(f"  {name} " in done.out for name in COMMANDS)
    assert ovt("run", "-h").status == 0


def test_version(ovt: Ovt) -> None:
    assert ovt("version").out == ovt("--version").out


# errors


@pytest.mark.parametrize(
    ("words", "status", "message", "hint"),
    [
        (("start", "web"), 1, "cannot start web: it is running", "ovt restart web"),
        (("start", "none"), 1, "cannot start none: there is no instance 'none'", "ovt ps -a lists them"),
        (("exec", "none", "ls"), 125, "cannot exec none: there is no instance 'none'", "ovt ps -a lists them"),
        (("rename", "web", "a b"), 2, "cannot rename web: name 'a b' is not a host name", "letters, digits"),
        (("run", "--name", "web", "busybox"), 125, "cannot run web: the name 'web' is taken", "choose another"),
        (("run", "--memory", "x", "busybox"), 125, "cannot run: 'x' is not a size", "such as 512M"),
        (("run",), 125, "Missing argument 'IMAGE'.", "ovt run --help"),
        (("ps", "--nonsense"), 2, "No such option", "ovt ps --help"),
        (("delet", "web"), 2, "there is no command 'delet'", "ovt delete"),
        (("frobnicate",), 2, "there is no command 'frobnicate'", "ovt --help"),
        (("ps", "--filter", "colour=red"), 2, "cannot ps: filter 'colour=red' is not known", "KEY=VALUE"),
        (("ps", "--filter", "status=red"), 2, "cannot ps: there is no status 'red'", "one of creating"),
        (("ps", "--format", "{{.none}}"), 2, "cannot ps: there is no {{.none}}", "this output has id"),
        (("stop",), 2, "cannot stop: no instance was named", "give names, or --all"),
        (("stop", "-a", "web"), 2, "cannot stop: --all and names together", "leave one"),
        (("update", "web"), 2, "cannot update: nothing to change was given", "ovt update --help"),
        (("cp", "a", "b"), 2, "cannot cp: neither is INSTANCE:PATH", "ovt cp FILE"),
        (("cp", "web:/a", "web:/b"), 2, "cannot cp: both are INSTANCE:PATH", "ovt cp FILE"),
        (("cp", "web:", "/b"), 2, "cannot cp: 'web:' names no path", "web:/"),
        (("delete", "web"), 1, "cannot delete web: it is running", "ovt stop web, or ovt delete --force web"),
        (("logs", "none"), 1, "cannot logs none: there is no instance", "ovt ps -a"),
    ],
)
def test_errors_say_what_which_why_and_what_next(
    ovt: Ovt, web: str, words: tuple[str, ...], status: int, message: str, hint: str
) -> None:
    done = ovt(*words)
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(f"ovt: {message}")
    assert f"\n  try: {hint}" in done.err


def test_one_failure_does_not_keep_the_others_back(ovt: Ovt, web: str) -> None:
    ovt("create", "--name", "db", "busybox")
    done = ovt("delete", "none", "db", "web")
    assert (done.status, done.out) == (1, "db\n")
    assert done.err.count("ovt: cannot delete") == 2


def test_failures_of_the_program_have_their_own_status(ovt: Ovt, engine: FakeEngine) -> None:
    for status in (126, 127):
        engine.fail = {"start": PayloadError("no such program", status)}
        assert ovt("run", "-d", "busybox", "none").status == status
    engine.fail = {"create": HostError("no room")}
    assert ovt("run", "-d", "--rm", "busybox").status == 125
    engine.fail = {}
    assert len(ovt("ps", "-aq").out.split()) == 2  # --rm left nothing


def test_system_errors_become_words(ovt: Ovt, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    done = ovt("create", "busybox")
    assert done.status == 1
    assert done.err.startswith("ovt: cannot create busybox: ")


# verbs


def test_a_life(ovt: Ovt, engine: FakeEngine) -> None:
    assert ovt("create", "--name", "web", "busybox").out == "web\n"
    for verb in ("start", "pause", "resume", "restart", "kill"):
        done = ovt(verb, "web")
        assert (done.status, done.out, done.err) == (0, "web\n", "")
    assert ovt("wait", "web").out == "137\n"
    assert ovt("delete", "web").out == "web\n"
    assert ovt("ps", "-aq").out == ""


def test_quiet(ovt: Ovt) -> None:
    id = ovt("-q", "create", "--name", "web", "busybox").out.strip()
    assert ID.fullmatch(id)
    assert ovt("-q", "start", id[:5]).out == ""
    assert ovt("-q", "ps").out == f"{id}\n"


def test_all(ovt: Ovt) -> None:
    for name in ("a", "b"):
        ovt("create", "--name", name, "busybox")
    assert ovt("start", "--all").out == "a\nb\n"
    assert ovt("stop", "--all", "-t", "1s").out == "a\nb\n"
    assert ovt("stop", "--all").out == ""
    assert ovt("start", "a").status == 0
    assert ovt("stop", "--force", "a").status == 0


def test_boot_starts_what_its_policy_asks_for(ovt: Ovt, host: Host) -> None:
    for name, policy in (("a", "always"), ("b", "no"), ("c", "unless-stopped"), ("d", "unless-stopped")):
        ovt("create", "--name", name, "--restart", policy, "busybox")
    ovt("stop", "d")
    assert ovt("start", "--boot").out == "a\nc\n"


def test_boot_goes_by_order_and_waits(ovt: Ovt, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("ovt.cli.lifecycle.time.sleep", waited.append)
    for name, order, delay in (("a", "0", "1s"), ("b", "9", "2s"), ("c", "-1", "3s")):
        ovt("create", "--name", name, "--restart", "always", "--boot-order", order, "--boot-delay", delay, "busybox")
    assert ovt("start", "--boot").out == "b\na\nc\n"
    assert waited == [2.0, 1.0]  # nothing comes after the last


def test_update(ovt: Ovt, web: str, host: Host) -> None:
    words = ("--memory", "64M", "--cpus", "2", "--pids", "7", "--cpuset-cpus", "0", "--memory-swap", "128M")
    assert ovt("update", *words, "--restart", "always", "web").status == 0
    spec = host.get("web")[0].spec
    assert (spec.limits, spec.restart) == (Limits(2.0, "0", 64 << 20, 128 << 20, 7), Restart("always"))


def test_exec(ovt: Ovt, web: str, engine: FakeEngine) -> None:
    assert ovt("exec", "-e", "A=1", "-w", "/srv", "-u", "www", "-i", "--privileged", "web", "ls", "-l").status == 7
    _, _, process, detach = engine.calls[-1]
    assert process == (("ls", "-l"), ("A=1",), "/srv", "www", False, True, True)
    assert not detach
    assert ovt("exec", "-dt", "web", "ls").out == "4242\n"


def test_cp(ovt: Ovt, web: str, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source, target in (("a/.", "web:b"), ("./x:y", "web:/b/"), ("web:/b", "."), ("web:b/.", "c/")):
        assert ovt("cp", source, target).status == 0
    assert [call[3:] for call in engine.calls if call[0] == "copy"] == [
        (f"{tmp_path}/a/.", "/b", True),
        (f"{tmp_path}/x:y", "/b/", True),
        ("/b", f"{tmp_path}/.", False),
        ("/b/.", f"{tmp_path}/c/", False),
    ]


def test_dry_run_and_verbose(ovt: Ovt) -> None:
    done = ovt("run", "--dry-run", "busybox", "ls", "-l")
    assert "run ls -l" in done.out
    assert ovt("ps", "-aq").out == ""
    done = ovt("-v", "create", "--name", "a", "busybox", "ls")
    assert (done.out, "run ls" in done.err) == ("a\n", True)


# lists


def test_ps(ovt: Ovt, web: str, host: Host) -> None:
    ovt("create", "--name", "db", "-l", "tier=back", "-l", "x=", "busybox", "a-command-that-is-rather-long", "--option")
    ovt("run", "-d", "--name", "old", "busybox")
    ovt("stop", "old")
    lines = [re.sub(r" {2,}", "|", ID.sub("ID", line)) for line in ovt("ps", "-a").out.splitlines()]
    assert lines == [
        "ID|NAME|KIND|IMAGE|COMMAND|CREATED|STATUS",
        "ID|web|container|busybox|sleep 9|less than a second ago|running less than a second",
        "ID|db|container|busybox|a-command-that-is-rather-long…|less than a second ago|created",
        "ID|old|container|busybox|sh|less than a second ago|stopped (143) less than a second ago",
    ]
    assert len(ovt("ps").out.splitlines()) == 2
    assert len(ovt("ps", "--no-header").out.splitlines()) == 1
    assert "rather-long --option" in ovt("ps", "-a", "--no-trunc").out
    assert ID.fullmatch(ovt("ps", "-q").out.strip())


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["status=created"], "db"),
        (["status=created", "status=running"], "web db"),
        (["name=e"], "web"),
        (["label=tier"], "db"),
        (["label=tier=back"], "db"),
        (["label=tier=front"], ""),
        (["exited=143"], "old"),
        (["exited=0"], ""),
        (["image=busy", "status=stopped"], "old"),
        (["kind=vm"], ""),
        (["kind=container", "name=e"], "web"),
    ],
)
def test_filters(ovt: Ovt, web: str, filters: list[str], expected: str) -> None:
    ovt("create", "--name", "db", "-l", "tier=back", "busybox")
    ovt("run", "-d", "--name", "old", "busybox")
    ovt("stop", "old")
    every = [] if filters[0].startswith(("status", "exited")) else ["-a"]
    words = [word for text in filters for word in ("-f", text)]
    assert ovt("ps", *every, *words, "--format", "{{.name}}").out.split() == expected.split()


def test_ps_as_json_and_template(ovt: Ovt, web: str) -> None:
    (record,) = json.loads(ovt("ps", "--format", "json").out)
    assert (record["name"], record["status"], record["command"]) == ("web", "running", ["sleep", "9"])
    assert record["pid"] > 0
    assert record["exit_code"] is None
    assert ovt("ps", "--format", "{{.name}} {{.status}}").out == "web running\n"
    assert ovt("ps", "--format", "table {{.name}}\\t{{.status}}").out == "NAME  STATUS\nweb   running\n"


def test_a_damaged_record_does_not_hide_the_others(ovt: Ovt, web: str, host: Host) -> None:
    ovt("create", "--name", "db", "busybox")
    id = host.get("db")[0].id
    Path(host.store.home(id), "instance.json").write_text("{")
    done = ovt("ps", "-a")
    assert "web" in done.out
    assert done.err == f"instance {id} is damaged: ovt delete --force {id}\n"
    assert ovt("delete", "--force", "db").status == 0


def test_inspect(ovt: Ovt, web: str, host: Host) -> None:
    (record,) = json.loads(ovt("inspect", "web").out)
    assert record["id"] == host.get("web")[0].id
    assert record["spec"]["command"] == ["sleep", "9"]
    assert Spec.unpack(record["spec"]) == host.get("web")[0].spec
    assert ovt("inspect", "--format", "{{.limits.memory}}", "web").out == "0\n"
    done = ovt("inspect", "web", "none")
    assert (done.status, len(json.loads(done.out))) == (1, 1)


def test_logs(ovt: Ovt, web: str, host: Host) -> None:
    assert ovt("logs", "web").out == ""
    home = Path(host.store.home(host.get("web")[0].id))
    time = "2026-11-22T16:00:0{}.000000000Z"
    rows = [(1, "stdout F one"), (2, "stderr F bad"), (3, "stdout P tw"), (4, "stdout F o"), (5, "stdout F three")]
    (home / "log").write_text("".join(f"{time.format(second)} {text}\n" for second, text in rows))
    done = ovt("logs", "web")
    assert (done.out, done.err) == ("one\ntwo\nthree\n", "bad\n")
    assert ovt("logs", "-n", "1", "web").out == "three\n"
    assert ovt("logs", "-t", "-n", "2", "web").out == f"{time.format(3)} two\n{time.format(5)} three\n"
    assert ovt("logs", "--since", "2026-11-22T16:00:05Z", "web").out == "three\n"
    assert ovt("logs", "--until", "2026-11-22T16:00:02Z", "web").out == "one\n"


def test_stats(ovt: Ovt, web: str) -> None:
    header, row = ovt("stats", "--no-stream").out.splitlines()
    assert [word.strip() for word in re.split(r" {2,}", header)] == [
        *("ID", "NAME", "CPU", "MEMORY", "NETWORK IN / OUT", "BLOCK READ / WRITE", "PIDS")
    ]
    assert re.split(r" {2,}", row)[1:] == ["web", "0.0%", "3.0MiB / 64.0MiB", "10B / 20B", "1.0KiB / 2.0KiB", "2"]
    (record,) = json.loads(ovt("stats", "--no-stream", "--format", "json", "web").out)
    assert record["memory"] == 3 << 20
    done = ovt("stats", "--no-stream", "none")
    assert (done.status, done.err.count("ovt: cannot")) == (1, 1)


def test_top(ovt: Ovt, web: str) -> None:
    header, row = ovt("top", "web").out.splitlines()
    assert header.split() == ["PID", "HOST", "PID", "HOST", "UID", "STATE", "TIME", "MEMORY", "COMMAND"]
    assert re.split(r" {2,}", row)[2:] == ["0", "S", "1:01.50", "4.0KiB", "sleep 1000"]


def test_events(ovt: Ovt, web: str) -> None:
    ovt("stop", "web")
    lines = ovt("events").out.splitlines()
    assert [line.split()[1] for line in lines] == ["create", "start", "stop", "exit"]
    assert lines[-1].endswith("web  exit_code=143")
    assert ovt("events", "--filter", "event=exit", "--format", "{{.exit_code}}").out == "143\n"
    (line,) = ovt("events", "--format", "json", "--filter", "event=start").out.splitlines()
    record = json.loads(line)
    assert record["time"].endswith("Z")
    assert ovt("events", "--since", "0s").out == ""
    assert ovt("events", "--filter", "colour=red").status == 2


def test_info(ovt: Ovt, web: str) -> None:
    data = json.loads(ovt("info", "--format", "json").out)
    assert (data["instances"], data["statuses"]) == (1, {"running": 1})
    assert ovt("info", "--format", "{{.version}}").out in ovt("version").out
    assert "data root" in ovt("info").out


# completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(ovt: Ovt, shell: str) -> None:
    done = ovt("completion", shell)
    assert done.status == 0
    assert "_OVT_COMPLETE" in done.out
    assert ovt("completion", "tcsh").status == 2


@pytest.mark.parametrize(
    ("verb", "expected"),
    [("start", {"db", "old"}), ("stop", {"web"}), ("exec", {"web"}), ("delete", {"db", "old"}), ("resume", set())],
)
def test_names_are_offered_where_their_state_allows_the_verb(
    ovt: Ovt, web: str, host: Host, verb: str, expected: set[str]
) -> None:
    from click.shell_completion import ShellComplete

    ovt("create", "--name", "db", "busybox")
    ovt("run", "-d", "--name", "old", "busybox")
    ovt("stop", "old")
    words = ["--data-root", host.data, "--run-root", host.run_root, verb]
    offered = ShellComplete(cli.cli, {}, "ovt", "_OVT_COMPLETE").get_completions(words, "")
    assert {item.value for item in offered} == expected


def test_force_offers_everything_to_delete(ovt: Ovt, web: str, host: Host) -> None:
    from click.shell_completion import ShellComplete

    words = ["--data-root", host.data, "--run-root", host.run_root, "delete", "--force"]
    offered = ShellComplete(cli.cli, {}, "ovt", "_OVT_COMPLETE").get_completions(words, "w")
    assert [item.value for item in offered] == ["web"]


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (("cp",), "w", [("web:", "plain"), ("w", "file")]),
        (("run",), "bu", [("busybox", "plain"), ("bu", "file")]),
        (("run",), "./", [("./", "file")]),
        (("res",), "res", [("restart", "plain"), ("resume", "plain"), ("reset", "plain")]),
    ],
)
def test_images_and_files_are_offered(
    ovt: Ovt, web: str, host: Host, words: tuple[str, ...], incomplete: str, expected: list[tuple[str, str]]
) -> None:
    from click.shell_completion import ShellComplete

    before = ["--data-root", host.data, "--run-root", host.run_root, *(word for word in words if word != "res")]
    offered = ShellComplete(cli.cli, {}, "ovt", "_OVT_COMPLETE").get_completions(before, incomplete)
    assert [(item.value, item.type) for item in offered] == expected


def test_every_verb_that_completes_is_in_the_table_of_states() -> None:
    from ovt.cli.context import InstanceName

    for name in COMMANDS:
        command = cli.cli.get_command(click.Context(cli.cli), name)
        assert command is not None
        for param in command.params:
            if isinstance(param.type, InstanceName):
                assert param.type.verb == name
                assert name in TRANSITIONS
