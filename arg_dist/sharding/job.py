"""All processes that train one model, across the groups that an engine divides them into."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from arg_dist.library_internals import GROUPS
from arg_dist.sharding.communicator import Communicator, training_group
from arg_dist.sharding.plan import Plan


def job_communicator(
    process_group: dist.ProcessGroup | str | None, plans: Sequence[Plan]
) -> Communicator:
    """The communicator of all processes that hold parts of one model.

    Args:
        process_group: the optimizer's setting; see :class:`arg_dist.AdaRankGrad`.
        plans: the optimizer's plans. If an engine shards the model, all processes of the job hold
            parts of it.
    """
    is_sharded = any(plan.communicator.group is not None and not plan.replicated for plan in plans)
    is_single = process_group is None and not is_sharded
    group = None if is_single else training_group(process_group or "world")
    limits = [limit for plan in plans if (limit := plan.communicator.time_limit) is not None]
    devices = [plan.communicator.device for plan in plans if plan.communicator.group is not None]
    known = devices[0] if devices else _first_device(plans)
    return Communicator(group, max(limits, default=None), known=known)


def _first_device(plans: Sequence[Plan]) -> torch.device | None:
    """Device of the first fragment; None without any."""
    return next((held.target.device for plan in plans for held in plan.held), None)


def has_first_process(ranks: Sequence[int], job: Communicator) -> bool:
    """Whether these contain the job's first process; this selects one of several replicas."""
    return ranks_of(job.group)[0] in ranks


def is_first_process(group: dist.ProcessGroup | None) -> bool:
    """Whether this is the first process of the group, or alone and the first one of the job."""
    if group is not None:
        return dist.get_rank(group) == 0
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def for_host_data(job: Communicator, seconds: float) -> Communicator:
    """A separate group of the same processes, for use from a thread other than the training one.

    Its messages stay on the host. Collective: every process of the job must call it.

    Args:
        job: the processes.
        seconds: time limit of a collective.
    """
    if job.group is None:
        return job
    if dist.get_world_size() > job.size:
        _even_out(job)
    group = dist.new_group(
        ranks_of(job.group),
        backend="gloo",
        timeout=timedelta(seconds=seconds),
        use_local_synchronization=dist.get_world_size() > job.size,
    )
    return Communicator(group)


def _even_out(job: Communicator) -> None:
    """Equalize the number of groups per process: torch derives group names from it, or hangs."""
    mine = len(GROUPS.imported().pg_names)
    for _ in range(max(job.gather_objects(mine, "creating the group for checkpoints")) - mine):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    """Indexes of its processes in the job; of this one if there is no group."""
    if group is not None:
        return list(dist.get_process_group_ranks(group))
    return [dist.get_rank() if dist.is_available() and dist.is_initialized() else 0]
