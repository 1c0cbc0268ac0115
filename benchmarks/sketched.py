"""Loss against bytes: several workers whose gradients cross as sketches and in few bits.

    python -m benchmarks.sketched --out runs/sketched --model pico --workers 4 --seeds 0 1 2

The workers take turns in this process, each with its share of a batch, and step in lockstep through
:func:`arg_dist.terms.step_of_terms`, as processes do; what their requests would send is counted.
Whole gradients and Muon are trained on the mean of the same gradients. Writes a line for each run
to OUT/runs.jsonl, which is continued, and the picture OUT/frontier.png.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import arg_dist
from arg_dist.algorithm import StepFacts
from arg_dist.cli.parsing import OneLineParser, at_least
from arg_dist.config import AdaRankGradConfig, parse_config
from arg_dist.planning.llama import model_config
from arg_dist.planning.rows import Spans, sent
from arg_dist.sharding.drivers import run_lockstep
from arg_dist.sharding.layout import basis_spans_columns, shard_matrix
from arg_dist.sharding.plan import phase_of
from arg_dist.step import CLIP_EPS
from arg_dist.subspace.distributed import Steps, exchanges_of
from arg_dist.subspace.state import State
from arg_dist.terms import step_of_terms
from benchmarks.compare.optimizers import low_rank_matrices
from launchers.pretraining.corpus import read_corpus
from launchers.pretraining.models import build_model
from launchers.pretraining.schedule import warmup_cosine
from launchers.pretraining.tokens import Sequences, load_tokenizer
from launchers.reporting.charts import STYLE, new_figure

EVALUATED = 128
"""Held-out sequences."""
SEQUENCE = 128
"""Tokens of a sequence."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        settings: of AdaRankGrad, beside the learning rate; None for Muon.
        lr: learning rate of the matrices.
    """

    settings: Mapping[str, Any] | None = field(default_factory=dict)
    lr: float = 2.4e-2

    @property
    def sends_sketches(self) -> bool:
        """Whether gradients do not cross whole."""
        return self.settings is not None and self.settings.get("gradient_sync") == "sketch"


def _sketch(up: int, back: int, **more: Any) -> Way:
    bits = {"residual_sync_bits": up, "residual_back_bits": back}
    return Way({"gradient_sync": "sketch", **bits, **more})


NO_MOMENTUM, MATCHED = {"residual_momentum": 0.0}, {"residual": "matched"}
WAYS = {
    "whole": Way(),
    "whole, momentum 0.5": Way({"residual_momentum": 0.5}),
    "muon": Way(None, lr=1.2e-2),
    "none": _sketch(1, 1, residual="none"),
    "1 bit, 2 back": _sketch(1, 2),
    "2 bits, 2 back": _sketch(2, 2),
    "2 bits, 2 back, bf16": _sketch(2, 2, sync_precision="bf16"),
    "2 bits, 2 back, bf16, rank 4": _sketch(2, 2, sync_precision="bf16", max_rank=4),
    "4 bits, 4 back": _sketch(4, 4),
    "2 bits, 2 back, no momentum": _sketch(2, 2, **NO_MOMENTUM),
    "4 bits, 4 back, no momentum": _sketch(4, 4, **NO_MOMENTUM),
    "whole, matched": Way(MATCHED),
    "1 bit, 1 back, matched": _sketch(1, 1, **MATCHED),
    "1 bit, 2 back, matched": _sketch(1, 2, **MATCHED),
    "2 bits, 2 back, matched": _sketch(2, 2, **MATCHED),
}


# -- workers in lockstep --------------------------------------------------------------------------


class Lockstep:
    """AdaRankGrad on matrices of which each of several workers has a gradient of its own.

    Attributes:
        sent: bytes sent so far, the mean over the workers.
    """

    def __init__(self, matrices: Mapping[str, Tensor], workers: int, others: int) -> None:
        self._matrices, self._workers, self.sent = matrices, workers, 0.0
        self._stagger = max(1, (len(matrices) + others) // 2)
        self._states: dict[str, list[State]] = {
            name: [{} for _ in range(workers)] for name in matrices
        }
        self._tall = {
            name: basis_spans_columns(weight.shape[0], weight.shape[1], "auto", transposed=False)
            for name, weight in matrices.items()
        }

    @torch.no_grad()
    def step(self, gradients: Mapping[str, list[Tensor]], settings: AdaRankGradConfig) -> None:
        """One step of all matrices.

        Args:
            gradients: of each matrix, that of each worker.
            settings: the settings, with this step's learning rate.
        """
        for home, (name, weight) in enumerate(self._matrices.items()):
            terms = [g if self._tall[name] else g.T for g in gradients[name]]
            updates = self._updates(name, terms, home, settings)
            if updates[0] is None:
                continue
            direction, basis, _, outside = updates[0]
            change = direction @ basis.T
            if outside is not None:
                change += outside.view(change.shape)
            weight.add_(
                change if self._tall[name] else change.T, alpha=-settings.lr * settings.scale
            )

    def _updates(
        self, name: str, terms: list[Tensor], home: int, settings: AdaRankGradConfig
    ) -> list[Any]:
        count, states = self._workers, self._states[name]
        rows, columns = self._matrices[name].shape
        facts = StepFacts(
            name=name,
            norm_sq=sum(float(term.double().square().sum()) for term in terms) / count,
            kept_sq=sum(float(state.get("kept_sq", 0.0)) for state in states),
            phase=phase_of(name),
            stagger=self._stagger,
        )

        def steps(me: int) -> Steps[Any]:
            sharding = shard_matrix(
                rows,
                columns,
                ((0, rows * columns),) * count,
                me=me,
                spans_columns=self._tall[name],
                home=home,
                shard_basis=False,
                replicated=True,
                terms=True,
            )
            term, state = terms[me] / count, states[me]
            computation = step_of_terms(lambda: term, term.device, state, sharding, settings, facts)
            return self._counted(computation) if me == 0 else computation

        return run_lockstep([steps(me) for me in range(count)])

    def _counted(self, steps: Steps[Any]) -> Steps[Any]:
        """The same computation, whose requests are counted, for all workers."""
        answer: Any = None
        while True:
            try:
                request = steps.send(answer)
            except StopIteration as finished:
                return finished.value
            for each in exchanges_of(request):
                size = math.prod(each.part.shape[1:]) * each.part.element_size()
                self.sent += float(sent(Spans.of(each.have), Spans.of(each.want), size).mean())
            answer = yield request


# -- one run --------------------------------------------------------------------------------------


def train(
    way: Way, model: nn.Module, sequences: Sequences, options: argparse.Namespace
) -> tuple[float, float]:
    """Train; returns the held-out loss, and the matrices' traffic as a share of whole fp32's.

    Args:
        way: how.
        model: the model, freshly initialized.
        sequences: the data.
        options: of the command line.
    """
    matrices = low_rank_matrices(model)
    rest = {name: p for name, p in model.named_parameters() if name not in matrices}
    settings = parse_config({"lr": way.lr, **(way.settings or {})})
    adam = torch.optim.Adam(rest.values(), lr=options.rest_lr)
    lockstep = Lockstep(matrices, options.workers, len(rest)) if way.sends_sketches else None
    alone = None if lockstep else _whole(way, matrices)
    warmup = max(1, options.steps // 10)
    for step in range(1, options.steps + 1):
        share = warmup_cosine(step - 1, steps=options.steps, warmup=warmup, min_lr_ratio=0.1)
        gradients = _gradients(model, matrices, sequences, step, options)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), options.clip))
        if lockstep is not None:
            factor = min(1.0, options.clip / (norm + CLIP_EPS))
            for terms in gradients.values():
                for term in terms:
                    term.mul_(factor)
            lockstep.step(gradients, settings.model_copy(update={"lr": way.lr * share}))
        for optimizer, rate in ((adam, options.rest_lr), (alone, way.lr)):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = rate * share
                optimizer.step()
        model.zero_grad()
    elements = sum(weight.numel() for weight in matrices.values())
    whole = options.steps * 2 * (options.workers - 1) / options.workers * 4 * elements
    return _held_out(model, sequences), lockstep.sent / whole if lockstep else 1.0


def _whole(way: Way, matrices: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """The optimizer of the matrices where their gradients are averaged."""
    if way.settings is None:
        given: dict[str, Any] = {"lr": way.lr, "momentum": 0.9, "weight_decay": 0.0}
        return torch.optim.Muon(matrices.values(), adjust_lr_fn="match_rms_adamw", **given)
    named = {"params": list(matrices.items()), "low_rank": True}
    return arg_dist.AdaRankGrad([named], lr=way.lr, process_group=None, **way.settings)


def _gradients(
    model: nn.Module,
    matrices: Mapping[str, Tensor],
    sequences: Sequences,
    step: int,
    options: argparse.Namespace,
) -> dict[str, list[Tensor]]:
    """Each worker's gradients of the matrices; all parameters are left with the mean."""
    size = options.batch_size // options.workers
    found: dict[str, list[Tensor]] = {name: [] for name in matrices}
    for worker in range(options.workers):
        ids = sequences.batch(step, range(worker * size, (worker + 1) * size))
        for weight in matrices.values():
            weight.grad = None
        (model(input_ids=ids, labels=ids).loss / options.workers).backward()
        for name, weight in matrices.items():
            assert weight.grad is not None
            found[name].append(weight.grad)
    for name, weight in matrices.items():
        weight.grad = torch.stack(found[name]).sum(0)
        for own in found[name]:
            own.mul_(options.workers)
    return found


