"""Security labels in real containers. No test machine need have an LSM: another attribute of /proc/self plays it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ovt.engine.container import init
from ovt.engine.container.runtime import Runtime
from ovt.errors import HostError
from ovt.kernel import lsm

pytestmark = pytest.mark.root
NAMESPACES = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]


@pytest.fixture(scope="module")
def stub() -> None:
    """The engine keeps one descriptor of its init for the life of the process; have it before a test is watched."""
    init._memfd()


@pytest.fixture
def bundle(tmp_path: Path, stub: None) -> Path:
    (tmp_path / "rootfs/bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tmp_path / "rootfs/bin/busybox")
    spec: dict[str, Any] = {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs"},
        "process": {"args": ["/bin/busybox", "sleep", "60"], "cwd": "/", "user": {"uid": 1000, "gid": 1000}},
        "linux": {"namespaces": NAMESPACES, "cgroupsPath": f"/ovt-test-{os.getpid()}"},
    }
    spec["process"]["apparmorProfile"] = "web"
    (tmp_path / "config.json").write_text(json.dumps(spec))
    return tmp_path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Runtime]:
    runtime = Runtime(str(tmp_path / "run"))
    yield runtime
    runtime.delete("labelled", force=True)


@pytest.fixture
def null() -> Iterator[tuple[int, int, int]]:
    fd = os.open("/dev/null", os.O_RDWR)
    yield fd, fd, fd
    os.close(fd)


def test_the_label_is_written_by_the_process_after_it_gave_up_its_rights(
    bundle: Path, engine: Runtime, null: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def attributes(process: dict[str, Any]) -> list[tuple[str, str]]:
        asked.append(process["apparmorProfile"])
        return [("self/oom_score_adj", "321")]

    monkeypatch.setattr(lsm, "exec_attributes", attributes)
    pid = engine.create("labelled", str(bundle), stdio=null).pid
    assert asked == ["web"]
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "321\n"
    engine.start("labelled")
    inside = engine.exec("labelled", {"args": ["/bin/busybox", "sleep", "60"], "cwd": "/"}, stdio=null)
    assert asked == ["web", "web"], "a process without a label of its own has the container's"
    assert Path(f"/proc/{inside}/oom_score_adj").read_text() == "321\n"
    other = {"args": ["/bin/busybox", "true"], "cwd": "/", "apparmorProfile": "other"}
    os.waitpid(engine.exec("labelled", other, stdio=null), 0)
    assert asked[-1] == "other"
    engine.kill("labelled", 9)
    os.waitpid(inside, 0)  # first: a pid namespace's init does not end before the others are reaped
    os.waitpid(pid, 0)


def test_a_label_that_the_kernel_refuses_fails_the_creation(
    bundle: Path, engine: Runtime, null: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lsm, "exec_attributes", lambda process: [("self/oom_score_adj", "nonsense")])
    with pytest.raises(Exception, match="apply security label 'nonsense'"):
        engine.create("labelled", str(bundle), stdio=null)
    assert not (bundle / "run/labelled").exists()


@pytest.mark.skipif(lsm.apparmor_enabled(), reason="this host runs AppArmor")
def test_a_label_without_its_lsm_fails_the_creation(bundle: Path, engine: Runtime, null: tuple[int, int, int]) -> None:
    with pytest.raises(HostError, match="does not run AppArmor"):
        engine.create("labelled", str(bundle), stdio=null)
    assert not (bundle / "run/labelled").exists()
