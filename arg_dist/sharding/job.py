"""All processes that train one model, whichever groups an engine cuts them into."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from arg_dist.sharding.communicator import Communicator, training_group
from arg_dist.sharding.plan import Plan


def job_communicator(
    process_group: dist.ProcessGroup | str | None, plans: Sequence[Plan]
) -> Communicator:
    """The processes that have parts of one model.

    Args:
        process_group: what the optimizer was built with; see :class:`arg_dist.AdaRankGrad`.
        plans: the optimizer's. Where an engine cuts the model, its processes are all of the job.
    """
    cut = any(plan.communicator.group is not None and not plan.replicated for plan in plans)
    alone = process_group is None and not cut
    group = None if alone else training_group(process_group or "world")
    limits = [limit for plan in plans if (limit := plan.communicator.time_limit) is not None]
    return Communicator(group, max(limits, default=None))


def has_first_process(communicator: Communicator, job: Communicator) -> bool:
    """Whether a group has the job's first process in it; of copies of a model, it has the one."""
    return _ranks(job)[0] in _ranks(communicator)


def for_host_data(job: Communicator, seconds: float) -> Communicator:
    """The same processes in a group of their own, for another thread than the one that trains.

    Its messages stay on the host. Every process of the job must call it.

    Args:
        job: the processes.
        seconds: how long one waits for the others.
    """
    if job.group is None:
        return job
    if dist.get_world_size() > job.size:
        _even_out(job)
    group = dist.new_group(
        _ranks(job),
        backend="gloo",
        timeout=timedelta(seconds=seconds),
        use_local_synchronization=dist.get_world_size() > job.size,
    )
    return Communicator(group)


def _even_out(job: Communicator) -> None:
    """Lets every process be in as many groups: torch names a new one by that, and would hang."""
    mine = len(dist.distributed_c10d._world.pg_names)
    for _ in range(max(job.gather_objects(mine, "making a group for checkpoints")) - mine):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def _ranks(communicator: Communicator) -> list[int]:
    """Their numbers among all processes."""
    if communicator.group is not None:
        return list(dist.get_process_group_ranks(communicator.group))
    return [dist.get_rank() if dist.is_available() and dist.is_initialized() else 0]
