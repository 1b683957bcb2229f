"""A service named org.freedesktop.systemd1 on a bus of the test's own: units that come and go, and a journal of calls.

Started as a program: fake_systemd.py ADDRESS JOURNAL [SETTING...]. Settings: `unknown=PROPERTY` refuses a property as
an older systemd does, `fail=METHOD` answers with AccessDenied, `result=WORD` is how jobs end, `loaded=UNIT` is there
from the start, `group=PATH` is the ControlGroup told.
"""

import json
import sys
from typing import Any

from ovt.kernel.cgroup.dbus import Bus
from ovt.kernel.cgroup.dbus_wire import (
    CALL,
    DESTINATION,
    ERROR,
    ERROR_NAME,
    INTERFACE,
    MEMBER,
    PATH,
    REPLY_SERIAL,
    RETURN,
    SENDER,
    SIGNAL,
    SIGNATURE,
    Message,
)

SYSTEMD = "org.freedesktop.systemd1"


class Refusal(Exception):
    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


class Service:
    def __init__(self, address: str, journal: str, settings: list[str]) -> None:
        self.bus = Bus(address, timeout=60)
        self.journal = open(journal, "a", buffering=1)
        pairs = [setting.partition("=")[::2] for setting in settings]
        self.unknown = [value for key, value in pairs if key == "unknown"]
        self.failing = [value for key, value in pairs if key == "fail"]
        self.units = {value for key, value in pairs if key == "loaded"}
        self.only = dict(pairs)
        self.jobs = 0
        self.subscribed: set[str] = set()

    def send(self, kind: int, fields: dict[int, Any], *body: Any) -> None:
        self.bus._serial += 1
        self.bus._send(Message(kind, self.bus._serial, fields, body).encode())

    def serve(self) -> None:
        self.bus.call("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "RequestName", "su", SYSTEMD, 0)
        print("ready", flush=True)
        while True:
            message = self.bus._next()
            if message.kind != CALL:
                continue
            member = message.fields[MEMBER]
            body = [value.hex() if isinstance(value, bytes) else value for value in message.body]
            self.journal.write(json.dumps([member, body], default=bytes.hex) + "\n")
            to = {REPLY_SERIAL: message.serial, DESTINATION: message.fields[SENDER]}
            try:
                if member in self.failing:
                    raise Refusal("org.freedesktop.DBus.Error.AccessDenied", "Permission denied")
                arguments = (message.fields[SENDER],) if member == "Subscribe" else message.body
                signature, value, after = getattr(self, "on_" + member)(*arguments)
            except Refusal as refusal:
                self.send(ERROR, {**to, ERROR_NAME: refusal.name, SIGNATURE: "s"}, str(refusal))
                continue
            if after is not None and self.jobs % 2:  # sometimes the job is done before the caller learns its name
                self.signal(*after)
            self.send(RETURN, {**to, **({SIGNATURE: signature} if signature else {})}, *value)
            if after is not None and not self.jobs % 2:
                self.signal(*after)

    def signal(self, *body: Any) -> None:
        where = {PATH: "/org/freedesktop/systemd1", INTERFACE: SYSTEMD + ".Manager", MEMBER: "JobRemoved"}
        self.send(SIGNAL, {**where, SIGNATURE: "uoss"}, 1, "/org/freedesktop/systemd1/job/other", "x.service", "done")
        self.send(SIGNAL, {**where, SIGNATURE: "uoss"}, *body)

    def job(self, unit: str) -> tuple[str, tuple[str], tuple[int, str, str, str]]:
        self.jobs += 1
        path = f"/org/freedesktop/systemd1/job/{self.jobs}"
        return "o", (path,), (self.jobs, path, unit, self.only.get("result", "done"))

    def check(self, properties: list[tuple[str, Any]]) -> None:
        for name, _ in properties:
            if name in self.unknown:
                raise Refusal(
                    "org.freedesktop.DBus.Error.PropertyReadOnly", f"Cannot set property {name}, or unknown property."
                )

    def need(self, unit: str) -> None:
        if unit not in self.units:
            raise Refusal(SYSTEMD + ".NoSuchUnit", f"Unit {unit} not loaded.")

    def on_Subscribe(self, sender: str) -> Any:
        if sender in self.subscribed:
            raise Refusal(SYSTEMD + ".AlreadySubscribed", "Client is already subscribed.")
        self.subscribed.add(sender)
        return "", (), None

    def on_Ping(self) -> Any:
        return "", (), None

    def on_StartTransientUnit(self, unit: str, mode: str, properties: list[Any], aux: list[Any]) -> Any:
        if unit in self.units:
            raise Refusal(SYSTEMD + ".UnitExists", f"Unit {unit} was already loaded.")
        self.check(properties)
        self.units.add(unit)
        return self.job(unit)

    def on_GetUnit(self, unit: str) -> Any:
        self.need(unit)
        return "o", ("/org/freedesktop/systemd1/unit/it",), None

    def on_Get(self, interface: str, name: str) -> Any:
        return "v", (("s", self.only.get("group", "")),), None

    def on_SetUnitProperties(self, unit: str, runtime: bool, properties: list[Any]) -> Any:
        self.need(unit)
        self.check(properties)
        return "", (), None

    def on_StopUnit(self, unit: str, mode: str) -> Any:
        self.need(unit)
        self.units.discard(unit)
        return self.job(unit)

    def on_ResetFailedUnit(self, unit: str) -> Any:
        self.need(unit)
        if "stuck" not in self.only:
            self.units.discard(unit)
        return "", (), None


if __name__ == "__main__":
    Service(sys.argv[1], sys.argv[2], sys.argv[3:]).serve()
