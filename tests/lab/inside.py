"""pytest, inside the lab host: runs the tests whose ids come over standard input, in their order, and reports each.

Loaded by `-p`, before pytest takes the standard streams: output is for the reports alone, one JSON object a line, and
whatever else is printed goes to standard error. A module is imported when its first test is about to run: under
emulation, importing all before the first test would take longer than the boot.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

WIRE = os.dup(1)
os.set_inheritable(WIRE, False)
os.dup2(2, 1)
WANTED: list[str] = json.load(sys.stdin)


def send(event: str, nodeid: str, **more: Any) -> None:
    line = json.dumps({"event": event, "nodeid": nodeid, **more}, default=str).encode() + b"\n"
    while line:
        line = line[os.write(WIRE, line) :]


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.modules: dict[str, pytest.Collector] = {}
        self.reasons: dict[str, str] = {}  # why a module could not be collected

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.reasons[file_of(report.nodeid)] = report.longreprtext

    def pytest_collection(self, session: pytest.Session) -> bool:
        files = list(dict.fromkeys(file_of(nodeid) for nodeid in WANTED))
        for module in session.perform_collect(files, genitems=False):
            assert isinstance(module, pytest.Collector)
            self.modules[module.nodeid] = module
        return True

    def items(self, session: pytest.Session) -> Iterator[pytest.Item]:
        for file, nodeids in itertools.groupby(WANTED, file_of):
            items = {item.nodeid: item for item in session.genitems(self.modules[file])}
            for nodeid in nodeids:
                if nodeid in items:
                    yield items[nodeid]
                else:
                    send("missing", nodeid, reason=self.reasons.get(file, ""))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = self.items(session)
        item = next(items, None)
        while item:
            after = next(items, None)  # which decides what fixtures the test before it may leave standing
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            item = after
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        send("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        send("report", report.nodeid, report=data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        send("finish", nodeid)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(config), "lab-reporter")
