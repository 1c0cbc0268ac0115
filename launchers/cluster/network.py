"""This node's own address on the way to another, and the interface that has it."""

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
    """The address that packets from here to `address` carry. Sends nothing.

    Raises:
        OSError: the name is unknown, or there is no route.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def find_own_address(address: str, port: int, seconds: float, tell: Callable[[str], None]) -> str:
    """:func:`own_address`, tried again while the name is unknown or there is no route.

    Raises:
        ClusterError: that was so for `seconds`.
    """
    return _retry(lambda: own_address(address, port), address, port, seconds, tell)


def interface_of(address: str) -> str | None:
    """The name of the interface that has `address`; None if none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return str(name)
    return None


def wait_until_open(address: str, port: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Returns as soon as somebody listens at `address` and `port`.

    A name that is unknown is tried again too: in Kubernetes names come late.

    Raises:
        ClusterError: nobody did for `seconds`.
    """

    def knock() -> None:
        socket.create_connection((address, port), TRY_SECONDS).close()

    _retry(knock, address, port, seconds, tell)


def _retry(
    attempt: Callable[[], T], address: str, port: int, seconds: float, tell: Callable[[str], None]
) -> T:
    began = told = time.monotonic()
    while True:
        try:
            return attempt()
        except OSError as error:
            cause = reason(error)
        now = time.monotonic()
        if now - began >= seconds:
            raise ClusterError(
                f"nobody answered at {endpoint(address, port)} for {now - began:.0f} s, which is "
                f"where node 0 was said to be (the last attempt: {cause}). Is MASTER_ADDR right, "
                "does node 0 run, and does its firewall let this port in?"
            )
        if now - told >= TELL_SECONDS:
            told = now
            tell(
                f"waiting for node 0 at {endpoint(address, port)}: {now - began:.0f} of "
                f"{seconds:g} s ({cause})"
            )
        time.sleep(min(PAUSE_SECONDS, max(0.0, began + seconds - now)))


def reason(error: OSError) -> str:
    """What an attempt to connect failed of, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TRY_SECONDS:g} s"
    if isinstance(error, socket.gaierror):
        return f"name not known: {error.strerror}"
    return error.strerror or str(error)
