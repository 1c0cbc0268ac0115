"""Faults between hosts end in a clear error, or in a clean restart, in bounded time."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.hosts import AGENT_ENDS, Node, hosts
from tests.hosts.jobs import LINK, TIME_LIMIT, SmallJob, node, same_losses, zero
from tests.launch.launching import ROOT
from tests.launch.stopping import metrics

STARTS = 240
"""Seconds until training has begun, on a busy machine."""
TOLD = TIME_LIMIT + AGENT_ENDS + 40
"""Seconds until every node has ended after a fault; torchrun gives its processes 30 to end."""


def trains(first: Node, out: Path, *, steps: int) -> None:
    """Waits until so many steps are done."""
    first.wait(lambda: len(metrics(out)) >= steps, f"step {steps}", seconds=STARTS)


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_host_that_dies_is_named_by_the_survivor(job: SmallJob, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (*zero(2), *job.words, "--out", out)
    with hosts(2) as members:
        for host in members:
            host.limit(LINK)
        first, second = (node(members, k, tmp_path / f"log{k}", *words) for k in (0, 1))
        trains(first, out, steps=3)
        second.host.kill()
        assert first.ends(seconds=TOLD) != 0
        printed = first.printed()
    # what the process met, and what its node knows
    assert "train_lm: another process has stopped answering, or is gone" in printed
    assert "no word from node 1 (host1, 10.83.0.2)" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "failed" and 3 <= report["steps"] < 20


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_host_that_loses_power_and_comes_back_goes_on_from_the_last_checkpoint(
    job: SmallJob, one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    out, restarts = tmp_path / "out", ("--max-restarts", 2)
    words = (*zero(2), *job.words, "--out", out, "--resume", "auto", "--save-every", 4)
    with hosts(2) as members:
        for host in members:
            host.limit(LINK)
        nodes = [node(members, k, tmp_path / f"log{k}", *words, options=restarts) for k in (0, 1)]
        trains(nodes[0], out, steps=10)
        members[1].cut()  # so that nobody is told that its connections are gone
        members[1].kill()
        nodes[0].says("train_lm: ", seconds=TIME_LIMIT + 30)
        members[1].restore()
        back = node(members, 1, tmp_path / "log1-again", *words, options=restarts)
        assert nodes[0].ends(seconds=150) == 0, nodes[0].printed()
        assert back.ends(seconds=AGENT_ENDS) == 0, back.printed()
        printed = nodes[0].printed()
    parts = json.loads((out / "report.json").read_text())["parts"]
    went_on = parts[1]["first_step"] - 1
    assert went_on in (4, 8, 12) and f"checkpoints/step-{went_on:08d}" in printed
    same_losses(metrics(out), one_host)


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_cut_link_ends_both_sides(job: SmallJob, tmp_path: Path) -> None:
    """No packet says that the other side is gone, so only the time limits can tell."""
    out = tmp_path / "out"
    words = (*zero(2), *job.words, "--out", out)
    with hosts(2) as members:
        for host in members:
            host.limit(LINK)
        nodes = [
            node(members, k, tmp_path / f"log{k}", *words, options=("--start-timeout", 40))
            for k in (0, 1)
        ]
        trains(nodes[0], out, steps=3)
        members[1].cut()
        began = time.monotonic()
        for each in nodes:
            assert each.ends(seconds=TOLD) != 0
        assert time.monotonic() - began < TOLD
        assert [host.processes() for host in members] == [[], []]
        printed = [each.printed() for each in nodes]
    for text, lost in zip(printed, ("node 1", "node 0"), strict=True):
        assert "stopped answering" in text or "no word from process" in text
        assert f"no word from {lost}" in text or f"{lost} (10.83.0.1:29400) is lost" in text


def test_a_wrong_address_is_named(job: SmallJob, tmp_path: Path) -> None:
    """A host that does not exist, and a port at which nobody listens."""
    short = {"START_TIMEOUT": "6"}
    with hosts(2) as members:
        nodes = [
            node(members, 1, tmp_path / "log1", variables={"MASTER_ADDR": "10.83.0.99", **short}),
            node(members, 1, tmp_path / "log2", variables={"MASTER_PORT": "29999", **short}),
        ]
        codes = [each.ends(seconds=90) for each in nodes]
        nowhere, closed = (each.printed() for each in nodes)
    assert codes == [1, 1]
    assert re.search(r"nobody answered at 10\.83\.0\.99:29400 for \d+ s", nowhere), nowhere
    assert "No route to host" in nowhere and "MASTER_ADDR" in nowhere
    assert re.search(r"nobody answered at 10\.83\.0\.1:29999 for \d+ s", closed), closed
    assert "Connection refused" in closed and "firewall" in closed


def test_hosts_that_differ_end_at_once_and_name_what_differs(job: SmallJob, tmp_path: Path) -> None:
    """Another version of a library, another learning rate, and another JSON of the same name."""
    packages, configs = tmp_path / "packages", [tmp_path / "0", tmp_path / "1"]
    write(
        packages / "accelerate-1.0.0.dist-info" / "METADATA", "Name: accelerate\nVersion: 1.0.0\n"
    )
    original = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    for batch, folder in zip((12, 24), configs, strict=True):
        write(folder / "zero.json", json.dumps({**original, "train_batch_size": batch}))
    words = ("--deepspeed_config", "zero.json", *job.words, "--out", tmp_path / "out")
    changed = {"PYTHONPATH": f"{packages}{os.pathsep}{ROOT}"}
    with hosts(2) as members:
        nodes = [
            node(members, 0, tmp_path / "log0", *words, folder=configs[0]),
            node(
                *(members, 1, tmp_path / "log1", *words, "--lr", 1e-3),
                variables=changed,
                folder=configs[1],
            ),
        ]
        codes = [each.ends(seconds=90) for each in nodes]
        printed = [each.printed() for each in nodes]
    assert codes == [2, 2]
    for text in printed:
        assert "the nodes differ" in text and "Traceback" not in text
        assert re.search(r"accelerate: node 0: \S+; node 1: 1\.0\.0\n", text)
        assert re.search(r"contents of zero\.json: node 0: \w+; node 1: \w+\n", text)
        assert re.search(r"command: node 0: .*; node 1: .* --lr 0\.001\n", text)
    assert not (tmp_path / "out").exists()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text)
