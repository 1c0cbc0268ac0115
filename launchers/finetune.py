"""Fine-tunes all parameters of a local pretrained checkpoint with transformers' Trainer.

python launchers/finetune.py --model DIR --task classification --train a.csv --eval b.csv

The same command runs under torchrun (DDP), accelerate launch, and with --deepspeed JSON under the
deepspeed launcher. It saves the model and its tokenizer in OUT/model, and writes metrics.jsonl,
report.json and report.png to OUT, also when stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

import arg_dist
from arg_dist.cli.parsing import (
    BAD_INPUT,
    FAILED,
    InputError,
    OneLineParser,
    at_least,
    complain,
    not_negative,
    parse_overrides,
    share,
)
from arg_dist.config import current_names
from arg_dist.integrations.accelerate import asks_for
from launchers.finetuning.arguments import (
    PRECISIONS,
    clipping,
    divide_batch,
    last_checkpoint,
    quiet_trainer,
    reporting,
    schedule_of,
    training_arguments,
)
from launchers.finetuning.job import OptimizerChoice, build_trainer, facts_of, run_job
from launchers.finetuning.rows import Columns
from launchers.finetuning.tasks import Task, causal_language_model, text_classification
from launchers.pretraining.environment import prepare_environment
from launchers.pretraining.interrupts import StopRequest, exit_code
from launchers.pretraining.job_config import (
    OPTIMIZERS,
    choose_optimizer,
    read_deepspeed_config,
    set_optimizer,
)
from launchers.pretraining.training import leave_processes

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
TASKS = ("classification", "causal-lm")


def parse_options() -> argparse.Namespace:
    """Parses the command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint with tokenizer")
    add("--task", choices=TASKS, required=True)
    add("--train", nargs="+", required=True, metavar="FILE", help="classification: .csv, .tsv or "
        ".jsonl; causal-lm: text files, directories, globs, .jsonl")  # fmt: skip
    add("--eval", nargs="+", default=[], metavar="FILE", help="held-out data (causal-lm: default "
        "3 %% of the training text)")  # fmt: skip
    add("--text-key", default="text", metavar="COLUMN", help="column of the text: header name, "
        "jsonl key, or number, from 1, in files without a header (default: text)")  # fmt: skip
    add("--pair-key", metavar="COLUMN", help="column of the second text, for pairs")
    add("--label-key", default="label", metavar="COLUMN", help="column of the label (default: "
        "label)")  # fmt: skip
    add("--max-length", type=at_least(2), default=128, metavar="TOKENS", help="longer texts are "
        "truncated; causal-lm: the block length (default: 128)")  # fmt: skip
    add(
        "--epochs",
        type=not_negative,
        default=3.0,
        help="passes over the training data (default: 3)",
    )
    add("--steps", type=at_least(1), help="optimizer steps, instead of --epochs")
    add("--batch-size", type=at_least(1), help="examples per step over all processes (default: 32, "
        "or the JSON's)")  # fmt: skip
    add("--micro-batch", type=at_least(1), help="examples per forward pass of a process; the rest "
        "of its share is accumulated (default: all)")  # fmt: skip
    add("--group-by-length", action="store_true", help="batch texts of similar length together")
    add("--optimizer", choices=OPTIMIZERS, help="default: the JSON's, or adarankgrad")
    add("--lr", type=float, help="peak learning rate (default: the JSON's, or 1e-3)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an optimizer setting, e.g. --set max_rank=48; repeatable")  # fmt: skip
    add("--weight-decay", type=float, help="never applied to norms and biases (default: 0)")
    add("--schedule", choices=SCHEDULES, default="linear", help="learning-rate schedule (default: "
        "linear)")  # fmt: skip
    add("--warmup-ratio", type=share, default=0.06, help="share of the steps until the peak "
        "learning rate (default: 0.06)")  # fmt: skip
    add("--clip", type=not_negative, help="maximum gradient norm (default: 1, or the JSON's)")
    add("--precision", choices=PRECISIONS, help="of the forward and backward pass; weights stay "
        "in fp32 (default: accelerate's, or the JSON's, or fp32)")  # fmt: skip
    add("--seed", type=at_least(0), default=0)
    add("--deepspeed", metavar="JSON", help="DeepSpeed configuration")
    add("--eval-every", type=at_least(1), metavar="STEPS", help="default: each epoch")
    add("--log-ranks-every", type=at_least(1), default=10, metavar="STEPS")
    add("--save-every", type=at_least(1), metavar="STEPS", help="save checkpoints in "
        "OUT/checkpoints; the last two are kept (default: none)")  # fmt: skip
    add("--resume", action="store_true", help="resume from the last checkpoint in OUT")
    add("--report-to", default="none", metavar="WHERE", help="where the Trainer reports "
        "in addition, ranks included, e.g. tensorboard")  # fmt: skip
    add("--out", type=Path, help="the run's directory (default: runs/MODEL-TASK-OPTIMIZER)")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args()
    if options.task == "classification" and not options.eval:
        parser.error("--eval: classification needs held-out files")
    if options.epochs == 0:
        parser.error("--epochs: a number above 0 is needed, got 0")
    if options.warmup_ratio == 1:
        parser.error("--warmup-ratio: a number below 1 is needed, or the learning rate only rises")
    return options


