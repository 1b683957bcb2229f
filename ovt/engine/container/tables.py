"""The OCI runtime-spec 1.3's configuration for Linux as tables: every member, its kind, its range, what is required.

Sections of other platforms (vm, solaris, windows, zos, freebsd) are not here, so they are ignored as unknown members.
What depends on more than one value is in `rules.py`. Member names are the specification's.
"""

from ovt.engine.container import formats
from ovt.engine.container.schema import Array, Boolean, Choice, Integer, Map, Object, String

UINT16 = Integer(0, (1 << 16) - 1)
UINT32 = Integer(0, (1 << 32) - 1)
INT32 = Integer(-(1 << 31), (1 << 31) - 1)
UINT64 = Integer(0, (1 << 64) - 1)
INT64 = Integer(-(1 << 63), (1 << 63) - 1)
LIMIT = Integer(-1, (1 << 63) - 1)  # -1: no limit
BOOLEAN = Boolean()
STRING = String()
STRINGS = Array(STRING)
LINE = String(formats.one_line)
NUMBERS = String(formats.number_list)
ABSOLUTE = String(formats.absolute)

# uid 2^32-1 is "no change" to the kernel's setresuid, and never a user
USER_ID = Integer(0, (1 << 32) - 2)


def _names(prefix: str, words: str) -> tuple[str, ...]:
    return tuple(prefix + word for word in words.split())


RLIMITS = _names(
    "RLIMIT_", "AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK"
)
NAMESPACES = _names("", "pid network mount ipc uts user cgroup time")
SCHED_POLICIES = _names("SCHED_", "OTHER FIFO RR BATCH ISO IDLE DEADLINE")
SCHED_FLAGS = _names(
    "SCHED_FLAG_", "RESET_ON_FORK RECLAIM DL_OVERRUN KEEP_POLICY KEEP_PARAMS UTIL_CLAMP_MIN UTIL_CLAMP_MAX"
)
PROPAGATIONS = ("private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable", "")
SECCOMP_ACTIONS = _names("SCMP_ACT_", "KILL KILL_PROCESS KILL_THREAD TRAP ERRNO TRACE ALLOW LOG NOTIFY")
SECCOMP_OPERATORS = _names("SCMP_CMP_", "NE LT LE EQ GE GT MASKED_EQ")
SECCOMP_FLAGS = _names("SECCOMP_FILTER_FLAG_", "TSYNC LOG SPEC_ALLOW WAIT_KILLABLE_RECV")
SECCOMP_ARCHITECTURES = _names(
    "SCMP_ARCH_",
    "X86 X86_64 X32 ARM AARCH64 LOONGARCH64 M68K MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32"
    " PPC PPC64 PPC64LE S390 S390X SH SHEB PARISC PARISC64 RISCV64",
)
MEMORY_POLICIES = _names("MPOL_", "DEFAULT BIND INTERLEAVE WEIGHTED_INTERLEAVE PREFERRED PREFERRED_MANY LOCAL")
MEMORY_POLICY_FLAGS = _names("MPOL_F_", "NUMA_BALANCING RELATIVE_NODES STATIC_NODES")

PROCESS = Object(
    {
        "terminal": BOOLEAN,
        "consoleSize": Object({"height": UINT64, "width": UINT64}, ("height", "width")),
        "cwd": ABSOLUTE,
        "env": Array(String(formats.environment)),
        "args": Array(STRING, 1),
        "user": Object(
            {
                "uid": USER_ID,
                "gid": USER_ID,
                # four octal digits are what callers accept, although umask(2) uses three
                "umask": Integer(0, 0o7777),
                "additionalGids": Array(USER_ID),
            }
        ),
        "rlimits": Array(
            Object(
                {"type": Choice("resource limit", RLIMITS), "soft": UINT64, "hard": UINT64}, ("type", "soft", "hard")
            )
        ),
        # names are checked where they are applied: an unknown capability is a warning, not an error (spec)
        "capabilities": Object(
            dict.fromkeys(("bounding", "effective", "inheritable", "permitted", "ambient"), STRINGS)
        ),
        "noNewPrivileges": BOOLEAN,
        "oomScoreAdj": Integer(-1000, 1000),
        "apparmorProfile": LINE,
        "selinuxLabel": LINE,
        "scheduler": Object(
            {
                "policy": Choice("scheduling policy", SCHED_POLICIES),
                "nice": Integer(-20, 19),
                "priority": Integer(0, 99),
                "flags": Array(Choice("scheduling flag", SCHED_FLAGS)),
                "runtime": UINT64,
                "deadline": UINT64,
                "period": UINT64,
            },
            ("policy",),
        ),
        "ioPriority": Object(
            {
                "class": Choice("I/O class", ("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE")),
                "priority": Integer(0, 7),
            },
            ("class",),
        ),
        "execCPUAffinity": Object({"initial": NUMBERS, "final": NUMBERS}),
    },
    ("cwd", "args"),
)

