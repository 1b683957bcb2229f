"""What config.process says about the process of a real container, seen from inside."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import leaks
from tests.conftest import Bundle, Oci
from tests.ovt.live import WAITING, Create, Run, namespaces, refused, wait_for

pytestmark = pytest.mark.root
SETS = {
    "CapInh": "inheritable",
    "CapPrm": "permitted",
    "CapEff": "effective",
    "CapBnd": "bounding",
    "CapAmb": "ambient",
}
CHOWN, KILL, NET = 1 << 0, 1 << 5, 1 << 12


def process(**entries: Any) -> dict[str, Any]:
    return {"process": entries}


def status(run: Run, name: str, config: dict[str, Any]) -> str:
    """A line of /proc/self/status inside."""
    found = re.search(rf"^{name}:[ \t]*(.*?) *$", run("cat", "/proc/self/status", config=config), re.MULTILINE)
    assert found
    return found[1]


def capabilities(run: Run, sets: dict[str, list[str]], **more: Any) -> dict[str, int]:
    out = run("grep", "^Cap", "/proc/self/status", config=process(capabilities=sets, **more))
    return {SETS[line.split(":")[0]]: int(line.split()[1], 16) for line in out.splitlines()}


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_capabilities_of_root(run: Run, no_new_privs: bool) -> None:
    sets = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_ADMIN"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN"],
        "inheritable": ["CAP_CHOWN"],
        "ambient": ["CAP_CHOWN"],
    }
    # root gains at execve what the bounding set allows, unless it may gain nothing (capabilities(7))
    gained = CHOWN | KILL | (0 if no_new_privs else NET)
    assert capabilities(run, sets, noNewPrivileges=no_new_privs) == {
        "bounding": CHOWN | KILL | NET, "permitted": gained, "effective": gained, "inheritable": CHOWN,
        "ambient": CHOWN,
    }  # fmt: skip


def test_capabilities_of_a_user_are_the_ambient_ones(run: Run) -> None:
    sets = {key: ["CAP_CHOWN", "CAP_KILL"] for key in SETS.values()} | {"ambient": ["CAP_KILL"]}
    seen = capabilities(run, sets, user={"uid": 1000, "gid": 1000})
    assert (seen["effective"], seen["permitted"], seen["ambient"]) == (KILL, KILL, KILL)
    assert seen["bounding"] == seen["inheritable"] == CHOWN | KILL


def test_a_user_without_ambient_capabilities_has_none(run: Run) -> None:
    sets = {name: ["CAP_CHOWN"] for name in ("bounding", "effective", "permitted")}
    seen = capabilities(run, sets, user={"uid": 1000, "gid": 1000})
    assert seen == {"bounding": CHOWN, "effective": 0, "permitted": 0, "inheritable": 0, "ambient": 0}


def test_no_capabilities_at_all(run: Run) -> None:
    assert set(capabilities(run, {key: [] for key in SETS.values()}).values()) == {0}


@pytest.mark.parametrize(("value", "seen"), [(True, "1"), (False, "0")])
def test_no_new_privileges(run: Run, value: bool, seen: str) -> None:
    assert status(run, "NoNewPrivs", process(noNewPrivileges=value)) == seen


@pytest.mark.parametrize(("umask", "seen"), [(0o077, "0077"), (0, "0000"), (None, "0022")])
def test_umask(run: Run, umask: int | None, seen: str) -> None:
    user = {"uid": 0, "gid": 0} | ({} if umask is None else {"umask": umask})
    assert run("sh", "-c", "umask", config=process(user=user)) == seen


def test_user_and_groups(run: Run) -> None:
    user = {"uid": 1000, "gid": 1001, "additionalGids": [5, 6, 70000]}
    assert run("sh", "-c", "id -u; id -g; id -G", config=process(user=user)).split("\n") == [
        "1000", "1001", "1001 5 6 70000",
    ]  # fmt: skip
    assert status(run, "Groups", process(user={"uid": 0, "gid": 0})) == ""


def test_environment(run: Run) -> None:
    env = ["PATH=/bin", "A=1", "B=x=y", "EMPTY=", "UMLAUT=ä"]
    assert run("env", config=process(env=env)).splitlines() == [*env, "HOME=/root"]


def test_home_is_that_of_the_user_unless_given(run: Run) -> None:
    nobody = {"uid": 65534, "gid": 65534}
    assert run("sh", "-c", "echo $HOME", config=process(user=nobody)) == "/"
    assert run("sh", "-c", "echo $HOME", config=process(env=["PATH=/bin", "HOME=/own"])) == "/own"


def test_working_directory(run: Run) -> None:
    assert run("pwd", config=process(cwd="/var")) == "/var"


def test_a_missing_working_directory_is_made(run: Run) -> None:
    assert run("pwd", config=process(cwd="/made/here") | {"root": {"readonly": False}}) == "/made/here"


def test_a_relative_program_is_found_from_the_working_directory(run: Run) -> None:
    assert run("./busybox", "echo", "yes", config=process(cwd="/bin")) == "yes"


def test_the_program_is_found_in_the_containers_path(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle("tool", config=process(env=["PATH=/nowhere:/opt"]))
    (place / "rootfs/opt").mkdir()
    (place / "rootfs/opt/tool").write_text("#!/bin/sh\necho found $0\n")
    (place / "rootfs/opt/tool").chmod(0o755)
    assert oci("run", "-b", place, container_id, check=True).stdout == "found /opt/tool\n"


@pytest.mark.parametrize(
    ("kind", "soft", "hard", "pattern"),
    [
        ("NOFILE", 100, 200, r"Max open files\s+100\s+200"),
        ("CORE", 0, 0, r"Max core file size\s+0\s+0"),
        ("CPU", 1000, 2000, r"Max cpu time\s+1000\s+2000"),
        ("FSIZE", 4096, 8192, r"Max file size\s+4096\s+8192"),
        ("STACK", 1 << 20, 1 << 21, r"Max stack size\s+1048576\s+2097152"),
        ("NPROC", 50, 60, r"Max processes\s+50\s+60"),
        ("AS", 1 << 30, 1 << 31, r"Max address space\s+1073741824\s+2147483648"),
        ("MEMLOCK", 4096, 4096, r"Max locked memory\s+4096\s+4096"),
        ("SIGPENDING", 5, 6, r"Max pending signals\s+5\s+6"),
    ],
)
def test_rlimit(run: Run, kind: str, soft: int, hard: int, pattern: str) -> None:
    limits = [{"type": f"RLIMIT_{kind}", "soft": soft, "hard": hard}]
    assert re.search(pattern, run("cat", "/proc/self/limits", config=process(rlimits=limits)))


def test_oom_score(run: Run) -> None:
    assert run("cat", "/proc/self/oom_score_adj", config=process(oomScoreAdj=321)) == "321"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"class": "IOPRIO_CLASS_BE", "priority": 6}, "best-effort: prio 6"),
        ({"class": "IOPRIO_CLASS_IDLE"}, "idle"),
        ({"class": "IOPRIO_CLASS_RT", "priority": 1}, "realtime: prio 1"),
    ],
)
def test_io_priority(create: Create, entry: dict[str, Any], words: str) -> None:
    container = create(*WAITING, config=process(ioPriority=entry))
    seen = subprocess.run(["ionice", "-p", str(container.pid)], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == words


@pytest.mark.parametrize(
    ("entry", "policy"),
    [
        ({"policy": "SCHED_BATCH", "nice": 5}, os.SCHED_BATCH),
        ({"policy": "SCHED_IDLE"}, os.SCHED_IDLE),
        ({"policy": "SCHED_OTHER", "nice": 7}, os.SCHED_OTHER),
        ({"policy": "SCHED_FIFO", "priority": 10}, os.SCHED_FIFO),
        ({"policy": "SCHED_RR", "priority": 10, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, os.SCHED_RR),
    ],
)
def test_scheduler(create: Create, entry: dict[str, Any], policy: int) -> None:
    config = process(scheduler=entry)
    if Path("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").exists():
        # real time is lent from the parent group, of which only the root has some
        config["linux"] = {
            "cgroupsPath": f"/{leaks.PREFIX}-scheduler",
            "resources": {"cpu": {"realtimeRuntime": 10_000, "realtimePeriod": 1_000_000}},
        }
    container = create(*WAITING, config=config)
    flag = os.SCHED_RESET_ON_FORK if "flags" in entry else 0
    assert os.sched_getscheduler(container.pid) == policy | flag
    assert os.sched_getparam(container.pid).sched_priority == entry.get("priority", 0)
    if policy in (os.SCHED_BATCH, os.SCHED_OTHER):
        assert os.getpriority(os.PRIO_PROCESS, container.pid) == entry["nice"]


def test_exec_cpu_affinity(create: Create) -> None:
    container = create(*WAITING, config=process(execCPUAffinity={"initial": "0", "final": "0"})).start()
    assert container.ask("sh", "-c", "grep ^Cpus_allowed_list /proc/self/status").split() == ["Cpus_allowed_list:", "0"]
    inside = Path(f"/proc/{container.pid}/status").read_text()
    assert "Cpus_allowed_list:\t0\n" not in inside  # it is for exec alone


@pytest.mark.parametrize(("domain", "machine"), [("LINUX", "x86_64"), ("LINUX32", "i686")])
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the names are those of x86_64")
def test_personality(create: Create, domain: str, machine: str) -> None:
    container = create("sh", "-c", "uname -m; exec sleep 1000", config={"linux": {"personality": {"domain": domain}}})
    container.start()
    wait_for(container.output)
    assert container.output() == f"{machine}\n" == f"{container.ask('uname', '-m')}\n"


@pytest.mark.skipif(not Path("/sys/devices/system/node/node0").exists(), reason="a kernel without NUMA")
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"mode": "MPOL_BIND", "nodes": "0"}, "bind:0"),
        ({"mode": "MPOL_INTERLEAVE", "nodes": "0"}, "interleave:0"),
        ({"mode": "MPOL_PREFERRED", "nodes": "0"}, "prefer:0"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}, "bind=static:0"),
        ({"mode": "MPOL_LOCAL"}, "local"),
        ({"mode": "MPOL_DEFAULT"}, "default"),
    ],
)
def test_memory_policy(run: Run, entry: dict[str, Any], words: str) -> None:
    assert run("cat", "/proc/self/numa_maps", config={"linux": {"memoryPolicy": entry}}).split()[1] == words


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("net.ipv4.ip_forward", "1", "network"),
        ("net.ipv4.ping_group_range", "0\t5", "network"),
        ("kernel.msgmax", "9000", "ipc"),
        ("kernel.shm_rmid_forced", "1", "ipc"),
        ("fs.mqueue.msg_max", "12", "ipc"),
        ("kernel.domainname", "example", "uts"),
    ],
)
def test_sysctl(run: Run, key: str, value: str, kind: str) -> None:
    path = f"/proc/sys/{key.replace('.', '/')}"
    before = Path(path).read_text()
    assert run("cat", path, config={"linux": {"sysctl": {key: value}}}) == value
    assert Path(path).read_text() == before


@pytest.mark.parametrize(
    ("key", "without"), [("kernel.pid_max", None), ("vm.swappiness", None), ("net.ipv4.ip_forward", "network"),
                         ("kernel.msgmax", "ipc")],
)  # fmt: skip
def test_a_sysctl_of_the_host_is_refused(
    oci: Oci, bundle: Bundle, container_id: str, key: str, without: str | None
) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["linux"]["sysctl"] = {key: "1"}
        if without:
            namespaces(config, **{without: None})

    assert key in refused(oci("run", "-b", bundle(edit=edit), container_id))


def test_a_missing_sysctl(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle(config={"linux": {"sysctl": {"net.ipv4.no_such": "1"}}})
    assert "this kernel has no sysctl net.ipv4.no_such" in refused(oci("run", "-b", place, container_id))


def test_signals_and_masks_are_at_their_defaults(run: Run) -> None:
    out = run("cat", "/proc/self/status")
    assert re.findall(r"(SigBlk|SigIgn|SigCgt):\t(\d+)", out) == [
        (name, "0" * 16) for name in ("SigBlk", "SigIgn", "SigCgt")
    ]


def test_a_session_of_its_own(create: Create) -> None:
    container = create(*WAITING)
    assert os.getsid(container.pid) == container.pid == os.getpgid(container.pid)


def test_a_keyring_of_its_own(run: Run) -> None:
    own = run("cat", "/proc/keys").count("_ses")
    assert own <= 1
    assert "ovt-test" not in run("cat", "/proc/keys", flags=("--no-new-keyring",))
