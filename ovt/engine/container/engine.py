"""The container engine for people: implements `ovt.engine.base.Engine` with the OCI runtime and the supervisor.

It turns an instance into an OCI configuration (bundle.py), lets the runtime make the container as a child of a
supervisor, and reaches into living containers. The runtime's own state lies below `run`/containers.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from ovt import image
from ovt.engine.base import Guest, Leftover, Process, Stats
from ovt.engine.container import bundle, facts, rootfs_layers, usage, users, view
from ovt.engine.container.runtime import Runtime
from ovt.errors import HostError, NotFound, OvtError, StateError, UsageError
from ovt.kernel.userns import Mapping, run_mapped
from ovt.model import Instance, Kind, Limits, Spec, Status

if TYPE_CHECKING:
    from ovt.engine.supervisor import Stdio

_STATUS = {"created": Status.CREATED, "running": Status.RUNNING, "paused": Status.PAUSED}


class ContainerEngine:
    """Containers with run-time state below `run`; archives are unpacked into `cache`; `report` hears of slow steps."""

    kind = Kind.CONTAINER

    def __init__(self, run: str, cache: str, report: Callable[[str], None] = lambda line: None) -> None:
        self.run = run
        self.cache = cache
        self.report = report
        self.rootless = facts.rootless()
        self.cgroups = facts.find_cgroups(run)
        self.runtime = Runtime(f"{run}/containers", self.cgroups.manager)

    # before and after life

    def prepare(self, spec: Spec) -> tuple[Spec, dict[str, Any]]:
        found = image.resolve(spec.image, self.cache, self.report, self._mapped)
        if spec.rootfs_in_place and found.cached:
            raise UsageError(f"{spec.image} is not a directory", "leave out --in-place")
        command = spec.command if spec.command or spec.entrypoint else found.command
        spec = spec._replace(image=found.reference, command=command, env=(*found.env, *spec.env))
        for volume in spec.volumes:
            if volume.source and not os.path.exists(volume.source):
                raise NotFound(f"there is no {volume.source} to show at {volume.target}", f"mkdir -p {volume.source}")
        rootfs: dict[str, Any] = {"layers": list(found.layers)}
        if found.digest:
            rootfs["digest"] = found.digest
        if spec.rootfs_in_place:
            rootfs["in_place"] = True
        # everything that can be wrong with the options is found now and not at the first start
        self._config(Instance("0" * 12, "new", Kind.CONTAINER, 0.0, spec, rootfs=rootfs), "/", bundle.User())
        return spec, rootfs

    def plan(self, instance: Instance, home: str) -> list[str]:
        config = self._config(instance, home, bundle.User())
        linux = config["linux"]
        if instance.rootfs.get("in_place"):
            lines = [f"root file system: {instance.rootfs['layers'][0]}, in place"]
        else:
            lines = [f"root file system: {home}/upper over {', '.join(instance.rootfs['layers'])}"]
        if linux.get("cgroupsPath"):
            lines.append(f"cgroup {linux['cgroupsPath']}: {json.dumps(linux.get('resources', {}))}")
        lines.append("new namespaces: " + " ".join(entry["type"] for entry in linux["namespaces"]))
        for mount in config["mounts"]:
            lines.append(
                f"mount {mount['type']} {mount['source']} on {mount['destination']} ({','.join(mount['options'])})"
            )
        process = config["process"]
        lines.append("capabilities: " + (" ".join(process["capabilities"]["effective"]) or "none"))
        lines.append(f"run {json.dumps(process['args'])} in {process['cwd']} as {instance.spec.user or 'root'}")
        return lines

    def create(self, instance: Instance, home: str, exit_command: list[str], env: dict[str, str]) -> Guest:
        from ovt.engine import supervisor

        spec = instance.spec
        uids, _ = self._mappings(instance)
        overlay = rootfs_layers.prepare(instance, home, uids, self.rootless)
        config = self._config(instance, home, self._user(instance, home, spec.user))
        self._write_files(instance, home, config)

        def make(stdio: Stdio) -> int:
            options: dict[str, Any] = {"overlay": view.by_descriptor(overlay) if overlay else None}
            if stdio.tty:
                options["console_socket"] = stdio.console_socket()
            options["stdio"] = (stdio.stdin, stdio.stdout, stdio.stderr)
            with self.parent_lock(fcntl.LOCK_SH):
                return int(self.runtime.create(instance.id, f"{home}/bundle", config, **options).pid)

        made = supervisor.launch(
            home,
            make,
            name=instance.name,
            tty=spec.tty,
            stdin=spec.stdin,
            log=f"{home}/log",
            exit_command=exit_command,
            env=env,
        )
        return Guest(made.child_pid, made.child_start_time, made.pid, made.start_time)

    def start(self, instance: Instance) -> None:
        self.runtime.start(instance.id)

    def cleanup(self, instance: Instance, home: str) -> bool:
        starved = usage.out_of_memory(self.runtime.root, instance.id)
        self.runtime.delete(instance.id, force=True)
        usage.remove_unrecorded(self.runtime.root, [instance.id])
        try:
            with self.parent_lock(fcntl.LOCK_EX | fcntl.LOCK_NB):
                usage.remove_parents(self.cgroups.parent)
        except BlockingIOError:
            pass  # a container is just being made there
        return starved

    def exit_code(self, instance: Instance, home: str, code: int) -> int:
        return code

    def destroy(self, instance: Instance, home: str) -> None:
        rootfs_layers.destroy(home, self._mapped)

    def leftovers(self, owned: Callable[[str], bool], remove: bool = False) -> list[Leftover]:
        found = []
        for state in self.runtime.list():
            if not owned(state["id"]):
                found.append(Leftover("container", state["id"], f"{state['status']}, and no instance owns it"))
                if remove:
                    self.runtime.delete(state["id"], force=True)
        unrecorded = [name for name in usage.unrecorded(self.runtime.root) if not owned(name)]
        found += [Leftover("container", name, "half made or half removed") for name in unrecorded]
        if remove:
            usage.remove_unrecorded(self.runtime.root, unrecorded)
        directories = list(usage.cgroup_directories(self.cgroups.parent))
        used = {state["id"] for state in self.runtime.list()}  # the runtime records a container before its cgroup
        unused = [path for path in directories if path.rsplit("/", 1)[1] not in used]
        for id in sorted({path.rsplit("/", 1)[1] for path in unused}):
            found.append(Leftover("cgroup", f"{self.cgroups.parent}/{id}", "no container uses it"))
        for path in image.half_made(self.cache):
            found.append(Leftover("image", path, "its unpacking was interrupted"))
            if remove:
                import shutil

                self._mapped(partial(shutil.rmtree, path))
        if remove:
            for path in unused:
                usage.remove_cgroup(path)
        return found

    # life

    def status(self, instance: Instance) -> Status:
        try:
            return _STATUS.get(self.runtime.state(instance.id)["status"], Status.STOPPED)
        except NotFound:
            return Status.STOPPED

    def signal(self, instance: Instance, signal: int, everyone: bool = False) -> None:
        try:
            self.runtime.kill(instance.id, signal, everyone)
        except (NotFound, StateError):
            pass  # it has ended, which is what most signals are for

    def freeze(self, instance: Instance, frozen: bool) -> None:
        self._need_cgroup("pausing")
        if frozen:
            self.runtime.pause(instance.id)
        else:
            self.runtime.resume(instance.id)

    def update(self, instance: Instance, limits: Limits) -> None:
        changes = bundle.limit_changes(instance.spec.limits, limits)
        if changes:
            self._need_cgroup("a limit")
            self.runtime.update(instance.id, changes)

    def processes(self, instance: Instance) -> list[dict[str, Any]]:
        return [found for pid in self._pids(instance) if (found := usage.process(pid))]

    def _pids(self, instance: Instance) -> list[int]:
        if self.cgroups.parent:
            return self.runtime.pids(instance.id)
        return usage.same_pid_namespace(instance.pid)

    def stats(self, instance: Instance) -> Stats:
        data = self.runtime.stats(instance.id) if self.cgroups.parent else {}
        return usage.stats(data, instance.pid, self._pids(instance))

    def exec(self, instance: Instance, home: str, process: Process, detach: bool) -> int:
        from ovt.engine.container.streams import Streams

        spec = instance.spec
        security = spec.security._replace(privileged=spec.security.privileged or process.privileged)
        inner = spec._replace(
            command=process.command,
            entrypoint=None,
            init=False,
            env=(*spec.env, *process.env),
            workdir=process.workdir or spec.workdir,
            user=process.user or spec.user,
            tty=process.tty,
            security=security,
        )
        root = view.living(instance.pid, instance.start_time)
        try:
            user = users.lookup(root, inner.user)
        finally:
            os.close(root)
        known = self._facts(instance)
        data = bundle.process(inner, instance.name, known, user, *bundle.capabilities(inner, known))
        streams = Streams(process.stdin and not detach, process.tty or detach)
        try:
            pid, master = self.runtime.exec_terminal(
                instance.id, data, stdio=streams.given, want_terminal=process.tty and not detach
            )
            return pid if detach else streams.run(pid, master)
        finally:
            streams.close()

    def copy(self, instance: Instance, home: str, alive: bool, source: str, target: str, into: bool) -> None:
        from ovt.engine.container.copy import Side, copy

        uids, gids = self._mappings(instance)

        # a living one's root is opened before a normal user enters a namespace from where it may not look into it
        living = view.living(instance.pid, instance.start_time) if alive else -1

        def run() -> None:
            host_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            guest_root = living if alive else rootfs_layers.open_resting(instance, home, self.rootless)
            try:
                path, shown = (target, f"{instance.name}:{target}") if into else (source, f"{instance.name}:{source}")
                guest = Side(guest_root, path, shown)
                host = Side(host_root, source if into else target, source if into else target)
                if into:
                    first = (uids[0][1], gids[0][1]) if uids and not self.rootless else (0, 0)
                    copy(host, guest, lambda uid, gid: first)
                else:
                    caller = (os.geteuid(), os.getegid())
                    copy(guest, host, lambda uid, gid: caller, setid=False)
            finally:
                os.close(host_root)
                if not alive:
                    os.close(guest_root)

        try:
            self._mapped(run)
        finally:
            if alive:
                os.close(living)

    # shared

    @contextmanager
    def parent_lock(self, operation: int) -> Iterator[None]:
        """Shared while a cgroup is made below our parent cgroup, exclusive while the empty parent is taken away."""
        fd = os.open(f"{self.run}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, operation)
            yield
        finally:
            os.close(fd)

    def _need_cgroup(self, what: str) -> None:
        if not self.cgroups.parent:
            raise HostError(f"{what} needs a cgroup, and none can be made here", hint="ovt check")

    def _mapped(self, function: Callable[[], None]) -> None:
        """Run what makes or removes files of a container's owners: a normal user needs its subordinate ids for it."""
        if self.rootless:
            run_mapped(*facts.own_mappings(), function)
        else:
            function()

    def _mappings(self, instance: Instance) -> tuple[tuple[Mapping, ...], tuple[Mapping, ...]]:
        if self.rootless:
            return facts.own_mappings()
        if instance.spec.security.userns == "auto":
            return rootfs_layers.own_range(instance), rootfs_layers.own_range(instance)
        return (), ()

    def _facts(self, instance: Instance) -> bundle.Facts:
        return facts.gather(self.cgroups, *self._mappings(instance))

    def _user(self, instance: Instance, home: str, text: str) -> bundle.User:
        if not text or text in {"0", "root", "0:0"}:
            return bundle.User()
        result: list[bundle.User] = []
        if not self.rootless:
            root = rootfs_layers.open_resting(instance, home, False)
            try:
                return users.lookup(root, text)
            finally:
                os.close(root)
        # the layers of a normal user are readable without the namespace that mounting them would need
        for layer in (f"{home}/upper", *instance.rootfs["layers"]):
            root = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                result.append(users.lookup(root, text))
            except NotFound:
                continue
            finally:
                os.close(root)
        if not result:
            raise NotFound(f"the image has no user {text!r}", "a number works without an entry in /etc/passwd")
        return result[0]

    def _config(self, instance: Instance, home: str, user: bundle.User) -> dict[str, Any]:
        spec = instance.spec
        known = self._facts(instance)
        shifted = bool(known.uid_mappings) and not self.rootless
        profile = None
        if spec.security.seccomp not in {"", "unconfined"}:
            from ovt.engine.container import seccomp_profile

            profile = seccomp_profile.read(spec.security.seccomp, known.machine, bundle.capabilities(spec, known)[0])
        files = [(f"{home}/files/hosts", "/etc/hosts"), (f"{home}/files/hostname", "/etc/hostname")]
        if spec.network == "host" and os.path.exists("/etc/resolv.conf"):
            files.append(("/etc/resolv.conf", "/etc/resolv.conf"))
        return bundle.config(
            spec,
            instance.id,
            instance.name,
            rootfs_layers.path(instance, home, shifted) if home != "/" else "rootfs",
            facts=known,
            user=user,
            nodes=facts.nodes(spec.devices, spec.security.privileged),
            files=files,
            seccomp=profile,
        )

    def _write_files(self, instance: Instance, home: str, config: dict[str, Any]) -> None:
        hostname = config["hostname"]
        hosts = bundle.hosts_file(hostname, instance.spec.add_hosts)
        if instance.spec.network == "host" and os.path.exists("/etc/hosts"):
            with open("/etc/hosts", encoding="utf-8", errors="surrogateescape") as file:
                hosts = file.read() + bundle.hosts_file(hostname, instance.spec.add_hosts).split("\n", 2)[2]
        for directory in ("files", "bundle"):
            os.makedirs(f"{home}/{directory}", exist_ok=True)
        texts = {"files/hosts": hosts, "files/hostname": hostname + "\n", "bundle/config.json": json.dumps(config)}
        try:
            for name, text in texts.items():
                with open(f"{home}/{name}", "w", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(text)
                os.chmod(f"{home}/{name}", 0o644)  # read by whoever the container's root is
        except OSError as error:
            raise HostError(f"{error.filename}: {error.strerror}", error.errno or 0) from error


__all__ = ["ContainerEngine", "OvtError"]
