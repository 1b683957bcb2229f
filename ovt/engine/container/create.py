"""create: from a bundle to a process that waits for `start`, everything recorded before it is made.

The order is chosen so that a kill -9 between any two lines leaves either nothing or a state directory from which
`delete --force` finds and removes the rest: the record names the cgroup, the process and the moved NICs before they
exist or change, and ovt-init ends by itself while it is not yet recorded.

It is also chosen for speed: what the kernel and the builder do meanwhile covers the import of what is needed next,
which is why some imports stand inside functions.
"""

from __future__ import annotations

import posix

from ovt.errors import OvtError
from ovt.kernel import cgroup as cgroups
from ovt.kernel import procfs
from ovt.kernel import syscalls as sc

from . import namespaces, plain, settle
from .init import Init, above
from .request import Request
from .state import FIFO, START_ERROR, STOPPED, State, now, write_pid_file
from .tape import Tape

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ovt.kernel.seccomp import Program

    from .builder import Builder, Built
    from .labels import Labels
    from .mounts import Mount
    from .process import Final
    from .rootfs import Rootfs

_O_RDWR_NEW = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC
_CAP_SYS_ADMIN = 21
_RLIMIT_NOFILE = 7
_MANY = 150  # bind mounts, each of them a descriptor for a while: often no more than 1024 are allowed


def create(root: str, container_id: str, config: dict[str, Any], request: Request) -> tuple[State, int]:
    """Make the container. Returns its state and the terminal's master (-1 without one, or when it was sent)."""
    return _Creation(root, container_id, config, request).run()


def begin(root: str, container_id: str, config: dict[str, Any], request: Request) -> tuple[State, cgroups.Cgroup]:
    """Claim the name for a container that something else brings to life (`restore`): its state and its cgroup."""
    creation = _Creation(root, container_id, config, request)
    return creation.state, creation.cgroup


