"""What `arg-dist plan` says of FSDP2 on meshes of several axes is what runs take."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from arg_dist.planning.meshes import parse_mesh
from tests.launch import mesh_engines
from tests.launch.planned_cases import IN_COPIES, ON_MESHES, Case
from tests.launch.planned_checks import check_exact, check_temporaries, planned
from tests.launch.planned_probe import model_of, taken_in_torch
from tests.launch.torch_engines import fsdp2, pairs_of_replicas, within_a_copy

pytestmark = pytest.mark.timeout(150)  # the processes import transformers

PROCESSES = 4


def run(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    """What a process took."""
    averages = case.settings.get("gradient_sync") != "sketch"
    mesh = pairs_of_replicas if averages else within_a_copy
    return taken_in_torch(case, fsdp2(mesh=mesh)(model_of(case), group), group)


def run_on_a_mesh(group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    """The same, with tensor parallelism."""
    assert case.mesh is not None
    model, found = model_of(case), parse_mesh(case.mesh)
    mesh, _ = mesh_engines.meshes(group, (found.replicate, found.fsdp, found.tp))
    mesh_engines.cut_by(mesh, model, "llama")
    return taken_in_torch(case, model, group)


@pytest.mark.parametrize("case", ON_MESHES, ids=lambda case: f"{case.mesh}-{case.name}")
def test_meshes_take_what_was_planned(pool: Any, case: Case) -> None:
    found = pool.run(run_on_a_mesh, PROCESSES, case, seconds=120)
    check_exact(case, planned(case, PROCESSES), found)
    if case.has_temporaries:
        check_temporaries(case, planned(case, PROCESSES), found)


@pytest.mark.parametrize("case", IN_COPIES, ids=lambda case: case.name)
def test_copies_take_what_was_planned(pool: Any, case: Case) -> None:
    check_exact(case, planned(case, PROCESSES), pool.run(run, PROCESSES, case, seconds=120))
