"""What `--help` prints."""

import posix

from ovt.runtime_verbs import VERBS


def overview() -> str:
    """The list of commands."""
    lines = [
        "ovt-runtime runs OCI containers (runtime-spec 1.3); called by podman, containerd, docker and CRI-O.",
        "",
        "usage: ovt-runtime [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup |",
        "                   --cgroup-manager cgroupfs|systemd|disabled] [--debug] COMMAND …",
        "",
    ]
    lines += [f"  {verb:<11} {entry[7]}" for verb, entry in VERBS.items()]
    return "\n".join([*lines, "", "ovt-runtime COMMAND --help shows the flags of one.", ""])


def show(verb: str) -> None:
    """One command's usage and flags."""
    _, values, switches, _, _, _, usage, text = VERBS[verb]
    lines = [f"ovt-runtime {verb}: {text}", "", f"usage: ovt-runtime {verb} {usage}", ""]
    lines += [f"  --{name} VALUE" for name in sorted(values) if len(name) > 1]
    lines += [f"  --{name}" for name in sorted(switches) if len(name) > 1]
    posix.write(1, "\n".join([*lines, ""]).encode())
