"""What `create` is asked to do besides the configuration."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Request:
    """What `create` is asked to do besides the configuration; the defaults are those of the command line."""

    __slots__ = (
        "bundle",
        "cgroup_manager",
        "console_socket",
        "descriptors",
        "keep_fds",
        "listen_fds",
        "no_new_keyring",
        "no_pivot",
        "notify_socket",
        "overlay",
        "pid_file",
        "stdio",
        "want_terminal",
    )

    def __init__(self, bundle: str) -> None:
        self.bundle = bundle
        self.cgroup_manager = "cgroupfs"
        self.console_socket: str | None = None
        self.descriptors: tuple[int, ...] = ()  # of this process, which the program gets as 3, 4 … whatever they are
        self.keep_fds = 0  # how many from 3 on stay as they are; not together with `descriptors`
        self.listen_fds = 0  # how many of the kept descriptors are sockets passed by sd_listen_fds(3)
        self.no_new_keyring = False
        self.no_pivot = False
        self.notify_socket = ""
        self.overlay: dict[str, Any] | None = None
        self.pid_file: str | None = None
        self.stdio = (0, 1, 2)
        self.want_terminal = False  # return the terminal's master instead of sending it to a socket
