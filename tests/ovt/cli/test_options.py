"""Every option of create and run: what it makes of the Spec. An option without a sample here fails the first test."""

from typing import Any

import click
import pytest

from ovt.cli.options import instance_options, spec_of
from ovt.errors import OvtError
from ovt.model import Device, Disk, Kind, Limits, Machine, Nic, Restart, Security, Seed, Spec, Ulimit, Volume

# option → words, the members of the Spec that it changes
SAMPLES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "interactive": (["-i"], {"stdin": True}),
    "tty": (["-t"], {"tty": True}),
    "auto_remove": (["--rm"], {"auto_remove": True}),
    "env": (["-e", "A=1", "-e", "OVT_TEST", "-e", "UNSET_HERE"], {"env": ("A=1", "OVT_TEST=here")}),
    "env_file": (["--env-file", "{tmp}/env", "-e", "B=2"], {"env": ("F=1", "B=2")}),
    "workdir": (["-w", "/srv"], {"workdir": "/srv"}),
    "user": (["-u", "www:www"], {"user": "www:www"}),
    "entrypoint": (["--entrypoint", '["a","b"]'], {"entrypoint": ("a", "b")}),
    "volume": (["-v", "/a:/b:ro"], {"volumes": (Volume("/a", "/b", ("ro",)),)}),
    "tmpfs": (["--tmpfs", "/t:size=1m"], {"volumes": (Volume("", "/t", ("size=1m",)),)}),
    "device": (["--device", "/dev/fuse:r"], {"devices": (Device("/dev/fuse", "/dev/fuse", "r"),)}),
    "cpus": (["--cpus", "1.5"], {"limits": Limits(cpus=1.5)}),
    "cpuset_cpus": (["--cpuset-cpus", "0-1"], {"limits": Limits(cpuset_cpus="0-1")}),
    "memory": (["--memory", "64M"], {"limits": Limits(memory=64 << 20)}),
    "memory_swap": (
        ["--memory", "64M", "--memory-swap", "-1"],
        {"limits": Limits(memory=64 << 20, memory_swap=-1)},
    ),
    "pids": (["--pids", "9"], {"limits": Limits(pids=9)}),
    "shm_size": (["--shm-size", "1M"], {"shm_size": 1 << 20}),
    "ulimit": (["--ulimit", "nofile=5:6"], {"ulimits": (Ulimit("nofile", 5, 6),)}),
    "read_only": (["--read-only"], {"read_only": True}),
    "in_place": (["--in-place"], {"rootfs_in_place": True}),
    "cap_add": (["--cap-add", "NET_RAW"], {"security": Security(cap_add=("NET_RAW",))}),
    "cap_drop": (["--cap-drop", "ALL"], {"security": Security(cap_drop=("ALL",))}),
    "privileged": (["--privileged"], {"security": Security(privileged=True)}),
    "security_opt": (
        [
            *("--security-opt", "seccomp={tmp}/env", "--security-opt", "apparmor=p", "--security-opt", "label=type:t"),
            *("--security-opt", "label:disable", "--security-opt", "no-new-privileges"),
        ],
        {"security": Security((), (), False, "{tmp}/env", "p", ("type:t", "disable"), True)},
    ),
    "userns": (["--userns", "auto"], {"security": Security(userns="auto")}),
    "network": (["--network", "host"], {"network": "host"}),
    "hostname": (["--hostname", "h"], {"hostname": "h"}),
    "add_host": (["--add-host", "db:10.0.0.5"], {"add_hosts": ("db:10.0.0.5",)}),
    "sysctl": (["--sysctl", "net.a=1"], {"sysctls": ("net.a=1",)}),
    "init": (["--init"], {"init": True}),
    "restart": (["--restart", "on-failure:3"], {"restart": Restart("on-failure", 3)}),
    "boot_order": (["--boot-order", "5"], {"boot_order": 5}),
    "boot_delay": (["--boot-delay", "2s"], {"boot_delay": 2.0}),
    "stop_signal": (["--stop-signal", "INT"], {"stop_signal": 2}),
    "stop_timeout": (["--stop-timeout", "1m"], {"stop_timeout": 60.0}),
    "kind": (["--vm"], {}),
    "disk": (
        ["--disk", "/d.qcow2,bus=scsi,cache=none,iothread,iops=5,id=data", "--disk", "new,size=1G,nodiscard"],
        {
            "machine": Machine(
                disks=(
                    Disk("/d.qcow2", "data", bus="scsi", cache="none", iothread=True, iops=5),
                    Disk(size=1 << 30, discard=False),
                )
            )
        },
    ),
    "root_size": (["--root-size", "8G"], {"machine": Machine(root_size=8 << 30)}),
    "cdrom": (
        ["--cdrom", "/a.iso", "--cdrom", "empty"],
        {
            "machine": Machine(
                disks=(
                    Disk("/a.iso", device="cdrom", format="raw", mode="readonly"),
                    Disk(device="cdrom", format="raw", mode="readonly"),
                )
            )
        },
    ),
    "nic": (
        ["--nic", "tap:t0,mac=52:54:00:00:00:01,model=e1000e,queues=2,id=lan,down"],
        {"machine": Machine(nics=(Nic("tap:t0", "lan", "52:54:00:00:00:01", "e1000e", 2, False),))},
    ),
    "publish": (
        ["-p", "8080:80", "-p", "0.0.0.0:53:53/udp"],
        {"machine": Machine(nics=(Nic(forwards=("tcp:127.0.0.1:8080:80", "udp:0.0.0.0:53:53")),))},
    ),
    "kernel": (["--kernel", "/k"], {"machine": Machine(kernel="/k")}),
    "initrd": (["--initrd", "/i"], {"machine": Machine(initrd="/i")}),
    "cmdline": (["--cmdline", "quiet"], {"machine": Machine(cmdline="quiet")}),
    "firmware": (["--firmware", "uefi"], {"machine": Machine(firmware="uefi")}),
    "accel": (["--accel", "tcg"], {"machine": Machine(accel="tcg")}),
    "machine": (["--machine", "pc-q35-9.0"], {"machine": Machine(type="pc-q35-9.0")}),
    "cpu": (["--cpu", "max"], {"machine": Machine(cpu="max")}),
    "topology": (["--topology", "sockets=1"], {"machine": Machine(topology="sockets=1")}),
    "max_cpus": (["--max-cpus", "8"], {"machine": Machine(max_vcpus=8)}),
    "max_memory": (["--max-memory", "8G"], {"machine": Machine(max_memory=8 << 30)}),
    "hugepages": (["--hugepages"], {"machine": Machine(hugepages=True)}),
    "numa": (["--numa", "2"], {"machine": Machine(numa=2)}),
    "hostdev": (["--hostdev", "0000:01:10.0"], {"machine": Machine(hostdevs=("0000:01:10.0",))}),
    "user_data": (["--user-data", "{tmp}/env"], {"machine": Machine(seed=Seed(user_data="F=1\n"))}),
    "network_config": (["--network-config", "{tmp}/env"], {"machine": Machine(seed=Seed(network_config="F=1\n"))}),
    "ssh_key": (
        ["--ssh-key", "ssh-rsa x", "--ssh-key", "{tmp}/env"],
        {"machine": Machine(seed=Seed(ssh_keys=("ssh-rsa x", "F=1")))},
    ),
    "cloud_init": (["--cloud-init"], {"machine": Machine(seed=Seed())}),
    "watchdog": (["--watchdog", "reset"], {"machine": Machine(watchdog="reset")}),
    "on_panic": (["--on-panic", "pause"], {"machine": Machine(panic="pause")}),
    "graphics": (["--graphics"], {"machine": Machine(graphics="vnc")}),
    "no_vsock": (["--no-vsock"], {"machine": Machine(vsock=False)}),
    "no_balloon": (["--no-balloon"], {"machine": Machine(balloon=False)}),
    "image": ([], {}),
    "command": ([], {}),
    "name": (["--name", "web"], {}),
    "label": (["-l", "a=b", "--label", "c="], {}),
    "dry_run": (["--dry-run"], {}),
}


