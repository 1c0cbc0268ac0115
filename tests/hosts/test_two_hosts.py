"""Two hosts train as one does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.hosts import hosts
from tests.hosts.jobs import STEPS, SmallJob, node, same_losses, zero
from tests.launch.stopping import metrics

SECONDS = 240
LATE = 3
"""Seconds by which one host is late."""


@pytest.mark.slow
@pytest.mark.timeout(590)
def test_two_hosts_of_two_processes_with_the_losses_of_one_host(
    job: SmallJob, one_host: list[dict[str, Any]], tmp_path: Path
) -> None:
    """ZeRO-2, by torchrun; and node 1 comes before node 0 does."""
    out, two = tmp_path / "out", ("--processes-per-node", 2)
    words = (*zero(2), *job.words, "--out", out)
    with hosts(2) as members:
        early = node(members, 1, tmp_path / "log1", *words, options=two)
        time.sleep(LATE)
        late = node(members, 0, tmp_path / "log0", *words, options=two)
        assert late.ends(seconds=SECONDS) == 0, late.printed()
        assert early.ends(seconds=SECONDS) == 0, early.printed()
        carried = [host.traffic() for host in members]
    same_losses(metrics(out), one_host)
    assert len(metrics(out)) == STEPS and "held_out_loss" in metrics(out)[-1]
    report = json.loads((out / "report.json").read_text())
    assert (report["engine"], report["world_size"]) == ("ZeRO-2", 4)
    # gradients and weights crossed the cable, in both directions
    assert all(min(each.sent, each.received) > 2**20 for each in carried)
