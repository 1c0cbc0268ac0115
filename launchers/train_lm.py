"""Pre-trains a language model with AdaRankGrad, or with AdamW for comparison.

deepspeed --num_gpus 2 launchers/train_lm.py --deepspeed_config ds_configs/zero2.json
accelerate launch --config_file launchers/accelerate/fsdp2.yaml launchers/train_lm.py
torchrun --nproc_per_node 2 launchers/train_lm.py

Without --deepspeed_config the launcher says what shards the model: accelerate's configuration, or
DDP under torchrun. The same commands run on CPUs (gloo) and on GPUs (NCCL). They leave
metrics.jsonl, report.json and report.png in --out, also when stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from arg_dist.lm import InputError
from arg_dist.lm.accelerate_engine import AccelerateSetup
from arg_dist.lm.command_line import (
    BAD_INPUT,
    FAILED,
    OneLineParser,
    at_least,
    complain,
    not_negative,
    share,
)
from arg_dist.lm.corpus import read_corpus
from arg_dist.lm.deepspeed_engine import DeepSpeedSetup
from arg_dist.lm.environment import prepare_environment, quiet_libraries
from arg_dist.lm.interrupts import StopRequest, exit_code
from arg_dist.lm.job_config import (
    OPTIMIZERS,
    choose_optimizer,
    parse_overrides,
    set_batch,
    set_optimizer,
)
from arg_dist.lm.presets import build_model, count_parameters, model_config
from arg_dist.lm.processes import (
    from_first_process,
    is_first_process,
    mean_and_stop,
)
from arg_dist.lm.progress import TrainingProgress
from arg_dist.lm.schedule import warmup_cosine_scheduler
from arg_dist.lm.tokens import Sequences, load_tokenizer
from arg_dist.lm.training import Engine, leave_processes
from arg_dist.report import RunFacts, RunRecord, run_facts, sample_optimizer


def parse_options() -> argparse.Namespace:
    """The command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--deepspeed_config", metavar="JSON", help="train under DeepSpeed, as this file says "
        "(default: as the launcher says)")  # fmt: skip
    add("--model", default="nano", help="nano|60m|130m|350m|1b|7b, a config.json or a checkpoint")
    add("--data", nargs="+", default=[], metavar="PATH", help="text files, directories, globs, "
        ".jsonl, a saved data set (default: the Python source installed here)")  # fmt: skip
    add("--text-key", default="text", help="the text's key in .jsonl and data sets")
    add("--data-bytes", type=at_least(1), help="read at most this much text (default without "
        "--data: 32 MiB)")  # fmt: skip
    add("--tokenizer", metavar="DIR", help="a Hugging Face tokenizer (default: bytes)")
    add("--optimizer", choices=OPTIMIZERS, help="default: the JSON's, or adarankgrad")
    add("--lr", type=float, help="peak learning rate (default: the JSON's, or 1e-3)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="an optimizer setting, e.g. --set energy=0.8; may be repeated")  # fmt: skip
    add("--batch-size", type=at_least(1), help="sequences per step over all processes "
        "(default: the JSON's train_batch_size; without one 16)")  # fmt: skip
    add("--accumulation", type=at_least(1), help="portions in which a process takes its sequences "
        "of a step (default: the JSON's, or 1)")  # fmt: skip
    add("--clip", type=not_negative, help="largest norm of the gradient, 0 for no limit (default: "
        "the JSON's gradient_clipping, or 1)")  # fmt: skip
    add("--seq-len", type=at_least(2), default=128, help="tokens per sequence")
    add("--steps", type=at_least(1), default=300, help="optimizer steps")
    add("--warmup", type=at_least(0), default=20, help="steps until the peak learning rate")
    add("--min-lr-ratio", type=share, default=0.1, help="the cosine's end, as a share of the peak")
    add("--seed", type=at_least(0), default=0)
    add("--eval-every", type=at_least(1), default=50, metavar="STEPS")
    add("--eval-batches", type=at_least(1), default=4, help="global batches per evaluation")
    add("--log-ranks-every", type=at_least(1), default=10, metavar="STEPS")
    add("--out", type=Path, help="the run's directory (default: runs/MODEL-OPTIMIZER)")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


@dataclass(frozen=True)
class Job:
    """All that training needs."""

    engine: Engine
    sequences: Sequences
    facts: RunFacts
    out: Path


def build(options: argparse.Namespace, stop: StopRequest) -> Job:
    """Joins the processes, reads the data, builds model and engine."""
    path = options.deepspeed_config
    setup = AccelerateSetup() if path is None else DeepSpeedSetup(path)
    with stop.at_once():
        setup.connect()
    config = setup.read_config()
    optimizer = choose_optimizer(config, options.optimizer)
    settings = set_optimizer(config, optimizer, parse_overrides(options.overrides), options.lr)
    if options.accumulation is not None:
        config["gradient_accumulation_steps"] = options.accumulation
    if options.clip is not None:
        config["gradient_clipping"] = options.clip
    batch = set_batch(config, options.batch_size, dist.get_world_size())
    setup.check(config)
    out = options.out or Path("runs") / f"{Path(options.model).name}-{optimizer}"

    def read_sequences() -> Sequences:
        make_directory(out)
        tokenizer = load_tokenizer(options.tokenizer)
        corpus = read_corpus(options.data, text_key=options.text_key, max_bytes=options.data_bytes)
        return Sequences.of(corpus, tokenizer, length=options.seq_len, seed=options.seed)

    sequences = from_first_process(read_sequences)
    shape = model_config(options.model, vocab_size=sequences.vocab_size, length=options.seq_len)
    model = build_model(options.model, shape, seed=options.seed, deepspeed_config=config)
    schedule = warmup_cosine_scheduler(
        steps=options.steps, warmup=options.warmup, min_lr_ratio=options.min_lr_ratio
    )
    engine = setup.build(model, config, batch, schedule)
    facts = run_facts(
        engine=engine.name,
        world_size=dist.get_world_size(),
        model=Path(options.model).name,
        model_parameters=count_parameters(model),
        optimizer=config["optimizer"]["type"],
        optimizer_settings=settings,
        data=sequences.source,
        batch_size=batch.total,
        micro_batch_size=batch.micro,
        accumulation_steps=batch.accumulation,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    return Job(engine, sequences, facts, out)


def make_directory(path: Path) -> None:
    """Makes sure that the run can leave its files, before it has spent any time."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None


def train(job: Job, options: argparse.Namespace, stop: StopRequest) -> int:
    """Trains until the last step or a signal, leaves the report, returns the exit code."""
    engine = job.engine
    tokens_per_step = engine.batch.total * options.seq_len
    first, stop_signal = is_first_process(), None
    with (
        RunRecord(job.out, job.facts, planned_steps=options.steps, active=first) as record,
        TrainingProgress(options.steps, shown=first) as progress,
    ):
        for step in range(1, options.steps + 1):
            began, lr = time.perf_counter(), engine.learning_rate
            own_loss = engine.train_step(job.sequences, step)
            loss, stop_signal = mean_and_stop(own_loss, stop.signal, engine.device)
            seconds = time.perf_counter() - began
            line = {"step": step, "loss": loss, "lr": lr, "seconds": seconds}
            line["tokens"] = step * tokens_per_step
            last = step == options.steps or stop_signal is not None
            sample = None
            if last or step == 1 or step % options.log_ranks_every == 0:
                sample = sample_optimizer(engine.optimizer)
            if step == options.steps or (step % options.eval_every == 0 and not last):
                line["held_out_loss"] = engine.held_out_loss(job.sequences, options.eval_batches)
            record.step(line, sample)
            progress.show(line, record.mean_rank)
            if not math.isfinite(loss):  # DeepSpeed would skip every further step, to the end
                raise FloatingPointError(f"the loss of step {step} is {loss}; lower --lr")
            if last:
                break
    interrupted_by = stop_signal if step < options.steps else None
    record.finish("interrupted" if interrupted_by else "finished")
    # The launcher ends all processes once one of them has ended with a signal's exit code.
    dist.barrier()
    return exit_code(interrupted_by) if interrupted_by else 0


def main() -> int:
    """The job, with what is wrong told in one line."""
    options = parse_options()
    stop = StopRequest()
    try:
        prepare_environment()
        quiet_libraries()
        return train(build(options, stop), options, stop)
    except (InputError, FloatingPointError) as error:  # the loss's, or the optimizer's
        complain(str(error))
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    finally:
        leave_processes()


if __name__ == "__main__":
    sys.exit(main())
