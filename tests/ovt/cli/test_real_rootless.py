"""`ovt` as a normal user: the same verbs, with the ids that /etc/subuid grants.

The user is `daemon`, which every Debian has; its subordinate ids, and a path to the code that it may walk, are put up
in a mount namespace of the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ovt.image import kernel

pytestmark = pytest.mark.root

ROOT = Path(__file__).resolve().parents[3]
DAEMON = 1
User = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def user() -> Iterator[User]:
    """Run a shell script as the user; `ovt` is on its path, $HOME its own."""
    base = Path(tempfile.mkdtemp(prefix="ovt-rootless-"))
    base.chmod(0o755)
    for name in ("home", "code", "bin", "run", "cache"):
        (base / name).mkdir()
    for name in ("home", "run", "cache"):
        os.chown(base / name, DAEMON, DAEMON)
    (base / "subid").write_text("daemon:300000:65536\n")
    site = Path(sysconfig.get_path("purelib")).relative_to(ROOT)
    launcher = f'#!/bin/sh\nexport PYTHONPATH="{base}/code:{base}/code/{site}" PYTHONDONTWRITEBYTECODE=1\n'
    (base / "bin/ovt").write_text(launcher + 'exec /usr/bin/python3 -m ovt.cli "$@"\n')
    (base / "bin/ovt").chmod(0o755)
    environment = {
        "PATH": f"{base}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(base / "home"),
        "XDG_RUNTIME_DIR": str(base / "run"),
        "XDG_CACHE_HOME": str(base / "cache"),
    }
    for name in ("cache/ovt", "cache/ovt/kernel"):
        (base / name).mkdir()
        os.chown(base / name, DAEMON, DAEMON)
    there = kernel.cached()  # root's, which need not be fetched once more
    kernels = f"mount --bind {there.directory.parent} {base}/cache/ovt/kernel; " if there else ""
    prepare = (
        f"mount --bind {base}/subid /etc/subuid; mount --bind {base}/subid /etc/subgid; "
        f"{kernels}"
        f"mount --bind {ROOT} {base}/code; cd {base}/home; "
        f'exec setpriv --reuid {DAEMON} --regid {DAEMON} --clear-groups sh -ec "$1"'
    )

    def run(script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        # a machine that never had subordinate ids may lack the files
        made = [path for path in ("/etc/subuid", "/etc/subgid") if not os.path.exists(path)]
        for path in made:
            Path(path).touch()
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", prepare, "sh", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        for path in made:
            os.unlink(path)
        if check:
            assert done.returncode == 0, f"{script} → {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    yield run
    run('ids=$(ovt ps -aq); [ -z "$ids" ] || ovt delete -f $ids', check=False)
    shutil.rmtree(base)


def test_run(user: User) -> None:
    script = (
        "id -u; cat /proc/self/uid_map; touch /new; chown 5:6 /new; stat -c %u:%g /new; grep Seccomp: /proc/self/status"
    )
    done = user(f"ovt run --rm -e A=1 busybox sh -c '{script}; exit 5' || echo $?")
    assert done.stdout.split() == [
        *("0", "0", str(DAEMON), "1", "1", "300000", "65536", "5:6", "Seccomp:", "2", "5"),
    ]


def test_a_life(user: User) -> None:
    done = user(
        """
        ovt run -d --name web busybox sh -c 'echo up; sleep 100'
        ovt ps --format '{{.name}} {{.status}}'
        ovt exec web hostname
        echo words > file
        ovt cp file web:/tmp/file
        ovt exec web cat /tmp/file
        ovt logs web
        ovt stop -t 0 web
        ovt cp web:/tmp/file back
        cat back
        ovt start web
        ovt exec web cat /tmp/file
        ovt delete -f web
        ls .local/share/ovt/instances
        """
    )
    assert done.stdout.split() == [
        *("web", "web", "running", "web", "words", "up", "web", "words", "web", "words", "web"),
    ]


@pytest.mark.qemu
def test_a_machine(user: User) -> None:
    done = user(
        """
        ovt run -d --vm --name lab busybox sleep 1000
        ovt exec lab uname -s
        pid=$(ovt inspect --format '{{.pid}}' lab)
        stat -c %u /proc/$pid
        grep -E '^(CapEff|Seccomp):' /proc/$pid/status
        ovt save lab
        ovt start lab
        ovt exec lab hostname
        ovt delete -f lab
        ls .local/share/ovt/instances
        """
    )
    assert done.stdout.split() == [
        *("lab", "Linux", str(DAEMON), "CapEff:", "0000000000000000", "Seccomp:", "2", "lab", "lab", "lab", "lab"),
    ]


def test_layers_of_other_owners_are_removed(user: User) -> None:
    user("ovt run --name a -u 7 --tmpfs /x busybox true; ovt run --name b busybox chown -R 7:7 /tmp; ovt delete a b")
    assert user("ovt ps -aq").stdout == ""


def test_check_names_what_is_missing(user: User) -> None:
    data = json.loads(user("ovt check --format json").stdout)
    states = {item["name"]: item["state"] for item in data["checks"]}
    assert states["id mapping"] == states["overlay"] == "ok"
    assert data["leftovers"] == []


def test_what_needs_a_cgroup_says_so(user: User) -> None:
    done = user("ovt run --rm --memory 10M busybox true", check=False)
    assert done.returncode == 125
    assert "need a cgroup" in done.stderr
    assert "try: ovt check" in done.stderr


def test_without_subordinate_ids(user: User) -> None:
    Path(os.path.dirname(user("pwd").stdout.strip()), "subid").write_text("someone:1:1\n")
    done = user("ovt run --rm busybox true", check=False)
    assert done.returncode == 125
    assert "grants daemon no ids" in done.stderr
    assert "usermod --add-subuids" in done.stderr
