"""Power features of the lab host through the kernel's own files: cpufreq, cpuidle, PM QoS, CPU hotplug, the freezer.

Suspend to RAM is not here: it ends the root file system of the shared lab host (see test_suspend.py).
Every test gives back what it changed: one boot runs them all.
"""

import contextlib
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Late: the first change of frequency costs this boot its TSC.
pytestmark = pytest.mark.lab(late=True)

CPU = Path("/sys/devices/system/cpu")
POLICIES = (CPU / "cpufreq/policy0", CPU / "cpufreq/policy1")
KHZ = [2_400_000, 2_000_000, 1_600_000, 800_000]
BUILT_IN = ("performance", "schedutil")  # governors that are no modules
CGROUPS = Path("/sys/fs/cgroup")

Put = Callable[[Path, object], None]


def read(path: Path) -> str:
    return path.read_text().strip()


def chosen(path: Path) -> str:
    """What a file holds, or the word in brackets of a file that lists the choices."""
    words = read(path)
    return words.partition("[")[2].partition("]")[0] or words


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@pytest.fixture
def put() -> Iterator[Put]:
    """Write to a kernel file; what it held before the test is written back after it, last first."""
    before: dict[Path, str] = {}

    def write(path: Path, value: object) -> None:
        before.setdefault(path, chosen(path))
        path.write_text(str(value))

    yield write
    for path, value in reversed(before.items()):
        path.write_text(value)


@pytest.fixture
def pinned() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that may run on CPU 1 alone and wakes now and then: one that sleeps on is not moved until it wakes."""
    program = (
        "import os, time\nos.sched_setaffinity(0, {1})\nprint(flush=True)\nwhile os.getppid() != 1: time.sleep(0.05)"
    )
    with subprocess.Popen([sys.executable, "-ISc", program], stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"\n"
        yield process
        process.kill()


# Frequencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_each_processor_has_four_frequencies(policy: Path) -> None:
    assert read(policy / "scaling_driver") == "acpi-cpufreq"
    assert [int(khz) for khz in read(policy / "scaling_available_frequencies").split()] == KHZ
    assert read(policy / "cpuinfo_max_freq") == str(KHZ[0])
    assert read(policy / "cpuinfo_min_freq") == str(KHZ[-1])
    assert read(policy / "related_cpus") == policy.name.removeprefix("policy")


@pytest.mark.parametrize("governor", [*BUILT_IN, "powersave", "userspace", "ondemand", "conservative"])
def test_every_governor_can_be_had(governor: str, modprobe: Callable[..., None], put: Put) -> None:
    if governor not in BUILT_IN:
        modprobe(f"cpufreq_{governor}")
    assert governor in read(POLICIES[1] / "scaling_available_governors").split()
    put(POLICIES[1] / "scaling_governor", governor)
    assert read(POLICIES[1] / "scaling_governor") == governor


def test_governors_at_the_ends_choose_the_ends(modprobe: Callable[..., None], put: Put) -> None:
    modprobe("cpufreq_powersave")
    for governor, khz in (("powersave", KHZ[-1]), ("performance", KHZ[0])):
        put(POLICIES[1] / "scaling_governor", governor)
        assert read(POLICIES[1] / "scaling_cur_freq") == str(khz)


def test_userspace_sets_any_frequency_of_one_processor(modprobe: Callable[..., None], put: Put) -> None:
    modprobe("cpufreq_userspace")
    for policy in POLICIES:
        put(policy / "scaling_governor", "userspace")
        (policy / "scaling_setspeed").write_text(str(KHZ[0]))
    for wanted, got in [*zip(KHZ, KHZ, strict=True), (1_700_000, 2_000_000), (1, KHZ[-1]), (9_000_000, KHZ[0])]:
        (POLICIES[1] / "scaling_setspeed").write_text(str(wanted))
        assert read(POLICIES[1] / "scaling_cur_freq") == str(got)
    (POLICIES[1] / "scaling_setspeed").write_text(str(KHZ[-1]))
    assert read(POLICIES[0] / "scaling_cur_freq") == str(KHZ[0])


def test_limits_bite(modprobe: Callable[..., None], put: Put) -> None:
    modprobe("cpufreq_powersave")
    one = POLICIES[1]
    put(one / "scaling_governor", "performance")
    put(one / "scaling_max_freq", 1_600_000)  # the kernel follows a limit from a work queue
    wait_until(lambda: read(one / "scaling_cur_freq") == "1600000", "the upper limit")
    put(one / "scaling_governor", "powersave")
    put(one / "scaling_min_freq", 1_600_000)
    wait_until(lambda: read(one / "scaling_cur_freq") == "1600000", "the lower limit")
    assert read(POLICIES[0] / "scaling_max_freq") == str(KHZ[0])
    assert read(POLICIES[0] / "scaling_min_freq") == str(KHZ[-1])


def test_ondemand_follows_the_load(modprobe: Callable[..., None], put: Put) -> None:
    modprobe("cpufreq_ondemand")
    one = POLICIES[1]
    put(one / "scaling_governor", "ondemand")
    wait_until(lambda: read(one / "scaling_cur_freq") == str(KHZ[-1]), "idle at the lowest frequency")
    program = "import os; os.sched_setaffinity(0, {1})\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-ISc", program]) as busy:
        try:
            wait_until(lambda: read(one / "scaling_cur_freq") == str(KHZ[0]), "busy at the highest frequency")
        finally:
            busy.kill()
    wait_until(lambda: read(one / "scaling_cur_freq") == str(KHZ[-1]), "idle again at the lowest frequency")


# Idle states -----------------------------------------------------------------------------------------------------


def state(cpu: int, name: str) -> Path:
    """The directory of a processor's idle state."""
    return next(entry.parent for entry in (CPU / f"cpu{cpu}/cpuidle").glob("state*/name") if read(entry) == name)


