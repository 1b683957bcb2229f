"""CVE-2019-5736: no process of a container leads to a program of the host, and none of them is ever a Python."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.security.conftest import HOST_PROGRAMS, Container, Create, output, refused, wait_for

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("host_programs")]

SIGHTS = {
    "/memfd:ovt-init (deleted)",  # sealed: see test_cve_2019_5736_a_waiting_container_...
    "/bin/busybox",
    "/victim/busybox",
}


def watching(config: dict[str, Any] | None = None, *, ptrace: bool = False) -> dict[str, Any]:
    """A configuration for a container that watches: writable root, and with `ptrace` CAP_SYS_PTRACE."""
    capabilities = ["CAP_KILL", "CAP_DAC_OVERRIDE", *(["CAP_SYS_PTRACE"] if ptrace else [])]
    sets = dict.fromkeys(("bounding", "effective", "permitted"), capabilities)
    return {"root": {"readonly": False}, "process": {"capabilities": sets}, **(config or {})}


def hostile(bundle: Bundle, watcher: Path, host_mark: Path, *, ptrace: bool, edit: Any = None) -> Path:
    place = bundle("/watch", "20", "own-mark", str(host_mark), config=watching(ptrace=ptrace), edit=edit)
    rootfs = place / "rootfs"
    shutil.copy(watcher, rootfs / "watch")
    add_victim(rootfs)
    return place


def add_victim(rootfs: Path) -> None:
    """A program that the watcher can tell from its own, and a file by which it tells the container's root."""
    (rootfs / "victim").mkdir()
    shutil.copy(rootfs / "bin/busybox", rootfs / "victim/busybox")
    (rootfs / "own-mark").touch()


@pytest.fixture
def host_mark(tmp_path: Path) -> Path:
    mark = tmp_path / "host-mark"
    mark.touch()
    return mark


def stop(place: Path, container: Container, tmp_path: Path) -> list[str]:
    """End the watcher and return its findings."""
    pid = container.pid
    (place / "rootfs/stop").touch()
    wait_for(lambda: not Path(f"/proc/{pid}/root/bin").exists())
    return output(tmp_path, container).splitlines()


def check(findings: list[str]) -> None:
    assert not [line for line in findings if line.startswith("python")]
    seen = {line.removeprefix("exe ") for line in findings if line.startswith("exe ")}
    assert seen <= SIGHTS, seen - SIGHTS
    for program in HOST_PROGRAMS:
        assert str(program) not in seen
    assert "wrote /memfd:ovt-init (deleted)" not in findings


@pytest.mark.parametrize("program", ["/proc/self/exe", "/bin/innocent"])
def test_cve_2019_5736_entrypoint(oci: Oci, bundle: Bundle, container_id: str, program: str) -> None:
    """The image's entry point is /proc/self/exe, or a link to it: refused before anything is executed."""
    place = bundle(program, "-c", "print('host python')")
    (place / "rootfs/bin/innocent").symlink_to("/proc/self/exe")
    done = oci("run", "-b", place, container_id)
    assert "host python" not in done.stdout
    assert program in refused(done)


