"""Real containerd on the runtime, driven by ctr through the runc shim."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.containerd_host import NAMESPACE, ContainerdHost
from tests.system.terminal import Terminal

pytestmark = [pytest.mark.containerd, pytest.mark.root]

MIB = 1024 * 1024


def status_field(text: str, name: str) -> str:
    """Value of one field of a /proc/PID/status text."""
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(name + ":"))


# ---- run


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_run_returns_the_exit_status(containerd: ContainerdHost, code: int) -> None:
    assert containerd.run("--", "sh", "-c", f"exit {code}").returncode == code


def test_streams_stay_apart(containerd: ContainerdHost) -> None:
    done = containerd.run("--", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [("no-such-program", "executable file not found"), ("/no/such", "no such file"), ("/etc/plain-file", "denied")],
)
def test_what_cannot_be_executed_is_the_runtimes_error(containerd: ContainerdHost, command: str, message: str) -> None:
    done = containerd.run("--", command)
    assert done.returncode == 1
    assert "OCI runtime create failed" in done.stderr
    assert message in done.stderr and command in done.stderr


def test_environment_and_working_directory(containerd: ContainerdHost) -> None:
    options = ("--env", "A=1", "--env", "B=two words", "--cwd", "/home")
    assert containerd.output(*options, "--", "sh", "-c", 'echo "$A $B"; pwd').splitlines() == ["1 two words", "/home"]


def test_read_only_root(containerd: ContainerdHost) -> None:
    done = containerd.run("--read-only", "--", "touch", "/etc/x")
    assert done.returncode == 1 and "Read-only file system" in done.stderr


def test_bind_mount(containerd: ContainerdHost) -> None:
    shared = containerd.directory / "shared"
    shared.mkdir(exist_ok=True)
    (shared / "file").write_text("from the host\n")
    mount = f"type=bind,src={shared},dst=/data,options=rbind:ro"
    done = containerd.run("--mount", mount, "--", "sh", "-c", "cat /data/file; touch /data/x")
    assert done.stdout == "from the host\n"
    assert "Read-only file system" in done.stderr


def test_namespaces(containerd: ContainerdHost) -> None:
    script = "for n in ipc mnt net pid uts; do readlink /proc/self/ns/$n; done"
    inside = containerd.output("--", "sh", "-c", script).split()
    assert len(inside) == 5
    assert not set(inside) & {os.readlink(f"/proc/self/ns/{n}") for n in ("ipc", "mnt", "net", "pid", "uts")}
    assert containerd.output("--net-host", "--", "readlink", "/proc/self/ns/net") == os.readlink("/proc/self/ns/net")


def test_joining_a_namespace_of_another_container(containerd: ContainerdHost) -> None:
    pid = containerd.pid(containerd.start())
    inside = containerd.output("--with-ns", f"network:/proc/{pid}/ns/net", "--", "readlink", "/proc/self/ns/net")
    assert inside == os.readlink(f"/proc/{pid}/ns/net")


def test_user_namespace(containerd: ContainerdHost) -> None:
    options = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
    text = containerd.output(*options, "--", "sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; id -u")
    assert text.split() == ["0", "100000", "65536", "0", "200000", "65536", "0"]


# ---- privileges


def test_default_capabilities_and_dropping_them(containerd: ContainerdHost) -> None:
    assert int(status_field(containerd.output("--", "cat", "/proc/self/status"), "CapEff"), 16) & 1
    text = containerd.output("--cap-drop", "CAP_CHOWN", "--", "cat", "/proc/self/status")
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert not int(status_field(text, name), 16) & 1, name
    text = containerd.output("--cap-add", "CAP_NET_ADMIN", "--", "cat", "/proc/self/status")
    assert int(status_field(text, "CapEff"), 16) >> 12 & 1


def test_no_new_privileges_by_default(containerd: ContainerdHost) -> None:
    assert status_field(containerd.output("--", "cat", "/proc/self/status"), "NoNewPrivs") == "1"
    assert status_field(containerd.output("--allow-new-privs", "--", "cat", "/proc/self/status"), "NoNewPrivs") == "0"


def test_default_seccomp_profile(containerd: ContainerdHost) -> None:
    text = containerd.output("--seccomp", "--", "cat", "/proc/self/status")
    assert status_field(text, "Seccomp") == "2"
    assert containerd.run("--seccomp", "--", "unshare", "-m", "true").returncode != 0


def test_own_seccomp_profile(containerd: ContainerdHost) -> None:
    profile = containerd.directory / "profile.json"
    blocked = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": blocked}))
    done = containerd.run("--seccomp", "--seccomp-profile", str(profile), "--", "mkdir", "/tmp/x")
    assert done.returncode == 1 and "No space left" in done.stderr


def test_privileged(containerd: ContainerdHost) -> None:
    script = "mount -t tmpfs none /tmp && echo mounted; ls /dev/kmsg"
    assert containerd.output("--privileged", "--", "sh", "-c", script).split() == ["mounted", "/dev/kmsg"]


def test_devices(containerd: ContainerdHost) -> None:
    assert containerd.run("--", "sh", "-c", "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg").returncode != 0
    assert containerd.output("--device", "/dev/kmsg", "--", "sh", "-c", "ls -l /dev/kmsg | cut -c 1") == "c"


# ---- resources


def cgroup_value(containerd: ContainerdHost, container: str, controller: str, v1: str, v2: str) -> str:
    """Content of a limit file of the container: `v1` in `controller`'s hierarchy, or `v2`."""
    lines = Path(f"/proc/{containerd.pid(container)}/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}/{v1}").read_text().strip()
    return Path(f"/sys/fs/cgroup{lines[-1].split(':', 2)[2]}/{v2}").read_text().strip()


