"""Check that a checkpoint fits the model, and restore the optimizer's settings from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arg_dist.checkpoint.index import CheckpointError, Group, Index
from arg_dist.config import parse_config, settings_at_saving
from arg_dist.group_keys import assign, numbers
from arg_dist.optimizer import AdaRankGrad
from arg_dist.parameter_groups import SETTINGS
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard

OF_THE_JOB = {
    "low_rank",
    "shard_basis",
    "targets",
    "exclude",
    "collective_timeout",
    "state_budget",
    "bucket_size",
    "gradient_sync",
    "residual_sync_bits",
    "residual_back_bits",
    "sync_precision",
    "max_grad_norm",
    "gradient_budget",
}
"""Settings of the current job that are not restored: how groups are composed and sharded, how
gradients are averaged, and how much memory and time the job may use."""


def check_model(checkpoint: Path, index: Index, optimizer: AdaRankGrad, *, weights: bool) -> None:
    """Checks that a checkpoint has the same parameters as the optimizer.

    Raises:
        CheckpointError: they differ; the message names the first difference.
    """
    if weights and not index.weights:
        raise CheckpointError(
            f"{checkpoint}: contains the optimizer's state only; load the model separately and "
            "pass weights=False"
        )
    saved = {name for group in index.groups for name in group.names}
    ours = {name for group in optimizer.param_groups for name in group["param_names"]}
    for mine, other, who in ((saved, ours, "the model"), (ours, saved, "the checkpoint")):
        missing = sorted(mine - other)
        if missing:
            raise CheckpointError(
                f"{checkpoint}: belongs to another model: {who} has no {missing[0]!r}"
                + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
                + "; build the model and the optimizer as when it was saved"
            )
    for group in optimizer.param_groups:
        _settings_for(checkpoint, index, group)


def trained_before(index: Index, *, weights: bool) -> set[str]:
    """Names of parameters that had trained, which are loaded even if they are frozen now."""
    names = {re.sub(r"\[\d+\]$", "", unit) for unit in index.states} | set(index.states)
    if weights:
        names |= {name for name, weight in index.weights.items() if weight.kind == "trained"}
    return names


def check_plans(checkpoint: Path, index: Index, plans: Iterable[Plan], *, weights: bool) -> None:
    """Checks that every matrix and tensor has the kind and shape of the checkpoint.

    Raises:
        CheckpointError: one differs; the message names the first.
    """
    for plan in plans:
        for fragment in plan.held if weights else ():
            shape = fragment.parameter_shape
            stored = index.weights.get(fragment.name)
            if stored is None or stored.shape != shape:
                has = "no such parameter" if stored is None else f"one of shape {stored.shape}"
                raise CheckpointError(
                    f"{checkpoint}: belongs to another model: {fragment.name} has the shape "
                    f"{shape}, and the checkpoint has {has}"
                )
        for shard in plan.shards:
            entry = index.states.get(shard.name)
            if entry is not None and _kind(shard) != (entry.kind, entry.side):
                raise CheckpointError(
                    f"{checkpoint}: {shard.name} is {_in_words(*_kind(shard))} now, but was "
                    f"{_in_words(entry.kind, entry.side)} when saved; use the settings of that "
                    "job (low_rank, targets, exclude, view, side)"
                )
            if isinstance(shard, MatrixShard) and entry is not None and entry.shape != shard.shape:
                raise CheckpointError(
                    f"{checkpoint}: {shard.name} has the shape {shard.shape}, but "
                    f"{entry.shape} in the checkpoint; use the view setting of that job"
                )


def put_back_settings(optimizer: AdaRankGrad, index: Index) -> list[str]:
    """Restores the saved settings of the optimizer's groups.

    Returns:
        A description of each setting that changed, except the learning rate, which a scheduler
        changes anyway.
    """
    different = {}
    for group in optimizer.param_groups:
        saved = _settings_for(Path(), index, group)
        initial = {"initial_lr": saved.pop("initial_lr")} if "initial_lr" in saved else {}
        before = numbers({key: group[key] for key in SETTINGS})
        settings = parse_config({**before, **saved}, "checkpoint")
        for key, value in settings:
            if before[key] != value and key not in ("lr", *OF_THE_JOB):
                different[key] = f"{key}={value!r} instead of {before[key]!r}"
        put_back(group, {key: value for key, value in settings if key not in OF_THE_JOB})
        put_back(group, initial)
    return list(different.values())


def saved_settings(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns copies of the settings of the optimizer's groups, so that they can be restored."""
    keys = (*SETTINGS, "initial_lr")
    return [numbers({key: group[key] for key in keys if key in group}) for group in groups]


def put_back(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Restores settings of a group; one that is a tensor stays that tensor."""
    for key, value in settings.items():
        assign(group, key, value)


def _settings_for(checkpoint: Path, index: Index, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings saved for a group's parameters, which may span several saved groups."""
    names = set(group["param_names"])
    found: Group | None = None
    for saved in index.groups:
        if names.isdisjoint(saved.names):
            continue
        if found is not None and _comparable(found) != _comparable(saved):
            keys = [k for k, v in _comparable(found).items() if _comparable(saved).get(k) != v]
            raise CheckpointError(
                f"{checkpoint}: {found.names[0]} and {saved.names[0]} were in parameter groups "
                f"with different settings ({', '.join(keys)}) and are now in one; build the "
                "optimizer with the parameter groups of the checkpoint"
            )
        found = saved
    return {} if found is None else _comparable(found)


def _comparable(group: Group) -> dict[str, Any]:
    settings = settings_at_saving(group.settings, "checkpoint")
    return {key: value for key, value in settings.items() if key not in OF_THE_JOB}


def _kind(shard: Shard) -> tuple[str, str | None]:
    return ("matrix", shard.side_name) if isinstance(shard, MatrixShard) else ("tensor", None)


def _in_words(kind: str, side: str | None) -> str:
    return "trained with full-rank Adam" if kind == "tensor" else f"a matrix with a {side} basis"
