"""Where instances and their run-time state are kept when nobody says otherwise."""

from __future__ import annotations

import os

from ovt.errors import HostError


def default_data() -> str:
    """/var/lib/ovt, for anyone but root $XDG_DATA_HOME/ovt."""
    if os.geteuid() == 0:
        return "/var/lib/ovt"
    return f"{os.environ.get('XDG_DATA_HOME') or os.path.expanduser('~/.local/share')}/ovt"


def default_run() -> str:
    """/run/ovt/people, for anyone but root $XDG_RUNTIME_DIR/ovt/people or a directory of its own in /tmp."""
    if os.geteuid() == 0:
        return "/run/ovt/people"
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base):
        return f"{base}/ovt/people"
    own = f"/tmp/ovt-{os.geteuid()}"
    try:
        os.mkdir(own, 0o700)
    except FileExistsError:
        info = os.lstat(own)
        if info.st_uid != os.geteuid() or info.st_mode & 0o170777 != 0o040700:
            raise HostError(
                f"{own} is not a directory of mode 0700 of your own", hint=f"remove it: rm -r {own}"
            ) from None
    return f"{own}/people"
