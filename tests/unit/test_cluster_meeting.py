"""Nodes that meet: all of them, with differences, late, missing, doubled, and node 0 gone."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from arg_dist.cli.parsing import InputError
from launchers.cluster import ClusterError, meeting, network, presence, store
from launchers.cluster.description import ABSENT, configurations, describe, differences
from launchers.cluster.meeting import meet
from launchers.cluster.place import Place
from launchers.cluster.presence import Presence
from launchers.cluster.store import Notes, connect, open_store, within
from tests.ports import free_port

pytestmark = pytest.mark.unit

SAME = {"torch": "2.13.0", "command": "train.py --steps 3"}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(presence, "QUIET_SECONDS", 0.3)
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(meeting, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "HEARD_SECONDS", 2.0)
    monkeypatch.setattr(network, "PAUSE_SECONDS", 0.05)


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class Node:
    """A node in a thread: its notes, what it was told, and how its meeting ended."""

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        place: Place,
        description: dict[str, str] = SAME,
        *,
        seconds: float = 20.0,
        late: float = 0.0,
    ) -> None:
        self.lines: list[str] = []
        self.notes: Notes | None = None
        self.place = place
        self.met: Future[Presence] = threads.submit(self._meet, description, seconds, late)

    def _meet(self, description: dict[str, str], seconds: float, late: float) -> Presence:
        time.sleep(late)
        tell = self.lines.append
        opened = (
            open_store(self.place, tell)
            if self.place.node == 0
            else connect(self.place, seconds, tell)
        )
        self.notes = opened
        return meet(opened, self.place, "127.0.0.1", description, seconds=seconds, tell=tell)

    def leave(self) -> None:
        self.met.result(20).leave()


def places(count: int, port: int) -> list[Place]:
    return [Place(node, count, "127.0.0.1", port) for node in range(count)]


def error_of(node: Node) -> ClusterError:
    error = node.met.exception(30)
    assert isinstance(error, ClusterError), error
    return error


def until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nodes_meet_whoever_is_first(threads: ThreadPoolExecutor, port: int) -> None:
    nodes = [
        Node(threads, place, late=late)
        for place, late in zip(places(3, port), (0.3, 0.0, 0.6), strict=True)
    ]
    for node in nodes:
        node.leave()


def test_a_difference_ends_all_nodes_at_once(threads: ThreadPoolExecutor, port: int) -> None:
    older = SAME | {"torch": "2.12.0"}
    first, second, third = places(4, port)[:3]  # the fourth never comes, and nobody waits for it
    began = time.monotonic()
    nodes = [Node(threads, first), Node(threads, second, older), Node(threads, third)]
    for node in nodes:
        error = error_of(node)
        assert error.code == 2
        assert "torch: " in str(error)
        assert "node 1: 2.12.0" in str(error)
        assert "2.13.0" in str(error)
    assert time.monotonic() - began < 10


def test_who_does_not_come_is_named(threads: ThreadPoolExecutor, port: int) -> None:
    first, _, third, _ = places(4, port)
    nodes = [Node(threads, first, seconds=1.0), Node(threads, third, seconds=1.0)]
    for node in nodes:
        assert error_of(node).code == 1
        assert "nodes 1, 3 of 4 did not join within 1 s" in str(error_of(node))


def test_a_closed_port_is_told(port: int) -> None:
    lines: list[str] = []
    place = Place(1, 2, "127.0.0.1", port)
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port} for 0 s.*refused.*firewall"):
        connect(place, 0.3, lines.append)


def test_a_name_that_is_unknown_is_tried_again(
    port: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "TELL_SECONDS", 0.1)
    began = time.monotonic()
    real = socket.create_connection

    def late(address: tuple[str, int], *rest: float) -> socket.socket:
        if time.monotonic() - began < 0.5:
            raise socket.gaierror(-2, "Name or service not known")
        return real(("127.0.0.1", address[1]), *rest)

    monkeypatch.setattr(socket, "create_connection", late)
    lines: list[str] = []
    node = Node(threads, Place(0, 1, "127.0.0.1", port))
    network.wait_until_open("job-0.job", port, 20, lines.append)
    assert any("name not known" in line for line in lines)
    node.leave()


def test_something_else_at_the_port_is_told(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", port))
        silent.listen()
        with pytest.raises(ClusterError, match="is not node 0 of this job"):
            connect(Place(1, 2, "127.0.0.1", port), 0.3, print)


def test_a_port_that_is_taken_is_told(port: int) -> None:
    place = Place(0, 2, "127.0.0.1", port)
    kept = open_store(place, print)
    with pytest.raises(InputError, match=f"MASTER_PORT={port}: .*in use"):
        open_store(place, print)
    assert kept is not None


def test_an_address_that_leads_to_another_node_0_is_told(port: int) -> None:
    other_port = free_port()
    mine = open_store(Place(0, 2, "127.0.0.1", port), print)
    other = open_store(Place(0, 2, "127.0.0.1", other_port), print)
    elsewhere = Place(0, 2, "127.0.0.1", other_port)
    with pytest.raises(InputError, match=r"MASTER_ADDR=127\.0\.0\.1: leads to another"):
        connect(elsewhere, 5, print).check_same(mine, elsewhere)
    connect(elsewhere, 5, print).check_same(other, elsewhere)


def test_two_nodes_of_one_number_end_the_job(threads: ThreadPoolExecutor, port: int) -> None:
    first, second, _ = places(3, port)
    nodes = [Node(threads, first), Node(threads, second), Node(threads, second, late=1.0)]
    for node in nodes:
        assert "NODE_RANK=1: two nodes have it" in str(error_of(node))
        assert error_of(node).code == 2


def test_a_node_that_comes_back_is_compared_with_node_0(
    threads: ThreadPoolExecutor, port: int
) -> None:
    first, second = (Node(threads, place) for place in places(2, port))
    second.leave()
    again = Node(threads, second.place)
    again.leave()
    changed = Node(threads, second.place, SAME | {"torch": "2.14.0"})
    assert "this node differs:\n  torch: node 0: 2.13.0; node 1: 2.14.0" in str(error_of(changed))
    first.met.result(1).end(3)
    too_late = Node(threads, second.place)
    assert "already ended: node 0 exited with code 3" in str(error_of(too_late))
    first.leave()


def test_all_hear_of_who_is_quiet_or_has_ended(threads: ThreadPoolExecutor, port: int) -> None:
    nodes = [Node(threads, place) for place in places(4, port)]
    first, second, third, fourth = (node.met.result(20) for node in nodes)
    until(lambda: all(node.who for node in first.nodes.values()))
    third.leave()  # as one that was killed
    fourth.end(7)
    until(lambda: second.nodes.get(3) is not None and second.nodes[3].exit_code == 7)
    until(lambda: 2 in second.nodes and second.nodes[2].silence > 0.3)
    assert "127.0.0.1" in second.nodes[2].who
    assert first.nodes[1].silence < 5
    assert second.lost is None
    for there in (first, second, fourth):
        there.leave()


def test_a_node_0_that_is_gone_is_lost(threads: ThreadPoolExecutor, port: int) -> None:
    first, second = (Node(threads, place) for place in places(2, port))
    there = second.met.result(20)
    first.leave()
    first.met, first.notes = Future(), None  # the store's last holders
    until(lambda: there.lost is not None)
    assert f"node 0 (127.0.0.1:{port}) is lost" in str(there.lost)
    there.leave()


def test_nobody_waits_longer_than_he_said() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, never.wait)
    assert within(5, lambda: 3) == 3
    with pytest.raises(ValueError, match="x"):
        within(5, lambda: int("x"))


def test_a_description_has_versions_and_contents(tmp_path: object) -> None:
    folder = str(tmp_path)
    script, config = f"{folder}/job.py", f"{folder}/zero.json"
    for path, text in ((script, "pass"), (config, "{}")):
        with open(path, "w") as file:
            file.write(text)
    command = [script, f"--deepspeed_config={config}", "--data", "absent.yaml", "--out", "runs"]

    def described() -> dict[str, str]:
        return describe(
            nodes=2,
            processes=8,
            launcher="torchrun",
            max_restarts=0,
            command=command,
            accelerate_config=None,
        )

    before = described()
    assert before["contents of absent.yaml"] == ABSENT
    assert before["NPROC_PER_NODE"] == "8"
    assert before["torch"].startswith("2.")
    with open(config, "w") as file:
        file.write('{"a": 1}')
    changed = differences({0: before, 1: described(), 2: before})
    assert len(changed) == 1
    assert changed[0].startswith(f"contents of {config}: nodes 0, 2: ")
    assert differences({0: before, 1: dict(before)}) == []


def test_configurations_are_found_with_and_without_an_option() -> None:
    words = ["--a=x.json", "--b", "y.yaml", "z.yml", "--json", "k=v"]
    assert configurations(words) == ["x.json", "y.yaml", "z.yml"]
