"""Which file a kernel parameter's name means, and which parameters are a container's own."""

from __future__ import annotations

import pytest

from ovt.engine.container import sysctl
from ovt.engine.container.schema import Fault


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.eth0/100.rp_filter", "net/ipv4/conf/eth0.100/rp_filter"),
        ("net/ipv4/conf/eth0.100/rp_filter", "net/ipv4/conf/eth0.100/rp_filter"),
        ("kernel.shm_rmid_forced", "kernel/shm_rmid_forced"),
        ("single", "single"),
    ],
)
def test_both_spellings_are_one_file(name: str, path: str) -> None:
    assert sysctl.file_of(name) == path


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/", "net.", ".net", "/net", "net/", "net//x", "net..x", "net/../kernel/x", "net/./x"),
        *(
            "net.ipv4.x ",
            "a b",
            "net.x=1",
            "net.x+kernel.y",
            "net.x\n",
            "net.x\0",
            "net.é",
            "net.x;y",
            "net.*",
            "-w net.x y",
        ),
        # a dot that stands for a slash inside a part is a path of its own
        *("net.//.x", "net.ipv4./..x"),
    ],
)
def test_names_that_are_no_plain_path(name: str) -> None:
    with pytest.raises(Fault, match="is not a kernel parameter's name"):
        sysctl.file_of(name)


NEW = dict.fromkeys(("network", "ipc", "uts", "user"), "")


@pytest.mark.parametrize(
    ("name", "namespace"),
    [
        ("net.core.somaxconn", "network"),
        ("net/core/somaxconn", "network"),
        ("fs.mqueue.msg_max", "ipc"),
        ("kernel.msgmax", "ipc"),
        ("kernel.msgmnb", "ipc"),
        ("kernel.msgmni", "ipc"),
        ("kernel.sem", "ipc"),
        ("kernel.shmall", "ipc"),
        ("kernel.shmmax", "ipc"),
        ("kernel.shmmni", "ipc"),
        ("kernel.shm_rmid_forced", "ipc"),
        ("kernel.domainname", "uts"),
        ("user.max_mnt_namespaces", "user"),
    ],
)
def test_each_needs_its_namespace(name: str, namespace: str) -> None:
    sysctl.check({name: "1"}, {namespace: ""}, "")
    sysctl.check({name: "1"}, {namespace: "/somewhere/else"}, "")
    others = {kind: "" for kind in NEW if kind != namespace}
    with pytest.raises(Fault, match=f"is not allowed in the host's {namespace} namespace"):
        sysctl.check({name: "1"}, others, "")


@pytest.mark.parametrize(
    "name",
    [
        "kernel.core_pattern",
        "kernel/core_pattern",
        "vm.overcommit_memory",
        "fs.file-max",
        "kernel.msgmax2",
        "net",
        "fs.mqueue",
    ],
)
def test_what_is_the_hosts_stays_the_hosts(name: str) -> None:
    with pytest.raises(Fault, match="is not in a separate kernel namespace"):
        sysctl.check({name: "1"}, NEW, "")


def test_the_hostname_has_a_field() -> None:
    with pytest.raises(Fault, match="conflicts with the field hostname"):
        sysctl.check({"kernel.hostname": "x"}, NEW, "")


def test_the_domain_name_may_be_said_twice_but_not_differently() -> None:
    sysctl.check({"kernel.domainname": "a"}, NEW, "a")
    with pytest.raises(Fault, match="conflicts with the field domainname"):
        sysctl.check({"kernel.domainname": "a"}, NEW, "b")


def test_one_parameter_is_set_once() -> None:
    with pytest.raises(Fault, match=r"sets the same kernel parameter as net\.ipv4\.ip_forward") as caught:
        sysctl.check({"net.ipv4.ip_forward": "1", "net/ipv4/ip_forward": "0"}, NEW, "")
    assert caught.value.location("$") == '$["net/ipv4/ip_forward"]'
