"""AppArmor and SELinux on hosts drawn as directory trees: none of the test machines need have either."""

from pathlib import Path
from typing import Any

import pytest

from ovt.errors import HostError
from ovt.kernel import lsm

LABEL = "system_u:system_r:container_t:s0:c1,c2"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def apparmor(tmp_path: Path) -> Path:
    write(tmp_path / "sys/module/apparmor/parameters/enabled", "Y\n")
    write(tmp_path / "sys/kernel/security/apparmor/profiles", "web (enforce)\na name (with) spaces (complain)\n")
    write(tmp_path / "proc/self/attr/apparmor/exec", "")
    write(tmp_path / "proc/self/attr/apparmor/current", "unconfined\n")
    return tmp_path


@pytest.fixture
def selinux(tmp_path: Path) -> Path:
    write(tmp_path / "sys/fs/selinux/enforce", "1")
    return tmp_path


def test_detection(tmp_path: Path) -> None:
    assert not lsm.apparmor_enabled(str(tmp_path))
    assert not lsm.selinux_enabled(str(tmp_path))
    write(tmp_path / "sys/module/apparmor/parameters/enabled", "N\n")
    assert not lsm.apparmor_enabled(str(tmp_path))
    write(tmp_path / "sys/module/apparmor/parameters/enabled", "Y\n")
    assert lsm.apparmor_enabled(str(tmp_path))
    write(tmp_path / "sys/fs/selinux/enforce", "0")
    assert lsm.selinux_enabled(str(tmp_path))


def test_a_profile_goes_to_the_attribute_of_its_lsm(apparmor: Path) -> None:
    process = {"apparmorProfile": "web", "noNewPrivileges": True}
    assert lsm.exec_attributes(process, str(apparmor)) == [("self/attr/apparmor/exec", "exec web")]
    (apparmor / "proc/self/attr/apparmor/exec").unlink()
    assert lsm.exec_attributes(process, str(apparmor)) == [("self/attr/exec", "exec web")]


@pytest.mark.parametrize(
    ("current", "no_new_privs", "word"),
    [
        ("unconfined\n", True, "exec"),
        ("unconfined", True, "exec"),
        ("unconfined_not (enforce)\n", True, "stack"),
        ("lxc-1 (enforce)\n", True, "stack"),
        ("lxc-1 (enforce)\n", False, "exec"),
        ("", True, "stack"),
    ],
)
def test_a_confined_process_with_no_new_privs_stacks(
    apparmor: Path, current: str, no_new_privs: bool, word: str
) -> None:
    write(apparmor / "proc/self/attr/apparmor/current", current)
    process = {"apparmorProfile": "web", "noNewPrivileges": no_new_privs}
    assert lsm.exec_attributes(process, str(apparmor))[0][1] == f"{word} web"


def test_profiles_that_are_not_loaded_are_told_before_the_exec(apparmor: Path) -> None:
    with pytest.raises(HostError, match="missing is not loaded") as caught:
        lsm.exec_attributes({"apparmorProfile": "missing"}, str(apparmor))
    assert "apparmor_parser" in caught.value.hint
    for name in ("a name (with) spaces", ":ns:missing", "web//&missing", "unconfined"):
        assert lsm.exec_attributes({"apparmorProfile": name}, str(apparmor))[0][1] == f"exec {name}"
    (apparmor / "sys/kernel/security/apparmor/profiles").unlink()
    assert lsm.exec_attributes({"apparmorProfile": "missing"}, str(apparmor))


def test_labels_without_their_lsm_are_errors(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="does not run AppArmor"):
        lsm.exec_attributes({"apparmorProfile": "web"}, str(tmp_path))
    with pytest.raises(HostError, match="selinux is disabled"):
        lsm.exec_attributes({"selinuxLabel": LABEL}, str(tmp_path))
    assert lsm.exec_attributes({"apparmorProfile": "unconfined"}, str(tmp_path)) == []


@pytest.mark.parametrize("process", [{}, {"apparmorProfile": "", "selinuxLabel": ""}])
def test_no_labels_no_writes(process: dict[str, Any], selinux: Path, apparmor: Path) -> None:
    assert lsm.exec_attributes(process, str(selinux)) == []
    assert lsm.key_attributes(process, str(selinux)) == []


def test_selinux_labels(selinux: Path) -> None:
    assert lsm.exec_attributes({"selinuxLabel": LABEL}, str(selinux)) == [("self/attr/exec", LABEL)]
    assert lsm.key_attributes({"selinuxLabel": LABEL}, str(selinux)) == [("self/attr/keycreate", LABEL)]


def test_mount_labels(selinux: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = str(selinux)
    assert lsm.mount_context({"mountLabel": LABEL}, {}, root) == ("context", LABEL)
    assert lsm.mount_context({}, {}, root) is None
    assert lsm.mount_context({"mountLabel": LABEL}, {}, str(tmp_path_factory.mktemp("plain"))) is None
    annotations = {"run.oci.mount_context_type": "rootcontext"}
    context = lsm.mount_context({"mountLabel": LABEL}, annotations, root)
    assert lsm.mount_data("size=1m", context) == f'size=1m,rootcontext="{LABEL}"'
    assert lsm.mount_data("", context) == f'rootcontext="{LABEL}"'
    assert lsm.mount_data("size=1m", None) == "size=1m"
    with pytest.raises(HostError, match="mount context type"):
        lsm.mount_context({"mountLabel": LABEL}, {"run.oci.mount_context_type": "x"}, root)


def test_this_host_gives_an_answer() -> None:
    assert lsm.apparmor_enabled() in (True, False)
    assert lsm.selinux_enabled() in (True, False)
    assert lsm.apparmor_confined() in (True, False)
