"""D-Bus: the bytes of messages against those of systemd's own library, and a real bus."""

import os
import shutil
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ovt.errors import HostError
from ovt.kernel.cgroup import dbus
from ovt.kernel.cgroup.dbus import Bus, DBusError
from ovt.kernel.cgroup.dbus_wire import (
    CALL,
    DESTINATION,
    INTERFACE,
    MEMBER,
    PATH,
    SIGNATURE,
    Message,
    Reader,
    decode,
    marshal,
    message_length,
    split,
)

# What `busctl call ... StartTransientUnit` of systemd 252 sent, caught on a socket.
START_UNIT = bytes.fromhex(
    "6c0104018000000002000000b600000001016f00190000002f6f72672f667265656465736b746f702f73797374656d643100000000000000"
    "030173001200000053746172745472616e7369656e74556e697400000000000002017300200000006f72672e667265656465736b746f702e"
    "73797374656d64312e4d616e61676572000000000000000006017300180000006f72672e667265656465736b746f702e73797374656d6431"
    "000000000000000008016700107373612873762961287361287376292900000007000000612e73636f706500040000006661696c00000000"
    "58000000000000000400000050494473000261750000000008000000010000004d000000000000000800000044656c656761746500016200"
    "0100000000000000090000004d656d6f72794d61780001740000000000000000ffffffffffffffff0000000000000000"
)
FIELDS = {
    PATH: "/org/freedesktop/systemd1",
    MEMBER: "StartTransientUnit",
    INTERFACE: "org.freedesktop.systemd1.Manager",
    DESTINATION: "org.freedesktop.systemd1",
    SIGNATURE: "ssa(sv)a(sa(sv))",
}
PROPERTIES = [("PIDs", ("au", [1, 77])), ("Delegate", ("b", True)), ("MemoryMax", ("t", (1 << 64) - 1))]


def test_our_bytes_are_systemds_bytes() -> None:
    ours = Message(CALL, 2, FIELDS, ("a.scope", "fail", PROPERTIES, [])).encode()
    assert ours[3:] == START_UNIT[3:]
    # Byte 2 holds flags; theirs says that the call may ask the user for a password.
    assert (ours[:2], ours[2], START_UNIT[2]) == (START_UNIT[:2], 0, 4)


def test_systemds_bytes_are_read() -> None:
    assert message_length(START_UNIT[:16]) == len(START_UNIT)
    message = decode(START_UNIT)
    assert (message.kind, message.serial, message.fields) == (CALL, 2, FIELDS)
    bare = [(name, value) for name, (_, value) in PROPERTIES]
    assert message.body == ("a.scope", "fail", bare, [])


CASES: list[tuple[str, Any]] = [
    ("y", 7),
    ("b", True),
    ("n", -2),
    ("q", 65535),
    ("i", -5),
    ("u", 1 << 31),
    ("x", -(1 << 60)),
    ("t", (1 << 64) - 1),
    ("d", 1.5),
    ("s", "ü"),
    ("o", "/a/b"),
    ("g", "a(sv)"),
    ("as", []),
    ("at", [1, 2]),
    ("ay", b"\x00\x01\x02"),
    ("a(st)", [("x", 1), ("yy", 2)]),
    ("a{su}", {"a": 1, "bcd": 2}),
    ("aai", [[1], [], [2, 3]]),
    ("(yt)", (1, 2)),
    ("a(ss)", []),
]


@pytest.mark.parametrize(("signature", "value"), CASES)
def test_values_survive_with_any_alignment(signature: str, value: Any) -> None:
    for lead in range(9):
        data = marshal("y" * lead + signature, [0] * lead + [value])
        reader = Reader(data)
        assert [reader.take("y") for _ in range(lead)] == [0] * lead
        assert reader.take(signature) == value
        assert reader.at == len(data)


def test_variants_come_in_bare() -> None:
    assert Reader(marshal("v", [("a(sv)", [("k", ("t", 5))])])).take("v") == [("k", 5)]


def test_big_endian_messages_are_read() -> None:
    body = struct.pack(">I", 5)
    fields = struct.pack(">IBB", 8, SIGNATURE, 1) + b"g\0" + b"\x01u\0\0"[:3]
    fields = struct.pack(">I", 7) + bytes([SIGNATURE, 1]) + b"g\0" + b"\x01u\0"
    data = struct.pack(">cBBBII", b"B", 2, 0, 1, len(body), 9) + fields
    data += bytes(-len(data) % 8) + body
    assert message_length(data[:16]) == len(data)
    assert decode(data).body == (5,)


@pytest.mark.parametrize(("text", "types"), [("", []), ("sa(sv)u", ["s", "a(sv)", "u"]), ("a{sa{sv}}", ["a{sa{sv}}"])])
def test_signatures_are_split(text: str, types: list[str]) -> None:
    assert split(text) == types


