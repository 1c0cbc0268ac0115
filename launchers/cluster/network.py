"""This node's own address on the route to another, and its network interface."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

from launchers.cluster import ClusterError
from launchers.cluster.place import endpoint

T = TypeVar("T")

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
TRY_SECONDS = 5.0
PAUSE_SECONDS = 0.5
TELL_SECONDS = 30.0


def own_address(address: str, port: int) -> str:
    """The source address of packets from here to `address`. Sends nothing.

    Raises:
        OSError: the name is unknown, or there is no route.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def find_own_address(address: str, port: int, seconds: float, tell: Callable[[str], None]) -> str:
    """:func:`own_address`, retried while the name is unknown or there is no route.

    Raises:
        ClusterError: every attempt within `seconds` failed.
    """
    return _retry(lambda: own_address(address, port), address, port, seconds, tell)


def interface_of(address: str) -> str | None:
    """The name of the interface that has `address`; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return str(name)
    return None


def wait_until_open(address: str, port: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Returns as soon as a server listens at `address` and `port`.

    Unknown names are retried, too: in Kubernetes names become available late.

    Raises:
        ClusterError: every attempt within `seconds` failed.
    """

    def knock() -> None:
        socket.create_connection((address, port), TRY_SECONDS).close()

    _retry(knock, address, port, seconds, tell)


def _retry(
    attempt: Callable[[], T], address: str, port: int, seconds: float, tell: Callable[[str], None]
) -> T:
    began = reported = time.monotonic()
    while True:
        try:
            return attempt()
        except OSError as error:
            cause = reason(error)
        now = time.monotonic()
        if now - began >= seconds:
            raise ClusterError(
                f"node 0 did not answer at {endpoint(address, port)} for {now - began:.0f} s (last "
                f"attempt: {cause}). Is MASTER_ADDR its address, is node 0 running, and does its "
                "firewall allow this port?"
            )
        if now - reported >= TELL_SECONDS:
            reported = now
            tell(
                f"waiting for node 0 at {endpoint(address, port)}: {now - began:.0f} of "
                f"{seconds:g} s ({cause})"
            )
        time.sleep(min(PAUSE_SECONDS, max(0.0, began + seconds - now)))


def reason(error: OSError) -> str:
    """Why an attempt to connect failed, for the user."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TRY_SECONDS:g} s"
    if isinstance(error, socket.gaierror):
        return f"name not known: {error.strerror}"
    return error.strerror or str(error)
