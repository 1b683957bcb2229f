"""The second lab host, seen from the first: its agent answers on the port lab.cable.

    python -m tests.lab.second -- COMMAND …        run a command there
"""

import os
import signal
import sys
import time
from subprocess import CompletedProcess

from tests.lab.channel import Channel, TimedOut, port
from tests.lab.machine import BOOT_SECONDS


class SecondHost:
    """Runs commands in the second lab host, one at a time. A context manager."""

    def __init__(self) -> None:
        self.fd = os.open(port("lab.cable"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.channel = Channel(self.fd)

    def __enter__(self) -> "SecondHost":
        self.wait_for_boot()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def wait_for_boot(self) -> None:
        """It says hello once, when it is up; after that a command is what shows that it is there."""
        self.channel.send_json(b"R", {"argv": ["true"], "env": {}, "cwd": "/", "terminal": None})
        self.channel.send(b"I")
        while self.channel.receive(BOOT_SECONDS)[0] != b"D":
            pass

    def give_up(self) -> None:
        """Kill the command that runs there, else its last words would be taken for the next one's."""
        self.channel.send_json(b"S", signal.SIGKILL)
        while self.channel.receive(30)[0] != b"D":
            pass

    def __call__(self, *argv: str, timeout: float = 60, check: bool = True) -> "CompletedProcess[str]":
        """Run a command there as `subprocess.run` would; its output as text. Raises TimedOut, AssertionError."""
        request = {"argv": list(argv), "env": {}, "cwd": "/", "terminal": None}
        self.channel.send_json(b"R", request)
        self.channel.send(b"I")
        output = {b"O": b"", b"E": b"", b"!": b""}
        deadline = time.monotonic() + timeout
        while True:
            try:
                kind, payload = self.channel.receive(max(0.0, deadline - time.monotonic()))
            except TimedOut:
                self.give_up()
                raise TimedOut(f"{argv} on the second lab host: no end after {timeout:g} s") from None
            if kind == b"D":
                break
            output[kind] += payload
        words = {kind: text.decode(errors="replace") for kind, text in output.items()}
        done = CompletedProcess(list(argv), int(payload), words[b"O"], words[b"E"] + words[b"!"])
        if check:
            assert done.returncode == 0, f"{argv} → {done.returncode}\n{done.stdout}{done.stderr}"
        return done


def main(arguments: list[str]) -> int:
    if arguments[:1] != ["--"] or len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    with SecondHost() as host:
        done = host(*arguments[1:], timeout=3600, check=False)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
