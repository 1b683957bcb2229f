"""Records, states and names: pure functions of ovt.model."""

import json

import pytest

from ovt import model
from ovt.errors import StateError, UsageError
from ovt.model import (
    Device,
    Disk,
    Instance,
    Kind,
    Limits,
    Machine,
    Nic,
    Restart,
    Security,
    Seed,
    Spec,
    Status,
    Ulimit,
    Volume,
)

DISK = Disk(
    "/d.qcow2", "data", "cdrom", "qcow2", 5 << 30, "scsi", "direct", "none", "native", False, True, 100, 200, "S1"
)
NIC = Nic("tap:t0", "lan", "52:54:00:00:00:01", "e1000e", 4, False, ("tcp:127.0.0.1:80:80",))
MACHINE = Machine(
    *("kvm", "q35", "host", "sockets=2", 8, 8 << 30, True, 2, "uefi", "/k", "/i", "quiet"),
    (DISK,),
    (NIC,),
    ("0000:01:10.0",),
    Seed("#cloud-config", "version: 2", ("ssh-rsa x",), "i-1", "vendor"),
    *("reset", "pause", False, "vnc", False, 9 << 30),
)

FULL = Spec(
    image="/images/a.tar",
    command=("httpd", "-f"),
    entrypoint=("/entry",),
    env=("A=1", "B="),
    workdir="/srv",
    user="www:www",
    tty=True,
    stdin=True,
    hostname="h",
    network="host",
    add_hosts=("db:10.0.0.5",),
    init=True,
    read_only=True,
    volumes=(Volume("/a", "/b", ("ro", "nosuid")), Volume("", "/t", ("size=1m",))),
    devices=(Device("/dev/fuse", "/dev/fuse", "rw"),),
    ulimits=(Ulimit("nofile", 100, -1),),
    sysctls=("net.ipv4.ip_forward=1",),
    shm_size=1 << 20,
    limits=Limits(1.5, "0-1", 1 << 30, -1, 99),
    security=Security(("ALL",), ("CHOWN",), True, "/p.json", "profile", ("type:t",), True, "auto"),
    restart=Restart("on-failure", 3),
    auto_remove=True,
    stop_signal=2,
    stop_timeout=1.5,
    rootfs_in_place=True,
    machine=MACHINE,
    boot_order=5,
    boot_delay=2.5,
)


def test_every_member_of_a_spec_survives_json() -> None:
    for default, value in zip(Spec._field_defaults.values(), FULL[1:], strict=True):
        assert value != default, "give this member a value of its own above"
    for record in (MACHINE, DISK, NIC):
        for name, default in record._field_defaults.items():
            assert getattr(record, name) != default, f"give {name} a value of its own above"
    assert Spec.unpack(json.loads(json.dumps(model.pack(FULL)))) == FULL


def test_an_instance_survives_json_and_leaves_out_defaults() -> None:
    plain = Instance("0123456789ab", "web", Kind.CONTAINER, 5.0, Spec("busybox"))
    assert model.pack(plain) == {
        "id": "0123456789ab",
        "name": "web",
        "kind": "container",
        "created": 5.0,
        "spec": {"image": "busybox"},
    }
    full = plain._replace(spec=FULL, status=Status.RUNNING, pid=7, start_time=8, labels={"a": "b"}, exit_code=3)
    assert Instance.unpack(json.loads(json.dumps(model.pack(full)))) == full


def test_no_entrypoint_and_an_empty_one_are_different() -> None:
    for entrypoint in (None, ()):
        spec = Spec("busybox", entrypoint=entrypoint)
        assert Spec.unpack(json.loads(json.dumps(model.pack(spec)))).entrypoint == entrypoint


@pytest.mark.parametrize("name", ["a", "web", "web-1", "a.b.c", "A1", "x" * 63, "deadbeef"])
def test_host_names_are_names(name: str) -> None:
    assert model.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-a",
        "a-",
        "a..b",
        ".a",
        "a.",
        "a_b",
        "a b",
        "../a",
        "a/b",
        "ä",
        "x" * 64,
        "a." * 31 + "abcd",
        "0123456789ab",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        model.check_name(name)
    assert caught.value.hint


def test_made_up_names_are_names_and_many() -> None:
    names = {model.made_up_name(number) for number in range(20_000)}
    assert len(names) > 3000
    for name in names:
        model.check_name(name)


def test_every_verb_and_status_is_allowed_or_says_what_to_do() -> None:
    for verb, (allowed, _) in model.TRANSITIONS.items():
        for status in Status:
            if status in allowed:
                model.require(verb, "web", status)
                continue
            with pytest.raises(StateError) as caught:
                model.require(verb, "web", status)
            assert status.value in str(caught.value)
            assert caught.value.hint and "{" not in caught.value.hint


def test_what_is_forced_can_be_deleted_in_any_state() -> None:
    assert model.TRANSITIONS["delete --force"][0] == set(Status)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", Restart("no")),
        ("always", Restart("always")),
        ("unless-stopped", Restart("unless-stopped")),
        ("on-failure", Restart("on-failure")),
        ("on-failure:5", Restart("on-failure", 5)),
    ],
)
def test_restart_policies(text: str, expected: Restart) -> None:
    assert Restart.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "never", "always:3", "on-failure:", "on-failure:x", "on-failure:-1"])
def test_other_restart_policies_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Restart.parse(text)


def test_when_a_policy_wants_another_start() -> None:
    assert not Restart("no").wants(1, 0)
    assert Restart("always").wants(0, 99)
    assert Restart("unless-stopped").wants(0, 99)
    assert Restart("on-failure").wants(1, 99)
    assert not Restart("on-failure").wants(0, 0)
    assert Restart("on-failure", 2).wants(1, 1)
    assert not Restart("on-failure", 2).wants(1, 2)


def test_the_delay_doubles_up_to_a_minute() -> None:
    delays = [model.retry_delay(n) for n in range(12)]
    assert delays[:3] == [0.1, 0.2, 0.4]
    assert delays == sorted(delays)
    assert max(delays) == model.retry_delay(10_000) == 60.0
