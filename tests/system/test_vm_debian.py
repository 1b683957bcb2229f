"""A real Debian in a machine of ovt: systemd, cloud-init, qemu-guest-agent; nothing of it was made for ovt.

The tests of `deb` are one story. Its first boot, with all that cloud-init does, takes most of a minute under emulation,
so it is booted once and its memory is saved after each test: the next one goes on a second later.
"""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests.debian import DebianDisk
from tests.ovt.cli.place import Place
from tests.system.terminal import Terminal

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.slow, pytest.mark.timeout(900)]

BOOT = 400.0  # seconds, on a host that is busy with other things; 50 where it is not
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMZTTMAr03in0YH656IliyGxNruADUp+0EMeppPhvndj someone@somewhere"
USER_DATA = """#cloud-config
write_files:
- path: /etc/from-user-data
  content: "hello\\n"
"""
CRASHES = {"134", "139"}  # QEMU's own: abort, segmentation fault
# renamed into its place: a snapshot must not find it between its emptying and its writing
COUNT = "i=0; while true; do i=$((i+1)); echo $i >/run/count.new; mv /run/count.new /run/count; sleep 0.2; done"
# a name of its own: the firmware refuses variables that it does not know among the standard's
VARIABLE = "/sys/firmware/efi/efivars/OvtTest-1d3a8f42-93ca-11d2-aa0d-00e098032b8c"


class Machines(Place):
    """`ovt` in a place of its own, and what these tests ask for often."""

    def sh(self, name: str, script: str, timeout: float = 120) -> str:
        return self.out("exec", name, "sh", "-c", script, timeout=timeout)

    def boot(self, name: str) -> None:
        for tries in (1, 2):
            self("start", name, timeout=120)
            done = self("wait", "--for", "agent", name, timeout=BOOT, check=False)
            crashed = self.status(name) == "stopped" and self.out("wait", name) in CRASHES
            if tries == 2 or not crashed:  # emulation itself crashes once in some hundred boots
                assert done.returncode == 0, done.stderr
                return

    def cloud_init_is_done(self, name: str) -> None:
        assert self.out("exec", name, "cloud-init", "status", "--wait", timeout=BOOT).endswith("status: done")

    def number(self, name: str, script: str) -> int:
        return int(self.sh(name, script))

    def only(self, *kept: str) -> None:
        """Delete all others; linked clones, which come later in the list, before what they stand on."""
        for name in reversed(self.out("ps", "-a", "--format", "{{.name}}").split()):
            if name not in kept:
                self("delete", "--force", name)

    def becomes(self, name: str, script: str, wanted: str, seconds: float = 60) -> None:
        """The script's output is `wanted` some time."""
        self.wait_for(lambda: self.sh(name, script) == wanted, seconds)


@pytest.fixture(scope="module")
def ovt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    place = Machines(tmp_path_factory.mktemp("debian"))
    yield place
    place.only()
    place.nothing_left()


@pytest.fixture(scope="module")
def made(ovt: Machines, debian: DebianDisk) -> None:
    """The machine `deb`, whose cloud-init has done its work; saved."""
    (ovt.data / "user-data").parent.mkdir(parents=True, exist_ok=True)
    user_data = ovt.data.parent / "user-data"
    user_data.write_text(USER_DATA)
    words = ["create", "--vm", "--name", "deb", "--cpus", "2", "--max-cpus", "3", "--memory", "1G"]
    words += ["--root-size", "3G", "--ssh-key", KEY, "--user-data", str(user_data)]
    # without a boot loader: under emulation it takes seconds
    words += ["--kernel", str(debian.kernel), "--initrd", str(debian.initrd), "--cmdline", debian.command_line]
    ovt(*words, str(debian.path))
    ovt.boot("deb")
    ovt.cloud_init_is_done("deb")
    assert ovt.out("exec", "deb", "systemctl", "is-system-running", "--wait", timeout=BOOT) == "running"
    ovt("save", "deb", timeout=120)


