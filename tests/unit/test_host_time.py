"""What a step costs the host does not grow with the number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from arg_dist.config import parse_config
from arg_dist.planning.allocations import Unfilled
from arg_dist.planning.cuts import lay_out
from arg_dist.planning.model import Model, describe
from benchmarks.host_time import bound, calls_of, states_of, take

PROCESSES, UNEVEN = (8, 64, 1024), (24, 96, 1000)
SHAPES = {"up": (4096, 1024), "down": (1024, 4096), "uneven": (11008, 4096)}


def model(settings, *keys: str) -> Model:
    parameters = describe({f"{i}.{key}": SHAPES[key] for i in range(3) for key in keys}, settings)
    return Model(" ".join(keys), parameters, parameters)


@pytest.mark.parametrize("residual", ["orthogonalized", "matched"])
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_step_makes_as_many_calls_with_a_thousand_processes_as_with_eight(engine, residual):
    settings = parse_config({"residual": residual})
    calls = calls_with(model(settings, "up", "down"), engine, PROCESSES, settings)
    fewest, most = min(calls), max(calls)
    assert most <= 1.02 * fewest, calls  # a process is home to one matrix more or less


@pytest.mark.parametrize("residual", ["orthogonalized", "matched"])
def test_so_it_does_where_rows_cannot_be_divided_evenly(residual):
    settings = parse_config({"residual": residual})
    fewest, *_, most = sorted(calls_with(model(settings, "uneven"), "zero3", UNEVEN, settings))
    assert most <= 1.02 * fewest


def calls_with(found: Model, engine: str, processes: Sequence[int], settings) -> list[int]:
    """Function calls of a steady step with each number of processes."""
    calls = []
    for each in processes:
        plan, _ = bound(found, lay_out(found, engine, each), settings)
        states = states_of(plan, settings, rank=4)
        with Unfilled():
            take(plan, states, settings)
            calls.append(calls_of(partial(take, plan, states, settings)))
    return calls
