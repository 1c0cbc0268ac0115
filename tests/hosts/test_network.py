"""The hosts themselves: what tests and benchmarks that run on them rely on."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.hosts.hosts import Node, hosts
from tests.hosts.namespaces import SETTINGS, Host, NetworkError, remove_leftovers
from tests.patience import patient

SERVE = """
import socket, sys, time
server = socket.create_server(("", 5000))
print("listening", flush=True)
connection, _ = server.accept()
size = 0
while got := connection.recv(1 << 20):
    size += len(got)
print("received", size)
"""
SEND = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000), timeout=5)
connection.sendall(bytes(int(sys.argv[2])))
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"


def python(host: Host, script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = host.command([sys.executable, "-c", script, *words])
    return subprocess.run(command, capture_output=True, text=True, timeout=patient(30), check=False)


def exists(name: str) -> bool:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return name in listed.stdout.split() or (SETTINGS / name).exists()


def test_hosts_have_addresses_names_cables_and_leave_nothing(tmp_path: Path) -> None:
    outside = socket.gethostname()
    with hosts(2) as (first, second):
        own = python(
            first, "import socket; n = socket.gethostname(); print(n, socket.gethostbyname(n))"
        )
        assert own.stdout.split() == ["host0", "127.0.1.1"]
        assert python(first, "import socket; socket.gethostbyname('host1')").returncode != 0
        assert socket.gethostname() == outside

        server = Node(first, [sys.executable, "-c", SERVE], tmp_path / "server")
        server.says("listening", seconds=20)
        second.limit(80e6)
        before, began = second.traffic(), time.monotonic()
        assert python(second, SEND, first.address, 10_000_000).returncode == 0
        assert server.ends(seconds=20) == 0
        # a second at 80 Mbit/s, less what a burst and the queue take at once
        assert time.monotonic() - began > 0.8
        assert "received 10000000" in server.printed()
        assert 10_000_000 < second.traffic().sent - before.sent < 11_000_000

        second.limit(None)
        second.cut()
        assert "timed out" in python(second, CONNECT, first.address).stderr
        second.restore()
        assert "refused" in python(second, CONNECT, first.address).stderr

        lasting = Node(second, ["sh", "-c", "sleep 1000 & sleep 1000"], tmp_path / "lasting")
        lasting.wait(lambda: len(second.processes()) >= 2, "two processes", seconds=20)
        second.kill()
        assert lasting.process.returncode is not None and second.processes() == []
        left = Node(first, ["sleep", 1000], tmp_path / "left")
    assert left.ends(seconds=0) < 0
    assert not exists(first.name) and not exists(second.name)


def test_what_a_killed_run_has_left_is_removed(tmp_path: Path) -> None:
    with hosts(1) as (mine,):
        script = (
            "import os, signal, subprocess, time; from tests.hosts.namespaces import network\n"
            "with network(1) as (host,):\n"
            "    words = host.command(['sleep', '1000'])\n"
            "    sleeper = subprocess.Popen(words, stdout=subprocess.DEVNULL)\n"
            "    while not host.processes(): time.sleep(0.05)\n"
            "    print(host.name, sleeper.pid, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        killed = subprocess.run(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            text=True,
            timeout=patient(60),
            check=False,
        )
        name, sleeper = killed.stdout.split()
        assert exists(name)
        assert name in remove_leftovers()
        assert not exists(name)
        deadline = time.monotonic() + 10
        while Path("/proc", sleeper, "exe").exists():  # a zombie has none
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert exists(mine.name)  # whose maker lives


def test_a_refusal_says_what_was_asked_of_whom() -> None:
    with (
        hosts(1) as (host,),
        pytest.raises(NetworkError, match=r"tc -n .*host0 .*eth0 .*rate 0bit"),
    ):
        host.limit(0)
