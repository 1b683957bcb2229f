"""The static launcher: its own `start` and `delete` beside Python's, case by case; it hands on all else as it was.

`launchers` is (the static program, the script that it becomes): whatever a caller can see must be the same.
`alone` is the static program where no script is beside it: what it does there it does without Python.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import leaks
from tests.conftest import BARE, Bundle, Oci

pytestmark = pytest.mark.root

Seen = tuple[int, str, str, str]
NO_SCRIPT = "can't open file"


@pytest.fixture
def launchers(runtime: Path) -> tuple[Path, Path]:
    return runtime, runtime.with_name("ovt-runtime.py")


@pytest.fixture
def alone(runtime: Path, tmp_path: Path) -> Path:
    (tmp_path / "alone").mkdir()
    return Path(shutil.copy(runtime, tmp_path / "alone"))


@pytest.fixture
def create(oci: Oci, container_id: str) -> Iterator[Callable[[Path], str]]:
    made: list[str] = []

    def make(bundle: Path) -> str:
        made.append(f"{container_id}-{len(made)}")
        # not captured: the container inherits the pipes, and their end would be waited for
        null = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        oci("create", "-b", bundle, made[-1], check=True, **null)
        return made[-1]

    yield make
    for name in made:
        leaks.reap()
        oci("delete", "--force", name, check=True)


def call(launcher: Path, *words: object, **options: object) -> "subprocess.CompletedProcess[str]":
    options = {"env": BARE, "stdin": subprocess.DEVNULL, "timeout": 30, **options}
    return subprocess.run([launcher, *map(str, words)], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def status(oci: Oci, name: str) -> str:
    """The status, once a program that ends at once has ended."""
    leaks.reap()
    found = oci("state", name)
    return str(json.loads(found.stdout)["status"]) if found.returncode == 0 else "none"


def seen(oci: Oci, name: str, done: "subprocess.CompletedProcess[str]") -> Seen:
    time.sleep(0.05)
    return done.returncode, done.stdout, done.stderr.replace(name, "ID"), status(oci, name)


def both(
    oci: Oci,
    launchers: tuple[Path, Path],
    run_root: Path,
    make: Callable[[], str],
    *before: object,
    verb: tuple[str, ...] = ("start",),
) -> Seen:
    """What two fresh containers come to, one handled by each launcher; it must be the same."""
    found = []
    for launcher in launchers:
        name = make()
        done = call(launcher, "--root", run_root, *before, *verb, name)
        found.append(seen(oci, name, done))
    assert found[0] == found[1]
    return found[0]


def test_a_plain_start_needs_no_python(
    oci: Oci, alone: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    name = create(bundle("sleep", "60"))
    done = call(alone, "--root", run_root, "start", name)
    assert seen(oci, name, done) == (0, "", "", "running")
    assert NO_SCRIPT in call(alone, "--root", run_root, "state", name).stderr


def test_a_start_with_hooks_is_left_to_python(
    oci: Oci, alone: Path, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str],
    tmp_path: Path,
) -> None:  # fmt: skip
    log = tmp_path / "hooks"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"echo done >>{log}"]}
    hooks = {"hooks": {"poststart": [hook]}}
    name = create(bundle("sleep", "60", config=hooks))
    assert NO_SCRIPT in call(alone, "--root", run_root, "start", name).stderr
    assert status(oci, name) == "created"
    assert both(oci, launchers, run_root, lambda: create(bundle("sleep", "60", config=hooks))) == (0, "", "", "running")
    assert log.read_text() == "done\ndone\n"


def test_a_failed_start_tells_why(
    oci: Oci, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    def make() -> str:
        place = bundle("/bin/unrunnable")
        (place / "rootfs/bin/unrunnable").write_text("#!/nowhere\n")
        (place / "rootfs/bin/unrunnable").chmod(0o755)
        return create(place)

    expected = 'ovt-runtime: exec: "/bin/unrunnable": no such file or directory\n'
    assert both(oci, launchers, run_root, make) == (1, "", expected, "stopped")


@pytest.mark.parametrize("before", ["running", "stopped", "killed", "paused", "absent", "damaged"])
def test_what_cannot_be_started(
    oci: Oci, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str], before: str
) -> None:
    def make() -> str:
        if before == "absent":
            return "nobody"
        if before == "damaged":
            (run_root / before).mkdir(parents=True, mode=0o700, exist_ok=True)
            (run_root / before / "state.json").write_text("{")
            return before
        name = create(bundle(*(("true",) if before == "stopped" else ("sleep", "60"))))
        if before in ("running", "stopped"):
            oci("start", name, check=True)
            time.sleep(0.05)
        elif before == "paused":
            oci("pause", name, check=True)
        else:
            oci("kill", name, "KILL", check=True)
            time.sleep(0.05)
        leaks.reap()
        return name

    code, out, error, _ = both(oci, launchers, run_root, make)
    assert (code, out) == (1, "")
    assert error.startswith("ovt-runtime: ") and error.count("\n") == 1


def test_two_starts_at_once_are_one(
    oci: Oci, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    name = create(bundle("sleep", "60"))
    command = [*launchers * 2]
    started = [
        subprocess.Popen([p, "--root", run_root, "start", name], env=BARE, stderr=subprocess.DEVNULL) for p in command
    ]
    assert sorted(p.wait(30) for p in started) == [0, 1, 1, 1]
    assert status(oci, name) == "running"


@pytest.mark.parametrize(
    "words",
    [
        ("--log", "LOG", "--log-format", "json", "--systemd-cgroup"),
        ("-log=LOG", "--debug=false", "--cgroup-manager", "cgroupfs"),
        ("--log=", "--root=/nowhere", "--root", "ROOT/"),
        ("--rootless", "auto", "--log-level=debug", "--criu", "/x"),
    ],
    ids=" ".join,
)
def test_options_before_the_verb(
    oci: Oci, alone: Path, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str],
    tmp_path: Path, words: tuple[str, ...],
) -> None:  # fmt: skip
    given = [w.replace("LOG", str(tmp_path / "log")).replace("ROOT", str(run_root)) for w in words]
    assert both(oci, launchers, run_root, lambda: create(bundle("sleep", "60")), *given) == (0, "", "", "running")
    assert both(oci, (alone, alone), run_root, lambda: create(bundle("sleep", "60")), *given) == (0, "", "", "running")
    assert (tmp_path / "log").exists() == any("LOG" in word for word in words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--log", "/nowhere/log"), "/nowhere/log"),
        (("--log-format", "xml"), "unknown log-format 'xml'"),
        (("--debug=maybe",), "invalid boolean value 'maybe' for --debug"),
        (("--colour",), "unknown option: --colour"),
    ],
    ids=str,
)
def test_faulty_options_start_nothing(
    oci: Oci, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str],
    words: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    code, _, error, after = both(oci, launchers, run_root, lambda: create(bundle("sleep", "60")), *words)
    assert (code, after) == (1, "created")
    assert said in error


@pytest.mark.parametrize("name", ["../x", ".hidden", "", "a b", "é", "-x", "a" * 1025, "x/../y"])
def test_names_that_are_none(launchers: tuple[Path, Path], run_root: Path, name: str) -> None:
    run_root.mkdir(mode=0o700)
    done = [call(launcher, "--root", run_root, "start", name) for launcher in launchers]
    assert done[0].returncode == done[1].returncode == 1
    assert done[0].stderr == done[1].stderr != ""


def test_what_others_could_have_put_there_is_not_touched(alone: Path, tmp_path: Path) -> None:
    """A state directory of another user, or one with a link in place of the FIFO, is never acted upon in C."""
    (tmp_path / "victim").write_text("precious")
    for number, (owner, mode) in enumerate([(65534, 0o711), (0, 0o777), (0, 0o711)]):
        place = tmp_path / f"c{number}"
        place.mkdir()
        for name in ("plain", "start.error"):
            (place / name).touch()
        (place / "exec.fifo").symlink_to(tmp_path / "victim")
        place.chmod(mode)
        os.chown(place, owner, 0)
        assert NO_SCRIPT in call(alone, "--root", tmp_path, "start", f"c{number}").stderr
        assert (place / "exec.fifo").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_relative_root(
    oci: Oci, alone: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    name = create(bundle("sleep", "60"))
    done = call(alone, "--root", run_root.name, "start", name, cwd=run_root.parent)
    assert seen(oci, name, done) == (0, "", "", "running")


def test_a_waiting_notify_socket_is_left_to_python(
    oci: Oci, alone: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    name = create(bundle("sleep", "60"))
    done = call(alone, "--root", run_root, "start", name, env={**BARE, "NOTIFY_SOCKET": "/nowhere"})
    assert NO_SCRIPT in done.stderr
    assert status(oci, name) == "created"


def cgroups_of(run_root: Path, name: str) -> list[Path]:
    paths = json.loads((run_root / name / "state.json").read_text())["cgroup"]["paths"]
    return [Path(path) for path in paths.values()]


def ended(oci: Oci, name: str) -> str:
    """Started, and at its end."""
    oci("start", name, check=True)
    for _ in range(200):
        if status(oci, name) == "stopped":
            return name
        time.sleep(0.01)
    raise AssertionError(f"{name} does not end")


@pytest.mark.parametrize("force", [(), ("--force",), ("-f",)], ids=str)
def test_a_plain_delete_needs_no_python(
    oci: Oci, alone: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str], force: tuple[str, ...]
) -> None:
    name = ended(oci, create(bundle("true")))
    cgroups = cgroups_of(run_root, name)
    assert cgroups and all(path.is_dir() for path in cgroups)
    done = call(alone, "--root", run_root, "delete", *force, name)
    assert seen(oci, name, done) == (0, "", "", "none")
    assert not any(path.exists() for path in cgroups)
    assert os.listdir(run_root) == []


@pytest.mark.parametrize("before", ["created", "killed", "running", "stopped", "absent"])
@pytest.mark.parametrize("force", [False, True])
def test_delete_in_every_state(
    oci: Oci, launchers: tuple[Path, Path], run_root: Path, bundle: Bundle, create: Callable[[Path], str],
    before: str, force: bool,
) -> None:  # fmt: skip
    def make() -> str:
        if before == "absent":
            return "nobody"
        name = create(bundle(*(("true",) if before == "stopped" else ("sleep", "60"))))
        if before == "killed":
            oci("kill", name, "KILL", check=True)
            time.sleep(0.05)
            leaks.reap()
        elif before == "running":
            oci("start", name, check=True)
        elif before == "stopped":
            ended(oci, name)
        return name

    refused = not force and before in ("running", "absent")
    code, out, error, after = both(oci, launchers, run_root, make, verb=("delete", *(("--force",) if force else ())))
    assert (code, out) == (int(refused), "")
    assert bool(error) == refused
    assert after == ("running" if refused and before == "running" else "none")


@pytest.mark.parametrize("what", ["hook", "cgroup below", "process left", "unknown file"])
def test_more_than_a_plain_delete_is_left_to_python(
    oci: Oci, alone: Path, runtime: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str], tmp_path: Path,
    what: str,
) -> None:  # fmt: skip
    hook = {"path": "/bin/sh", "args": ["sh", "-c", f"echo gone >{tmp_path / 'gone'}"]}
    config: dict[str, object] = {"hooks": {"poststop": [hook]}} if what == "hook" else {}
    words = ["true"]
    if what == "process left":  # without a pid namespace nothing ends with the first process
        kinds = ("mount", "uts", "ipc", "network", "cgroup")
        config = {"linux": {"namespaces": [{"type": kind} for kind in kinds]}}
        words = ["sh", "-c", "sleep 60 >/dev/null 2>&1 & exit 0"]
    name = ended(oci, create(bundle(*words, config=config)))
    cgroups = cgroups_of(run_root, name)
    if what == "cgroup below":
        (cgroups[0] / "below").mkdir()
    elif what == "unknown file":
        (run_root / name / "unknown").touch()
    assert NO_SCRIPT in call(alone, "--root", run_root, "delete", name).stderr
    assert json.loads(oci("state", name, check=True).stdout)["status"] == "stopped"
    done = call(runtime, "--root", run_root, "delete", name)
    assert seen(oci, name, done) == (0, "", "", "none")
    assert not any(path.exists() for path in cgroups)
    assert (tmp_path / "gone").exists() == (what == "hook")


def test_a_reused_number_is_an_ended_process(
    oci: Oci, alone: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    name = ended(oci, create(bundle("true")))
    plain = run_root / name / "plain"
    _, _, cgroups = plain.read_bytes().partition(b"\0")
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    plain.write_bytes(f"{os.getpid()} {started}\0".encode() + cgroups)
    assert NO_SCRIPT in call(alone, "--root", run_root, "delete", name).stderr  # that process runs: this very one
    plain.write_bytes(f"{os.getpid()} {started}1\0".encode() + cgroups)
    assert seen(oci, name, call(alone, "--root", run_root, "delete", name)) == (0, "", "", "none")


def test_words_and_environment_reach_python_untouched(runtime: Path, tmp_path: Path) -> None:
    """Even bytes that are no text, empty words, and many of them."""
    shutil.copy(runtime, tmp_path)
    probe = "import posix, sys\nposix.write(1, repr((sys.argv[1:], sorted(posix.environ.items()))).encode())\n"
    (tmp_path / "ovt-runtime.py").write_text(probe)
    words = ["", "--", "start", "ä\udcff", "a\nb", "-x=1", *["x" * 1000] * 1000]
    environment = {"NAME": "wert\udcfe", "EMPTY": "", "LC_ALL": "C.UTF-8"}
    done = subprocess.run([tmp_path / "ovt-runtime", *words], env=environment, capture_output=True, timeout=30)
    expected = words, sorted((os.fsencode(k), os.fsencode(v)) for k, v in environment.items())
    assert done.stdout.decode() == repr(expected)


def test_closed_standard_descriptors(
    oci: Oci, alone: Path, run_root: Path, bundle: Bundle, create: Callable[[Path], str]
) -> None:
    name = create(bundle("sleep", "60"))
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", alone, "--root", run_root, "start", name]
    assert subprocess.run(closed, env=BARE, timeout=30).returncode == 0
    assert status(oci, name) == "running"
