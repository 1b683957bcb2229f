"""What `features` claims is what the modules behind it know."""

import json
import re

from ovt.engine.container import mount_options, tables
from ovt.engine.container.features import features
from ovt.kernel import capabilities, jsonc, seccomp

FOUND = features()


def test_it_is_json_in_the_specs_form() -> None:
    assert json.loads(jsonc.dumps(FOUND)) == FOUND
    assert re.fullmatch(r"1\.\d+\.\d+", FOUND["ociVersionMax"])
    assert FOUND["ociVersionMin"] == "1.0.0"
    members = {"ociVersionMin", "ociVersionMax", "hooks", "mountOptions", "linux", "annotations"}
    assert set(FOUND) == members | {"potentiallyUnsafeConfigAnnotations"}
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in FOUND["annotations"].items())
    assert re.fullmatch(r"2\.\d+\.\d+", FOUND["annotations"]["io.github.seccomp.libseccomp.version"])


def test_every_mount_option_is_recognised() -> None:
    for word in FOUND["mountOptions"]:
        assert mount_options.parse([word], "$.mounts[0].options").data == [] or mount_options.is_superblock_flag(word)
    assert {"bind", "rro", "idmap", "tmpcopyup", "rshared"} <= set(FOUND["mountOptions"])


def test_every_name_of_linux_is_known_to_the_configurations_tables() -> None:
    linux = FOUND["linux"]
    assert set(linux["namespaces"]) == set(tables.NAMESPACES)
    assert capabilities.mask(linux["capabilities"], last=63) == (1 << len(capabilities.NAMES)) - 1
    assert set(linux["seccomp"]["actions"]) == set(tables.SECCOMP_ACTIONS)
    assert set(linux["seccomp"]["operators"]) == set(tables.SECCOMP_OPERATORS)
    assert set(linux["seccomp"]["archs"]) == set(tables.SECCOMP_ARCHITECTURES)
    assert set(linux["seccomp"]["knownFlags"]) == set(tables.SECCOMP_FLAGS)
    assert set(linux["seccomp"]["supportedFlags"]) <= set(linux["seccomp"]["knownFlags"])
    assert set(linux["memoryPolicy"]["modes"]) == set(tables.MEMORY_POLICIES)
    assert FOUND["hooks"] == ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]


def test_every_seccomp_name_compiles() -> None:
    linux = FOUND["linux"]["seccomp"]
    for action in linux["actions"]:
        rules = [{"names": ["getppid"], "action": action}]
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x", "syscalls": rules}
        assert seccomp.compile(profile).bpf
    for operator in linux["operators"]:
        arguments = [{"index": 0, "value": 1, "valueTwo": 1, "op": operator}]
        rules = [{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "args": arguments}]
        assert seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}).bpf
    assert seccomp.compile({"defaultAction": "SCMP_ACT_ALLOW", "flags": linux["supportedFlags"]}).bpf
