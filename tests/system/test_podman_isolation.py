"""Real podman on the runtime: what a container may see and do. Namespaces, mounts, devices, privileges."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.system.podman_host import IMAGE, PodmanHost

pytestmark = [pytest.mark.podman, pytest.mark.root]


def status_field(text: str, name: str) -> str:
    """Value of one field of a /proc/PID/status text."""
    return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(name + ":"))


# ---- privileges


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ((), {0, 1, 10}, {12, 21}),  # CHOWN, DAC_OVERRIDE, NET_BIND_SERVICE; not NET_ADMIN, SYS_ADMIN
        (("--cap-drop", "chown"), {1, 10}, {0}),
        (("--cap-drop", "all", "--cap-add", "net_admin"), {12}, {0, 1, 10}),
        (("--privileged",), {0, 12, 21}, set()),
    ],
)
def test_capabilities(podman: PodmanHost, options: tuple[str, ...], present: set[int], absent: set[int]) -> None:
    text = podman.output(*options, "--", "cat", "/proc/self/status")
    for name in ("CapEff", "CapPrm", "CapBnd"):
        held = {bit for bit in range(64) if int(status_field(text, name), 16) >> bit & 1}
        assert present <= held and not absent & held, name
    assert int(status_field(text, "CapInh"), 16) == 0, "inheritable capabilities are CVE-2022-27649"


def test_a_user_has_no_capabilities(podman: PodmanHost) -> None:
    text = podman.output("-u", "web", "--", "cat", "/proc/self/status")
    assert {status_field(text, n) for n in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}


def test_dropping_chown_is_felt(podman: PodmanHost) -> None:
    done = podman.run("--cap-drop", "chown", "--", "chown", "1000", "/tmp")
    assert done.returncode == 1 and "not permitted" in done.stderr


def test_default_seccomp_profile_is_loaded(podman: PodmanHost) -> None:
    assert status_field(podman.output("--", "cat", "/proc/self/status"), "Seccomp") == "2"
    text = podman.output("--security-opt", "seccomp=unconfined", "--", "cat", "/proc/self/status")
    assert status_field(text, "Seccomp") == "0"


@pytest.mark.parametrize(
    ("rule", "code", "message"),
    [
        ({"action": "SCMP_ACT_ERRNO"}, 1, "Operation not permitted"),
        ({"action": "SCMP_ACT_ERRNO", "errnoRet": 28}, 1, "No space left on device"),
        ({"action": "SCMP_ACT_KILL_PROCESS"}, 159, ""),
    ],
)
def test_own_seccomp_profile(podman: PodmanHost, rule: dict[str, object], code: int, message: str) -> None:
    profile = podman.directory / "profile.json"
    syscalls = [{"names": ["mkdir", "mkdirat"], **rule}]
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": syscalls}))
    options = ("--security-opt", f"seccomp={profile}")
    assert podman.run(*options, "--", "touch", "/tmp/allowed").returncode == 0
    done = podman.run(*options, "--", "sh", "-c", "mkdir /tmp/blocked; exit $?")
    assert done.returncode == code
    assert message in done.stderr


@pytest.mark.parametrize(("options", "value"), [((), "0"), (("--security-opt", "no-new-privileges"), "1")])
def test_no_new_privileges(podman: PodmanHost, options: tuple[str, ...], value: str) -> None:
    # As root without a seccomp profile nothing but the option itself may set the flag.
    text = podman.output(*options, "--security-opt", "seccomp=unconfined", "--", "cat", "/proc/self/status")
    assert status_field(text, "NoNewPrivs") == value


def test_kernel_files_are_masked_or_read_only(podman: PodmanHost) -> None:
    script = """
        cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | head -c 10 | wc -c
        ls /sys/firmware | wc -l
        (echo 0 >/proc/sys/kernel/panic) 2>/dev/null || echo sys
        (echo h >/proc/sysrq-trigger) 2>/dev/null || echo sysrq"""
    assert podman.output("--", "sh", "-c", script).split() == ["0", "0", "sys", "sysrq"]


def test_masks_can_be_lifted_and_added(podman: PodmanHost) -> None:
    count = "ls /sys/firmware | wc -l; wc -c </proc/version"
    text = podman.output(
        "--security-opt", "unmask=/sys/firmware", "--security-opt", "mask=/proc/version", "--", "sh", "-c", count
    )
    firmware, version = text.split()
    assert int(firmware) == len(os.listdir("/sys/firmware"))
    assert version == "0"


# ---- namespaces


def test_every_namespace_is_new(podman: PodmanHost) -> None:
    script = "for n in ipc mnt net pid uts; do readlink /proc/self/ns/$n; done"
    inside = podman.output("--", "sh", "-c", script).split()
    assert not set(inside) & {os.readlink(f"/proc/self/ns/{n}") for n in ("ipc", "mnt", "net", "pid", "uts")}


@pytest.mark.parametrize("name", ["ipc", "pid", "uts"])
def test_namespace_of_the_host(podman: PodmanHost, name: str) -> None:
    assert podman.output(f"--{name}", "host", "--", "readlink", f"/proc/self/ns/{name}") == os.readlink(
        f"/proc/self/ns/{name}"
    )


def test_network_none_and_host(podman: PodmanHost) -> None:
    assert podman.output("--", "ls", "/sys/class/net").split() == ["lo"]
    assert podman.output("--", "sh", "-c", "ip -o addr show lo").count("127.0.0.1") == 1
    done = podman("run", "--rm", "--network", "host", IMAGE, "readlink", "/proc/self/ns/net")
    assert done.stdout.strip() == os.readlink("/proc/self/ns/net")


def test_private_cgroup_namespace(podman: PodmanHost) -> None:
    text = podman.output("--cgroupns", "private", "--", "cat", "/proc/self/cgroup")
    assert {line.split(":", 2)[2] for line in text.splitlines()} == {"/"}


def test_pid_namespace_of_another_container(podman: PodmanHost) -> None:
    first = podman.start(command=["sleep", "4242"])
    assert "sleep 4242" in podman.output("--pid", f"container:{first}", "--", "ps", "-o", "args")


def test_network_and_ipc_of_another_container(podman: PodmanHost) -> None:
    first = podman.start("--ipc", "shareable")
    script = ["sh", "-c", "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc"]
    ours = podman.ok("exec", first, *script)
    done = podman("run", "--rm", "--network", f"container:{first}", "--ipc", f"container:{first}", IMAGE, *script)
    assert done.stdout.strip() == ours, done.stderr


def test_pod_without_infra_container(podman: PodmanHost) -> None:
    podman.ok("pod", "create", "--infra=false", "--name", "bare")
    assert podman.ok("run", "--rm", "--pod", "bare", "--network", "none", IMAGE, "echo", "in a pod") == "in a pod"


def test_pod_shares_the_namespaces_of_its_infra_container(podman: PodmanHost) -> None:
    podman.ok(
        *("pod", "create", "--name", "sharing", "--network", "none", "--hostname", "pod", "--share", "ipc,net,uts,pid"),
        *("--infra-image", IMAGE, "--infra-command", "sleep 5151"),
    )
    podman.ok("pod", "start", "sharing")
    text = podman.ok("run", "--rm", "--pod", "sharing", IMAGE, "sh", "-c", "hostname; ps -o args")
    assert text.split()[0] == "pod"
    assert "sleep 5151" in text
    podman.ok("pod", "rm", "--force", "--time", "0", "sharing")


def test_user_namespace_with_mappings(podman: PodmanHost) -> None:
    mappings = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
    container = podman.start(*mappings)
    assert podman.ok("exec", container, "cat", "/proc/self/uid_map").split() == ["0", "100000", "65536"]
    assert podman.ok("exec", container, "cat", "/proc/self/gid_map").split() == ["0", "200000", "65536"]
    assert (
        podman.ok("exec", container, "sh", "-c", "touch /made; stat -c %u:%g /made /bin/busybox").split() == ["0:0"] * 2
    )
    status = Path(f"/proc/{podman.inspect(container, '{{.State.Pid}}')}/status").read_text()
    assert status_field(status, "Uid").split() == ["100000"] * 4
    assert status_field(status, "Gid").split() == ["200000"] * 4
    assert podman.ok("exec", "-u", "1000", container, "id", "-u") == "1000"


def test_sysctls(podman: PodmanHost) -> None:
    options = ("--sysctl", "net.ipv4.ip_default_ttl=77", "--sysctl", "kernel.msgmax=4096")
    script = "cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/msgmax"
    assert podman.output(*options, "--", "sh", "-c", script).split() == ["77", "4096"]
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() != "77\n"


# ---- mounts


def test_volumes(podman: PodmanHost) -> None:
    shared = podman.directory / "shared"
    shared.mkdir(exist_ok=True)
    (shared / "from-host").write_text("host\n")
    assert (
        podman.output("-v", f"{shared}:/data", "--", "sh", "-c", "cat /data/from-host; echo box >/data/from-box")
        == "host"
    )
    assert (shared / "from-box").read_text() == "box\n"
    done = podman.run("-v", f"{shared}:/data:ro", "--", "touch", "/data/x")
    assert done.returncode == 1 and "Read-only" in done.stderr


def test_a_single_file_as_volume(podman: PodmanHost) -> None:
    file = podman.directory / "motd"
    file.write_text("one file\n")
    assert podman.output("-v", f"{file}:/deep/in/here/motd:ro", "--", "cat", "/deep/in/here/motd") == "one file"


def test_a_file_where_the_image_has_a_dangling_link(podman: PodmanHost) -> None:
    # /etc/resolv.conf of most images with systemd is such a link.
    file = podman.directory / "resolv"
    file.write_text("nameserver 192.0.2.1\n")
    image = "localhost/dangling:test"
    podman.ok(
        "run", "--name", "link", "--network", "none", IMAGE, "ln", "-s", "../run/made/by/nobody", "/etc/link.conf"
    )
    podman.ok("commit", "--quiet", "link", image)
    arguments = ("run", "--rm", "--network", "none", "-v", f"{file}:/etc/link.conf:ro", image)
    assert podman.ok(*arguments, "cat", "/run/made/by/nobody") == "nameserver 192.0.2.1"


def test_tmpfs(podman: PodmanHost) -> None:
    text = podman.output(
        "--tmpfs",
        "/scratch:size=1m,mode=0700,noexec",
        "--",
        "sh",
        "-c",
        "grep /scratch /proc/mounts; stat -c %a /scratch",
    )
    assert "size=1024k" in text and "noexec" in text and text.endswith("700")


def test_tmpfs_over_existing_content_copies_it_up(podman: PodmanHost) -> None:
    assert "passwd" in podman.output("--tmpfs", "/etc:tmpcopyup", "--", "ls", "/etc").split()


def test_mount_propagation(podman: PodmanHost) -> None:
    source = podman.directory / "propagated"
    source.mkdir(exist_ok=True)
    text = podman.output(
        "-v", f"{source}:/slave:rslave", "-v", f"{source}:/private:rprivate", "--", "cat", "/proc/self/mountinfo"
    )
    fields = {line.split()[4]: line.split()[6] for line in text.splitlines()}
    assert fields["/private"] == "-"


def test_read_only_root(podman: PodmanHost) -> None:
    done = podman.run("--read-only", "--", "sh", "-c", "touch /tmp/fine && touch /dev/shm/fine && touch /etc/x")
    assert done.returncode == 1 and "/etc/x: Read-only file system" in done.stderr


def test_shm_size(podman: PodmanHost) -> None:
    assert "size=2048k" in podman.output("--shm-size", "2m", "--", "grep", "/dev/shm ", "/proc/mounts")


# ---- devices


def test_default_devices(podman: PodmanHost) -> None:
    script = "for d in null zero full random urandom tty; do stat -c '%t:%T %a' /dev/$d; done"
    lines = podman.output("--", "sh", "-c", script).splitlines()
    assert lines == ["1:3 666", "1:5 666", "1:7 666", "1:8 666", "1:9 666", "5:0 666"]


def test_links_in_dev(podman: PodmanHost) -> None:
    links = podman.output("--", "sh", "-c", "for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done").split()
    assert links == ["/proc/self/fd", *(f"/proc/self/fd/{n}" for n in range(3)), "pts/ptmx"]


def test_a_device_of_the_host(podman: PodmanHost) -> None:
    script = "head -c 3 /dev/void | wc -c; echo x 2>/dev/null >/dev/void || echo refused"
    assert podman.output("--device", "/dev/zero:/dev/void:r", "--", "sh", "-c", script).split()[0] == "3"


def test_devices_not_granted_cannot_be_made_and_opened(podman: PodmanHost) -> None:
    script = "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg"
    done = podman.run("--", "sh", "-c", script)
    assert done.returncode == 1 and "not permitted" in done.stderr


# ---- hooks


@pytest.mark.parametrize("stage", ["prestart", "createRuntime", "createContainer", "poststart", "poststop"])
def test_hooks_get_the_state_on_stdin(podman: PodmanHost, is_ovt: bool, stage: str) -> None:
    hooks, record = podman.directory / f"hooks-{stage}", podman.directory / f"record-{stage}"
    hooks.mkdir(exist_ok=True)
    script = podman.directory / f"hook-{stage}"
    script.write_text(f"#!/bin/sh\ncat >{record}\n")
    script.chmod(0o755)
    hook = {"version": "1.0.0", "hook": {"path": str(script)}, "when": {"always": True}, "stages": [stage]}
    (hooks / "hook.json").write_text(json.dumps(hook))
    podman.ok("--hooks-dir", str(hooks), "run", "--name", f"hooked-{stage}", "--network", "none", IMAGE, "true")
    state = json.loads(record.read_text())
    assert state["id"] == podman.inspect(f"hooked-{stage}", "{{.Id}}")
    expected = {"poststop": ("stopped",), "poststart": ("running", "stopped")}.get(stage, ("creating", "created"))
    # runc 1.1 says "created" to poststart hooks, against the specification.
    assert state["status"] in expected or (stage == "poststart" and not is_ovt)
    assert state["bundle"] and state["ociVersion"]


def test_a_failing_hook_stops_the_container(podman: PodmanHost) -> None:
    hooks = podman.directory / "hooks-failing"
    hooks.mkdir(exist_ok=True)
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "echo hook says no >&2; exit 3"]}
    when = {"version": "1.0.0", "hook": hook, "when": {"always": True}, "stages": ["createRuntime"]}
    (hooks / "hook.json").write_text(json.dumps(when))
    done = podman("--hooks-dir", str(hooks), "run", "--rm", "--network", "none", IMAGE, "echo", "never")
    assert done.returncode != 0 and done.stdout == ""
    assert "hook" in done.stderr
