"""What the command lines of all benchmarks do, before and after they measure."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from arg_dist.cli.parsing import BAD_INPUT, InputError, OneLineParser, complain
from arg_dist.config import ConfigError
from arg_dist.planning.llama import LLAMA_SIZES
from benchmarks.compare import peers
from benchmarks.compare.methods import FAMILIES
from benchmarks.measuring.jobs import Jobs
from benchmarks.measuring.results import Figures, check_out, show, write
from benchmarks.measuring.shapes import check_ranks
from benchmarks.measuring.turns import Turns
from launchers.pretraining.environment import prepare_environment
from launchers.pretraining.interrupts import exit_code

Measure = Callable[[argparse.Namespace, torch.device], list[Figures]]


def run(command: OneLineParser, measure: Measure, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark's command line.

    Args:
        command: its options.
        measure: takes them and the device, returns the tables.
        arguments: those of the process if None.

    Returns:
        The exit code: 0, or 2 if the command line cannot be used.
    """
    prepare_environment(world_of_one=False)
    options = command.parse_args(arguments)
    try:
        device = _device(getattr(options, "device", "cpu"))
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.out is not None:
            check_out(options.out)
        methods = {*getattr(options, "methods", ()), *getattr(options, "engine_methods", ())}
        peers.require({FAMILIES.get(name, name) for name in methods})
        tables = measure(options, device)
    except (InputError, ConfigError) as error:
        complain(str(error))
        return BAD_INPUT
    show(tables)
    if options.out is not None:
        write(tables, options.out)
    return 0


def run_and_exit(main: Callable[[], int]) -> None:
    """Exits with the code of `main`; SIGTERM ends what it has started, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(exit_code(number)))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(exit_code(signal.SIGINT))


def turns_of(options: argparse.Namespace, device: torch.device) -> Turns:
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


def rank_for(options: argparse.Namespace) -> int:
    """The rank that was asked for, or a quarter of the model's width.

    Raises:
        InputError: it is one that no matrix of the model can have.
    """
    rank = options.rank or LLAMA_SIZES[options.model].hidden // 4
    check_ranks([options.model], [rank], "--rank")
    return rank


def jobs_of(options: argparse.Namespace, device: torch.device) -> Jobs:
    """What all training jobs of a benchmark have in common.

    Raises:
        InputError: the rank is one that no gradient here can have.
    """
    rank = rank_for(options)
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