ID_MAPPINGS = Array(
    Object(
        {"containerID": UINT32, "hostID": UINT32, "size": Integer(1, (1 << 32) - 1)}, ("containerID", "hostID", "size")
    )
)

MOUNT = Object(
    {
        # relative ones are deprecated, and mean below / (spec)
        "destination": String(formats.not_empty),
        "type": STRING,
        "source": STRING,
        "options": STRINGS,
        "uidMappings": ID_MAPPINGS,
        "gidMappings": ID_MAPPINGS,
    },
    ("destination",),
)

HOOKS = Array(
    Object(
        {"path": ABSOLUTE, "args": STRINGS, "env": STRINGS, "timeout": Integer(1, (1 << 31) - 1)},
        ("path",),
    )
)

_DEVICE_NUMBERS = {"major": Integer(0, (1 << 12) - 1), "minor": Integer(0, (1 << 20) - 1)}  # Linux's MINORBITS
_THROTTLES = Array(Object({**_DEVICE_NUMBERS, "rate": UINT64}, ("major", "minor", "rate")))
_WEIGHT = Integer(0, 1000)  # 0: unset

RESOURCES = Object(
    {
        "devices": Array(
            Object(
                {
                    "allow": BOOLEAN,
                    "type": Choice("device type", ("a", "b", "c", "")),
                    # -1 is what callers write for all of them
                    "major": Integer(-1, (1 << 32) - 1),
                    "minor": Integer(-1, (1 << 32) - 1),
                    "access": String(formats.device_access),
                },
                ("allow",),
            )
        ),
        "memory": Object(
            {
                **dict.fromkeys(("limit", "reservation", "swap", "kernel", "kernelTCP"), LIMIT),
                "swappiness": Integer(0, 100),
                **dict.fromkeys(("disableOOMKiller", "useHierarchy", "checkBeforeUpdate"), BOOLEAN),
            }
        ),
        "cpu": Object(
            {
                "shares": UINT64,
                "quota": LIMIT,
                "burst": UINT64,
                "period": UINT64,
                "realtimeRuntime": LIMIT,
                "realtimePeriod": UINT64,
                "cpus": NUMBERS,
                "mems": String(formats.node_list),
                "idle": Integer(0, 1),
            }
        ),
        "pids": Object({"limit": LIMIT}),
        "blockIO": Object(
            {
                "weight": _WEIGHT,
                "leafWeight": _WEIGHT,
                "weightDevice": Array(
                    Object({**_DEVICE_NUMBERS, "weight": _WEIGHT, "leafWeight": _WEIGHT}, ("major", "minor"))
                ),
                "throttleReadBpsDevice": _THROTTLES,
                "throttleWriteBpsDevice": _THROTTLES,
                "throttleReadIOPSDevice": _THROTTLES,
                "throttleWriteIOPSDevice": _THROTTLES,
            }
        ),
        "hugepageLimits": Array(
            Object({"pageSize": String(formats.page_size), "limit": UINT64}, ("pageSize", "limit"))
        ),
        "network": Object(
            {
                "classID": UINT32,
                "priorities": Array(
                    Object({"name": String(formats.interface_name), "priority": UINT32}, ("name", "priority"))
                ),
            }
        ),
        "rdma": Map(Object({"hcaHandles": UINT32, "hcaObjects": UINT32}), formats.control_file),
        "unified": Map(STRING, formats.control_file),
    }
)

