r"""Do ranks of gradients fall? Of the mean over many batches, beside that of one batch, per matrix.

    python -m benchmarks.rank_decay pretrain --out runs/ranks --model nano --steps 1500 \
        --methods adamw=1e-3,3.2e-2 recommended=1.6e-2,6.4e-2
    python -m benchmarks.rank_decay finetune --out runs/ranks --model DIR --train FILE \
        --eval FILE --methods adamw=1e-4
    python -m benchmarks.rank_decay reversible --out runs/ranks
    python -m benchmarks.rank_decay report runs/ranks

The mean over ``--batches`` batches stands for the gradient of the full batch, which one batch hides
behind its noise. ``reversible`` is the setting of the paper's proof (arXiv 2410.17881, section 3):
a chain of matrices and leaky rectifiers, all examples in each step, plain gradient descent. Writes
a file for each run into OUT, and OUT/ranks.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from arg_dist.cli.parsing import InputError, OneLineParser, at_least, complain
from benchmarks.compare import finetuning_setup, pretraining_setup
from benchmarks.compare.cli import method_rates
from benchmarks.compare.methods import PUBLISHED, PUBLISHED_FINETUNING, Method, choose
from benchmarks.compare.optimizers import low_rank_matrices
from benchmarks.compare.pretraining import PretrainingJob, pretrain, read_sequences
from benchmarks.compare.records import Records
from launchers.reporting.charts import STYLE, new_figure
from launchers.reporting.files import write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCHES = (1, 8)
"""Numbers of batches whose mean is measured, beside that of all."""
ENERGY = 0.9
"""Share of the energy for which directions are counted."""

ROUNDING = 1e-25
"""Share of the first loss below which rounding in fp64 decides about ranks."""

Loss = Callable[[], Tensor]
Gradients = dict[str, Tensor]


# -- ranks of a matrix ----------------------------------------------------------------------------


class Ranks(NamedTuple):
    """Effective ranks of a matrix with the singular values ``s``; ``p = s^2 / sum(s^2)``.

    Attributes:
        entropy: ``exp(-sum(p log p))``.
        stable: ``sum(s^2) / max(s^2)``, to which the paper's proof applies.
        directions: how many keep :data:`ENERGY` of ``sum(s^2)``, as the setting `energy` counts.
    """

    entropy: float
    stable: float
    directions: int


def ranks_of(matrix: Tensor) -> Ranks:
    """The effective ranks of `matrix`, of shape (m, n); all 0 if it is zero."""
    energies = torch.linalg.svdvals(matrix.double()).square()  # (min(m, n),)
    if not energies.sum():
        return Ranks(0.0, 0.0, 0)
    shares = energies / energies.sum()
    entropy = torch.special.entr(shares).sum().exp()
    kept = shares.cumsum(0)
    return Ranks(float(entropy), float(1 / shares[0]), int((kept < ENERGY).sum()) + 1)


def signal_share(one: Tensor, other: Tensor, energy: float) -> float:
    """Share of a batch's energy that is the full batch's, from means over two halves of batches.

    ``<E g, E g> / E <g, g>``: the product of independent means is right on average.

    Args:
        one: mean gradient over one half, of shape (m, n).
        other: that over the other half.
        energy: mean squared norm of the gradients of single batches.
    """
    return float((one.double() * other.double()).sum()) / energy if energy else 0.0


def look(matrices: Mapping[str, Tensor], losses: Iterable[Loss]) -> dict[str, dict[str, Any]]:
    """Ranks of the mean gradients of each matrix over 1, 8 and all batches, and the signal's share.

    Args:
        matrices: the trained matrices by name.
        losses: for each batch, what computes its loss.
    """
    halves: list[Gradients] = [{}, {}]
    energies = dict.fromkeys(matrices, 0.0)
    found: dict[str, dict[str, Any]] = {name: {"batches": {}} for name in matrices}
    count = 0
    for count, loss in enumerate(losses, start=1):
        gradients = torch.autograd.grad(loss(), list(matrices.values()))
        for name, gradient in zip(matrices, gradients, strict=True):
            half = halves[count % 2]
            half[name] = half[name] + gradient if name in half else gradient.clone()
            energies[name] += float(gradient.double().square().sum())
        if count in BATCHES:
            for name in matrices:
                found[name]["batches"][count] = ranks_of(_sum(halves, name))
    for name in matrices:
        found[name]["batches"][count] = ranks_of(_sum(halves, name))
        if halves[0]:
            one, other = halves[1][name] / -(-count // 2), halves[0][name] / (count // 2)
            found[name]["signal"] = signal_share(one, other, energies[name] / count)
    return found


def _loss(model: nn.Module, **inputs: Tensor) -> Tensor:
    loss: Tensor = model(**inputs).loss
    return loss


def _sum(halves: Sequence[Gradients], name: str) -> Tensor:
    return sum((half[name] for half in halves if name in half), torch.zeros(()))


# -- the runs -------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """A method and its learning rates: of the matrices, and of all other parameters."""

    method: Method
    lr: float
    rest_lr: float


def pretraining(options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Trains with each method; yields its name and what was seen at each evaluation."""
    task = pretraining_setup.prepare_pretraining(options, Records(options.out))
    job, tokens = PretrainingJob(**task.job), Path(task.data)
    sequences = read_sequences(tokens, job.seq_len, job.vocab_size, seed=options.seed + 1)

    def losses(model: nn.Module) -> Iterator[Loss]:
        for batch in range(options.batches):
            ids = sequences.batch(batch + 1, range(job.batch_size)).to(job.device)
            yield partial(_loss, model, input_ids=ids, labels=ids)

    for method, lr, rest_lr in _chosen(options, PUBLISHED):
        seen: list[dict[str, Any]] = []

        def watch(step: int, model: nn.Module, seen: list[dict[str, Any]] = seen) -> None:
            seen.append({"step": step, "matrices": look(low_rank_matrices(model), losses(model))})

        pretrain(
            job, method, lr=lr, rest_lr=rest_lr, seed=options.seed, tokens=tokens, show=print,
            watch=watch,
        )  # fmt: skip
        yield method.name, seen


