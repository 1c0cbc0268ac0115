"""Time an optimizer step that overlaps communication with computation against one that does not.

    sudo .venv/bin/python -m benchmarks.overlap --model 60m --rank 128 --engines fsdp2 ddp

Each process runs on its own host, whose link has a given bandwidth. The hosts are network
namespaces on this machine, which require Linux, root and iproute2. With --out FILE.json all figures
are saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from arg_dist.cli.parsing import InputError, OneLineParser, at_least
from arg_dist.planning.llama import LLAMA_SIZES
from benchmarks.measuring.cli import rank_for, run, run_and_exit
from benchmarks.measuring.launching import run_job
from benchmarks.measuring.options import add_kept, parser
from benchmarks.measuring.overlap_job import WAYS
from benchmarks.measuring.results import Block, Figures, Row, number, with_spread
from benchmarks.measuring.turns import times_in
from benchmarks.network.bandwidth import bandwidth, name_of
from tests.hosts.namespaces import network, obstacle

ENGINES = ("fsdp2", "ddp")
ONE_LANE, IN_TURNS = WAYS
TITLES = {ONE_LANE: "one lane, ms", IN_TURNS: "alternating lanes, ms"}


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
    """Time steps without a refresh on several hosts, interleaving both variants.

    Args:
        model: a size of ``LLAMA_SIZES``.
        rank: rank of all matrices.
        engines: engines from :data:`ENGINES`.
        bandwidths: bandwidths of the hosts' links in bits per second; None for no limit.
        hosts: number of hosts, with one process each.
        rounds: timed steps of each variant.
        threads: torch threads per process; None for torch's default.
        limit: time limit for one bandwidth in seconds.

    Raises:
        InputError: hosts cannot be created here, or a job failed.
    """
    if (why := obstacle()) is not None:
        raise InputError(f"cannot create hosts here: {why}")
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
    titles = ["link", *(TITLES[way] for way in WAYS), "ratio", "MiB sent", "collectives"]
    about = samples[0]
    notes = [
        f"{about['model']}, rank {about['rank']}, fp32, {about['hosts']} hosts of one process "
        "each, which share this machine's cores. Time of an optimizer step without a refresh, on "
        "precomputed gradients: with a single lane, and with lanes that alternate. "
        f"{rounds} interleaved rounds; medians, with quartiles in parentheses; ratios are per "
        "round. Bytes and collectives are per step; bytes on the process that sends the most.",
    ]
    found = [Block(engine, rows) for engine, rows in blocks.items()]
    return Figures("Communication overlapped with computation", titles, found, notes, samples)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, or 2 if it is invalid."""
    return run(_options(), _measured, arguments)


def _options() -> OneLineParser:
    command = parser(__doc__)
    add = command.add_argument
    add("--model", choices=LLAMA_SIZES, default="60m", metavar="SIZE",
        help=f"one of {', '.join(LLAMA_SIZES)} (default: 60m)")  # fmt: skip
    add("--rank", type=at_least(1), help="rank of all matrices (default: a quarter of the hidden "
        "size)")  # fmt: skip
    add("--engines", nargs="+", choices=ENGINES, default=["fsdp2"], metavar="ENGINE",
        help=f"any of {', '.join(ENGINES)} (default: fsdp2)")  # fmt: skip
    add(
        "--bandwidths",
        nargs="+",
        type=bandwidth,
        metavar="BITS",
        default=[1e8, 1e9, None],
        help="bits per second and direction of a host's link (default: 100M 1G unlimited)",
    )
    add("--hosts", type=at_least(2), default=2, help="hosts, with one process each (default: 2)")
    add("--rounds", type=at_least(1), default=9, help="timed rounds (default: 9)")
    add("--limit", type=at_least(1), default=600, metavar="SECONDS", help="time limit for one "
        "bandwidth (default: 600)")  # fmt: skip
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
