"""The tests of this directory once more under a kernel with cgroup v2 alone: memory, pids, cpu and io in one tree.

User Mode Linux is a kernel that runs as a process (Debian package user-mode-linux): it sees this machine's files
read-only, needs no privilege and no virtualization, and is up in two seconds. Hosts with v1 in use have no other way
to show that limits of v2 bite.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[3]

INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run TMPDIR=/run PYTHONDONTWRITEBYTECODE=1 NO_COLOR=1
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup && mount -t devtmpfs dev /dev
cd {root} && echo controllers: $(cat /sys/fs/cgroup/cgroup.controllers)
{python} -m pytest -q --color=no -p no:cacheprovider --basetemp=/run/pytest {here} --ignore {this} 2>&1
halt -f -p
"""


@pytest.mark.slow
def test_on_a_kernel_with_cgroup_v2_alone(tmp_path: Path) -> None:
    kernel = shutil.which("linux.uml")
    if kernel is None:
        pytest.skip("needs user-mode-linux")
    init = tmp_path / "init"
    init.write_text(INIT.format(root=ROOT, python=sys.executable, here=HERE, this=__file__))
    init.chmod(0o755)
    done = subprocess.run(
        [
            kernel,
            "mem=768M",
            "root=/dev/root",
            "rootfstype=hostfs",
            "hostfs=/",
            "ro",
            f"init={init}",
            "con=null",
            "con0=null,fd:2",
            "con1=fd:0,fd:1",
            "quiet",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": "/dev/shm"},
        timeout=110,
        text=True,
        errors="replace",
        check=False,
    )
    output = done.stdout
    for name in ("cpu", "memory", "pids"):
        assert name in output.partition("controllers:")[2].partition("\n")[0], output
    summary = [line for line in output.splitlines() if " passed" in line]
    assert summary and "failed" not in summary[-1] and "error" not in summary[-1], output