@pytest.fixture
def deb(ovt: Machines, made: None) -> Iterator[Machines]:
    """`deb` as the test before has left it, going on."""
    ovt("start", "deb", timeout=120)
    ovt("wait", "--for", "agent", "deb", timeout=BOOT)
    yield ovt
    ovt.only("deb")
    if ovt.status("deb") == "running":
        ovt("save", "deb", timeout=120)


@pytest.fixture
def others(ovt: Machines) -> Iterator[Machines]:
    """For tests of other machines, which go with the test."""
    yield ovt
    ovt.only("deb")


# One machine's life -----------------------------------------------------------------------------------------------


def test_cloud_init_made_it_what_its_owner_wanted(deb: Machines) -> None:
    told = deb.sh("deb", "hostname; cat /etc/from-user-data; cat ~debian/.ssh/authorized_keys; nproc").splitlines()
    assert told == ["deb", "hello", KEY, "2"]
    assert deb.sh("deb", "systemctl --failed --no-legend") == ""
    assert deb.number("deb", "df --output=size -B1M / | tail -n 1") > 2800  # the image has one GiB: growpart was there
    assert deb.out("inspect", "--format", "{{.id}}", "deb") in deb.sh("deb", "cat /var/lib/cloud/data/instance-id")
    log = deb.out("logs", "deb")
    assert "Linux version" in log
    assert re.search(r"^deb login: ", log, re.MULTILINE)


