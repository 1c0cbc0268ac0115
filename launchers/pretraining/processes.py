"""Communication between the processes of a job outside the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from arg_dist import ConfigError, NoAnswerError
from arg_dist.cli.parsing import InputError, is_first_process
from arg_dist.library_internals import GROUPS, SET_GROUP_TIMEOUT
from arg_dist.sharding.timeouts import SILENCE

T = TypeVar("T")

PREPARATION = timedelta(days=1)
"""How long processes wait for the first one to read and tokenize text; if it exits, they notice."""


def from_first_process(produce: Callable[[], T]) -> T:
    """Calls `produce` on the first process and broadcasts its result.

    Files need to be readable there only, and user errors are raised on every process. The result
    passes through the host's memory, and the others wait for :data:`PREPARATION`, whatever the
    device and the timeout of the job's own group are.
    """
    group = _host_group() if dist.get_world_size() > 1 else None
    box: list[T | InputError | ConfigError | None] = [None]
    if is_first_process():
        try:
            box[0] = produce()
        except (InputError, ConfigError) as error:
            box[0] = error
    if group is not None:
        dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
        dist.destroy_process_group(group)
    if isinstance(box[0], (InputError, ConfigError)):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def _host_group() -> dist.ProcessGroup:
    """A group of all processes whose messages do not pass through a device."""
    return dist.new_group(backend="gloo", timeout=PREPARATION)


def limit_waiting(limit: timedelta) -> None:
    """Sets the timeout of all of this process's groups to `limit`.

    Engines create groups with torch's timeout of 10 to 30 minutes, whatever the job's is; so call
    this once the engine is built.
    """
    for group in GROUPS.imported().pg_map:
        SET_GROUP_TIMEOUT.imported()(limit, group)


def no_answer(error: RuntimeError) -> str | None:
    """The message for an `error` caused by unresponsive processes; None for other errors.

    The optimizer's errors name its matrices; those of an engine's collectives hold little.
    """
    if isinstance(error, NoAnswerError):
        return str(error)
    found = SILENCE.search(str(error))
    if found is None:
        return None
    return (
        f"another process has stopped answering, or has exited ({found[0]}, in a collective "
        "outside the optimizer); check its own output, and continue with --resume; --time-limit "
        "sets how long to wait"
    )


def mean_and_stop(
    value: torch.Tensor, stop_signal: int | None, device: torch.device | str
) -> tuple[float, int | None]:
    """The mean of `value` over the processes, and the largest signal that any of them received.

    One collective serves both, because every training step runs it.
    """
    both = torch.zeros(dist.get_world_size() + 1, device=device)
    both[0] = value
    both[1 + dist.get_rank()] = stop_signal or 0
    dist.all_reduce(both)
    numbers = both.tolist()
    return numbers[0] / dist.get_world_size(), int(max(numbers[1:])) or None
