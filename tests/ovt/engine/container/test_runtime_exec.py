"""exec into real containers."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ovt.live import WAITING, Container, Create, refused, wait_for

pytestmark = pytest.mark.root


@pytest.fixture
def container(create: Create) -> Container:
    return create(*WAITING).start()


def process_file(tmp_path: Path, *arguments: str, **entries: Any) -> Path:
    """A process.json as podman and containerd hand it over."""
    path = tmp_path / "process.json"
    path.write_text(json.dumps({"args": list(arguments), "cwd": "/", "env": ["PATH=/bin"], **entries}))
    return path


def test_directory_environment_and_user(container: Container) -> None:
    done = container.oci(
        "exec", "--cwd", "/var", "--env", "A=1", "-e", "B=2", "--user", "1000:1001", "-g", "5",
        "--additional-gids", "6", container.id, "sh", "-c", "pwd; echo $A$B; id -u; id -g; id -G", check=True,
    )  # fmt: skip
    assert done.stdout.split("\n") == ["/var", "12", "1000", "1001", "1001 5 6", ""]


def test_the_defaults_are_those_of_the_container(create: Create) -> None:
    config = {"process": {"cwd": "/tmp", "env": ["PATH=/bin", "A=own"], "user": {"uid": 7, "gid": 8}}}
    container = create(*WAITING, config=config).start()
    assert container.ask("sh", "-c", "pwd; echo $A; id -u; id -g").split() == ["/tmp", "own", "7", "8"]


def test_options_behind_the_name_belong_to_the_command(container: Container) -> None:
    assert container.ask("echo", "--cwd", "-e", "--", "x") == "--cwd -e -- x"


def test_process_file(container: Container, tmp_path: Path) -> None:
    script = "echo $A; id -u; pwd; umask; grep NoNewPrivs /proc/self/status; ulimit -n"
    path = process_file(
        tmp_path, "sh", "-c", script, cwd="/var", env=["PATH=/bin", "A=file"], noNewPrivileges=True,
        user={"uid": 3, "gid": 4, "umask": 0o27}, rlimits=[{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}],
    )  # fmt: skip
    out = container.oci("exec", "--process", path, container.id, check=True).stdout
    assert out.split() == ["file", "3", "/var", "0027", "NoNewPrivs:", "1", "77"]


def test_capabilities_are_never_inheritable(container: Container) -> None:
    done = container.oci("exec", "--cap", "CAP_NET_ADMIN", container.id, "grep", "^Cap", "/proc/self/status")
    sets = dict(line.split() for line in done.stdout.splitlines())
    assert int(sets["CapBnd:"], 16) & 1 << 12 and int(sets["CapEff:"], 16) & 1 << 12
    assert int(sets["CapInh:"], 16) == int(sets["CapAmb:"], 16) == 0


def test_no_new_privileges(create: Create) -> None:
    container = create(*WAITING, config={"process": {"noNewPrivileges": False}}).start()
    ask = ["grep", "NoNewPrivs", "/proc/self/status"]
    assert container.ask(*ask).endswith("0")
    assert container.oci("exec", "--no-new-privs", container.id, *ask).stdout.strip().endswith("1")


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_status(container: Container, code: int) -> None:
    assert container.exec("sh", "-c", f"exit {code}").returncode == code


def test_exit_status_of_a_signal(container: Container) -> None:
    assert container.exec("sh", "-c", "kill -TERM $$").returncode == 128 + 15


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("no-such", "executable file not found in"),
        ("/no/such", "no such file or directory"),
        ("/etc/passwd", "permission denied"),
        ("/etc", "permission denied"),
    ],
)
def test_what_cannot_be_executed(container: Container, command: str, words: str) -> None:
    done = container.exec(command)
    assert done.returncode == 255 and words in refused(done)


def test_what_the_kernel_cannot_execute(container: Container) -> None:
    (container.rootfs / "bin/garbage").write_bytes(b"\x7fELF and nothing else")
    (container.rootfs / "bin/garbage").chmod(0o755)
    done = container.exec("garbage")
    assert done.returncode == 255 and "exec format error" in refused(done)


def test_an_interpreter_that_is_missing(container: Container) -> None:
    (container.rootfs / "bin/script").write_text("#!/no/interpreter\n")
    (container.rootfs / "bin/script").chmod(0o755)
    done = container.exec("script")
    assert done.returncode == 255 and "no such file or directory" in refused(done)


def test_a_stopped_container(container: Container) -> None:
    container.stop()
    done = container.exec("true")
    assert done.returncode == 255 and "container not running" in refused(done)


def test_a_container_that_does_not_exist(container: Container) -> None:
    done = container.oci("exec", "no-such-container", "true")
    assert done.returncode == 255 and "does not exist" in refused(done)


def test_streams(container: Container) -> None:
    done = container.exec("sh", "-c", "cat; echo err >&2", input="through\n")
    assert (done.stdout, done.stderr) == ("through\n", "err\n")


def test_detached_with_a_pid_file(container: Container, tmp_path: Path) -> None:
    pid_file = tmp_path / "exec.pid"
    path = process_file(tmp_path, "sleep", "1000")
    done = container.oci("exec", "--process", path, "--detach", "--pid-file", pid_file, container.id,
                         capture_output=False, check=True)  # fmt: skip
    assert done.returncode == 0
    text = pid_file.read_text()
    assert re.fullmatch(r"\d+", text) and int(text) in json.loads(
        container.oci("ps", "--format", "json", container.id, check=True).stdout
    )
    assert Path(f"/proc/{text}/comm").read_text() == "sleep\n"


def test_detached_and_failing_writes_no_pid_file(container: Container, tmp_path: Path) -> None:
    pid_file = tmp_path / "exec.pid"
    done = container.oci("exec", "--detach", "--pid-file", pid_file, container.id, "no-such")
    assert done.returncode == 255 and not pid_file.exists()


def test_preserved_descriptors(container: Container, runtime: Path, run_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept\n")
    inherit: list[str | Path] = [
        "sh",
        "-c",
        'exec 3< "$0" 4< "$0"; exec "$@"',
        tmp_path / "file",
        runtime,
        "--root",
        run_root,
        "exec",
    ]
    keep = subprocess.run([*inherit, "--preserve-fds", "1", container.id, "sh", "-c", "cat <&3; ls /proc/self/fd"],
                          check=True, capture_output=True, text=True)  # fmt: skip
    lose = subprocess.run([*inherit, container.id, "ls", "/proc/self/fd"], check=True, capture_output=True, text=True)
    assert keep.stdout.split() == ["kept", "0", "1", "2", "3", "4"]  # the last is the directory that ls reads
    assert lose.stdout.split() == ["0", "1", "2", "3"]


def test_a_cgroup_below(container: Container) -> None:
    (container.cgroup("pids") / "below").mkdir()
    ask = ["exec", "--cgroup", "below", container.id, "cat", "/proc/self/cgroup"]
    assert "/below\n" in container.oci(*ask, check=True).stdout


def test_a_cgroup_below_that_is_missing(container: Container) -> None:
    message = refused(container.oci("exec", "--cgroup", "nowhere", container.id, "true"))
    assert "nowhere" in message


def test_into_a_created_container(create: Create) -> None:
    container = create(*WAITING)
    assert container.ask("echo", "early") == "early"
    assert container.status == "created"


def test_paused(container: Container) -> None:
    container.oci("pause", container.id, check=True)
    try:
        assert "paused" in refused(container.exec("true"))
    finally:
        container.oci("resume", container.id, check=True)
    assert container.ask("echo", "again") == "again"


def test_ends_with_the_container(container: Container, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    container.oci("exec", "-d", "--pid-file", pid_file, container.id, "sleep", "1000", capture_output=False, check=True)
    container.stop()
    wait_for(lambda: not Path(f"/proc/{pid_file.read_text()}/root").exists())


@pytest.mark.parametrize("user", ["root", "1:", "-1", "4294967296", "1:x", "0x1"])
def test_a_user_that_is_no_number(container: Container, user: str) -> None:
    assert "user" in refused(container.oci("exec", "--user", user, container.id, "true"))


def test_without_a_command(container: Container) -> None:
    assert "name a command" in refused(container.oci("exec", container.id))
