"""What a node does when others go: says it, waits, gives up; and its launcher as a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launchers.cluster import child as child_module
from launchers.cluster import watch
from launchers.cluster.child import SIGNALS, Child, adopt_orphans
from launchers.cluster.cli import main
from launchers.cluster.network import interface_of, own_address
from launchers.cluster.place import Place
from launchers.cluster.presence import Node
from launchers.cluster.watch import Watch

pytestmark = pytest.mark.unit

SLEEP = "import time; time.sleep(60)"


class FakePresence:
    """What is known of the other nodes, as a test says."""

    def __init__(self, **nodes: Node) -> None:
        self.nodes = {int(name[1:]): node for name, node in nodes.items()}
        self.lost: str | None = None


def quiet(seconds: float, code: int | None = None) -> Node:
    return Node("host-b, 10.0.0.2", 5, time.monotonic() - seconds, code)


def watching(presence: FakePresence, *, restarts: int = 0) -> tuple[Watch, list[str]]:
    lines: list[str] = []
    place = Place(0, 3, "10.0.0.1", 29400)
    made = Watch(presence, place, max_restarts=restarts, seconds=100, tell=lines.append)  # type: ignore[arg-type]
    return made, lines


def test_a_quiet_node_is_named_once_and_may_come_back() -> None:
    presence = FakePresence(_1=quiet(20.0))
    watched, lines = watching(presence)
    assert watched.reason_to_end() is None
    assert watched.reason_to_end() is None
    assert len(lines) == 1
    assert "no heartbeat from node 1 (host-b, 10.0.0.2) for 20 s" in lines[0]
    presence.nodes[1] = quiet(0.0)
    assert watched.reason_to_end() is None
    assert lines[1:] == ["node 1 is back"]


def test_a_node_that_stays_away_ends_the_others() -> None:
    watched, _ = watching(FakePresence(_1=quiet(0), _2=quiet(101)))
    assert "no heartbeat from node 2 (host-b, 10.0.0.2) for 100 s" in str(watched.reason_to_end())


@pytest.mark.parametrize(
    ("number", "code", "restarts", "ends"),
    [(1, 1, 0, True), (1, 1, 3, False), (0, 1, 3, True), (1, 0, 0, False)],
)
def test_a_failed_launcher_ends_the_others_unless_it_is_started_again(
    number: int, code: int, restarts: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.05)
    watched, lines = watching(FakePresence(**{f"_{number}": quiet(1, code)}), restarts=restarts)
    assert watched.reason_to_end() is None  # its own processes may still say what they met
    time.sleep(0.1)
    reason = watched.reason_to_end()
    assert (reason is not None) == ends
    assert bool(lines) == ends
    if ends:
        assert f"node {number} (host-b, 10.0.0.2) exited with code 1" in str(reason)


def test_nobody_goes_on_without_node_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE", 0.0)
    presence = FakePresence()
    watched, _ = watching(presence, restarts=3)
    presence.lost = "node 0 (10.0.0.1:29400) is lost: it has exited"
    watched.reason_to_end()
    time.sleep(0.01)
    assert watched.reason_to_end() == presence.lost
    assert watched.missing(1) == [presence.lost]


def test_after_a_failure_the_missing_are_named() -> None:
    watched, _ = watching(FakePresence(_0=quiet(0), _1=quiet(5), _2=quiet(0, 9)))
    assert watched.missing(3) == [
        "no heartbeat from node 1 (host-b, 10.0.0.2) for 5 s",
        "node 2 (host-b, 10.0.0.2) exited with code 9",
    ]
    assert watched.others_run()
    assert not watching(FakePresence(_1=quiet(99), _2=quiet(0, 0)))[0].others_run()


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def exit_code(child: Child, seconds: float = 30.0) -> int:
    deadline = time.monotonic() + seconds
    while (code := child.exit_code()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


@pytest.mark.parametrize(("code", "told"), [("sys.exit(5)", 5), ("os.kill(os.getpid(), 9)", 137)])
def test_its_exit_code_is_that_of_a_shell(code: str, told: int) -> None:
    child = Child([sys.executable, "-c", f"import os, sys; {code}"], os.environ, through=False)
    assert exit_code(child) == told


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.usefixtures("signals")
def test_signals_go_to_the_launcher_or_to_its_children(through: bool, tmp_path: Path) -> None:
    """DeepSpeed's outer process would die of them, and leave its children alone."""
    ready = tmp_path / "ready"
    inner = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {inner!r}]))"
    script = outer if through else inner
    child = Child([sys.executable, "-c", script], os.environ, through=through)
    child.forward_signals()
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)
    assert exit_code(child) == 7
    assert child.signals == 1


