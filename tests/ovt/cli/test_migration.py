"""Words and exit statuses of migrate and receive where no machine is needed."""

import re
from pathlib import Path

import pytest

from ovt.cli import migration, run
from ovt.engine.vm.migration import Progress
from ovt.host import Host
from ovt.machines.migrate import Outcome
from ovt.model import Instance, Kind, Spec


def ovt(place: Path, *words: str) -> int:
    return run(["--data-root", str(place / "data"), "--run-root", str(place / "run"), *words])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["one"], "one instance and one host are needed"),
        (["one", "a", "b"], "one instance and one host are needed"),
        (["one", "ftp://host"], "'ftp://host' is not a host"),
        (["one", "host", "--downtime", "0"], "--downtime is at least 1 millisecond"),
        (["one", "host", "--multifd", "999"], "--multifd from 0 to 255"),
        (["one", "host", "--cancel"], "--cancel and --resolve take an instance alone"),
        (["one", "--cancel", "--resolve"], "--cancel and --resolve take an instance alone"),
    ],
)
def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert ovt(tmp_path, "migrate", *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nobody", "unix:/none"], ["nobody", "--cancel"], ["nobody", "--resolve"]])
def test_who_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert ovt(tmp_path, "migrate", *words) == 1
    assert "cannot migrate nobody: there is no instance 'nobody'" in capsys.readouterr().err


def test_a_container_does_not_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = Host(str(tmp_path / "data"), str(tmp_path / "run"))
    host.store.add(Instance("0123456789ab", "box", Kind.CONTAINER, 1.0, Spec("busybox")))
    assert ovt(tmp_path, "migrate", "box", "unix:/none") == 1
    assert "it is a container, and only machines can move" in capsys.readouterr().err


def test_receive_says_what_does_not_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ovt(tmp_path, "receive", "--listen", "unix:/x", "--join", "a", "b") == 2
    assert "--listen and --join together" in capsys.readouterr().err
    assert ovt(tmp_path, "receive", "--listen", "me@host") == 2
    assert "SSH needs nobody to listen" in capsys.readouterr().err
    assert ovt(tmp_path, "receive", "--listen", "tls://127.0.0.1:0") == 2
    assert "TLS needs certificates on both sides" in capsys.readouterr().err
    assert ovt(tmp_path, "receive", "--join", "0" * 32, "memory") == 1
    assert "there is no such session" in capsys.readouterr().err


def test_progress_and_outcome(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "_SHOWN", 0.0)
    reporter = migration._Reporter(False)
    reporter.tell(Progress("memory", 3 << 20, 8 << 20, 2.0 * 2**20, 1024.0, 250))
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"memory: 3\.0MiB of 8\.0MiB to go, 2\.0MiB/s, the guest writes 1\.0KiB/s, would stand still for 250 ms\n", said
    )
    migration._Reporter(True).tell(Progress("memory", 1, 2))
    assert capsys.readouterr().err == ""
    words = migration._summary(Outcome("one", "0" * 12, 1500, 20, 31, 1 << 20), "host")
    assert words == "one runs on host: it stood still for 31 ms, 1.0MiB in 1.5 s"
