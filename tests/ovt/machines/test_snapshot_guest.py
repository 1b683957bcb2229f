"""Snapshots and clones of the built-in guest, by the command line: what its programs see."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ovt.cli.place import Place

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(240)]
COUNT = "i=0; while true; do i=$((i+1)); echo $i >/count; sleep 0.1; done"


@pytest.fixture
def ovt(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for name in place.out("ps", "-a", "--format", "{{.name}}").split():
        place("delete", "--force", name)
    place.nothing_left()


def test_memory_and_disk_go_back_together(ovt: Place) -> None:
    disk = ["--disk", "new,size=16M"]
    ovt("run", "--vm", "-d", "--name", "web", "--memory", "128M", *disk, "busybox", "sh", "-c", COUNT, timeout=120)
    ovt("wait", "--for", "agent", "web", timeout=120)

    def put(text: str) -> None:
        ovt("exec", "web", "sh", "-c", f"echo {text} >/word; echo {text} | dd of=/dev/vda bs=512 conv=sync,fsync")

    def got(name: str = "web") -> str:
        return ovt.out("exec", name, "sh", "-c", "cat /word; dd if=/dev/vda bs=8 count=1 2>/dev/null | head -n 1")

    def count() -> int:
        return int(ovt.out("exec", "web", "cat", "/count"))

    put("old")
    ovt("snapshot", "create", "--memory", "web", "warm")
    put("new")
    ovt.wait_for(lambda: count() > 20, 60)
    ovt("snapshot", "create", "--quiesce", "web", "later")
    assert ovt("snapshot", "restore", "web", "warm", check=False).returncode == 1  # it runs
    later = count()
    ovt("snapshot", "restore", "--force", "web", "warm")
    assert got() == "old\nold"
    assert count() < later  # its program goes on from back then …
    ovt.wait_for(lambda: count() > later, 60)  # … and does go on
    ovt("snapshot", "delete", "web", "later")
    # a clone of its disk, booted by itself
    ovt("clone", "--linked", "web", "copy")
    refused = ovt("delete", "--force", "web", check=False)
    put("mine")
    ovt("start", "copy", timeout=120)
    ovt("wait", "--for", "agent", "copy", timeout=120)
    assert ovt.out("exec", "copy", "dd", "if=/dev/vda", "bs=3", "count=1") == "old"
    assert refused.returncode == 1
    assert "copy" in refused.stderr
    addresses = {ovt.out("exec", name, "sh", "-c", "cat /sys/class/net/e*/address") for name in ("web", "copy")}
    assert len(addresses) == 2
    ovt("delete", "--force", "copy")
    ovt("snapshot", "delete", "web", "warm")
    assert ovt.out("snapshot", "list", "web") == "└─ the present state"
    assert got() == "mine\nmine"