_ACTION = Choice("seccomp action", SECCOMP_ACTIONS)
_ERRNO = UINT16  # the kernel keeps the low 16 bits of a filter's answer

SECCOMP = Object(
    {
        "defaultAction": _ACTION,
        "defaultErrnoRet": _ERRNO,
        "architectures": Array(Choice("architecture", SECCOMP_ARCHITECTURES)),
        "flags": Array(Choice("seccomp flag", SECCOMP_FLAGS)),
        "listenerPath": String(formats.absolute_or_empty),
        "listenerMetadata": STRING,
        "syscalls": Array(
            Object(
                {
                    "names": Array(STRING, 1),
                    "action": _ACTION,
                    "errnoRet": _ERRNO,
                    "args": Array(
                        Object(
                            {
                                "index": Integer(0, 5),
                                "value": UINT64,
                                "valueTwo": UINT64,
                                "op": Choice("operator", SECCOMP_OPERATORS),
                            },
                            ("index", "value", "op"),
                        )
                    ),
                },
                ("names", "action"),
            )
        ),
    },
    ("defaultAction",),
)

_OFFSET = Object({"secs": INT64, "nanosecs": Integer(0, 999_999_999)})

LINUX = Object(
    {
        "namespaces": Array(
            Object(
                {"type": Choice("namespace", NAMESPACES), "path": String(formats.absolute_or_empty)},
                ("type",),
            )
        ),
        "uidMappings": ID_MAPPINGS,
        "gidMappings": ID_MAPPINGS,
        "timeOffsets": Map(_OFFSET, lambda name: "" if name in ("boottime", "monotonic") else "is not a clock"),
        "devices": Array(
            Object(
                {
                    "type": Choice("device type", ("c", "b", "u", "p")),
                    "path": ABSOLUTE,
                    **_DEVICE_NUMBERS,
                    # st_mode with its file type, as some callers copy it
                    "fileMode": Integer(0, 0o177777),
                    "uid": USER_ID,
                    "gid": USER_ID,
                },
                ("type", "path"),
            )
        ),
        "netDevices": Map(Object({"name": String(formats.interface_name_or_empty)}), formats.interface_name),
        "cgroupsPath": String(formats.cgroups_path),
        "resources": RESOURCES,
        "rootfsPropagation": Choice("propagation", PROPAGATIONS),
        "maskedPaths": Array(ABSOLUTE),
        "readonlyPaths": Array(ABSOLUTE),
        "mountLabel": LINE,
        "sysctl": Map(STRING),
        "seccomp": SECCOMP,
        "intelRdt": Object(
            {
                "closID": String(formats.class_of_service),
                "schemata": Array(LINE),
                "l3CacheSchema": LINE,
                "memBwSchema": String(formats.memory_bandwidth),
                "enableMonitoring": BOOLEAN,
            }
        ),
        "memoryPolicy": Object(
            {
                "mode": Choice("memory policy", MEMORY_POLICIES),
                "nodes": String(formats.node_list),
                "flags": Array(Choice("memory policy flag", MEMORY_POLICY_FLAGS)),
            },
            ("mode",),
        ),
        "personality": Object({"domain": Choice("personality", ("LINUX", "LINUX32")), "flags": STRINGS}, ("domain",)),
    }
)

CONFIG = Object(
    {
        "ociVersion": String(formats.version),
        "root": Object({"path": String(formats.not_empty), "readonly": BOOLEAN}, ("path",)),
        "process": PROCESS,
        "hostname": String(formats.host_name),
        "domainname": String(formats.host_name),
        "mounts": Array(MOUNT),
        "hooks": Object(
            dict.fromkeys(
                ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"), HOOKS
            )
        ),
        "annotations": Map(STRING, formats.not_empty),
        "linux": LINUX,
    },
    ("ociVersion", "root"),
)
