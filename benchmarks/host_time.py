"""Host time of a step among thousands of processes, of which one is simulated.

    python -m benchmarks.host_time --model 70b --engine zero3 --world-size 8 64 1024 4096
    python -m benchmarks.host_time --small 256 --world-size 1024

The process binds its part of a model as the engine would cut it, and takes steady steps on tensors
without data (the meta device), so that what remains is Python and torch's dispatcher. The other
processes are simulated: their descriptions at binding, and messages of theirs without content.
Calls are exact so, but seconds too long: the mode without data costs more than most operators. With
`--small`, matrices of 1024 x 1024 are on the CPU, with data: so little of each on one of a thousand
processes that seconds are those of the host.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from arg_dist.cli.parsing import OneLineParser, at_least
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.parameter_groups import trained_views
from arg_dist.planning.allocations import Unfilled
from arg_dist.planning.cuts import Layout, lay_out
from arg_dist.planning.model import Model, describe, load_model
from arg_dist.recording import requests_of_a_step
from arg_dist.sharding.communicator import Communicator
from arg_dist.sharding.fragment import Fragment, Holding
from arg_dist.sharding.layout import GroupSpec
from arg_dist.sharding.plan import Plan, make_plans
from arg_dist.sharding.shard import MatrixShard
from arg_dist.step import Agreement, PlanStep, gradient_parts, rounds_of
from arg_dist.subspace.state import State

GROUP: Any = "simulated"
META = torch.device("meta")


@dataclass(frozen=True)
class Figures:
    """Host costs of one process.

    Attributes:
        binding: seconds until the plan is made.
        step: seconds of CPU time of a steady step, the median.
        calls: function calls of a steady step, those into C included.
        matrices: low-rank matrices of which the process holds a part.
        collectives: of a steady step, without the agreement.
    """

    binding: float
    step: float
    calls: int
    matrices: int
    collectives: int


class OneOfMany(Communicator):
    """The collectives of one process whose peers are simulated.

    Args:
        size: number of processes.
        me: index of this one.
        ranges: ``processes x fragments x 2``, int64: element ranges of the fragments of each.
        device: of the messages.
    """

    def __init__(
        self, size: int, me: int, ranges: np.ndarray[Any, Any], device: torch.device
    ) -> None:
        super().__init__(None)
        self.group, self.size, self.me, self.device, self._ranges = GROUP, size, me, device, ranges

    def gather_objects(self, value: Any, purpose: str = "", *, counted: bool = False) -> list[Any]:
        """What all processes describe at binding."""
        (own,) = value
        return [[own._replace(ranges=ranges.tobytes())] for ranges in self._ranges]

    def _all_to_all(self, receive: Tensor, *_: Any) -> Callable[[], None]:
        """What is received has no content, or zeros."""
        receive.zero_()
        return lambda: None


def bound(
    model: Model, layout: Layout, settings: AdaRankGradConfig, device: torch.device = META
) -> tuple[Plan, float]:
    """The plan of the first process, and the seconds that it took to make it."""
    pieces = [piece for call in layout.calls for piece in layout.pieces(call)]
    ranges = np.zeros((layout.processes, len(pieces), 2), np.int64)
    for k, piece in enumerate(pieces):
        ranges[piece.owners, k] = piece.ranges
    fragments = []
    for k, piece in enumerate(pieces):
        start, stop = ranges[0, k].tolist()
        target = torch.ones(stop - start, device=device)
        target.grad = torch.ones_like(target)
        fragments.append(
            Fragment(piece.parameter.name, piece.parameter.shape, start, stop, target, _itself)
        )
    low_rank = {parameter.name for parameter in model.parameters if parameter.views}
    spec = GroupSpec(
        holding=Holding(fragments, GROUP),
        side=settings.side,
        shard_basis=settings.shards_basis(terms=False),
        views=lambda name, shape: trained_views(name, shape, settings) if name in low_rank else [],
        positions={fragment.name: k for k, fragment in enumerate(fragments)},
        settings="",
        largest_rank=lambda short: settings.rank_bounds(short)[1],
        goes_home=settings.goes_home,
    )
    communicator = OneOfMany(layout.processes, 0, ranges, device)
    before = time.perf_counter()
    (plan,) = make_plans([spec], {GROUP: communicator}, 60.0, int(settings.bucket_size))
    return plan, time.perf_counter() - before


def _itself(target: Tensor) -> Tensor:
    return target


def states_of(
    plan: Plan, settings: AdaRankGradConfig, rank: int, device: torch.device = META
) -> dict[int, State]:
    """The states of a plan's shards after a first step, without data or all ones."""
    states: dict[int, State] = {}
    for shard in plan.shards:
        states[shard.unit] = {}
        if isinstance(shard, MatrixShard):
            requests_of_a_step(states[shard.unit], shard.sharding, settings, rank)
            states[shard.unit]["gap"] = 10**9
    for state in states.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = torch.ones_like(value, device=device)
    return states


