"""Pre-trains a language model with AdaRankGrad, or with AdamW for comparison.

deepspeed --num_gpus 2 launchers/train_lm.py --deepspeed_config ds_configs/zero2.json
accelerate launch --config_file launchers/accelerate/fsdp2.yaml launchers/train_lm.py
torchrun --nproc_per_node 2 launchers/train_lm.py

Without --deepspeed_config the launcher selects the engine: that of accelerate's configuration, or
DDP under torchrun. The same commands run on CPUs (gloo) and on GPUs (NCCL). They write
metrics.jsonl, report.json and report.png to --out, also when stopped by Ctrl-C or SIGTERM.

With --save-every they also save checkpoints there, when stopped and at the end; the same command
with --resume auto continues from the newest, under any launcher and on any number of processes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from arg_dist.checkpoint import CheckpointError
from arg_dist.cli.parsing import (
    BAD_INPUT,
    FAILED,
    InputError,
    complain,
    is_first_process,
    parse_overrides,
)
from arg_dist.config import ConfigError, current_names
from arg_dist.planning.llama import model_config
from launchers.pretraining.accelerate_engine import AccelerateSetup
from launchers.pretraining.corpus import read_corpus
from launchers.pretraining.deepspeed_engine import DeepSpeedSetup
from launchers.pretraining.environment import prepare_environment, quiet_libraries
from launchers.pretraining.identity import model_values, text_digest, token_digest
from launchers.pretraining.interrupts import StopRequest, exit_code
from launchers.pretraining.job_config import choose_optimizer, set_batch, set_optimizer
from launchers.pretraining.models import build_model, count_parameters
from launchers.pretraining.options import parse_options
from launchers.pretraining.processes import (
    from_first_process,
    limit_waiting,
    mean_and_stop,
    no_answer,
)
from launchers.pretraining.progress import TrainingProgress
from launchers.pretraining.resuming import (
    Found,
    check_job,
    describe_job,
    find_checkpoint,
    plan_checkpoints,
)
from launchers.pretraining.saving import RunCheckpoints
from launchers.pretraining.schedule import warmup_cosine_scheduler
from launchers.pretraining.tokens import Sequences, load_tokenizer
from launchers.pretraining.training import Engine, leave_processes
from launchers.reporting import RunFacts, RunRecord, run_facts, sample_optimizer

PATIENT_START = timedelta(minutes=30)
"""Minimum time limit while the first process reads the data for all processes."""
PATIENT_END = timedelta(minutes=5)
"""Minimum time limit while the first process draws the report."""


@dataclass(frozen=True)
class Job:
    """Everything that training needs."""

    engine: Engine
    sequences: Sequences
    facts: RunFacts
    out: Path
    checkpoints: RunCheckpoints


def build(options: argparse.Namespace, stop: StopRequest) -> Job:
    """Initializes the process group, reads the data, builds model and engine."""
    path = options.deepspeed_config
    setup = AccelerateSetup() if path is None else DeepSpeedSetup(path)
    limit = None if options.time_limit is None else timedelta(seconds=options.time_limit)
    with stop.at_once():
        setup.connect(None if limit is None else max(limit, PATIENT_START))
    config = setup.read_config()
    optimizer = choose_optimizer(config, options.optimizer)
    overrides = current_names(parse_overrides(options.overrides), "--set")
    if limit is not None and optimizer == "adarankgrad":
        overrides.setdefault("collective_timeout", options.time_limit)
    settings = set_optimizer(config, optimizer, overrides, options.lr)
    if options.accumulation is not None:
        config["gradient_accumulation_steps"] = options.accumulation
    if options.clip is not None:
        config["gradient_clipping"] = options.clip
    batch = set_batch(config, options.batch_size, dist.get_world_size())
    setup.check(config)
    out = options.out or Path("runs") / f"{Path(options.model).name}-{optimizer}"
    plan = plan_checkpoints(
        out,
        optimizer,
        resume=options.resume,
        save_every=options.save_every,
        keep=options.keep,
        time_limit=options.time_limit,
    )

    def read_sequences() -> tuple[Sequences, dict[str, str], Found | None]:
        make_directory(out)
        found = find_checkpoint(plan)
        tokenizer = load_tokenizer(options.tokenizer)
        corpus = read_corpus(options.data, text_key=options.text_key, max_bytes=options.data_bytes)
        sequences = Sequences.of(corpus, tokenizer, length=options.seq_len, seed=options.seed)
        digests = {}
        if plan.saves:  # takes some seconds per gigabyte
            digests = {"text": text_digest(corpus), "tokens": token_digest(sequences)}
        return sequences, digests, found

    sequences, digests, found = from_first_process(read_sequences)
    shape = model_config(options.model, vocab_size=sequences.vocab_size, length=options.seq_len)
    course = {
        "steps": options.steps,
        "warmup": options.warmup,
        "min_lr_ratio": options.min_lr_ratio,
    }
    description = describe_job(
        identity={
            "model": model_values(shape),
            "seed": options.seed,
            "seq_len": options.seq_len,
            "batch_size": batch.total,
            **digests,
        },
        schedule={**course, "clip": config.get("gradient_clipping", 1.0)},
        settings=settings,
    )
    if found is not None:
        changes = check_job(found, description, lr=options.lr, given=overrides)
        if changes and is_first_process():
            print(*changes, sep="\n", flush=True)
    model = build_model(options.model, shape, seed=options.seed, deepspeed_config=config)
    engine = setup.build(model, config, batch, warmup_cosine_scheduler(**course))
    if limit is not None:
        limit_waiting(limit)
    facts = run_facts(
        engine=engine.name,
        world_size=dist.get_world_size(),
        model=Path(options.model).name,
        model_parameters=count_parameters(model),
        optimizer=config["optimizer"]["type"],
        optimizer_settings=description["settings"],
        data=sequences.source,
        batch_size=batch.total,
        micro_batch_size=batch.micro,
        accumulation_steps=batch.accumulation,
        seq_len=options.seq_len,
        seed=options.seed,
    )
    return Job(engine, sequences, facts, out, RunCheckpoints(plan, engine, description))


def make_directory(path: Path) -> None:
    """Creates the run's directory, so that an unusable one fails at the start."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}") from None


