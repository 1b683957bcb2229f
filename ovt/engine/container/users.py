"""Who `--user` means: names and groups out of the image's own /etc/passwd and /etc/group.

The files are read through a descriptor of the root file system and parsed here. The C library's own look-up is never
used: it would load its plug-ins from the image (CVE-2019-14271), and it takes ` 1`, `+1` or `1x` in ways that let
another user in (CVE-2026-30892): a number here is decimal digits and nothing else.
"""

from __future__ import annotations

import os

from ovt.engine.container.bundle import User
from ovt.errors import NotFound, OvtError, UsageError
from ovt.kernel.syscalls import RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, openat2

_LIMIT = 1 << 20
_MAX_ID = (1 << 32) - 2


def lookup(root: int, text: str) -> User:
    """The user for `name`, `name:group`, `uid` or `uid:gid` in the root file system that `root` is a descriptor of."""
    if not text or text in {"0", "root", "0:0"}:
        return User()
    name, colon, group = text.partition(":")
    if not name or (colon and not group):
        raise UsageError(f"user {text!r} is not complete", "NAME, NAME:GROUP, UID or UID:GID")
    passwd = _table(root, "etc/passwd", 7)
    number = _number(name)
    row = next((row for row in passwd if (_number(row[2]) == number if number is not None else row[0] == name)), None)
    if row is not None:
        uid, gid, home, known = _id(row[2]), _id(row[3]), row[5] or "/", row[0]
    elif number is not None:
        uid, gid, home, known = number, 0, "/", ""
    else:
        raise NotFound(f"the image has no user {name!r}", "a number works without an entry in /etc/passwd")
    if group:
        return User(uid, _group(root, group), (), home)
    extra = []
    if known and number != 0:
        for entry in _table(root, "etc/group", 4):
            if known in entry[3].split(",") and _id(entry[2]) != gid:
                extra.append(_id(entry[2]))
    return User(uid, gid, tuple(sorted(set(extra))), home)


def _group(root: int, text: str) -> int:
    number = _number(text)
    if number is not None:
        return number
    for row in _table(root, "etc/group", 4):
        if row[0] == text:
            return _id(row[2])
    raise NotFound(f"the image has no group {text!r}", "a number works without an entry in /etc/group")


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit()):
        return None
    value = int(text)
    if value > _MAX_ID:
        raise UsageError(f"{text} is beyond the kernel's user ids", f"at most {_MAX_ID}")
    return value


def _id(text: str) -> int:
    value = _number(text)
    if value is None:
        raise OvtError(f"the image's /etc/passwd or /etc/group holds {text!r} where a number belongs")
    return value


def _table(root: int, path: str, fields: int) -> list[list[str]]:
    try:
        fd = openat2(root, path, os.O_RDONLY | os.O_NONBLOCK, 0, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    except (FileNotFoundError, NotADirectoryError):
        return []
    with open(fd, "rb", buffering=0) as file:
        text = file.read(_LIMIT + 1)
    if text is None or len(text) > _LIMIT:
        raise OvtError(f"the image's /{path} is longer than {_LIMIT} bytes")
    rows = [line.split(":") for line in text.decode("utf-8", "surrogateescape").splitlines()]
    return [row for row in rows if len(row) >= fields]
