"""Every resource of the runtime-spec on cgroup v2: the kernel's files say so, and where a limit can bite, it does."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ovt.live import WAITING, Container, Create, Run, namespaces, refused, wait_for, with_mounts

pytestmark = [pytest.mark.lab, pytest.mark.root]

MIB = 1 << 20
PAGE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int, int]]:
    """A loop device with BFQ, which knows weights of single devices: its path, major and minor number."""
    subprocess.run(["modprobe", "-a", "loop", "bfq"], check=True, capture_output=True)
    file = tmp_path_factory.mktemp("disk") / "image"
    with open(file, "wb") as image:
        image.truncate(32 * MIB)
    asked = ["losetup", "--find", "--show", str(file)]
    path = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    try:
        Path(f"/sys/block/{Path(path).name}/queue/scheduler").write_text("bfq")
        number = os.stat(path).st_rdev
        yield path, os.major(number), os.minor(number)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


@pytest.fixture
def swap() -> Iterator[None]:
    """16 MiB of swap space, of memory."""
    subprocess.run(["modprobe", "brd"], check=True, capture_output=True)
    subprocess.run(["mkswap", "/dev/ram0"], check=True, capture_output=True)
    subprocess.run(["swapon", "/dev/ram0"], check=True)
    yield
    subprocess.run(["swapoff", "/dev/ram0"], check=True)


def files(container: Container, *names: str) -> dict[str, str]:
    directory = container.cgroup("")
    return {name: (directory / name).read_text().strip() for name in names}


def limited(
    create: Create, *command: str, edit: Callable[[dict[str, Any]], object] | None = None, **resources: Any
) -> Container:
    return create(*(command or WAITING), config={"linux": {"resources": resources}}, edit=edit)


def test_every_resource(create: Create, disk: tuple[str, int, int]) -> None:
    _, major, minor = disk
    node = {"major": major, "minor": minor}
    container = limited(
        create,
        memory={"limit": 64 * MIB, "swap": 96 * MIB, "reservation": 32 * MIB, "swappiness": 5, "kernelTCP": 4 * MIB},
        cpu={"shares": 512, "quota": 30_000, "period": 60_000, "burst": 5_000, "cpus": "1", "mems": "0"},
        pids={"limit": 77},
        blockIO={
            "weight": 300,
            "weightDevice": [{**node, "weight": 200}],
            "throttleReadBpsDevice": [{**node, "rate": 5 * MIB}],
            "throttleWriteBpsDevice": [{**node, "rate": 6 * MIB}],
            "throttleReadIOPSDevice": [{**node, "rate": 700}],
            "throttleWriteIOPSDevice": [{**node, "rate": 800}],
        },
        hugepageLimits=[{"pageSize": "2MB", "limit": 4 * MIB}, {"pageSize": "1GB", "limit": 0}],
        unified={"memory.high": str(60 * MIB), "memory.oom.group": "1", "cgroup.max.descendants": "9"},
    )
    expected = {
        "memory.max": str(64 * MIB),
        "memory.swap.max": str(32 * MIB),
        "memory.low": str(32 * MIB),
        "memory.high": str(60 * MIB),
        "memory.oom.group": "1",
        "cpu.weight": "59",
        "cpu.max": "30000 60000",
        "cpu.max.burst": "5000",
        "cpuset.cpus": "1",
        "cpuset.cpus.effective": "1",
        "cpuset.mems": "0",
        "pids.max": "77",
        "io.bfq.weight": f"default 300\n{major}:{minor} 200",
        "io.max": f"{major}:{minor} rbps={5 * MIB} wbps={6 * MIB} riops=700 wiops=800",
        "hugetlb.2MB.max": str(4 * MIB),
        "hugetlb.2MB.rsvd.max": str(4 * MIB),
        "hugetlb.1GB.max": "0",
        "cgroup.max.descendants": "9",
    }
    assert files(container, *expected) == expected
    change = {
        "memory": {"limit": 48 * MIB, "swap": 48 * MIB, "reservation": -1},
        "cpu": {"quota": -1, "cpus": "0-1", "burst": 0},
        "pids": {"limit": -1},
        "blockIO": {"throttleReadBpsDevice": [{**node, "rate": 0}], "weight": 100},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 2 * MIB}],
        "unified": {"memory.high": "max"},
    }
    container.oci("update", "--resources", "-", container.id, input=json.dumps(change), check=True)
    expected |= {
        "memory.max": str(48 * MIB),
        "memory.swap.max": "0",
        "memory.low": "max",
        "memory.high": "max",
        "cpu.max": "max 60000",
        "cpu.max.burst": "0",
        "cpuset.cpus": "0-1",
        "cpuset.cpus.effective": "0-1",
        "pids.max": "max",
        "io.bfq.weight": "default 100",  # which takes those of devices with it: BFQ's own rule
        "io.max": f"{major}:{minor} rbps=max wbps={6 * MIB} riops=700 wiops=800",
        "hugetlb.2MB.max": str(2 * MIB),
        "hugetlb.2MB.rsvd.max": str(2 * MIB),
    }
    assert files(container, *expected) == expected


def test_flags_of_update(create: Create) -> None:
    container = create(*WAITING)
    flags = (
        *("--memory", "40M", "--memory-swap", "60M", "--memory-reservation", "20M", "--pids-limit", "44"),
        *("--cpu-share", "2048", "--cpu-quota", "20000", "--cpu-period", "50000", "--cpuset-cpus", "0"),
        *("--cpuset-mems", "0", "--blkio-weight", "500"),
    )
    container.oci("update", *flags, container.id, check=True)
    expected = {"memory.max": str(40 * MIB), "memory.swap.max": str(20 * MIB), "memory.low": str(20 * MIB),
                "pids.max": "44", "cpu.weight": "174", "cpu.max": "20000 50000", "cpuset.cpus": "0",
                "cpuset.mems": "0"}  # fmt: skip
    assert files(container, *expected) == expected
    container.oci("update", "--cpu-idle", "1", container.id, check=True)
    assert files(container, "cpu.idle") == {"cpu.idle": "1"}


@pytest.fixture
def nic() -> Iterator[str]:
    """An RDMA device made of software."""
    subprocess.run(["modprobe", "rdma_rxe"], check=True, capture_output=True)
    subprocess.run(["ip", "link", "add", "ovt-rdma", "up", "type", "dummy"], check=True)
    subprocess.run(["rdma", "link", "add", "rxe-ovt", "type", "rxe", "netdev", "ovt-rdma"], check=True)
    yield "rxe-ovt"
    subprocess.run(["rdma", "link", "delete", "rxe-ovt"], check=True)
    subprocess.run(["ip", "link", "delete", "ovt-rdma"], check=True)


def test_rdma(create: Create, nic: str) -> None:
    container = limited(create, rdma={nic: {"hcaHandles": 3, "hcaObjects": 400}})
    assert f"{nic} hca_handle=3 hca_object=400" in files(container, "rdma.max")["rdma.max"].splitlines()


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"network": {"classID": 5}}, "network classes and priorities are not supported on cgroup v2"),
        ({"cpu": {"realtimeRuntime": 5000}}, "realtime limits are not supported on cgroup v2"),
        ({"unified": {"misc.max": "nothing-such 5"}}, "unified.misc.max"),
        ({"rdma": {"nothing-such": {"hcaHandles": 3}}}, "rdma"),
        ({"memory": {"limit": 64 * MIB, "swap": 32 * MIB}}, "memory+swap limit should be >= memory limit"),
    ],
)
def test_what_there_is_none_of(oci: Any, bundle: Any, container_id: str, resources: dict[str, Any], words: str) -> None:
    place = bundle(config={"linux": {"resources": resources}})
    assert words in refused(oci("create", "-b", place, container_id))
    assert "does not exist" in refused(oci("state", container_id))


def test_forks_are_refused(run: Run) -> None:
    script = "(for i in 1 2 3 4 5 6 7 8 9; do sleep 1 & done) 2>&1; true"
    words = run("sh", "-c", script, config={"linux": {"resources": {"pids": {"limit": 6}}}}, flags=())
    assert "can't fork" in words


def test_processor_time_is_held_back(create: Create) -> None:
    container = limited(create, "sh", "-c", "while :; do :; done", cpu={"quota": 5_000, "period": 50_000}).start()

    def throttled() -> int:
        event = json.loads(container.oci("events", "--stats", container.id, check=True).stdout)
        periods: int = event["data"]["cpu"]["throttling"].get("throttledPeriods", 0)
        return periods

    wait_for(lambda: throttled() > 3, 30)
    stat = dict(line.split() for line in files(container, "cpu.stat")["cpu.stat"].splitlines())
    assert int(stat["nr_throttled"]) > 3 and int(stat["throttled_usec"]) > 0


def test_processors(run: Run) -> None:
    asked = ("grep", "Cpus_allowed_list", "/proc/self/status")
    assert run(*asked, config={"linux": {"resources": {"cpu": {"cpus": "1"}}}}).split()[1] == "1"


EAT = "head -c 8000000 /dev/zero | tail | wc -c; cat /sys/fs/cgroup/memory.swap.peak"


def test_swap(run: Run, swap: None) -> None:
    memory = {"limit": 6 * MIB, "swap": 20 * MIB}
    eaten, peak = map(int, run("sh", "-c", EAT, config={"linux": {"resources": {"memory": memory}}}).split())
    assert eaten == 8_000_000 and peak > MIB
    memory["swap"] = memory["limit"]
    killed = run("sh", "-c", EAT, config={"linux": {"resources": {"memory": memory}}}).split()
    assert killed == ["0", "0"]


def test_reading_a_disk_is_slowed(run: Run, create: Create, disk: tuple[str, int, int]) -> None:
    path, major, minor = disk
    block = {"throttleReadBpsDevice": [{"major": major, "minor": minor, "rate": MIB}]}
    device = {"path": "/dev/disk", "type": "b", "major": major, "minor": minor}
    allow = {"allow": True, "type": "b", "major": major, "minor": minor, "access": "r"}
    config = {"linux": {"devices": [device], "resources": {"blockIO": block, "devices": [{"allow": False}, allow]}}}
    started = time.monotonic()
    run("dd", "if=/dev/disk", "of=/dev/null", "bs=64k", "count=32", config=config)  # 2 MiB at 1 MiB/s
    assert time.monotonic() - started > 1
    subprocess.run(["blockdev", "--flushbufs", path], check=True)
    container = create("sh", "-c", "dd if=/dev/disk of=/dev/null bs=64k count=4; sleep 1000", config=config).start()

    def read() -> int:
        event = json.loads(container.oci("events", "--stats", container.id, check=True).stdout)
        entries = event["data"]["blkio"].get("ioServiceBytesRecursive", [])
        return sum(
            entry.get("value", 0) for entry in entries if (entry["major"], entry.get("minor", 0)) == (major, minor)
        )

    wait_for(lambda: read() >= MIB // 4)


def test_hugepages(run: Run) -> None:
    before = PAGE.read_text()
    PAGE.write_text("4")
    try:
        assert PAGE.read_text() == "4\n"
        mount = with_mounts({"type": "hugetlbfs", "source": "huge", "destination": "/tmp", "options": ["pagesize=2M"]})
        script = "for n in 2 4; do fallocate -l ${n}M /tmp/$n 2>/dev/null && echo $n; done; rm -f /tmp/*"
        config = {"linux": {"resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}]}}}
        assert run("sh", "-c", script, config=config, edit=mount) == "2"
    finally:
        PAGE.write_text(before)


PROBE = "for d in null full pm; do (: < /tmp/$d) 2>/dev/null && echo $d; done; true"


def test_devices(create: Create) -> None:
    latency = os.stat("/dev/cpu_dma_latency").st_rdev  # opening it asks for no capability
    third = {"type": "c", "major": os.major(latency), "minor": os.minor(latency)}
    names = {"null": {"type": "c", "major": 1, "minor": 3}, "full": {"type": "c", "major": 1, "minor": 7}, "pm": third}
    nodes = [{"path": f"/tmp/{name}", **node} for name, node in names.items()]
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    config = {"root": {"readonly": False}, "linux": {"devices": nodes, "resources": {"devices": rules}}}
    container = create(*WAITING, config=config).start()
    assert container.ask("sh", "-c", PROBE).split() == ["null", "full"]
    for more, seen in (([{"allow": True, **third, "access": "r"}], ["null", "full", "pm"]), ([], ["null", "full"])):
        document = json.dumps({"devices": [*rules, *more]})
        container.oci("update", "--resources", "-", container.id, input=document, check=True)
        assert container.ask("sh", "-c", PROBE).split() == seen


def test_pause_and_kill(create: Create) -> None:
    container = create("sh", "-c", "sleep 1000 & sleep 1000 & wait").start()
    container.oci("pause", container.id, check=True)
    assert "frozen 1" in files(container, "cgroup.events")["cgroup.events"]
    assert container.status == "paused"
    container.oci("resume", container.id, check=True)
    assert "frozen 0" in files(container, "cgroup.events")["cgroup.events"]
    wait_for(lambda: len(files(container, "cgroup.procs")["cgroup.procs"].split()) == 3)
    directory = container.cgroup("")
    container.oci("delete", "--force", container.id, check=True)
    assert not directory.exists()


def test_a_container_divides_its_cgroup(create: Create) -> None:
    def edit(config: dict[str, Any]) -> None:
        namespaces(config, cgroup="")
        config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/sys/fs/cgroup"]
        config["mounts"].append(
            {"type": "cgroup", "source": "cgroup", "destination": "/sys/fs/cgroup", "options": ["rw"]}
        )

    script = """cd /sys/fs/cgroup && mkdir init && echo 0 > init/cgroup.procs &&
        echo +memory > cgroup.subtree_control && mkdir box && echo 8000000 > box/memory.max && sleep 1000"""
    container = limited(create, "sh", "-c", script, edit=edit, memory={"limit": 64 * MIB}).start()
    inside = container.cgroup("")
    wait_for(lambda: container.output() or (inside.parent / "box/memory.max").exists())
    assert container.output() == ""
    assert container.ask("cat", "/proc/self/cgroup") == "0::/init"  # an exec follows, as `box`'s parent takes nobody
