"""On the sending host: the sockets that QEMU connects to, each connection of which is carried to the other host."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping

from ovt.engine.vm.qmp import listen
from ovt.errors import OvtError
from ovt.machines.transport import Dialer


class Relay:
    """Listens at `channels` (paths by the channel's name) and carries what connects to the session `token`."""

    def __init__(self, dialer: Dialer, token: str, channels: Mapping[str, str]) -> None:
        self._dialer = dialer
        self.token = token  # may change, when post-copy needs another session
        self._listeners = {name: (path, listen(path, 64)) for name, path in channels.items()}
        for path, _ in self._listeners.values():
            os.chmod(path, 0o666)  # QEMU is another user; nobody else gets through the machine's directory
        self._threads = [threading.Thread(target=self._serve, args=(name,), daemon=True) for name in channels]
        self.error = ""  # why the first connection that failed did

    def __enter__(self) -> Relay:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        for path, listener in self._listeners.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        for thread in self._threads:
            thread.join(5.0)
        for _, listener in self._listeners.values():
            listener.close()

    def _serve(self, name: str) -> None:
        while True:
            try:
                connection, _ = self._listeners[name][1].accept()
            except OSError:
                return
            try:
                self._dialer.carry(connection, self.token, name)
            except OvtError as error:  # QEMU sees a closed connection and gives up; the reason is ours
                self.error = self.error or str(error)
