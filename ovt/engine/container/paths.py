"""Paths inside a root filesystem, always by descriptor: nothing here can step out of the root or follow a link out.

Every look-up is openat2(RESOLVE_IN_ROOT) below the root's descriptor; what must be created is created one component
at a time below the descriptor of a real directory (CVE-2018-15664, 2019-18837, 2021-30465, 2024-45310).
"""

import posix
from errno import EAGAIN, EEXIST, ELOOP, ENOENT, ENXIO

from ovt.errors import HostError
from ovt.kernel import syscalls as sc

O_PATH = sc.O_PATH
_DIRECTORY = posix.O_DIRECTORY
_PATH_MAX = 4096
_S_IFMT, _S_IFDIR, _S_IFREG = 0o170000, 0o040000, 0o100000


def resolve(root: int, path: str, flags: int = O_PATH, resolve: int = 0) -> int:
    """Open an existing path as a process chrooted to `root` would see it."""
    how = sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS | resolve
    for _ in range(100):
        try:
            return sc.openat2(root, path.lstrip("/") or ".", flags, 0, how)
        except OSError as error:
            if error.errno != EAGAIN:
                raise
            # a rename somewhere on the system met a ".." on this path: the kernel cannot vouch for it (openat2(2))
    raise OSError(EAGAIN, posix.strerror(EAGAIN), path)


def open_checked(root: int, path: str, flags: int, kind: int, number: int = 0) -> int:
    """Open `path` for use, but only if it is of the type `kind` (S_IF*) and, a device, has the number `number`.

    Looked at first and opened then, by the very same descriptor: to open a device, a FIFO or an automount of the
    image's own choice is already to act on it. OSError with ENXIO for anything else. The host's /proc is needed.
    """
    fd = resolve(root, path)
    try:
        status = posix.fstat(fd)
        if status.st_mode & _S_IFMT != kind or (number and status.st_rdev != number):
            raise OSError(ENXIO, "not what it should be", path)
        return posix.open(f"/proc/self/fd/{fd}", flags | posix.O_CLOEXEC)
    finally:
        posix.close(fd)


def parts(path: str) -> list[str]:
    """The components of `path`, "." and ".." taken out lexically ("/../" is "/")."""
    out: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del out[-1:]
        elif part not in ("", "."):
            out.append(part)
    return out


def make_directory(root: int, path: str, mode: int = 0o755) -> int:
    """Open the directory `path`, making it and its parents where they are missing; links are followed in the root."""
    try:
        return resolve(root, path, O_PATH | _DIRECTORY)
    except FileNotFoundError:
        pass
    components = _real(root, path)
    missing: list[str] = []
    fd = -1
    while fd < 0:
        missing.insert(0, components.pop())
        try:
            fd = resolve(root, "/".join(components), O_PATH | _DIRECTORY)
        except FileNotFoundError:
            if not components:
                raise
    for name in missing:
        try:
            posix.mkdir(name, mode, dir_fd=fd)
        except FileExistsError:
            pass
        try:
            below = posix.open(name, O_PATH | _DIRECTORY | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=fd)
        except OSError as error:
            if error.errno in (ELOOP, 20):
                raise HostError(f"{path}: {name} is no directory, or was exchanged for a link", error.errno) from None
            raise
        posix.close(fd)
        fd = below
    return fd


def _real(root: int, path: str) -> list[str]:
    """The components of `path` with the links on the way taken out, also of what does not exist yet.

    A dangling link thus says where in the root to create. Only a name to try: creation goes by descriptors that
    follow no link, so exchanging something meanwhile gains nothing.
    """
    done: list[str] = []
    todo = parts(path)
    links = 0
    while todo:
        name = todo.pop(0)
        if name == "..":
            del done[-1:]
            continue
        try:
            parent = resolve(root, "/".join(done), O_PATH | _DIRECTORY)
        except FileNotFoundError:
            return [*done, name, *todo]
        try:
            link = posix.readlink(name, dir_fd=parent)
        except OSError:  # missing, or not a link
            done.append(name)
            continue
        finally:
            posix.close(parent)
        links += 1
        if links > 40:
            raise OSError(ELOOP, posix.strerror(ELOOP), path)
        if link.startswith("/"):
            done = []
        todo = [part for part in link.split("/") if part not in ("", ".")] + todo
    return done


def make_file(root: int, path: str) -> int:
    """Open (O_PATH) the file `path`, making it empty, and its parents, where it is missing."""
    try:
        return resolve(root, path)
    except FileNotFoundError:
        pass
    components = _real(root, path)
    if not components:
        raise HostError(f"{path} is no file", EEXIST)
    parent = make_directory(root, "/".join(components[:-1]))
    try:
        return create_file(parent, components[-1])
    finally:
        posix.close(parent)


def create_file(parent: int, name: str, mode: int = 0o644) -> int:
    """Open (O_PATH) a new or existing regular file `name` below `parent`; links are refused."""
    flags = posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC | posix.O_EXCL | posix.O_WRONLY
    try:
        posix.close(posix.open(name, flags, mode, dir_fd=parent))
    except FileExistsError:
        pass
    fd = posix.open(name, O_PATH | posix.O_NOFOLLOW | posix.O_CLOEXEC, dir_fd=parent)
    if posix.fstat(fd).st_mode & _S_IFMT == 0o120000:
        posix.close(fd)
        raise HostError(f"{name} is a link where a file was to be made", ELOOP)
    return fd


def is_directory(fd: int) -> bool:
    """True when `fd` is a directory."""
    return posix.fstat(fd).st_mode & _S_IFMT == _S_IFDIR


def exists(root: int, path: str) -> bool:
    """True when `path` resolves inside the root."""
    try:
        posix.close(resolve(root, path))
    except OSError as error:
        if error.errno in (ENOENT, 20, ELOOP):
            return False
        raise
    return True


def find_program(root: int, name: str, cwd: str, env: list[str]) -> tuple[str, str]:
    """Look `name` up as execvp would, inside the root: (path, "") or ("", why) with the words podman greps for."""
    if "/" in name:
        candidates = [name if name.startswith("/") else f"{cwd}/{name}"]
    else:
        search = next((entry[5:] for entry in env if entry.startswith("PATH=")), "")
        candidates = [f"{part or cwd}/{name}" for part in search.split(":")] if search else []
    why = f'exec: "{name}": executable file not found in $PATH'
    for candidate in candidates:
        try:
            fd = resolve(root, candidate)
        except OSError as error:
            if "/" in name:
                why = f'exec: "{name}": stat {name}: {posix.strerror(error.errno or 0).lower()}'
            continue
        mode = posix.fstat(fd).st_mode
        posix.close(fd)
        if mode & _S_IFMT == _S_IFDIR:
            why = f'exec: "{name}": is a directory: permission denied'
        elif not mode & 0o111:
            why = f'exec: "{name}": permission denied'
        else:
            return candidate, ""
    return "", why


def home_of(root: int, uid: int) -> str:
    """The home directory of `uid` in the container's /etc/passwd, "/" when it has none; read by descriptor."""
    try:
        fd = open_checked(root, "etc/passwd", posix.O_RDONLY | posix.O_NONBLOCK, 0o100000)
    except OSError:
        return "/"
    try:
        text = posix.read(fd, 1 << 20).decode("utf-8", "replace")
    finally:
        posix.close(fd)
    for line in text.split("\n"):
        fields = line.split(":")
        if len(fields) >= 6 and fields[2] == str(uid):
            return fields[5] if 0 < len(fields[5]) < _PATH_MAX else "/"
    return "/"