def test_cgroup_is_where_containerd_says(containerd: ContainerdHost) -> None:
    container = containerd.start()
    text = Path(f"/proc/{containerd.pid(container)}/cgroup").read_text()
    assert f":/{NAMESPACE}/{container}\n" in text


def test_memory_limit(containerd: ContainerdHost) -> None:
    container = containerd.start("--memory-limit", str(32 * MIB))
    assert cgroup_value(containerd, container, "memory", "memory.limit_in_bytes", "memory.max") == str(32 * MIB)


def test_out_of_memory_kills(containerd: ContainerdHost) -> None:
    assert containerd.run("--memory-limit", str(16 * MIB), "--", "tail", "/dev/zero").returncode == 137


def test_cpu_limits(containerd: ContainerdHost) -> None:
    container = containerd.start("--cpus", "0.5", "--cpu-shares", "512")
    assert cgroup_value(containerd, container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "50000"
    assert cgroup_value(containerd, container, "cpu", "cpu.shares", "cpu.weight") in ("512", "20")


def test_metrics(containerd: ContainerdHost) -> None:
    container = containerd.start("--memory-limit", str(32 * MIB))
    metrics = json.loads(containerd.ok("task", "metrics", "--format", "json", container))
    assert metrics["pids"]["current"] == 1
    usage = metrics["memory"]["usage"]
    assert (usage["limit"] if isinstance(usage, dict) else metrics["memory"]["usage_limit"]) == 32 * MIB


def test_update_through_the_api(containerd: ContainerdHost) -> None:
    """`ctr` has no update verb; the Update call of the tasks service is made by hand (gRPC: protobuf over HTTP/2)."""
    if shutil.which("curl") is None:
        pytest.skip("not installed: curl, which speaks HTTP/2 to containerd's socket")
    container = containerd.start("--memory-limit", str(64 * MIB))
    resources = {"memory": {"limit": 48 * MIB}, "cpu": {"quota": 20000, "period": 100000}}

    def field(number: int, value: bytes) -> bytes:
        size, prefix = len(value), bytearray([number << 3 | 2])
        while size > 127:
            prefix.append(size & 127 | 128)
            size >>= 7
        return bytes(prefix) + bytes([size]) + value

    type_url = b"types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    message = field(1, container.encode()) + field(2, field(1, type_url) + field(2, json.dumps(resources).encode()))
    headers = ("content-type: application/grpc", "te: trailers", f"containerd-namespace: {NAMESPACE}")
    done = subprocess.run(
        [
            *("curl", "--silent", "--include", "--http2-prior-knowledge", "--unix-socket", containerd.socket),
            *(part for header in headers for part in ("--header", header)),
            *("--data-binary", "@-", "http://localhost/containerd.services.tasks.v1.Tasks/Update"),
        ],
        input=b"\0" + len(message).to_bytes(4, "big") + message,
        capture_output=True,
        check=True,
    )
    assert b"grpc-status: 0" in done.stdout, done.stdout
    assert cgroup_value(containerd, container, "memory", "memory.limit_in_bytes", "memory.max") == str(48 * MIB)
    assert cgroup_value(containerd, container, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0] == "20000"


# ---- the life of a task


def test_detached_with_pid_file(containerd: ContainerdHost) -> None:
    pid_file = containerd.directory / "pid"
    container = containerd.start("--pid-file", str(pid_file))
    assert int(pid_file.read_text()) == containerd.pid(container)
    assert containerd.status(container) == "RUNNING"
    assert Path(f"/proc/{containerd.pid(container)}/cmdline").read_bytes() == b"sleep\0001000\0"


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 5), ("USR1", 6), ("2", 7)])
def test_kill_sends_the_signal(containerd: ContainerdHost, signal: str, code: int) -> None:
    mark = f"/tmp/ready-{os.getpid()}"
    script = f"trap 'exit 5' TERM; trap 'exit 6' USR1; trap 'exit 7' INT; touch {mark}; while :; do sleep 0.05; done"
    container = containerd.start(command=["sh", "-c", script])
    root = f"/proc/{containerd.pid(container)}/root"
    deadline = time.monotonic() + 10
    while not Path(f"{root}{mark}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    containerd.ok("task", "kill", "--signal", signal, container)
    containerd.wait_for(container, "STOPPED")
    assert f"non-zero exit code {code}" in containerd("task", "delete", container).stderr


def test_kill_all(containerd: ContainerdHost) -> None:
    container = containerd.start(
        "--pid-file", str(containerd.directory / "pid"), command=["sh", "-c", "sleep 1000 & wait"]
    )
    containerd.ok("task", "kill", "--all", "--signal", "SIGKILL", container)
    containerd.wait_for(container, "STOPPED")


def test_kill_of_a_finished_task_says_not_found(containerd: ContainerdHost) -> None:
    container = containerd.start(command=["true"])
    containerd.wait_for(container, "STOPPED")
    done = containerd("task", "kill", container)
    assert done.returncode == 1
    assert "process already finished" in done.stderr or "not found" in done.stderr


def test_pause_and_resume(containerd: ContainerdHost) -> None:
    container = containerd.start(command=["sh", "-c", "while :; do cat /proc/uptime >/tmp/now; sleep 0.02; done"])
    clock = Path(f"/proc/{containerd.pid(container)}/root/tmp/now")
    containerd.ok("task", "pause", container)
    assert containerd.status(container) == "PAUSED"
    before = clock.read_text()
    time.sleep(0.2)
    assert clock.read_text() == before
    containerd.ok("task", "resume", container)
    assert containerd.status(container) == "RUNNING"
    time.sleep(0.2)
    assert clock.read_text() != before


def test_ps_lists_host_pids(containerd: ContainerdHost) -> None:
    container = containerd.start(command=["sh", "-c", "sleep 1000 & wait"])
    deadline = time.monotonic() + 10
    while len(lines := containerd.ok("task", "ps", container).splitlines()) < 3:
        assert time.monotonic() < deadline, lines
    pids = {int(line.split()[0]) for line in lines[1:]}
    assert containerd.pid(container) in pids
    assert all(container in Path(f"/proc/{pid}/cgroup").read_text() for pid in pids)


def test_delete_refuses_a_running_task_but_force_does_not(containerd: ContainerdHost) -> None:
    container = containerd.start()
    pid = containerd.pid(container)
    assert containerd("task", "delete", container).returncode == 1
    assert containerd.status(container) == "RUNNING"
    containerd("task", "delete", "--force", container)
    assert containerd.status(container) == ""
    assert not Path(f"/proc/{pid}").exists()


def test_the_id_can_be_used_again(containerd: ContainerdHost) -> None:
    arguments = containerd.run_arguments(("--rm",), ("echo", "again"))
    assert containerd.ok(*arguments) == "again"
    assert containerd.ok(*arguments) == "again"


def test_many_tasks_at_once(containerd: ContainerdHost) -> None:
    with ThreadPoolExecutor(6) as pool:
        codes = list(pool.map(lambda n: containerd.run("--", "sh", "-c", f"exit {n}").returncode, range(12)))
    assert codes == list(range(12))


def test_checkpoint_without_criu_is_an_error_and_harmless(containerd: ContainerdHost) -> None:
    if shutil.which("criu"):
        pytest.skip("criu is installed here, so a checkpoint may well succeed")
    container = containerd.start()
    done = containerd("task", "checkpoint", container)
    assert done.returncode == 1
    assert "criu" in done.stderr.lower() or "checkpoint" in done.stderr.lower()
    assert containerd.status(container) == "RUNNING"


# ---- exec


@pytest.mark.parametrize("code", [0, 3, 255])
def test_exec_returns_the_exit_status(containerd: ContainerdHost, code: int) -> None:
    assert containerd.exec(containerd.start(), "sh", "-c", f"exit {code}").returncode == code


def test_exec_streams_directory_and_user(containerd: ContainerdHost) -> None:
    container = containerd.start()
    done = containerd.exec(container, "--cwd", "/home", "--", "sh", "-c", "pwd; cat; echo err >&2", input="typed\n")
    assert (done.stdout, done.stderr) == ("/home\ntyped\n", "err\n")
    assert containerd.exec(container, "--user", "1000", "--", "id", "-u").stdout == "1000\n"


def test_exec_of_a_missing_program_is_an_error_and_harmless(containerd: ContainerdHost) -> None:
    container = containerd.start()
    done = containerd.exec(container, "no-such-program")
    assert done.returncode == 1
    assert "executable file not found" in done.stderr
    assert containerd.exec(container, "true").returncode == 0


def test_exec_detached_shows_in_ps(containerd: ContainerdHost) -> None:
    container = containerd.start()
    containerd.ok("task", "exec", "--detach", "--exec-id", "behind", container, "sleep", "1000")
    lines = containerd.ok("task", "ps", container).splitlines()
    assert len(lines) == 3
    assert any("behind" in line for line in lines)
    containerd.ok("task", "kill", "--exec-id", "behind", "--signal", "SIGKILL", container)
    deadline = time.monotonic() + 10
    while len(containerd.ok("task", "ps", container).splitlines()) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    containerd("task", "delete", "--exec-id", "behind", container)
    assert containerd.status(container) == "RUNNING"


def test_exec_joins_the_namespaces_and_the_cgroup(containerd: ContainerdHost) -> None:
    container = containerd.start()
    names = ["cgroup", "ipc", "mnt", "net", "pid", "uts"]
    script = f"for p in 1 self; do for n in {' '.join(names)}; do readlink /proc/$p/ns/$n; done; done"
    links = containerd.exec(container, "sh", "-c", script).stdout.split()
    assert len(links) == 12 and links[:6] == links[6:]
    assert containerd.exec(container, "cmp", "/proc/1/cgroup", "/proc/self/cgroup").returncode == 0


# ---- terminal


def test_terminal(containerd: ContainerdHost) -> None:
    arguments = [*containerd.argv, *containerd.run_arguments(("--rm", "--tty"), ("sh",))]
    with Terminal(arguments, rows=33, columns=99) as terminal:
        terminal.expect("/ # ")
        terminal.send("tty; stty size\n")
        terminal.expect(r"/dev/(pts/0|console)\s")
        terminal.expect(r"33 99\s")
        terminal.send("sleep 100\n")
        time.sleep(0.3)
        terminal.send("\x03")
        terminal.expect("/ # ")
        terminal.send("exit 6\n")
        assert terminal.wait() == 6


def test_exec_in_a_terminal(containerd: ContainerdHost) -> None:
    container = containerd.start()
    with Terminal([*containerd.argv, "task", "exec", "--tty", "--exec-id", "typed", container, "sh"]) as terminal:
        terminal.expect("/ # ")
        terminal.send("tty\n")
        terminal.expect(r"/dev/pts/\d")
        terminal.send("exit 8\n")
        assert terminal.wait() == 8
