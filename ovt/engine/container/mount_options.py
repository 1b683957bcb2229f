"""The words a mount's `options` may hold (runtime-spec, config.md "Linux mount options"), and what each means.

One table serves the mounts themselves and `features`. A word that is not in it goes to the filesystem as data.
"""

from ovt.errors import ConfigError
from ovt.kernel import syscalls as sc

_ATIME = sc.MOUNT_ATTR__ATIME

# word: (attributes to set, attributes to clear) for mount_setattr(2); "r" + word makes it recursive
_ATTRIBUTES = {
    "ro": (sc.MOUNT_ATTR_RDONLY, 0),
    "rw": (0, sc.MOUNT_ATTR_RDONLY),
    "nosuid": (sc.MOUNT_ATTR_NOSUID, 0),
    "suid": (0, sc.MOUNT_ATTR_NOSUID),
    "nodev": (sc.MOUNT_ATTR_NODEV, 0),
    "dev": (0, sc.MOUNT_ATTR_NODEV),
    "noexec": (sc.MOUNT_ATTR_NOEXEC, 0),
    "exec": (0, sc.MOUNT_ATTR_NOEXEC),
    "nodiratime": (sc.MOUNT_ATTR_NODIRATIME, 0),
    "diratime": (0, sc.MOUNT_ATTR_NODIRATIME),
    "nosymfollow": (sc.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "symfollow": (0, sc.MOUNT_ATTR_NOSYMFOLLOW),
    "relatime": (sc.MOUNT_ATTR_RELATIME, _ATIME),
    "norelatime": (0, 0),
    "noatime": (sc.MOUNT_ATTR_NOATIME, _ATIME),
    "atime": (sc.MOUNT_ATTR_RELATIME, _ATIME),
    "strictatime": (sc.MOUNT_ATTR_STRICTATIME, _ATIME),
    "nostrictatime": (sc.MOUNT_ATTR_RELATIME, _ATIME),
}
_PROPAGATION = {
    "shared": sc.MS_SHARED,
    "private": sc.MS_PRIVATE,
    "slave": sc.MS_SLAVE,
    "unbindable": sc.MS_UNBINDABLE,
}
# flags of the superblock: handed to the filesystem by name
_SUPERBLOCK = frozenset({"sync", "dirsync", "lazytime", "mand", "iversion"})
_NO_EFFECT = frozenset({"defaults", "async", "loud", "silent", "nolazytime", "nomand", "noiversion", "remount"})
# words of crun that its callers (podman among them) pass on
_EXTENSIONS = frozenset({"copy-symlink", "src-nofollow", "dest-nofollow"})

NAMES = sorted(
    {*_ATTRIBUTES, *_PROPAGATION, *_SUPERBLOCK, *_NO_EFFECT, *_EXTENSIONS}
    | {"r" + name for name in (*_ATTRIBUTES, *_PROPAGATION)}
    | {"bind", "rbind", "tmpcopyup", "idmap", "ridmap"}
)


class Options:
    """A mount's options, sorted by who carries them out."""

    __slots__ = (
        "set",
        "clear",
        "rec_set",
        "rec_clear",
        "propagation",
        "bind",
        "recursive",
        "remount",
        "tmpcopyup",
        "idmap",
        "idmap_recursive",
        "data",
        "copy_symlink",
        "source_nofollow",
        "destination_nofollow",
    )

    def __init__(self) -> None:
        self.set = self.clear = self.rec_set = self.rec_clear = 0
        self.propagation: list[tuple[int, bool]] = []  # (MS_ flag, recursive), in the order given
        self.bind = self.recursive = self.remount = self.tmpcopyup = False
        self.idmap: str | None = None  # None: none; "": the mappings of the mount or the container
        self.idmap_recursive = False
        self.data: list[str] = []
        self.copy_symlink = self.source_nofollow = self.destination_nofollow = False


def parse(words: list[str], path: str) -> Options:
    """Sort `words`; `path` is the JSON path for the errors."""
    options = Options()
    for word in words:
        if word in _ATTRIBUTES:
            set_, clear = _ATTRIBUTES[word]
            options.set = options.set & ~clear | set_
            options.clear = options.clear & ~set_ | clear
        elif word in _PROPAGATION:
            options.propagation.append((_PROPAGATION[word], False))
        elif word in _NO_EFFECT or not word:
            options.remount = options.remount or word == "remount"
        elif word == "bind":
            options.bind = True
        elif word == "rbind":
            options.bind = options.recursive = True
        elif word == "tmpcopyup":
            options.tmpcopyup = True
        elif word in _EXTENSIONS:
            options.copy_symlink |= word == "copy-symlink"
            options.source_nofollow |= word == "src-nofollow"
            options.destination_nofollow |= word == "dest-nofollow"
        elif word[0] == "r" and word[1:] in _ATTRIBUTES:
            set_, clear = _ATTRIBUTES[word[1:]]
            options.rec_set = options.rec_set & ~clear | set_
            options.rec_clear = options.rec_clear & ~set_ | clear
        elif word[0] == "r" and word[1:] in _PROPAGATION:
            options.propagation.append((_PROPAGATION[word[1:]], True))
        elif word.split("=", 1)[0] in ("idmap", "ridmap"):
            name, _, mapping = word.partition("=")
            options.idmap = mapping
            options.idmap_recursive = name == "ridmap"
        else:
            options.data += word.split(",")
    if options.set & options.clear & ~_ATIME or options.rec_set & options.rec_clear & ~_ATIME:
        raise ConfigError(path, "options contradict one another")
    return options


def is_superblock_flag(word: str) -> bool:
    """True for options such as `sync` that are flags of the filesystem, not of the mount."""
    return word in _SUPERBLOCK
