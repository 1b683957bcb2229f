"""Every error a caller of ovt can meet.

    OvtError                 what failed, on which object, why; `hint` says what to do next
    ├── UsageError           the words of the call are wrong (exit status 2 for people)
    ├── ConfigError          an OCI configuration is not valid; `path` is the JSON path of the first fault
    ├── NotFound             no such container, instance, image or file
    ├── Conflict             the name or resource is taken
    ├── StateError           the verb does not fit the instance's present state
    ├── HostError            the kernel or the host refused; `errno` is its number, 0 when there is none
    └── PayloadError         the container's own program cannot be run; `exit_status` is 126 or 127

A class stands here only where a caller acts differently on it. Import-light: the OCI runtime loads this on every call.
"""

from posix import strerror


class OvtError(Exception):
    """Something ovt was asked to do failed; `str()` is one line without a trailing full stop."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OvtError):
    """The command line or the arguments of a call are wrong."""

    exit_status = 2


class ConfigError(OvtError):
    """An OCI configuration is not valid: `path` is a JSON path such as `$.linux.namespaces[2].type` in `document`."""

    def __init__(self, path: str, message: str, hint: str = "", document: str = "config.json") -> None:
        super().__init__(f"{document}: {path}: {message}", hint)
        self.path = path


class NotFound(OvtError):
    """The named thing does not exist."""


class Conflict(OvtError):
    """The name or the resource is in use."""


class StateError(OvtError):
    """The instance is not in a state that allows this verb."""


class HostError(OvtError):
    """The kernel, a device or a helper program of the host refused."""

    def __init__(self, message: str, errno: int = 0, hint: str = "") -> None:
        super().__init__(message, hint)
        self.errno = errno


class PayloadError(OvtError):
    """The program the container should run cannot be run."""

    def __init__(self, message: str, exit_status: int, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_status = exit_status


def refused(what: str, error: OSError, hint: str = "") -> HostError:
    """`what` failed for the reason the kernel gave in `error`."""
    errno = error.errno or 0
    return HostError(f"{what}: {strerror(errno).lower()}", errno, hint)
