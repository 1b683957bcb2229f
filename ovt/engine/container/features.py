"""The Features structure of the runtime-spec (features.md): what this runtime knows, whatever the host offers.

Everything that has a table elsewhere is read from that table, so that this answer and what the runtime does cannot
drift apart; tests feed each name back to the module that has to know it.
"""

from __future__ import annotations

from ovt import __version__
from ovt.engine.container import mount_options, tables
from ovt.engine.container.state import OCI_VERSION
from ovt.kernel import capabilities, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

OCI_VERSION_MIN = "1.0.0"
# Prefixes of annotations that change how a container is set up, so that engines can refuse them from tenants.
UNSAFE_ANNOTATIONS = ("org.criu.", "org.systemd.property.", "run.oci.")


def features() -> dict[str, Any]:
    """The structure, ready to be written as JSON."""
    return {
        "ociVersionMin": OCI_VERSION_MIN,
        "ociVersionMax": OCI_VERSION,
        "hooks": [name.removeprefix(".") for name, _ in tables.CONFIG.fields["hooks"].children()],
        "mountOptions": list(mount_options.NAMES),
        "linux": {
            "namespaces": sorted(tables.NAMESPACES),
            "capabilities": list(capabilities.NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": _seccomp(),
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "memoryPolicy": {"modes": list(tables.MEMORY_POLICIES), "flags": list(tables.MEMORY_POLICY_FLAGS)},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": _annotations(),
        "potentiallyUnsafeConfigAnnotations": list(UNSAFE_ANNOTATIONS),
    }


def libseccomp_version() -> str:
    """The version of the host's libseccomp, '' when it has none."""
    from ovt.kernel.libseccomp import Library

    try:
        version = Library(seccomp.find_library()[0]).version()
    except OSError:
        return ""
    return ".".join(str(number) for number in version)


def _seccomp() -> dict[str, Any]:
    return {
        "enabled": True,
        "actions": sorted(seccomp.ACTIONS),
        "operators": sorted(seccomp.OPERATORS),
        "archs": sorted(seccomp.ARCHITECTURES),
        "knownFlags": sorted(seccomp.FLAGS),
        "supportedFlags": sorted(seccomp.supported_flags()),
    }


def _annotations() -> dict[str, str]:
    # The checkpoint one is the name that engines look for in every runtime's answer.
    found = {
        "org.opencontainers.runc.checkpoint.enabled": "true",
        "io.github.ovt.version": __version__,
    }
    library = libseccomp_version()
    if library:
        found["io.github.seccomp.libseccomp.version"] = library
    return found
