"""Trains with torchtitan's own Trainer on each process of a launch, and writes what it saw.

torchtitan takes a machine without a GPU for one with CUDA; here it is told of the CPU. What else it
needs a GPU, a tokenizer or a network for is replaced where its ``TrainSpec`` has a place for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.patience import patient

faulthandler.dump_traceback_later(patient(110), exit=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402

with mock.patch("torch._utils._get_available_device_type", return_value="cpu"):
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.config import JobConfig
    from torchtitan.models.llama3 import TransformerModelArgs
    from torchtitan.protocols.train_spec import TrainSpec, get_train_spec, register_train_spec
    from torchtitan.tools.utils import NoColor
    from torchtitan.train import Trainer

from tests.launch.pages import blocks_of  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs/trainers/torchtitan.md"
STEPS, SAVED_AFTER, BATCH, LENGTH, BATCHES = 10, 5, 8, 16, 5
SIZES = TransformerModelArgs(
    dim=40, n_layers=2, n_heads=4, vocab_size=64, multiple_of=8, max_seq_len=LENGTH
)
DEGREES = {
    "fsdp2": {"data_parallel_shard_degree": 2},
    "ddp": {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1},
    "tp": {"tensor_parallel_degree": 2, "data_parallel_shard_degree": 1},
}


class Rows(torch.utils.data.IterableDataset[Any]):
    """The rows of `BATCHES` batches, over and over, of which each process takes its own."""

    def __init__(self, me: int, processes: int) -> None:
        self.me, self.processes, self.seen = me, processes, 0

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 64, (BATCHES * BATCH, LENGTH + 1), generator=generator)
        while True:
            row = rows[(self.seen * self.processes + self.me) % len(rows)]
            self.seen += 1
            yield {"input": row[:-1]}, row[1:]

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class Losses:
    """In place of torchtitan's table of metrics, which asks for the GPU's memory and name."""

    color = NoColor()

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ntokens_since_last_log, self.data_loading_times = 0, []
        peak = SimpleNamespace(max_reserved_gib=0.0, max_reserved_pct=0.0)
        self.device_memory_monitor = SimpleNamespace(
            device_name="A100", get_peak_stats=lambda: peak
        )

    def should_log(self, step: int) -> bool:
        return True

    def log(self, step: int, loss: float, *others: Any, **more: Any) -> None:
        self.losses.append(float(loss))

    def close(self) -> None:
        pass


def on_cpus(spec: TrainSpec) -> TrainSpec:
    """A specification for a small model on CPUs; its optimizers are left as they are."""

    def parallelized(model: Any, dims: Any, config: Any) -> Any:
        model = spec.parallelize_fn(model, dims, config)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo cannot multiply and sum in one
                module.set_force_sum_reduction_for_comms(True)
        return model

    def rows(dp_world_size: int, dp_rank: int, **given: Any) -> ParallelAwareDataloader:
        data = Rows(dp_rank, dp_world_size)
        size = BATCH // dp_world_size
        return ParallelAwareDataloader(data, dp_rank, dp_world_size, batch_size=size)

    return dataclasses.replace(
        spec,
        model_args={"tiny": SIZES},
        parallelize_fn=parallelized,
        build_tokenizer_fn=None,
        build_dataloader_fn=rows,
        build_metrics_processor_fn=lambda *given: Losses(),
        state_dict_adapter=None,
    )


def job(way: str, folder: Path, load_step: int) -> JobConfig:
    """What a user writes into the TOML file."""
    config = JobConfig()
    config.job.dump_folder = str(folder)
    config.model.name, config.model.flavor = "on CPUs", "tiny"
    config.optimizer.lr, config.lr_scheduler.warmup_steps = 2e-2, 2
    shares = 1 if way == "tp" else 2
    config.training = dataclasses.replace(
        config.training, local_batch_size=BATCH // shares, seq_len=LENGTH, steps=STEPS
    )
    config.checkpoint = dataclasses.replace(
        config.checkpoint, enable=True, interval=SAVED_AFTER, load_step=load_step
    )
    config.parallelism = dataclasses.replace(config.parallelism, **DEGREES[way])
    config.debug.seed = 0
    return config


def trained(way: str, folder: Path, load_step: int = -1) -> Trainer:
    trainer = Trainer(job(way, folder, load_step))
    trainer.train()
    trainer.close()
    return trainer


def facts(way: str, folder: Path) -> dict[str, Any]:
    """What one training did, and another one that began from its checkpoint."""
    trainer = trained(way, folder)
    (optimizer,) = trainer.optimizers
    return {
        "losses": trainer.metrics_processor.losses,
        "optimizer": type(optimizer).__name__,
        "matrices": [entry["name"] for entry in optimizer.stats()],
        "bytes": optimizer.state_bytes(),
        "resumed": trained(way, folder, SAVED_AFTER).metrics_processor.losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    exec(next(block.text for block in blocks_of(PAGE) if block.language == "python"))
    register_train_spec("on CPUs", on_cpus(get_train_spec("llama3_adarankgrad")))
    dist.init_process_group("gloo")
    with (
        mock.patch("torchtitan.distributed.utils.set_pg_timeouts"),  # of NCCL
        mock.patch("torchtitan.train.time.sleep"),
    ):
        results = {way: facts(way, out / way) for way in DEGREES}
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