def test_programs_run_in_it(deb: Machines) -> None:
    assert deb.out("exec", "-i", "deb", "sort", input="b\na\n") == "a\nb"
    script = 'echo "$GREETING"; pwd; id -un'
    assert deb.out("exec", "-e", "GREETING=a b", "-w", "/srv", "deb", "sh", "-c", script) == "a b\n/srv\nroot"
    assert deb.out("exec", "-u", "debian", "deb", "sh", "-c", 'id -un; echo "$HOME"') == "debian\n/home/debian"
    done = deb("exec", "deb", "sh", "-c", "echo out; echo err >&2; exit 42", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (42, "out\n", "err\n")
    for command, status in (("no-such-program", 127), ("/etc/passwd", 126)):
        done = deb("exec", "deb", command, check=False)
        assert done.returncode == status
        assert command in done.stderr


def test_files_go_in_and_come_out(deb: Machines, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "blob").write_bytes(bytes(range(256)) * 4000)
    (source / "sub/program").write_text("#!/bin/sh\necho it runs\n")
    (source / "sub/program").chmod(0o750)
    (source / "link").symlink_to("sub/program")
    deb("cp", str(source), "deb:/srv/", timeout=120)
    assert deb.out("exec", "deb", "/srv/source/link") == "it runs"
    deb("cp", "deb:/srv/source", str(tmp_path / "back"), timeout=120)
    back = tmp_path / "back"
    assert (back / "blob").read_bytes() == (source / "blob").read_bytes()
    assert (back / "sub/program").stat().st_mode == (source / "sub/program").stat().st_mode
    assert (back / "link").readlink() == Path("sub/program")


def test_it_says_what_it_is(deb: Machines) -> None:
    told = json.loads(deb.out("guest", "--format", "json", "deb"))
    assert told["os"]["id"] == "debian"
    assert told["hostname"] == "deb"
    mac = json.loads(deb.out("inspect", "deb"))[0]["spec"]["machine"]["nics"][0]["mac"]
    card = next(entry for entry in told["interfaces"] if entry["mac"] == mac)
    assert any(address.startswith("10.0.2.15/") for address in card["addresses"])
    root = next(entry for entry in told["filesystems"] if entry["mountpoint"] == "/")
    assert root["type"] == "ext4"
    assert root["total"] > 2800 << 20
    assert abs(told["clock_offset"]) < 300  # it stood still while it was saved
    processes = {entry["pid"]: entry["command"] for entry in json.loads(deb.out("top", "--format", "json", "deb"))}
    assert processes[1].startswith("/sbin/init")
    assert any("qemu-ga" in command for command in processes.values())


def test_its_console_is_a_terminal(deb: Machines) -> None:
    with Terminal([*deb.words, "console", "deb"]) as terminal:
        terminal.expect("serial console of deb", 60)
        terminal.send("\r")
        terminal.expect("deb login: ", 60)
        terminal.send("nobody-of-that-name\r")
        terminal.expect("Password: ", 60)
        terminal.send("\x10\x11")
        assert terminal.wait(60) == 0
    assert deb.status("deb") == "running"


def test_it_gets_more_while_it_runs(deb: Machines) -> None:
    deb("update", "--memory", "2G", "deb", timeout=120)
    deb.wait_for(lambda: deb.number("deb", "free -m | awk '/^Mem/ {print $2}'") > 1800, 60)
    deb("update", "--cpus", "3", "deb", timeout=120)
    deb.becomes("deb", "nproc", "3")
    deb("device", "resize", "deb", "root", "4G")
    deb.becomes("deb", "lsblk -bdno SIZE /dev/vda", str(4 << 30))
    deb.sh("deb", "growpart /dev/vda 1 && resize2fs /dev/vda1")
    assert deb.number("deb", "df --output=size -B1M / | tail -n 1") > 3800


def test_it_goes_back_to_snapshots(deb: Machines) -> None:
    deb.sh("deb", "echo first >/root/word")  # not written to the disk yet: --quiesce sees to that
    deb("snapshot", "create", "--quiesce", "deb", "cold")
    deb("exec", "-d", "deb", "sh", "-c", COUNT)
    deb.sh("deb", "echo second >/root/word")
    deb.wait_for(lambda: deb.number("deb", "cat /run/count") > 5, 60)
    deb("snapshot", "create", "--memory", "deb", "warm", timeout=120)
    deb.sh("deb", "echo third >/root/word")
    later = deb.number("deb", "sleep 2; cat /run/count")
    refused = deb("snapshot", "restore", "deb", "warm", check=False)
    assert refused.returncode == 1
    assert "it is running" in refused.stderr

    deb("snapshot", "restore", "--force", "deb", "warm", timeout=120)
    word, count = deb.sh("deb", "cat /root/word /run/count").split()
    assert word == "second"
    assert int(count) < later
    deb.wait_for(lambda: deb.number("deb", "cat /run/count") > int(count), 60)
    shown = json.loads(deb.out("snapshot", "list", "--format", "json", "deb"))
    assert {entry["name"]: (entry["memory"], entry["quiesced"]) for entry in shown} == {
        "cold": (False, True),
        "warm": (True, False),
    }
    deb("snapshot", "delete", "deb", "warm", timeout=120)
    assert deb.sh("deb", "cat /root/word; dmesg | grep -c 'I/O error' || true") == "second\n0"


def test_its_saved_memory_goes_on(deb: Machines) -> None:
    before, up = deb.sh("deb", "cat /run/count; cut -d. -f1 /proc/uptime").split()
    deb("save", "deb", timeout=120)
    assert deb.status("deb") == "saved"
    began = time.monotonic()
    deb("start", "deb", timeout=120)
    after, up_again = deb.sh("deb", "cat /run/count; cut -d. -f1 /proc/uptime").split()
    assert int(before) <= int(after)
    deb.wait_for(lambda: deb.number("deb", "cat /run/count") > int(after), 60)
    assert int(up) <= int(up_again) <= int(up) + time.monotonic() - began + 60  # not one that has booted


def test_its_clones_are_machines_of_their_own(deb: Machines) -> None:
    deb("clone", "deb", "full", timeout=300)
    deb("clone", "--linked", "--quiesce", "deb", "linked", timeout=120)
    deb("save", "deb", timeout=120)
    machines = {name: json.loads(deb.out("inspect", name))[0] for name in ("deb", "full", "linked")}
    for what in ("uuid", "generation", "cid"):
        assert len({machine["rootfs"][what] for machine in machines.values()}) == 3
    assert len({machine["spec"]["machine"]["nics"][0]["mac"] for machine in machines.values()}) == 3
    hardware = json.loads((Path(machines["full"]["directory"]) / "hardware.json").read_text())
    assert [layer["path"] for layer in hardware["disks"][0]["chain"]] == ["disks/root.qcow2"]  # nothing of deb's

    deb.boot("linked")
    # cloud-init took it for a new machine: it does all its work again, whose end nobody needs to wait for
    deb.becomes("linked", "cat /var/lib/cloud/data/instance-id", f"ovt-{machines['linked']['id']}", 120)
    deb.becomes("linked", "hostname", "linked", 120)
    assert deb.sh("linked", "cat /root/word") == "second"
    cards = deb.sh("linked", "cat /sys/class/net/e*/address; cat /sys/class/dmi/id/product_uuid").split()
    assert cards == [machines["linked"]["spec"]["machine"]["nics"][0]["mac"], machines["linked"]["rootfs"]["uuid"]]
    deb.sh("linked", "echo mine >/root/word; sync")
    deb("stop", "linked", timeout=120)
    refused = deb("delete", "deb", check=False)
    assert refused.returncode == 1
    assert "linked" in refused.stderr
    deb("delete", "linked", "full")
    deb("start", "deb", timeout=120)
    assert deb.sh("deb", "cat /root/word") == "second"


def test_the_power_button_ends_it(deb: Machines) -> None:
    began = time.monotonic()
    deb("stop", "--timeout", "120s", "deb", timeout=180)
    assert time.monotonic() - began < 110  # it was asked, not killed
    assert deb.status("deb") == "stopped"
    assert deb.out("wait", "deb") == "0"
    assert "reboot: Power down" in deb.out("logs", "deb")
    deb("snapshot", "restore", "deb", "cold")


# Firmware ---------------------------------------------------------------------------------------------------------


def test_uefi_keeps_variables_and_wakes_the_guest(others: Machines, debian: DebianDisk) -> None:
    ovt = others
    # one processor: with two threads of emulation QEMU now and then aborts when a sleeper wakes
    ovt("create", "--vm", "--name", "uefi", "--firmware", "uefi", "--memory", "512M", str(debian.path))
    ovt.boot("uefi")

    def put(word: str) -> None:
        """In one write, which a shell's printf is not."""
        unlock = f"chattr -i {VARIABLE} 2>/dev/null"
        ovt.sh("uefi", rf"printf '\7\0\0\0{word}' >/run/value; {unlock}; cat /run/value >{VARIABLE}")

    def got() -> str:
        return ovt.sh("uefi", f"cat {VARIABLE} | tail -c +5")

    put("one")
    ovt("snapshot", "create", "uefi", "vars")
    put("two")
    ovt("suspend", "uefi", timeout=120)
    assert ovt("exec", "uefi", "true", check=False).returncode == 125  # it sleeps
    ovt("wake", "uefi")
    ovt("wait", "--for", "agent", "uefi", timeout=BOOT)
    ovt.becomes("uefi", "dmesg | grep -c 'PM: suspend exit'", "1")
    assert got() == "two"
    ovt("stop", "uefi", timeout=120)  # by its power button, which works after sleep too
    assert "reboot: Power down" in ovt.out("logs", "uefi")
    ovt("snapshot", "restore", "uefi", "vars")
    ovt.boot("uefi")
    assert got() == "one"


def test_a_screen_is_written_to_a_picture(others: Machines, tmp_path: Path) -> None:
    ovt = others
    ovt("run", "--vm", "-d", "--name", "seen", "--graphics", "--memory", "64M", "--disk", "new,size=1M", "none")
    picture = tmp_path / "screen.png"
    ovt("screenshot", "seen", str(picture))
    blank = picture.stat().st_size
    ovt.wait_for(lambda: ovt("screenshot", "seen", str(picture)) and picture.stat().st_size > blank + 500, 60)
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (720, 400)  # text mode of the BIOS
    refused = ovt("suspend", "seen", check=False)  # which would not wake it up whole
    assert refused.returncode == 1
    assert "--firmware uefi" in refused.stderr
