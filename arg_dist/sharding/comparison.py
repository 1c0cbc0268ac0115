"""Comparison of what the processes bind: settings, parameters, and the weights of replicas."""

from __future__ import annotations

from typing import Any

from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import GroupSpec
from arg_dist.sharding.shard import as_reals


def describe(spec: GroupSpec) -> dict[str, Any]:
    """What must be equal on all processes: settings, and the parameters of a group."""
    return {
        "settings": spec.settings,
        "copy": spec.holding.copy,
        "fragments": [
            {
                "name": fragment.name,
                "shape": tuple(fragment.shape),
                "range": (fragment.start, fragment.stop),
                "weights": _fingerprint(fragment) if spec.holding.replicated else None,
            }
            for fragment in spec.holding.fragments
        ],
    }


def _fingerprint(fragment: Fragment) -> tuple[float, float]:
    """Sum and norm of weights that must be equal on every process."""
    values = as_reals(fragment.view(fragment.target.detach())).double()
    return float(values.sum()), float(values.norm())


def check_agreement(everyone: list[list[dict[str, Any]]]) -> None:
    """Check that all processes describe the same groups.

    Raises:
        RuntimeError: two differ; the message has the first difference.
    """
    first = everyone[0]
    for process, other in enumerate(everyone[1:], start=1):
        if len(other) != len(first):
            _disagree("number of parameter groups", process, len(first), len(other))
        for k, (ours, theirs) in enumerate(zip(first, other, strict=True)):
            if ours["settings"] != theirs["settings"]:
                a, b = first_difference(ours["settings"], theirs["settings"])
                _disagree(f"settings of parameter group {k}", process, a, b)
            if len(ours["fragments"]) != len(theirs["fragments"]):
                _disagree(
                    f"number of parameters in group {k}",
                    process,
                    len(ours["fragments"]),
                    len(theirs["fragments"]),
                )
            for a, b in zip(ours["fragments"], theirs["fragments"], strict=True):
                if (a["name"], a["shape"]) != (b["name"], b["shape"]):
                    _disagree(
                        f"parameters of group {k}",
                        process,
                        f"{a['name']} {a['shape']}",
                        f"{b['name']} {b['shape']}",
                    )
                if a["weights"] is not None and not _alike(a["weights"], b["weights"]):
                    raise RuntimeError(
                        f"{a['name']}: the weights of process {process} of the group differ from "
                        "process 0's; processes of one group must train one model from equal "
                        "weights with averaged gradients (DistributedDataParallel ensures both, "
                        "unless weights are changed on some processes later); pass "
                        "process_group=None if each trains its own model"
                    )


def _alike(ours: tuple[float, float], theirs: tuple[float, float]) -> bool:
    """Whether fingerprints are equal up to reduction order; NaN equals NaN."""
    scale = 1e-6 * (abs(ours[1]) + 1e-30)
    return all(not abs(a - b) > scale for a, b in zip(ours, theirs, strict=True))


def first_difference(ours: str, theirs: str) -> tuple[str, str]:
    """The first items in which two lists of settings differ."""
    for a, b in zip(ours.split("; "), theirs.split("; "), strict=False):
        if a != b:
            return a, b
    return ours, theirs


def _disagree(what: str, process: int, ours: object, theirs: object) -> None:
    raise RuntimeError(
        f"the processes of one group have different {what}: process 0 of the group has {ours}, "
        f"process {process} has {theirs}; build the same model and optimizer on all of them, with "
        "the same settings and the same parameters frozen; pass process_group=None if each trains "
        "its own model"
    )