def train(job: Job, options: argparse.Namespace, stop: StopRequest) -> int:
    """Trains until the last step or a signal, writes the report, returns the exit code."""
    engine, first = job.engine, is_first_process()
    earlier = job.checkpoints.resume(new_peak=options.lr)
    step, stop_signal = earlier.step, None
    with (
        job.checkpoints as checkpoints,
        RunRecord(
            job.out, job.facts, planned_steps=options.steps, active=first, earlier=earlier
        ) as record,
        TrainingProgress(options.steps, shown=first, done=step) as progress,
    ):
        progress.say(checkpoints.news())
        for step in range(earlier.step + 1, options.steps + 1):
            began, lr = time.perf_counter(), engine.learning_rate
            own_loss = engine.train_step(job.sequences, step)
            loss, stop_signal = mean_and_stop(own_loss, stop.signal, engine.device)
            seconds = time.perf_counter() - began
            line = {"step": step, "loss": loss, "lr": lr, "seconds": seconds}
            line["tokens"] = step * engine.batch.total * options.seq_len
            finite, urgent = math.isfinite(loss), stop_signal is not None
            last = step == options.steps or urgent
            sample = None
            if last or step == 1 or step % options.log_ranks_every == 0:
                sample = sample_optimizer(engine.optimizer)
            saved = finite and checkpoints.is_due(step, last=last)
            evaluated = step == options.steps or step % options.eval_every == 0
            if evaluated and not urgent:
                line["held_out_loss"] = engine.held_out_loss(job.sequences, options.eval_batches)
            if saved:
                line["save_seconds"] = checkpoints.save(step, record.progress(line, sample))
            if evaluated and urgent and (saved or step == options.steps):
                # after a signal the checkpoint comes first, then the evaluation
                line["held_out_loss"] = engine.held_out_loss(job.sequences, options.eval_batches)
            record.step(line, sample)
            progress.show(line, record.mean_rank)
            if not finite:  # DeepSpeed would skip all remaining steps
                raise FloatingPointError(f"the loss of step {step} is {loss}; lower --lr")
            progress.say(checkpoints.news())
            if last:
                break
        else:  # no steps left: the checkpoint is that of the last step
            record.observe(sample_optimizer(engine.optimizer))
        saves = checkpoints.finish()
        progress.say(checkpoints.news())
    if options.time_limit is not None:
        limit_waiting(max(timedelta(seconds=options.time_limit), PATIENT_END))
    interrupted_by = stop_signal if step < options.steps else None
    record.finish("interrupted" if interrupted_by else "finished", saves)
    # The launcher kills the other processes once one has exited with a signal's exit code.
    dist.barrier()
    return exit_code(interrupted_by) if interrupted_by else 0


def main() -> int:
    """Runs the job; errors are reported in one line."""
    options = parse_options(__doc__)
    stop = StopRequest()
    try:
        prepare_environment()
        quiet_libraries()
        return train(build(options, stop), options, stop)
    except (InputError, ConfigError) as error:
        complain(str(error))
        return BAD_INPUT
    except (CheckpointError, FloatingPointError) as error:  # the loss's, or the optimizer's
        complain(str(error))
        return FAILED
    except RuntimeError as error:
        message = no_answer(error)
        if message is None:
            raise
        complain(message)
        return FAILED
    finally:
        leave_processes()


if __name__ == "__main__":
    sys.exit(main())
