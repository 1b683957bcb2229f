"""The NoCloud seed: what stands in it, what is refused, and that readers other than ours find it."""

import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from ovt.engine.vm import seed
from ovt.errors import UsageError
from ovt.image.iso9660 import iso
from ovt.model import Seed

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJx1h1t3Zl8v6oPq7oX9b3m0u1bC7rXbQ0m1lqkq0abc me@here"
SECTOR = 2048


def read(image: bytes, descriptor: int) -> dict[str, bytes]:
    """The files of one tree of names, as the specifications have it: 16 is ISO 9660 with Rock Ridge, 17 Joliet."""
    head = image[descriptor * SECTOR :][:SECTOR]
    joliet = head[0] == 2
    assert head[1:6] == b"CD001" and struct.unpack_from("<I", head, 80)[0] * SECTOR == len(image)
    start, size = struct.unpack_from("<I", head, 158)[0] * SECTOR, struct.unpack_from("<I", head, 166)[0]
    found, at = {}, start
    while at < start + size:
        length = image[at]
        if not length:  # no more in this sector
            at += SECTOR - at % SECTOR
            continue
        record = image[at : at + length]
        assert length % 2 == 0 and at // SECTOR == (at + length - 1) // SECTOR
        assert record[2:6] == record[6:10][::-1] and record[10:14] == record[14:18][::-1]
        sector, bytes_ = struct.unpack_from("<I", record, 2)[0], struct.unpack_from("<I", record, 10)[0]
        name = record[33 : 33 + record[32]]
        text = "" if record[25] & 2 else name.decode("utf-16-be" if joliet else "ascii")
        if not joliet:
            extra = 33 + len(name) + (1 - len(name) % 2)
            while extra < length - 3:
                kind, entry = record[extra : extra + 2], record[extra + 2]
                if kind == b"NM":
                    text = record[extra + 5 : extra + entry].decode()
                extra += entry
        if not record[25] & 2:
            found[text] = image[sector * SECTOR :][:bytes_]
        at += length
    return found


def both(image: bytes) -> dict[str, bytes]:
    """The files of an image, which are the same by either names."""
    files = read(image, 16)
    assert read(image, 17) == files
    return files


def test_a_guest_gets_its_name_and_its_keys() -> None:
    files = both(seed.make(Seed(ssh_keys=(KEY,)), "frodo", "ovt-1"))
    assert files == {
        "meta-data": f'instance-id: "ovt-1"\nlocal-hostname: "frodo"\npublic-keys:\n  - "{KEY}"\n'.encode(),
        "user-data": f'#cloud-config\nhostname: "frodo"\nssh_authorized_keys:\n  - "{KEY}"\n'.encode(),
    }


def test_what_the_user_gave_is_handed_on_byte_for_byte() -> None:
    user = "#!/bin/sh\necho 'Grüße'\r\n"
    given = Seed(user, "version: 2\n", (KEY,), "mine", "#cloud-config\n{}\n")
    files = both(seed.make(given, "h", "ovt-1"))
    assert files["user-data"] == user.encode()
    assert files["network-config"] == b"version: 2\n"
    assert files["vendor-data"] == b"#cloud-config\n{}\n"
    assert files["meta-data"].startswith(b'instance-id: "mine"\n') and KEY.encode() in files["meta-data"]


def test_same_arguments_same_bytes_and_another_instance_others() -> None:
    given = Seed(ssh_keys=(KEY,))
    assert seed.make(given, "h", "1") == seed.make(given, "h", "1") != seed.make(given, "h", "2")


@pytest.mark.parametrize(
    "text",
    [
        "#cloud-config",
        "#Cloud-Config  \r\nhostname: x\n",
        "#cloud-config-archive\n[]",
        "#include-once\nhttp://x\n",
        "#cloud-boothook\n",
        "## template: jinja\n#cloud-config\n",
        "#!/bin/sh\n",
        'Content-Type: multipart/mixed;\n boundary="x"\nMIME-Version: 1.0\n\n--x\n',
    ],
)
def test_every_form_of_user_data_is_known(text: str) -> None:
    seed.check(Seed(user_data=text))