def entered(cpu: int) -> dict[str, int]:
    """How often each idle state was entered while we slept for half a second."""
    # A processor that idles since before a change of rules ends a state it may not enter again: wake it first.
    os.sched_setaffinity(0, {cpu})
    os.sched_setaffinity(0, {1 - cpu})
    time.sleep(0.05)
    names = ("POLL", "C1", "C2")
    before = {name: int(read(state(cpu, name) / "usage")) for name in names}
    for _ in range(25):
        time.sleep(0.02)
        os.sched_setaffinity(0, {cpu})
        os.sched_setaffinity(0, {1 - cpu})
    after = {name: int(read(state(cpu, name) / "usage")) for name in names}
    os.sched_setaffinity(0, {0, 1})
    return {name: after[name] - before[name] for name in names}


@pytest.mark.parametrize("cpu", [0, 1])
def test_idle_states_with_their_latencies(cpu: int) -> None:
    assert read(CPU / "cpuidle/current_driver") == "acpi_idle"
    states = sorted((CPU / f"cpu{cpu}/cpuidle").iterdir())
    assert [(read(path / "name"), read(path / "latency")) for path in states] == [
        ("POLL", "0"),
        ("C1", "1"),
        ("C2", "100"),
    ]


def test_an_idle_processor_enters_c2() -> None:
    assert entered(1)["C2"] > 0


def test_a_disabled_state_is_not_entered(put: Put) -> None:
    put(state(1, "C2") / "disable", 1)
    counts = entered(1)
    assert counts["C2"] == 0
    assert counts["C1"] > 0


def test_cpu_dma_latency_forbids_c2_everywhere_while_held() -> None:
    with open("/dev/cpu_dma_latency", "wb", buffering=0) as file:
        file.write(struct.pack("i", 10))
        assert [entered(cpu)["C2"] for cpu in (0, 1)] == [0, 0]
    assert entered(1)["C2"] > 0


def test_resume_latency_forbids_c2_on_one_processor(put: Put) -> None:
    put(CPU / "cpu1/power/pm_qos_resume_latency_us", 10)
    counts = entered(1)
    assert counts["C2"] == 0
    assert counts["C1"] > 0
    assert entered(0)["C2"] > 0


def test_resume_latency_of_nothing_at_all_leaves_polling(put: Put) -> None:
    put(CPU / "cpu1/power/pm_qos_resume_latency_us", "n/a")
    counts = entered(1)
    assert counts["C1"] == counts["C2"] == 0
    assert counts["POLL"] > 0


# CPU hotplug -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def offline(cpu: int) -> Iterator[None]:
    switch = CPU / f"cpu{cpu}/online"
    switch.write_text("0")
    try:
        yield
    finally:
        switch.write_text("1")


