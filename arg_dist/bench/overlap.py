"""``bench overlap``: a step that computes while messages travel, beside one that waits for them.

The processes are on hosts of their own, of which the links have a bandwidth: network namespaces
(:mod:`arg_dist.network.hosts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arg_dist.bench.launching import run_job
from arg_dist.bench.overlap_job import WAYS
from arg_dist.bench.results import Block, Figures, Row, number, with_spread
from arg_dist.bench.turns import times_in
from arg_dist.lm import InputError
from arg_dist.network.bandwidth import name_of
from arg_dist.network.hosts import network, obstacle

ENGINES = ("fsdp2", "ddp")
ONE_LANE, IN_TURNS = WAYS


def measure_overlap(
    model: str,
    rank: int,
    engines: Sequence[str],
    bandwidths: Sequence[float | None],
    *,
    hosts: int,
    rounds: int,
    threads: int | None,
    limit: float,
) -> Figures:
    """Times steps without a new basis on several hosts, in both ways in turns.

    Args:
        model: a size of ``LLAMA_SIZES``.
        rank: of all matrices.
        engines: of :data:`ENGINES`.
        bandwidths: of the hosts' links, bits per second; None for no limit.
        hosts: how many, with a process each.
        rounds: timed steps of each way.
        threads: of torch in each process; None for its own choice.
        limit: seconds for one bandwidth.

    Raises:
        InputError: no hosts can be made here, or a job has failed.
    """
    if (why := obstacle()) is not None:
        raise InputError(f"no hosts can be made here: {why}")
    samples = []
    for engine in engines:
        for bits in bandwidths:
            with network(hosts) as members:
                for host in members:
                    host.limit(bits)
                job = {"engine": engine, "model": model, "rank": rank, "device": "cpu"}
                found = run_job(
                    "overlap",
                    {**job, "rounds": rounds},
                    processes=hosts,
                    threads=threads,
                    limit=limit,
                    hosts=members,
                )
            samples.append({**job, "hosts": hosts, "bits_per_second": bits, "processes": found})
    return overlap_figures(samples, rounds)


def overlap_figures(samples: list[dict[str, Any]], rounds: int) -> Figures:
    """The table of :func:`measure_overlap`."""
    blocks: dict[str, list[Row]] = {}
    for sample in samples:
        first = sample["processes"][0]
        times = times_in(first)
        ratio = times[IN_TURNS].over(times[ONE_LANE])
        sent = max(process["sent"][IN_TURNS]["bytes"] for process in sample["processes"])
        row = [
            name_of(sample["bits_per_second"]),
            *(number(1e3 * times[way].median) for way in WAYS),
            with_spread(ratio),
            number(sent / 2**20),
            " and ".join(str(first["sent"][way]["collectives"]) for way in WAYS),
        ]
        blocks.setdefault(sample["engine"], []).append(row)
    titles = ["link", *(f"{way}, ms" for way in WAYS), "ratio", "MiB sent", "collectives"]
    about = samples[0]
    notes = [
        f"{about['model']}, rank {about['rank']}, fp32, {about['hosts']} hosts of one process "
        "each, which share this machine's cores. A step of the optimizer without a new basis, on "
        "gradients that are there already: with a single lane, and with lanes that take turns. "
        f"{rounds} rounds in turns; medians, and quartiles in brackets; ratios are those of a "
        "round. Bytes and collectives are those of a step, bytes of the process that sends most.",
    ]
    found = [Block(engine, rows) for engine, rows in blocks.items()]
    return Figures("Messages under way while others compute", titles, found, notes, samples)
