"""Hosts as network namespaces of this machine, with their own addresses and host names, one switch.

    with network(2) as (first, second):
        process = first.start(["python", "-m", "http.server"], ...)
        second.limit(1e9)
        second.cut()

Each host is a namespace with one link to a bridge in a separate namespace: the machine's routes,
addresses and firewall are unchanged, and any number of networks can coexist. Hosts share the files
and processors of the machine. As on Debian, a host's own name resolves to 127.0.1.1, and hosts
cannot resolve each other's names.

At the end of the block, all processes of the hosts are killed and the namespaces removed. Namespace
names contain the id of the process that created them, so that the next process can remove what a
killed one left behind. Requires Linux, root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

PREFIX = "argdist"
INTERFACE = "eth0"
SUBNET = "10.83.0."
BURST_SECONDS = 0.004
"""Time a link may send at full speed without throttling, about one kernel timer tick."""
LEAST_BURST = 128 * 1024
"""Minimum burst in bytes; must fit one packet before segmentation."""
QUEUE = "50ms"
SETTINGS = Path("/etc/netns")
"""Directory in which ``ip netns exec`` looks for a namespace's ``/etc/hosts``."""

_numbers = count()


class NetworkError(Exception):
    """Hosts cannot be created or changed; the message is the system's error."""


def obstacle() -> str | None:
    """Why hosts cannot be created on this machine; None if they can."""
    missing = [name for name in ("ip", "tc", "unshare", "hostname") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; on Debian: apt-get install iproute2 hostname"
    if os.geteuid() != 0:
        return "network namespaces require root"
    try:
        with network(1) as (host,):
            host.limit(1e9)
    except NetworkError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Traffic:
    """Bytes that an interface has carried, including headers."""

    received: int
    sent: int


class Host:
    """One host of a :func:`network`.

    Attributes:
        name: name of its network namespace.
        hostname: host name seen by its processes; other hosts cannot resolve it.
        address: its IPv4 address on :data:`INTERFACE`.
    """

    def __init__(self, switch: str, name: str, index: int) -> None:
        self.name = name
        self.hostname = f"host{index}"
        self.address = f"{SUBNET}{index + 1}"
        self._switch = switch
        self._port = f"port{index}"
        self._started: list[subprocess.Popen[bytes]] = []

    def command(self, words: Sequence[object]) -> list[str]:
        """The command line that runs `words` in the host; the process keeps its id."""
        named = f'hostname {self.hostname} && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", named, "sh"]
        return ["ip", "netns", "exec", self.name, *inside, *map(str, words)]

    def start(
        self,
        words: Sequence[object],
        *,
        output: IO[bytes] | int,
        environment: Mapping[str, str],
        folder: Path,
    ) -> subprocess.Popen[bytes]:
        """Start a command in the host, in a new session.

        Args:
            words: the command line.
            output: an open file or ``subprocess.DEVNULL``, for stdout and stderr.
            environment: the complete environment.
            folder: the working directory.
        """
        process = subprocess.Popen(
            self.command(words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def processes(self) -> list[int]:
        """Ids of all processes in the host."""
        return _processes(self.name)

    def kill(self) -> None:
        """Kill all processes of the host: a power failure, except that connections are closed."""
        _kill(self.name)
        for process in self._started:
            process.wait()

    def cut(self) -> None:
        """Unplug the link: packets are lost silently."""
        _run("ip", "-n", self._switch, "link", "set", self._port, "down")

    def restore(self) -> None:
        """Plug the link in again."""
        _run("ip", "-n", self._switch, "link", "set", self._port, "up")

    def limit(self, bits_per_second: float | None) -> None:
        """Limit the bandwidth of the host's link in each direction; None for no limit."""
        for namespace, interface in ((self.name, INTERFACE), (self._switch, self._port)):
            where = ("tc", "-n", namespace, "qdisc")
            if bits_per_second is None:
                with contextlib.suppress(NetworkError):  # no limit was set
                    _run(*where, "del", "dev", interface, "root")
                continue
            burst = max(LEAST_BURST, int(bits_per_second / 8 * BURST_SECONDS))
            rate = ("rate", f"{int(bits_per_second)}bit", "burst", f"{burst}b", "latency", QUEUE)
            _run(*where, "replace", "dev", interface, "root", "tbf", *rate)

    def traffic(self) -> Traffic:
        """Bytes that the host's link has carried so far."""
        printed = _run("ip", "netns", "exec", self.name, "cat", "/proc/net/dev")
        return read_traffic(printed, INTERFACE)


def read_traffic(table: str, interface: str) -> Traffic:
    """Read the row of `interface` in `table`, the contents of ``/proc/net/dev``.

    Raises:
        NetworkError: the interface was not found.
    """
    for line in table.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            values = numbers.split()
            return Traffic(received=int(values[0]), sent=int(values[8]))
    raise NetworkError(f"no interface {interface} in /proc/net/dev")


@contextlib.contextmanager
def network(hosts: int) -> Iterator[tuple[Host, ...]]:
    """Create `hosts` hosts, each linked to one switch.

    Raises:
        NetworkError: the system refused; everything created so far has been removed.
    """
    remove_leftovers()
    stem = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
    switch, made = f"{stem}-switch", []
    try:
        _run("ip", "netns", "add", switch)
        made.append(switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        members = []
        for index in range(hosts):
            host = Host(switch, f"{stem}-host{index}", index)
            _run("ip", "netns", "add", host.name)
            made.append(host.name)
            _connect(switch, f"port{index}", host)
            members.append(host)
        yield tuple(members)
    finally:
        for name in reversed(made):
            _remove(name)


def _connect(switch: str, port: str, host: Host) -> None:
    folder = SETTINGS / host.name
    folder.mkdir(parents=True)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.hostname}\n")
    peer = ("peer", "name", INTERFACE, "netns", host.name)
    _run("ip", "-n", switch, "link", "add", port, "type", "veth", *peer)
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    for interface in ("lo", INTERFACE):
        _run("ip", "-n", host.name, "link", "set", interface, "up")


def remove_leftovers() -> list[str]:
    """Remove the networks of processes that no longer exist; returns the namespaces' names."""
    printed = _run("ip", "netns", "list")
    names = {line.split()[0] for line in printed.splitlines() if line.strip()}
    if SETTINGS.is_dir():
        names |= {path.name for path in SETTINGS.iterdir()}
    stale = sorted(name for name in names if _is_left_over(name))
    for name in stale:
        _remove(name)
    return stale


def _is_left_over(name: str) -> bool:
    prefix, _, rest = name.partition("-")
    maker = rest.partition("-")[0]
    return prefix == PREFIX and maker.isdecimal() and not Path("/proc", maker).exists()


def _remove(name: str) -> None:
    """Kill the processes in a namespace and remove it, even if only partly created."""
    with contextlib.suppress(NetworkError):
        _kill(name)
        _run("ip", "netns", "delete", name)
    shutil.rmtree(SETTINGS / name, ignore_errors=True)


def _kill(name: str) -> None:
    deadline = time.monotonic() + 10
    while there := _processes(name):  # repeat: they may be forking
        for process in there:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise NetworkError(f"processes {there} of {name} do not terminate")
        time.sleep(0.02)


def _processes(name: str) -> list[int]:
    return [int(number) for number in _run("ip", "netns", "pids", name).split()]


def _run(*words: str) -> str:
    try:
        finished = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"{' '.join(words)}: {error}") from None
    if finished.returncode != 0:
        raise NetworkError(f"{' '.join(words)}: {finished.stderr.strip()}")
    return finished.stdout