def test_a_launcher_that_does_not_end_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child_module, "KILL_SECONDS", 0.3)
    monkeypatch.setattr(child_module, "LEFT_SECONDS", 0.3)
    pid = tmp_path / "pid"
    script = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"inner = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(inner.pid))\n"
        "time.sleep(60)\n"
    )
    child = Child([sys.executable, "-c", script], os.environ, through=False)
    deadline = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.terminate()
    assert child.exit_code() == 137
    inner = int(pid.read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(inner) and psutil.Process(inner).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_launcher_that_hangs_without_processes_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child_module, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(child_module, "LEFT_SECONDS", 0.3)
    ready = tmp_path / "ready"
    script = (
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    child = Child([sys.executable, "-c", script], os.environ, through=False)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    child.terminate()
    assert child.exit_code() == 137
    assert time.monotonic() - began < child_module.KILL_SECONDS / 2


def test_processes_that_a_killed_launcher_leaves_are_ended(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = (
        "import os, pathlib, subprocess, sys\n"
        f"inner = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(inner.pid))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    bystander = subprocess.Popen([sys.executable, "-c", SLEEP])
    adopt_orphans()
    try:
        child = Child([sys.executable, "-c", script], os.environ, through=False)
        assert exit_code(child) == 137
        assert child.sweep() == 1
        with pytest.raises(psutil.NoSuchProcess):
            psutil.Process(int(pid.read_text()))
        assert child.sweep() == 0
        assert bystander.poll() is None
    finally:
        adopt_orphans(False)
        bystander.kill()
        bystander.wait()


def test_the_interface_is_that_of_the_own_address() -> None:
    assert own_address("127.0.0.1", 29400) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # an address of documentation


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No variable of a cluster is set; returns a job's script."""
    for name in os.environ:
        if name.startswith(("SLURM", "NNODES", "NODE_RANK", "MASTER_", "GLOO_", "NCCL_")):
            monkeypatch.delenv(name)
    script = tmp_path / "job.py"
    script.write_text("pass")
    return script


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_a_dry_run_prints_the_command_alone(
    launcher: str, bare: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = bare.with_name("accelerate.yaml")
    config.touch()
    options = ["--launcher", launcher, "--nodes", "2", "--node-rank", "1", "--dry-run"]
    options += ["--master-addr", "127.0.0.1", "--accelerate-config", str(config)]
    assert main([*options, str(bare), "0", "--name", "with space"]) == 0
    told = capfd.readouterr().out
    assert "number 1 of 2 nodes, node 0 is at 127.0.0.1:29400" in told
    assert "GLOO_SOCKET_IFNAME=lo" in told
    assert f"{bare} 0 --name 'with space'" in told
    assert ("has no effect" in told) == (launcher != "accelerate")


@pytest.mark.usefixtures("signals")
def test_a_dry_run_waits_for_no_name(bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2", "--node-rank", "1", "--master-addr", "absent.invalid", "--dry-run"]
    assert main([*options, str(bare)]) == 0
    assert "<unknown: name not known" in capfd.readouterr().out


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--nodes", "2"], "NODE_RANK: not set"),
        (["--launcher", "deepspeed", "--max-restarts", "1"], "--max-restarts"),
        (["--launcher", "accelerate"], "ACCELERATE_CONFIG: not set"),
        (["--launcher", "accelerate", "--accelerate-config", "no.yaml"], "no.yaml"),
        (["--start-timeout", "0"], "--start-timeout=0"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], named: str, bare: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, str(bare)]) == 2
    told = capfd.readouterr()
    assert named in told.err
    assert told.err.count("\n") == 1


@pytest.mark.usefixtures("signals")
def test_a_script_that_is_not_there_is_told(bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([f"{bare}x"]) == 2
    assert f"{bare}x: no such file" in capfd.readouterr().err


@pytest.mark.usefixtures("signals", "bare")
def test_an_unknown_launcher_in_the_environment_is_told(
    monkeypatch: pytest.MonkeyPatch, bare: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARG_DIST_LAUNCHER", "mpirun")
    assert main([str(bare)]) == 2
    assert "ARG_DIST_LAUNCHER=mpirun" in capfd.readouterr().err
