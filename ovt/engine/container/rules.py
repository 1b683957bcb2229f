"""Rules of the runtime-spec, and of Linux, that join several members of a configuration whose tables already hold.

Each function takes the part it reads and raises `Fault` with a path relative to that part. Rules that need the host
(does the root filesystem exist, is a controller there) belong to the code that uses it.
"""

from ovt.engine.container.schema import Fault, member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# UID_GID_MAP_MAX_EXTENTS (linux/user_namespace.h)
MAPPINGS_MAX = 340
# the kernel's struct winsize has 16-bit members
TERMINAL_MAX = (1 << 16) - 1
# sched_setattr(2): nanoseconds of SCHED_DEADLINE
DEADLINE_MIN = 1024
DEADLINE_MAX = (1 << 63) - 1
# a program beside the configuration may name the agent that seccomp notifications go to
SECCOMP_RECEIVER = "run.oci.seccomp.receiver"


def check_config(config: "dict[str, Any]", rootless: bool) -> None:
    """Every rule on a whole configuration; `rootless` when the caller has no privileges outside a user namespace."""
    linux = config.get("linux", {})
    spaces = _at(_namespaces, linux.get("namespaces", []), ".linux.namespaces")
    for name in ("hostname", "domainname"):
        if config.get(name) and "uts" not in spaces:
            raise Fault(f"unable to set {name} without a private UTS namespace", member(name))
    if "process" in config:
        _at(check_process, config["process"], ".process")
    for index, mount in enumerate(config.get("mounts", [])):
        if "options" in mount or "uidMappings" in mount or "gidMappings" in mount:
            _at(lambda item: _mount(item, spaces), mount, f".mounts[{index}]")
    if linux:
        _at(lambda item: _linux(item, spaces, config, rootless), linux, ".linux")
        _mapped_user(config.get("process", {}).get("user", {}), linux, spaces)
    if rootless and "user" not in spaces:
        raise Fault("rootless container requires user namespaces", ".linux.namespaces")


def check_process(process: "dict[str, Any]") -> None:
    """The rules on a process, the container's first or one that `exec` adds."""
    if process.get("terminal") and "consoleSize" in process:
        for name, size in process["consoleSize"].items():
            if name in ("height", "width") and size > TERMINAL_MAX:
                raise Fault(f"must be at most {TERMINAL_MAX}, not {size}", member(name), ".consoleSize")
    if "rlimits" in process:
        _rlimits(process["rlimits"])
    if "scheduler" in process:
        _at(_scheduler, process["scheduler"], ".scheduler")


def check_resources(resources: "dict[str, Any]") -> None:
    """The rules on linux.resources, of a configuration or of `update`."""
    cpu = resources.get("cpu", {})
    if 0 < cpu.get("quota", 0) < cpu.get("burst", 0):
        raise Fault(f"must not be larger than the quota {cpu['quota']}", ".burst", ".cpu")
    for name, limits in resources.get("rdma", {}).items():
        if not limits.keys() & {"hcaHandles", "hcaObjects"}:
            raise Fault("needs hcaHandles or hcaObjects", member(name), ".rdma")
    for index, device in enumerate(resources.get("blockIO", {}).get("weightDevice", [])):
        if not device.keys() & {"weight", "leafWeight"}:
            raise Fault("needs weight or leafWeight", f".blockIO.weightDevice[{index}]")


def _at(check: "Any", value: "Any", path: str) -> "Any":
    try:
        return check(value)
    except Fault as fault:
        raise fault.below(path) from None


