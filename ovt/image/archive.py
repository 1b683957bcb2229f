"""A root file system out of a tar archive, unpacked by root without trusting a byte of it.

Every name is resolved below the new root by openat2(2) with RESOLVE_IN_ROOT and every entry is made through the
descriptor of its directory, so neither `..`, absolute names, nor links planted earlier in the same archive lead
outside. Kept: numeric owners, modes, times, hard links, file capabilities, POSIX ACLs and user attributes. Left out,
and said: device nodes, which a container gets from its own /dev, and attributes that the overlay file system would
obey. It unpacks one archive into one directory; layers and whiteouts are not its business.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from ovt.errors import HostError, OvtError, UsageError
from ovt.kernel.syscalls import O_PATH, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20
_XATTR = "SCHILY.xattr."  # how GNU tar, bsdtar, podman and docker write attributes into PAX headers
_KEPT_XATTRS = ("security.capability", "user.", "system.posix_acl_")
_SKIPPED_XATTRS = ("user.overlay.",)
_RESOLVE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


def digest(path: str) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(path: str, root: str, report: Callable[[str], None] = lambda line: None) -> None:
    """Unpack the archive `path` into the empty directory `root`.

    gzip, bzip2 and xz are read directly, zstd by the program of that name. OvtError for what is no archive, is
    damaged, or holds a container image instead of a root file system.
    """
    root_fd = os.open(root, _DIRECTORY | os.O_CLOEXEC)
    try:
        with _opened(path) as archive:
            writer = _Writer(root_fd)
            for member in archive:
                if member.name in {"manifest.json", "oci-layout"}:
                    raise UsageError(
                        f"{path} is a saved container image, not a root file system",
                        "podman create IMAGE, then podman export CONTAINER > rootfs.tar",
                    )
                try:
                    writer.add(archive, member)
                except OSError as error:
                    raise HostError(
                        f"{path}: cannot unpack {member.name!r}: {error.strerror}", error.errno or 0
                    ) from error
            writer.finish()
    except (tarfile.TarError, EOFError, ValueError) as error:
        why = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise OvtError(f"{path} cannot be read as a tar archive: {why}", f"tar -tf {path} shows more") from error
    finally:
        os.close(root_fd)
    if writer.skipped:
        report(f"left out {writer.skipped} device nodes of {path}")
    if not writer.count:
        raise OvtError(f"{path} is an empty archive", "give the archive of a root file system")


class _Writer:
    """Makes the entries of one archive below the directory `root_fd`."""

    def __init__(self, root_fd: int) -> None:
        self.root_fd = root_fd
        self.owner = os.geteuid() == 0
        self.count = 0
        self.skipped = 0
        self._directories: list[tuple[str, tarfile.TarInfo]] = []

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Make one entry; a later one of the same name takes its place, as tar does it."""
        parts = [part for part in member.name.split("/") if part not in {"", "."}]
        if ".." in parts:
            raise OSError(errno.EINVAL, "its name leads upwards")
        if member.ischr() or member.isblk():
            self.skipped += 1
            return
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk() or member.isfifo()):
            raise OSError(errno.EINVAL, f"entry type {member.type!r} is not known")
        self.count += 1
        if not parts:
            self._directories.append(("", member))
            return
        parent = self._parent(parts[:-1])
        try:
            self._make(archive, member, parent, parts)
        finally:
            os.close(parent)

    def finish(self) -> None:
        """Set the times and modes of directories, which making their entries has changed."""
        for name, member in reversed(self._directories):
            fd = openat2(self.root_fd, name or ".", _DIRECTORY | os.O_NOFOLLOW, 0, _RESOLVE)
            try:
                self._dress(fd, member)
            finally:
                os.close(fd)

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, parts: list[str]) -> None:
        name = parts[-1]
        if member.isdir():
            try:
                os.mkdir(name, 0o700, dir_fd=parent)
            except FileExistsError:
                if not _is_directory(name, parent):
                    os.unlink(name, dir_fd=parent)
                    os.mkdir(name, 0o700, dir_fd=parent)
            self._directories.append(("/".join(parts), member))
            return
        _clear(name, parent)
        if member.isreg():
            self._file(archive, member, name, parent)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
            if self.owner:
                os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
            os.utime(name, (member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
        elif member.islnk():
            self._link(member, name, parent)
        else:
            os.mkfifo(name, 0o600, dir_fd=parent)
            fd = os.open(name, O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                if self.owner:
                    os.chown(f"/proc/self/fd/{fd}", member.uid, member.gid)
                os.chmod(f"/proc/self/fd/{fd}", member.mode & 0o7777)
            finally:
                os.close(fd)

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, parent: int) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        with open(fd, "wb") as target:
            content = archive.extractfile(member)
            if content is None:
                raise OSError(errno.EINVAL, "it has no content")
            left = member.size
            while chunk := content.read(_CHUNK):
                target.write(chunk)
                left -= len(chunk)
            if left > 0:
                raise OSError(errno.EIO, "the archive ends in the middle of it")
            target.flush()
            self._dress(fd, member)

    def _link(self, member: tarfile.TarInfo, name: str, parent: int) -> None:
        parts = [part for part in member.linkname.split("/") if part not in {"", "."}]
        if ".." in parts or not parts:
            raise OSError(errno.EINVAL, f"it is a hard link to {member.linkname!r}, which leads outside")
        source = openat2(self.root_fd, "/".join(parts[:-1]) or ".", _DIRECTORY, 0, _RESOLVE)
        try:
            os.link(parts[-1], name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(source)

    def _parent(self, parts: list[str]) -> int:
        """A descriptor of the directory `parts`, made where the archive did not say how."""
        try:
            return openat2(self.root_fd, "/".join(parts) or ".", _DIRECTORY, 0, _RESOLVE)
        except FileNotFoundError:
            above = self._parent(parts[:-1])
        try:
            os.mkdir(parts[-1], 0o700, dir_fd=above)
            os.chmod(parts[-1], 0o755, dir_fd=above)  # whatever the caller's umask
        finally:
            os.close(above)
        return openat2(self.root_fd, "/".join(parts), _DIRECTORY, 0, _RESOLVE)

    def _dress(self, fd: int, member: tarfile.TarInfo) -> None:
        """Owner, attributes, mode and time, in this order: a change of owner takes set-id bits and capabilities."""
        if self.owner:
            os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode & 0o7777)
        for key, value in member.pax_headers.items():
            attribute = key.removeprefix(_XATTR)
            if key == attribute or not attribute.startswith(_KEPT_XATTRS) or attribute.startswith(_SKIPPED_XATTRS):
                continue
            if attribute.startswith("user.") or self.owner:
                os.setxattr(fd, attribute, value.encode("utf-8", "surrogateescape"))
        os.utime(fd, (member.mtime, member.mtime))


def _is_directory(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _clear(name: str, parent: int) -> None:
    """Make room for an entry; a directory that is in the way must be empty."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        os.rmdir(name, dir_fd=parent)


@contextmanager
def _opened(path: str) -> Iterator[tarfile.TarFile]:
    with open(path, "rb") as file:
        magic = file.read(4)
    options: dict[str, Any] = {"errorlevel": 2, "encoding": "utf-8", "errors": "surrogateescape"}
    if magic != _ZSTD_MAGIC:
        with tarfile.open(path, "r:*", **options) as archive:
            yield archive
        return
    try:
        decoder = subprocess.Popen(["zstd", "-dcq", "--", path], stdout=subprocess.PIPE)
    except FileNotFoundError:
        raise HostError(f"{path} is compressed with zstd, which this host lacks", hint="apt-get install zstd") from None
    with decoder:
        stream: IO[bytes] | None = decoder.stdout
        try:
            with tarfile.open(fileobj=stream, mode="r|", **options) as archive:
                yield archive
                while stream is not None and stream.read(_CHUNK):
                    pass  # the padding after the end: closing early would look like a failure of zstd
        except BaseException:
            decoder.kill()
            raise
        if decoder.wait() != 0:
            raise OvtError(f"{path} is damaged: zstd ended with status {decoder.returncode}", "zstd -t shows where")
