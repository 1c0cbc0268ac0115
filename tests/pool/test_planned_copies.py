"""What `arg-dist plan` says of copies of a model that FSDP2 shards is what runs take."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from tests.launch.planned_cases import IN_COPIES, Case
from tests.launch.planned_checks import check_exact, planned
from tests.launch.planned_probe import model_of, taken_in_torch
from tests.launch.torch_engines import fsdp2, pairs_of_replicas, within_a_copy

pytestmark = pytest.mark.timeout(150)  # the processes import transformers

PROCESSES = 4


def run(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    """What a process took."""
    averages = case.settings.get("gradient_sync") != "sketch"
    mesh = pairs_of_replicas if averages else within_a_copy
    return taken_in_torch(case, fsdp2(mesh=mesh)(model_of(case), group), group)


@pytest.mark.parametrize("case", IN_COPIES, ids=lambda case: case.name)
def test_copies_take_what_was_planned(pool: Any, case: Case) -> None:
    check_exact(case, planned(case, PROCESSES), pool.run(run, PROCESSES, case, seconds=120))
