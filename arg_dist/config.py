"""Every setting of AdaRankGrad, in one validated model.

The same model checks Python keywords, parameter groups, and the ``optimizer.params`` section of a
DeepSpeed JSON, so a typing error gets the same one-line answer at every front door.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)


def _as_number(size: Any) -> Any:
    """``"1e9"`` as a number, which ByteSize does not read; a truth value is no size."""
    if isinstance(size, bool):
        raise ValueError("a size is no truth value")
    with contextlib.suppress(ValueError, TypeError):
        return float(size)
    return size


Bytes = Annotated[ByteSize, Field(ge=1), BeforeValidator(_as_number), AfterValidator(int)]
"""A size in bytes, at least 1: ``"2GiB"``, ``"1.5 GB"``, ``"1e9"``, or a number."""

Rank = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1, strict=True)]
"""A rank: a whole number, or a fraction of the matrix's shorter dimension (0 < x < 1)."""


class ConfigError(ValueError):
    """A setting is unknown, ill-typed, out of range, or contradicts another one."""


PAPER: dict[str, Any] = {
    "min_rank": 0.15,
    "energy": 0.96,
    "hysteresis": 0.0,
    "residual": "none",
    "min_gap": 1,
    "first_gap": 200,
    "decay": 0.0,
    "power_passes": 2,
    "transport": "paper",
}
"""``preset="paper"``: arXiv 2410.17881 to the letter where it is known, else its official code.

The code bounds the un-squared share of what is discarded by 0.2 (`energy`) and finds bases with
``svd_lowrank`` (`power_passes`). The inner loop ends after 200 steps, since its other end, a
projected gradient with a norm below 1e-4, is not met in training (`decay`). The bounds of the rank
are nowhere told; the upper one is GaLore's.
"""


