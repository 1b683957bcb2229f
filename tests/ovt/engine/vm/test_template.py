"""Templates: a guest's memory becomes a file from which others go on, and which none of them can change."""

import dataclasses
import fcntl
import hashlib
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from ovt.engine.vm import memory_state, template
from ovt.engine.vm.features import Features, probe
from ovt.engine.vm.hardware import Hardware
from ovt.engine.vm.memory_state import DEVICES, MAPPED, Saved
from ovt.engine.vm.template import Template, Templates
from ovt.errors import Conflict, HostError, NotFound, OvtError, UsageError
from tests.ovt.engine.vm import bare

CONTENT = random.Random(5).randbytes(2 * bare.MIB)
NOBODY = 65534


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    return probe(str(tmp_path_factory.mktemp("features")))


@pytest.fixture
def templates(tmp_path: Path) -> Templates:
    return Templates(str(tmp_path / "data"))


def hardware(**changes: object) -> Hardware:
    known = Hardware(
        "q35", "tcg", "qemu64", 1, 1, 1, 1, 1, bare.MEMORY, bare.MEMORY, "bios", str(uuid.uuid4()), bare.GENERATION
    )
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def made(templates: Templates, name: str = "web", **changes: object) -> Template:
    """A template without content."""
    known = template.record(name, hardware(), Saved(MAPPED, 0, "", bare.MEMORY), image="busybox", shared=False)
    with templates.new(name) as building:
        with building.file(template.STATE):
            pass
        return building.finish(known._replace(**changes))


def taken(templates: Templates, features: Features, uid: int, name: str = "web") -> Template:
    """A template of a firmware that has run for a moment, with CONTENT in its memory."""
    with templates.new(name) as building:
        with bare.qemu(content=CONTENT) as source, building.file("full") as full:
            source.command("cont")
            wait_for_generation(source, bare.GENERATION)
            saved = memory_state.save(source, features, full)
            with (
                template.scratch(hardware()) as memory,
                building.file(template.STATE) as devices,
                bare.qemu(incoming=True, file=memory, shared=True, uid=uid) as helper,
            ):
                state = template.split(helper, features, full, saved, devices)
                building.keep_memory(memory)
            source.command("cont")
            assert source.command("query-status")["running"]
        building.remove("full")
        return building.finish(template.record(name, hardware(), state, image="busybox", source="first"))


def wait_for_generation(qmp: bare.Bare, wanted: str, seconds: float = 30.0) -> bytes:
    """All memory as soon as the firmware has put vmgenid's page into it."""
    raw = uuid.UUID(wanted).bytes_le
    for _ in range(int(seconds / 0.1)):
        memory = bare.read(qmp, 0, bare.MEMORY)
        if raw in memory:
            return memory
        with pytest.raises(TimeoutError):
            qmp.wait_event("NOTHING", timeout=0.1)
    raise AssertionError("the firmware has not started")


@pytest.mark.qemu
@pytest.mark.parametrize("uid", [-1, pytest.param(NOBODY, marks=pytest.mark.root)])
def test_a_fork_has_the_memory_and_changes_it_for_itself_alone(
    uid: int, features: Features, templates: Templates
) -> None:
    if template.why_not_shared(hardware(), features):
        pytest.skip("this QEMU cannot share memory")
    known = taken(templates, features, uid)
    home = Path(templates.home("web"))
    assert known.state.format == DEVICES
    assert (home / "state").stat().st_size < bare.MIB
    assert (home / "memory").stat().st_blocks * 512 < 16 * bare.MIB < (home / "memory").stat().st_size == bare.MEMORY
    assert (home / "memory").stat().st_mode & 0o777 == 0o444
    assert sorted(os.listdir(home)) == ["disks", "memory", "state", "template.json"]
    before = hashlib.sha256((home / "memory").read_bytes()).digest()
    other = "99999999-8888-7777-6666-555555555555"
    memory = templates.open_memory(known)
    try:
        with bare.qemu(incoming=True, file=memory, generation=other, uid=uid) as fork:
            templates.fork(fork, features, known)
            assert not fork.command("query-status")["running"]
            content = bare.read(fork, bare.CONTENT, len(CONTENT))
            fork.command("cont")
            everything = wait_for_generation(fork, other)
            assert fork.command("query-status")["running"]
    finally:
        os.close(memory)
    assert content == CONTENT
    assert uuid.UUID(bare.GENERATION).bytes_le not in everything  # nobody in the guest can take it for the template
    assert hashlib.sha256((home / "memory").read_bytes()).digest() == before


