"""A real systemd in namespaces of its own inside the lab host: PID 1 with its tree of cgroups, its bus, and two units.

It reads only the unit files written here and owns the cgroup `/NAME` of the lab host, which is its `/`. Programs meet
it by `run`, as from a session: in its namespaces, in the cgroup of its `session.service`. With `user` it also starts
the service manager of that user, on a part of the tree that the first has delegated. No logins, no journal, no udev.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import leaks

UNIFIED = Path("/sys/fs/cgroup")
PROGRAM = "/lib/systemd/systemd"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
USER = 65534

# systemd looks for a socket and a service of these names to know when the bus is there.
UNITS = {
    "lab.target": "[Unit]\nDefaultDependencies=no\nRequires=dbus.service session.service lab-inner.slice\n",
    "session.service": """
        [Unit]
        DefaultDependencies=no
        [Service]
        Delegate=yes
        ExecStart=/bin/sleep infinity
        """,
    "dbus.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream={bus}\n",
    "dbus.service": """
        [Unit]
        DefaultDependencies=no
        Requires=dbus.socket
        [Service]
        ExecStart=/usr/bin/dbus-daemon --config-file={directory}/bus.conf --address=systemd: --nofork --nopidfile
        StandardOutput=append:{directory}/log
        StandardError=append:{directory}/log
        """,
}
USER_MANAGER = """
    [Unit]
    DefaultDependencies=no
    [Service]
    Type=notify
    User={user}
    Delegate=pids memory cpu
    Environment=XDG_RUNTIME_DIR={runtime}
    Environment=SYSTEMD_UNIT_PATH={directory}/user:{runtime}/systemd/user.control:{runtime}/systemd/transient
    Environment=SYSTEMD_GENERATOR_PATH={directory}/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH={directory}/none
    ExecStart=/lib/systemd/systemd --user --unit=lab.target --log-target=console
    StandardOutput=append:{directory}/log
    StandardError=append:{directory}/log
    """
# Anybody may talk to anybody but as the packages' own policy says for systemd: only root orders units.
BUS = """<busconfig>
  <type>system</type><auth>EXTERNAL</auth><listen>unix:path={bus}</listen>
  <policy context="default">
    <allow user="*"/><deny own="*"/><deny send_type="method_call"/><allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/><allow receive_type="method_return"/>
    <allow receive_type="error"/><allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <include>/usr/share/dbus-1/system.d/org.freedesktop.systemd1.conf</include>
</busconfig>
"""
USER_BUS = """<busconfig>
  <type>session</type><auth>EXTERNAL</auth><listen>unix:path={bus}</listen>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/>
  </policy>
