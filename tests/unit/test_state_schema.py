"""The schema of the state is complete; beside it only the mathematics names keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import Tensor

import arg_dist
from arg_dist.config import ConfigError
from arg_dist.subspace.state import (
    OF_EACH_DIRECTION,
    OF_TENSOR,
    SCHEMA,
    WITH_ROWS,
    Lies,
    MatrixState,
    TensorState,
    lists_of,
    numbers_of,
    with_scalars,
)

PACKAGE = Path(arg_dist.__file__).parent
WORDS = {"step", "rank", "energy", "gap"}
"""Keys that are also the names of settings, statistics and fields."""


def stepped(**settings: object) -> dict[str, dict]:
    """States after a step: of a matrix, with all that a budget adds, and of a tensor."""
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(12, 8)), torch.nn.Parameter(torch.randn(5))
    optimizer = arg_dist.AdaRankGrad(
        [("matrix", matrix), ("vector", vector)],
        process_group=None,
        state_budget="1MiB",
        max_rank=3,
        min_rank=2,
        **settings,
    )
    for tensor in (matrix, vector):
        tensor.grad = torch.randn_like(tensor)
    optimizer.step()
    return {name: state for units in optimizer.state.values() for name, state in units.items()}


def test_every_key_is_described():
    assert SCHEMA.keys() == get_type_hints(MatrixState).keys()
    assert get_type_hints(TensorState).keys() <= SCHEMA.keys()


def test_states_are_as_described():
    runs = [stepped(residual="scaled"), stepped(residual_momentum=0.9)]
    scales = {key for key, entry in SCHEMA.items() if entry.lies is Lies.BESIDE}
    assert runs[0]["matrix"].keys() | runs[1]["matrix"].keys() == SCHEMA.keys() - scales
    assert runs[0]["vector"].keys() == get_type_hints(TensorState).keys() - scales
    assert scales <= stepped(state_dtype="int8")["matrix"].keys()
    for state in (state for run in runs for state in run.values()):
        for key, value in state.items():
            lies, dtype = SCHEMA[key]
            if lies in (Lies.NUMBER, Lies.LIST):
                assert all(
                    type(each) is dtype for each in (value if lies is Lies.LIST else [value])
                )
            else:
                assert value.dtype == dtype
                assert (value.dim() == 0) == (lies in (Lies.SUMMED, Lies.ALIKE))
    assert set(OF_TENSOR) < set(OF_EACH_DIRECTION) < set(WITH_ROWS)


def test_numbers_and_lists_come_back():
    state = stepped(residual_momentum=0.9)["matrix"]
    numbers, lists = numbers_of(state), lists_of(state)
    assert not any(isinstance(value, Tensor) for value in numbers.values())
    back = with_scalars(numbers, torch.device("cpu")) | lists
    assert back == {key: state[key] for key in back}
    assert state.keys() - back.keys() == {*WITH_ROWS, "kept_sq"}


def test_only_the_schema_and_the_mathematics_name_keys():
    mathematics = ("algorithm.py", "simple.py", "subspace/state.py", "subspace/compact.py")
    allowed = {PACKAGE / name for name in mathematics}
    named = re.compile("|".join(f"[\"']{key}[\"']" for key in SCHEMA.keys() - WORDS))
    found = [
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in allowed
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if named.search(line.partition("#")[0])
    ]
    assert not found


def test_state_of_a_later_version_is_refused():
    matrix = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = arg_dist.AdaRankGrad(
        [("matrix", matrix)], process_group=None, max_rank=3, min_rank=2
    )
    matrix.grad = torch.randn_like(matrix)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["matrix"]["curvature"] = 1.0
    with pytest.raises(ConfigError, match="matrix has curvature, which"):
        optimizer.load_state_dict(saved)
