"""Rootless podman on the runtime: podman makes the user namespace, and the runtime is root of nothing but that."""

from __future__ import annotations

import pytest

from tests.system.podman_host import IMAGE, PodmanHost
from tests.system.terminal import Terminal

pytestmark = [pytest.mark.podman, pytest.mark.root]  # root only to become somebody else


def test_run_as_root_of_the_users_namespace(rootless: PodmanHost) -> None:
    done = rootless.run("--", "sh", "-c", "id -u; cat /proc/self/uid_map; exit 5")
    assert done.returncode == 5
    assert done.stdout.split() == ["0", "0", str(rootless.uid), "1"]


def test_namespaces_and_devices(rootless: PodmanHost) -> None:
    script = "echo x >/dev/null && head -c 3 /dev/zero | wc -c && ls /sys/class/net && hostname && test -c /dev/ptmx"
    assert rootless.output("--hostname", "small", "--", "sh", "-c", script).split() == ["3", "lo", "small"]


def test_seccomp_and_capabilities(rootless: PodmanHost) -> None:
    text = rootless.output("--cap-drop", "all", "--", "grep", "-E", "Seccomp:|CapEff", "/proc/self/status")
    assert text.split() == ["CapEff:", "0" * 16, "Seccomp:", "2"]


def test_volume_and_read_only(rootless: PodmanHost) -> None:
    shared = rootless.directory / "home"
    done = rootless.run(
        "--read-only", "-v", f"{shared}:/data", "--", "sh", "-c", "echo hi >/data/from-box; touch /etc/x"
    )
    assert "Read-only" in done.stderr
    made = shared / "from-box"
    assert made.read_text() == "hi\n" and made.stat().st_uid == rootless.uid


def test_exec_stop_and_remove(rootless: PodmanHost) -> None:
    container = rootless.start()
    assert rootless("exec", container, "sh", "-c", "exit 4").returncode == 4
    assert rootless.ok("exec", "-i", container, "cat", input="typed") == "typed"
    rootless.ok("stop", "--time", "0", container)
    assert rootless.inspect(container, "{{.State.ExitCode}}") == "137"
    rootless.ok("rm", container)


def test_terminal(rootless: PodmanHost) -> None:
    command = [*rootless.argv, "run", "--rm", "-it", "--network", "none", IMAGE, "sh"]
    with Terminal(command, rootless.env, rows=31, columns=97) as terminal:
        terminal.expect("/ # ")
        terminal.send("stty size\n")
        terminal.expect(r"31 97\r\n")
        terminal.send("exit 6\n")
        assert terminal.wait() == 6


def test_user_namespace_of_its_own(rootless: PodmanHost) -> None:
    done = rootless.run("--uidmap", "0:0:1", "--gidmap", "0:0:1", "--", "id", "-u")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_kill_and_logs(rootless: PodmanHost) -> None:
    container = rootless.start(command=["sh", "-c", "echo begun; sleep 1000"])
    rootless.ok("kill", container)
    assert rootless.ok("wait", container) == "137"
    assert rootless.ok("logs", container) == "begun"
