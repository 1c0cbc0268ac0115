"""Watches the other nodes while the job runs: what to report, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable

from launchers.cluster.place import Place
from launchers.cluster.presence import Node, Presence

TELL_AFTER = 15.0
GRACE = 30.0
"""Seconds that this node's processes have to report the fault themselves."""


class Watch:
    """Watches the other nodes, and decides when this one cannot continue."""

    def __init__(
        self,
        presence: Presence,
        place: Place,
        *,
        max_restarts: int,
        seconds: float,
        tell: Callable[[str], None],
    ) -> None:
        """`seconds` is how long a node may be silent; `tell` prints a line for the user."""
        self._presence = presence
        self._place = place
        self._restarts = max_restarts > 0
        self._seconds = seconds
        self._tell = tell
        self._told: set[int] = set()
        self._fault: tuple[str, float] | None = None

    def reason_to_end(self) -> str | None:
        """Why this node must terminate its launcher now; None while it may continue."""
        if self._presence.lost is not None:
            return self._after_grace(self._presence.lost)
        for number, node in sorted(self._presence.nodes.items()):
            name = self.name(number, node)
            if node.exit_code is not None:
                if node.exit_code and (number == 0 or not self._restarts):
                    return self._after_grace(f"{name} exited with code {node.exit_code}")
                if node.exit_code == 0:
                    continue
            if node.silence > self._seconds:
                return f"no heartbeat from {name} for {self._seconds:g} s (START_TIMEOUT)"
            if node.silence > TELL_AFTER and number not in self._told:
                self._told.add(number)
                self._tell(
                    f"no heartbeat from {name} for {node.silence:.0f} s; are its host and the "
                    f"network up? It may return within {self._seconds:g} s"
                )
        self._welcome()
        self._fault = None
        return None

    def missing(self, quiet: float) -> list[str]:
        """A line for each node without a heartbeat for `quiet` seconds, or that has failed."""
        if self._presence.lost is not None:
            return [self._presence.lost]
        found = []
        for number, node in sorted(self._presence.nodes.items()):
            if node.exit_code:
                found.append(f"{self.name(number, node)} exited with code {node.exit_code}")
            elif node.exit_code is None and node.silence > quiet:
                name = self.name(number, node)
                found.append(f"no heartbeat from {name} for {node.silence:.0f} s")
        return found

    def others_run(self) -> bool:
        """Whether another live node has a running launcher."""
        return any(
            node.exit_code is None and node.silence < TELL_AFTER
            for node in self._presence.nodes.values()
        )

    def name(self, number: int, node: Node) -> str:
        """The node's index and host."""
        who = node.who or (self._place.endpoint if number == 0 else "")
        return f"node {number} ({who})" if who else f"node {number}"

    def _welcome(self) -> None:
        for number in sorted(self._told):
            node = self._presence.nodes.get(number)
            if node is None or node.silence < TELL_AFTER:
                self._told.discard(number)
                self._tell(f"node {number} is back")

    def _after_grace(self, fault: str) -> str | None:
        now = time.monotonic()
        if self._fault is None:
            self._tell(f"{fault}; this node terminates as well, within {self.grace:g} s")
            self._fault = (fault, now)
        return fault if now - self._fault[1] > self.grace else None

    @property
    def grace(self) -> float:
        """Seconds between a fault and the termination of this node's launcher."""
        return min(GRACE, self._seconds)