def _namespaces(entries: list[dict[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for index, entry in enumerate(entries):
        kind = entry["type"]
        if kind in found:
            raise Fault(f'duplicated namespace "{kind}"', f"[{index}].type")
        found[kind] = entry.get("path", "")
    return found


def _rlimits(entries: "list[dict[str, Any]]") -> None:
    seen = set()
    for index, entry in enumerate(entries):
        if entry["type"] in seen:
            raise Fault(f"duplicated resource limit {entry['type']}", f".rlimits[{index}].type")
        seen.add(entry["type"])
        if entry["soft"] > entry["hard"]:
            reason = f"the soft limit {entry['soft']} must not be above the hard limit {entry['hard']}"
            raise Fault(reason, f".rlimits[{index}].soft")


def _scheduler(scheduler: "dict[str, Any]") -> None:
    policy = scheduler["policy"]
    realtime = policy in ("SCHED_FIFO", "SCHED_RR")
    if scheduler.get("priority", 0) and not realtime:
        raise Fault(f"priority is for SCHED_FIFO and SCHED_RR only, not for {policy}", ".priority")
    times = {name: scheduler.get(name, 0) for name in ("runtime", "deadline", "period")}
    if policy != "SCHED_DEADLINE":
        for name, time in times.items():
            if time:
                raise Fault(f"{name} is for SCHED_DEADLINE only, not for {policy}", member(name))
        return
    # sched(7); a period of 0 means the deadline's. Callers look for these words, quotation marks included
    prefix = "sched_setattr: `SCHED_DEADLINE`"
    for name, time in times.items():
        if name not in scheduler and name != "period":
            raise Fault(f"{prefix} requires `{name}`", member(name))
        if time == 0 and name != "period":
            raise Fault(f"{prefix} {name} must be greater than 0", member(name))
    for name, above in (("runtime", "deadline"), ("deadline", "period")):
        if times[name] > times[above] > 0:
            raise Fault(f"{prefix} {name} {times[name]} must be <= {above} {times[above]}", member(name))
    for name, time in times.items():
        if time and not DEADLINE_MIN <= time <= DEADLINE_MAX:
            raise Fault(f"{prefix} {name} {time} must be between {DEADLINE_MIN} and {DEADLINE_MAX} ns", member(name))


def _mount(mount: "dict[str, Any]", spaces: dict[str, str]) -> None:
    uids, gids = mount.get("uidMappings", []), mount.get("gidMappings", [])
    for name, mappings, other in (("uidMappings", uids, gids), ("gidMappings", gids, uids)):
        if other and not mappings:
            raise Fault("id-mapped mounts must have both uidMappings and gidMappings", member(name))
        _at(_mappings, mappings, member(name))
    options = mount.get("options", ())
    if not uids and "user" not in spaces and ("idmap" in options or "ridmap" in options):
        index = options.index("idmap" if "idmap" in options else "ridmap")
        raise Fault("idmap needs uidMappings and gidMappings, or a user namespace", f".options[{index}]")


def _mappings(entries: list[dict[str, int]]) -> None:
    if len(entries) > MAPPINGS_MAX:
        raise Fault(f"must have at most {MAPPINGS_MAX} items", "")
    for name in ("containerID", "hostID"):
        taken: list[tuple[int, int]] = []
        for index, entry in enumerate(entries):
            first, end = entry[name], entry[name] + entry["size"]
            # 2^32-1 itself is no user (see USER_ID)
            if end > (1 << 32) - 1:
                raise Fault(f"{first} and {entry['size']} more run past the last id", f"[{index}].size")
            for start, stop in taken:
                if first < stop and start < end:
                    raise Fault("overlaps an earlier mapping", f"[{index}].{name}")
            taken.append((first, end))


def _linux(linux: "dict[str, Any]", spaces: dict[str, str], config: "dict[str, Any]", rootless: bool) -> None:
    _user_namespace(linux, spaces, rootless)
    if linux.get("timeOffsets") and spaces.get("time") != "":
        raise Fault("needs a new time namespace", ".timeOffsets")
    for name in ("maskedPaths", "readonlyPaths"):
        if linux.get(name) and "mount" not in spaces:
            raise Fault("unable to restrict paths without a private mount namespace", member(name))
    _devices(linux.get("devices", []))
    if linux.get("netDevices"):
        _at(lambda devices: _net_devices(devices, spaces, rootless), linux["netDevices"], ".netDevices")
    if linux.get("sysctl"):
        from ovt.engine.container import sysctl  # most containers have none

        _at(lambda values: sysctl.check(values, spaces, config.get("domainname", "")), linux["sysctl"], ".sysctl")
    if "resources" in linux:
        _at(check_resources, linux["resources"], ".resources")
    if "seccomp" in linux:
        receiver = config.get("annotations", {}).get(SECCOMP_RECEIVER, "")
        _at(lambda filter_: _seccomp(filter_, receiver), linux["seccomp"], ".seccomp")
    if "memoryPolicy" in linux:
        _at(_memory_policy, linux["memoryPolicy"], ".memoryPolicy")


def _user_namespace(linux: "dict[str, Any]", spaces: dict[str, str], rootless: bool) -> None:
    lists = {name: linux.get(name, []) for name in ("uidMappings", "gidMappings")}
    for name, mappings in lists.items():
        _at(_mappings, mappings, member(name))
        if mappings and "user" not in spaces:
            raise Fault("user namespace mappings specified, but there is no user namespace", member(name))
        # none of either kind: root of the container is the caller, and nobody else is mapped
        if not mappings and spaces.get("user") == "" and (rootless or any(lists.values())):
            kind = "a rootless container" if rootless else "a user namespace with mappings of the other kind"
            raise Fault(f"{kind} requires at least one mapping", member(name))


def _mapped_user(user: "dict[str, Any]", linux: "dict[str, Any]", spaces: dict[str, str]) -> None:
    if spaces.get("user") != "":
        return
    checks = [("uid", user.get("uid", 0), "uidMappings"), ("gid", user.get("gid", 0), "gidMappings")]
    checks += [(f"additionalGids[{i}]", gid, "gidMappings") for i, gid in enumerate(user.get("additionalGids", []))]
    for name, number, mappings in checks:
        ranges = linux.get(mappings) or [{"containerID": 0, "size": 1}]
        if not any(0 <= number - entry["containerID"] < entry["size"] for entry in ranges):
            raise Fault(f"{number} is not mapped in the user namespace", f".process.user.{name}")


def _devices(devices: "list[dict[str, Any]]") -> None:
    for index, device in enumerate(devices):
        for name in ("major", "minor"):
            if device["type"] != "p" and name not in device:
                raise Fault("is required", f".devices[{index}].{name}")


def _net_devices(devices: dict[str, dict[str, str]], spaces: dict[str, str], rootless: bool) -> None:
    if "network" not in spaces:
        raise Fault("unable to move network devices without a network namespace", "")
    if rootless:
        raise Fault("network devices are not supported for rootless containers", "")
    seen = set()
    for name, device in devices.items():
        inner = device.get("name") or name
        if inner in seen and "%d" not in inner:
            raise Fault(f'two devices would be named "{inner}"', ".name", member(name))
        seen.add(inner)


def _seccomp(filter_: "dict[str, Any]", receiver: str) -> None:
    errno_actions = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
    default = filter_["defaultAction"]
    if default == "SCMP_ACT_NOTIFY":
        raise Fault("SCMP_ACT_NOTIFY cannot be used as default action", ".defaultAction")
    if "defaultErrnoRet" in filter_ and default not in errno_actions:
        raise Fault(f"errno value specified for action {default}", ".defaultErrnoRet")
    if filter_.get("listenerMetadata") and not (filter_.get("listenerPath") or receiver):
        raise Fault("needs listenerPath", ".listenerMetadata")
    for index, rule in enumerate(filter_.get("syscalls", [])):
        action = rule["action"]
        if "errnoRet" in rule and action not in errno_actions:
            raise Fault(f"errno value specified for action {action}", f".syscalls[{index}].errnoRet")
        if action == "SCMP_ACT_NOTIFY" and not (filter_.get("listenerPath") or receiver):
            raise Fault("SCMP_ACT_NOTIFY needs listenerPath", f".syscalls[{index}].action")


def _memory_policy(policy: "dict[str, Any]") -> None:
    # set_mempolicy(2)
    mode, flags = policy["mode"], policy.get("flags", [])
    nodes = policy.get("nodes", "").strip(" ,")
    if nodes and mode in ("MPOL_DEFAULT", "MPOL_LOCAL"):
        raise Fault(f"{mode} takes no nodes", ".nodes")
    if not nodes and mode not in ("MPOL_DEFAULT", "MPOL_LOCAL", "MPOL_PREFERRED"):
        raise Fault(f"{mode} needs at least one node", ".nodes")
    if "MPOL_F_STATIC_NODES" in flags and "MPOL_F_RELATIVE_NODES" in flags:
        raise Fault("MPOL_F_STATIC_NODES and MPOL_F_RELATIVE_NODES exclude each other", ".flags")
    if "MPOL_F_NUMA_BALANCING" in flags and mode not in ("MPOL_BIND", "MPOL_PREFERRED_MANY"):
        raise Fault(f"{mode} does not take MPOL_F_NUMA_BALANCING", ".flags")
