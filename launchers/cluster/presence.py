"""Heartbeats: each node increments a counter of its own, and node 0 watches all of them."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass

from launchers.cluster import ClusterError
from launchers.cluster.place import Place
from launchers.cluster.store import Notes

BEAT_SECONDS = 1.0
QUIET_SECONDS = 3.5
"""After this long without a heartbeat, node 0 reports a node to the others."""
RUNNING = "running"
NEWS = "news"


@dataclass
class Node:
    """What is known of a node: its host, its last heartbeat, and its launcher's exit code."""

    who: str
    beats: int
    heard: float
    exit_code: int | None = None

    @property
    def silence(self) -> float:
        """Seconds since its last heartbeat."""
        return time.monotonic() - self.heard


class Presence:
    """Sends this node's heartbeat every second, in a thread, and watches those of others.

    Node 0 watches all nodes. The others watch node 0, on which all depend, and read its report of
    nodes that are quiet or have exited; so there is little traffic, however many nodes there are.
    `nodes` is what is known, by index; `lost`, why node 0 can no longer be reached.
    """

    def __init__(self, notes: Notes, place: Place) -> None:
        self._notes = notes
        self._own = place.node
        self._gone = threading.Event()
        self.lost: str | None = None
        others = range(1, place.nodes) if place.node == 0 else range(1)
        self.nodes = {node: Node("", -1, time.monotonic()) for node in others}
        notes.put(f"{self._own}/ended", RUNNING)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self, exit_code: int) -> None:
        """Publishes the exit code of this node's launcher, if node 0 can still be reached."""
        if self.lost is None and (self._own == 0 or self.nodes[0].silence < QUIET_SECONDS):
            try:
                self._notes.put(f"{self._own}/ended", str(exit_code))
            except ClusterError as error:
                self.lost = str(error)

    def leave(self) -> None:
        """Stops sending and watching."""
        self._gone.set()
        self._thread.join(2 * BEAT_SECONDS)

    def _run(self) -> None:
        while not self._gone.wait(BEAT_SECONDS):
            try:
                self._notes.count(f"{self._own}/beats", 1)
                for node in range(1, len(self.nodes) + 1) if self._own == 0 else range(1):
                    self._listen(node)
                if self._own == 0:
                    self._tell()
                else:
                    self._hear()
            except ClusterError as error:
                self.lost = str(error)
                return

    def _listen(self, number: int) -> None:
        beats = self._notes.count(f"{number}/beats")
        known = self.nodes[number]
        if beats != known.beats:
            known.who = self._notes.read(f"{number}/who") or ""
            known.beats, known.heard = beats, time.monotonic()
        ended = self._notes.read(f"{number}/ended")
        known.exit_code = None if ended in (None, RUNNING) else int(ended)

    def _tell(self) -> None:
        news = {
            number: [node.who, round(node.silence, 1), node.exit_code]
            for number, node in self.nodes.items()
            if node.silence > QUIET_SECONDS or node.exit_code is not None
        }
        self._notes.put(NEWS, json.dumps(news))

    def _hear(self) -> None:
        now = time.monotonic()
        nodes = {0: self.nodes[0]}
        for number, (who, silence, code) in json.loads(self._notes.read(NEWS) or "{}").items():
            if int(number) != self._own:
                nodes[int(number)] = Node(who, 0, now - silence, code)
        self.nodes = nodes
