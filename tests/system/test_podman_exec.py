"""Real podman on the runtime: further processes in a container, and terminals."""

from __future__ import annotations

import time

import pytest

from tests.system.podman_host import IMAGE, PodmanHost
from tests.system.terminal import Terminal

pytestmark = [pytest.mark.podman, pytest.mark.root]


@pytest.mark.parametrize("code", [0, 1, 42])
def test_exec_returns_the_exit_status(podman: PodmanHost, code: int) -> None:
    assert podman("exec", podman.start(), "sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize(("command", "code"), [("no-such-program", 127), ("/etc/plain-file", 126), ("/etc", 126)])
def test_exec_of_what_cannot_be_executed(podman: PodmanHost, command: str, code: int) -> None:
    container = podman.start()
    assert podman("exec", container, command).returncode == code
    assert podman.ok("exec", container, "echo", "still fine") == "still fine"


def test_exec_has_environment_user_and_directory_of_its_own(podman: PodmanHost) -> None:
    container = podman.start("-e", "FROM=run", "-w", "/var")
    text = podman.ok(
        "exec", "-e", "MORE=exec", "-u", "web", "-w", "/home", container, "sh", "-c", "id -un; pwd; echo $FROM $MORE"
    )
    assert text.splitlines() == ["web", "/home", "run exec"]
    assert podman.ok("exec", container, "pwd") == "/var"


def test_exec_joins_every_namespace_and_cgroup(podman: PodmanHost) -> None:
    container = podman.start("--hostname", "joined")
    names = ["cgroup", "ipc", "mnt", "net", "pid", "uts"]
    script = f"for p in 1 self; do for n in {' '.join(names)}; do readlink /proc/$p/ns/$n; done; done"
    links = podman.ok("exec", container, "sh", "-c", script).split()
    assert links[:6] == links[6:] and len(links) == 12
    assert podman.ok("exec", container, "sh", "-c", "cmp /proc/1/cgroup /proc/self/cgroup && echo same") == "same"


def test_exec_reads_stdin(podman: PodmanHost) -> None:
    assert podman.ok("exec", "-i", podman.start(), "cat", input="through the pipe") == "through the pipe"


def test_exec_detached(podman: PodmanHost) -> None:
    container = podman.start()
    podman.ok("exec", "-d", container, "sh", "-c", "sleep 0.2; echo done >/tmp/mark")
    deadline = time.monotonic() + 10
    while podman("exec", container, "cat", "/tmp/mark").stdout != "done\n":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_exec_privileged_has_every_capability_of_the_host(podman: PodmanHost) -> None:
    container = podman.start("--cap-drop", "all")
    read = ["grep", "CapEff", "/proc/self/status"]
    assert podman.ok("exec", container, *read).split()[1] == "0" * 16
    assert int(podman.ok("exec", "--privileged", container, *read).split()[1], 16) != 0


def test_exec_into_a_stopped_container_fails(podman: PodmanHost) -> None:
    container = podman.start(command=["true"])
    podman.ok("wait", container)
    assert podman("exec", container, "true").returncode != 0


def test_exec_processes_die_with_the_container(podman: PodmanHost) -> None:
    container = podman.start()
    podman.ok("exec", "-d", container, "sleep", "2000")
    podman.ok("stop", "--time", "0", container)
    assert podman.inspect(container, "{{.State.Status}}") == "exited"


# ---- terminal


def test_interactive_terminal(podman: PodmanHost) -> None:
    command = [*podman.argv, "run", "--rm", "-it", "--network", "none", IMAGE, "sh"]
    with Terminal(command, podman.env, rows=31, columns=97) as terminal:
        terminal.expect("/ # ")
        terminal.send("tty; stty size\n")
        terminal.expect(r"/dev/(pts/0|console)\r\n")
        terminal.expect(r"31 97\r\n")
        terminal.resize(40, 120)
        time.sleep(0.3)
        terminal.send("stty size\n")
        terminal.expect(r"40 120\r\n")
        terminal.send("sleep 100\n")
        time.sleep(0.3)
        terminal.send("\x03")
        terminal.expect("/ # ")
        terminal.send("exit 6\n")
        assert terminal.wait() == 6


def test_terminal_devices_belong_to_the_container(podman: PodmanHost) -> None:
    script = "test -c /dev/console && test -c /dev/ptmx && ls /dev/pts && ps -o tty,comm | grep ps"
    with Terminal(
        [*podman.argv, "run", "--rm", "-it", "--network", "none", IMAGE, "sh", "-c", script], podman.env
    ) as t:
        t.expect(r"0\s+ptmx")
        t.expect(r"136,0")
        assert t.wait() == 0


def test_exec_in_a_terminal(podman: PodmanHost) -> None:
    container = podman.start()
    with Terminal([*podman.argv, "exec", "-it", container, "sh"], podman.env, rows=20, columns=70) as terminal:
        terminal.expect("/ # ")
        terminal.send("tty && stty size\n")
        terminal.expect(r"/dev/pts/\d")
        terminal.expect(r"20 70")
        terminal.send("exit 8\n")
        assert terminal.wait() == 8


def test_detach_and_attach_again(podman: PodmanHost) -> None:
    with Terminal(
        [*podman.argv, "run", "-it", "--name", "attached", "--network", "none", IMAGE, "sh"], podman.env
    ) as one:
        one.expect("/ # ")
        one.send("\x10")  # Ctrl-P, then Ctrl-Q: podman looks at single keys only
        time.sleep(0.2)
        one.send("\x11")
        assert one.wait() == 0
    assert podman.inspect("attached", "{{.State.Running}}") == "true"
    with Terminal([*podman.argv, "attach", "attached"], podman.env) as two:
        two.send("echo again; exit 4\n")
        two.expect("again")
        two.wait()
    assert podman.ok("wait", "attached") == "4"
