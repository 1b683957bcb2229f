"""The fine print of the command line: what podman, conmon and containerd read, grep and wait for."""

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BARE, Bundle, Oci
from tests.ovt.live import WAITING, Create, Run, bind, refused, wait_for, with_mounts

pytestmark = pytest.mark.root


def test_version(oci: Oci) -> None:
    lines = oci("--version", check=True).stdout.splitlines()
    assert re.fullmatch(r"ovt-runtime version \S+", lines[0])
    assert [line.split(": ")[0] for line in lines[1:]] == ["commit", "spec"]


@pytest.mark.parametrize("verb", ["create", "checkpoint", "restore", "exec", "kill", "update"])
def test_help_of_a_verb_succeeds(oci: Oci, verb: str) -> None:
    done = oci(verb, "--help", check=True)
    assert verb in done.stdout and done.stderr == ""


def test_nothing_in_the_environment(runtime: Path, create: Create, run_root: Path) -> None:
    container = create(*WAITING)
    for verb in (["start"], ["state"], ["kill"]):
        subprocess.run([runtime, "--root", run_root, *verb, container.id], env={}, check=True, capture_output=True)


def test_pid_file_has_digits_and_no_newline(create: Create, tmp_path: Path) -> None:
    container = create(*WAITING, flags=("--pid-file", tmp_path / "pid"))
    assert (tmp_path / "pid").read_bytes() == str(container.pid).encode()


def test_state_with_stderr_merged_is_one_json_object(create: Create) -> None:
    container = create(*WAITING, config={"annotations": {"a": "b"}})
    done = container.oci("state", container.id, capture_output=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    state = json.loads(done.stdout)
    assert {"ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"} <= state.keys()
    assert (state["status"], state["annotations"]) == ("created", {"a": "b"})
    assert state["bundle"] == str(container.bundle) and state["rootfs"] == str(container.rootfs)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", state["created"])


def test_state_through_the_life(create: Create) -> None:
    container = create(*WAITING)
    seen = [container.status]
    for verb in ("start", "pause", "resume"):
        container.oci(verb, container.id, check=True)
        seen.append(container.status)
    container.stop()
    state = container.state()
    assert [*seen, state["status"]] == ["created", "running", "paused", "running", "stopped"]
    assert state["pid"] == 0


def test_ps_in_json_is_a_list_of_host_pids(create: Create) -> None:
    container = create("sh", "-c", "sleep 1000 & exec sleep 1000").start()

    def pids() -> list[int]:
        done = container.oci("ps", "--format", "json", container.id, check=True)
        assert done.stderr == ""
        numbers: list[int] = json.loads(done.stdout)
        return numbers

    wait_for(lambda: len(pids()) == 2)
    assert container.pid in pids()
    assert json.loads(container.oci("ps", "-f", "json", container.id).stdout) == pids()


def test_ps_as_a_table(create: Create) -> None:
    container = create(*WAITING).start()
    lines = container.oci("ps", container.id, check=True).stdout.splitlines()
    assert "PID" in lines[0] and len(lines) == 2 and str(container.pid) in lines[1].split()
    lines = container.oci("ps", container.id, "-o", "pid,comm", check=True).stdout.splitlines()
    assert lines[1].split() == [str(container.pid), "sleep"]


def test_create_holds_the_callers_streams_and_leaves_an_orphan(create: Create) -> None:
    container = create("sh", "-c", "echo out; echo err >&2").start()
    wait_for(lambda: container.status == "stopped")
    assert container.output() == "out\nerr\n"  # tests/leaks.py reaps it: this process has become its parent


@pytest.mark.parametrize("form", ["json", "text"])
def test_log(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path, form: str) -> None:
    log = tmp_path / "log"
    done = oci("--log", log, "--log-format", form, "create", "-b", bundle("no-such"), container_id)
    assert "executable file not found" in refused(done) and done.returncode == 1
    text = log.read_text()
    assert text.count("\n") == 1
    if form == "json":
        entry = json.loads(text)
        assert set(entry) == {"level", "msg", "time"} and entry["level"] == "error"
        assert "executable file not found" in entry["msg"]
    else:
        assert re.match(r'time="\S+" level=error msg=".*executable file not found', text)


def test_success_writes_no_log(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    done = oci("--log", tmp_path / "log", "--log-format", "json", "run", "-b", bundle(), container_id, check=True)
    assert (done.stdout, done.stderr, (tmp_path / "log").read_text()) == ("", "", "")


def test_a_log_that_cannot_be_written(oci: Oci, container_id: str) -> None:
    assert "/no/such/log: no such file or directory" in refused(oci("--log", "/no/such/log", "state", container_id))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such"], "executable file not found in"),
        (["/no/such"], "no such file or directory"),
        (["/etc/passwd"], "permission denied"),
    ],
)
def test_errors_that_podman_greps(
    oci: Oci, bundle: Bundle, container_id: str, arguments: list[str], words: str
) -> None:
    assert words in refused(oci("create", "-b", bundle(*arguments), container_id))
    assert "does not exist" in refused(oci("state", container_id))


@pytest.mark.parametrize("verb", [["state"], ["start"], ["kill"], ["delete"], ["pause"], ["resume"], ["ps"], ["exec"],
                                  ["update", "--memory", "8M"], ["events", "--stats"]])  # fmt: skip
def test_what_is_not_there_does_not_exist(oci: Oci, container_id: str, verb: list[str]) -> None:
    more = ["true"] if verb == ["exec"] else []
    assert "does not exist" in refused(oci(*verb, container_id, *more))


