"""Types of the settings as keyword arguments (PEP 692): editors and type checkers know them.

:class:`arg_dist.AdaRankGradConfig` has their meaning, bounds and defaults, and validates them when
the program runs. What it accepts in addition, such as a NumPy number, is left out here.
``tests/unit/test_settings.py`` holds the two equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import Tensor


class AdamSettings(TypedDict, total=False):
    """Settings that every Adam has; a tensor of one number is read at every step."""

    lr: float | Tensor
    betas: tuple[float | Tensor, float | Tensor]
    eps: float
    weight_decay: float | Tensor


class MethodSettings(TypedDict, total=False):
    """Other settings that a parameter group may override."""

    low_rank: bool
    max_rank: int | float
    min_rank: int | float
    rank_multiple: int
    energy: float
    hysteresis: float
    scale: float
    full_rank_scale: float
    residual: Literal["orthogonalized", "matched", "scaled", "none"]
    polar_steps: int
    polar_precision: Literal["fp32", "bf16"]
    state_dtype: Literal["fp32", "bf16", "int8"]
    full_rank_state: Literal["fp32", "bf16", "int8"]
    weight_rounding: Literal["nearest", "random"]
    residual_momentum: float
    residual_bits: Literal[2, 4]
    residual_sync_bits: Literal[1, 2, 4]
    residual_back_bits: Literal[1, 2, 4]
    sync_precision: Literal["fp32", "bf16"]
    residual_growth: float
    side: Literal["auto", "left", "right"]
    view: Literal["auto", "stack", "flatten"]
    max_gap: int
    min_gap: int
    first_gap: int | None
    refresh_below: float
    oversample: int
    power_passes: int
    matmul_precision: Literal["highest", "high", "medium"]
    transport: Literal["squared", "paper", "ldadam", "none"]
    shard_basis: bool | None
    nonfinite: Literal["error", "skip"]
    seed: int


class JobSettings(TypedDict, total=False):
    """Settings that apply to the optimizer as a whole; a parameter group cannot override them."""

    preset: Literal["recommended", "pretraining", "finetuning", "paper"]
    state_budget: int | float | str | None
    bucket_size: int | float | str
    gradient_sync: Literal["engine", "sketch"]
    max_grad_norm: float | None
    gradient_budget: int | float | str | None
    collective_timeout: float


class PatternSettings(TypedDict, total=False):
    """Patterns of module names, which apply to the optimizer as a whole, too."""

    targets: Sequence[str] | None
    exclude: Sequence[str] | None


class GroupSettings(AdamSettings, MethodSettings):
    """All settings of a parameter group: those of :func:`arg_dist.param_groups`."""


class Settings(MethodSettings, JobSettings, PatternSettings):
    """Settings of :class:`arg_dist.AdaRankGrad` other than Adam's, which are named there."""