@pytest.mark.parametrize("text", ["hostname: x\n", "# cloud-config\n", "\n#cloud-config\n", "x\nMIME-Version: 1.0\n"])
def test_other_user_data_is_refused_with_the_forms_that_there_are(text: str) -> None:
    with pytest.raises(UsageError, match="user data begin with") as caught:
        seed.check(Seed(user_data=text))
    assert "#cloud-config" in caught.value.hint and "#!" in caught.value.hint
    with pytest.raises(UsageError, match="vendor data"):
        seed.make(Seed(vendor_data=text), "h", "1")


@pytest.mark.parametrize("text", ["version: 2\n", "network:\n  version: 1\n", '{"version": 2}', "{version: 2}"])
def test_network_configurations_name_their_version(text: str) -> None:
    seed.check(Seed(network_config=text))


@pytest.mark.parametrize("text", ["ethernets: {}\n", "version: 3\n", "subversion: 2\n"])
def test_a_network_configuration_without_a_version_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no version"):
        seed.check(Seed(network_config=text))


@pytest.mark.parametrize(
    "key", [KEY, "ecdsa-sha2-nistp256 AAAAE2Vj=", "sk-ssh-ed25519@openssh.com AAAAGn c", f'from="10.0.0.1" {KEY}']
)
def test_public_keys(key: str) -> None:
    seed.check(Seed(ssh_keys=(key,)))


@pytest.mark.parametrize("key", ["", "~/.ssh/id.pub", "-----BEGIN OPENSSH PRIVATE KEY-----", f"{KEY}\nruncmd: [x]"])
def test_what_is_no_public_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(UsageError, match=r"^SSH key 2 is not a public key$"):
        seed.check(Seed(ssh_keys=(KEY, key)))


def test_names_and_sizes_of_all_sorts() -> None:
    files = {f"a-long.name of file {number}, Ü.xml": b"x" * (number * 997) for number in range(80)}
    files |= {"a": b"", "A": b"1", "ovf-env.xml": b"<a/>" * 512, "x" * 64: b"2", ".hidden": b"3", "日本": b"4"}
    image = iso("OVF ENV", files)
    assert both(image) == files
    assert len(image) % SECTOR == 0


def test_nothing_at_all() -> None:
    assert both(iso("empty", {})) == {}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0", "a\n", "a:b", "a\\b", "x" * 65, "\U0001f600", "\ud800"])
def test_names_that_a_cd_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="name of a file"):
        iso("label", {name: b""})


@pytest.mark.parametrize("label", ["", "x" * 17, "ü", "a\n"])
def test_labels_that_a_cd_cannot_carry_are_refused(label: str) -> None:
    with pytest.raises(UsageError, match="label"):
        iso(label, {})


def test_the_label_is_where_cloud_init_looks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    path.write_bytes(seed.make(Seed(), "h", "1"))
    words = ["blkid", "-c", "/dev/null", "-p", "-o", "export", path]
    path_variable = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path_variable})
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(done.stdout.splitlines())


@pytest.mark.lab
@pytest.mark.root
@pytest.mark.parametrize("options", ["", "norock", "nojoliet"])
def test_the_kernel_sees_the_names(tmp_path: Path, options: str) -> None:
    files = {"user-data": b"#cloud-config\n", "meta-data": b"x" * 5000, "OVF Env.xml": b"<a/>"}
    (tmp_path / "seed.iso").write_bytes(iso("cidata", files))
    place = tmp_path / "cd"
    place.mkdir()
    subprocess.run(["modprobe", "-a", "loop", "isofs"], check=True, capture_output=True)
    subprocess.run(
        ["mount", "-t", "iso9660", "-o", ",".join(filter(None, ("ro,loop", options))), tmp_path / "seed.iso", place],
        check=True,
        capture_output=True,
    )
    try:
        assert {path.name: path.read_bytes() for path in place.iterdir()} == files
        if options != "norock":
            assert {path.stat().st_mode for path in place.iterdir()} == {0o100400}
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_text_in_meta_data_cannot_add_to_it() -> None:
    files = both(seed.make(Seed(instance_id='a"\nx: 1'), "h", "1"))
    first = files["meta-data"].decode().splitlines()[0].partition(": ")[2]
    assert json.loads(first) == 'a"\nx: 1'
