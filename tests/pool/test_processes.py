"""The pool itself: results, tracebacks, hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from processes import ProcessPool

from tests.launch.forking import context


def sum_of_indices(group) -> float:
    total = torch.tensor(float(dist.get_rank(group)))
    dist.all_reduce(total, group=group)
    return float(total)


def divide(group, number: int) -> float:
    return 1 / number


def hang(group) -> None:
    time.sleep(1000)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_first_processes_form_a_group(pool, processes):
    assert pool.run(sum_of_indices, processes) == [sum(range(processes))] * processes


def test_failures_and_hangs_are_told_and_leave_a_pool_that_works():
    pool = ProcessPool(1, context)  # which starts anew each time
    try:
        with pytest.raises(RuntimeError, match=r"process 0: (.|\n)*ZeroDivisionError"):
            pool.run(divide, 1, 0)
        with pytest.raises(TimeoutError, match=r"processes \[0\] of 1 have not answered"):
            pool.run(hang, 1, seconds=0.2)
        assert pool.run(divide, 1, 4) == [0.25]
    finally:
        pool.close()
