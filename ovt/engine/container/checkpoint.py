"""Checkpoint and restore of a container through CRIU (criu.org), by its plain command line.

Options are a dict whose keys are the long flags of the `checkpoint` and `restore` commands (`image-path`,
`leave-running` …). What CRIU must leave alone because it is the host's is found by looking at the running
container, not guessed from its configuration: every mount of a filesystem that the host has mounted too.

An image directory holds CRIU's images, `descriptors.json` (what the init's first three descriptors were) and
`mounts.json` (the host's mounts that restore has to provide again). Not covered: containers with a terminal, whose
master CRIU hands out only over its RPC protocol.
"""

from __future__ import annotations

import posix

from ovt.errors import ConfigError, HostError, NotFound, StateError, UsageError
from ovt.kernel import jsonc, procfs

from . import criu

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DESCRIPTORS = "descriptors.json"
MOUNTS = "mounts.json"

_FLAGS = {
    "leave-running": "--leave-running",
    "tcp-established": "--tcp-established",
    "tcp-skip-in-flight": "--skip-in-flight",
    "tcp-close": "--tcp-close",
    "link-remap": "--link-remap",
    "ext-unix-sk": "--ext-unix-sk",
    "shell-job": "--shell-job",
    "file-locks": "--file-locks",
    "auto-dedup": "--auto-dedup",
    "lazy-pages": "--lazy-pages",
}
_VALUES = {
    *("image-path", "work-path", "parent-path", "pre-dump", "page-server", "status-fd"),
    *("manage-cgroups-mode", "network-lock", "empty-ns", "lsm-profile", "lsm-mount-context"),
}
OPTIONS = frozenset({*_FLAGS, *_VALUES})
_RESTORE_ONLY = ("lsm-profile", "lsm-mount-context")
_DUMP_ONLY = ("leave-running", "tcp-skip-in-flight", "link-remap")
CGROUP_MODES = ("soft", "full", "strict", "ignore")
# CRIU can make namespaces of these kinds join what the caller hands it; the other joined ones it enters by path.
_EXTERNAL_NAMESPACES = {"network": ("net", "extRootNetNS"), "pid": ("pid", "extRootPidNS")}
_JOINED_NAMESPACES = {"ipc": "ipc", "uts": "uts", "mount": "mnt", "user": "user", "time": "time"}
# Filesystems that CRIU makes anew although the host may have the same one mounted.
_VIRTUAL = frozenset({"proc", "sysfs", "mqueue", "devpts", "cgroup2"})


def checkpoint(state: dict[str, Any], config: dict[str, Any], options: dict[str, Any]) -> None:
    """Dump the container of the state record `state` (pid, rootfs, cgroup) into options["image-path"].

    Afterwards its processes are gone unless `leave-running` or `pre-dump` is set; the caller removes the rest.
    """
    _check(options)
    program = criu.find()
    pid: int = state["pid"]
    pre_dump = bool(options.get("pre-dump"))
    if (config.get("process") or {}).get("terminal"):
        raise StateError(
            "a container with a terminal cannot be checkpointed", hint="run it with process.terminal false"
        )
    if pre_dump or options.get("parent-path"):
        criu.require(program, "mem_dirty_track", "a checkpoint in steps")
    if options.get("lazy-pages"):
        criu.require(program, "uffd-noncoop", "lazy-pages")
    images, work = _directories(options, create=True)
    log = f"{work}/dump.log"
    argv = [program, "pre-dump" if pre_dump else "dump", "--tree", str(pid), "--root", state["rootfs"]]
    argv += ["--images-dir", images, "--work-dir", work, "--log-file", "dump.log", "-v4"]
    argv += _common(options, config, ())
    argv += _parent(options, images)
    argv += _page_server(options)
    if options.get("status-fd") is not None and int(options["status-fd"]) >= 0:
        fd = int(options["status-fd"])
        posix.set_inheritable(fd, True)
        argv += ["--status-fd", str(fd)]
    freezer = _cgroup_path(state, "freezer")
    if freezer:
        argv += ["--freeze-cgroup", freezer]
    for kind, path in _joined(config):
        if kind in _EXTERNAL_NAMESPACES:
            name, key = _EXTERNAL_NAMESPACES[kind]
            argv += ["--external", f"{name}[{posix.stat(path).st_ino}]:{key}"]
    if not pre_dump:
        own_cgroups = any(entry["type"] == "cgroup" for entry in _linux(config).get("namespaces") or [])
        theirs, ours = (procfs.read(f"/proc/{who}/mountinfo", 16 << 20) for who in (pid, "self"))
        external = external_mounts(theirs, ours, own_cgroups)
        for mount in external:
            argv += ["--external", f"mnt[{mount['destination']}]:{mount['destination']}"]
        _write(f"{images}/{DESCRIPTORS}", jsonc.dumps(_descriptors(pid)))
        _write(f"{images}/{MOUNTS}", jsonc.dumps(external))
    criu.run(argv, log)


