"""A step that computes while messages travel, beside one that waits for them.

    sudo .venv/bin/python -m benchmarks.overlap --model 60m --rank 128 --engines fsdp2 ddp

The processes are on hosts of their own, of which the links have a bandwidth: network namespaces of
this machine (Linux, root and iproute2 are needed). With --out FILE.json all figures are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from arg_dist.cli.parsing import InputError, OneLineParser, at_least
from arg_dist.planning.llama import LLAMA_SIZES
from benchmarks.measuring.launching import run_job
from benchmarks.measuring.line import rank_for, run, run_and_exit
from benchmarks.measuring.options import add_kept, parser
from benchmarks.measuring.overlap_job import WAYS
from benchmarks.measuring.results import Block, Figures, Row, number, with_spread
from benchmarks.measuring.turns import times_in
from benchmarks.network.bandwidth import bandwidth, name_of
from tests.hosts.namespaces import network, obstacle

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add = command.add_argument
    add("--model", choices=LLAMA_SIZES, default="60m", metavar="SIZE",
        help=f"of {', '.join(LLAMA_SIZES)} (default: 60m)")  # fmt: skip
    add("--rank", type=at_least(1), help="(default: a quarter of the width)")
    add("--engines", nargs="+", choices=ENGINES, default=["fsdp2"], metavar="ENGINE",
        help=f"of {', '.join(ENGINES)} (default: fsdp2)")  # fmt: skip
    add(
        "--bandwidths",
        nargs="+",
        type=bandwidth,
        metavar="BITS",
        default=[1e8, 1e9, None],
        help="per second and direction of a host's link (default: 100M 1G unlimited)",
    )
    add("--hosts", type=at_least(2), default=2, help="with a process each (default: 2)")
    add("--rounds", type=at_least(1), default=9, help="(default: 9)")
    add("--limit", type=at_least(1), default=600, metavar="SECONDS", help="for one bandwidth "
        "(default: 600)")  # fmt: skip
    add_kept(command)
    return command


def _measured(options: argparse.Namespace, _: torch.device) -> list[Figures]:
    return [
        measure_overlap(
            options.model,
            rank_for(options),
            options.engines,
            options.bandwidths,
            hosts=options.hosts,
            rounds=options.rounds,
            threads=options.threads,
            limit=float(options.limit),
        )
    ]


if __name__ == "__main__":
    run_and_exit(main)
