"""The job under plain DeepSpeed, configured by a JSON."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

import arg_dist
from arg_dist.cli.parsing import InputError
from arg_dist.integrations.accelerate import asks_for
from launchers.pretraining.job_config import Batch, read_deepspeed_config
from launchers.pretraining.models import zero_stage
from launchers.pretraining.processes import from_first_process
from launchers.pretraining.rendezvous import init_method
from launchers.pretraining.training import Engine, Schedule, Setup, unusable_port

LOSS_SCALE_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The mutable state of DeepSpeed's dynamic loss scaler."""


class DeepSpeedSetup(Setup):
    """Reads the JSON at `path` and builds the engine with ``arg_dist.initialize``."""

    def __init__(self, path: str) -> None:
        self._path = path

    def connect(self, time_limit: timedelta | None) -> None:
        """Initializes the process group: NCCL on GPUs, gloo on CPUs."""
        for engine in ("DEEPSPEED", "FSDP"):
            if asks_for(engine):
                raise InputError(
                    f"--deepspeed_config {self._path}: accelerate is configured for {engine} as "
                    "well; omit this option, or launch with deepspeed or torchrun"
                )
        import deepspeed

        accelerator = deepspeed.get_accelerator()
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        limit = {} if time_limit is None else {"timeout": time_limit}
        try:
            deepspeed.init_distributed(
                accelerator.communication_backend_name(),
                verbose=False,
                init_method=init_method(),
                **limit,
            )
        except dist.DistNetworkError:
            raise unusable_port("--master_port") from None

    def read_config(self) -> dict[str, Any]:
        """The JSON, read on the first process and broadcast."""
        return from_first_process(lambda: read_deepspeed_config(self._path))

    def check(self, config: dict[str, Any]) -> None:
        """Validates `config` with DeepSpeed."""
        check_deepspeed_config(config)

    def build(
        self, model: nn.Module, config: dict[str, Any], batch: Batch, schedule: Schedule
    ) -> Engine:
        """The engine: AdaRankGrad by its name in the JSON, AdamW as torch's optimizer."""
        try:
            if config["optimizer"]["type"] == "AdamW":
                engine = _adamw_engine(model, config, schedule)
            else:
                engine = arg_dist.initialize(model=model, config=config, lr_scheduler=schedule)[0]
        except ValueError as error:  # raised for invalid settings while the engine is built
            raise InputError(str(error)) from None
        return DeepSpeedTraining(f"ZeRO-{zero_stage(config)}", engine, batch)


class DeepSpeedTraining(Engine):
    """Training steps of a DeepSpeed engine, which clips, steps and schedules itself."""

    def __init__(self, name: str, engine: Any, batch: Batch) -> None:
        super().__init__(
            name,
            engine,
            engine.basic_optimizer,
            batch,
            model=engine.module,
            scheduler=engine.lr_scheduler,
            device=torch.device(engine.device),
        )
        self._engine = engine

    def extra_state(self) -> dict[str, Any]:
        """The dynamic loss scale, under fp16."""
        return loss_scale_state(self._engine)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the loss scale of a checkpoint, if both runs have a dynamic one."""
        load_loss_scale_state(self._engine, state)

    def micro_step(self, ids: Tensor) -> Tensor:
        """Forward, backward, and DeepSpeed's step."""
        loss: Tensor = self._engine(input_ids=ids, labels=ids).loss
        self._engine.backward(loss)
        self._engine.step()
        return loss


def loss_scale_state(engine: Any) -> dict[str, Any]:
    """State of a DeepSpeed engine's dynamic loss scaler as JSON; empty without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {"loss_scale": {key: getattr(scaler, key) for key in LOSS_SCALE_KEYS}}


def load_loss_scale_state(engine: Any, state: dict[str, Any]) -> None:
    """Restores :func:`loss_scale_state`, if the engine has a dynamic loss scaler too."""
    if "loss_scale" in state and loss_scale_state(engine):
        for key, value in state["loss_scale"].items():
            setattr(engine.optimizer.loss_scaler, key, value)


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Validates `config` with DeepSpeed before a model is built.

    Raises:
        InputError: DeepSpeed rejects it.
    """
    from deepspeed import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(map(str, fault["loc"]))
        raise InputError(
            f"DeepSpeed JSON, {error.title}, {path}: {fault['msg']}, got {fault['input']!r}"
        ) from None
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise InputError("DeepSpeed JSON: " + " ".join(str(error).split())) from None


def _adamw_engine(model: nn.Module, config: dict[str, Any], schedule: Schedule) -> Any:
    import deepspeed

    settings = config["optimizer"]["params"]
    rest = {key: value for key, value in config.items() if key != "optimizer"}
    return deepspeed.initialize(
        model=model,
        config=rest,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **settings),
        lr_scheduler=schedule,
    )[0]
