"""Runs the Python code of a page: ``docs_runs.py PAGE``, on each process of a launch.

Blocks of a page share a namespace and run in order. README.md's each begin anew, with what its
reader has (a model, data, the Trainer's arguments, an accelerator), and train for a step after it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.patience import patient

faulthandler.dump_traceback_later(patient(150), exit=True)
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from launchers.pretraining.environment import quiet_libraries  # noqa: E402
from tests.launch.models import batch, build  # noqa: E402
from tests.launch.pages import Block, blocks_of, checkout_at  # noqa: E402

Names = dict[str, Any]


def main() -> None:
    torch.set_num_threads(1)
    quiet_libraries()  # saves a compilation, too
    page = Path(sys.argv[1])
    blocks = [b for b in blocks_of(page) if b.language == "python" and b.reason is None]
    if page.name == "README.md":
        dist.init_process_group("gloo")
        for block in blocks:
            (train,) = (case for mark, case in CASES.items() if mark in block.text)
            train(page, block)
        assert len(blocks) == len(CASES), "a block of the README has no case here"
    else:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(checkout_at(Path(folder)))
            names: Names = {"__name__": "page"}
            for block in blocks:
                execute(page, block, names)
            os.chdir("/")
    if dist.is_initialized():
        dist.destroy_process_group()


def execute(page: Path, block: Block, names: Names) -> Names:
    """Runs a block; the traceback of a failure shows the page and its line."""
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(page), "exec"), names)
    return names


def with_deepspeed(page: Path, block: Block) -> None:
    names = execute(page, block, {"model": build("llama")})
    engine = names["engine"]
    tokens = batch(0)[:8]
    before = weights(engine.module)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    assert not torch.equal(before, weights(engine.module))
    engine.destroy()


def with_torch(page: Path, block: Block) -> None:
    names = execute(page, block, {"model": build("llama")})
    step(names["model"], names["optimizer"])


def with_trainer(page: Path, block: Block) -> None:
    from transformers import TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=2, use_cpu=True, ddp_backend="gloo", report_to="none", save_steps=100
        )
        data = [{"input_ids": row, "labels": row} for row in batch(0)]
        names = execute(page, block, {"model": build("llama"), "args": args, "data": data})
        assert names["trainer"].train().global_step == 2


def with_accelerate(page: Path, block: Block) -> None:
    from accelerate import Accelerator

    names = execute(
        page,
        block,
        {
            "model": build("llama"),
            "accelerator": Accelerator(cpu=True),
            "loader": torch.utils.data.DataLoader(batch(0), batch_size=8),
        },
    )
    step(names["model"], names["optimizer"])


CASES = {
    "arg_dist.initialize(": with_deepspeed,
    "fully_shard(": with_torch,
    "Trainer(": with_trainer,
    "arg_dist.prepare(": with_accelerate,
}
"""What follows each block of the README, by what is in it."""


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tokens = batch(0)[:8]
    before = weights(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert not torch.equal(before, weights(model))


def weights(model: torch.nn.Module) -> torch.Tensor:
    """Some of this process's weights, as they are now."""
    weight = next(p for n, p in model.named_parameters() if n.endswith("gate_proj.weight"))
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return local.detach().clone()


if __name__ == "__main__":
    main()