def take(plan: Plan, states: dict[int, State], settings: AdaRankGradConfig) -> None:
    """One steady step, after the agreement."""
    units = len(plan.units)
    rounds = [
        max((rounds_of(shard, states[shard.unit], [settings]) for shard in shards), default=0)
        for shards in plan.shards_by_lane
    ]
    agreed = Agreement([1.0] * units, [1.0] * units, rounds, [], plan.communicator.size)
    gradients = gradient_parts(plan.shards)
    PlanStep(plan, states, [settings], 1, gradients, agreed).take()


def calls_of(function: Callable[[], None]) -> int:
    """Function calls that a function makes, those into C included."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def simulate(
    model: Model,
    settings: AdaRankGradConfig,
    *,
    engine: str,
    processes: int,
    rank: int,
    device: torch.device = META,
    repeats: int = 3,
) -> Figures:
    """Bind a model and step with it, as one process of many.

    Args:
        model: the model.
        settings: the optimizer's settings.
        engine: zero3 or fsdp2, which cut every matrix.
        processes: number of processes.
        rank: rank of all bases.
        device: of what the process holds.
        repeats: steps of which the median is taken.
    """
    plan, binding = bound(model, lay_out(model, engine, processes), settings, device)
    states = states_of(plan, settings, rank, device)
    times = []
    with Unfilled() if device == META else nullcontext():
        take(plan, states, settings)
        for _ in range(repeats):
            before, taken = time.process_time(), plan.communicator.collectives
            take(plan, states, settings)
            times.append(time.process_time() - before)
            taken = plan.communicator.collectives - taken
        calls = calls_of(lambda: take(plan, states, settings))
    matrices = sum(isinstance(shard, MatrixShard) for shard in plan.shards)
    return Figures(binding, median(times), calls, matrices, taken)


def main() -> None:
    """Print a row for each number of processes."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="70b", help="as of arg-dist plan (default: 70b)")
    add("--small", type=at_least(0), default=0, metavar="COUNT", help="small matrices, with data")
    add("--engine", default="zero3", choices=["zero3", "fsdp2"])
    add("--world-size", nargs="+", type=at_least(2), default=[8, 64, 1024, 4096])
    add("--rank", type=at_least(1), default=16, help="(default: 16)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the optimizer")
    options = parser.parse_args()
    settings = parse_config(dict(each.split("=", 1) for each in options.set))
    if options.small:
        parameters = describe({f"{i}": (1024, 1024) for i in range(options.small)}, settings)
        device, model = torch.device("cpu"), Model("small", parameters, parameters)
    else:
        device, model = META, load_model(options.model, settings)
    table = Table("processes", "binding", "step", "per matrix", "calls", "collectives")
    for processes in options.world_size:
        found = simulate(
            model,
            settings,
            engine=options.engine,
            processes=processes,
            rank=options.rank,
            device=device,
        )
        each = 1e6 * found.step / max(1, found.matrices)
        table.add_row(
            str(processes), f"{found.binding:.2f} s", f"{found.step:.3f} s", f"{each:.0f} us",
            str(found.calls), str(found.collectives),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
