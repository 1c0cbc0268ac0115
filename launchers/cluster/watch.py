"""What happens to the other nodes while the job runs: told to the user, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable

from launchers.cluster.place import Place
from launchers.cluster.presence import Node, Presence

TELL_AFTER = 15.0
GRACE = 30.0
"""Seconds that this node's processes have to tell themselves what they have met."""


class Watch:
    """Looks at the other nodes, and says when this one cannot go on."""

    def __init__(
        self,
        presence: Presence,
        place: Place,
        *,
        max_restarts: int,
        seconds: float,
        tell: Callable[[str], None],
    ) -> None:
        """`seconds` is how long a node may be gone; `tell` takes lines for the user."""
        self._presence = presence
        self._place = place
        self._restarts = max_restarts > 0
        self._seconds = seconds
        self._tell = tell
        self._told: set[int] = set()
        self._fault: tuple[str, float] | None = None

    def reason_to_end(self) -> str | None:
        """Why this node has to end its launcher now; None as long as there is hope."""
        if self._presence.lost is not None:
            return self._after_grace(self._presence.lost)
        for number, node in sorted(self._presence.nodes.items()):
            name = self.name(number, node)
            if node.exit_code is not None:
                if node.exit_code and (number == 0 or not self._restarts):
                    return self._after_grace(f"{name} has ended with exit code {node.exit_code}")
                if node.exit_code == 0:
                    continue
            if node.silence > self._seconds:
                return f"no word from {name} for {self._seconds:g} s (START_TIMEOUT)"
            if node.silence > TELL_AFTER and number not in self._told:
                self._told.add(number)
                self._tell(
                    f"no word from {name} for {node.silence:.0f} s; is its host up, and the "
                    f"network? It has until {self._seconds:g} s to come back"
                )
        self._welcome()
        self._fault = None
        return None

    def missing(self, quiet: float) -> list[str]:
        """What is known of nodes that were not heard of for `quiet` seconds, or have failed."""
        if self._presence.lost is not None:
            return [self._presence.lost]
        found = []
        for number, node in sorted(self._presence.nodes.items()):
            if node.exit_code:
                found.append(f"{self.name(number, node)} has ended with exit code {node.exit_code}")
            elif node.exit_code is None and node.silence > quiet:
                found.append(f"no word from {self.name(number, node)} for {node.silence:.0f} s")
        return found

    def others_run(self) -> bool:
        """Whether some other node is there whose launcher has not ended."""
        return any(
            node.exit_code is None and node.silence < TELL_AFTER
            for node in self._presence.nodes.values()
        )

    def name(self, number: int, node: Node) -> str:
        """The node as users know it."""
        who = node.who or (self._place.endpoint if number == 0 else "")
        return f"node {number} ({who})" if who else f"node {number}"

    def _welcome(self) -> None:
        for number in sorted(self._told):
            node = self._presence.nodes.get(number)
            if node is None or node.silence < TELL_AFTER:
                self._told.discard(number)
                self._tell(f"node {number} is there again")

    def _after_grace(self, fault: str) -> str | None:
        now = time.monotonic()
        if self._fault is None:
            self._tell(f"{fault}; this node ends too, in {self.grace:g} s at the latest")
            self._fault = (fault, now)
        return fault if now - self._fault[1] > self.grace else None

    @property
    def grace(self) -> float:
        """Seconds between a fault and the end of this node's launcher."""
        return min(GRACE, self._seconds)
