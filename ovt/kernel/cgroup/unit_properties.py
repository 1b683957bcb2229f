"""linux.resources and annotations as properties of a systemd unit: (name, (D-Bus signature, value)) pairs.

systemd writes the cgroup files itself whenever it likes (daemon-reload, set-property), so it has to know the limits
too, or it would undo ours. What it has no property for is only written to the files. Not here: the bus.
"""

from __future__ import annotations

from ovt.errors import ConfigError
from ovt.kernel.cgroup.devices import ANY, MKNOD, READ, WRITE, compress, rules
from ovt.kernel.cgroup.files import read_or
from ovt.kernel.cgroup.limits_v2 import io_weight, swap_max, weight

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Property = tuple[str, tuple[str, Any]]

INFINITY = (1 << 64) - 1
_ANNOTATION = "org.systemd.property."


def limits(resources: dict[str, Any], mode: str) -> list[Property]:
    """The properties of all of linux.resources but devices, for cgroup `mode` `v1` or `v2`."""
    v2 = mode == "v2"
    result: list[Property] = []
    result += _memory(resources.get("memory") or {}, v2)
    result += _cpu(resources.get("cpu") or {}, v2)
    limit = (resources.get("pids") or {}).get("limit")
    if limit is not None:
        result.append(("TasksMax", ("t", limit if limit > 0 else INFINITY)))
    result += _block(resources.get("blockIO") or {}, v2)
    if v2:
        result += _unified(resources.get("unified") or {})
    return result


def _size(value: int) -> tuple[str, int]:
    return "t", INFINITY if value < 0 else value


def _memory(memory: dict[str, Any], v2: bool) -> list[Property]:
    limit, swap, low = (memory.get(key) or 0 for key in ("limit", "swap", "reservation"))
    result: list[Property] = []
    if limit:
        result.append(("MemoryMax" if v2 else "MemoryLimit", _size(limit)))
    if v2 and low:
        result.append(("MemoryLow", _size(low)))
    if v2 and swap:
        result.append(("MemorySwapMax", _size(swap_max(limit, swap))))
    return result


def _cpu(cpu: dict[str, Any], v2: bool) -> list[Property]:
    result: list[Property] = []
    if v2 and cpu.get("idle"):
        result.append(("CPUWeight", ("t", 0)))
    elif cpu.get("shares"):
        result.append(
            ("CPUWeight", ("t", weight(cpu["shares"]))) if v2 else ("CPUShares", ("t", max(2, cpu["shares"])))
        )
    result += quota(cpu.get("quota") or 0, cpu.get("period") or 0)
    if v2:
        for key, name in (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes")):
            if cpu.get(key):
                result.append((name, ("ay", bit_mask(cpu[key], f"$.linux.resources.cpu.{key}"))))
    return result


def quota(limit: int, period: int) -> list[Property]:
    """CPUQuota properties from microseconds of CPU per period of microseconds; 0: not given."""
    result: list[Property] = []
    if period:
        result.append(("CPUQuotaPeriodUSec", ("t", period)))
    if limit:
        share = INFINITY
        if limit > 0:
            share = limit * 1_000_000 // (period or 100_000)
            # systemd keeps whole percents and would round down, below what the files say: round up for it.
            share += -share % 10_000
        result.append(("CPUQuotaPerSecUSec", ("t", share)))
    return result


def bit_mask(listed: str, path: str) -> bytes:
    """A list such as `0-3,7` as systemd wants it: bit n of byte n/8, least significant first; ConfigError."""
    mask = 0
    for part in listed.split(","):
        first, dash, last = part.strip().partition("-")
        if not part.strip():
            continue
        last = last if dash else first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last) < 8192):
            raise ConfigError(path, f"`{part.strip()}` is neither a number nor a range such as 0-3")
        for number in range(int(first), int(last) + 1):
            mask |= 1 << number
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


_THROTTLE = {
    "throttleReadBpsDevice": ("IOReadBandwidthMax", "BlockIOReadBandwidth"),
    "throttleWriteBpsDevice": ("IOWriteBandwidthMax", "BlockIOWriteBandwidth"),
    "throttleReadIOPSDevice": ("IOReadIOPSMax", ""),
    "throttleWriteIOPSDevice": ("IOWriteIOPSMax", ""),
}


def _block(block: dict[str, Any], v2: bool) -> list[Property]:
    result: list[Property] = []
    if block.get("weight"):
        value = io_weight(block["weight"]) if v2 else block["weight"]
        result.append(("IOWeight" if v2 else "BlockIOWeight", ("t", value)))
    weights = [
        (_node("b", device), io_weight(device["weight"]) if v2 else device["weight"])
        for device in block.get("weightDevice") or ()
        if device.get("weight")
    ]
    if weights:
        result.append(("IODeviceWeight" if v2 else "BlockIODeviceWeight", ("a(st)", weights)))
    for key, (name, old_name) in _THROTTLE.items():
        rates = [(_node("b", device), device["rate"] or INFINITY) for device in block.get(key) or ()]
        if rates and (name if v2 else old_name):
            result.append((name if v2 else old_name, ("a(st)", rates)))
    return result