@torch.no_grad()
def _held_out(model: nn.Module, sequences: Sequences) -> float:
    model.eval()
    losses = []
    for first in range(0, EVALUATED, 8):
        ids = sequences.held_out_batch(range(first, first + 8), EVALUATED)
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return float(np.mean(losses))


# -- the command ----------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the runs")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME",
        help=f"of {'; '.join(WAYS)} (default: all)")  # fmt: skip
    add("--model", default="pico", help="as in train_lm.py (default: pico)")
    add("--data", nargs="+", default=[], help="as in train_lm.py")
    add("--workers", type=at_least(2), default=4, help="(default: 4)")
    add("--steps", type=at_least(1), default=400, help="(default: 400)")
    add("--batch-size", type=at_least(2), default=8, help="sequences of all workers (default: 8)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--lrs", nargs="+", type=float, default=[], metavar="RATE", help="rates of the matrices "
        "(default: one of each way)")  # fmt: skip
    add("--rest-lr", type=float, default=3.2e-2, help="rate of embeddings, head and norms "
        "(default: 3.2e-2)")  # fmt: skip
    add("--clip", type=float, default=1.0, help="maximum gradient norm (default: 1)")
    return parser.parse_args()


def main() -> None:
    """Run what has not been run, print the table and draw the picture."""
    options = parse_options()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path: Path = options.out / "runs.jsonl"
    tokenizer = load_tokenizer(None)
    corpus = read_corpus(options.data)
    sequences = Sequences.of(corpus, tokenizer, length=SEQUENCE, seed=0)
    for seed, name in product(options.seeds, options.ways):
        for lr in options.lrs or [WAYS[name].lr]:
            way = replace(WAYS[name], lr=lr)
            about = {"way": name, "seed": seed, "lr": lr} | {
                key: getattr(options, key)
                for key in ("model", "workers", "steps", "batch_size", "rest_lr", "data")
            }
            if any(about.items() <= run.items() for run in read_runs(path)):
                continue
            config = model_config(options.model, vocab_size=tokenizer.vocab_size, length=SEQUENCE)
            model = build_model(options.model, config, seed=seed, deepspeed_config={})
            loss, traffic = train(way, model, replace(sequences, seed=seed), options)
            with path.open("a") as file:
                file.write(json.dumps({**about, "loss": loss, "traffic": traffic}) + "\n")
            print(f"{name}, {lr:g}, seed {seed}: {loss:.4f}, {100 * traffic:.1f} %", flush=True)
    report(read_runs(path), options.out / "frontier.png")


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """Print medians over the seeds, and draw loss over bytes."""
    from matplotlib import rc_context

    table = Table("gradients", "workers", "rate", "traffic", "losses", "median")
    points = []

    def kind(run: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(run[key] for key in ("way", "workers", "lr", "model", "steps"))

    for key in dict.fromkeys(map(kind, runs)):
        mine = [run for run in runs if kind(run) == key]
        losses = [run["loss"] for run in sorted(mine, key=lambda run: run["seed"])]
        traffic = 100 * median(run["traffic"] for run in mine)
        words = ", ".join(f"{loss:.3f}" for loss in losses)
        way, *about = map(str, key)
        table.add_row(way, *about[:2], f"{traffic:.1f} %", words, f"{median(losses):.3f}")
        points.append((traffic, median(losses), f"{way} ({', '.join(about)})"))
    Console().print(table)
    with rc_context(STYLE):
        figure = new_figure(8, 5)
        axes = figure.subplots()
        for traffic, loss, name in points:
            axes.plot(traffic, loss, "o", color="#c9c9c9" if "muon" in name else "#1f5fa8")
            axes.annotate(name, (traffic, loss), xytext=(5, 3), textcoords="offset points", size=7)
        axes.set(xscale="log", xlabel="traffic of the matrices, % of whole gradients in fp32")
        axes.set(ylabel="held-out loss")
        figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
