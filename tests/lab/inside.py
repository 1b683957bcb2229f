"""pytest, inside the lab host: runs the tests whose ids come over standard input, in their order, and reports each.

Loaded by `-p`, before pytest takes the standard streams: output is for the reports alone, one JSON object a line, and
whatever else is printed goes to standard error.
"""

import json
import os
import sys
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


class Reporter:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        by_id = {item.nodeid: item for item in items}
        missing = [nodeid for nodeid in WANTED if nodeid not in by_id]
        if missing:
            raise pytest.UsageError(f"not collected inside the lab host: {missing}")
        items[:] = [by_id[nodeid] for nodeid in WANTED]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        send("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        send("report", report.nodeid, report=data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        send("finish", nodeid)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reporter(config), "lab-reporter")