</busconfig>
"""
# Outer: the new namespaces, and the process goes into its cgroup. Inner: that cgroup is the root of what is seen.
BOOT = """
echo 0 > {group}/cgroup.procs && mount --bind {directory}/log /dev/kmsg && mount -t tmpfs run /run &&
exec unshare --cgroup sh -c 'umount /sys/fs/cgroup && mount -t cgroup2 cgroup /sys/fs/cgroup &&
exec {program} --system --unit=lab.target --log-target=kmsg --show-status=no'
"""


class SystemdHost:
    """systemd, running from `boot` to `close`."""

    def __init__(self) -> None:
        self.directory = directory = Path(tempfile.mkdtemp(prefix="ovt-systemd-"))
        directory.chmod(0o755)  # the user's manager reads its units there
        self.group = UNIFIED / f"{leaks.PREFIX}-systemd"
        self.outer: subprocess.Popen[bytes] | None = None
        self.pid = 0
        for name in ("units", "user", "none"):
            (directory / name).mkdir()
        self.runtime = f"/run/user/{USER}"
        system, user = "/run/dbus/system_bus_socket", f"{self.runtime}/bus"
        self._write("units", UNITS, system, directory)
        self._write("units", {"user-manager.service": USER_MANAGER}, system, directory)
        (directory / "bus.conf").write_text(BUS.format(bus=system))
        changes = (("/bus.conf", "/user-bus.conf"), ("lab-inner.slice", "user.slice"))
        units = {name: text.replace(*changes[0]).replace(*changes[1]) for name, text in UNITS.items()}
        self._write("user", units, user, directory)
        (directory / "user-bus.conf").write_text(USER_BUS.format(bus=user))
        (directory / "log").touch()
        (directory / "log").chmod(0o666)

    def _write(self, place: str, units: Mapping[str, str], bus: str, directory: Path) -> None:
        for name, text in units.items():
            lines = [line.strip() for line in text.format(
                bus=bus, directory=directory, user=USER, runtime=self.runtime).splitlines()]  # fmt: skip
            (directory / place / name).write_text("\n".join(lines) + "\n")

    def boot(self) -> None:
        """Start it and wait until it and its bus answer."""
        controllers = (UNIFIED / "cgroup.controllers").read_text().split()
        (UNIFIED / "cgroup.subtree_control").write_text(" ".join([f"+{name}" for name in controllers]))
        self.group.mkdir()
        script = BOOT.format(group=self.group, directory=self.directory, program=PROGRAM)
        namespaces = ("--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        places = {
            "SYSTEMD_UNIT_PATH": f"{self.directory}/units:/run/systemd/system.control:/run/systemd/transient",
            "SYSTEMD_GENERATOR_PATH": f"{self.directory}/none",
            "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": f"{self.directory}/none",
        }
        with open(self.directory / "log", "ab") as log:
            self.outer = subprocess.Popen(
                ["unshare", *namespaces, "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**ENVIRONMENT, **places, "container": "lab"},
            )
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        self._until("its first process", lambda: children.read_text().strip())
        self.pid = int(children.read_text())
        running = Path(f"/proc/{self.pid}/comm")
        self._until("its start", lambda: running.read_text() == "systemd\n")
        self._until("its cgroups", lambda: (self.group / "system.slice/session.service/cgroup.procs").exists())
        self._until("its bus", lambda: self.busctl().returncode == 0)

    def _until(self, what: str, condition: Any, seconds: float = 60) -> None:
        assert self.outer
        deadline = time.monotonic() + seconds
        while not condition():
            alive = self.outer.poll() is None
            assert alive and time.monotonic() < deadline, f"systemd: {what} did not come\n{self.log()}"
            time.sleep(0.1)

    def log(self) -> str:
        """What it has logged, and its bus."""
        return (self.directory / "log").read_text(errors="replace")

    def busctl(self, user: bool = False) -> subprocess.CompletedProcess[str]:
        where = ("--user",) if user else ("--system",)
        return self.run("busctl", *where, "status", "org.freedesktop.systemd1", user=user)

    def run(
        self, *argv: object, user: bool = False, check: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program as from a session below it, root's or the user's; output is captured as text."""
        env = dict(ENVIRONMENT)
        cgroup = "/sys/fs/cgroup/system.slice/session.service/cgroup.procs"
        become: Sequence[str] = ()
        if user:
            env["XDG_RUNTIME_DIR"] = self.runtime
            cgroup = f"{self.user_tree}/app.slice/session.service/cgroup.procs"
            become = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
        options = {"text": True, "capture_output": True, "timeout": 60, "env": env, **options}
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        join = f'echo 0 > {cgroup} && exec "$@"'
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", *("--mount", "--pid", "--cgroup", "--uts", "--ipc"),
             "sh", "-c", join, "sh", *become, *map(str, argv)],
            **options,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, f"{argv} → {done.returncode}\n{done.stdout}{done.stderr}{self.log()}"
        return done

    user_tree = "/sys/fs/cgroup/system.slice/user-manager.service"

    def start_user(self) -> None:
        """Start the user's manager."""
        self.run("install", "-d", "-o", str(USER), "-g", str(USER), "-m", "700", self.runtime, check=True)
        self.run("systemctl", "start", "user-manager.service", check=True)
        self._until("the user's bus", lambda: self.busctl(user=True).returncode == 0)

    def show(self, unit: str, *names: str, user: bool = False) -> dict[str, str]:
        """`systemctl show`: the unit's properties of these names."""
        where = ("--user",) if user else ()
        done = self.run("systemctl", *where, "show", f"--property={','.join(names)}", unit, user=user, check=True)
        return dict([line.partition("=")[::2] for line in done.stdout.splitlines()])

    def close(self) -> None:
        """Kill it with everything below it."""
        if self.outer:
            (self.group / "cgroup.kill").write_text("1")
            self.outer.send_signal(signal.SIGKILL)
            self.outer.wait(20)
        shutil.rmtree(self.directory)
        for place, _, _ in os.walk(self.group, topdown=False):
            deadline = time.monotonic() + 10
            while True:
                try:
                    os.rmdir(place)
                    break
                except OSError:  # the killed leave one after the other
                    assert time.monotonic() < deadline, f"{place} is not empty"
                    time.sleep(0.05)
