"""AppArmor and SELinux: whether the host has them, and what has to be written where for a container.

Nothing here writes a label. A process may write only its own attributes, and since Linux 5.13 only through a
descriptor that it opened itself ("a task may only write when it was the opener", fs/proc/base.c), so the
container's init opens the paths given here, below the host's /proc, and writes the texts just before its exec.

A label for an LSM that the host does not run is an error: whoever wrote the configuration counts on being
confined. The one exception is AppArmor's `unconfined`, which asks for nothing.
"""

import posix

from ovt.errors import HostError

_ST_RDONLY = 1
CONTEXT_TYPES = ("context", "fscontext", "defcontext", "rootcontext")


def apparmor_enabled(root: str = "/") -> bool:
    """Whether AppArmor is compiled in and switched on."""
    # Not securityfs: a nested container has none, although its processes can be confined.
    return _read(f"{root.rstrip('/')}/sys/module/apparmor/parameters/enabled")[:1] == "Y"


def selinux_enabled(root: str = "/") -> bool:
    """Whether SELinux is active for this process: selinuxfs is mounted, and not read-only as in containers."""
    path = f"{root.rstrip('/')}/sys/fs/selinux"
    try:
        posix.stat(path + "/enforce")
        return not posix.statvfs(path).f_flag & _ST_RDONLY
    except OSError:
        return False


def exec_attributes(process: dict[str, object], root: str = "/") -> list[tuple[str, str]]:
    """(path below /proc, text) for each label of an OCI `process` object that its next exec shall apply.

    Raises HostError when a label is given that this host cannot apply.
    """
    wanted = []
    profile = process.get("apparmorProfile")
    if isinstance(profile, str) and profile and _apparmor_wanted(profile, root):
        directory = "self/attr/apparmor" if _exists(root, "proc/self/attr/apparmor/exec") else "self/attr"
        # Under no_new_privs a confined process may only narrow its confinement, which stacking does.
        stack = bool(process.get("noNewPrivileges")) and apparmor_confined(root)
        wanted.append((f"{directory}/exec", f"{'stack' if stack else 'exec'} {profile}"))
    label = process.get("selinuxLabel")
    if isinstance(label, str) and label:
        _require_selinux(label, root)
        wanted.append(("self/attr/exec", label))
    return wanted


def key_attributes(process: dict[str, object], root: str = "/") -> list[tuple[str, str]]:
    """(path below /proc, text) to be written before the init makes its session keyring, so that SELinux labels it."""
    label = process.get("selinuxLabel")
    if not isinstance(label, str) or not label:
        return []
    _require_selinux(label, root)
    return [("self/attr/keycreate", label)]


def mount_context(linux: dict[str, object], annotations: dict[str, str], root: str = "/") -> tuple[str, str] | None:
    """(mount option, label) for the filesystems made for a container with `linux.mountLabel`, else None.

    Engines set mountLabel on hosts without SELinux too; there it has no meaning and is left out. The annotation
    run.oci.mount_context_type names another option than `context`.
    """
    label = linux.get("mountLabel")
    if not isinstance(label, str) or not label or not selinux_enabled(root):
        return None
    kind = annotations.get("run.oci.mount_context_type", "context")
    if kind not in CONTEXT_TYPES:
        raise HostError(
            f"{kind!r} is not a mount context type",
            22,
            hint=f"run.oci.mount_context_type is {', '.join(CONTEXT_TYPES)}",
        )
    return kind, label


def mount_data(data: str, context: tuple[str, str] | None) -> str:
    """`data` for mount(2) with the label of `mount_context` added, quoted because labels may hold commas."""
    if context is None:
        return data
    option = f'{context[0]}="{context[1]}"'
    return f"{data},{option}" if data else option


def apparmor_confined(root: str = "/") -> bool:
    """Whether the calling process itself runs under an AppArmor profile; in doubt it does."""
    for name in ("attr/apparmor/current", "attr/current"):
        text = _read(f"{root.rstrip('/')}/proc/self/{name}")
        if text:
            return text.rstrip("\0\n").split(" ")[0] != "unconfined"
    return True


def _apparmor_wanted(profile: str, root: str) -> bool:
    if not apparmor_enabled(root):
        if profile == "unconfined":
            return False
        raise HostError(
            f"apparmor: profile {profile} is asked for, but this host does not run AppArmor",
            95,
            hint="leave process.apparmorProfile out, or boot with apparmor=1 security=apparmor",
        )
    loaded = _read(f"{root.rstrip('/')}/sys/kernel/security/apparmor/profiles", 1 << 20)
    # A name with a namespace or a stack of profiles is not in the list as such; without a list, the exec will tell.
    simple = not profile.startswith(":") and "//&" not in profile
    if loaded and simple and profile != "unconfined":
        names = [line.rpartition(" (")[0] for line in loaded.splitlines()]
        if profile not in names:
            raise HostError(
                f"apparmor failed to apply profile: {profile} is not loaded",
                2,
                hint="load it with: apparmor_parser --replace FILE",
            )
    return True


def _require_selinux(label: str, root: str) -> None:
    if not selinux_enabled(root):
        raise HostError(
            f"selinux label {label} is specified in config, but selinux is disabled or not supported",
            95,
            hint="leave process.selinuxLabel out, or boot with SELinux",
        )


def _exists(root: str, path: str) -> bool:
    try:
        posix.stat(f"{root.rstrip('/')}/{path}")
    except OSError:
        return False
    return True


def _read(path: str, limit: int = 4096) -> str:
    """The text of a small kernel file, '' when it cannot be read."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return ""
    try:
        chunks = []
        while limit > 0:
            chunk = posix.read(fd, min(limit, 65536))
            if not chunk:
                break
            chunks.append(chunk)
            limit -= len(chunk)
    except OSError:  # attr/current answers EINVAL where no LSM has it
        return ""
    finally:
        posix.close(fd)
    return b"".join(chunks).decode("utf-8", "replace")
