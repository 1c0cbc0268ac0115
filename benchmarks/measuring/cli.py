"""Command-line handling shared by all benchmarks."""

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
    """Run a benchmark's command line.

    Args:
        command: the benchmark's parser.
        measure: computes the tables from the options and the device.
        arguments: command-line arguments; None for those of the process.

    Returns:
        The exit code: 0, or 2 if the command line is invalid.
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
    """Exit with the code of `main`; SIGTERM cleans up its processes, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(exit_code(number)))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(exit_code(signal.SIGINT))


def turns_of(options: argparse.Namespace, device: torch.device) -> Turns:
    """The settings of a benchmark's timed steps.

    Raises:
        InputError: a rank is too large for all of the models.
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
    """The requested rank, or a quarter of the model's hidden size.

    Raises:
        InputError: it is too large for the model.
    """
    rank = options.rank or LLAMA_SIZES[options.model].hidden // 4
    check_ranks([options.model], [rank], "--rank")
    return rank


def jobs_of(options: argparse.Namespace, device: torch.device) -> Jobs:
    """The settings of a benchmark's training jobs.

    Raises:
        InputError: the rank is too large for the model or for the batch.
    """
    rank = rank_for(options)
    tokens = options.batch_size * options.seq_len
    if tokens < rank:  # a gradient's rank is at most the number of tokens
        raise InputError(
            f"--seq-len {options.seq_len}, --batch-size {options.batch_size}: {tokens} tokens per "
            f"process limit gradients to rank {tokens}, but --rank is {rank}; use more tokens or a "
            "lower --rank"
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
    """The device called `name`, or by default an accelerator if available.

    Raises:
        InputError: the device is not available.
    """
    has_one = torch.accelerator.is_available()
    best = torch.accelerator.current_accelerator() if has_one else None
    if name is None:
        return best or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", best.type if best else "cpu"}:
        available = f"{best.type}, cpu" if best else "cpu"
        raise InputError(f"--device {name}: not available; choose from {available}")
    return device