class AdaRankGradConfig(BaseModel):
    """Settings of :class:`arg_dist.AdaRankGrad`; each may be overridden per parameter group.

    Raises:
        ConfigError: through :func:`parse_config`, naming the key and the nearest valid one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    preset: Literal["recommended", "paper"] = Field(
        "recommended",
        description="defaults of all other settings: what the comparison supports, or the paper's",
    )
    lr: float = Field(1e-3, ge=0, description="learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay of the first and the second moment"
    )
    eps: float = Field(1e-8, ge=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay (AdamW)")

    low_rank: bool = Field(True, description="False: plain full-rank Adam for this group")
    max_rank: Rank = Field(0.25, description="largest rank, or a fraction of the shorter dimension")
    min_rank: Rank = Field(4, description="smallest rank, or a fraction of the shorter dimension")
    energy: float = Field(
        0.8, gt=0, le=1, description="share of ||G||_F^2 to keep: 1 - eta_th of the paper"
    )
    hysteresis: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="how far the share that a rank keeps may be from `energy` before it changes",
    )
    scale: float = Field(0.25, gt=0, description="factor of the low-rank update (GaLore's alpha)")
    residual: Literal["matched", "scaled", "none"] = Field(
        "matched",
        description="the part of the gradient outside the basis: followed, row by row, each "
        "direction as far as one inside (matched) or in proportion to its gradient (scaled, as in "
        "Fira), or dropped",
    )
    residual_growth: float = Field(
        1.01, ge=1, description="largest growth of a `scaled` residual's norm in one step"
    )
    side: Literal["auto", "left", "right"] = Field(
        "auto", description="the dimension the basis spans; auto: the shorter one"
    )
    view: Literal["auto", "stack", "flatten"] = Field(
        "auto",
        description="tensors of 3 and more dimensions: a stack of matrices, or flattened to "
        "`first x rest`; auto: stack for 3 dimensions, flatten beyond",
    )

    max_gap: int = Field(200, ge=1, description="most steps between two refreshes of a basis")
    min_gap: int = Field(20, ge=1, description="fewest steps between two refreshes of a basis")
    first_gap: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="steps until the second basis; the gap doubles from there up to `max_gap`; "
        "default: `min_gap`",
    )
    decay: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="refresh early, within `min_gap` steps, once ||P||_F is below this share of "
        "its value at the refresh; 0: never early",
    )
    oversample: int = Field(8, ge=0, description="extra columns of the sketch")
    power_passes: int = Field(1, ge=0, description="power iterations of the range finder")
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="of the two products of each step, in torch's words: highest is fp32, high "
        "TF32 on GPUs, medium bf16 on CPUs that have it; sums and refreshes are always fp32",
    )
    transport: Literal["squared", "paper", "ldadam", "none"] = Field(
        "squared", description="how the second moment follows the basis"
    )

    state_budget: Bytes | None = Field(
        None,
        description='bytes of optimizer state on all processes together (`"2GiB"`, or a number): '
        "ranks are distributed by energy per byte, so that the sum fits",
    )
    bucket_size: Bytes = Field(
        2**30,
        description='bytes of fp32 weights of the matrices that are under way at a time (`"1GiB"`, '
        "or a number), in two halves that take turns: one computes while the other's messages "
        "travel. Smaller ones need less memory beside the state, and more collectives",
    )
    shard_basis: bool | None = Field(
        None,
        description="keep each basis once over the processes (default), or whole on every owner",
    )
    nonfinite: Literal["error", "skip"] = Field(
        "error", description="a NaN or infinite gradient: raise, naming it, or skip the step"
    )
    time_limit: float = Field(
        1800.0,
        gt=0,
        le=1e7,
        description="seconds that a process waits for the others in one of the optimizer's "
        "collectives before it ends with an error",
    )
    seed: int = Field(0, ge=0, description="seed of the sketches")
    targets: tuple[str, ...] | None = Field(
        None, description="module-name patterns of the low-rank matrices; default: linear layers"
    )
    exclude: tuple[str, ...] | None = Field(
        None, description="module-name patterns kept full-rank; default: embeddings and head"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, Mapping) else None
        return {**PAPER, **values} if preset == "paper" else values

    @field_validator("betas", mode="before")
    @classmethod
    def _two_betas(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and len(value) != 2:
            raise ValueError(f"two numbers are needed, got {len(value)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> AdaRankGradConfig:
        if type(self.max_rank) is type(self.min_rank) and self.max_rank < self.min_rank:
            raise ValueError(
                f"max_rank ({self.max_rank}) is smaller than min_rank ({self.min_rank}): "
                "raise max_rank or lower min_rank"
            )
        if self.min_gap > self.max_gap:
            raise ValueError(
                f"min_gap ({self.min_gap}) is larger than max_gap ({self.max_gap}): "
                "lower min_gap or raise max_gap"
            )
        if self.first_gap is not None and not self.min_gap <= self.first_gap <= self.max_gap:
            raise ValueError(
                f"first_gap ({self.first_gap}) is not between min_gap ({self.min_gap}) and max_gap "
                f"({self.max_gap}): change one of them"
            )
        return self

    @property
    def gap_to_second(self) -> int:
        """Steps from the first basis of a matrix to its second, before they are staggered."""
        return self.min_gap if self.first_gap is None else self.first_gap

    def rank_bounds(self, short: int) -> tuple[int, int]:
        """Smallest and largest rank for a matrix whose shorter dimension is `short`."""
        largest = rank_of(self.max_rank, short)
        return min(rank_of(self.min_rank, short), largest), largest


def rank_of(rank: int | float, short: int) -> int:
    """A rank for a matrix whose shorter dimension is `short`, given as a number or a fraction."""
    return min(rank, short) if isinstance(rank, int) else max(1, round(rank * short))


def in_bytes(number: float) -> str:
    """A number of bytes for people: ``"0 B"``, ``"1.5 KiB"``, ``"12.3 MiB"``."""
    return ByteSize(round(number)).human_readable(separator=" ")


def nearest(key: str, valid: Mapping[str, Any] | list[str]) -> str:
    """`"; did you mean 'max_rank'?"`, or nothing if no valid name is near."""
    close = difflib.get_close_matches(key, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def parse_config(settings: Mapping[str, Any], where: str = "AdaRankGrad") -> AdaRankGradConfig:
    """Validates `settings`; `where` (for instance ``optimizer.params``) leads every message.

    Raises:
        ConfigError: one line per fault, each with the key's path and what is needed.
    """
    try:
        return AdaRankGradConfig.model_validate(dict(settings))
    except ValidationError as error:
        lines: dict[str, str] = {}
        for fault in error.errors():
            key = str(fault["loc"][0]) if fault["loc"] else ""
            if fault["type"] == "extra_forbidden":
                text = "unknown key" + nearest(key, list(AdaRankGradConfig.model_fields))
            elif key in ("max_rank", "min_rank"):
                text = (
                    f"got {fault['input']!r}; a whole number of at least 1, or a fraction of the "
                    "shorter dimension (0 < x < 1), is needed"
                )
            elif key in ("state_budget", "bucket_size"):
                text = (
                    'a size such as "2GiB" or "512MiB", or a number of bytes, is needed, '
                    f"got {fault['input']!r}"
                )
            else:
                message = fault["msg"].removeprefix("Value error, ")
                text = f"{message}, got {fault['input']!r}" if key else message
            lines.setdefault(f"{where}.{key}" if key else where, text)
        raise ConfigError("\n".join(f"{path}: {text}" for path, text in lines.items())) from None