def _node(kind: str, device: dict[str, Any]) -> str:
    return f"/dev/{'block' if kind == 'b' else 'char'}/{device['major']}:{device['minor']}"


_SIZES = {
    "memory.max": "MemoryMax",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
    "cpu.weight": "CPUWeight",
    "io.weight": "IOWeight",
}


def _unified(raw: dict[str, str]) -> list[Property]:
    """Those raw values that systemd would overwrite; what is no plain value goes to the file alone."""
    result: list[Property] = []
    for key, value in raw.items():
        words = value.split()
        if key in _SIZES and len(words) == 1 and (words[0] == "max" or words[0].isdigit()):
            result.append((_SIZES[key], ("t", INFINITY if words[0] == "max" else int(words[0]))))
        elif key == "cpu.idle" and words == ["1"]:
            result.append(("CPUWeight", ("t", 0)))
        elif key == "cpu.max" and words and all(word == "max" or word.isdigit() for word in words):
            period = int(words[1]) if len(words) > 1 else 0
            result += quota(-1 if words[0] == "max" else int(words[0]), period)
        elif key in ("cpuset.cpus", "cpuset.mems"):
            name = "AllowedCPUs" if key.endswith("cpus") else "AllowedMemoryNodes"
            result.append((name, ("ay", bit_mask(value, f"$.linux.resources.unified.{key}"))))
    return result


def device_policy(devices: list[dict[str, Any]] | None) -> list[Property]:
    """DevicePolicy and DeviceAllow, so that systemd's own device program lets through what our rules do.

    systemd knows a list of allowed devices only. Rules with a default of allow become no restriction on its side;
    the container's own rules are in force beside it.
    """
    target = compress(rules(devices))
    nothing: Property = ("DeviceAllow", ("a(ss)", []))  # an assignment adds to the list but for the empty one
    if target.allow:
        return [("DevicePolicy", ("s", "auto")), nothing]
    allowed = []
    for (kind, major, minor), access in target.entries.items():
        letters = "".join([letter for letter, bit in (("r", READ), ("w", WRITE), ("m", MKNOD)) if access & bit])
        prefix = "block-" if kind == "b" else "char-"
        if major == ANY and minor == ANY:
            allowed.append((prefix + "*", letters))
        elif minor == ANY:
            name = _group(kind, major)
            if name:
                allowed.append((prefix + name, letters))
        elif major != ANY:
            # These names are taken for their numbers alone (since 240), whether udev has made them or not.
            allowed.append((f"/dev/{prefix[:-1]}/{major}:{minor}", letters))
    return [("DevicePolicy", ("s", "strict")), nothing, ("DeviceAllow", ("a(ss)", allowed))]


def _group(kind: str, major: int, devices: str = "/proc/devices") -> str | None:
    """The driver's name for a major number, by which systemd knows all its minors."""
    section = "Block devices:" if kind == "b" else "Character devices:"
    current = ""
    for line in read_or(devices).splitlines():
        if line.endswith(":"):
            current = line
            continue
        number, _, name = line.strip().partition(" ")
        if current == section and number == str(major):
            return name
    return None


def from_annotations(annotations: dict[str, str]) -> list[Property]:
    """`org.systemd.property.NAME: VALUE` annotations, VALUE in GVariant's text format; ConfigError.

    A name in seconds (`TimeoutStopSec`, as in unit files) becomes the property in microseconds that the bus knows.
    """
    from ovt.kernel.cgroup.gvariant import parse

    result: list[Property] = []
    for annotation, text in annotations.items():
        if not annotation.startswith(_ANNOTATION):
            continue
        name = annotation[len(_ANNOTATION) :]
        path = f"$.annotations.{annotation}"
        if not (name.isascii() and name.isalpha() and len(name) >= 3):
            raise ConfigError(path, f"`{name}` is not the name of a unit property")
        try:
            kind, value = parse(text)
        except ValueError as error:
            raise ConfigError(
                path, f"`{text}` is not a GVariant value: {error}", "examples: uint64 5, true, 'text', ['a', 'b']"
            ) from error
        if name.endswith("Sec") and not name.endswith("USec"):
            if kind not in "nqiuxtd" or value < 0:
                raise ConfigError(path, f"`{text}` is not a number of seconds")
            name, kind, value = name[:-3] + "USec", "t", int(value * 1_000_000)
        result.append((name, (kind, value)))
    return result
