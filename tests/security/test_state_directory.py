"""Of our own: container names that lead elsewhere, and who may read or replace what the runtime keeps on disk."""

import json
import os
import stat
from pathlib import Path

import pytest

from tests.conftest import Bundle, Oci
from tests.security.conftest import Create, nobody, refused

pytestmark = pytest.mark.root

NAMES = ["../x", "../../x", "..", ".", "a/b", "/x", "a/../b", ".hidden", "", " ", "a b", "a\nb", "é", "-" * 1025]
NAMES += ["a\\b", "a;b", "$(id)", "a*", "~", "a%2fb"]
VERBS = [["create", "-b", "BUNDLE"], ["start"], ["state"], ["kill"], ["delete"], ["delete", "--force"], ["exec"]]
VERBS += [["pause"], ["resume"], ["ps"], ["update", "--pids-limit", "5"], ["events", "--stats"]]


@pytest.fixture
def victim(run_root: Path) -> Path:
    """What a name with .. in it would reach: a directory beside the state directory that looks like a container."""
    place = run_root.parent / "x"
    place.mkdir()
    record = {"pid": os.getpid(), "pid_start": 0, "created": "", "bundle": "/", "ready": True, "hooks": {}}
    (place / "state.json").write_text(json.dumps(record))
    return place


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_name_is_not_a_path(oci: Oci, bundle: Bundle, run_root: Path, victim: Path, verb: list[str]) -> None:
    """Every verb refuses such a name before it touches anything."""
    run_root.mkdir(mode=0o700)
    place = str(bundle("true")) if "BUNDLE" in verb else ""
    words = [word.replace("BUNDLE", place) for word in verb]
    tail = ["true"] if verb[0] == "exec" else []
    for name in NAMES:
        message = refused(oci(*words, "--", name, *tail))
        assert "container ID" in message, (name, message)
    assert os.listdir(run_root) == [] and (victim / "state.json").exists()


def test_the_same_names_without_harm(oci: Oci, create: Create, bundle: Bundle) -> None:
    """The counter-check: names with every allowed letter do work."""
    assert create(bundle("true")).pid > 0
    for name in ("A.b_c+d-9", "_", "a..b"):
        assert oci("state", name).returncode == 1
        assert "does not exist" in oci("state", name).stderr


def test_only_the_owner_reads_the_state(oci: Oci, create: Create, bundle: Bundle, run_root: Path) -> None:
    """Environment variables hold passwords: no file below the state directory may be read by others."""
    secret = {"process": {"env": ["PATH=/bin", "PASSWORD=secret"]}}
    container = create(bundle("sleep", "60", config=secret))
    assert stat.S_IMODE(run_root.stat().st_mode) == 0o700
    found = False
    for place, directories, files in os.walk(run_root):
        for name in directories:
            assert not stat.S_IMODE((Path(place) / name).stat().st_mode) & 0o077, name
        for name in files:
            path = Path(place) / name
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
            found |= path.is_file() and b"PASSWORD=secret" in path.read_bytes()
    assert found
    assert (run_root / container.id).is_dir()


@pytest.mark.parametrize("what", ["foreign", "writable by all", "link to a foreign one", "foreign link"])
def test_a_state_directory_that_others_control(
    oci: Oci, bundle: Bundle, container_id: str, run_root: Path, what: str
) -> None:
    """Who can exchange the records can have any process killed and any hook run."""
    run_root.mkdir(mode=0o700)
    if what == "foreign":
        nobody(run_root)
    elif what == "writable by all":
        run_root.chmod(0o777)
    else:
        other = run_root.parent / "other"
        run_root.rename(other)
        run_root.symlink_to(other)
        nobody(other) if what == "link to a foreign one" else os.lchown(run_root, 65534, 65534)
    message = refused(oci("create", "-b", bundle("true"), container_id))
    assert str(run_root) in message
    assert ("can be changed by everybody" if what == "writable by all" else "belongs to uid 65534") in message


def test_a_pid_file_follows_no_link(oci: Oci, bundle: Bundle, container_id: str, tmp_path: Path) -> None:
    """A link in the place of the pid file is replaced; what it points to stays as it was."""
    host = tmp_path / "precious"
    host.write_text("precious")
    (tmp_path / "pid").symlink_to(host)
    oci("run", "--pid-file", tmp_path / "pid", "-b", bundle("true"), container_id, check=True)
    assert host.read_text() == "precious"
    assert not (tmp_path / "pid").is_symlink() and (tmp_path / "pid").read_text().isdigit()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".pid")]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "1"}', '{"pid": 1}', "\xff", "[" * 100000])
def test_a_damaged_record(oci: Oci, run_root: Path, container_id: str, content: str) -> None:
    """One clear line from every verb, and `delete --force` removes it; the record names pid 1, which must live."""
    place = run_root / container_id
    place.mkdir(parents=True, mode=0o700)
    run_root.chmod(0o700)
    (place / "state.json").write_text(content, encoding="latin-1")
    for verb in (["state"], ["start"], ["kill"], ["delete"], ["pause"]):
        assert container_id in refused(oci(*verb, container_id))
    assert container_id in oci("list", check=True).stdout
    oci("delete", "--force", container_id, check=True)
    assert not place.exists() and Path("/proc/1").exists()


def test_a_reused_pid_is_not_signalled(oci: Oci, create: Create, bundle: Bundle, run_root: Path) -> None:
    """The record names this very test, but with another start time: that is somebody else."""
    container = create(bundle("sleep", "60")).start()
    path = run_root / container.id / "state.json"
    original = path.read_text()
    record = json.loads(original)
    path.write_text(json.dumps({**record, "pid": os.getpid(), "cgroup": None}))
    try:
        assert json.loads(oci("state", container.id, check=True).stdout)["status"] == "stopped"
        assert "not running" in refused(oci("kill", container.id, "KILL"))
        assert "not running" in refused(oci("exec", container.id, "true"))
    finally:
        path.write_text(original)