def test_first_processor_cannot_leave() -> None:
    assert not (CPU / "cpu0/online").exists()


def test_processor_leaves_and_comes_back() -> None:
    with offline(1):
        assert read(CPU / "online") == "0"
        assert read(CPU / "offline") == "1"
        assert read(CPU / "present") == "0-1"
        assert not (CPU / "cpu1/topology").exists()
        assert os.sched_getaffinity(0) == {0}
    assert read(CPU / "online") == "0-1"
    os.sched_setaffinity(0, {1})
    os.sched_setaffinity(0, {0, 1})


def test_pinned_process_is_moved_and_loses_its_pin(pinned: "subprocess.Popen[bytes]") -> None:
    assert os.sched_getaffinity(pinned.pid) == {1}
    with offline(1):
        wait_until(lambda: os.sched_getaffinity(pinned.pid) == {0}, "moved to the processor that is left")
        assert pinned.poll() is None
    wait_until(lambda: os.sched_getaffinity(pinned.pid) == {0, 1}, "free to run on both")


def test_frequency_policy_outlives_its_processor(modprobe: Callable[..., None], put: Put) -> None:
    modprobe("cpufreq_powersave")
    one = POLICIES[1]
    put(one / "scaling_governor", "powersave")
    put(one / "scaling_min_freq", 1_600_000)
    with offline(1):
        with pytest.raises(OSError):
            read(one / "scaling_cur_freq")
    assert read(one / "scaling_governor") == "powersave"
    assert read(one / "scaling_min_freq") == read(one / "scaling_cur_freq") == "1600000"


def test_cpuset_of_the_processor_falls_back_and_recovers(pinned: "subprocess.Popen[bytes]") -> None:
    enabled = "cpuset" in read(CGROUPS / "cgroup.subtree_control").split()
    (CGROUPS / "cgroup.subtree_control").write_text("+cpuset")
    group = CGROUPS / "lab-power"
    group.mkdir()
    try:
        (group / "cpuset.cpus").write_text("1")
        (group / "cgroup.procs").write_text(str(pinned.pid))
        with offline(1):
            wait_until(lambda: read(group / "cpuset.cpus.effective") == "0", "the parent's processors")
            assert read(group / "cpuset.cpus") == "1"
            assert os.sched_getaffinity(pinned.pid) == {0}
        wait_until(lambda: read(group / "cpuset.cpus.effective") == "1", "its own processor again")
        wait_until(lambda: os.sched_getaffinity(pinned.pid) == {1}, "the process follows")
    finally:
        pinned.kill()
        pinned.wait()
        group.rmdir()
        if not enabled:
            (CGROUPS / "cgroup.subtree_control").write_text("-cpuset")


# Sleep -----------------------------------------------------------------------------------------------------------


def test_host_offers_suspend_to_ram_and_an_alarm_clock() -> None:
    assert {"freeze", "mem", "disk"} <= set(read(Path("/sys/power/state")).split())
    assert {"s2idle", "deep"} <= set(read(Path("/sys/power/mem_sleep")).replace("[", "").replace("]", "").split())
    assert read(Path("/sys/class/rtc/rtc0/name")).startswith("rtc_cmos")
    assert read(Path("/sys/class/rtc/rtc0/device/power/wakeup")) == "enabled"


def test_suspend_stops_every_process_and_thaws_them(put: Put) -> None:
    """The part of a suspend that the shared host survives: processes are frozen, devices are not."""
    put(Path("/sys/module/suspend/parameters/pm_test_delay"), 3)
    put(Path("/sys/power/pm_test"), "freezer")
    # Until its input ends, it notes the longest time that it did not run.
    program = (
        "import select, time\nlongest, last = 0, time.monotonic()\nprint(flush=True)\n"
        "while not select.select([0], [], [], 0.02)[0]:\n"
        "    now = time.monotonic(); longest, last = max(longest, now - last), now\n"
        "print(longest)\n"
    )
    command = [sys.executable, "-ISc", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "\n"
        started = time.monotonic()
        Path("/sys/power/state").write_text("mem")
        took = time.monotonic() - started
        time.sleep(0.5)
        process.stdin.close()
        longest = float(process.stdout.readline())
    assert took > 1  # the kernel measures its delay of 3 s by a loop that a busy machine makes it misjudge
    assert longest > took / 2