@pytest.mark.parametrize("text", ["a", "(s", "z", "a{sv", ")"])
def test_bad_signatures(text: str) -> None:
    with pytest.raises(ValueError, match="not a D-Bus signature"):
        split(text)


def test_garbage_is_no_message() -> None:
    with pytest.raises(ValueError, match="not a D-Bus message"):
        message_length(b"HTTP/1.1 200 OK\r\n")
    with pytest.raises(ValueError, match="bytes"):
        message_length(struct.pack("<cBBBIII", b"l", 1, 0, 1, 1 << 30, 1, 0))
    with pytest.raises(ValueError, match="values for the D-Bus signature"):
        marshal("su", ["x"])


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("unix:path=/run/bus", ["/run/bus"]),
        ("unix:path=/a%20b,guid=0123", ["/a b"]),
        ("unix:abstract=/tmp/x;unix:path=/y", ["\0/tmp/x", "/y"]),
        ("tcp:host=localhost,port=5", []),
        ("", []),
    ],
)
def test_addresses(address: str, names: list[str]) -> None:
    assert dbus.socket_names(address) == names


def test_the_addresses_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posix.environ", {b"XDG_RUNTIME_DIR": b"/run/user/7"})
    assert dbus.user_address() == "unix:path=/run/user/7/bus"
    assert dbus.system_address() == "unix:path=/run/dbus/system_bus_socket"
    monkeypatch.setattr(
        "posix.environ", {b"DBUS_SESSION_BUS_ADDRESS": b"unix:path=/s", b"DBUS_SYSTEM_BUS_ADDRESS": b"unix:path=/t"}
    )
    assert (dbus.user_address(), dbus.system_address()) == ("unix:path=/s", "unix:path=/t")
    monkeypatch.setattr("posix.environ", {})
    assert dbus.user_address() == f"unix:path=/run/user/{os.getuid()}/bus"


def test_no_bus_names_the_socket_and_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        Bus(f"unix:path={tmp_path}/none")
    assert str(caught.value) == (
        f"cannot reach systemd over D-Bus at unix:path={tmp_path}/none: {tmp_path}/none: No such file or directory"
    )
    assert "--cgroup-manager cgroupfs" in caught.value.hint
    with pytest.raises(HostError, match="no Unix socket in that address"):
        Bus("tcp:host=localhost")


def test_calls_errors_and_signals_on_a_real_bus(bus: str) -> None:
    one, two = Bus(bus), Bus(bus)
    daemon = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
    try:
        assert one.name != two.name
        names = one.call(*daemon, "ListNames")[0]
        assert one.name in names and two.name in names
        assert one.call(*daemon, "GetConnectionUnixUser", "s", two.name) == (os.getuid(),)
        with pytest.raises(DBusError) as caught:
            one.call("no.such.service", "/", "no.such.service", "Nothing")
        assert caught.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"
        one.add_match("type='signal',member='NameOwnerChanged'")
        first, second = one.send(*daemon, "GetId"), one.send(*daemon, "ListNames")
        assert one.reply(first) and one.reply(second)
        name = two.name
        two.close()
        assert one.wait_signal("NameOwnerChanged")[:2] == (name, name)
    finally:
        one.close()
        two.close()


def test_a_message_larger_than_a_socket_buffer(bus: str) -> None:
    one = Bus(bus)
    try:
        with pytest.raises(DBusError):
            one.call("no.such.service", "/", "no.such.service", "Nothing", "as", ["x" * 1000] * 2000)
    finally:
        one.close()


@pytest.fixture
def server(tmp_path: Path) -> Any:
    """Start a server that answers a connection with the given bytes, one entry for each thing it receives."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "bus"))
    listener.listen()

    def start(*answers: bytes) -> str:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    connection.recv(4096)
                    connection.sendall(answer)
                if answers[-1:] == (b"",):
                    connection.recv(4096)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"unix:path={tmp_path}/bus"

    yield start
    for thread in threads:
        thread.join(5)
    listener.close()


def test_a_bus_that_refuses_us(server: Callable[..., str]) -> None:
    with pytest.raises(HostError, match="refused the login: REJECTED EXTERNAL"):
        Bus(server(b"REJECTED EXTERNAL\r\n"))


def test_a_bus_that_hangs_up(server: Callable[..., str]) -> None:
    with pytest.raises(HostError, match="hung up"):
        Bus(server(b"DATA\r\nOK 00\r\n"))


def test_a_bus_that_does_not_answer(server: Callable[..., str]) -> None:
    with pytest.raises(HostError, match=r"no answer from unix:path=.* within 0.1 s"):
        Bus(server(b""), timeout=0.1)


def test_dbus_daemon_is_here() -> None:
    assert shutil.which("dbus-daemon"), "install dbus-daemon: the tests of the systemd cgroup manager need a bus"
