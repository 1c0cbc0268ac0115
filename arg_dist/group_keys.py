"""Keys of a parameter group: settings, keys that other libraries put there, and mistakes.

torch allows any key in a parameter group, and libraries use that: layer-wise learning rates, names
for a monitor, optimizers that wrap another one. Such keys are kept. A key that is a setting by
mistake, in its spelling or in another optimizer's words, is an error.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from arg_dist.config import AdaRankGradConfig, ConfigError, plain

FIELDS = AdaRankGradConfig.model_fields

OF_TORCH = ("params", "param_names")
"""Keys of a parameter group that torch defines."""

OF_OTHERS = frozenset(
    """
    initial_lr max_lr min_lr swa_lr base_lr base_momentum max_momentum lr_scale lr_mult decay_mult
    name names group_name group_id layer_id layer_name tag moe use_muon rho adaptive
    foreach fused capturable
    """.split()
)
"""Keys that schedulers, monitors, model libraries and torch's own optimizers put into groups, and
that need no optimizer to read them."""

OF_OTHER_OPTIMIZERS: dict[str, tuple[Any, str]] = {
    "learning_rate": (None, "the setting is called lr"),
    "alpha": (None, "the setting is called scale"),
    "beta1": (None, "the setting is called betas, a pair"),
    "beta2": (None, "the setting is called betas, a pair"),
    "epsilon": (None, "the setting is called eps"),
    "wd": (None, "the setting is called weight_decay"),
    "rank": (None, "the settings are called max_rank and min_rank"),
    "update_proj_gap": (None, "the settings are called max_gap and min_gap"),
    "proj_type": (None, "the setting is called side"),
    "maximize": (False, "negate the loss, and remove the key"),
    "differentiable": (False, "remove it: no gradient flows through a step"),
    "decoupled_weight_decay": (True, "remove it: weight decay is decoupled, as in AdamW"),
    "amsgrad": (False, "remove it: there is no such variant of AdaRankGrad"),
    "momentum": (0, "the setting is called betas; remove the key"),
    "nesterov": (False, "remove it: there is no such variant of AdaRankGrad"),
    "dampening": (0, "remove it: there is no such variant of AdaRankGrad"),
    "correct_bias": (True, "remove it: the moments' bias is always corrected"),
}
"""Settings of other optimizers: the value that asks for nothing (None: every value asks for
something), and what to do."""

CLOSE = 0.8
"""Similarity (``difflib.SequenceMatcher.ratio``) from which on a key is a misspelled setting."""


def misspelled(key: str) -> str | None:
    """The setting that `key` is meant to be, or None.

    A setting's name with other words next to it (``lr_scale``, ``weight_decay_mult``) is a name of
    its own: it is no misspelling.
    """
    words = set(_words(key))
    best, closeness = None, CLOSE
    for setting in FIELDS:
        ratio = difflib.SequenceMatcher(None, key.lower(), setting).ratio()
        if ratio >= closeness and not set(_words(setting)) < words:
            best, closeness = setting, ratio
    return best


def own_settings(group: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that a parameter group overrides; its other keys are left to their owners.

    Args:
        group: the parameter group.
        where: its name for messages.

    Raises:
        ConfigError: a key resembles a setting, or is a setting of another optimizer.

    Warns:
        UserWarning: a key is neither a setting nor known to belong to another library.
    """
    lines, unknown = [], []
    for key, value in group.items():
        if key in FIELDS or key in OF_TORCH or key in OF_OTHERS:
            continue
        meant = misspelled(str(key))
        if key in OF_OTHER_OPTIMIZERS:
            harmless, instead = OF_OTHER_OPTIMIZERS[key]
            if harmless is None or value != harmless:
                lines.append(
                    f"{where}.{key}: got {value!r}; belongs to another optimizer; {instead}"
                )
        elif meant is not None:
            lines.append(
                f"{where}.{key}: unknown key; did you mean '{meant}'? (a key of another library "
                "is kept, but not one so close to a setting: rename it)"
            )
        else:
            unknown.append(key)
    if lines:
        raise ConfigError("\n".join(lines))
    if unknown:
        warnings.warn(
            f"{where}: {', '.join(map(repr, unknown))}: kept for whoever reads it, but no setting "
            "of AdaRankGrad, and without effect here",
            stacklevel=4,
        )
    return {key: value for key, value in group.items() if key in FIELDS}


# -- settings that are tensors ---------------------------------------------------------------------


def numbers(settings: Mapping[str, Any], where: str = "AdaRankGrad") -> dict[str, Any]:
    """The settings with Python numbers for tensors and NumPy's scalars, alone or in a tuple.

    Args:
        settings: settings by name.
        where: their owner, for messages.

    Raises:
        ConfigError: a tensor has another number of elements than one.
    """
    for key, value in settings.items():
        if isinstance(value, Tensor) and value.numel() != 1 and key != "betas":
            raise ConfigError(
                f"{where}.{key}: got a tensor of shape {tuple(value.shape)}; one number is needed"
            )
    return {key: plain(value) for key, value in settings.items()}


def tensors(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are tensors, alone or in a tuple: their owner may fill them at any time."""
    return {key: value for key, value in settings.items() if any(_tensors(value))}


def assign(group: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a parameter group; a tensor is filled, as its owner and schedulers hold it."""
    held = group.get(key)
    if isinstance(held, Tensor):
        held.detach().fill_(value)
    elif isinstance(held, (tuple, list)) and any(_tensors(held)):
        parts = dict(enumerate(held))
        for i, each in enumerate(value):
            assign(parts, i, each)  # type: ignore[arg-type]
        group[key] = tuple(parts.values())
    else:
        group[key] = value


def _tensors(value: Any) -> Iterator[bool]:
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return (isinstance(part, Tensor) for part in parts)


def _words(name: str) -> list[str]:
    return [word for word in name.lower().split("_") if word]
