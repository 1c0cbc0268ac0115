"""The job under ``accelerate launch`` or ``torchrun``: DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import arg_dist
from arg_dist.cli.parsing import InputError
from arg_dist.config import AdaRankGradConfig, ConfigError
from arg_dist.engines.deepspeed_config import refuse_unsupported
from arg_dist.integrations.accelerate import (
    asks_for,
    check_accelerator,
    check_environment,
    check_optimizer,
    engine_name,
    innermost,
)
from launchers.pretraining.deepspeed_engine import (
    check_deepspeed_config,
    load_loss_scale_state,
    loss_scale_state,
)
from launchers.pretraining.job_config import Batch, without_auto
from launchers.pretraining.rendezvous import init_method
from launchers.pretraining.schedule import WarmupCosine
from launchers.pretraining.training import Engine, Schedule, Setup, unusable_port

if TYPE_CHECKING:
    from accelerate import Accelerator

DEFAULTS = {"train_batch_size": 16, "gradient_clipping": 1.0}
"""Stands in for the DeepSpeed JSON where the engine reads none."""

FILLED_IN = ("lr", "weight_decay")
"""``"auto"`` values of ``optimizer.params`` that accelerate fills in from its ``DummyOptim``."""


class AccelerateSetup(Setup):
    """Lets accelerate choose the engine from the environment, then validates the choice."""

    _accelerator: Accelerator

    def connect(self, time_limit: timedelta | None) -> None:
        """Creates the ``Accelerator``, which initializes the process group."""
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        try:
            check_environment()
            # cpu=True disables FSDP and DeepSpeed; without it, plain CPU jobs are not distributed.
            cpu = not (_has_gpu() or asks_for("DEEPSPEED") or asks_for("FSDP"))
            on_cpus = {} if _has_gpu() else {"backend": "gloo"}
            group = InitProcessGroupKwargs(timeout=time_limit, init_method=init_method(), **on_cpus)
            self._accelerator = Accelerator(cpu=cpu, kwargs_handlers=[group])
            check_accelerator(self._accelerator)
        except dist.DistNetworkError:
            raise unusable_port("--main_process_port (torchrun: --master_port)") from None
        except (ValueError, ImportError, NotImplementedError) as error:
            raise InputError(_one_line(error)) from None
        plugin = getattr(self._accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate's default rounds the loss to bf16, too coarse to follow training
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None
            )
        if self._accelerator.mixed_precision == "fp16":  # accelerate ignores it on CPUs
            raise InputError(
                "mixed_precision: got fp16; this job supports loss scaling only under DeepSpeed; "
                "use bf16 or no"
            )

    def read_config(self) -> dict[str, Any]:
        """The JSON of accelerate's DeepSpeed plugin, or :data:`DEFAULTS` without the plugin."""
        return without_auto(self._plugin_config) if self._plugin_config else dict(DEFAULTS)

    def check(self, config: dict[str, Any]) -> None:
        """Validates `config` with DeepSpeed and against AdaRankGrad's requirements."""
        if self._plugin_config is None:
            return
        check_deepspeed_config(config)
        # accelerate may pass the optimizer as an object, for which the rules are stricter
        handed_over = config if self._named_in_json(config) else {**config, "optimizer": None}
        try:
            refuse_unsupported(handed_over, cuda=torch.cuda.is_available())
        except ConfigError as error:
            raise InputError(f"DeepSpeed JSON, {error}") from None

    def build(
        self, model: nn.Module, config: dict[str, Any], batch: Batch, schedule: Schedule
    ) -> Engine:
        """Prepares model and optimizer together and checks the resulting optimizer."""
        self._accelerator.gradient_accumulation_steps = batch.accumulation
        config = _clipped_by_the_optimizer(config)
        try:
            optimizer = self._optimizer(model, config)
            module, prepared = self._accelerator.prepare(model, optimizer)
            inner = _check(prepared, config["optimizer"]["type"])
        except (ValueError, KeyError, NotImplementedError) as error:
            raise InputError(_one_line(error)) from None
        return AccelerateTraining(
            self._name(),
            module,
            inner,
            batch,
            accelerator=self._accelerator,
            prepared=prepared,
            scheduler=schedule(inner),
            clip=float(config.get("gradient_clipping", 1.0)),
        )

    @property
    def _plugin_config(self) -> dict[str, Any] | None:
        plugin = self._accelerator.state.deepspeed_plugin
        return None if plugin is None else plugin.deepspeed_config

    def _named_in_json(self, config: dict[str, Any]) -> bool:
        """Whether DeepSpeed builds the optimizer from its name in the JSON."""
        written = self._plugin_config is not None and "optimizer" in self._plugin_config
        return written and config["optimizer"]["type"] != "AdamW"

    def _optimizer(self, model: nn.Module, config: dict[str, Any]) -> Any:
        """The optimizer, or a placeholder for the JSON's; completes the plugin's JSON."""
        settings = config["optimizer"]["params"]
        if self._plugin_config is not None:
            self._complete(self._plugin_config, config)
        if config["optimizer"]["type"] == "AdamW":
            return torch.optim.AdamW(model.parameters(), **settings)
        if self._named_in_json(config):
            from accelerate.utils import DummyOptim

            filled_in = {
                key: settings.get(key, AdaRankGradConfig.model_fields[key].default)
                for key in FILLED_IN
            }
            return DummyOptim([p for p in model.parameters() if p.requires_grad], **filled_in)
        rest = {key: settings[key] for key in settings if key not in ("targets", "exclude")}
        groups = arg_dist.param_groups(
            model, targets=settings.get("targets"), exclude=settings.get("exclude")
        )
        return arg_dist.AdaRankGrad(groups, **rest)

    def _complete(self, written: dict[str, Any], config: dict[str, Any]) -> None:
        """Writes the command line's values into the plugin's JSON; other autos remain."""
        if not self._named_in_json(config):
            written.pop("optimizer", None)
        else:
            left = written["optimizer"].get("params", {})
            autos = {key: "auto" for key in FILLED_IN if left.get(key) == "auto"}
            written["optimizer"] = {
                **config["optimizer"],
                "params": {**autos, **config["optimizer"]["params"]},
            }
        for key, value in config.items():
            if not isinstance(value, dict):
                written[key] = value

    def _name(self) -> str:
        name = engine_name(self._accelerator)
        return name if self._plugin_config is None else f"{name} (accelerate)"


