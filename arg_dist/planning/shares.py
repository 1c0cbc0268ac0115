"""The ranks that matrices may reach, and the traffic of distributing a state budget."""

from __future__ import annotations

import pickle

import numpy as np

from arg_dist.algorithm import claim
from arg_dist.config import AdaRankGradConfig
from arg_dist.planning.rows import Counts
from arg_dist.planning.units import MatrixUnit, Unit, matrices, tensors
from arg_dist.sharding.communicator import SIZE_BYTES
from arg_dist.state_budget import check_fits, fixed_bytes
from arg_dist.subspace.budget import Claim, allowed_ranks


def planned_ranks(calls: list[list[Unit]], settings: AdaRankGradConfig) -> dict[str, int]:
    """The largest rank of each matrix; with a `state_budget`, the rank allowed in the first step.

    Raises:
        ConfigError: the budget is too small for the smallest ranks.
    """
    if settings.state_budget is None:
        return {unit.name: unit.largest for unit in matrices(calls)}
    claims = [_claim(unit) for unit in matrices(calls)]
    fixed = sum(int(unit.moment_bytes.sum()) for unit in tensors(calls))
    fixed += sum(_fixed(unit) for unit in matrices(calls))
    check_fits(settings.state_budget, fixed, claims)
    return allowed_ranks(claims, settings.state_budget - fixed)


def budget_sent(calls: list[list[Unit]], settings: AdaRankGradConfig, processes: int) -> int:
    """Bytes that each process sends to each other one in the first step to distribute the ranks."""
    if settings.state_budget is None or processes == 1:
        return 0
    fixed: Counts = np.zeros(processes, np.int64)
    for tensor in tensors(calls):
        fixed[tensor.owners] += tensor.moment_bytes
    claims: dict[int, list[Claim]] = {}
    for matrix in matrices(calls):
        home = int(matrix.owners[matrix.home])
        fixed[home] += _fixed(matrix)
        claims.setdefault(home, []).append(_claim(matrix))
    messages = [(int(fixed[home]), theirs) for home, theirs in claims.items()]
    longest = max((len(pickle.dumps(each)) for each in messages), default=0)
    return longest + SIZE_BYTES


def _claim(unit: MatrixUnit) -> Claim:
    return claim(unit.name, unit.planned.sharding, {}, unit.settings)


def _fixed(unit: MatrixUnit) -> int:
    return fixed_bytes(unit.planned.sharding, unit.settings)
