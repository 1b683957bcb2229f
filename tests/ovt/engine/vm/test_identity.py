"""A copy of a machine is another machine."""

import base64
import itertools
import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.engine.vm import identity
from ovt.engine.vm.hardware import Hardware
from ovt.errors import HostError
from ovt.model import Seed


def counting() -> Callable[[int], bytes]:
    """Random bytes that a test knows: 0, 0 …, then 1, 1 …"""
    numbers = itertools.count()
    return lambda size: bytes([next(numbers)] * size)


def hardware() -> Hardware:
    nics = [{"id": f"nic{n}", "mac": f"52:54:00:00:00:0{n}", "port": f"rp{n}"} for n in range(2)]
    return Hardware("q35", "tcg", "qemu64", 1, 1, 1, 1, 1, 1 << 28, 1 << 28, "bios", "u", "g", cid=5, nics=nics)


def test_everything_that_tells_machines_apart_is_new_and_the_rest_the_same() -> None:
    old = hardware()
    new = identity.renew(old, identity.fresh(2))
    assert new.uuid != old.uuid
    assert new.generation != old.generation
    assert new.cid != old.cid
    assert {nic["mac"] for nic in new.nics}.isdisjoint(nic["mac"] for nic in old.nics)
    same = {"uuid": "u", "generation": "g", "cid": 5, "nics": old.nics}
    assert {**new.pack(), **same} == old.pack()
    assert [nic["port"] for nic in new.nics] == ["rp0", "rp1"]
    assert old == hardware()


def test_without_vsock_it_gets_none() -> None:
    old = hardware()
    old.cid = 0
    assert identity.renew(old, identity.fresh(2)).cid == 0
    assert identity.fresh(vsock=False).cid == 0


def test_a_card_without_an_address_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        identity.renew(hardware(), identity.fresh(1))


def test_an_earlier_moment_of_the_same_machine_has_only_a_new_generation() -> None:
    old = hardware()
    new = identity.rewound(old)
    assert new.generation != "g"
    new.generation = "g"
    assert new == old


def test_forms() -> None:
    made = identity.fresh(3)
    assert uuid.UUID(made.uuid).version == 4
    assert uuid.UUID(made.generation).version == 4
    assert 3 <= made.cid < 0xFFFFFFFF
    assert len(set(made.macs)) == 3
    assert all(re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", mac) for mac in made.macs)
    assert re.fullmatch("[0-9a-f]{32}", identity.machine_id())
    assert set(made.kept()) == {"uuid", "generation", "cid"}


def test_what_is_taken_on_the_host_is_not_chosen() -> None:
    made = identity.fresh(1, macs=["52:54:00:00:00:00".upper()], cids=[3 + 0x02020202], random=counting())
    assert made.macs == ("52:54:00:01:01:01",)
    assert made.cid == 3 + 0x03030303


def test_a_source_that_gives_nothing_new_ends_with_an_error() -> None:
    with pytest.raises(HostError, match="no free network address"):
        identity.fresh(2, random=bytes)


def test_cloud_init_sees_a_new_machine() -> None:
    assert identity.reseeded(Seed("#!/bin/sh", instance_id="old"), "0123") == Seed("#!/bin/sh", instance_id="ovt-0123")


def test_arguments_of_the_built_in_agent() -> None:
    found = identity.guest_arguments("fork", ["52:54:00:00:00:01", "52:54:00:00:00:02"])
    assert set(found) == {"hostname", "machine-id", "entropy", "time", "mac"}
    assert found["mac"] == "52:54:00:00:00:01"
    assert len(base64.b64decode(found["entropy"])) == 64
    assert "mac" not in identity.guest_arguments("fork")
    assert identity.guest_arguments("fork")["entropy"] != found["entropy"]


def test_the_script_for_any_guest(tmp_path: Path) -> None:
    for directory in ("etc/ssh", "dev", "bin"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "etc/machine-id").write_text("old\n")
    (tmp_path / "etc/ssh/ssh_host_rsa_key").write_text("old")
    for name in ("hostname", "ssh-keygen"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/called\n')
        (tmp_path / "bin" / name).chmod(0o755)
    script = re.sub(r"(?<=[ ])/(etc|dev)/(?!null)", rf"{tmp_path}/\1/", identity.GUEST_SCRIPT)
    environment = identity.guest_environment("a name; exit 1")
    result = subprocess.run(
        ["/bin/sh", "-c", script],
        env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", **dict(pair.split("=", 1) for pair in environment)},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "etc/hostname").read_text() == "a name; exit 1\n"
    assert re.fullmatch("[0-9a-f]{32}\n", (tmp_path / "etc/machine-id").read_text())
    assert not (tmp_path / "etc/ssh/ssh_host_rsa_key").exists()
    assert len((tmp_path / "dev/urandom").read_bytes()) == 88
    assert (tmp_path / "called").read_text() == "hostname a name; exit 1\nssh-keygen -A\n"
