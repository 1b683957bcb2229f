"""Attacks on what a runtime writes to, or hides in, /proc and /sys of the container."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.security.conftest import Create, refused, runs

pytestmark = pytest.mark.root

KEY = "net.ipv4.ip_unprivileged_port_start"
FILE = "sys/net/ipv4/ip_unprivileged_port_start"
LABELS = ["self/attr/exec", "self/attr/apparmor/exec", "thread-self/attr/exec", "thread-self/attr/apparmor/exec"]
DECOYS = ["sysrq-trigger", "sys/kernel/core_pattern", FILE, *LABELS]


def fake_proc(place: Path) -> dict[Path, str]:
    """A directory that looks like /proc to a runtime that trusts paths. Returns what its files must go on saying."""
    for name in DECOYS:
        decoy = place / name
        decoy.parent.mkdir(parents=True, exist_ok=True)
        decoy.write_text("untouched")
    for pid in ("1", "2"):
        (place / pid).symlink_to("self")
    return {place / name: "untouched" for name in DECOYS}


def assert_untouched(decoys: dict[Path, str]) -> None:
    assert {path: path.read_text() for path in decoys} == decoys


def without_proc_mount(config: dict[str, Any]) -> None:
    config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] != "/proc"]


def port_of(pid: int) -> str:
    """The sysctl as it is in the container's network namespace."""
    return subprocess.run(
        ["nsenter", "-t", str(pid), "-n", "cat", f"/proc/{FILE}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_cve_2019_16884_and_2019_19921_and_2025_52881_fake_proc(
    create: Create, bundle: Bundle, tmp_path: Path
) -> None:
    """The image carries a /proc of its own, then a volume lies over /proc: sysctls go to the kernel all the same.

    The trap is set: the runtime, writing below the container's /proc by path, would find a writable file there.
    """
    host = Path(f"/proc/{FILE}").read_text()
    changes = {"linux": {"sysctl": {KEY: "77"}, "maskedPaths": [], "readonlyPaths": []}, "root": {"readonly": False}}
    place = bundle("sleep", "60", config=changes, edit=without_proc_mount)
    decoys = fake_proc(place / "rootfs/proc")
    assert os.access(place / "rootfs/proc" / FILE, os.W_OK)
    container = create(place).start()
    assert port_of(container.pid) == "77"
    assert_untouched(decoys)

    volume = tmp_path / "volume"
    decoys |= fake_proc(volume)

    def over_proc(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/proc", "source": str(volume), "type": "bind", "options": ["rbind"]})

    container = create(bundle("sleep", "60", config=changes, edit=over_proc)).start()
    assert port_of(container.pid) == "77"
    assert_untouched(decoys)
    assert Path(f"/proc/{FILE}").read_text() == host


@pytest.mark.parametrize("label", [{"apparmorProfile": "unconfined-test"}, {"selinuxLabel": "system_u:object_r:x:s0"}])
def test_cve_2019_16884_labels_never_go_to_a_file_of_the_image(
    oci: Oci, bundle: Bundle, container_id: str, label: dict[str, str]
) -> None:
    """A label that cannot be applied is refused, or without meaning on this host; no file of the image takes it."""
    place = bundle("true", config={"process": label, "root": {"readonly": False}}, edit=without_proc_mount)
    decoys = fake_proc(place / "rootfs/proc")
    done = oci("run", "-b", place, container_id)
    if done.returncode:
        assert {"apparmorProfile": "AppArmor", "selinuxLabel": "SELinux"}[next(iter(label))] in refused(done)
    assert_untouched(decoys)


@pytest.mark.parametrize("destination", ["/proc", "/sys"])
@pytest.mark.parametrize("target", ["/elsewhere", "../elsewhere", "/missing"])
def test_cve_2023_27561_and_2023_28642_proc_or_sys_is_a_link(
    oci: Oci, bundle: Bundle, container_id: str, destination: str, target: str
) -> None:
    """With /proc a link, the mount and the masks of /proc/... would part company."""
    place = bundle("true")
    (place / "rootfs" / destination[1:]).rmdir()
    (place / "rootfs" / destination[1:]).symlink_to(target)
    (place / "rootfs/elsewhere").mkdir()
    message = refused(oci("run", "-b", place, container_id))
    assert destination in message and "must be mounted on ordinary directory" in message
    assert not os.listdir(place / "rootfs/elsewhere") and not (place / "rootfs/missing").exists()
    # the very same image with a directory in its place runs
    (place / "rootfs" / destination[1:]).unlink()
    (place / "rootfs" / destination[1:]).mkdir()
    oci("run", "-b", place, f"{container_id}-2", check=True)


def test_cve_2023_27561_a_link_on_the_way(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """The same one directory above: the mount at /a/proc, and /a a link."""

    def below(config: dict[str, Any]) -> None:
        config["mounts"][0]["destination"] = "/a/proc"

    place = bundle("true", edit=below)
    (place / "rootfs/b/proc").mkdir(parents=True)
    (place / "rootfs/a").symlink_to("b")
    assert "/a/proc" in refused(oci("run", "-b", place, container_id))


SMUGGLED = {
    "kernel.shm_rmid_forced+kernel.core_pattern": "1",
    "kernel.core_pattern": "|/evil",
    "kernel/core_pattern": "|/evil",
    "net/../kernel/core_pattern": "|/evil",
    "net.ipv4/../../kernel.core_pattern": "|/evil",
    "net...kernel.core_pattern": "|/evil",
    "kernel.shm_rmid_forced\nkernel.core_pattern": "1",
    "kernel.shm_rmid_forced kernel.core_pattern": "1",
    "kernel.shm_rmid_forced=1+kernel.core_pattern": "|/evil",
    "/proc/sys/kernel/core_pattern": "|/evil",
    "vm.overcommit_memory": "1",
    "kernel.hostname": "evil",
    "": "1",
}


@pytest.mark.parametrize("key", SMUGGLED)
def test_cve_2022_0811_key(oci: Oci, bundle: Bundle, container_id: str, key: str) -> None:
    """cr8escape: a key that means, to anybody, a parameter of the whole host."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_bytes()
    message = refused(
        oci("run", "-b", bundle("true", config={"linux": {"sysctl": {key: SMUGGLED[key]}}}), container_id)
    )
    assert "$.linux.sysctl" in message
    assert Path("/proc/sys/kernel/core_pattern").read_bytes() == pattern


@pytest.mark.parametrize("value", ["1+kernel.core_pattern=|/evil", "1\nkernel.core_pattern=|/evil", "1 2 3 |/evil"])
def test_cve_2022_0811_value(oci: Oci, bundle: Bundle, container_id: str, value: str) -> None:
    """The other half of it: a value is data for one file, never parsed again."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_bytes()
    place = bundle(
        "cat", "/proc/sys/kernel/shm_rmid_forced", config={"linux": {"sysctl": {"kernel.shm_rmid_forced": value}}}
    )
    done = oci("run", "-b", place, container_id)
    if done.returncode:
        assert "kernel.shm_rmid_forced" in refused(done)
    else:  # the kernel read the number that the value begins with
        assert done.stdout == "1\n"
    assert Path("/proc/sys/kernel/core_pattern").read_bytes() == pattern


NULL_DEVICES = ["sh", "-c", "for f in /proc/version /proc/uptime; do stat -L -c %t:%T $f; done; wc -c < /proc/version"]
MASKED = {"linux": {"maskedPaths": ["/proc/version", "/proc/uptime"]}}


def no_dev_mount(config: dict[str, Any]) -> None:
    config["mounts"] = [mount for mount in config["mounts"] if not mount["destination"].startswith("/dev")]


def test_cve_2025_31133_mask_with_the_images_own_null(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """The image's /dev/null is a link into procfs; a runtime that masks with the container's /dev/null unmasks."""
    place = bundle(*NULL_DEVICES, config=MASKED, edit=no_dev_mount)
    (place / "rootfs/dev/null").symlink_to("/proc/sys/kernel/core_pattern")
    message = refused(oci("run", "-b", place, container_id))
    assert "/dev/null" in message
    (place / "rootfs/dev/null").unlink()
    (place / "rootfs/dev/null").write_text("a file\n")
    assert "/dev/null" in refused(oci("run", "-b", place, f"{container_id}-2"))
    assert (place / "rootfs/dev/null").read_text() == "a file\n"


def test_cve_2025_31133_mask_with_a_volume_over_dev(
    oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path
) -> None:
    """All of /dev is a volume of the attacker's, which the runtime leaves as it is; masks are the host's null."""
    dev = tmp_path / "dev"
    dev.mkdir()
    (dev / "null").symlink_to("/proc/sys/kernel/core_pattern")

    def over_dev(config: dict[str, Any]) -> None:
        no_dev_mount(config)
        config["mounts"].insert(1, {"destination": "/dev", "source": str(dev), "type": "bind", "options": ["rbind"]})

    place = bundle(*NULL_DEVICES, config=MASKED, edit=over_dev)
    assert runs(oci, place, container_id).split() == ["1:3", "1:3", "0"]
    # the trap is set: in the container, /dev/null is the other file
    place = bundle("readlink", "/dev/null", edit=over_dev)
    assert runs(oci, place, f"{container_id}-2") == "/proc/sys/kernel/core_pattern\n"


def test_cve_2025_31133_what_is_masked_cannot_be_a_link_out(oci: Oci, bundle: Bundle, container_id: str) -> None:
    """A masked path that the image made a link: what it points to inside is masked, nothing outside is."""

    def mask(config: dict[str, Any]) -> None:
        config["linux"]["maskedPaths"] = ["/secret", "/out"]

    place = bundle("sh", "-c", "stat -L -c '%t:%T' /inside; cat /inside", edit=mask)
    (place / "rootfs/inside").write_text("visible")
    (place / "rootfs/secret").symlink_to("/inside")
    outside = place / "outside"
    outside.write_text("host")
    (place / "rootfs/out").symlink_to(outside)
    assert runs(oci, place, container_id) == "1:3\n"
    assert outside.read_text() == "host"