@pytest.mark.root
def test_no_one_who_holds_the_descriptor_can_write_to_the_memory(templates: Templates) -> None:
    with templates.new("web") as building:
        with building.file(template.MEMORY, bare.MIB):
            pass
        known = template.record("web", hardware(memory=bare.MIB), Saved(MAPPED, 0, "", 0), image="busybox")
        building.finish(known)
    fd = templates.open_memory(known)
    attack = """
import ctypes, mmap, os, sys
fd, path = int(sys.argv[1]), sys.argv[2]
def refused(what):
    try:
        what()
    except OSError:
        return
    sys.exit("it could be written to")
refused(lambda: os.write(fd, b"x"))
refused(lambda: os.ftruncate(fd, 0))
refused(lambda: os.posix_fallocate(fd, 0, 4096))
refused(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
refused(lambda: os.open(path, os.O_RDONLY))
refused(lambda: os.fchmod(fd, 0o666))
refused(lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE))
os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
"""
    try:
        subprocess.run(
            [sys.executable, "-c", attack, str(fd), f"{templates.home('web')}/memory"],
            check=True,
            pass_fds=[fd],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        )
    finally:
        os.close(fd)


@pytest.mark.qemu
def test_without_shared_memory_a_fork_loads_a_copy(features: Features, templates: Templates) -> None:
    with templates.new("web") as building:
        with bare.qemu(content=CONTENT) as source, building.file(template.STATE) as state:
            saved = memory_state.save(source, features, state)
        known = building.finish(template.record("web", hardware(), saved, image="busybox", shared=False))
    assert templates.open_memory(known) == -1
    with bare.qemu(incoming=True) as fork:
        templates.fork(fork, features, known)
        assert bare.read(fork, bare.CONTENT, len(CONTENT)) == CONTENT


@pytest.mark.qemu
def test_splitting_needs_a_qemu_on_a_shared_file(features: Features) -> None:
    with bare.qemu(incoming=True) as helper, pytest.raises(HostError, match="has to be a shared file"):
        template.split(helper, features, -1, Saved(MAPPED, 0, "", 0), -1)


@pytest.mark.qemu
def test_what_cannot_share_says_why(features: Features) -> None:
    features = features._replace(mapped_ram=True, ignore_shared=True)
    assert template.why_not_shared(hardware(), features) == ""
    for changes, words in (
        ({"numa": 2}, "several parts"),
        ({"dimms": [{"id": "dimm0"}]}, "several parts"),
        ({"hugepages": True}, "huge pages"),
        ({"shared_memory": True}, "virtiofs"),
    ):
        assert words in template.why_not_shared(hardware(**changes), features)
    assert "too old" in template.why_not_shared(hardware(), features._replace(mapped_ram=False))


def test_a_template_is_kept_listed_and_found(templates: Templates) -> None:
    assert templates.all() == []
    old = made(templates, "old", created=1.0, digest="sha256:1")
    new = made(templates, "new", created=2.0)
    assert templates.load("old") == old
    assert templates.all() == [old, new]
    assert templates.find_for("busybox") == new
    assert templates.find_for("other") is None
    assert templates.find_for("whatever it is called now", "sha256:1") == old
    assert templates.find_for("busybox", "sha256:2") is None
    assert templates.find_for("busybox", memory=bare.MEMORY, vcpus=1) == new
    assert templates.find_for("busybox", memory=bare.MIB) is None
    assert os.stat(templates.home("new")).st_mode & 0o777 == 0o700


def test_a_name_is_taken_once(templates: Templates) -> None:
    made(templates)
    with pytest.raises(Conflict, match="there is a template 'web' already"), templates.new("web"):
        pass
    with pytest.raises(UsageError), templates.new("../web"):
        pass
    with pytest.raises(UsageError):
        templates.load("../web")


def test_the_faster_of_two_makers_wins(templates: Templates) -> None:
    known = template.record("web", hardware(), Saved(MAPPED, 0, "", 0), image="busybox", shared=False)
    with templates.new("web") as building:
        os.makedirs(f"{templates.home('web')}/something")
        with pytest.raises(Conflict, match="already"):
            building.finish(known)
    assert os.listdir(templates.root) == ["web"]


def test_a_maker_that_fails_leaves_nothing(templates: Templates) -> None:
    with pytest.raises(ZeroDivisionError), templates.new("web") as building:
        with building.file(template.MEMORY, bare.MIB):
            pass
        raise ZeroDivisionError
    assert os.listdir(templates.root) == []