@click.command(context_settings={"allow_interspersed_args": False})
@instance_options
def command(**given: Any) -> dict[str, Any]:
    return given


def parse(*words: str) -> tuple[Spec, str, dict[str, str], Kind]:
    return spec_of(command.main([*words, "busybox", "ls", "-l"], standalone_mode=False))


@pytest.mark.parametrize("name", [param.name for param in command.params])
def test_every_option_does_what_it_says(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVT_TEST", "here")
    monkeypatch.delenv("UNSET_HERE", raising=False)
    (tmp_path / "env").write_text("F=1\n")
    words, members = SAMPLES[name]
    spec, _, _, kind = parse(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    plain = Spec("busybox", ("ls", "-l"))
    if name == "kind" or "machine" in members:  # an option of machines alone is as good as --vm
        assert kind is Kind.VM
        plain = plain._replace(network="user", stop_timeout=90.0)
    expected = plain._replace(**members)
    if expected.security.seccomp:
        expected = expected._replace(security=expected.security._replace(seccomp=f"{tmp_path}/env"))
    assert spec == expected
    assert spec != plain or not members


def test_samples_are_for_options_that_exist() -> None:
    assert set(SAMPLES) == {param.name for param in command.params}


def test_name_and_labels() -> None:
    _, name, labels, _ = parse("--name", "web", "-l", "a=b", "-l", "c=d=e", "-l", "f=")
    assert (name, labels) == ("web", {"a": "b", "c": "d=e", "f": ""})


def test_entrypoints() -> None:
    assert parse()[0].entrypoint is None
    assert parse("--entrypoint", "")[0].entrypoint == ()
    assert parse("--entrypoint", "/bin/a b")[0].entrypoint == ("/bin/a b",)


def test_security_options() -> None:
    assert parse("--security-opt", "seccomp=unconfined")[0].security.seccomp == "unconfined"
    assert parse("--security-opt", "seccomp:unconfined")[0].security.seccomp == "unconfined"
    assert not parse("--security-opt", "no-new-privileges=false")[0].security.no_new_privileges
    assert parse("--security-opt", "label=level:s0:c1")[0].security.label == ("level:s0:c1",)


@pytest.mark.parametrize(
    "words",
    [
        ("--rm", "--restart", "always"),
        ("--memory-swap", "1G"),
        ("--memory", "1G", "--memory-swap", "512M"),
        ("--cpus", "-1"),
        ("--pids", "-1"),
        ("-w", "srv"),
        ("--entrypoint", "[1]"),
        ("--entrypoint", "["),
        ("--security-opt", "colour=red"),
        ("--security-opt", "seccomp=/none/such"),
        ("--security-opt", "seccomp"),
        ("--env-file", "/none/such"),
        ("--container", "--kernel", "/k"),
        ("--network", "tap:t0"),
        ("--disk", "new"),
        ("--disk", "/d,colour=red"),
        ("--disk", "/d,bus=isa"),
        ("--disk", "/d,iops=many"),
        ("--nic", "user,mac=01:00:00:00:00:00"),
        ("--nic", "user,queues=-1"),
        ("-p", "80"),
        ("-p", "0:80"),
        ("-p", "host:80:80"),
        ("-p", "80:80/sctp"),
        ("-p", "80:80", "--nic", "none"),
        ("--vm", "--ssh-key", "/none/such"),
    ],
)
def test_what_contradicts_itself(words: tuple[str, ...]) -> None:
    with pytest.raises(OvtError):
        parse(*words)


def test_the_command_keeps_its_own_options() -> None:
    spec = spec_of(command.main(["-t", "busybox", "ls", "--rm", "-t", "--", "-v"], standalone_mode=False))[0]
    assert spec.command == ("ls", "--rm", "-t", "--", "-v")


def test_the_command_may_be_set_off() -> None:
    spec = spec_of(command.main(["--vm", "busybox", "--", "uname", "-a"], standalone_mode=False))[0]
    assert spec.command == ("uname", "-a")