class AccelerateTraining(Engine):
    """Training steps through an ``Accelerator``; under DeepSpeed, backward also clips and steps."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: Optimizer,
        batch: Batch,
        *,
        accelerator: Accelerator,
        prepared: Any,
        scheduler: WarmupCosine,
        clip: float,
    ) -> None:
        super().__init__(
            name,
            module,
            optimizer,
            batch,
            model=accelerator.unwrap_model(module),
            scheduler=scheduler,
            device=accelerator.device,
        )
        self._accelerator = accelerator
        self._prepared = prepared
        self._clip = clip

    def extra_state(self) -> dict[str, Any]:
        """The dynamic loss scale, under DeepSpeed in fp16."""
        return loss_scale_state(self.module) if self._has_deepspeed else {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restores the loss scale of a checkpoint, if both runs have a dynamic one."""
        if self._has_deepspeed:
            load_loss_scale_state(self.module, state)

    @property
    def _has_deepspeed(self) -> bool:
        return self._accelerator.state.deepspeed_plugin is not None

    def micro_step(self, ids: Tensor) -> Tensor:
        """Forward and backward; the last micro batch of a step also clips and steps."""
        accelerator = self._accelerator
        with accelerator.accumulate(self.module):
            loss: Tensor = self.module(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # divides by the accumulation steps; DeepSpeed steps here
            if accelerator.sync_gradients:
                if self._clip > 0:
                    accelerator.clip_grad_norm_(self.module.parameters(), self._clip)
                self._prepared.step()
                self._prepared.zero_grad()
                if not accelerator.optimizer_step_was_skipped:
                    # A prepared scheduler would advance once per process.
                    self.scheduler.step()
        return loss


def _clipped_by_the_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """With ``gradient_sync="sketch"``, only the optimizer knows the norm of the mean gradient."""
    params, clip = config["optimizer"]["params"], config.get("gradient_clipping", 1.0)
    if params.get("gradient_sync") != "sketch":
        return config
    clipping = {"max_grad_norm": clip} if clip > 0 else {}
    optimizer = {**config["optimizer"], "params": {**clipping, **params}}
    return {**config, "optimizer": optimizer, "gradient_clipping": 0.0}


def _check(prepared: Any, wanted: str) -> Optimizer:
    """Unwraps `prepared` and checks that it is the `wanted` optimizer."""
    if wanted == "AdaRankGrad":
        return check_optimizer(prepared)
    inner = innermost(prepared)
    if type(inner) is not torch.optim.AdamW:
        raise ConfigError(
            f"the optimizer that trains is {type(inner).__name__}, not torch.optim.AdamW; with "
            'offload_optimizer, set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON'
        )
    return inner


def _has_gpu() -> bool:
    """Whether accelerate runs multiple processes on this machine's accelerator (MPS: no)."""
    has_one = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if has_one else None
    return accelerator is not None and accelerator.type != "mps"


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())
