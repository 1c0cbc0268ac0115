"""Whether a checkpoint is one of this model, and which settings come back with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arg_dist.checkpoint.index import CheckpointError, Group, Index
from arg_dist.config import parse_config
from arg_dist.optimizer import AdaRankGrad
from arg_dist.parameter_groups import SETTINGS
from arg_dist.sharding.plan import Plan
from arg_dist.sharding.shard import MatrixShard, Shard

OF_THE_JOB = {
    "low_rank",
    "shard_basis",
    "targets",
    "exclude",
    "time_limit",
    "state_budget",
    "bucket_size",
}
"""Settings that say how the groups are made up, how they lie, or what this job has room for; they
stay as they are now."""


def check_model(checkpoint: Path, index: Index, optimizer: AdaRankGrad, *, weights: bool) -> None:
    """Checks that a checkpoint has the parameters that the optimizer has.

    Raises:
        CheckpointError: naming the first difference.
    """
    if weights and not index.weights:
        raise CheckpointError(
            f"{checkpoint}: holds the optimizer's state only; load the model by other means and "
            "give weights=False"
        )
    saved = {name for group in index.groups for name in group.names}
    ours = {name for group in optimizer.param_groups for name in group["param_names"]}
    for mine, other, who in ((saved, ours, "the model"), (ours, saved, "the checkpoint")):
        missing = sorted(mine - other)
        if missing:
            raise CheckpointError(
                f"{checkpoint}: a checkpoint of another model: {who} has no {missing[0]!r}"
                + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
                + "; build the model and the optimizer as they were"
            )
    for group in optimizer.param_groups:
        _settings_for(checkpoint, index, group)


def check_plans(checkpoint: Path, index: Index, plans: Iterable[Plan], *, weights: bool) -> None:
    """Checks that every matrix and tensor is what it was.

    Raises:
        CheckpointError: naming the first that is not.
    """
    for plan in plans:
        for fragment in plan.held if weights else ():
            shape = fragment.parameter_shape
            stored = index.weights.get(fragment.name)
            if stored is None or stored.shape != shape:
                has = "no such parameter" if stored is None else f"one of shape {stored.shape}"
                raise CheckpointError(
                    f"{checkpoint}: a checkpoint of another model: {fragment.name} has the shape "
                    f"{shape}, and the checkpoint {has}"
                )
        for shard in plan.shards:
            entry = index.states.get(shard.name)
            if entry is not None and _kind(shard) != (entry.kind, entry.side):
                raise CheckpointError(
                    f"{checkpoint}: {shard.name} is {_in_words(*_kind(shard))} now, and was "
                    f"{_in_words(entry.kind, entry.side)}; give the optimizer the settings "
                    "(low_rank, targets, exclude, view, side) that it had"
                )
            if isinstance(shard, MatrixShard) and entry is not None and entry.shape != shard.shape:
                raise CheckpointError(
                    f"{checkpoint}: {shard.name} has the shape {shard.shape}, and in the "
                    f"checkpoint {entry.shape}; view decides it"
                )


def put_back_settings(optimizer: AdaRankGrad, index: Index) -> list[str]:
    """Gives the optimizer's groups the settings that were saved.

    Returns:
        What is different now from what was given, in words; the learning rate, which a scheduler
        moves, is not mentioned.
    """
    different = {}
    for group in optimizer.param_groups:
        saved = _settings_for(Path(), index, group)
        initial = {"initial_lr": saved.pop("initial_lr")} if "initial_lr" in saved else {}
        settings = parse_config({**{key: group[key] for key in SETTINGS}, **saved}, "checkpoint")
        for key, value in settings:
            if group[key] != value and key not in ("lr", *OF_THE_JOB):
                different[key] = f"{key}={value!r} instead of {group[key]!r}"
        group.update({key: value for key, value in settings if key not in OF_THE_JOB})
        group.update(initial)
    return list(different.values())


def saved_settings(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of the optimizer's groups, to be put back."""
    keys = (*SETTINGS, "initial_lr")
    return [{key: group[key] for key in keys if key in group} for group in groups]


def _settings_for(checkpoint: Path, index: Index, group: Mapping[str, Any]) -> dict[str, Any]:
    """What was saved for a group's parameters, which may have been in several groups."""
    names = set(group["param_names"])
    found: Group | None = None
    for saved in index.groups:
        if names.isdisjoint(saved.names):
            continue
        if found is not None and _comparable(found) != _comparable(saved):
            keys = [k for k, v in _comparable(found).items() if _comparable(saved).get(k) != v]
            raise CheckpointError(
                f"{checkpoint}: {found.names[0]} and {saved.names[0]} were in parameter groups "
                f"with different settings ({', '.join(keys)}), and are in one now; build the "
                "optimizer with the groups that it had"
            )
        found = saved
    return {} if found is None else _comparable(found)


def _comparable(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.settings.items() if key not in OF_THE_JOB}


def _kind(shard: Shard) -> tuple[str, str | None]:
    return ("matrix", shard.side_name) if isinstance(shard, MatrixShard) else ("tensor", None)


def _in_words(kind: str, side: str | None) -> str:
    return "left to full-rank Adam" if kind == "tensor" else f"a matrix with a {side} basis"
