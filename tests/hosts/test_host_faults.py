"""Faults between hosts end in a clear error, or in a clean restart, in bounded time.

Each of the faults in training meets another launcher and engine, which up to then, or in the end,
has taken the steps of one host.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.hosts import AGENT_ENDS, Node, hosts
from tests.hosts.jobs import LINK, SCRIPT, STEPS, TIME_LIMIT, SmallJob, node, same_losses, zero
from tests.hosts.namespaces import Host
from tests.launch.launching import ROOT
from tests.launch.stopping import metrics

STARTS = 240
"""Seconds until training has begun, on a busy machine."""
LOST = 20
"""Seconds for which a node may be gone, where that is what ends the job. A process that is not the
first needs the time limit, and 8 more, to speak for itself."""
TOLD = max(LOST, TIME_LIMIT) + AGENT_ENDS
"""Seconds until every node has ended after a fault."""
ON_CPUS = "tests/launch/cpu_fsdp.py"
"""Lets accelerate shard with FSDP on CPUs, and runs the job that it is given."""


def begin(
    members: Sequence[Host],
    folder: Path,
    *job: object,
    steps: int,
    options: Sequence[object] = (),
    script: str = SCRIPT,
) -> list[Node]:
    """Starts a node on each host, with slow links, and waits until so many steps are done."""
    for host in members:
        host.limit(LINK)
    words = (*job, "--out", folder / "out")
    nodes = [
        node(members, number, folder / f"log{number}", *words, options=options, script=script)
        for number in range(len(members))
    ]
    done = folder / "out"
    nodes[0].wait(lambda: len(metrics(done)) >= steps, f"step {steps}", seconds=STARTS)
    return nodes


def report_of(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_host_that_dies_is_named_by_the_survivor(
    job: SmallJob, one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    """ZeRO-3, by DeepSpeed's own launcher."""
    words, options = (*zero(3), *job.words), ("--launcher", "deepspeed")
    with hosts(2) as members:
        first, second = begin(members, tmp_path, *words, steps=6, options=options)
        second.host.kill()
        assert first.ends(seconds=TOLD) != 0
        printed = first.printed()
    # what the process met, and what its node knows
    assert "train_lm: another process has stopped answering, or has exited" in printed
    assert "no heartbeat from node 1 (host1, 10.83.0.2)" in printed
    report = report_of(tmp_path / "out")
    assert (report["status"], report["engine"]) == ("failed", "ZeRO-3")
    assert 6 <= report["steps"] == len(metrics(tmp_path / "out")) < STEPS
    same_losses(metrics(tmp_path / "out"), one_host)


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_host_that_loses_power_and_comes_back_goes_on_from_the_last_checkpoint(
    job: SmallJob, one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    """ZeRO-2, by torchrun."""
    restarts = ("--max-restarts", 2)
    words = (*zero(2), *job.words, "--resume", "auto", "--save-every", 4)
    with hosts(2) as members:
        survivor, _ = begin(members, tmp_path, *words, steps=10, options=restarts)
        members[1].cut()  # so that nobody is told that its connections are gone
        members[1].kill()
        out = ("--out", tmp_path / "out")
        back = node(members, 1, tmp_path / "log1-again", *words, *out, options=restarts)
        survivor.says("train_lm: ", seconds=TIME_LIMIT + 30)
        for host in members:
            host.limit(None)
        members[1].restore()
        assert survivor.ends(seconds=STARTS) == 0, survivor.printed()
        assert back.ends(seconds=AGENT_ENDS) == 0, back.printed()
        printed = survivor.printed()
    went_on = report_of(tmp_path / "out")["parts"][1]["first_step"] - 1
    assert went_on in (4, 8, 12) and f"checkpoints/step-{went_on:08d}" in printed
    same_losses(metrics(tmp_path / "out"), one_host)
    assert len(metrics(tmp_path / "out")) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_a_cut_link_ends_both_sides(
    job: SmallJob, one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    """FSDP2, by accelerate. No packet says that the other is gone: only time limits can tell."""
    config = "launchers/accelerate/multinode_fsdp2.yaml"
    options = ("--launcher", "accelerate", "--accelerate-config", config, "--start-timeout", LOST)
    with hosts(2) as members:
        nodes = begin(
            members, tmp_path, SCRIPT, *job.words, steps=6, options=options, script=ON_CPUS
        )
        members[1].cut()
        began = time.monotonic()
        for each in nodes:
            assert each.ends(seconds=TOLD) != 0
        assert time.monotonic() - began < TOLD
        assert [host.processes() for host in members] == [[], []]
        printed = [each.printed() for each in nodes]
    for text, lost in zip(printed, ("node 1 (host1, 10.83.0.2)", "node 0 "), strict=True):
        assert "has stopped answering" in text or "no response from process" in text, text
        reports = (f"no heartbeat from {lost}", f"{lost}(10.83.0.1:29400) is lost")
        assert any(report in text for report in reports), text
    report = report_of(tmp_path / "out")
    assert (report["status"], report["engine"]) == ("failed", "FSDP2")
    same_losses(metrics(tmp_path / "out"), one_host)


def test_a_wrong_address_is_named(job: SmallJob, tmp_path: Path) -> None:
    """A host that does not exist, and a port at which nobody listens."""
    short = {"START_TIMEOUT": "3"}
    with hosts(2) as members:
        nodes = [
            node(members, 1, tmp_path / "log1", variables={"MASTER_ADDR": "10.83.0.99", **short}),
            node(members, 1, tmp_path / "log2", variables={"MASTER_PORT": "29999", **short}),
        ]
        codes = [each.ends(seconds=90) for each in nodes]
        nowhere, closed = (each.printed() for each in nodes)
    assert codes == [1, 1]
    assert re.search(r"node 0 did not answer at 10\.83\.0\.99:29400 for \d+ s", nowhere), nowhere
    assert "No route to host" in nowhere and "MASTER_ADDR" in nowhere
    assert re.search(r"node 0 did not answer at 10\.83\.0\.1:29999 for \d+ s", closed), closed
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
