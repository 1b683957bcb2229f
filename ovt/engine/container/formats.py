"""What a string of a configuration must look like: each function returns what is wrong with one, or "".

The answers complete the sentence `$.path: …, not "value"`. Nothing here looks at the host or at other members.
"""

NAME_MAX = 255
CGROUP_PATH_MAX = 3500  # of PATH_MAX; the rest is for the mount point before and a file's name behind
# Linux: IFNAMSIZ less its NUL, __NEW_UTS_LEN, the largest MAX_NUMNODES
INTERFACE_NAME_MAX = 15
HOST_NAME_MAX = 64
NODES_MAX = 1024


def not_empty(text: str) -> str:
    """Anything but the empty string."""
    return "" if text else "must not be empty"


def absolute(text: str) -> str:
    """An absolute path."""
    return "" if text[:1] == "/" else "must be an absolute path"


def absolute_or_empty(text: str) -> str:
    """An absolute path, or "" for what Go's writers leave out and others write as an empty string."""
    return "" if not text or text[0] == "/" else "must be an absolute path"


def version(text: str) -> str:
    """A version of the runtime-spec (SemVer 2.0.0) of the major version 1."""
    numbers, _, build = text.partition("+")
    numbers, dash, prerelease = numbers.partition("-")
    parts = numbers.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return "must be a version such as 1.2.0"
    if (dash and not prerelease) or not set(prerelease + build) <= _VERSION_LETTERS:
        return "must be a version such as 1.2.0"
    return "" if parts[0] == "1" else "must be a version 1 of the runtime-spec"


def environment(text: str) -> str:
    """An entry of environ(7)."""
    return "" if text.find("=") > 0 else "must be NAME=VALUE"


def number_list(text: str) -> str:
    """A list of CPUs or memory nodes as the kernel's bitmap_parselist reads it: 0-3,7 or 0-31:2/4, maybe empty."""
    for part in text.split(","):
        span, colon, group = part.strip().partition(":")
        first, dash, last = span.partition("-")
        used, slash, size = group.partition("/")
        numbers = [first] if span else []
        numbers += [last] if dash else []
        numbers += [used, size] if colon else []
        if not all(number.isascii() and number.isdigit() and len(number) < 10 for number in numbers):
            return "must be a list such as 0-3,7"
        if dash and int(first) > int(last):
            return f"the range {span} must not run backwards"
        if colon and not (dash and slash and 0 < int(used) <= int(size)):
            return "must be a list such as 0-3,7"
    return ""


def node_list(text: str) -> str:
    """A list of memory nodes."""
    wrong = number_list(text)
    numbers = text.translate({ord(letter): " " for letter in "-,:/"}).split()
    return wrong or (f"must name nodes below {NODES_MAX}" if any(int(n) >= NODES_MAX for n in numbers) else "")


def one_line(text: str) -> str:
    """Text without a line break."""
    return "must be one line" if "\n" in text else ""


def memory_bandwidth(text: str) -> str:
    """A memory bandwidth line of resctrl's schemata."""
    return one_line(text) or ("" if text.startswith("MB:") else "must start with MB:")


def class_of_service(text: str) -> str:
    """A directory name below resctrl, or / for its root."""
    if text in (".", "..") or ("/" in text and text != "/"):
        return "must be a plain directory name or /"
    return one_line(text)


def page_size(text: str) -> str:
    """A huge page size as the hugetlb controller's files spell it."""
    number, unit = text[:-2], text[-2:]
    good = unit in ("KB", "MB", "GB") and number.isascii() and number.isdigit() and number[0] != "0"
    return "" if good else "must be a size such as 64KB, 2MB or 1GB"


def device_access(text: str) -> str:
    """Permissions of a device rule."""
    return "" if set(text) <= {"r", "w", "m"} else "must be made of r, w and m"


def cgroups_path(text: str) -> str:
    """A path in the cgroup hierarchy, or slice:prefix:name for systemd."""
    parts = text.split("/")
    if len(text.encode()) > CGROUP_PATH_MAX or max(len(part.encode()) for part in parts) > NAME_MAX:
        return f"must have at most {CGROUP_PATH_MAX} bytes, and {NAME_MAX} between slashes"
    return "must not contain .." if ".." in parts else one_line(text)


def host_name(text: str) -> str:
    """A host or domain name of uname(2)."""
    return "" if len(text.encode()) <= HOST_NAME_MAX else f"must have at most {HOST_NAME_MAX} bytes"


def interface_name(text: str) -> str:
    """A network interface's name, which the kernel checks in the same way."""
    if not text or len(text.encode()) > INTERFACE_NAME_MAX:
        return f"must be an interface name of 1 to {INTERFACE_NAME_MAX} bytes"
    if text in (".", "..") or any(letter in "/:" or letter.isspace() for letter in text):
        return "must be an interface name"
    return ""


def interface_name_or_empty(text: str) -> str:
    """A network interface's name, or "" for the name it already has."""
    return interface_name(text) if text else ""


def control_file(text: str) -> str:
    """The name of a file in a cgroup directory."""
    if not text or text in (".", "..") or "/" in text:
        return "must be a file name without any slash"
    return ""


_VERSION_LETTERS = frozenset("0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-.")
