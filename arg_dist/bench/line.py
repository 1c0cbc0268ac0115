"""The command line of benchmarks.

python -m arg_dist.bench step --models 350m --ranks 128
python -m arg_dist.bench refresh --models 1b --ranks 128 --methods recommended galore
python -m arg_dist.bench memory --model 60m --engines none ddp zero2 fsdp2
python -m arg_dist.bench scaling --model 60m --processes 1 2 4
sudo python -m arg_dist.bench overlap --model 60m --bandwidths 100M 1G unlimited

The same commands run on CPUs and on GPUs. --threads is torch's own choice unless given.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from arg_dist.bench.memory import Jobs, check_devices, measure_alone, measure_engines
from arg_dist.bench.options import parser
from arg_dist.bench.overlap import measure_overlap
from arg_dist.bench.refresh import measure_refreshes
from arg_dist.bench.results import Figures, check_out, show, write
from arg_dist.bench.scaling import measure_layers, measure_processes
from arg_dist.bench.shapes import check_ranks
from arg_dist.bench.step import measure_steps
from arg_dist.bench.turns import Turns
from arg_dist.compare import peers
from arg_dist.compare.methods import FAMILIES
from arg_dist.lm import InputError
from arg_dist.lm.command_line import BAD_INPUT, complain
from arg_dist.lm.environment import prepare_environment
from arg_dist.lm.interrupts import exit_code
from arg_dist.lm.presets import LLAMA_SIZES


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 if it cannot be used."""
    assert __doc__ is not None
    prepare_environment(world_of_one=False)
    options = parser(__doc__).parse_args(arguments)
    try:
        device = _device(getattr(options, "device", "cpu"))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.out is not None:
            check_out(options.out)
        methods = {*getattr(options, "methods", ()), *getattr(options, "engine_methods", ())}
        peers.require({FAMILIES.get(name, name) for name in methods})
        tables = COMMANDS[options.command](options, device)
    except InputError as error:
        complain(str(error))
        return BAD_INPUT
    show(tables)
    if options.out is not None:
        write(tables, options.out)
    return 0


def stop_on_signals() -> None:
    """Lets SIGTERM end what has been started, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(exit_code(number)))


def _step(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    return [measure_steps(_turns(options, device), options.dtypes)]


def _refresh(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    return [measure_refreshes(_turns(options, device))]


def _memory(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    jobs = _jobs(options, device)
    check_devices(device, options.processes if options.engines else 1)
    tables = [measure_alone(jobs, options.methods)]
    if options.engines and options.engine_methods:
        tables += [
            measure_engines(
                jobs, options.engines, options.engine_methods, processes=options.processes
            )
        ]
    return tables


def _scaling(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    jobs = _jobs(options, device)
    check_devices(device, max(options.processes, default=1))
    tables = [
        measure_layers(
            options.model,
            jobs.rank,
            options.methods,
            layers=options.layers,
            rounds=options.rounds,
            device=device,
        )
    ]
    if options.engines and options.processes:
        tables += [
            measure_processes(
                jobs,
                options.engines,
                options.methods,
                processes=options.processes,
                cores=len(os.sched_getaffinity(0)),
            )
        ]
    return tables


def _overlap(options: argparse.Namespace, device: torch.device) -> list[Figures]:
    rank = options.rank or LLAMA_SIZES[options.model].hidden // 4
    check_ranks([options.model], [rank], "--rank")
    return [
        measure_overlap(
            options.model,
            rank,
            options.engines,
            options.bandwidths,
            hosts=options.hosts,
            rounds=options.rounds,
            threads=options.threads,
            limit=float(options.limit),
        )
    ]


COMMANDS: dict[str, Callable[[argparse.Namespace, torch.device], list[Figures]]] = {
    "step": _step,
    "refresh": _refresh,
    "memory": _memory,
    "scaling": _scaling,
    "overlap": _overlap,
}


def _turns(options: argparse.Namespace, device: torch.device) -> Turns:
    """What all timed steps of a benchmark have in common.

    Raises:
        InputError: a rank is one that no model here can have.
    """
    check_ranks(options.models, options.ranks)
    return Turns(
        models=options.models,
        ranks=options.ranks,
        names=options.methods,
        device=device,
        rounds=options.rounds,
    )


def _jobs(options: argparse.Namespace, device: torch.device) -> Jobs:
    """What all training jobs of a benchmark have in common.

    Raises:
        InputError: the rank is one that no gradient here can have.
    """
    rank = options.rank or LLAMA_SIZES[options.model].hidden // 4
    check_ranks([options.model], [rank], "--rank")
    tokens = options.batch_size * options.seq_len
    if tokens < rank:  # gradients have no more directions than tokens
        raise InputError(
            f"--seq-len {options.seq_len}, --batch-size {options.batch_size}: {tokens} tokens of a "
            f"process make gradients of rank {tokens} at most, and state of rank {rank} is to be "
            "measured; give more tokens, or a lower --rank"
        )
    return Jobs(
        model=options.model,
        rank=rank,
        device=device,
        threads=options.threads,
        limit=float(options.limit),
        batch=options.batch_size,
        length=options.seq_len,
        steps=options.steps,
        tell=partial(print, file=sys.stderr, flush=True),
    )


def _device(name: str | None) -> torch.device:
    """The device of this name, or the best one.

    Raises:
        InputError: there is no such device here.
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", best.type if best else "cpu"}:
        there = f"{best.type} and cpu" if best else "cpu alone"
        raise InputError(f"--device {name}: there is no such device here; there is {there}")
    return device
