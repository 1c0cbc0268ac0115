"""The job under what ``accelerate launch`` or ``torchrun`` started: DDP, FSDP2, DeepSpeed."""

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
"""What a DeepSpeed JSON would say, for engines that read none."""

FILLED_IN = ("lr", "weight_decay")
"""``"auto"`` values of ``optimizer.params`` that accelerate fills in from its ``DummyOptim``."""


class AccelerateSetup(Setup):
    """Lets accelerate decide by the environment, and looks at what it decided."""

    _accelerator: Accelerator

    def connect(self, time_limit: timedelta | None) -> None:
        """Makes the accelerator, which joins the processes."""
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        try:
            check_environment()
            # Told so, accelerate gives up on FSDP and DeepSpeed; not told, on sharing plain work.
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
            # accelerate would have the loss rounded to bf16, too coarse to see training
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, output_dtype=None
            )
        if self._accelerator.mixed_precision == "fp16":  # which accelerate drops on CPUs
            raise InputError(
                "mixed_precision: got fp16; outside DeepSpeed this job has not been made to work "
                "with loss scaling; use bf16 or no"
            )

    def read_config(self) -> dict[str, Any]:
        """The JSON of accelerate's DeepSpeed plugin, if there is one."""
        return without_auto(self._plugin_config) if self._plugin_config else dict(DEFAULTS)

    def check(self, config: dict[str, Any]) -> None:
        """Lets DeepSpeed, and whoever knows what AdaRankGrad needs of it, read `config`."""
        if self._plugin_config is None:
            return
        check_deepspeed_config(config)
        # accelerate may hand over an object, whose rules are stricter, as well as a name
        handed_over = config if self._named_in_json(config) else {**config, "optimizer": None}
        try:
            refuse_unsupported(handed_over, cuda=torch.cuda.is_available())
        except ConfigError as error:
            raise InputError(f"DeepSpeed JSON, {error}") from None

    def build(
        self, model: nn.Module, config: dict[str, Any], batch: Batch, schedule: Schedule
    ) -> Engine:
        """Prepares model and optimizer together, and checks which optimizer came out."""
        self._accelerator.gradient_accumulation_steps = batch.accumulation
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
        """Whether DeepSpeed builds the optimizer, by its name in the JSON."""
        written = self._plugin_config is not None and "optimizer" in self._plugin_config
        return written and config["optimizer"]["type"] != "AdamW"

    def _optimizer(self, model: nn.Module, config: dict[str, Any]) -> Any:
        """An optimizer, or what stands for the JSON's; the plugin's JSON is completed for it."""
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
        """Puts into the plugin's JSON what the command line says; other autos stay accelerate's."""
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
    """Training steps through an accelerator; under DeepSpeed its calls do what is left to do."""

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
        """Goes on with the loss scale of a checkpoint, if both have a dynamic one."""
        if self._has_deepspeed:
            load_loss_scale_state(self.module, state)

    @property
    def _has_deepspeed(self) -> bool:
        return self._accelerator.state.deepspeed_plugin is not None

    def micro_step(self, ids: Tensor) -> Tensor:
        """Forward and backward; on the last micro batch of a step also clipping and the step."""
        accelerator = self._accelerator
        with accelerator.accumulate(self.module):
            loss: Tensor = self.module(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # divides by the accumulation; DeepSpeed steps in it
            if accelerator.sync_gradients:
                if self._clip > 0:
                    accelerator.clip_grad_norm_(self.module.parameters(), self._clip)
                self._prepared.step()
                self._prepared.zero_grad()
                if not accelerator.optimizer_step_was_skipped:
                    # Prepared, it would take as many steps as there are processes.
                    self.scheduler.step()
        return loss


def _check(prepared: Any, wanted: str) -> Optimizer:
    """The optimizer inside `prepared`, which must be the `wanted` one."""
    if wanted == "AdaRankGrad":
        return check_optimizer(prepared)
    inner = innermost(prepared)
    if type(inner) is not torch.optim.AdamW:
        raise ConfigError(
            f"the optimizer that trains is {type(inner).__name__}, not torch's AdamW; with "
            'offload_optimizer set "zero_force_ds_cpu_optimizer": false in the DeepSpeed JSON'
        )
    return inner


def _has_gpu() -> bool:
    """Whether there is a device that accelerate joins processes on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type != "mps"


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())