def test_usage_errors(oci: Oci, container_id: str) -> None:
    assert "unknown command frobnicate" in refused(oci("frobnicate"))
    assert "unknown option: --frob" in refused(oci("state", "--frob", container_id))
    assert "usage: ovt-runtime state CONTAINER" in refused(oci("state"))
    assert "flag needs an argument: --bundle" in refused(oci("create", "--bundle"))
    assert "unknown log-format" in refused(oci("--log-format", "xml", "list"))


@pytest.mark.parametrize("name", ["a", "A-1_b+c.d", "x" * 200, "0", "_x"])
def test_a_good_name(oci: Oci, bundle: Bundle, name: str) -> None:
    oci("run", "-b", bundle(), name, check=True)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "ä", "a\nb", "x" * 2000])
def test_a_bad_name(oci: Oci, bundle: Bundle, name: str) -> None:
    refused(oci("run", "-b", bundle(), name))


def test_a_name_that_is_taken(create: Create, bundle: Bundle) -> None:
    container = create(*WAITING)
    done = container.oci("create", "-b", bundle(), container.id)
    assert "exist" in refused(done) and container.status == "created"


def test_roots_are_apart(create: Create, bundle: Bundle, tmp_path: Path) -> None:
    container = create(*WAITING)
    other = tmp_path / "other"
    assert "does not exist" in refused(container.oci("--root", other, "state", container.id))
    assert json.loads(container.oci("--root", other, "list", "--format", "json", check=True).stdout) == []


def test_list(create: Create) -> None:
    first, second = create(*WAITING), create(*WAITING).start()
    entries = json.loads(first.oci("list", "--format", "json", check=True).stdout)
    assert [(entry["id"], entry["status"]) for entry in entries] == [(first.id, "created"), (second.id, "running")]
    assert {"ociVersion", "pid", "bundle", "rootfs", "created", "owner"} <= entries[0].keys()
    assert first.oci("list", "-q", check=True).stdout.split() == [first.id, second.id]
    lines = first.oci("list", check=True).stdout.splitlines()
    assert lines[0].split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    assert lines[1].split()[:3] == [first.id, str(first.pid), "created"]
    assert "invalid format option: yaml" in refused(first.oci("list", "-f", "yaml"))


def test_spec(oci: Oci, tmp_path: Path) -> None:
    oci("spec", cwd=tmp_path, check=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["process"]["args"] and config["root"]["path"] == "rootfs"
    assert "exists" in refused(oci("spec", cwd=tmp_path))
    (tmp_path / "less").mkdir()
    oci("spec", "--rootless", "--bundle", tmp_path / "less", check=True)
    config = json.loads((tmp_path / "less/config.json").read_text())
    assert config["linux"]["uidMappings"] and {"type": "user"} in config["linux"]["namespaces"]


def test_features(oci: Oci) -> None:
    features = json.loads(oci("features", check=True).stdout)
    assert {"ociVersionMin", "ociVersionMax", "hooks", "mountOptions", "linux"} <= features.keys()
    assert len(features["hooks"]) == 6 and "rro" in features["mountOptions"]
    assert set(features["linux"]["namespaces"]) >= {"cgroup", "ipc", "mount", "network", "pid", "user", "uts", "time"}


def test_listen_fds(runtime: Path, run_root: Path, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    (tmp_path / "passed").write_text("passed\n")
    place = bundle("sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; cat <&3; ls /proc/self/fd")
    inherit: list[str | Path] = ["sh", "-c", 'exec 3< "$0" 4< "$0"; exec "$@"', tmp_path / "passed"]
    done = subprocess.run([*inherit, runtime, "--root", run_root, "run", "-b", place, container_id], text=True,
                          env={**BARE, "LISTEN_FDS": "1"}, capture_output=True, check=True)  # fmt: skip
    assert done.stdout.split() == ["1", "1", "passed", "0", "1", "2", "3", "4"]


def test_no_other_descriptor_is_inherited(run: Run, tmp_path: Path) -> None:
    with open(tmp_path / "leak", "w") as leak:
        assert run("ls", "/proc/self/fd", pass_fds=[leak.fileno()]).split() == ["0", "1", "2", "3"]


def test_descriptors_that_were_closed(runtime: Path, run_root: Path, bundle: Bundle, container_id: str) -> None:
    command: list[str | Path] = [runtime, "--root", run_root, "run", "-b", bundle("ls", "/proc/self/fd"), container_id]
    done = subprocess.run(["sh", "-c", '"$@" 0<&- 2>&-', "sh", *command], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:3] == ["0", "1", "2"]


def test_notify_socket(create: Create, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        service.bind(str(tmp_path / "notify"))
        service.settimeout(10)
        env = {**BARE, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        send = 'import os, socket as s; s.socket(1, 2).sendto(b"STATUS=x\\nREADY=1", os.environ["NOTIFY_SOCKET"])'
        mounts = [bind(name, name, "ro", "rbind") for name in ("/usr", "/lib", "/lib64")]
        script = f"test -S $NOTIFY_SOCKET && python3 -I -S -c '{send}'; exec sleep 1000"
        container = create("sh", "-c", script, env=env, edit=with_mounts(*mounts))
        container.oci("start", container.id, env=env, check=True)
        assert service.recv(4096) == f"MAINPID={container.pid}\nREADY=1".encode()


def test_notify_socket_of_a_service_that_ends(create: Create, tmp_path: Path) -> None:
    env = {**BARE, "NOTIFY_SOCKET": str(tmp_path / "nobody")}
    container = create("sh", "-c", "echo $NOTIFY_SOCKET", env=env)
    container.oci("start", container.id, env=env, check=True)
    assert container.output() == "/run/notify/notify.sock\n"