def restore(
    state: dict[str, Any],
    config: dict[str, Any],
    options: dict[str, Any],
    *,
    directory: str,
    stdio: tuple[int, int, int] = (0, 1, 2),
    enter_cgroup: Callable[[int], None] | None = None,
) -> int:
    """Bring the container of an image directory back to life; returns the pid of its init, a child of the caller.

    `directory` is one of the caller's (the container's state directory) for files of the moment. `enter_cgroup` is
    called with the pid of criu before it starts: what it restores stays below the cgroup that it is put in.
    """
    from . import restored_root

    _check(options)
    program = criu.find()
    images, work = _directories(options, create=False)
    log = f"{work}/restore.log"
    pidfile = f"{directory}/criu.pid"
    root = f"{directory}/criu-root"
    argv = [program, "restore", "--restore-detached", "--restore-sibling", "--pidfile", pidfile, "--root", root]
    argv += ["--images-dir", images, "--work-dir", work, "--log-file", "restore.log", "-v4", "--evasive-devices"]
    argv += _common(options, config, _DUMP_ONLY)
    argv += [f"--{name}={options[name]}" for name in _RESTORE_ONLY if options.get(name)]
    for mount in _recorded(images, MOUNTS):
        argv += ["--external", f"mnt[{mount['destination']}]:{_provider(mount, state, config)}"]
    for number, target in enumerate(_recorded(images, DESCRIPTORS)):
        if target.startswith(("pipe:", "socket:")):
            argv += ["--inherit-fd", f"fd[{number}]:{target}"]
    opened = []
    try:
        for kind, path in _joined(config):
            if kind in _EXTERNAL_NAMESPACES:
                opened.append(posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC))
                argv += ["--inherit-fd", f"fd[{2 + len(opened)}]:{_EXTERNAL_NAMESPACES[kind][1]}"]
            elif kind in _JOINED_NAMESPACES:
                argv += ["--join-ns", f"{_JOINED_NAMESPACES[kind]}:{path}"]
            else:
                raise ConfigError("$.linux.namespaces", f"a {kind} namespace joined by path cannot be restored")
        job = restored_root.Job(argv, state["rootfs"], root, config, stdio, opened)
        job.run(log, enter_cgroup)
    finally:
        for fd in opened:
            posix.close(fd)
    pid = int(procfs.read(pidfile).strip())
    posix.unlink(pidfile)
    return pid


def external_mounts(container: str, host: str, cgroup_namespace: bool) -> list[dict[str, str]]:
    """The mounts of the container (its mountinfo text) that belong to the host (its mountinfo text), in order.

    Each is {"destination", "root", "type", "options"}: where it is in the container, which part of its filesystem
    it shows, the filesystem and the superblock's options. Hierarchies of cgroup v1 are the container's own only in
    a cgroup namespace; without one they are binds of parts of the host's.
    """
    shared = {entry[0] for entry in _parse(host)}
    made_anew = _VIRTUAL | {"cgroup"} if cgroup_namespace else _VIRTUAL
    return [
        {"destination": destination, "root": root, "type": kind, "options": options}
        for device, root, destination, kind, options in _parse(container)
        if destination != "/" and kind not in made_anew and device in shared
    ]


def _provider(mount: dict[str, str], state: dict[str, Any], config: dict[str, Any]) -> str:
    """The path on this host for a mount that was external at the dump."""
    destination = mount["destination"]
    for entry in config.get("mounts") or []:
        if _normal(entry["destination"]) == destination and {"bind", "rbind"} & set(entry.get("options") or []):
            source: str = entry["source"]
            return source if source.startswith("/") else f"{state['bundle']}/{source}"
    if mount["root"] == "/null" and destination in {_normal(path) for path in _linux(config).get("maskedPaths") or []}:
        return "/dev/null"
    if destination in {_normal(device["path"]) for device in _linux(config).get("devices") or []}:
        return destination
    if destination.startswith("/dev/"):
        return destination
    if mount["type"] == "cgroup":
        for controller in mount["options"].split(","):
            path = _cgroup_path(state, controller)
            if path:
                return path
    raise HostError(
        f"cannot restore: the checkpoint has a mount of the host at {destination} that config.json does not name",
        hint="restore with the config.json of the container that was checkpointed",
    )


