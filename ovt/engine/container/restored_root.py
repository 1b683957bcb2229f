"""The surroundings in which CRIU restores: a mount namespace of its own with the container's root in place.

CRIU wants the root to be a mount point, with every mount point below it present. Both are made in a private mount
namespace that ends with CRIU, so a killed restore leaves no mount behind. The process that unshares becomes CRIU.
"""

from __future__ import annotations

import posix
from fcntl import F_DUPFD_CLOEXEC, fcntl

from ovt.errors import HostError
from ovt.kernel import procfs
from ovt.kernel import syscalls as sc

from . import criu, paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Job:
    """One run of `criu restore`.

    stdio  what becomes its descriptors 0 to 2, and so those of the container
    keep   descriptors that become 3, 4 …, as `argv` names them
    """

    def __init__(
        self,
        argv: list[str],
        rootfs: str,
        root: str,
        config: dict[str, Any],
        stdio: tuple[int, int, int],
        keep: list[int],
    ) -> None:
        self.argv = argv
        self.rootfs = rootfs
        self.root = root
        self.config = config
        self.stdio = stdio
        self.keep = keep

    def run(self, log: str, enter_cgroup: Callable[[int], None] | None) -> None:
        """Run it to its end; HostError when the surroundings or CRIU fail."""
        try:
            posix.mkdir(self.root, 0o700)
        except FileExistsError:
            pass  # from a restore that was killed
        go_read, go_write = posix.pipe2(posix.O_CLOEXEC)
        fault_read, fault_write = posix.pipe2(posix.O_CLOEXEC)
        complaints = posix.memfd_create("criu", posix.MFD_CLOEXEC)
        pid = posix.fork()
        if pid == 0:
            self._become_criu(go_read, go_write, fault_write)
        posix.close(go_read)
        posix.close(fault_write)
        try:
            try:
                if enter_cgroup is not None:
                    enter_cgroup(pid)
                posix.write(go_write, b"g")
            finally:
                posix.close(go_write)  # without the byte the child ends
                fault = posix.read(fault_read, 4096).decode("utf-8", "replace")
                status = posix.waitstatus_to_exitcode(posix.waitpid(pid, 0)[1])
            if fault:
                raise HostError(f"cannot prepare the restore: {fault}")
            if status:
                raise criu.failure("restore", status, log, complaints)
        finally:
            posix.close(fault_read)
            posix.close(complaints)
            posix.rmdir(self.root)

    def _become_criu(self, go: int, go_write: int, fault: int) -> None:
        try:
            posix.close(go_write)
            if posix.read(go, 1) != b"g":
                posix._exit(1)
            argv = self.argv + self._cgroup_roots()
            self._prepare()
            fds = [*self.stdio, *self.keep]
            # out of the way first, so that no target overwrites a source
            sources = [fcntl(fd, F_DUPFD_CLOEXEC, len(fds) + 64) for fd in fds]
            fault = fcntl(fault, F_DUPFD_CLOEXEC, len(fds) + 64)
            for number, source in enumerate(sources):
                posix.dup2(source, number, inheritable=True)
            posix.execve(argv[0], argv, criu.environment())
        except BaseException as error:
            posix.write(fault, f"{type(error).__name__}: {error}".encode()[:4096])
        finally:
            posix._exit(1)

    def _cgroup_roots(self) -> list[str]:
        """CRIU puts the restored processes below the cgroups that it was itself put in."""
        if "--manage-cgroups=ignore" in self.argv:
            return []
        argv = []
        for line in procfs.read("/proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                argv += ["--cgroup-root", f"{controller}:{path}" if controller else path]
        return argv

    def _prepare(self) -> None:
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount(None, "/", None, sc.MS_REC | sc.MS_SLAVE)
        sc.mount(self.rootfs, self.root, None, sc.MS_BIND | sc.MS_REC)
        sc.mount(None, self.root, None, sc.MS_REC | sc.MS_PRIVATE)
        root = posix.open(self.root, paths.O_PATH | posix.O_DIRECTORY | posix.O_CLOEXEC)
        try:
            self._make_mount_points(root)
        finally:
            posix.close(root)

    def _make_mount_points(self, root: int) -> None:
        """What images of a root filesystem leave out: places for mounts that lie on the root filesystem itself.

        Those on a tmpfs come with it, and those inside another mount are that one's own business.
        """
        covered: list[list[str]] = []
        for mount in self.config.get("mounts") or []:
            where = paths.parts(mount["destination"])
            if where and not any(where[: len(above)] == above for above in covered):
                source = mount.get("source") or ""
                is_bind = bool({"bind", "rbind"} & set(mount.get("options") or []))
                if is_bind and posix.stat(source).st_mode & 0o170000 != 0o040000:
                    posix.close(paths.make_file(root, "/".join(where)))
                else:
                    posix.close(paths.make_directory(root, "/".join(where)))
            covered.append(where)