def test_a_killed_maker_is_found_and_a_living_one_left_alone(templates: Templates) -> None:
    code = (
        "import os, sys\nfrom ovt.engine.vm.template import Templates\n"
        "with Templates(sys.argv[1]).new('dead'):\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, os.path.dirname(templates.root)], check=False)
    made(templates)
    with templates.new("coming"):
        left = templates.leftovers()
        assert [os.path.basename(path).partition(".new-")[2].split(".")[0] for path in left] == ["dead"]
        assert templates.leftovers(remove=True) == left
        assert templates.leftovers() == []
        assert len(os.listdir(templates.root)) == 2
    assert os.listdir(templates.root) == ["web"]


def test_one_in_use_is_not_deleted(templates: Templates) -> None:
    made(templates)
    with pytest.raises(Conflict, match="template web is in use by a, b"):
        templates.delete("web", lambda: ["a", "b"])
    with templates.held("web") as held:
        assert held.name == "web"
        with pytest.raises(Conflict, match="another command is at work"):
            templates.delete("web", list)
    templates.delete("web", list)
    assert os.listdir(templates.root) == []
    for call in (lambda: templates.load("web"), lambda: templates.delete("web", list)):
        with pytest.raises(NotFound):
            call()


def vanish(home: str) -> None:
    os.unlink(f"{home}/template.json")


def garble(home: str) -> None:
    Path(f"{home}/template.json").write_text('{"version": 1')


def later(home: str) -> None:
    Path(f"{home}/template.json").write_text('{"version": 99}')


@pytest.mark.parametrize("damage", [vanish, garble, later])
def test_a_damaged_one_is_told_and_can_be_deleted(damage: Callable[[str], None], templates: Templates) -> None:
    made(templates)
    damage(templates.home("web"))
    with pytest.raises(OvtError):
        templates.load("web")
    names: list[str] = []
    assert templates.all(names) == []
    assert names in ([], ["web"])
    templates.delete("web", list)
    assert os.listdir(templates.root) == []


def test_memory_that_was_cut_or_opened_for_writing_is_refused(templates: Templates) -> None:
    with templates.new("web") as building:
        with building.file(template.MEMORY, bare.MEMORY):
            pass
        known = building.finish(template.record("web", hardware(), Saved(MAPPED, 0, "", 0), image="busybox"))
    path = f"{templates.home('web')}/memory"
    os.close(templates.open_memory(known))
    os.chmod(path, 0o644)
    with pytest.raises(OvtError, match="can be written to"):
        templates.open_memory(known)
    os.truncate(path, 5)
    os.chmod(path, 0o444)
    with pytest.raises(OvtError, match="has 5 bytes"):
        templates.open_memory(known)
    os.unlink(path)
    with pytest.raises(OvtError, match="has vanished"):
        templates.open_memory(known)


@pytest.mark.root
def test_another_users_is_refused(templates: Templates) -> None:
    made(templates)
    os.chown(templates.home("web"), NOBODY, NOBODY)
    with pytest.raises(HostError, match="belongs to uid 65534"):
        templates.load("web")


def test_frozen_layers_are_the_templates_own(templates: Templates, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "disks").mkdir(parents=True)
    layer = home / "disks/root.qcow2"
    layer.write_bytes(b"layer")
    (home / "seed.iso").write_bytes(b"seed")
    base = {"path": "/images/base.raw", "format": "raw"}
    disks = [
        {"id": "root", "device": "disk", "chain": [base, {"path": "disks/root.qcow2", "format": "qcow2"}]},
        {"id": "cdrom1", "device": "cdrom", "chain": [{"path": "seed.iso", "format": "raw"}]},
        {"id": "cdrom2", "device": "cdrom", "chain": []},
    ]
    source = hardware(disks=disks)
    with templates.new("web") as building:
        kept = building.keep_disks(str(home), source)
        known = template.record("web", kept, Saved(MAPPED, 0, "", 0), image="i", shared=False)
        assert building.finish(known).disks == ("cdrom1.0", "root.1")
    chain = Hardware.unpack(templates.load("web").hardware).disks[0]["chain"]
    assert chain == [base, {"path": f"{templates.home('web')}/disks/root.1", "format": "qcow2"}]
    assert source.disks[0]["chain"][1]["path"] == "disks/root.qcow2"
    layer.write_bytes(b"other")  # as a snapshot of the source does that is merged
    assert Path(chain[1]["path"]).read_bytes() == b"layer"
    assert os.stat(chain[1]["path"]).st_mode & 0o777 == 0o444


def test_a_disk_that_is_its_owners_image_cannot_be_frozen(templates: Templates, tmp_path: Path) -> None:
    disk = {"id": "root", "device": "disk", "chain": [{"path": "/images/base.raw", "format": "raw"}]}
    with templates.new("web") as building:
        with pytest.raises(UsageError, match=r"disk root is /images/base\.raw itself"):
            building.keep_disks(str(tmp_path), hardware(disks=[disk]))
        assert building.keep_disks(str(tmp_path), hardware(disks=[{**disk, "readonly": True}])).disks[0]["readonly"]


def test_where_no_second_name_is_possible_it_is_a_copy_with_its_holes(
    templates: Templates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = tmp_path / "root.qcow2"
    with open(layer, "wb") as file:
        for offset in (0, 8 * bare.MIB, 24 * bare.MIB):
            file.seek(offset)
            file.write(b"data" * 1000)
        file.truncate(32 * bare.MIB)

    def refuse(*ignored: object, **more: object) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fcntl, "ioctl", refuse)
    with templates.new("web") as building:
        building.keep_disk(str(layer), "root.0")
        copy = Path(building.path) / "disks/root.0"
        assert copy.read_bytes() == layer.read_bytes()
        assert copy.stat().st_blocks * 512 < bare.MIB
