"""The few things the processes of a job tell each other outside the optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from arg_dist import ConfigError, NoAnswerError
from arg_dist.cli.parsing import InputError, is_first_process

T = TypeVar("T")


def from_first_process(produce: Callable[[], T]) -> T:
    """Calls `produce` on the first process and hands its result to all of them.

    So files need to be readable there only, and a mistake of the user is reported everywhere.
    """
    box: list[T | InputError | ConfigError | None] = [None]
    if is_first_process():
        try:
            box[0] = produce()
        except (InputError, ConfigError) as error:
            box[0] = error
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], (InputError, ConfigError)):
        raise box[0]
    return box[0]  # type: ignore[return-value]


def limit_waiting(limit: timedelta) -> None:
    """Lets this process wait for another no longer than `limit`, in whichever group both are.

    Engines form groups of their own with torch's limit of 10 to 30 minutes, whatever the job's is;
    so this is called once the engine stands.
    """
    c10d = dist.distributed_c10d
    for group in c10d._world.pg_map:  # torch lists its groups nowhere else
        c10d._set_pg_timeout(limit, group)


def no_answer(error: RuntimeError) -> str | None:
    """What to tell of an `error` that the silence of other processes causes; None of others.

    The optimizer's names its matrices; gloo's, out of an engine's collectives, say little.
    """
    if isinstance(error, NoAnswerError):
        return str(error)
    found = _SILENCE.search(str(error))
    if found is None:
        return None
    return (
        f"another process has stopped answering, or is gone ({found[0]}, in a collective outside "
        "the optimizer); see what it says itself, and go on with --resume; --time-limit tells how "
        "long to wait"
    )


_SILENCE = re.compile(r"Timed out waiting \d+ms|Connection (?:closed|reset) by peer|Broken pipe")


def mean_and_stop(
    value: torch.Tensor, stop_signal: int | None, device: torch.device | str
) -> tuple[float, int | None]:
    """The mean of `value` over the processes, and the largest signal that any of them got.

    Both travel in one message, since every training step sends it.
    """
    both = torch.zeros(dist.get_world_size() + 1, device=device)
    both[0] = value
    both[1 + dist.get_rank()] = stop_signal or 0
    dist.all_reduce(both)
    numbers = both.tolist()
    return numbers[0] / dist.get_world_size(), int(max(numbers[1:])) or None