def read_task(options: argparse.Namespace) -> Task:
    """Reads checkpoint and data; errors are reported in one line."""
    given: dict[str, Any] = {"training": options.train, "held_out": options.eval}
    given["max_length"] = options.max_length
    if options.task == "causal-lm":
        return causal_language_model(options.model, text_key=options.text_key, **given)
    columns = Columns(options.text_key, options.label_key, options.pair_key)
    return text_classification(options.model, columns=columns, **given)


def choose(options: argparse.Namespace, config: dict[str, Any]) -> OptimizerChoice:
    """The optimizer: the JSON's, completed by the command line.

    Its section is removed from the JSON, because the Trainer builds the optimizer itself.
    """
    name = choose_optimizer(config, options.optimizer)
    overrides = current_names(parse_overrides(options.overrides), "--set")
    if options.weight_decay is not None:
        overrides["weight_decay"] = options.weight_decay
    settings = set_optimizer(config, name, overrides, options.lr)
    return OptimizerChoice(name, config.pop("optimizer")["params"], settings)


def train(options: argparse.Namespace, stop: StopRequest) -> int | None:
    """Validates everything that can be validated, then builds and runs the job."""
    config = read_deepspeed_config(options.deepspeed) if options.deepspeed else {}
    optimizer = choose(options, config)
    out = options.out or Path("runs") / (
        f"{Path(options.model).resolve().name}-{options.task}-{optimizer.name}"
    )
    checkpoint = last_checkpoint(out / "checkpoints", resume=options.resume)
    settings = {
        **optimizer.trainer_arguments(),
        **divide_batch(config, options.batch_size, options.micro_batch),
        **clipping(config, options.clip),
        **schedule_of(options.steps, options.epochs, options.eval_every, options.save_every),
        **reporting(options.report_to),
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup_ratio,
        "train_sampling_strategy": "group_by_length" if options.group_by_length else "random",
        "precision": options.precision,
        "seed": options.seed,
    }
    with stop.at_once():
        task = read_task(options)
        args = training_arguments(out, config if options.deepspeed else None, **settings)
        trainer = build_trainer(task, args, optimizer)
    facts = facts_of(trainer, task, optimizer, options.model)
    every = options.log_ranks_every
    return run_job(trainer, facts, stop, out=out, checkpoint=checkpoint, sample_every=every)


def main() -> int:
    """Runs the job; errors are reported in one line."""
    options = parse_options()
    stop = StopRequest()
    if options.deepspeed is None and asks_for("DEEPSPEED"):
        # one path for both launchers, which also supports an optimizer in the file
        options.deepspeed = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    with_deepspeed = options.deepspeed is not None or asks_for("DEEPSPEED")
    try:
        prepare_environment(world_of_one=with_deepspeed)
        quiet_trainer(with_deepspeed=with_deepspeed)
        stopped_by = train(options, stop)
        return exit_code(stopped_by) if stopped_by else 0
    except (InputError, arg_dist.ConfigError) as error:
        complain(str(error))
        return BAD_INPUT
    except FloatingPointError as error:  # the loss's, or the optimizer's; all processes agree
        complain(str(error))
        return FAILED
    finally:
        leave_processes()


if __name__ == "__main__":
    sys.exit(main())
