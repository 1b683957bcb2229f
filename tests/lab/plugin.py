"""pytest, outside: tests marked `lab` run inside the lab host, booted once; each keeps its own name and outcome.

A test marked `lab(outside=True)` boots a lab host of its own from here, and is an ordinary test otherwise.
They come after all others. Inside, a second pytest (tests/lab/inside.py) runs them and sends every report back as it
happens. A host that crashes or hangs fails the test it was at, with the console's log, and is booted anew for the rest;
at the third time the rest fails at once.

A test marked `twice` runs here, on the machine's own cgroup hierarchies, and once more inside on cgroup v2, as an item
of its own whose name ends in `@lab`.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.lab import machine
from tests.lab.channel import Closed, TimedOut
from tests.lab.machine import Failed
from tests.lab.packages import Unavailable
from tests.lab.pair import Hosts

TWIN = "@lab"
START_SECONDS = 180  # for pytest to come up and collect inside, a limit
SLACK = 2  # how much longer than its own timeout a test may be silent before the host counts as hung
BOOTS = 3
# Importing pytest takes seconds under emulation; without these parts of it, which nothing inside needs, some less.
UNNEEDED = ("cacheprovider", "debugging", "doctest", "junitxml", "pastebin", "setuponly", "setupplan", "stepwise")
PYTEST = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "pytest_timeout", "-p", "tests.lab.inside"]
PYTEST += [f"-pno:{part}" for part in (*UNNEEDED, "unittest")]


@dataclass
class Figures:
    """What the summary says; `first_test` and what follows in seconds."""

    boots: int = 0
    up: float = 0
    first_test: float = 0
    first_test_cpu: float = 0
    seconds: float = 0
    cpu: float = 0
    failures: list[str] = field(default_factory=list)


class Outside:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.figures = Figures()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Add the twins, before -m and -k choose; lab items go to the end."""
        twins = [twin(item) for item in items if isinstance(item, pytest.Function) and both(item)]
        inside = [item for item in items if in_lab(item)] + twins
        items[:] = [item for item in items if not in_lab(item)] + sorted(inside, key=late)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        everything = session.items
        session.items = [item for item in everything if not in_lab(item)]
        try:
            result = yield
        finally:
            session.items = everything
        items = [item for item in everything if in_lab(item)]
        if items and not self.config.option.collectonly:
            self.run(session, items)
        return result

    def run(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        left = list(items)
        spared: list[pytest.Item] = []
        reason = ""
        started = time.monotonic()
        while left:
            if self.figures.boots == BOOTS:
                for item in left:
                    self.emit(item, failed(item, f"the lab host failed {BOOTS} times, the last time:\n{reason}"))
                break
            try:
                run = Run(self, Hosts(), left)
                try:
                    run.all(session)
                finally:
                    self.figures.cpu += run.hosts.cpu_seconds()
                    run.hosts.kill()
            except Unavailable as error:
                for item in left:
                    self.emit(item, skipped(item, str(error)))
                break
            except Failed as error:
                reason = str(error)
                self.figures.failures.append(reason)
                # QEMU's own assertions are no outcome of a test: it is run again, once.
                if run.testing and run.aborted() and left[0] not in spared:
                    spared.append(left[0])
                elif run.testing:
                    self.emit(left[0], failed(left[0], reason))
                    left.pop(0)
            if session.shouldfail or session.shouldstop:
                break
        self.figures.seconds = time.monotonic() - started
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    def emit(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Report a test that did not come to an end inside."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        made = self.figures
        if made.boots:
            terminalreporter.write_line(
                f"lab host: up after {made.up:.0f} s, first test after {made.first_test:.0f} s "
                f"({made.first_test_cpu:.0f} s of processor time), all in {made.seconds:.0f} s ({made.cpu:.0f} s); "
                f"boots: {made.boots}"
            )
            for failure in made.failures:
                terminalreporter.write_line(f"lab host failed: {failure}", red=True)


class Run:
    """One boot: the tests in `left` are run, and taken from it as they end."""

    def __init__(self, outside: Outside, hosts: Hosts, left: list[pytest.Item]) -> None:
        self.outside = outside
        self.hosts = hosts
        self.left = left
        self.testing = False  # a test was started and has not ended
        self.words = b""  # of the pytest inside; shown if it ends before its time

    def all(self, session: pytest.Session) -> None:
        figures = self.outside.figures
        figures.boots += 1
        up = self.hosts.wait_for_boot()
        figures.up = figures.up or up
        host = self.hosts.first
        wanted = [inner(item) for item in self.left]
        env = {"PYTHONPATH": str(machine.ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        try:
            host.request([*PYTEST, f"--tb={self.outside.config.option.tbstyle}"], env=env)
            host.channel.send(b"I", json.dumps(wanted).encode())
            host.channel.send(b"I")
        except Closed:
            raise host.failure("crashed") from None
        names = dict(zip(wanted, self.left, strict=True))
        pending = b""
        limit: float = START_SECONDS
        while True:
            kind, payload = self.receive(limit)
            if kind == b"E":
                self.words = (self.words + payload)[-20000:]
            elif kind == b"!":
                raise host.failure(json.loads(payload))
            elif kind == b"D":
                if self.left and not session.shouldfail and not session.shouldstop:
                    words = self.words.decode(errors="replace")
                    raise host.failure(f"pytest inside ended with status {payload.decode()} before its time:\n{words}")
                return
            elif kind == b"O":
                *lines, pending = (pending + payload).split(b"\n")
                for line in lines:
                    limit = self.take(names, json.loads(line))
            if (session.shouldfail or session.shouldstop) and not self.testing:
                return

    def aborted(self) -> bool:
        return self.hosts.first.process.returncode == -signal.SIGABRT

    def receive(self, limit: float) -> tuple[bytes, bytes]:
        host = self.hosts.first
        deadline = time.monotonic() + limit
        while True:
            try:
                return host.channel.receive(min(5, limit))
            except TimedOut:
                self.hosts.check()
                if time.monotonic() > deadline:
                    raise host.failure(f"hung: nothing from it for {limit:.0f} s") from None
            except Closed:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    host.process.wait(10)
                raise host.failure("crashed") from None

    def take(self, names: dict[str, pytest.Item], message: dict[str, Any]) -> float:
        """Hand on what the pytest inside says; how long the next message may take, seconds."""
        item = names[message["nodeid"]]
        figures = self.outside.figures
        match message["event"]:
            case "start":
                if not figures.first_test:
                    host = self.hosts.first
                    figures.first_test = time.monotonic() - host.started
                    figures.first_test_cpu = host.cpu_seconds()
                self.testing = True
                if "second_host" in getattr(item, "fixturenames", ()):
                    self.hosts.start_second()
                item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            case "report":
                report = item.config.hook.pytest_report_from_serializable(config=item.config, data=message["report"])
                report.nodeid = item.nodeid
                if isinstance(report.longrepr, list):  # where a test was skipped, and why; JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                if report.failed and self.hosts.second:
                    report.sections.append(("Console of lab2", self.hosts.second.console()[-8000:]))
                item.ihook.pytest_runtest_logreport(report=report)
            case "missing":
                words = message["reason"] or self.words.decode(errors="replace")
                self.outside.emit(item, failed(item, f"it was not collected inside the lab host:\n{words}"))
                self.left.remove(item)
            case "finish":
                self.left.remove(item)
                self.testing = False
                item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return timeout(self.left[0]) * SLACK + 30 if self.left else 60


def in_lab(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("lab")
    return mark is not None and not mark.kwargs.get("outside")


def both(item: pytest.Item) -> bool:
    return item.get_closest_marker("twice") is not None and not in_lab(item)


def late(item: pytest.Item) -> bool:
    """Whether it leaves the host slower than it was, so that the others come first: `lab(late=True)`."""
    mark = item.get_closest_marker("lab")
    return bool(mark and mark.kwargs.get("late"))


def timeout(item: pytest.Item) -> float:
    """The limit that pytest-timeout holds a test to inside, seconds."""
    mark = item.get_closest_marker("timeout")
    words = (mark.args[0] if mark.args else mark.kwargs["timeout"]) if mark else item.config.getini("timeout")
    return float(words or 0) or 300.0


class Twin(pytest.Function):
    """A test that is run once more, inside; it is called there as here."""

    inner_id = ""

    @property
    def nodeid(self) -> str:
        return self.inner_id + TWIN


def twin(item: pytest.Function) -> Twin:
    made: Twin = Twin.from_parent(
        item.parent,
        name=item.name + TWIN,
        callobj=item.obj,
        originalname=item.originalname,
        fixtureinfo=item._fixtureinfo,
    )
    made.inner_id = item.nodeid
    if hasattr(item, "callspec"):
        made.callspec = item.callspec
    made.own_markers[:] = [*item.own_markers, pytest.mark.lab.mark]
    made.keywords["lab"] = pytest.mark.lab
    return made


def inner(item: pytest.Item) -> str:
    """Its node id inside."""
    return item.inner_id if isinstance(item, Twin) else item.nodeid


def failed(item: pytest.Item, text: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict(item.keywords), "failed", text, "call")


def skipped(item: pytest.Item, text: str) -> pytest.TestReport:
    where = (str(item.path), 0, f"Skipped: {text}")
    return pytest.TestReport(item.nodeid, item.location, dict(item.keywords), "skipped", where, "setup")


def register(config: pytest.Config) -> None:
    """Called by tests/conftest.py outside."""
    config.pluginmanager.register(Outside(config), "lab")
