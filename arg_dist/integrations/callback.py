"""Optimizer metrics in the logs of ``transformers.Trainer``, for every reporting integration."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from arg_dist.config import ConfigError
from arg_dist.engines.patching import wrap_method
from arg_dist.integrations.accelerate import innermost
from arg_dist.integrations.trainer import check_processes
from arg_dist.library_internals import METRICS_LOGGED
from arg_dist.optimizer import AdaRankGrad
from arg_dist.telemetry import OptimizerSample, sample_optimizer


class AdaRankGradCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Adds ranks, energy and sizes to the Trainer's training logs before they are reported.

    ``Trainer(..., callbacks=[AdaRankGradCallback()])``

    =========================== ====================================================================
    key                         meaning
    =========================== ====================================================================
    ``rank_mean``, ``rank_min`` over the low-rank matrices of the model
    and ``rank_max``
    ``energy_mean``             mean share of the gradients' energy kept at the last refreshes
    ``optimizer_state_bytes``   optimizer state on the process that has most
    ``optimizer_state_share``   as a share of AdamW's, on the process where it is largest
    ``optimizer_sent_bytes``    sent by the optimizer per step since the last log, on the process
                                that sends most
    ``optimizer_collectives``   collectives of the optimizer per step since the last log
    ``rank/NAME``               rank of each matrix, with `matrices`
    =========================== ====================================================================

    They are also in ``trainer.state.log_history``. Gathering them is a collective, so every process
    needs the callback. When training begins, it checks that AdaRankGrad is the optimizer.

    Args:
        every: minimum number of steps between two logs with these metrics; None adds them to every
            training log.
        matrices: whether to log the rank of each matrix as well.

    Raises:
        ConfigError: `every` is not a positive whole number.
    """

    def __init__(self, every: int | None = None, *, matrices: bool = False) -> None:
        if every is not None and (not isinstance(every, int) or every < 1):
            raise ConfigError(
                f"every: got {every!r}; a whole number of steps (at least 1) or None is needed"
            )
        self.every = every
        self.matrices = matrices
        self._optimizer: Optimizer | None = None
        self._sampled_step = 0
        self._sampled = OptimizerSample()
        _introduce()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks that AdaRankGrad is the optimizer, and that the processes train together.

        Raises:
            ConfigError: another optimizer trains (the message names it and the likely causes), or
                the Trainer's number of processes is wrong.
        """
        check_processes(args)
        self._optimizer = _adarankgrad_in(kwargs.get("optimizer"))
        self._sampled_step = state.global_step
        self._sampled = sample_optimizer(self._optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Releases the optimizer."""
        self._optimizer = None

    def add_numbers(self, logs: dict[str, Any], state: Any, control: Any) -> None:
        """Adds the metrics to `logs` if they are due; a collective.

        ``should_log`` distinguishes the Trainer's own training log, written on all processes,
        from logs written on a single one.
        """
        steps = state.global_step - self._sampled_step
        if self._optimizer is None or not control.should_log or "loss" not in logs:
            return
        if steps < (self.every or 1):
            return
        sample = sample_optimizer(self._optimizer)
        numbers = self._numbers(sample, steps)
        self._sampled_step, self._sampled = state.global_step, sample
        logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)  # it is a copy of `logs`

    def _numbers(self, sample: OptimizerSample, steps: int) -> dict[str, float]:
        numbers: dict[str, float] = {}
        if sample.ranks:
            ranks = sample.ranks.values()
            numbers.update(rank_mean=fmean(ranks), rank_min=min(ranks), rank_max=max(ranks))
            numbers["energy_mean"] = fmean(sample.energy.values())
        numbers["optimizer_state_bytes"] = max(sample.state_bytes)
        if sample.largest_share is not None:
            numbers["optimizer_state_share"] = sample.largest_share
        since = zip(sample.sent_bytes, self._sampled.sent_bytes, strict=True)
        numbers["optimizer_sent_bytes"] = max(now - before for now, before in since) / steps
        collectives = sample.collectives - self._sampled.collectives
        numbers["optimizer_collectives"] = collectives / steps
        if self.matrices:
            numbers.update({f"rank/{name}": rank for name, rank in sample.ranks.items()})
        return numbers


def _adarankgrad_in(prepared: Any) -> AdaRankGrad:
    """Returns the AdaRankGrad inside the Trainer's optimizer."""
    inner = innermost(prepared)
    if not isinstance(inner, AdaRankGrad):
        raise ConfigError(
            f"optimizer: {type(inner).__name__} trains this model, not AdaRankGrad. Pass "
            "optimizer_cls_and_kwargs=arg_dist.for_trainer(args) to the Trainer, not "
            "`optimizers=`, which it drops under DeepSpeed; or name AdaRankGrad in the DeepSpeed "
            'JSON. If the JSON offloads the optimizer, set "zero_force_ds_cpu_optimizer": false '
            "in it: otherwise accelerate replaces every other optimizer with DeepSpeedCPUAdam"
        )
    return inner


def _introduce() -> None:
    """Makes callbacks of this class extend the logs before any callback reads them; idempotent.

    The Trainer passes its logs to one callback after another. Callbacks that report (to TensorBoard
    and others) precede the user's, and a callback has no access to the others.

    Raises:
        RuntimeError: this version of transformers does not have the method to be wrapped.
    """
    wrap_method(CallbackHandler, METRICS_LOGGED, _on_log)


def _on_log(
    on_log: Callable[..., Any],
    handler: Any,
    args: Any,
    state: Any,
    control: Any,
    logs: dict[str, Any],
    **kwargs: Any,
) -> Any:
    for callback in handler.callbacks:
        if isinstance(callback, AdaRankGradCallback):
            callback.add_numbers(logs, state, control)
    return on_log(handler, args, state, control, logs, **kwargs)
