"""A valid configuration that has every member of the runtime-spec's Linux configuration at least once."""

from __future__ import annotations

from typing import Any

_MAPPING = {"containerID": 0, "hostID": 100000, "size": 65536}
_HOOK = {"path": "/bin/true", "args": ["true", "x"], "env": ["A=b"], "timeout": 5}
_THROTTLE = {"major": 8, "minor": 0, "rate": 1048576}


def full_config() -> dict[str, Any]:
    """A fresh copy each time: tests change it."""
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "rootfs", "readonly": True},
        "process": _process(),
        "hostname": "box",
        "domainname": "example.org",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {
                "destination": "/data",
                "type": "none",
                "source": "/srv/data",
                "options": ["bind", "idmap", "ro"],
                "uidMappings": [dict(_MAPPING)],
                "gidMappings": [dict(_MAPPING)],
            },
        ],
        "hooks": {
            name: [{**_HOOK, "args": ["true", "x"], "env": ["A=b"]}]
            for name in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
        },
        "annotations": {"org.example.note": "hello"},
        "linux": _linux(),
    }


def _process() -> dict[str, Any]:
    return {
        "terminal": True,
        "consoleSize": {"height": 25, "width": 80},
        "cwd": "/",
        "env": ["PATH=/bin", "EMPTY="],
        "args": ["/bin/sh", "-c", "true"],
        "user": {"uid": 1000, "gid": 1000, "umask": 18, "additionalGids": [5, 6]},
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 4096},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ],
        "capabilities": {
            name: ["CAP_KILL", "CAP_CHOWN"] for name in ("bounding", "effective", "inheritable", "permitted", "ambient")
        },
        "noNewPrivileges": True,
        "oomScoreAdj": 100,
        "apparmorProfile": "ovt-default",
        "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2",
        "scheduler": {
            "policy": "SCHED_DEADLINE",
            "nice": 0,
            "priority": 0,
            "flags": ["SCHED_FLAG_RESET_ON_FORK"],
            "runtime": 10_000_000,
            "deadline": 20_000_000,
            "period": 30_000_000,
        },
        "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "execCPUAffinity": {"initial": "0-1", "final": "0,1"},
    }


def _linux() -> dict[str, Any]:
    return {
        "namespaces": [
            {"type": "pid"},
            {"type": "network", "path": "/run/netns/blue"},
            {"type": "mount"},
            {"type": "ipc"},
            {"type": "uts"},
            {"type": "user"},
            {"type": "cgroup"},
            {"type": "time"},
        ],
        "uidMappings": [dict(_MAPPING)],
        "gidMappings": [dict(_MAPPING)],
        "timeOffsets": {"monotonic": {"secs": 100, "nanosecs": 5}, "boottime": {"secs": -3}},
        "devices": [
            {"type": "c", "path": "/dev/fuse", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0},
            {"type": "p", "path": "/dev/pipe"},
        ],
        "netDevices": {"eth7": {"name": "eth0"}, "eth8": {}},
        "cgroupsPath": "/ovt/box",
        "resources": _resources(),
        "rootfsPropagation": "rprivate",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "system_u:object_r:container_file_t:s0",
        "sysctl": {"net.ipv4.ip_forward": "1", "kernel.msgmax": "8192"},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/run/agent.sock",
            "listenerMetadata": "box",
            "syscalls": [
                {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_ERRNO",
                    "errnoRet": 1,
                    "args": [{"index": 0, "value": 8, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ"}],
                },
                {"names": ["mknod"], "action": "SCMP_ACT_NOTIFY"},
            ],
        },
        "intelRdt": {
            "closID": "gold",
            "schemata": ["L3:0=f"],
            "l3CacheSchema": "L3:0=ff",
            "memBwSchema": "MB:0=70",
            "enableMonitoring": True,
        },
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]},
        "personality": {"domain": "LINUX", "flags": []},
    }


def _resources() -> dict[str, Any]:
    return {
        "devices": [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 10, "minor": -1, "access": "rw"},
        ],
        "memory": {
            "limit": 536870912,
            "reservation": 268435456,
            "swap": -1,
            "kernel": -1,
            "kernelTCP": -1,
            "swappiness": 10,
            "disableOOMKiller": False,
            "useHierarchy": True,
            "checkBeforeUpdate": True,
        },
        "cpu": {
            "shares": 1024,
            "quota": 100000,
            "burst": 1000,
            "period": 100000,
            "realtimeRuntime": 0,
            "realtimePeriod": 1000000,
            "cpus": "0-1",
            "mems": "0",
            "idle": 0,
        },
        "pids": {"limit": 100},
        "blockIO": {
            "weight": 500,
            "leafWeight": 300,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 500, "leafWeight": 300}],
            "throttleReadBpsDevice": [dict(_THROTTLE)],
            "throttleWriteBpsDevice": [dict(_THROTTLE)],
            "throttleReadIOPSDevice": [dict(_THROTTLE)],
            "throttleWriteIOPSDevice": [dict(_THROTTLE)],
        },
        "hugepageLimits": [{"pageSize": "2MB", "limit": 209715200}],
        "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
        "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10000}},
        "unified": {"memory.high": "536870912"},
    }
