"""All figures of a plan, for AdaRankGrad and the optimizers it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from arg_dist.algorithm import momentum_bytes
from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.planning.choices import BUCKET, ENGINES, FP64
from arg_dist.planning.cuts import Layout, lay_out
from arg_dist.planning.engines import Held, Sent, engine_sent, held
from arg_dist.planning.meshes import Mesh
from arg_dist.planning.model import Model
from arg_dist.planning.peers import PEERS, Peer
from arg_dist.planning.rows import Counts
from arg_dist.planning.shares import budget_sent, planned_ranks
from arg_dist.planning.temporaries import temporaries
from arg_dist.planning.units import MatrixUnit, Unit, lanes, matrices, tensors, units_of
from arg_dist.recording import rounds_of_matrix
from arg_dist.subspace.norm_sketch import BUCKETS
from arg_dist.terms import term_bytes

KEPT = (
    "weights",
    "master_weights",
    "gradients",
    "engine_buffers",
    "low_rank_moments",
    "projectors",
    "full_rank_state",
)
"""Keys of what is held in memory at every step."""
AGREED = 2 * FP64
"""Bytes per matrix or tensor in the agreement before a step."""


@dataclass(frozen=True, eq=False)
class Figures:
    """Memory and traffic of training with one optimizer, in bytes per process.

    Attributes:
        kept: memory held at every step, by the keys of :data:`KEPT`.
        step_temporaries: temporaries in a step without a refresh, in addition to `kept`.
        refresh_temporaries: temporaries in a step that refreshes all matrices, as the first does.
        engine: bytes the engine sends per step.
        step: bytes the optimizer sends in a step without a refresh.
        refresh: bytes the optimizer sends in the first step.
        step_collectives: collectives of the optimizer in a step without a refresh.
        refresh_collectives: collectives of the optimizer in the first step.
    """

    kept: Mapping[str, Counts]
    step_temporaries: Counts
    refresh_temporaries: Counts
    engine: Sent
    step: Sent
    refresh: Sent
    step_collectives: int = 0
    refresh_collectives: int = 0

    @property
    def state(self) -> Counts:
        """The optimizer's state."""
        return self._sum("low_rank_moments", "projectors", "full_rank_state")

    @property
    def peak(self) -> Counts:
        """Everything kept, plus the larger of the two temporaries."""
        return self._sum(*KEPT) + np.maximum(self.step_temporaries, self.refresh_temporaries)

    def in_copies(self, copies: int) -> Figures:
        """The figures of several copies of the model, each of which is trained like this one."""

        def each(counts: Counts) -> Counts:
            return np.tile(counts, copies)

        return replace(
            self,
            kept={key: each(counts) for key, counts in self.kept.items()},
            step_temporaries=each(self.step_temporaries),
            refresh_temporaries=each(self.refresh_temporaries),
            engine=Sent(*map(each, self.engine)),
            step=Sent(*map(each, self.step)),
            refresh=Sent(*map(each, self.refresh)),
        )

    def arrays(self) -> dict[str, Counts]:
        """All figures by name."""
        return {
            **{key: self.kept[key] for key in KEPT},
            "optimizer_state": self.state,
            "step_temporaries": self.step_temporaries,
            "refresh_temporaries": self.refresh_temporaries,
            "peak": self.peak,
            "engine_sent_per_step": self.engine.total,
            "engine_sent_between_copies_per_step": self.engine.crossing,
            "sent_per_step": self.step.total,
            "sent_between_copies_per_step": self.step.crossing,
            "sent_in_first_step": self.refresh.total,
            "sent_between_copies_in_first_step": self.refresh.crossing,
        }

    def as_json(self) -> dict[str, Any]:
        """Every figure as the maximum and median over processes, and the total."""
        return {
            **{
                key: {"largest": int(a.max()), "median": int(np.median(a)), "total": int(a.sum())}
                for key, a in self.arrays().items()
            },
            "collectives_per_step": self.step_collectives,
            "collectives_in_first_step": self.refresh_collectives,
        }

    def _sum(self, *keys: str) -> Counts:
        total: Counts = np.sum([self.kept[key] for key in keys], 0)
        return total


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        model: the model to train.
        engine: one of ``ENGINES``.
        processes: number of processes.
        dtype: data type of the weights used in forward and backward.
        settings: AdaRankGrad's settings.
        copies: number of copies of the model, each sharded over its share of the processes.
        mesh: the processes under tensor parallelism; None without it.
        ranks: rank assumed for each matrix, by name.
        figures: figures by optimizer: ours, and that of each of `peers` by its title.
        peers: the optimizers it is compared with.
    """

    model: Model
    engine: str
    processes: int
    dtype: str
    settings: AdaRankGradConfig
    copies: int
    ranks: Mapping[str, int]
    figures: Mapping[str, Figures] = field(default_factory=dict)
    peers: Sequence[Peer] = ()
    mesh: Mesh | None = None

    @property
    def apart(self) -> list[Peer]:
        """The peers that the engine rules out, whose figures are for one process without it."""
        return [peer for peer in self.peers if not peer.runs_under(self.engine)]

    def as_json(self) -> dict[str, Any]:
        """The whole plan as JSON."""
        return {
            "model": self.model.name,
            "parameters": self.model.elements,
            "engine": ENGINES[self.engine],
            "world_size": self.processes,
            "copies": self.copies,
            "mesh": None if self.mesh is None else self.mesh.text,
            "dtype": self.dtype,
            "settings": self.settings.model_dump(mode="json"),
            "ranks": dict(self.ranks),
            "for_one_process": [peer.title for peer in self.apart],
            "bytes_per_process": {name: each.as_json() for name, each in self.figures.items()},
        }


def make_plan(
    model: Model,
    settings: AdaRankGradConfig,
    *,
    engine: str,
    processes: int = 1,
    copies: int = 1,
    mesh: Mesh | None = None,
    dtype: str = "fp32",
    reduce_bucket: int = BUCKET,
    against: Sequence[str] = ("adamw", "galore"),
) -> Plan:
    """Compute the memory and traffic of a run.

    Args:
        model: the model to train.
        settings: AdaRankGrad's settings.
        engine: one of ``ENGINES``.
        processes: number of processes.
        copies: number of copies of the model, each sharded over its share of the processes. They
            exchange sketches with ``gradient_sync="sketch"``; else the engine averages their
            gradients, and the optimizer's processes are those of a copy (HSDP).
        mesh: the processes by axes, instead of their number and that of the copies; with more than
            one of tensor parallelism, the optimizer's processes are all of them.
        dtype: data type of the weights used in forward and backward, one of ``DTYPES``.
        reduce_bucket: DeepSpeed's `reduce_bucket_size`, in elements.
        against: the optimizers to compare with, of :data:`~arg_dist.planning.peers.PEERS`.

    Raises:
        ConfigError: the engine is unknown, or is ``none`` with several processes; there cannot be
            so many copies, or a setting does not work with them.
        ConfigError: `state_budget` is too small.
    """
    if mesh is not None:
        if engine != "fsdp2":
            raise ConfigError(
                f"--mesh {mesh.text}: its axes are those of --engine fsdp2; got --engine {engine}"
            )
        processes, copies = mesh.processes, mesh.replicate if mesh.tp == 1 else 1
        mesh = mesh if mesh.tp > 1 else None
    layout = lay_out(model, engine, processes, copies, mesh)
    has_terms = layout.has_terms(settings)
    together = layout if has_terms else layout.one_copy
    calls = units_of(together, settings)
    ranks = planned_ranks(calls, settings)
    holds = held(layout, dtype, reduce_bucket)
    sent = engine_sent(layout, dtype)
    own = engine_sent(layout, dtype, averages=not has_terms).first(together.processes)
    ours = _ours(together, calls, ranks, held(together, dtype, reduce_bucket), own, settings)
    figures = {"AdaRankGrad": ours.in_copies(processes // together.processes)}
    peers = [PEERS[name] for name in against]
    for peer in peers:
        if peer.runs_under(engine):
            figures[peer.title] = _of_peer(peer, layout, holds, sent, settings)
        else:
            alone = lay_out(model, "none", 1)
            figures[peer.title] = _of_peer(
                peer, alone, held(alone, dtype), engine_sent(alone, dtype), settings
            )
    return Plan(model, engine, processes, dtype, settings, copies, ranks, figures, peers, mesh)


def _ours(
    layout: Layout,
    calls: list[list[Unit]],
    ranks: dict[str, int],
    holds: Held,
    engine: Sent,
    settings: AdaRankGradConfig,
) -> Figures:
    processes = layout.processes
    zeros = np.zeros(processes, np.int64)
    moments, projectors, full_rank = zeros.copy(), zeros.copy(), zeros.copy()
    scalars = FP64 * (2 if settings.residual == "scaled" else 1)
    for unit in matrices(calls):
        rank = ranks[unit.name]
        moments[unit.owners] += unit.moment_bytes(rank) + scalars
        moments[unit.owners[unit.home]] += momentum_bytes(unit.elements, settings)
        projectors[unit.owners] += unit.basis_bytes(rank)
    for tensor in tensors(calls):
        full_rank[tensor.owners] += tensor.moment_bytes
    cut = [lanes(units, settings) for units in calls]
    agreeing = sum(map(_agreeing, cut))
    if layout.has_terms(settings) and settings.max_grad_norm is not None:
        agreeing += FP64 * BUCKETS
    budget = budget_sent(calls, settings, processes)
    steps, firsts = (
        [
            temporaries(each, ranks, holds.trained_bytes, processes, is_first=is_first)
            for each in cut
        ]
        for is_first in (False, True)
    )
    refreshing = np.max(firsts, 0)
    if settings.gradient_budget is not None:
        holds, whole = _projected(calls, ranks, holds, settings)
        refreshing = refreshing + whole
    has_terms = layout.has_terms(settings)
    collectives = [_collectives(each, settings, processes, has_terms=has_terms) for each in cut]
    return Figures(
        _kept(holds, moments, projectors, full_rank),
        np.max(steps, 0),
        refreshing,
        engine,
        _sent(layout, calls, ranks, agreeing, is_first=False),
        _sent(layout, calls, ranks, agreeing + budget, is_first=True),
        sum(steady for steady, _ in collectives),
        sum(most for _, most in collectives) + (2 if budget else 0),
    )


def _projected(
    calls: list[list[Unit]], ranks: dict[str, int], holds: Held, settings: AdaRankGradConfig
) -> tuple[Held, int]:
    """What is held if the backward pass projects gradients, and bytes that stay whole beside it."""
    size = holds.trained_bytes
    rest = size * sum(tensor.elements for tensor in tensors(calls))
    projected, whole = 0, []
    for unit in matrices(calls):
        projected += term_bytes(unit.planned.sharding, ranks[unit.name], settings)
        whole.append(size * unit.elements)
    budget = max(int(settings.gradient_budget or 0), *whole)
    held = np.full_like(holds.gradients, rest + projected)
    return replace(holds, gradients=held), min(budget, sum(whole))


def _sent(
    layout: Layout, calls: list[list[Unit]], ranks: dict[str, int], to_each: int, *, is_first: bool
) -> Sent:
    """Bytes that the optimizer sends in a step.

    Args:
        layout: the model's layout under the engine.
        calls: the matrices and tensors of each call to ``step()``.
        ranks: rank of each matrix, by name.
        to_each: bytes to each other process, beside those for matrices and tensors.
        is_first: whether it is the first step, or one without a refresh.
    """
    others, of_others = layout.processes - 1, layout.processes - layout.of_a_copy
    found = Sent(*(np.full(layout.processes, k * to_each, np.int64) for k in (others, of_others)))
    each = [
        (unit.owners, unit.rounds(ranks[unit.name], is_first=is_first)) for unit in matrices(calls)
    ]
    each += [(tensor.owners, tensor.rounds) for tensor in tensors(calls)]
    for owners, rounds in each:
        for moved in rounds:
            found.total[owners] += moved.sent
            found.crossing[owners] += moved.crossing
    return found


def _agreeing(cut: list[list[Unit]]) -> int:
    """Bytes that each process sends to each other one in the agreement before a step.

    These are the norms of every matrix and tensor, and for the process itself two numbers and the
    rounds of each lane.
    """
    own = FP64 * (2 + len(cut))
    return AGREED * sum(map(len, cut)) + own


def _collectives(
    cut: list[list[Unit]], settings: AdaRankGradConfig, processes: int, *, has_terms: bool
) -> tuple[int, int]:
    """Collectives of one call to ``step()``: without a refresh, and refreshing all matrices."""
    if processes == 1:
        return 0, 0
    steady, refreshing = 1, 1
    for lane in cut:
        shared = [unit for unit in lane if unit.is_shared]
        shardings = [unit.planned.sharding for unit in shared if isinstance(unit, MatrixUnit)]
        terms = has_terms and bool(shared)
        needed = (int(bool(shared)) + int(terms),) * 2
        if shardings:
            each = [rounds_of_matrix(sharding, settings) for sharding in shardings]
            needed = max(steady for steady, _ in each), max(most for _, most in each)
        steady, refreshing = steady + needed[0], refreshing + needed[1]
    return steady, refreshing


def _of_peer(
    peer: Peer, layout: Layout, holds: Held, engine: Sent, settings: AdaRankGradConfig
) -> Figures:
    memory, nothing = peer.memory(layout, holds, settings), np.zeros(layout.processes, np.int64)
    kept = _kept(holds, memory.moments, memory.projectors, memory.full_rank)
    silent = Sent(nothing, nothing)
    return Figures(kept, memory.step, memory.refresh, engine, silent, silent)


def _kept(holds: Held, moments: Counts, projectors: Counts, full_rank: Counts) -> dict[str, Counts]:
    parts = (holds.weights, holds.masters, holds.gradients, holds.buffers)
    return dict(zip(KEPT, (*parts, moments, projectors, full_rank), strict=True))
