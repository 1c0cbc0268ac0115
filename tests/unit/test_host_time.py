"""What a step costs the host does not grow with the number of processes."""

from __future__ import annotations

from functools import partial

import pytest

from arg_dist.config import parse_config
from arg_dist.planning.allocations import Unfilled
from arg_dist.planning.cuts import lay_out
from arg_dist.planning.model import Model, describe
from benchmarks.host_time import bound, calls_of, states_of, take

PROCESSES = (8, 64, 1024)


def model(settings) -> Model:
    shapes = {f"{i}.up": (4096, 1024) for i in range(3)} | {
        f"{i}.down": (1024, 4096) for i in range(3)
    }
    parameters = describe(shapes, settings)
    return Model("two shapes", parameters, parameters)


@pytest.mark.parametrize("residual", ["orthogonalized", "matched"])
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_step_makes_as_many_calls_with_a_thousand_processes_as_with_eight(engine, residual):
    settings = parse_config({"residual": residual})
    calls = []
    for processes in PROCESSES:
        plan, _ = bound(model(settings), lay_out(model(settings), engine, processes), settings)
        states = states_of(plan, settings, rank=4)
        with Unfilled():
            take(plan, states, settings)
            calls.append(calls_of(partial(take, plan, states, settings)))
    fewest, most = min(calls), max(calls)
    assert most <= 1.02 * fewest, calls  # a process is home to one matrix more or less
