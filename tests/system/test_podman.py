"""Real podman on the runtime: the life of a container, its processes, its streams and its terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.podman_host import IMAGE, PodmanHost

pytestmark = [pytest.mark.podman, pytest.mark.root]


def wait_until_logged(podman: PodmanHost, container: str, text: str) -> None:
    """Wait until the container's log holds `text`."""
    deadline = time.monotonic() + 10
    while text not in podman.ok("logs", container):
        assert time.monotonic() < deadline, f"{text!r} never logged"
        time.sleep(0.05)


# ---- run


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_run_returns_the_exit_status_of_the_command(podman: PodmanHost, code: int) -> None:
    assert podman.run("--", "sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize(
    ("command", "code"),
    [("no-such-program", 127), ("/no/such/program", 127), ("/etc/plain-file", 126), ("/etc", 126)],
)
def test_what_cannot_be_executed_is_126_or_127_as_in_a_shell(podman: PodmanHost, command: str, code: int) -> None:
    done = podman.run("--", command)
    assert done.returncode == code
    assert done.stderr.count("\n") <= 2, "one clear line, not a trace"
    assert command in done.stderr


def test_streams_stay_apart(podman: PodmanHost) -> None:
    done = podman.run("--", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_stdin_reaches_the_command_and_ends(podman: PodmanHost) -> None:
    assert podman.run("-i", "--", "wc", "-c", input="x" * 200_000).stdout.strip() == "200000"


def test_environment_is_what_was_asked_for(podman: PodmanHost) -> None:
    lines = podman.output("-e", "A=1", "-e", "B=two words", "--", "env").splitlines()
    assert {"A=1", "B=two words", "PATH=/bin"} <= set(lines)
    assert not [line for line in lines if line.startswith(("PYTHON", "CONTAINERS_CONF", "LISTEN", "_OCI"))]


@pytest.mark.parametrize(
    ("options", "identity"),
    [
        (("-u", "1000:2000"), "uid=1000(web) gid=2000(extra) groups=2000(extra)"),
        (("-u", "web"), "uid=1000(web) gid=1000(web) groups=1000(web),2000(extra)"),
        (("-u", "web", "--group-add", "4000"), "uid=1000(web) gid=1000(web) groups=1000(web),2000(extra),4000"),
        (("-u", "54321"), "uid=54321(54321) gid=0(root) groups=0(root)"),
    ],
)
def test_user_and_groups(podman: PodmanHost, options: tuple[str, ...], identity: str) -> None:
    assert podman.output(*options, "--", "id") == identity


def test_a_user_can_open_the_standard_streams_again(podman: PodmanHost) -> None:
    # /dev/stdout leads to the caller's pipe, made by root: the runtime has to give it to the container's user.
    done = podman.run("-u", "web", "--", "sh", "-c", "echo out >/dev/stdout; echo err >/dev/stderr")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_working_directory(podman: PodmanHost) -> None:
    assert podman.output("-w", "/home", "--", "pwd") == "/home"


def test_hostname(podman: PodmanHost) -> None:
    assert podman.output("--hostname", "harbour", "--", "hostname") == "harbour"


def test_umask_and_oom_score(podman: PodmanHost) -> None:
    text = podman.output(
        "--umask", "0027", "--oom-score-adj", "500", "--", "sh", "-c", "umask; cat /proc/1/oom_score_adj"
    )
    assert text.split() == ["0027", "500"]


def test_init_becomes_process_1_and_passes_the_exit_status_on(podman: PodmanHost) -> None:
    done = podman.run("--init", "--", "sh", "-c", "tr '\\0' ' ' </proc/1/cmdline; exit 7")
    assert done.returncode == 7
    assert "-- sh -c" in done.stdout


def test_pid_file_and_container_id_file(podman: PodmanHost) -> None:
    pid_file, id_file = podman.directory / "pid", podman.directory / "cid"
    container = podman.start("--pidfile", str(pid_file), "--cidfile", str(id_file))
    assert id_file.read_text() == container
    pid = int(pid_file.read_text())
    assert str(pid) == podman.inspect(container, "{{.State.Pid}}")
    assert Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\0001000\0"
    pid_file.unlink()
    id_file.unlink()


def test_the_container_sees_no_descriptor_of_the_host(podman: PodmanHost) -> None:
    listing = podman.output("--", "ls", "-l", "/proc/self/fd").splitlines()
    targets = [line.rpartition("-> ")[2] for line in listing if "->" in line]
    assert all(re.match(r"pipe:|/dev/null|/proc/\d+/fd", t) for t in targets), targets


def test_preserved_descriptors(podman: PodmanHost) -> None:
    script = f"""exec 3<<'END'
from outside
END
exec {" ".join(podman.argv)} run --rm --network none --preserve-fds 1 {IMAGE} sh -c 'cat <&3'"""
    done = subprocess.run(["bash", "-c", script], env=podman.env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "from outside\n"), done.stderr


def test_many_containers_at_once(podman: PodmanHost) -> None:
    with ThreadPoolExecutor(6) as pool:
        codes = list(pool.map(lambda n: podman.run("--", "sh", "-c", f"exit {n}").returncode, range(12)))
    assert codes == list(range(12))


def test_rm_removes_the_container(podman: PodmanHost) -> None:
    podman.output("--name", "gone", "--", "true")
    assert podman("container", "exists", "gone").returncode == 1


# ---- create, start, wait, restart, stop, kill, rm


def test_create_then_start_attached(podman: PodmanHost) -> None:
    container = podman.ok("create", "--network", "none", IMAGE, "sh", "-c", "echo hello; exit 5")
    assert podman.inspect(container, "{{.State.Status}}") == "created"
    done = podman("start", "--attach", container)
    assert (done.returncode, done.stdout) == (5, "hello\n")
    assert podman.inspect(container, "{{.State.Status}} {{.State.ExitCode}} {{.State.Running}}") == "exited 5 false"


def test_init_leaves_a_created_container_that_start_runs(podman: PodmanHost) -> None:
    container = podman.ok("create", "--network", "none", IMAGE, "echo", "started")
    podman.ok("init", container)
    pid = int(podman.inspect(container, "{{.State.Pid}}"))
    assert podman.inspect(container, "{{.State.Status}}") in ("initialized", "created")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "python" not in maps, "a created container waits without an interpreter in its memory"
    podman.ok("start", container)
    assert podman.ok("wait", container) == "0"
    assert podman.ok("logs", container) == "started"


def test_inspect_names_runtime_and_process(podman: PodmanHost) -> None:
    container = podman.start()
    assert podman.inspect(container, "{{.OCIRuntime}} {{.State.Running}}") == f"{podman.runtime} true"
    pid = podman.inspect(container, "{{.State.Pid}}")
    assert Path(f"/proc/{pid}/comm").read_text() == "sleep\n"


def test_stop_sends_sigterm_and_waits(podman: PodmanHost) -> None:
    container = podman.start(
        command=["sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done"]
    )
    wait_until_logged(podman, container, "ready")
    podman.ok("stop", "--time", "10", container)
    assert podman.inspect(container, "{{.State.ExitCode}}") == "3"
    assert podman.ok("logs", container).endswith("bye")


def test_stop_kills_what_ignores_sigterm(podman: PodmanHost) -> None:
    container = podman.start()  # as process 1, sleep has no handler and so never gets SIGTERM
    podman.ok("stop", "--time", "1", container)
    assert podman.inspect(container, "{{.State.ExitCode}} {{.State.Status}}") == "137 exited"


def test_stop_signal(podman: PodmanHost) -> None:
    script = "trap 'exit 9' USR2; echo ready; while :; do sleep 0.05; done"
    container = podman.start("--stop-signal", "SIGUSR2", command=["sh", "-c", script])
    wait_until_logged(podman, container, "ready")
    podman.ok("stop", container)
    assert podman.inspect(container, "{{.State.ExitCode}}") == "9"


def test_restart_gives_a_new_process(podman: PodmanHost) -> None:
    container = podman.start()
    before = podman.inspect(container, "{{.State.Pid}}")
    podman.ok("restart", "--time", "0", container)
    assert podman.inspect(container, "{{.State.Running}}") == "true"
    assert podman.inspect(container, "{{.State.Pid}}") != before


@pytest.mark.parametrize("name", ["USR1", "SIGUSR1", "10"])
def test_kill_sends_the_named_signal(podman: PodmanHost, name: str) -> None:
    script = "trap 'echo got it; exit 0' USR1; echo ready; while :; do sleep 0.05; done"
    container = podman.start(command=["sh", "-c", script])
    wait_until_logged(podman, container, "ready")
    podman.ok("kill", "--signal", name, container)
    assert podman.ok("wait", container) == "0"
    assert "got it" in podman.ok("logs", container)


def test_kill_defaults_to_sigkill(podman: PodmanHost) -> None:
    container = podman.start()
    podman.ok("kill", container)
    assert podman.ok("wait", container) == "137"
    assert podman("kill", container).returncode != 0


def test_stopped_container_can_start_again(podman: PodmanHost) -> None:
    container = podman.start("--name", "twice", command=["sh", "-c", "echo run >>/tmp/runs; cat /tmp/runs"])
    podman.ok("wait", container)
    assert podman.ok("start", "--attach", container) == "run\nrun"


def test_rm_refuses_a_running_container_but_force_does_not(podman: PodmanHost) -> None:
    container = podman.start()
    pid = podman.inspect(container, "{{.State.Pid}}")
    assert podman("rm", container).returncode != 0
    podman.ok("rm", "--force", "--time", "0", container)
    assert not Path(f"/proc/{pid}").exists()


def test_timeout_ends_the_container(podman: PodmanHost) -> None:
    started = time.monotonic()
    assert podman.run("--timeout", "1", "--", "sleep", "100").returncode != 0
    assert time.monotonic() - started < 10


# ---- pause


def test_pause_freezes_and_unpause_thaws(podman: PodmanHost) -> None:
    script = "while :; do cat /proc/uptime >/tmp/now; sleep 0.02; done"
    container = podman.start(command=["sh", "-c", script])
    podman.ok("pause", container)
    assert podman.inspect(container, "{{.State.Status}} {{.State.Paused}}") == "paused true"
    clock = Path(podman.ok("mount", container)) / "tmp/now"
    before = clock.read_text()
    time.sleep(0.2)
    assert clock.read_text() == before
    assert podman("exec", container, "true").returncode != 0
    podman.ok("unpause", container)
    time.sleep(0.2)
    assert clock.read_text() != before
    assert podman.ok("exec", container, "echo", "thawed") == "thawed"
    podman.ok("unmount", container)


def test_a_paused_container_can_be_removed(podman: PodmanHost) -> None:
    container = podman.start()
    podman.ok("pause", container)
    podman.ok("rm", "--force", "--time", "0", container)


# ---- logs, top, stats, cp, healthcheck, info


def test_logs(podman: PodmanHost) -> None:
    container = podman.start(command=["sh", "-c", "echo one; echo two >&2; seq 1 20000"])
    podman.ok("wait", container)
    done = podman("logs", container)
    assert done.stdout.split()[0] == "one"
    assert done.stdout.split()[1:] == [str(n) for n in range(1, 20001)]
    assert done.stderr == "two\n"
    assert podman.ok("logs", "--tail", "1", container) == "20000"


def test_logs_follow_ends_with_the_container(podman: PodmanHost) -> None:
    container = podman.start(command=["sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.2; done"])
    assert podman.ok("logs", "--follow", container).split() == ["1", "2", "3"]


def test_top_lists_the_processes(podman: PodmanHost) -> None:
    container = podman.start(command=["sh", "-c", "sleep 1000 & sleep 2000 & wait"])
    deadline = time.monotonic() + 5
    while len(lines := podman.ok("top", container, "pid", "user", "args").splitlines()) < 4:
        assert time.monotonic() < deadline, lines
    assert lines[0].split() == ["PID", "USER", "COMMAND"]
    assert sorted(line.split(None, 2)[2].strip() for line in lines[2:]) == ["sleep 1000", "sleep 2000"]


def test_cp_into_and_out_of_a_running_container(podman: PodmanHost) -> None:
    container = podman.start()
    source, target = podman.directory / "there", podman.directory / "back"
    source.write_text("carried\n")
    podman.ok("cp", str(source), f"{container}:/tmp/there")
    assert podman.ok("exec", container, "cat", "/tmp/there") == "carried"
    podman.ok("exec", container, "sh", "-c", "echo more >>/tmp/there")
    podman.ok("cp", f"{container}:/tmp/there", str(target))
    assert target.read_text() == "carried\nmore\n"


def test_healthcheck_runs_in_the_container(podman: PodmanHost) -> None:
    container = podman.start(
        "--health-cmd", "test -f /tmp/healthy", "--health-interval", "disable", "--health-retries", "1"
    )
    assert podman("healthcheck", "run", container).returncode == 1
    podman.ok("exec", container, "touch", "/tmp/healthy")
    assert podman("healthcheck", "run", container).returncode == 0
    assert podman.inspect(container, "{{.State.Healthcheck.Status}}") == "healthy"


def test_info_shows_the_runtime(podman: PodmanHost) -> None:
    runtime = json.loads(podman.ok("info", "--format", "json"))["host"]["ociRuntime"]
    assert runtime["path"] == str(podman.runtime)
    lines = runtime["version"].splitlines()
    assert re.match(r"\S+ version \d+\.\d+", lines[0])
    assert any(line.startswith("spec: 1.") for line in lines)


def test_checkpoint_without_criu_is_one_clear_error(podman: PodmanHost) -> None:
    container = podman.start()
    done = podman("container", "checkpoint", container)
    if done.returncode == 0:
        pytest.skip("this host can checkpoint (CRIU is installed)")
    assert "criu" in done.stderr.lower() or "checkpoint" in done.stderr.lower()
    assert podman.inspect(container, "{{.State.Running}}") == "true"


def test_notify_socket_of_the_container_reaches_the_caller(podman: PodmanHost) -> None:
    address = f"/tmp/ovt-notify-{os.getpid()}"
    send = (
        "import os, socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);"
        "s.connect(os.environ['NOTIFY_SOCKET']); s.send(b'READY=1')"
    )
    host = [part for name in ("usr", "lib", "lib64") for part in ("-v", f"/{name}:/{name}:ro")]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.settimeout(10)
        try:
            arguments = ("run", "-d", "--network", "none", "--sdnotify", "container", *host, IMAGE)
            done = podman(*arguments, "/usr/bin/python3", "-c", send, env={"NOTIFY_SOCKET": address})
            assert done.returncode == 0, podman.calls[-1]
            received = b""
            while b"READY=1" not in received:
                received += listener.recv(4096)
        finally:
            os.unlink(address)


def test_signal_of_the_attached_client_is_forwarded(podman: PodmanHost) -> None:
    script = "trap 'exit 11' TERM; echo ready; while :; do sleep 0.05; done"
    client = subprocess.Popen(
        [*podman.argv, "run", "--name", "signalled", "--network", "none", IMAGE, "sh", "-c", script],
        env=podman.env,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    with client:
        assert client.stdout is not None and client.stdout.readline() == b"ready\n"
        time.sleep(0.2)  # podman prints before its signal handlers are in place
        client.send_signal(signal.SIGTERM)
        client.wait(15)
    # The client's own status is a race in podman 4.3 (now and then 0, with any runtime); the container's is not.
    assert podman.ok("wait", "signalled") == "11"
