"""Rendezvous: the nodes of a job find each other and verify that all of them run the same.

Node 0 decides: it reads what each node is about to run as the nodes arrive, and publishes a verdict
for all of them, at once when two differ. A node that joins later, after its machine was restarted,
compares itself with node 0.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping

from launchers.cluster import ClusterError
from launchers.cluster.description import differences, name_nodes
from launchers.cluster.network import TELL_SECONDS
from launchers.cluster.place import Place
from launchers.cluster.presence import BEAT_SECONDS, RUNNING, Presence
from launchers.cluster.store import Notes

VERDICT, OBJECTION = "verdict", "objection"
AGREED = "agreed"
POLL_SECONDS = 0.2
HEARD_SECONDS = 10.0
"""How long node 0 stays for the others to read a verdict that terminates the job."""


def meet(
    notes: Notes,
    place: Place,
    own_address: str,
    description: Mapping[str, str],
    *,
    seconds: float,
    tell: Callable[[str], None],
) -> Presence:
    """Waits for all nodes, and compares them.

    Args:
        notes: the store on node 0.
        place: which node this is.
        own_address: address at which the others reach this one.
        description: what it is about to run.
        seconds: how long to wait for missing nodes.
        tell: prints a line for the user.

    Returns:
        The heartbeat of this node, which has started.

    Raises:
        ClusterError: nodes differ, did not join in time, or two have the same index.
    """
    who = f"{socket.gethostname()}, {own_address}"
    _claim(notes, place, who)
    presence = Presence(notes.patient(seconds), place)
    notes.put(f"{place.node}/who", who)
    notes.put(f"{place.node}/description", json.dumps(description))
    try:
        if place.node == 0:
            _judge(notes, place, seconds, tell)
        else:
            _hear(notes, place, description, seconds, tell)
    except BaseException:
        presence.leave()
        raise
    return presence


def _judge(notes: Notes, place: Place, seconds: float, tell: Callable[[str], None]) -> None:
    began = reported = time.monotonic()
    came: dict[int, dict[str, str]] = {}
    while True:
        for node in range(place.nodes):
            if node not in came and (text := notes.read(f"{node}/description")) is not None:
                came[node] = json.loads(text)
        missing = [node for node in range(place.nodes) if node not in came]
        now = time.monotonic()
        objection = notes.read(OBJECTION)
        if objection is None and (different := differences(came)):
            objection = "the nodes differ:\n  " + "\n  ".join(different)
        if objection is not None:
            _end_all(notes, came, objection, code=2)
        if not missing:
            notes.put(VERDICT, json.dumps({"code": 0, "text": AGREED}))
            return
        if now - began >= seconds:
            _end_all(
                notes,
                came,
                f"{name_nodes(missing)} of {place.nodes} did not join within {seconds:g} s "
                f"(START_TIMEOUT); check their output: can they reach {place.endpoint}?",
                code=1,
            )
        if now - reported >= TELL_SECONDS:
            reported = now
            tell(f"waiting for {name_nodes(missing)}: {now - began:.0f} of {seconds:g} s")
        time.sleep(POLL_SECONDS)


def _end_all(notes: Notes, came: Mapping[int, object], text: str, *, code: int) -> None:
    """Publishes the verdict, and stays until the nodes that have joined have read it."""
    notes.put(VERDICT, json.dumps({"code": code, "text": text}))
    deadline = time.monotonic() + HEARD_SECONDS
    while notes.count("heard") < len(came) - 1 and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    raise ClusterError(text, code=code)


def _hear(
    notes: Notes,
    place: Place,
    description: Mapping[str, str],
    seconds: float,
    tell: Callable[[str], None],
) -> None:
    if (code := notes.read("0/ended")) not in (None, RUNNING):
        raise ClusterError(f"the job has already ended: node 0 exited with code {code}")
    began = reported = time.monotonic()
    while (text := notes.read(VERDICT)) is None:
        now = time.monotonic()
        if now - began > seconds + HEARD_SECONDS:  # node 0's limit is longer than this node's
            raise ClusterError(
                f"node 0 at {place.endpoint} has waited for other nodes for {seconds:g} s"
            )
        if now - reported >= TELL_SECONDS:
            reported = now
            tell(f"node 0 is waiting for other nodes: {now - began:.0f} of {seconds:g} s")
        time.sleep(POLL_SECONDS)
    verdict = json.loads(text)
    if verdict["code"]:
        notes.count("heard", 1)
        raise ClusterError(verdict["text"], code=verdict["code"])
    first = json.loads(notes.read("0/description") or "{}")
    if different := differences({0: first, place.node: description}):
        raise ClusterError(
            "the job is already running, and this node differs:\n  " + "\n  ".join(different),
            code=2,
        )


def _claim(notes: Notes, place: Place, who: str) -> None:
    """Checks that no other node has this index."""
    name = f"{place.node}/claim"
    mine = f"{who}, process {os.getpid()}, {uuid.uuid4().hex}"
    there = notes.put_first(name, mine)
    if there == mine:
        return
    # claimed by a node that no longer exists, or by a live one: only that sends heartbeats
    beats = notes.count(f"{place.node}/beats")
    deadline = time.monotonic() + 4 * BEAT_SECONDS
    while time.monotonic() < deadline:
        if notes.count(f"{place.node}/beats") != beats:
            text = (
                f"NODE_RANK={place.node}: two nodes have it, {there.rpartition(', ')[0]} and "
                f"{mine.rpartition(', ')[0]}; give each node its own index"
            )
            if notes.read(VERDICT) is None:
                notes.put_first(OBJECTION, text)
            raise ClusterError(text, code=2)
        time.sleep(POLL_SECONDS)
    notes.put(name, mine)
