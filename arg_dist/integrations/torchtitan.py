"""torchtitan: AdaRankGrad in the ``OptimizersContainer`` of a ``TrainSpec``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Unpack

import torch

from arg_dist.config import ConfigError, parse_config
from arg_dist.optimizer import AdaRankGrad
from arg_dist.settings import Settings

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.protocols.train_spec import TrainSpec


def with_adarankgrad(spec: TrainSpec, **settings: Unpack[Settings]) -> TrainSpec:
    """Returns torchtitan's specification of a model, trained with AdaRankGrad instead of AdamW.

    Register what it returns, under a name of its own, with ``register_train_spec``. Learning rate,
    betas, epsilon and weight decay are those of the job's ``[optimizer]`` section; its ``name`` and
    ``implementation`` have no effect. Hooks that the specification registers on its container, such
    as the load balancing of experts, stay.

    Args:
        spec: a ``TrainSpec`` of torchtitan 0.2.
        **settings: fields of :class:`arg_dist.AdaRankGradConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range; or, when the container is built, see
            :func:`check_job`.
    """
    parse_config(settings, "with_adarankgrad")

    def build(
        model_parts: list[torch.nn.Module],
        optimizer_config: Any,
        parallel_dims: Any,
        ft_manager: Any = None,
    ) -> OptimizersContainer:
        check_job(optimizer_config, parallel_dims, ft_manager)
        container = spec.build_optimizers_fn(
            model_parts, optimizer_config, parallel_dims, ft_manager
        )
        adam = adam_settings(optimizer_config)
        # torchtitan's own have no state before their first step
        container.optimizers = [AdaRankGrad(part, **adam, **settings) for part in model_parts]
        for optimizer in container.optimizers:
            optimizer.register_step_pre_hook(complete_gradients)
        return container

    return dataclasses.replace(spec, build_optimizers_fn=build)


def adam_settings(config: Any) -> dict[str, Any]:
    """Returns the optimizer's settings that torchtitan's ``[optimizer]`` section has."""
    return {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }


def check_job(config: Any, parallel_dims: Any, ft_manager: Any = None) -> None:
    """Refuses jobs whose container AdaRankGrad cannot take the place of.

    Args:
        config: torchtitan's ``[optimizer]`` section.
        parallel_dims: the job's ``ParallelDims``.
        ft_manager: the job's ``FTManager``, if it has one.

    Raises:
        ConfigError: the optimizer would step during the backward pass, or the model is cut into
            pipeline stages, or TorchFT wraps the optimizer.
    """
    if config.early_step_in_backward:
        raise ConfigError(
            "optimizer.early_step_in_backward: got true; AdaRankGrad steps on all gradients "
            'together; set it to false, and pass gradient_sync="sketch" to free gradients during '
            "the backward pass"
        )
    if parallel_dims.pp_enabled:
        raise ConfigError(
            f"parallelism.pipeline_parallel_degree: got {parallel_dims.pp}; AdaRankGrad is not "
            "tested with pipeline stages; set it to 1"
        )
    if ft_manager is not None and ft_manager.enabled:
        raise ConfigError(
            "fault_tolerance.enable: got true; AdaRankGrad's collectives do not follow TorchFT's "
            "quorum; set it to false"
        )


def complete_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Sums gradients that tensor parallelism left in parts: those of norms that it replicates.

    A hook before each step; collective over the mesh of each such gradient.

    Args:
        optimizer: the optimizer that is about to step.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            placements = getattr(gradient, "placements", ())
            if any(placement.is_partial() for placement in placements):
                parameter.grad = gradient.redistribute(placements=parameter.placements)