class _Creation:
    def __init__(self, root: str, container_id: str, config: dict[str, Any], request: Request) -> None:
        self.root = root
        self.config = config
        self.request = request
        self.linux: dict[str, Any] = config.get("linux") or {}
        self.process: dict[str, Any] = config.get("process") or {}
        self.ns = namespaces.Namespaces(config)
        self.user_namespace = bool(self.ns.mask & sc.CLONE_NEWUSER)
        self.cgroup = cgroups.new(
            self.linux.get("cgroupsPath") or "",
            container_id,
            request.cgroup_manager,
            systemd_annotations=config.get("annotations") or {},
        )
        maker = posix.getpid()
        self.record: dict[str, Any] = {
            "pid": 0,
            "pid_start": 0,
            "maker": [maker, procfs.start_time(maker)],
            "ready": False,
            "created": now(),
            "bundle": request.bundle,
            "rootfs": _absolute((config.get("root") or {}).get("path") or "", request.bundle),
            "annotations": config.get("annotations") or {},
            "cgroup": cgroup_record(self.cgroup),
            "no_pivot": request.no_pivot or not self.ns.mask & sc.CLONE_NEWNS,
            "namespaces": self.ns.mask,
            "maps_root": self._maps_root(),
            "hooks": config.get("hooks") or {},
        }
        template = {name: self.linux[name] for name in ("seccomp", "personality") if self.linux.get(name)}
        template["process"] = self.process
        self.state = State.make(root, container_id, self.record, template)
        self.init: Init | None = None
        self.builder: Builder | None = None
        self.labels: Labels | None = None
        self.procfs: list[int] = []  # descriptors of the init, to be closed there
        self.network = -1  # the namespace that NICs were moved to: it must not end before they are back
        self.open: list[int] = []  # ours, closed at the end
        self.master = -1
        self.file_limit: tuple[int, int] | None = None  # ours as it was, where it had to be raised
        self.hooked = False  # hooks have been run, so that those of poststop are due in any case

    def run(self) -> tuple[State, int]:
        try:
            self._make()
        except BaseException:
            self._undo()
            raise
        finally:
            for fd in self.open:
                posix.close(fd)
            if self.file_limit:
                sc.prlimit(0, _RLIMIT_NOFILE, *self.file_limit)
        return self.state, self.master

    # the way there

    def _make(self) -> None:
        request = self.request
        request.keep_fds = request.keep_fds or len(request.descriptors)
        lowest = 3 + request.keep_fds
        if request.notify_socket:
            from . import notify

            self.config = notify.prepare(self.state.path, self.config)
            self.process = self.config["process"]
        self.cgroup.create()
        # made: from here on `delete` may kill and remove what is in it
        self.record["cgroup"] = cgroup_record(self.cgroup)
        enter = [self._own(fd, lowest) for fd in self.cgroup.enter_fds()]
        posix.mkfifo(f"{self.state.path}/{FIFO}", 0o600)
        # for writing too: else a `start` that is killed after opening it would look like an end of file, and start
        read_end = posix.O_RDWR | posix.O_NONBLOCK | posix.O_CLOEXEC
        fifo = self._own(posix.open(f"{self.state.path}/{FIFO}", read_end), lowest)
        errors = self._own(posix.open(f"{self.state.path}/{START_ERROR}", _O_RDWR_NEW, 0o600), lowest)
        joined = [(kind, flag, self._own(fd, lowest)) for kind, flag, fd in self.ns.open_joined()]
        delegated = self._delegation()
        below = delegated[2] if delegated else ""
        if delegated and below:
            self.cgroup.delegate(*delegated)
        into = -1 if enter or self.user_namespace else self._own_if(self.cgroup.fd(below), lowest)
        keep = [fifo, errors]
        if self.process.get("apparmorProfile") or self.process.get("selinuxLabel"):
            from .labels import Labels

            self.labels = Labels(self.process, lowest)
            self.open.append(self.labels.proc)
            keep.append(self.labels.proc)
        passing = [*enter, *([into] if into >= 0 else []), *(fd for _, _, fd in joined)]
        init = self.init = Init((*request.stdio, *request.descriptors), [*keep, *passing], lowest)
        tape = Tape()
        settle.enter_cgroup(tape, enter)
        if self.user_namespace:
            tape = self._enter_user_namespace(init, tape, joined)
        self._clone(init, tape, joined, into, keep)
        # while the kernel makes the namespaces
        from . import builder

        try:
            rootfs = self._open_rootfs(init)
        finally:
            pid = init.adopt_clone(tape)  # else nobody would know whom to reap
        self.record["pid"] = pid
        self.record["pid_start"] = procfs.start_time(pid)
        self.record["cgroup"] = cgroup_record(self.cgroup)
        self.state.save()
        if not enter and into < 0:
            self.cgroup.attach(pid, below)
            if (made := cgroup_record(self.cgroup)) != self.record["cgroup"]:  # systemd makes it only here
                self.record["cgroup"] = made
                self.state.save()
        if delegated and not below:
            self.cgroup.delegate(*delegated)
        self._settle_inside(init, rootfs)
        job = builder.Job(rootfs, self.config, pid, self.ns.mask & ~sc.CLONE_NEWTIME, self.ns.new)
        job.cgroup = self.record["cgroup"]
        job.pivot = not request.no_pivot
        job.map_root = self._maps_root()
        job.state = self._hook_state(pid)
        if rootfs is None:
            job.state["rootfs"] = self.record["rootfs"]
        self.builder = builder.Builder(job)
        beside = Tape()
        if self.ns.new & sc.CLONE_NEWNET:
            settle.loopback_up(beside)  # waits for locks of the network stack, so beside the builder
        init.send(beside)
        # while the builder mounts
        from . import process

        self._network_devices(pid)
        self.cgroup.apply(self.linux.get("resources") or {})
        if self.linux.get("intelRdt"):
            from . import intel_rdt

            intel_rdt.apply(self.state, self.linux["intelRdt"], pid)
        final = process.Final(self.process, "", lowest)
        seccomp = self._compile_seccomp(final)
        built = self._wait_for_builder(pid)
        init.wait(beside)
        process.apply_from_outside(pid, self.process)
        self._finish(init, final, built, fifo, errors, seccomp)
        self._publish(built)

    def _delegation(self) -> tuple[int, int, str] | None:
        """Whom the container's cgroup is given to, and which one below it, if the configuration asks for that."""
        if self.cgroup.mode != "v2":
            return None
        from ovt.kernel.cgroup import delegation

        return delegation.requested(self.config)

    def _own_if(self, fd: int, lowest: int) -> int:
        return self._own(fd, lowest) if fd >= 0 else -1

    def _own(self, fd: int, lowest: int = 3) -> int:
        fd = above(fd, lowest)
        self.open.append(fd)
        return fd

    def _enter_user_namespace(self, init: Init, tape: Tape, joined: list[tuple[str, int, int]]) -> Tape:
        """A user namespace comes first: it owns all namespaces made after it. Returns the tape to go on with."""
        if self.ns.new & sc.CLONE_NEWUSER:
            tape.call("create user namespace", "unshare", sc.CLONE_NEWUSER)
            init.play(tape)
            namespaces.write_maps(init.pid, self.linux.get("uidMappings") or [], self.linux.get("gidMappings") or [])
        else:
            fd = next(fd for kind, _, fd in joined if kind == "user")
            tape.call("join user namespace", "setns", fd, sc.CLONE_NEWUSER)
            init.play(tape)
        return Tape()

    def _clone(
        self, init: Init, tape: Tape, joined: list[tuple[str, int, int]], cgroup_fd: int, keep: list[int]
    ) -> None:
        """Send the tape that joins and makes namespaces and ends as the container's first process.

        That has no descriptors but its standard ones, those handed down with it, and `keep`.
        """
        if posix.geteuid() == 0:
            # a rootless runtime could not touch it any more
            tape.call("become undumpable", "prctl", sc.PR_SET_DUMPABLE, 0, 0, 0, 0)
        if self._maps_root():
            tape.call("become root of the user namespace", "setresgid", 0, 0, 0)
            tape.call("become root of the user namespace", "setresuid", 0, 0, 0)
        settle.enter_namespaces(tape, joined, self.ns.new, self.linux.get("timeOffsets") or {})
        later = sc.CLONE_NEWUSER | sc.CLONE_NEWCGROUP | sc.CLONE_NEWTIME
        tape.clone("create namespaces", sc.CLONE_PARENT | self.ns.new & ~later, cgroup_fd)
        init.close_inherited(tape, keep)
        init.send(tape)

    def _maps_root(self) -> bool:
        maps = self.linux.get("uidMappings") or []
        joined = self.user_namespace and not self.ns.new & sc.CLONE_NEWUSER
        return self.user_namespace and (joined or any(m["containerID"] == 0 for m in maps))

    def _open_rootfs(self, init: Init) -> Rootfs | None:
        if not self.ns.mask & sc.CLONE_NEWNS:
            return None
        from .rootfs import Rootfs

        rootfs = Rootfs(
            self.config,
            self.request.bundle,
            self.record["rootfs"],
            user_namespace=self.user_namespace,
            userns_for=lambda mount: self._user_namespace_for(mount, init.pid),
            overlay=self.request.overlay,
        )
        if len(rootfs.mounts) > _MANY:
            import resource

            self.file_limit = _, hard = resource.getrlimit(_RLIMIT_NOFILE)
            sc.prlimit(0, _RLIMIT_NOFILE, hard, hard)
        if sc.capget() >> _CAP_SYS_ADMIN & 1:
            try:
                rootfs.open()
            finally:
                self.open += rootfs.descriptors()
        return rootfs

    def _user_namespace_for(self, mount: Mount, init_pid: int) -> int:
        from . import idmap

        return idmap.namespace_for(mount, init_pid if self.user_namespace else 0)

    def _settle_inside(self, init: Init, rootfs: Rootfs | None) -> None:
        """What only the process itself can do: its cgroup namespace, its keyring, the procfs of its pid namespace."""
        tape = Tape()
        if self.ns.new & sc.CLONE_NEWCGROUP:
            # only now that it sits in its cgroup: the namespace's root is the cgroup it is made in
            tape.call("create cgroup namespace", "unshare", sc.CLONE_NEWCGROUP)
        if not self.request.no_new_keyring:
            if self.labels:
                self.labels.for_keys(tape)
            settle.join_keyring(tape, self.state.id)
        mounts = rootfs.proc_mounts() if rootfs else []
        for mount in mounts:
            settle.open_procfs(tape, mount.options.data)
        init.send(tape)
        for mount in mounts:
            made = init.wait(tape)[1]
            number = init.wait(tape)[1]
            if number >= 0:
                self.procfs.append(number)
                mount.tree = self._own(init.take(number), 3 + self.request.keep_fds)
            mount.inside_errno = -min(0, made or number)
        init.wait(tape)

    def _network_devices(self, pid: int) -> None:
        devices = self.linux.get("netDevices")
        if not devices:
            return
        from . import net_devices

        self.network = self._own(posix.open(f"/proc/{pid}/ns/net", posix.O_RDONLY | posix.O_CLOEXEC))
        net_devices.move_in(self.state, devices, self.network)

    def _compile_seccomp(self, final: Final) -> Program | None:
        profile = self.linux.get("seccomp")
        if not profile:
            return None
        from ovt.kernel import seccomp

        receiver = self.record["annotations"].get("run.oci.seccomp.receiver", "")
        program = seccomp.compile(profile, cache_dir=f"{self.root}/.seccomp", receiver=receiver)
        final.seccomp = (program.bpf, program.flags, program.notify)
        return program

    def _wait_for_builder(self, pid: int) -> Built:
        from .builder import Built

        assert self.builder is not None
        message, fds = self.builder.receive()
        if message.get("hooks"):
            from . import hooks

            self.hooked = True
            state = self._hook_state(pid)
            hooks.run(self.config.get("hooks"), "prestart", state)
            hooks.run(self.config.get("hooks"), "createRuntime", state)
            self.builder.proceed()
            message, fds = self.builder.receive()
        self.builder.reap()
        for fd in fds:
            self._own(fd, 3 + self.request.keep_fds)
        return Built(message, self.open[len(self.open) - len(fds) :] if fds else [])

    def _hook_state(self, pid: int) -> dict[str, Any]:
        return {
            "ociVersion": "1.3.0",
            "id": self.state.id,
            "status": "creating",
            "pid": pid,
            "bundle": self.record["bundle"],
            "root": self.record["rootfs"],
            "annotations": self.record["annotations"],
        }

    def _finish(
        self,
        init: Init,
        final: Final,
        built: Built,
        fifo: int,
        errors: int,
        seccomp: Program | None,
    ) -> None:
        from . import process

        tape = Tape()
        for number in self.procfs:
            tape.call("close", "close", number)
        if self.record["no_pivot"] and not self.request.no_pivot:
            path = self.record["rootfs"]
            tape.call(f"chdir {path}", "chdir", tape.text(path))
            tape.call(f"chroot {path}", "chroot", tape.text("."))
        elif self.request.no_pivot:
            # the new root lies on top of the old one: ".." of a root steps onto what is mounted there
            tape.call("enter the root", "chdir", tape.text("/.."))
            tape.call("chroot", "chroot", tape.text("."))
        tape.call("chdir /", "chdir", tape.text("/"))
        terminal = bool(self.process.get("terminal"))
        if self.record["namespaces"] & sc.CLONE_NEWNS:
            process.own_null(tape, self.request.stdio)
        if not terminal:
            process.own_stdio(self.request.stdio, self.process, self.linux if self.ns.new & sc.CLONE_NEWUSER else {})
        process.become_session(tape, terminal)
        process.personality(tape, self.linux)
        process.memory_policy(tape, self.linux)
        final.program = built.program
        final.user_namespace = self.user_namespace
        final.no_setgroups = _setgroups_denied(init.pid)
        if posix.geteuid() != 0:
            # only for a normal user: annotations come out of images too, and root's groups are not theirs to ask for
            final.no_setgroups |= self.record["annotations"].get("run.oci.keep_original_groups") == "1"
        final.fifo, final.error_file = fifo, errors
        final.labels = self.labels
        env: list[str] = list(self.process.get("env") or [])
        if built.home and not any(entry.startswith("HOME=") for entry in env):
            env.append(f"HOME={built.home}")
        if self.request.listen_fds:
            env += [f"LISTEN_FDS={self.request.listen_fds}", "LISTEN_PID=1"]
        final.process = {**self.process, "env": env}
        if not self.process.get("args"):
            final.process["args"] = [""]
        process.finish(tape, final, init.sync_fd)
        init.send(tape, (built.slave,) if terminal else ())
        _, value = init.wait(tape)
        if seccomp is not None and seccomp.notify:
            from . import seccomp_agent

            seccomp_agent.hand_over(init.pid, value, seccomp, self.state, self.process)
            init.tell()
            init.wait(tape)
        init.close()

    def _publish(self, built: Built) -> None:
        self.record["ready"] = True
        self.record["cgroup"] = cgroup_record(self.cgroup)
        if built.master >= 0 and self.request.console_socket:
            from . import console

            console.send_master(self.request.console_socket, built.master)
        self.state.save()
        plain.mark(self.state, self.process)
        if self.request.pid_file:
            write_pid_file(self.request.pid_file, self.state.pid)
        if built.master >= 0 and self.request.want_terminal:
            self.open.remove(built.master)
            self.master = built.master

    # the way back

    def _undo(self) -> None:
        """Leave nothing behind; what cannot be removed stays recorded for `delete --force`."""
        if self.builder is not None:
            self.builder.reap()
        if self.init is not None:
            self.init.close()
            self.init.reap()
        try:
            if self.network >= 0:
                from . import net_devices

                net_devices.undo(self.state, self.network)
            self.cgroup.kill()
            self.cgroup.remove()
        except (OSError, OvtError):
            return  # the first error is the one to tell; the record stays
        self.state.remove()
        if self.hooked:
            from . import hooks

            hooks.run(self.record["hooks"], "poststop", {**self._hook_state(0), "status": STOPPED}, [])


def cgroup_record(cgroup: cgroups.Cgroup) -> dict[str, Any] | None:
    """What the state keeps of it; None where cgroups are disabled, so that every verb sees that there is none."""
    return None if cgroup.manager == "disabled" else cgroup.record()


def _setgroups_denied(pid: int) -> bool:
    try:
        return procfs.read(f"/proc/{pid}/setgroups").startswith("deny")
    except FileNotFoundError:
        return False


def _absolute(path: str, bundle: str) -> str:
    return path if path.startswith("/") else f"{bundle}/{path}".rstrip("/") or "/"