def test_cve_2019_5736_interpreter_line(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """`#!/proc/self/exe` executes what the runtime was: our own stub, of which the container gets a sealed copy."""
    place = bundle("/bin/script", "-c", "print('host python')")
    script = place / "rootfs/bin/script"
    script.write_text("#!/proc/self/exe\n")
    script.chmod(0o755)
    done = oci("run", "-b", place, container_id)
    assert done.returncode == 125 and not done.stdout  # the stub, finding no tape on its standard input
    # the trap is set: where the program is not a stub but an interpreter, the line would run it
    script.write_text("#!/bin/busybox echo\n")
    assert "/bin/script" in oci("run", "-b", place, f"{container_id}-2", check=True).stdout


def test_cve_2019_5736_a_waiting_container_is_a_sealed_copy(create: Create, bundle: Bundle) -> None:
    """/proc/1/exe of a created container is no file of the host and cannot be written, not even by the host's root."""
    container = create(bundle("true"))
    exe = f"/proc/{container.pid}/exe"
    assert os.readlink(exe) == "/memfd:ovt-init (deleted)"
    assert not Path(f"/proc/{container.pid}/maps").read_text().count("python")
    inode = os.stat(exe)
    assert all((inode.st_dev, inode.st_ino) != (p.stat().st_dev, p.stat().st_ino) for p in HOST_PROGRAMS)
    with pytest.raises(OSError):  # ETXTBSY; where the kernel would let it be opened, EPERM for the seal
        fd = os.open(exe, os.O_WRONLY)
        try:
            os.write(fd, b"#!/bin/sh\n")
        finally:
            os.close(fd)
    with pytest.raises(OSError):
        os.truncate(exe, 0)


@pytest.mark.parametrize("ptrace", [False, True], ids=["plain", "CAP_SYS_PTRACE"])
def test_cve_2019_5736_exec_into_a_hostile_container(
    oci: Oci, create: Create, bundle: Bundle, watcher: Path, host_mark: Path, tmp_path: Path, ptrace: bool
) -> None:
    """A container watches every process that `exec` brings in: no host program, no interpreter, no way to the host.

    The command is a script whose interpreter is /proc/self/exe, as in the published attack, or an honest program.
    """
    place = hostile(bundle, watcher, host_mark, ptrace=ptrace)
    evil = place / "rootfs/bin/evil"
    evil.write_text("#!/proc/self/exe\n")
    evil.chmod(0o755)
    container = create(place).start()
    wait_for(lambda: "ready" in output(tmp_path, container))
    for _ in range(15):
        oci("exec", container.id, "/bin/evil")
        oci("exec", container.id, "/victim/busybox", "usleep", "3000")  # "text file busy" while the watcher writes
    findings = stop(place, container, tmp_path)
    check(findings)
    assert "exe /victim/busybox" in findings, "the watcher sees who comes in"
    assert "wrote /victim/busybox" in findings, "and can overwrite what is not protected"
    if ptrace:
        assert "own " in findings, "and looks through the root of others"
    assert not [line for line in findings if line.startswith("host")]


def test_exec_never_shows_a_user_of_the_host(
    oci: Oci, create: Create, bundle: Bundle, watcher: Path, host_mark: Path, tmp_path: Path
) -> None:
    """Of our own: what `exec` brings into a user namespace is one of its users from the first moment it can be seen.

    With the uid of the host's root, if only until the tape says setresuid, it would be worth to be traced: to the
    files of /proc/sys that uid is everything, whatever the capabilities.
    """

    def user_namespace(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"].append({"type": "user"})
        config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [
            {"containerID": 0, "hostID": 100000, "size": 60000}
        ]

    place = hostile(bundle, watcher, host_mark, ptrace=True, edit=user_namespace)
    container = create(place).start()
    wait_for(lambda: "ready" in output(tmp_path, container))
    for _ in range(12):
        oci("exec", "--user", "1000", container.id, "/victim/busybox", "usleep", "3000", check=True)
    findings = stop(place, container, tmp_path)
    users = {line.removeprefix("uids ").split()[0] for line in findings if line.startswith("uids")}
    assert "1000" in users and users <= {"0", "1000"}
    assert not [line for line in findings if line.startswith("host")]


@pytest.mark.parametrize("ptrace", [False, True], ids=["plain", "CAP_SYS_PTRACE"])
def test_no_interpreter_in_a_shared_pid_namespace(
    oci: Oci, create: Create, bundle: Bundle, watcher: Path, host_mark: Path, tmp_path: Path, ptrace: bool
) -> None:
    """Of our own: another container is made, started, entered and ended in the watcher's pid namespace."""
    place = hostile(bundle, watcher, host_mark, ptrace=ptrace)
    container = create(place).start()
    wait_for(lambda: "ready" in output(tmp_path, container))

    def share(config: dict[str, Any]) -> None:
        for namespace in config["linux"]["namespaces"]:
            if namespace["type"] == "pid":
                namespace["path"] = f"/proc/{container.pid}/ns/pid"

    neighbour = bundle("/victim/busybox", "sleep", "60", config=watching(), edit=share)
    add_victim(neighbour / "rootfs")
    for _ in range(6):
        other = create(neighbour)
        oci("start", other.id)  # now and then "text file busy", while the watcher writes
        oci("exec", other.id, "/victim/busybox", "true")
        oci("delete", "--force", other.id, check=True)
    findings = stop(place, container, tmp_path)
    check(findings)
    assert "exe /victim/busybox" in findings
    if ptrace:
        assert "exe /memfd:ovt-init (deleted)" in findings, "the watcher sees the container being made"
    else:
        # with CAP_SYS_PTRACE over a shared pid namespace one sees what its processes see, by design of the kernel
        assert not [line for line in findings if line.startswith("host")]


def test_a_host_pid_namespace_is_told_apart(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """The check of these tests can fail: a container in the host's pid namespace does see the runtime's Python."""

    def host_pid(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"] = [n for n in config["linux"]["namespaces"] if n["type"] != "pid"]

    place = bundle("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '", edit=host_pid)
    assert "python" in oci("run", "-b", place, container_id, check=True).stdout
