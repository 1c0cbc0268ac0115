"""Trains with Lightning's own loop on each process of a launch, and writes what it saw."""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.patience import patient

faulthandler.dump_traceback_later(patient(110), exit=True)

import lightning  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import arg_dist  # noqa: E402
from tests.launch import models  # noqa: E402
from tests.launch.cases import SETTINGS  # noqa: E402
from tests.launch.training import CLIP, TorchTraining, train  # noqa: E402

EPOCHS, STEPS_OF_ONE = 3, 4
ME, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""Lightning removes the variables when a training ends."""


def fsdp2(**settings: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(PROCESSES, tensor_parallel_size=1, **settings)


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": fsdp2,
    "fsdp2-one-file": lambda: fsdp2(save_distributed_checkpoint=False),
}


class Llama(lightning.LightningModule):
    """The tiny Llama, and the mean loss over all processes at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.build("llama")
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        self.losses.append(mean.item() / dist.get_world_size())
        return loss

    def configure_optimizers(self) -> arg_dist.AdaRankGrad:
        return arg_dist.AdaRankGrad(self, **SETTINGS)


def fit(strategy: str, folder: Path, checkpoint: Path | None = None) -> Llama:
    """The module after `EPOCHS` epochs, or what is left of them after a checkpoint."""
    mine = torch.cat([models.batch(step).chunk(PROCESSES)[ME] for step in range(STEPS_OF_ONE)])
    module = Llama()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=STRATEGIES[strategy](),
        max_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # which shuffles
    )
    data = DataLoader(mine, batch_size=models.BATCH // PROCESSES)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return module


def facts(strategy: str, folder: Path) -> dict[str, Any]:
    """What one training did, and another one that began from its first checkpoint."""
    module = fit(strategy, folder)
    optimizer = module.optimizers()
    result = {
        "losses": module.losses,
        "bytes": optimizer.state_bytes(),
        "matrices": [entry["name"] for entry in optimizer.stats()],
    }
    again = fit(strategy, folder / "again", folder / "epoch=0.ckpt")
    return {**result, "resumed": again.losses}


def alone() -> dict[str, Any]:
    """What one process sees, without Lightning; sketches depend on the parameters' names."""
    module = Llama()
    optimizer = arg_dist.AdaRankGrad(module, process_group=None, **SETTINGS)
    return train(TorchTraining(module.model, optimizer), steps=range(EPOCHS * STEPS_OF_ONE))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = {name: facts(name, out / name) for name in STRATEGIES}
    one = alone()
    results["alone"] = {"losses": one["losses"], "bytes": one["sizes"][-1]}
    (out / f"{ME}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
