"""Hooks of real containers: when they run, where, with what, and what their failure does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Bundle, Oci
from tests.ovt.live import Create, namespace_of, refused, wait_for

pytestmark = pytest.mark.root
BEFORE = ["prestart", "createRuntime", "createContainer"]
ALL = [*BEFORE, "startContainer", "poststart", "poststop"]


@pytest.fixture
def note(tmp_path: Path) -> Path:
    """Where hooks write; the directory also exists in the containers."""
    return tmp_path / "notes"


def shell(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


def inside(note: Path) -> dict[str, Any]:
    """The notes directory at the same place in the container, for startContainer."""
    note.mkdir(exist_ok=True)
    return {"type": "bind", "source": str(note), "destination": str(note), "options": ["bind"]}


def hooked(bundle: Bundle, note: Path, hooks: dict[str, Any], *arguments: str, **config: Any) -> Path:
    def edit(whole: dict[str, Any]) -> None:
        whole["hooks"] = hooks
        whole["mounts"].append(inside(note))

    return bundle(*arguments, config=config, edit=edit)


def test_order(create: Create, bundle: Bundle, oci: Oci, note: Path) -> None:
    hooks = {name: [shell(f"echo {name}-{i} >> {note}/order") for i in (1, 2)] for name in ALL}
    container = create(place=hooked(bundle, note, hooks, "sh", "-c", f"echo program >> {note}/order"))
    assert (note / "order").read_text().split() == [f"{name}-{i}" for name in BEFORE for i in (1, 2)]
    container.start()
    wait_for(lambda: container.status == "stopped")
    oci("delete", container.id, check=True)
    order = (note / "order").read_text().split()
    expected = [f"{name}-{i}" for name in ALL for i in (1, 2)]
    assert [line for line in order if line != "program"] == expected
    assert order.index("startContainer-2") < order.index("program") < order.index("poststop-1")


def test_the_state_on_stdin(create: Create, bundle: Bundle, oci: Oci, note: Path) -> None:
    hooks = {name: [shell(f"cat > {note}/{name}")] for name in ALL}
    place = hooked(bundle, note, hooks, "sleep", "1000", annotations={"key": "value"})
    container = create(place=place)
    pid = container.pid
    container.start()
    container.stop()
    oci("delete", container.id, check=True)
    statuses = {}
    for name in ALL:
        state = json.loads((note / name).read_text())
        assert (state["id"], state["bundle"], state["annotations"]) == (container.id, str(place), {"key": "value"})
        assert state["ociVersion"].startswith("1.")
        assert name == "poststop" or state["pid"] == pid
        statuses[name] = state["status"]
    assert statuses == {
        "prestart": "creating", "createRuntime": "creating", "createContainer": "creating",
        "startContainer": "created", "poststart": "running", "poststop": "stopped",
    }  # fmt: skip


def test_namespaces(create: Create, bundle: Bundle, oci: Oci, note: Path) -> None:
    hooks = {name: [shell(f"readlink /proc/self/ns/mnt /proc/self/ns/pid > {note}/{name}; true")] for name in ALL}
    hooks["startContainer"] = [
        shell(f"for n in mnt pid; do readlink /proc/self/ns/$n; done > {note}/startContainer; test -e /bin/busybox")
    ]
    container = create(place=hooked(bundle, note, hooks, "sleep", "1000"))
    pid = container.pid
    own, host = ([namespace_of(who, kind) for kind in ("mnt", "pid")] for who in (pid, "self"))
    container.start()
    container.stop()
    oci("delete", container.id, check=True)
    seen = {name: (note / name).read_text().split() for name in ALL}
    assert seen == {
        "prestart": host, "createRuntime": host, "createContainer": own, "startContainer": own,
        "poststart": host, "poststop": host,
    }  # fmt: skip


def test_create_container_sees_the_root_mounted_but_not_entered(create: Create, bundle: Bundle, note: Path) -> None:
    script = f"grep -c rootfs/proc /proc/self/mountinfo > {note}/seen; ls -d /usr >> {note}/seen"
    create(place=hooked(bundle, note, {"createContainer": [shell(script)]}))
    lines = (note / "seen").read_text().split()
    assert int(lines[0]) >= 1 and lines[1] == "/usr"


@pytest.mark.parametrize("name", [*BEFORE, "poststart"])
def test_environment_and_directory(create: Create, bundle: Bundle, note: Path, name: str) -> None:
    hook = {"path": "/usr/bin/env", "args": ["env", "sh", "-c", f"env > {note}/env; pwd > {note}/cwd"],
            "env": ["A=1", "PATH=/bin:/usr/bin"]}  # fmt: skip
    place = hooked(bundle, note, {name: [hook]}, "sleep", "1000")
    create(place=place).start()
    assert {"A=1", "PATH=/bin:/usr/bin"} <= set((note / "env").read_text().split())
    assert "HOME" not in (note / "env").read_text()
    assert (note / "cwd").read_text().strip() == str(place)


def test_an_empty_environment_stays_empty(create: Create, bundle: Bundle, note: Path) -> None:
    hook = {"path": "/bin/cp", "args": ["cp", "/proc/self/environ", f"{note}/environ"], "env": []}
    create(place=hooked(bundle, note, {"createRuntime": [hook]}))
    assert (note / "environ").read_bytes() == b""


@pytest.mark.parametrize("name", BEFORE)
def test_failure_before_the_start_leaves_nothing(
    oci: Oci, bundle: Bundle, container_id: str, note: Path, name: str, run_root: Path
) -> None:
    hooks = {name: [shell("echo the reason >&2; exit 3"), shell(f"touch {note}/second")]}
    message = refused(oci("create", "-b", hooked(bundle, note, hooks), container_id))
    assert f"{name} hook #0 (/bin/sh): exit status 3" in message
    assert "the reason" in message or name == "createContainer"
    assert not (note / "second").exists() and not (run_root / container_id).exists()


def test_failure_of_start_container(create: Create, bundle: Bundle, oci: Oci, note: Path) -> None:
    hooks = {"startContainer": [shell("exit 4")]}
    container = create(place=hooked(bundle, note, hooks, "touch", f"{note}/program"))
    assert "startContainer hook #0 (/bin/sh): exit status 4" in refused(oci("start", container.id))
    assert not (note / "program").exists()


def test_failure_of_poststart_deletes(create: Create, bundle: Bundle, oci: Oci, note: Path) -> None:
    hooks = {"poststart": [shell("exit 5")], "poststop": [shell(f"touch {note}/poststop")]}
    container = create(place=hooked(bundle, note, hooks, "sleep", "1000"))
    pid = container.pid
    assert "poststart hook #0 (/bin/sh): exit status 5" in refused(oci("start", container.id))
    assert "does not exist" in refused(oci("state", container.id))
    assert not Path(f"/proc/{pid}/root/bin").exists() and (note / "poststop").exists()


def test_failure_of_poststop_is_a_warning(create: Create, bundle: Bundle, oci: Oci, note: Path) -> None:
    hooks = {"poststop": [shell("exit 6"), shell(f"touch {note}/second")]}
    container = create(place=hooked(bundle, note, hooks, "true")).start()
    wait_for(lambda: container.status == "stopped")
    done = oci("delete", container.id, check=True)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "warning: " in done.stderr and "poststop hook #0 (/bin/sh): exit status 6" in done.stderr
    assert (note / "second").exists()
    assert "does not exist" in refused(oci("state", container.id))


def test_failure_of_poststop_does_not_change_the_status_of_run(oci: Oci, bundle: Bundle, container_id: str) -> None:
    place = bundle("sh", "-c", "exit 7", config={"hooks": {"poststop": [shell("exit 6")]}})
    done = oci("run", "-b", place, container_id)
    assert done.returncode == 7 and "warning: " in done.stderr


@pytest.mark.parametrize("name", [*BEFORE, "startContainer"])
def test_timeout(oci: Oci, bundle: Bundle, container_id: str, note: Path, name: str) -> None:
    hooks = {name: [{"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}]}
    began = time.monotonic()
    message = refused(oci("run", "-b", hooked(bundle, note, hooks), container_id))
    assert f"{name} hook #0 (/bin/sleep): did not end within 1 s and was killed" in message
    assert 0.9 < time.monotonic() - began < 5


@pytest.mark.parametrize("name", BEFORE)
def test_a_missing_hook(oci: Oci, bundle: Bundle, container_id: str, note: Path, name: str) -> None:
    place = hooked(bundle, note, {name: [{"path": "/no/such/hook"}]})
    message = refused(oci("create", "-b", place, container_id))
    assert f"{name} hook #0 (/no/such/hook): no such file or directory" in message


def test_a_hook_that_does_not_read_its_state(create: Create, bundle: Bundle, note: Path) -> None:
    create(place=hooked(bundle, note, {name: [shell("exec 0<&-; exit 0")] for name in BEFORE}))


def test_an_annotation_does_not_send_output_to_host_files(create: Create, bundle: Bundle, note: Path) -> None:
    """crun's run.oci.hooks.stdout: engines pass annotations of images on, and an image must not name host files."""
    annotations = {f"run.oci.hooks.{stream}": f"{note}/{stream}" for stream in ("stdout", "stderr")}
    place = hooked(bundle, note, {"createRuntime": [shell("echo out; echo err >&2")]}, annotations=annotations)
    create(place=place)
    assert not (note / "stdout").exists() and not (note / "stderr").exists()


def test_prestart_can_change_the_network(create: Create, bundle: Bundle, note: Path) -> None:
    """What CNI and netavark do by hook: the namespace of the process is there."""
    pid = "$(grep -o '\"pid\": *[0-9]*' | grep -o '[0-9]*')"
    hooks = {
        "prestart": [
            shell(f"PATH=$PATH:/usr/sbin:/sbin nsenter -n -t {pid} ip link add veth-h type veth peer name veth-p")
        ]
    }
    container = create(place=hooked(bundle, note, hooks, "sleep", "1000")).start()
    assert "veth-h" in container.ask("ip", "link")