def _common(options: dict[str, Any], config: dict[str, Any], without: tuple[str, ...]) -> list[str]:
    argv = [flag for name, flag in _FLAGS.items() if options.get(name) and name not in without]
    mode = options.get("manage-cgroups-mode") or "soft"
    if mode not in CGROUP_MODES:
        raise UsageError(f"invalid manage-cgroups-mode {mode!r}", hint=f"one of {', '.join(CGROUP_MODES)}")
    argv.append(f"--manage-cgroups={mode}")
    if options.get("network-lock"):
        argv += ["--network-lock", options["network-lock"]]
    kinds = options.get("empty-ns") or []
    if any(kind != "network" for kind in kinds):
        raise UsageError("empty-ns: only the network namespace can be left empty")
    # Interfaces and routes belong to the engine's network set-up, which makes them again after a restore.
    if kinds or "network" not in dict(_joined(config)):
        argv += ["--empty-ns", "net"]
    return argv + criu.config_arguments(config.get("annotations") or {})


def _check(options: dict[str, Any]) -> None:
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise UsageError(f"unknown checkpoint option {unknown[0]}")


def _directories(options: dict[str, Any], create: bool) -> tuple[str, str]:
    images = _absolute(options.get("image-path") or "checkpoint")
    work = _absolute(options["work-path"]) if options.get("work-path") else images
    if not create and not _is_directory(images):
        raise NotFound(f"no checkpoint in {images}", hint="name its directory with --image-path")
    for path in (images, work):
        _make_directories(path)
    return images, work


def _parent(options: dict[str, Any], images: str) -> list[str]:
    parent = options.get("parent-path")
    if not parent:
        return []
    if parent.startswith("/"):
        raise UsageError("parent-path must be relative to image-path")
    if not _is_directory(f"{images}/{parent}"):
        raise NotFound(f"parent-path: no directory {parent} in {images}", hint="make it first, with --pre-dump")
    return ["--prev-images-dir", parent, "--track-mem"]


def _page_server(options: dict[str, Any]) -> list[str]:
    server = options.get("page-server")
    if not server:
        return []
    address, _, port = server.rpartition(":")
    if not address or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError("page-server must be ADDRESS:PORT")
    return ["--page-server", "--address", address.strip("[]"), "--port", port]


def _joined(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(type, path) of the namespaces that the container joined instead of making."""
    return [(entry["type"], entry["path"]) for entry in _linux(config).get("namespaces") or [] if entry.get("path")]


def _linux(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("linux") or {}


def _cgroup_path(state: dict[str, Any], controller: str) -> str | None:
    if not state.get("cgroup"):
        return None
    from ovt.kernel import cgroup

    return cgroup.restore(state["cgroup"]).path_for(controller)


def _descriptors(pid: int) -> list[str]:
    found = []
    for number in range(3):
        try:
            found.append(posix.readlink(f"/proc/{pid}/fd/{number}"))
        except FileNotFoundError:
            found.append("")
    return found


def _recorded(images: str, name: str) -> list[Any]:
    try:
        found = jsonc.loads(procfs.read(f"{images}/{name}"))
    except (FileNotFoundError, ValueError):
        raise NotFound(
            f"{images} is not a checkpoint of a container: no good {name}",
            hint="only a checkpoint made by ovt can be restored by ovt",
        ) from None
    if not isinstance(found, list):
        raise HostError(f"{images}/{name} is damaged")
    return found


def _parse(mountinfo: str) -> list[tuple[str, str, str, str, str]]:
    """(device, root, mount point, type, superblock options) of each line, proc(5)."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(rest) < 3:
            raise HostError("mountinfo of the kernel has a line that is not one")
        found.append((fields[2], _unescape(fields[3]), _unescape(fields[4]), rest[0], rest[2]))
    return found


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def _normal(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _absolute(path: str) -> str:
    return path if path.startswith("/") else f"{posix.getcwd()}/{path}"


def _is_directory(path: str) -> bool:
    try:
        return posix.stat(path).st_mode & 0o170000 == 0o040000
    except OSError:
        return False


def _make_directories(path: str) -> None:
    made = ""
    for part in path.split("/")[1:]:
        made += "/" + part
        if not _is_directory(made):
            try:
                posix.mkdir(made, 0o700)
            except OSError as error:
                raise HostError(f"cannot make the directory {made}: {error.strerror}", error.errno or 0) from error


def _write(path: str, text: str) -> None:
    fd = posix.open(path, posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC, 0o600)
    try:
        posix.write(fd, text.encode())
    finally:
        posix.close(fd)
