"""Trains a small Llama with the Trainer of transformers, in many ways in one launch.

    PYTHONPATH=. deepspeed --num_gpus 2 tests/launch/trainer_runs.py --out DIR --ways zero1 zero2

Writes what tests assert on: losses and ranks of each step, before and after resuming.
"""

import argparse
import faulthandler
import gc
import json
import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.patience import patient

faulthandler.dump_traceback_later(patient(280), exit=True)

import deepspeed  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments  # noqa: E402
from transformers.integrations import TensorBoardCallback  # noqa: E402

import arg_dist  # noqa: E402
from arg_dist.integrations.accelerate import innermost  # noqa: E402
from arg_dist.integrations.callback import AdaRankGradCallback  # noqa: E402
from tests.launch import models  # noqa: E402
from tests.launch.trainer_cases import (  # noqa: E402
    OWN,
    PREFERENCES,
    SAVED_AFTER,
    STEPS,
    WAYS,
    Way,
)

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def rows(steps: int, *, labels: bool) -> Dataset:
    """The sequences of these steps, one after the other."""
    tokens = torch.cat([models.batch(step) for step in range(steps)]).tolist()
    columns = {"input_ids": tokens, "labels": tokens} if labels else {"input_ids": tokens}
    return Dataset.from_dict(columns)


def pairs(steps: int) -> Dataset:
    """As many preferences as there are sequences, in words of one number each."""
    words = [
        [" ".join(map(str, part)) for part in ([*line[:4], ""], line[4:9], line[9:14])]
        for line in torch.cat([models.batch(step) for step in range(steps)]).tolist()
    ]
    columns = zip(*words, strict=True)
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), columns, strict=True)))


class Overriding(Trainer):
    """Builds its optimizer itself."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            groups = arg_dist.param_groups(self.model)
            self.optimizer = arg_dist.AdaRankGrad(groups, lr=self.args.learning_rate, **OWN)
        return self.optimizer


def preferring(way: Way, settings: dict[str, Any]) -> Trainer:
    """TRL's DPOTrainer, which has no `optimizer_cls_and_kwargs`."""
    from trl import DPOConfig, DPOTrainer

    more = {"bf16": False, "gradient_checkpointing": False, "beta": 2.0}
    args, model = DPOConfig(**settings, **more), models.build("llama")
    optimizers: tuple[Any, None] = (None, None)
    if way.door == "dpo":
        groups = arg_dist.param_groups(model)
        optimizers = (arg_dist.AdaRankGrad(groups, lr=args.learning_rate, **OWN), None)
    data, words = pairs(STEPS), tokenizer()
    trainer = DPOTrainer(
        model,
        models.build("llama"),
        args,
        train_dataset=data,
        processing_class=words,
        optimizers=optimizers,
    )
    if way.door == "set":
        trainer.optimizer_cls_and_kwargs = arg_dist.for_trainer(trainer.args, **OWN)
    return trainer


def trainer_of(way: Way, out: Path) -> Trainer:
    settings = arguments_of(way, out)
    if way.door in PREFERENCES:
        return preferring(way, settings)
    model = models.build("llama")
    optimizer: dict[str, Any] = {}
    if way.door == "trl":
        from trl import SFTConfig, SFTTrainer

        args: Any = SFTConfig(**settings, bf16=False, gradient_checkpointing=False)
        trainer: Any = SFTTrainer
        optimizer["processing_class"] = tokenizer()
    else:
        args = TrainingArguments(**settings)
        trainer = Overriding if way.door == "override" else Trainer
    if way.door in ("line", "trl", "both"):
        optimizer["optimizer_cls_and_kwargs"] = arg_dist.for_trainer(args, **OWN)
    if way.door == "optimizers":
        groups = arg_dist.param_groups(model)
        optimizer["optimizers"] = (
            arg_dist.AdaRankGrad(groups, lr=args.learning_rate, **OWN),
            None,
        )
    data = rows(STEPS, labels=way.door != "trl")
    if way.arguments.get("ignore_data_skip"):
        data = rows(1, labels=True).select(range(models.BATCH))
    return trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=rows(1, labels=way.door != "trl"),
        callbacks=[] if way.bare else [AdaRankGradCallback(matrices=True)],
        **optimizer,
    )


