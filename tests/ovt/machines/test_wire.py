"""Messages and connections between two hosts, with peers that lie, stop, or are not trusted; no QEMU."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovt.engine.vm.migration import Settings
from ovt.errors import HostError, NotFound, UsageError
from ovt.machines import listening, moving, outgoing, survey, transport, wire
from ovt.machines.moving import Blocker, Plan
from ovt.machines.transport import Tls, parse
from ovt.model import Instance, Kind, Spec

Controls = tuple[wire.Control, wire.Control, socket.socket, socket.socket]


@pytest.fixture
def controls() -> Iterator[Controls]:
    one, other = socket.socketpair()
    with one, other:
        yield (
            wire.Control(one.fileno(), one.fileno(), "b"),
            wire.Control(other.fileno(), other.fileno(), "a"),
            one,
            other,
        )


# messages


def test_a_message_arrives_as_it_was_sent(controls: Controls) -> None:
    controls[0].send("hello", text="ö", big="x" * 50_000, numbers=[1, 2])
    message = controls[1].receive(5.0)
    assert message == {"type": "hello", "text": "ö", "big": "x" * 50_000, "numbers": [1, 2]}


def test_an_error_comes_with_words_and_remedy(controls: Controls) -> None:
    controls[1].send_error(NotFound("there is none", "make one"))
    with pytest.raises(wire.PeerRefused, match="b: there is none") as caught:
        controls[0].call("prepare", "prepared", timeout=5.0)
    assert (caught.value.hint, caught.value.kind) == ("make one", "NotFound")


def test_an_answer_of_another_kind_is_an_error(controls: Controls) -> None:
    controls[1].send("pong")
    with pytest.raises(HostError, match="b answered 'pong' where 'prepared' was due"):
        controls[0].call("prepare", "prepared", timeout=5.0)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x05hello",
        b"\x00\x00\x00\x02[]",
        b'\x00\x00\x00\x0c{"type": 12}',
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_message_is_refused(controls: Controls, raw: bytes) -> None:
    controls[3].sendall(raw)
    with pytest.raises(HostError, match="b does not speak ovt's protocol"):
        controls[0].receive(5.0)


def test_silence_and_the_end_are_told_apart(controls: Controls) -> None:
    with pytest.raises(wire.PeerGone, match="b is silent"):
        controls[0].receive(0.05)
    controls[3].sendall(b"\x00\x00")
    with pytest.raises(wire.PeerGone, match="b is silent"):
        controls[0].receive(0.05)
    controls[3].shutdown(socket.SHUT_RDWR)
    with pytest.raises(wire.PeerGone, match="b has closed the connection"):
        controls[0].receive(5.0)
    with pytest.raises(wire.PeerGone, match="the connection to b is lost"):
        controls[0].send("ping")


def test_a_file_goes_between_messages(controls: Controls, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "in").write_bytes(content)
    with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:

        def send() -> None:
            controls[0].send_file(source.fileno(), len(content))
            controls[0].send("done")

        thread = threading.Thread(target=send)
        thread.start()
        controls[1].receive_file(target.fileno(), len(content))
        assert controls[1].receive(5.0) == {"type": "done"}
        thread.join()
    assert (tmp_path / "out").read_bytes() == content


def test_a_file_that_cannot_be_written_is_still_read(controls: Controls, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(bytes(50_000))
    with open(tmp_path / "in", "rb") as source, open("/dev/full", "wb") as full:
        controls[0].send_file(source.fileno(), 50_000)
        controls[0].send("done")
        with pytest.raises(OSError, match="No space left"):
            controls[1].receive_file(full.fileno(), 50_000)
    assert controls[1].receive(5.0) == {"type": "done"}


def test_a_file_that_shrinks_is_an_error(controls: Controls, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"short")
    with open(tmp_path / "in", "rb") as source, pytest.raises(HostError, match="became 5 bytes shorter"):
        controls[0].send_file(source.fileno(), 10)


@pytest.mark.parametrize("line", [b"", b"hello\n", b"[]\n", b'{"ovt": 99}\n', b'{"ovt": 1, "token": 5}\n', b"x" * 5000])
def test_a_header_of_somebody_else_is_refused(line: bytes) -> None:
    one, other = socket.socketpair()
    with one, other:
        other.sendall(line)
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(HostError, match="does not speak"):
            wire.read_header(one.recv)


def test_nothing_behind_the_header_is_taken() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.sendall(wire.header(token="t", channel="memory") + b"data")
        assert wire.read_header(one.recv) == {"token": "t", "channel": "memory"}
        assert one.recv(10) == b"data"


# addresses


def test_addresses() -> None:
    ssh = parse("me@host")
    assert (ssh.scheme, ssh.host, ssh.port, str(ssh)) == ("ssh", "me@host", 0, "me@host")
    assert parse("ssh://me@host:2222")[:3] == ("ssh", "me@host", 2222)
    assert parse("tls://[::1]:16000")[:3] == ("tls", "::1", 16000)
    assert parse("unix:/run/x.sock")[:2] == ("unix", "/run/x.sock")
    custom = parse("host", ssh_command="ssh -i 'my key'", remote_ovt="sudo ovt")
    assert (custom.ssh_command, custom.remote_ovt) == (("ssh", "-i", "my key"), ("sudo", "ovt"))
    tls = parse("tls://host:1", Tls("a", "b", "c"))
    assert transport.Address.unpack(tls.pack()) == tls


@pytest.mark.parametrize(
    "text", ["", "unix:", "tls://host", "ftp://host", "-oProxyCommand=x", "ssh://-x@host", "host/path", "host:port"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a host|has no path"):
        parse(text)


def test_ssh_gets_one_word_for_the_remote_shell(tmp_path: Path) -> None:
    said = tmp_path / "said"
    script = tmp_path / "ssh"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{said}\nexec cat\n')
    script.chmod(0o755)
    address = parse("me@host", ssh_command=str(script), remote_ovt="ovt --data-root '/a b'")
    dialer = transport.Dialer(address._replace(port=22))
    with dialer.session() as connection:
        connection.sendall(b"there and back")
        assert connection.recv(100) == b"there and back"
    dialer.close()
    assert said.read_text().splitlines() == ["-p", "22", "me@host", "ovt --data-root '/a b' receive"]


# carrying


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_the_pump_carries_both_ways_past_the_end_of_one(size: int) -> None:
    near, one = socket.socketpair()
    other, far = socket.socketpair()
    data = os.urandom(size)
    thread = threading.Thread(target=transport.pump, args=(one, other), daemon=True)
    thread.start()

    def send() -> None:
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    with near, far:
        assert drain(far) == data
        far.sendall(b"still")
        far.shutdown(socket.SHUT_WR)
        assert drain(near) == b"still"
    sender.join()
    thread.join(5.0)
    assert not thread.is_alive()


def drain(connection: socket.socket) -> bytes:
    data = b""
    while more := connection.recv(1 << 20):
        data += more
    return data


def test_a_meeting_hands_out_connections_to_those_who_know_it(tmp_path: Path) -> None:
    run = str(tmp_path)
    with socket.socket(socket.AF_UNIX) as qemu:
        qemu.bind(str(tmp_path / "in"))
        qemu.listen()
        with listening.Meeting(run, "t0ken", {"memory": str(tmp_path / "in"), "disks": str(tmp_path / "gone")}):
            with listening.meet(run, "t0ken", "memory") as mine:
                accepted, _ = qemu.accept()
                with accepted:
                    mine.sendall(b"page")
                    assert accepted.recv(10) == b"page"
            with pytest.raises(HostError, match="there is no such channel"):
                listening.meet(run, "t0ken", "else")
            with pytest.raises(HostError, match="QEMU does not answer: No such file"):
                listening.meet(run, "t0ken", "disks")
            with pytest.raises(NotFound):
                listening.meet(run, "other", "memory")
            with pytest.raises(UsageError):
                listening.meet(run, "../in", "memory")
        with pytest.raises(NotFound, match="it has ended"):
            listening.meet(run, "t0ken", "memory")


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority `ca`, `here` and `there` signed by it, and a stranger who signed himself."""
    place = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True, timeout=60)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for name in ("ca", "stranger"):
        alternative = ["-addext", "subjectAltName=IP:127.0.0.1"] if name == "stranger" else []
        subject = ["-subj", f"/CN={name}", "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem"]
        openssl("req", "-x509", *key, *subject, *alternative)
    for name in ("here", "there"):
        alternative = ["-addext", "subjectAltName=IP:127.0.0.1"]
        openssl("req", *key, "-subj", f"/CN={name}", *alternative, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-copy_extensions", "copy"]
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return place


def tls(place: Path, name: str, ca: str = "ca") -> Tls:
    return Tls(str(place / f"{name}.pem"), str(place / f"{name}.key"), str(place / f"{ca}.pem"))


@pytest.fixture
def listener(certificates: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of an `ovt receive --listen tls://…`, and what it complains about."""
    where: list[str] = []
    complaints: list[str] = []
    ready = threading.Event()

    def note(address: str) -> None:
        where.append(address)
        ready.set()

    arguments = (str(tmp_path / "data"), str(tmp_path / "run"), "tls://127.0.0.1:0", tls(certificates, "there"), note)
    thread = threading.Thread(target=listening.listen, args=(*arguments, complaints.append), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield where[0], complaints


def test_a_session_over_tls(listener: tuple[str, list[str]], certificates: Path) -> None:
    address = parse(listener[0], tls(certificates, "here"))
    with contextlib.ExitStack() as stack:
        _, control = outgoing.connect(address, stack)
        assert control.call("ping", "pong") == {"type": "pong"}
        with pytest.raises(wire.PeerRefused, match="'dance' is not understood here"):
            control.call("dance", "danced")
        with pytest.raises(wire.PeerRefused, match="survey is not understood here: KeyError"):
            control.call("survey", "surveyed")
        with pytest.raises(wire.PeerRefused, match="no machine is on its way"):
            control.call("commit", "committed", run=True)
        assert control.call("query", "owner", id="0" * 12, token="")["state"] == "nowhere"
        control.call("bye", "bye")
    assert outgoing.owner(address, "0" * 12, "") == "nowhere"


@pytest.mark.parametrize(("name", "ca"), [("stranger", "ca"), ("here", "stranger")])
def test_strangers_are_refused(listener: tuple[str, list[str]], certificates: Path, name: str, ca: str) -> None:
    with contextlib.ExitStack() as stack, pytest.raises(HostError):
        outgoing.connect(parse(listener[0], tls(certificates, name, ca)), stack)
    deadline = time.monotonic() + 10
    while not listener[1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "refused" in listener[1][0]


def test_certificates_are_demanded(certificates: Path) -> None:
    with pytest.raises(UsageError, match="certificates on both sides"):
        transport.Dialer(parse("tls://127.0.0.1:1"))
    with pytest.raises(UsageError, match="No such file"):
        transport.Dialer(parse("tls://127.0.0.1:1", tls(certificates, "nobody")))


def test_the_pump_carries_over_tls_past_the_end_of_one_way(certificates: Path) -> None:
    server, client = (tls(certificates, "there").context(True), tls(certificates, "here").context(False))
    data = os.urandom(3_000_000)
    with socket.create_server(("127.0.0.1", 0)) as listener_:
        raw = socket.create_connection(listener_.getsockname())
        accepted, _ = listener_.accept()
        secured: list[socket.socket] = []
        thread = threading.Thread(target=lambda: secured.append(server.wrap_socket(accepted, server_side=True)))
        thread.start()
        outgoing_ = client.wrap_socket(raw, server_hostname="127.0.0.1")
        thread.join(10)
    near, one = socket.socketpair()
    far, other = socket.socketpair()
    pumps = [
        threading.Thread(target=transport.pump, args=pair, daemon=True)
        for pair in ((one, outgoing_), (secured[0], other))
    ]
    for pump in pumps:
        pump.start()

    def send() -> None:
        near.sendall(data)
        near.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    with near, far:
        assert drain(far) == data
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        assert drain(near) == data
    sender.join()
    for pump in pumps:
        pump.join(5.0)
        assert not pump.is_alive()


# what has to move


def plan(**changes: object) -> Plan:
    instance = Instance("0123456789ab", "one", Kind.VM, 1.0, Spec("none"))
    return Plan(instance, {"disks": []}, Settings())._replace(**changes)


def test_a_plan_survives_the_wire() -> None:
    whole = plan(images=(moving.Image("disks/root.qcow2", 5, "root"),), files=(moving.File("seed.iso", 3),))
    assert Plan.unpack(whole.pack()) == whole


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "./x", ".."])
def test_a_plan_names_no_file_elsewhere(path: str) -> None:
    with pytest.raises(ValueError, match="no path below"):
        Plan.unpack(plan(files=(moving.File(path, 3),)).pack())


def test_files_are_recognised(tmp_path: Path) -> None:
    used, copy, other = (tmp_path / name for name in ("used", "copy", "other"))
    for path in (used, copy):
        path.write_bytes(b"content" * 50_000)
    other.write_bytes(b"CONTENT" * 50_000)
    with survey.traces({str(used): True, str(copy): False}) as traces:
        assert [survey.compare(trace) for trace in traces] == ["same", "same"]
        assert survey.compare(traces[0]._replace(path=str(tmp_path / "gone"))) == "missing"
        forged = traces[1]._replace(mark="passwd")
        assert survey.compare(forged) == "unknown"
        (told,) = survey.with_digests([forged])
        assert survey.compare(told) == "equal"
        assert survey.compare(told._replace(path=str(other))) == "other"
    assert sorted(os.listdir(tmp_path)) == ["copy", "other", "used"]


def disk(*paths: str, **more: object) -> dict[str, object]:
    chain = [{"path": path, "format": "qcow2"} for path in paths]
    return {"id": "root", "device": "disk", "chain": chain, **more}


@pytest.mark.parametrize(
    ("record", "there", "with_disks", "trust", "expected"),
    [
        (disk("/s/a"), {"/s/a": "same"}, False, False, ""),
        (disk("/s/a"), {"/s/a": "equal"}, False, False, "/s/a is only a copy there"),
        (disk("/s/a"), {"/s/a": "unknown"}, False, False, "/s/a is not known to be the same file there"),
        (disk("/s/a"), {"/s/a": "unknown"}, False, True, ""),
        (disk("/s/a"), {"/s/a": "missing"}, False, True, "/s/a is missing there"),
        (disk("/s/a"), {"/s/a": "missing"}, True, False, "copied"),
        (disk("/s/a", "disks/root.qcow2"), {"/s/a": "same"}, False, False, "it lies in this host's own directory"),
        (disk("/s/a", "disks/root.qcow2"), {"/s/a": "same"}, True, False, "copied"),
        (disk("/s/a", "/s/b"), {"/s/a": "equal", "/s/b": "same"}, False, False, ""),
        (disk("/s/a", readonly=True), {"/s/a": "equal"}, False, False, ""),
        (disk("/s/a", readonly=True), {"/s/a": "other"}, True, False, "/s/a is another file there"),
        (disk(device="cdrom"), {}, False, False, ""),
    ],
)
def test_what_happens_to_a_disk(
    tmp_path: Path, record: dict[str, object], there: dict[str, str], with_disks: bool, trust: bool, expected: str
) -> None:
    instance = plan().instance
    before = {"disks": [record]}
    result, blockers = moving.arrange(
        instance, str(tmp_path), before, there, {"root": 7}, Settings(), with_disks, trust
    )
    assert before["disks"] == [record]
    if expected == "copied":
        assert result.images == (moving.Image("disks/root.qcow2", 7, "root"),)
        assert result.hardware["disks"][0]["chain"] == [{"path": "disks/root.qcow2", "format": "qcow2"}]
        assert result.settings.disks
    else:
        assert not result.images
        assert result.hardware["disks"] == [record]
        assert not result.settings.disks
    words = expected if expected != "copied" else ""
    assert [blocker.why.startswith(words) for blocker in blockers] == ([True] if words else [])


def test_own_small_files_and_missing_kernels_are_sent(tmp_path: Path) -> None:
    (tmp_path / "seed.iso").write_bytes(b"seed")
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    hardware = {"disks": [disk("seed.iso", device="cdrom")], "kernel": str(kernel), "initrd": "/same"}
    result, blockers = moving.arrange(
        plan().instance, str(tmp_path), hardware, {str(kernel): "other", "/same": "equal"}, {}, Settings(), False
    )
    assert blockers == []
    assert {(file.path, file.size, file.source) for file in result.files} == {
        ("seed.iso", 4, str(tmp_path / "seed.iso")),
        ("kernel", 6, str(kernel)),
    }
    assert (result.hardware["kernel"], result.hardware["initrd"]) == ("kernel", "/same")


def test_a_blocker_reads_well() -> None:
    assert str(Blocker("disk root", "it is here alone", "--with-disks")) == "disk root: it is here alone"