def finetuning(options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Fine-tunes with each method; yields its name and what was seen at a dozen steps."""
    from transformers import TrainerCallback  # slow to import

    from benchmarks.compare.finetuning import finetune

    task = finetuning_setup.prepare_finetuning(options, Records(options.out))
    job = finetuning_setup.FinetuningJob(**task.job)

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def __init__(self) -> None:
            self.seen: list[dict[str, Any]] = []

        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
        ) -> None:
            every = max(1, state.max_steps // options.points)
            if state.global_step % every == 0 or state.global_step == state.max_steps - 1:
                found = look(low_rank_matrices(model), _of_examples(model, given, options, job))
                self.seen.append({"step": state.global_step, "matrices": found})
                print(f"step {state.global_step}: seen", flush=True)

    for method, lr, rest_lr in _chosen(options, PUBLISHED_FINETUNING):
        watch = Watch()
        finetune(
            job, method, lr=lr, rest_lr=rest_lr, seed=options.seed, show=print, callbacks=[watch]
        )
        yield method.name, watch.seen


def _of_examples(
    model: nn.Module,
    given: Mapping[str, Any],
    options: argparse.Namespace,
    job: finetuning_setup.FinetuningJob,
) -> Iterator[Loss]:
    """The loss of each batch of training examples, without dropout, the same at every step."""
    loader, size = given["train_dataloader"], job.batch_size
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(1))
    model.eval()
    for batch in order.split(size)[: options.batches]:
        if len(batch) == size:
            inputs = loader.collate_fn([loader.dataset[int(i)] for i in batch])
            yield partial(_loss, model, **inputs)
    model.train()


def reversible(options: argparse.Namespace) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Gradient descent on reversible networks in fp64; yields each name and what was seen."""
    chain = options.depth
    for name, depth, decay, batch in (
        ("one matrix", 1, 0.0, None),
        (f"{chain} matrices", chain, 0.0, None),
        (f"{chain} matrices, weight decay", chain, options.decay, None),
        (f"{chain} matrices, batches of {options.batch}", chain, 0.0, options.batch),
    ):
        yield name, _descend(options, depth, decay, batch)


def _descend(
    options: argparse.Namespace, depth: int, decay: float, batch: int | None
) -> list[dict[str, Any]]:
    """Trains on the outputs of another such network; the loss is the mean squared error.

    The inputs' covariance has the eigenvalues ``1, 2^-a, 3^-a, ...``, as activations have.
    """
    random = torch.Generator().manual_seed(options.seed)
    teacher = _chain(options.width, depth, random, 1.0)
    net = _chain(options.width, depth, random, options.size_of_weights)
    inputs = torch.randn(options.examples, options.width, generator=random, dtype=torch.float64)
    inputs *= torch.arange(1, options.width + 1) ** (-options.spectrum / 2)
    with torch.no_grad():
        outputs = teacher(inputs)
    matrices = dict(net.named_parameters())

    def loss(some: Tensor | slice) -> Tensor:
        error: Tensor = (net(inputs[some]) - outputs[some]).square().sum(1).mean()
        return error

    moments = {0, *(int(options.steps ** (i / options.points)) for i in range(options.points + 1))}
    seen: list[dict[str, Any]] = []
    for step in range(options.steps + 1):
        if step in moments:
            whole, found = loss(slice(None)).item(), look(matrices, [lambda: loss(slice(None))])
            if seen and whole < ROUNDING * seen[0]["loss"]:
                break
            seen.append({"step": step, "loss": whole, "matrices": found})
        some: Any = slice(None)
        if batch:
            some = torch.randint(options.examples, (batch,), generator=random)
        gradients = torch.autograd.grad(loss(some), list(matrices.values()))
        with torch.no_grad():
            for parameter, gradient in zip(matrices.values(), gradients, strict=True):
                parameter.sub_(options.lr * (gradient + decay * parameter))
    return seen


def _chain(width: int, depth: int, random: torch.Generator, size: float) -> nn.Sequential:
    """Square matrices and leaky rectifiers, without biases: reversible (paper, section 3)."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(width, width, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.normal_(std=size * width**-0.5, generator=random)
        layers += [nn.LeakyReLU(0.5), layer] if layers else [layer]
    return nn.Sequential(*layers)


def _chosen(options: argparse.Namespace, published: Mapping[str, dict[str, Any]]) -> list[Chosen]:
    """The methods with their rates, as NAME=RATE or NAME=RATE,RATE.

    Raises:
        InputError: one is written otherwise, or unknown.
    """
    found = []
    for text in options.methods:
        try:
            name, (lr, *rest) = method_rates(text)
            (rest_lr,) = rest or [lr]
        except (argparse.ArgumentTypeError, ValueError):
            raise InputError(
                f"--methods {text}: expected NAME=RATE, or NAME=RATE,RATE with that of embeddings, "
                "head and norms"
            ) from None
        (method,) = choose([name], peer_rank=0.125, published=published)
        found.append(Chosen(method, lr, rest_lr))
    return found


# -- what was seen --------------------------------------------------------------------------------


def write(out: Path, kind: str, name: str, seen: Sequence[Mapping[str, Any]]) -> None:
    """Writes what a run has seen into the directory."""
    write_json(out / f"{kind}-{name.replace(' ', '-').replace(',', '')}.ranks.json", {
        "kind": kind, "name": name, "command": sys.argv[1:],
        "seen": [
            {**each, "matrices": {
                matrix: {**found, "batches": {
                    count: ranks._asdict() for count, ranks in found["batches"].items()
                }}
                for matrix, found in each["matrices"].items()
            }}
            for each in seen
        ],
    })  # fmt: skip


def medians(point: Mapping[str, Any]) -> dict[str, Any]:
    """Of what was seen at one step, medians over the matrices; those of the ranks by batches."""
    matrices = list(point["matrices"].values())
    counts = list(matrices[0]["batches"])
    found: dict[str, Any] = {
        count: {
            key: median(matrix["batches"][count][key] for matrix in matrices)
            for key in Ranks._fields
        }
        for count in counts
    }
    if "signal" in matrices[0]:
        found["signal"] = median(matrix["signal"] for matrix in matrices)
    return found


def report(out: Path) -> None:
    """Prints a table of the runs in a directory and draws ``ranks.png``.

    Raises:
        InputError: it contains none.
    """
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*.ranks.json"))]
    if not runs:
        raise InputError(f"{out}: contains no *.ranks.json; run pretrain, finetune or reversible")
    for run in runs:
        print(f"\n{run['kind']}, {run['name']}; medians over the matrices: entropy, stable rank, "
              f"directions for {ENERGY:.0%}")  # fmt: skip
        first = medians(run["seen"][0])
        counts = [count for count in first if count != "signal"]
        heads = [_label(run, count) for count in counts]
        has_loss = "loss" in run["seen"][0]
        heads += ["loss"] if has_loss else ["signal"]
        print(f"| step | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
        for point in run["seen"]:
            found = medians(point)
            cells = [
                "{entropy:.1f}, {stable:.1f}, {directions:.0f}".format(**found[count])
                for count in counts
            ]
            cells.append(f"{point['loss']:.2e}" if has_loss else f"{found['signal']:.1%}")
            print(f"| {point['step']} | {' | '.join(cells)} |")
    _draw(out, runs)


def _label(run: Mapping[str, Any], count: str) -> str:
    if run["kind"] == "reversible":
        return "full batch"
    return "one batch" if count == "1" else f"mean of {count}"


def _draw(out: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = new_figure(4.4 * len(Ranks._fields), 2.6 * len(runs))
        every = figure.subplots(len(runs), len(Ranks._fields), squeeze=False)
        for run, panels in zip(runs, every, strict=True):
            for panel, key in zip(panels, Ranks._fields, strict=True):
                _draw_run(panel, run, key)
        every[0][0].legend()
        figure.savefig(out / "ranks.png", dpi=110)


def _draw_run(panel: Axes, run: Mapping[str, Any], key: str) -> None:
    """One kind of rank over the steps: median over the matrices, and their middle half."""
    steps = [point["step"] for point in run["seen"]]
    matrices = [list(point["matrices"].values()) for point in run["seen"]]
    counts = list(matrices[0][0]["batches"])
    for color, count in zip(("#c9c9c9", "#9db8d6", "#1f5fa8")[-len(counts) :], counts, strict=True):
        values = [sorted(m["batches"][count][key] for m in point) for point in matrices]
        middle = [median(each) for each in values]
        panel.plot(steps, middle, color=color, label=_label(run, count))
        low, high = ([each[i * len(each) // 4] for each in values] for i in (1, 3))
        panel.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
    if run["kind"] == "reversible":
        panel.set_xscale("symlog")
    name = {"directions": f"directions for {ENERGY:.0%}"}.get(key, f"{key} rank")
    panel.set_title(f"{run['kind']}, {run['name']}: {name}", fontsize=9)
    panel.set_xlabel("step")
    panel.set_ylim(bottom=0)


# -- the command line -----------------------------------------------------------------------------

KINDS = {"pretrain": pretraining, "finetune": finetuning, "reversible": reversible}
TRAINED = {
    "pretrain": (
        pretraining_setup.TASK_OPTIONS,
        ["adamw=1e-3,3.2e-2", "recommended=1.6e-2,6.4e-2"],
    ),
    "finetune": (finetuning_setup.TASK_OPTIONS, ["adamw=1e-4"]),
}


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    whole = OneLineParser(
        prog="python -m benchmarks.rank_decay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for kind, (flags, methods) in TRAINED.items():
        sub = commands.add_parser(kind, help=f"ranks while a model is trained: {kind}")
        for flag, settings in flags:
            sub.add_argument(flag, **settings)
        add = sub.add_argument
        add("--methods", nargs="+", default=methods, metavar="NAME=RATE[,RATE]", help="what "
            "trains, with the learning rates of the matrices and of all else (default: "
            f"{' '.join(methods)})")  # fmt: skip
        add("--batches", type=at_least(2), default=64, help="whose mean is the full batch's "
            "gradient (default: 64)")  # fmt: skip
        add("--points", type=at_least(1), default=12, help="of fine-tuning at which gradients are "
            "seen; of pre-training --eval-every (default: 12)")  # fmt: skip
        add("--seed", type=at_least(0), default=0)
        add("--out", type=Path, required=True)
    add = commands.add_parser("reversible", help="the setting of the paper's proof").add_argument
    for flag, kind_of, default, words in (
        ("--width", at_least(2), 16, "rows and columns of each matrix"),
        ("--depth", at_least(2), 3, "matrices of the chain"),
        ("--spectrum", float, 1.0, "exponent of the inputs' eigenvalues"),
        ("--examples", at_least(1), 512, "in the full batch"),
        ("--batch", at_least(1), 32, "examples of a step that does not take all"),
        ("--steps", at_least(1), 100_000, "of gradient descent"),
        ("--points", at_least(1), 40, "at which gradients are seen"),
        ("--lr", float, 0.1, "learning rate"),
        ("--size-of-weights", float, 0.3, "first weights, as a share of the teacher's"),
        ("--decay", float, 1e-3, "weight decay, where there is one"),
        ("--seed", at_least(0), 0, "of weights and examples"),
    ):
        add(flag, type=kind_of, default=default, help=f"{words} (default: {default})")
    add("--out", type=Path, required=True)
    add = commands.add_parser("report", help="table and picture again").add_argument
    add("out", type=Path, metavar="DIR")
    return whole


def main(words: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = parser().parse_args(words)
    torch.set_num_threads(1)
    try:
        if options.command == "report":
            report(options.out)
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        for name, seen in KINDS[options.command](options):
            write(options.out, options.command, name, seen)
        report(options.out)
    except InputError as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