def arguments_of(way: Way, out: Path) -> dict[str, Any]:
    """What the arguments are given; every way trains on the same global batches."""
    pieces = way.arguments.get("gradient_accumulation_steps", 1)
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": models.BATCH // processes() // pieces,
        "learning_rate": 5e-3,
        "max_steps": STEPS,
        "save_strategy": "no",
        "save_steps": SAVED_AFTER,
        "eval_steps": SAVED_AFTER,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if way.deepspeed is not None:
        arguments.update(deepspeed=way.config(), use_cpu=False, **deepspeed_on_cpus())
    return {**arguments, **way.arguments}


def deepspeed_on_cpus() -> dict[str, Any]:
    """Without this the Trainer gives all of DeepSpeed's processes on CPUs the same rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true"):
        PartialState(backend="gloo")
    return {"accelerator_config": {"use_configured_state": True}}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of one number each; SFTTrainer insists on a tokenizer, also where rows are tokens."""
    words = {str(i): i for i in range(models.VOCABULARY)}
    model = Tokenizer(WordLevel(words, unk_token="0"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="1", pad_token="2")


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def run(way: Way, out: Path) -> dict[str, Any]:
    """What one training did, and another one that began from its checkpoint."""
    if way.refused:
        return refusal(way, out)
    result = facts(trainer_of(way, out), None)
    if way.resume:
        again = trainer_of(way, out / "resumed")
        result["resumed"] = facts(again, str(out / f"checkpoint-{SAVED_AFTER}"))
    return result


def refusal(way: Way, out: Path) -> dict[str, Any]:
    """What somebody is told whose training cannot be meant, and after how many steps."""
    trainer = None
    told = "no error"
    try:
        trainer = trainer_of(way, out)
        trainer.train()
    except (RuntimeError, ValueError) as error:
        told = str(error)
    if trainer is not None:
        close(trainer)
    return {"told": told, "steps": trainer.state.global_step if trainer else 0}


def facts(trainer: Trainer, checkpoint: str | None) -> dict[str, Any]:
    """What a training did, from `checkpoint` on."""
    trainer.train(resume_from_checkpoint=checkpoint)
    history = trainer.state.log_history
    logs = [entry for entry in history if "loss" in entry]
    optimizer = innermost(trainer.optimizer)
    result: dict[str, Any] = {
        "losses": [entry["loss"] for entry in logs],
        "ranks": [ranks(entry) for entry in logs],
        "last_log": logs[-1],
        "evaluated": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "optimizer": type(optimizer).__name__,
        "names": sorted(n for group in optimizer.param_groups for n in group["param_names"]),
        "decay": [group["weight_decay"] for group in optimizer.param_groups],
        "engine": type(trainer.model_wrapped).__name__,
        "processes": trainer.accelerator.num_processes,
    }
    if trainer.args.load_best_model_at_end:
        # its files are called by the second: another one would take the place of a quick training's
        trainer.pop_callback(TensorBoardCallback)
        result["evaluated_at_end"] = trainer.evaluate()["eval_loss"]
    close(trainer)
    return result


def ranks(entry: dict[str, Any]) -> dict[str, int]:
    return {key: value for key, value in entry.items() if key.startswith("rank/")}


def close(trainer: Trainer) -> None:
    """Gives DeepSpeed's engine up, so that the next one finds nothing of it."""
    if hasattr(trainer.model_wrapped, "destroy"):
        trainer.model_wrapped.destroy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.freeze()  # or the collections that DeepSpeed asks for would go through every module
    deepspeed.utils.logger.setLevel(logging.ERROR)
    results = {name: run(WAYS[name], options.out / name) for name in options.ways}
    if int(os.environ.get("RANK", 0)) == 0:
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
