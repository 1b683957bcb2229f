"""The runtime as a normal user, with one id mapped and with the ids that /etc/subuid grants.

The user is `daemon`, which every Debian has. Its subordinate ids, and a path to the code that it may walk, are put up
in a mount namespace of the test's own.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Bundle

pytestmark = pytest.mark.root
DAEMON = 1
RUNTIME = "/code/.venv/bin/ovt-runtime"
SINGLE: dict[str, Any] = {
    name: [{"containerID": 0, "hostID": DAEMON, "size": 1}] for name in ("uidMappings", "gidMappings")
}
RANGE: dict[str, Any] = {
    name: [
        {"containerID": 0, "hostID": DAEMON, "size": 1},
        {"containerID": 1, "hostID": 300_000, "size": 65_536},
    ]
    for name in ("uidMappings", "gidMappings")
}

Shell = Callable[..., "subprocess.CompletedProcess[str]"]
Make = Callable[..., Path]


@pytest.fixture
def base() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="ovt-rootless-"))
    place.chmod(0o755)
    for name in ("home", "code", "run"):
        (place / name).mkdir()
    for name in ("home", "run"):
        os.chown(place / name, DAEMON, DAEMON)
    yield place
    shutil.rmtree(place)


@pytest.fixture
def make(base: Path, bundle: Bundle, default_config: dict[str, Any]) -> Make:
    """A bundle that belongs to the user, configured as `spec --rootless` does."""

    def call(*arguments: str, maps: dict[str, Any], process: dict[str, Any] | None = None) -> Path:
        def edit(config: dict[str, Any]) -> None:
            kinds = ["user", "pid", "mount", "ipc", "uts"]
            config["linux"] |= {"namespaces": [{"type": kind} for kind in kinds], **maps}
            config["linux"].pop("resources", None)
            config["linux"].pop("cgroupsPath", None)
            config["mounts"] = [mount for mount in config["mounts"] if mount["type"] not in ("cgroup", "sysfs")]
            for mount in config["mounts"]:
                mount["options"] = [o for o in mount.get("options", []) if not o.startswith("gid=")]
            config["process"] |= process or {}
            config["root"]["readonly"] = False

        place = bundle(*arguments, edit=edit)
        target = base / "home" / place.name
        shutil.copytree(place, target, symlinks=True)
        subprocess.run(["chown", "-R", f"{DAEMON}:{DAEMON}", target], check=True)
        return target

    return call


@pytest.fixture
def shell(base: Path) -> Shell:
    """Run a script as the user; $RT is the runtime."""
    (base / "subid").write_text("daemon:300000:65536\n")

    def call(script: str, check: bool = True, subid: bool = True) -> "subprocess.CompletedProcess[str]":
        made = [path for path in ("/etc/subuid", "/etc/subgid") if not os.path.exists(path)]
        for path in made:  # a machine that never had subordinate ids may lack the files
            Path(path).touch()
        source = base / "subid" if subid else "/dev/null"
        prepare = (
            f"mount --bind {source} /etc/subuid; mount --bind {source} /etc/subgid; mount --bind {ROOT} {base}/code; "
            f'cd {base}/home; exec setpriv --reuid {DAEMON} --regid {DAEMON} --clear-groups sh -ec "$0"'
        )
        environment = {"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": f"{base}/run", "RT": f"{base}{RUNTIME}"}
        done = subprocess.run(["unshare", "--mount", "sh", "-ec", prepare, script], env=environment, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, timeout=60)  # fmt: skip
        for path in made:
            os.unlink(path)
        if check:
            assert done.returncode == 0, f"{script} → {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return call


def test_one_id_without_any_grant(shell: Shell, make: Make) -> None:
    script = "id -u; cat /proc/self/uid_map /proc/self/setgroups; echo x > /dev/null; touch /mine && stat -c %u /mine"
    out = shell(f"$RT run -b {make('sh', '-c', script, maps=SINGLE)} one", subid=False).stdout
    assert out.split() == ["0", "0", str(DAEMON), "1", "deny", "0"]


def test_granted_ids(shell: Shell, make: Make) -> None:
    script = "cat /proc/self/uid_map; touch /f; chown 5:6 /f; stat -c %u:%g /f"
    sets = {"capabilities": {name: ["CAP_CHOWN"] for name in ("bounding", "effective", "permitted")}}
    out = shell(f"$RT run -b {make('sh', '-c', script, maps=RANGE, process=sets)} many").stdout
    assert out.split() == ["0", str(DAEMON), "1", "1", "300000", "65536", "5:6"]


def test_a_user_with_groups(shell: Shell, make: Make) -> None:
    user = {"user": {"uid": 1000, "gid": 1000, "additionalGids": [5]}}
    out = shell(f"$RT run -b {make('sh', '-c', 'id -u; id -G', maps=RANGE, process=user)} user").stdout
    assert out.split() == ["1000", "1000", "5"]


def test_ids_that_are_not_granted(shell: Shell, make: Make) -> None:
    done = shell(f"$RT run -b {make('true', maps=RANGE)} many", check=False, subid=False)
    assert done.returncode == 1
    assert "newuidmap refused the mappings" in done.stderr or "newgidmap refused the mappings" in done.stderr
    assert "/etc/sub" in done.stderr
    assert json.loads(shell("$RT list --format json").stdout) == []


def test_a_life(shell: Shell, make: Make, base: Path) -> None:
    place = make("sleep", "1000", maps=RANGE)
    out = shell(
        f"""
        $RT create --pid-file pid -b {place} web > log 2>&1
        $RT state web | grep -o '"status": "[a-z]*"'
        $RT start web
        $RT list -q
        $RT exec web sh -c 'id -u; readlink /proc/self/ns/user'
        readlink /proc/$(cat pid)/ns/user
        ls -d $XDG_RUNTIME_DIR/ovt/web
        $RT kill web KILL
        while $RT state web | grep -q running; do sleep 0.05; done
        $RT delete web
        ls $XDG_RUNTIME_DIR/ovt
        """
    ).stdout.split("\n")
    assert out[:3] == ['"status": "created"', "web", "0"]
    assert out[3] == out[4] != os.readlink("/proc/self/ns/user")
    assert out[5:] == [f"{base}/run/ovt/web", ""]


def test_delete_by_force(shell: Shell, make: Make) -> None:
    place = make("sleep", "1000", maps=SINGLE)
    shell(
        f"""
        $RT run -d -b {place} web > log 2>&1
        $RT ps --format json web | grep -q '[0-9]'
        $RT delete --force web
        test -z "$($RT list -q)"
        """,
        subid=False,
    )


def test_without_a_user_namespace(shell: Shell, make: Make) -> None:
    place = make("true", maps=SINGLE)
    config = json.loads((place / "config.json").read_text())
    config["linux"]["namespaces"] = [entry for entry in config["linux"]["namespaces"] if entry["type"] != "user"]
    for name in SINGLE:
        del config["linux"][name]
    (place / "config.json").write_text(json.dumps(config))
    done = shell(f"$RT run -b {place} none", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "user" in done.stderr


def test_the_configuration_that_spec_writes(shell: Shell, make: Make) -> None:
    place = make(maps=SINGLE)
    script = f"""
        cd {place}; rm config.json; $RT spec --rootless
        sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"id"/' config.json
        $RT run spec
        """
    assert shell(script, subid=False).stdout.startswith("uid=0(root) gid=0(root)")
