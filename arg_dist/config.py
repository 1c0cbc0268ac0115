"""All settings of AdaRankGrad, in one validated model.

The same model validates Python keyword arguments, parameter groups and the ``optimizer.params``
section of a DeepSpeed JSON, so a typo raises the same one-line error at every entry point.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
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
    """Converts ``"1e9"``, which ByteSize does not parse, to a number; rejects booleans."""
    if isinstance(size, bool):
        raise ValueError("a size cannot be a boolean")
    with contextlib.suppress(ValueError, TypeError):
        return float(size)
    return size


Bytes = Annotated[ByteSize, Field(ge=1), BeforeValidator(_as_number), AfterValidator(int)]
"""A size in bytes, at least 1: ``"2GiB"``, ``"1.5 GB"``, ``"1e9"``, or a number."""

Rank = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1, strict=True)]
"""A rank: an integer, or a fraction of the matrix's shorter dimension (0 < x < 1)."""


Bits = Literal[1, 2, 4]


class ConfigError(ValueError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another one."""


FINETUNING: dict[str, Any] = {
    "scale": 1.0,
    "residual": "matched",
    "residual_momentum": 0.0,
    "min_rank": 4,
    "energy": 0.8,
}
"""``preset="finetuning"``, as measured in ``benchmarks/results/2026-11-22-finetuning-cola.md``."""

PRETRAINING: dict[str, Any] = {
    "residual_momentum": 0.9,
    "min_rank": 1,
    "energy": 0.25,
}
"""``preset="pretraining"``, as measured in
``benchmarks/results/2026-11-29-residual-momentum-ranks.md``."""

PAPER: dict[str, Any] = {
    "scale": 0.25,
    "min_rank": 0.15,
    "energy": 0.96,
    "hysteresis": 0.0,
    "residual": "none",
    "residual_momentum": 0.0,
    "min_gap": 1,
    "first_gap": 200,
    "refresh_below": 0.0,
    "power_passes": 2,
    "transport": "paper",
}
"""``preset="paper"``: arXiv 2410.17881 where it specifies a value, else its official code.

The code limits the un-squared share of the discarded energy to 0.2 (`energy`) and computes bases
with ``svd_lowrank`` (`power_passes`). The inner loop ends after 200 steps, because its other exit,
a projected gradient with a norm below 1e-4, is not reached in training (`refresh_below`). Neither
source specifies the bounds of the rank; the upper one is GaLore's.
"""

SKETCH: dict[str, Any] = {"residual_momentum": 0.5}
"""Defaults with ``gradient_sync="sketch"``: momentum averages what few bits round off."""

PRESETS = {"pretraining": PRETRAINING, "finetuning": FINETUNING, "paper": PAPER}
"""What each preset changes of the defaults."""

GAPS = ("min_gap", "first_gap", "max_gap")
"""Settings that must be in this order; see :func:`following_gaps`."""

RENAMED = {"decay": "refresh_below", "time_limit": "collective_timeout"}
"""Settings by their earlier names, which are accepted with a warning and read in what was saved."""

BEFORE = {"residual_momentum": 0.0}
"""Values with which versions trained that did not have these settings."""

_WARNED_OF: set[str] = set()
"""The earlier names that this process has warned of."""


class AdaRankGradConfig(BaseModel):
    """Settings of :class:`arg_dist.AdaRankGrad`; a parameter group may override them.

    Raises:
        ConfigError: from :func:`parse_config`, naming the key and the nearest valid one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    preset: Literal["recommended", "pretraining", "finetuning", "paper"] = Field(
        "recommended",
        description="where the defaults of all other settings come from: `recommended` is a "
        "configuration for pre-training whose results depend on rounding as little as AdamW's; "
        "`pretraining` reaches a lower loss by a momentum in 4 bits, whose rounding differs with "
        "the number of processes; `finetuning` is for pretrained weights; `paper` follows arXiv "
        "2410.17881 and its official code",
    )
    lr: float = Field(1e-3, ge=0, description="learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay rates of the first and second moments"
    )
    eps: float = Field(
        1e-8,
        ge=0,
        description="constant added to the square root of the second moment to avoid division by "
        "zero",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="coefficient of decoupled weight decay, as in AdamW: weights "
        "shrink by `lr * weight_decay` (embeddings and head by `full_rank_scale` times that); 0 "
        "disables it",
    )

    low_rank: bool = Field(
        True,
        description="whether the matrices of a parameter group are trained in low rank; if false, "
        "the whole group is trained with full-rank Adam",
    )
    max_rank: Rank = Field(
        0.25,
        description="largest rank: an integer, or a fraction of the matrix's shorter dimension "
        "(0 < x < 1). A matrix whose shorter dimension does not exceed it is trained with "
        "full-rank Adam",
    )
    min_rank: Rank = Field(
        4,
        description="smallest rank: an integer, or a fraction of the matrix's shorter dimension "
        "(0 < x < 1). A gradient of lower numerical rank gets only the directions it has",
    )
    rank_multiple: int = Field(
        1,
        ge=1,
        description="ranks are rounded up to a multiple of it, as far as `max_rank` allows: tensor "
        "cores are fastest where 16 divides the rank. A matrix then keeps up to "
        "`rank_multiple` - 1 directions more",
    )
    energy: float = Field(
        0.65,
        gt=0,
        le=1,
        description="share of the gradient's energy ||G||_F^2 that a basis must keep, which "
        "determines the rank at each refresh; it is 1 - eta_th of the paper",
    )
    hysteresis: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="tolerance around `energy`: at a refresh the rank changes only if the share "
        "of the energy that it keeps is outside `energy` +/- `hysteresis`, and only as far as "
        "necessary to get inside. 0 always selects the smallest rank that keeps `energy`",
    )
    scale: float = Field(
        0.2,
        gt=0,
        description="factor of the update of low-rank matrices (alpha in GaLore). With an "
        "orthogonalized residual 0.2 gives an update of the size of Adam's at the same `lr`; rates "
        "of their own are in Choosing settings",
    )
    full_rank_scale: float = Field(
        1.0,
        gt=0,
        description="factor of `lr` for all that full-rank Adam trains: embeddings, output heads, "
        "norms, biases",
    )
    residual: Literal["orthogonalized", "matched", "scaled", "none"] = Field(
        "orthogonalized",
        description="what to do with the part of the gradient outside the basis: `orthogonalized` "
        "moves all its directions by the size of Adam's updates, as Muon does; `matched` moves "
        "each row outside as far as inside on average, `scaled` in proportion to the gradient (as "
        "in Fira), `none` drops this part",
    )
    polar_steps: int = Field(
        5,
        ge=1,
        description="Newton-Schulz iterations that orthogonalize the residual, used with "
        '`residual="orthogonalized"` only',
    )
    polar_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="type in which the orthogonalized residual is computed and sent between "
        "processes; `bf16` halves what is sent",
    )
    state_dtype: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="type in which the moments and the basis of matrices are kept: `bf16` takes "
        "half of the memory, `int8`, with a scale for each row, about a quarter; the step computes "
        "in fp32. Checkpoints hold fp32, so a run may go on in another type",
    )
    full_rank_state: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="type in which the moments of embeddings, heads and other tensors that Adam "
        "trains in full rank are kept, as `state_dtype`; those of fewer than 4096 elements stay in "
        "fp32",
    )
    weight_rounding: Literal["nearest", "random"] = Field(
        "nearest",
        description="how weights in bf16 are rounded after a step: `random` rounds up or down, "
        "right on average, so that small steps are not lost where no fp32 copy of the weights "
        "exists; alike on all processes",
    )
    residual_momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a momentum of the residual, which is orthogonalized in its place; 0 "
        'disables it. Used with `residual="orthogonalized"` only; 0.5 by default with '
        '`gradient_sync="sketch"`',
    )
    residual_bits: Literal[2, 4] = Field(
        4,
        description="bits an element of the momentum of the residual: 4 take 6.3 % of AdamW's "
        "state, 2 take 3.2 %",
    )
    residual_sync_bits: Literal[1, 2, 4] = Field(
        2,
        description="bits an element in which a process sends its residual, used with "
        '`gradient_sync="sketch"` only; 1 is the sign',
    )
    residual_back_bits: Literal[1, 2, 4] = Field(
        2,
        description="bits an element in which the mean of the residuals comes back, used with "
        '`gradient_sync="sketch"` only; 1 is the sign',
    )
    residual_growth: float = Field(
        1.01,
        ge=1,
        description="largest factor by which the residual's norm may grow in one step, used with "
        '`residual="scaled"` only',
    )
    side: Literal["auto", "left", "right"] = Field(
        "auto",
        description="dimension of the matrix that the basis spans: `left` the rows, `right` the "
        "columns, `auto` the shorter of the two",
    )
    view: Literal["auto", "stack", "flatten"] = Field(
        "auto",
        description="how a tensor of three or more dimensions is treated: `stack` as a stack of "
        "matrices, `flatten` as one matrix of shape `first x rest`, `auto` as a stack if it has "
        "three dimensions and flattened if it has more",
    )

    max_gap: int = Field(
        200,
        ge=1,
        description="maximum number of steps between two refreshes of a basis. If only `min_gap` "
        "or `first_gap` is given, at least that",
    )
    min_gap: int = Field(
        20,
        ge=1,
        description="minimum number of steps between two refreshes of a basis. If only `max_gap` "
        "or `first_gap` is given, at most that",
    )
    first_gap: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="number of steps from a matrix's first basis to its second, before refreshes "
        "are staggered; the gap then doubles at each refresh, up to `max_gap`. If not set, "
        "`min_gap`",
    )
    refresh_below: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="threshold of early refreshes: if, at least `min_gap` steps after a refresh, "
        "||P||_F is below this share of its value at the refresh, the next refresh follows within "
        "`min_gap` steps. 0 disables early refreshes",
    )
    oversample: int = Field(
        8, ge=0, description="columns of the range finder's sketch in addition to the largest rank"
    )
    power_passes: int = Field(
        1, ge=0, description="number of power iterations of the randomized range finder"
    )
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="precision of the two matrix products of each step, named as in "
        "torch.set_float32_matmul_precision: `highest` is fp32, `high` is TF32 on GPUs, `medium` "
        "is bf16 on CPUs that support it. Sums and refreshes always use fp32",
    )
    transport: Literal["squared", "paper", "ldadam", "none"] = Field(
        "squared",
        description="how the second moment is carried over to a new basis: `squared` by the "
        "squared entries of the rotation, `paper` by the absolute value of the rotated moment "
        "(arXiv 2410.17881), `ldadam` as in arXiv 2410.16103; `none` leaves both moments as they "
        "are, as in GaLore",
    )

    state_budget: Bytes | None = Field(
        None,
        description="limit on the optimizer state of all processes together, in bytes or as a "
        'string such as `"2GiB"`: ranks are distributed by energy per byte so that the total '
        "fits. If not set, there is no limit",
    )
    bucket_size: Bytes = Field(
        ByteSize(2**29),
        description="bytes of projected gradients, bases and whole matrices, at the largest ranks "
        "allowed, that a process has in messages at a time, as a number or a string such as "
        '`"1GiB"`; twice the largest matrix if that is more. The matrices are split into lanes, of '
        "which two alternate: one computes while the messages of the other are in flight. Smaller "
        "values need less temporary memory and more collectives",
    )
    shard_basis: bool | None = Field(
        None,
        description="whether each basis is sharded over the processes that share the matrix (the "
        "default) or, if false, stored whole on each of them (the default with "
        '`gradient_sync="sketch"`)',
    )
    gradient_sync: Literal["engine", "sketch"] = Field(
        "engine",
        description="who averages the gradients of the processes: `engine` expects them averaged; "
        "`sketch` expects each process's own, and sends products with few columns, which is exact, "
        "and the residual in `residual_sync_bits`, for training over a slow network",
    )
    sync_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description='with `gradient_sync="sketch"`, type in which projected gradients, those of '
        "embeddings, head, norms and biases, and the steps that follow from them are sent; sums "
        "are in fp32",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description='with `gradient_sync="sketch"`, the norm to which the mean of the processes\' '
        "gradients is clipped; it is known to 2 % (one standard deviation) without forming the "
        "mean. If not set, it is not clipped",
    )
    gradient_budget: Bytes | None = Field(
        None,
        description='with `gradient_sync="sketch"`, also on one process: limit on the gradients of '
        "low-rank matrices that stay whole after a backward pass, in bytes or as a string such as "
        '`"1GiB"`. All others are projected as soon as they are complete, summed over '
        "micro-batches and freed; matrices whose basis is due, and at the start all, take turns. "
        "If not set, every gradient stays whole until the step",
    )
    nonfinite: Literal["error", "skip"] = Field(
        "error",
        description="what to do if a gradient is NaN or infinite: `error` raises and names the "
        "parameter, `skip` skips the step",
    )
    collective_timeout: float = Field(
        1800.0,
        gt=0,
        le=1e7,
        description="seconds that a process waits for the others in one of the optimizer's "
        "collectives before it raises an error",
    )
    seed: int = Field(0, ge=0, description="seed of the random sketches")
    targets: tuple[str, ...] | None = Field(
        None,
        description="glob patterns of the names of modules whose matrices are trained in low rank; "
        "if not set, all whose weights multiply their input (linear layers, attention, experts, "
        "recurrent layers) except output heads and routers",
    )
    exclude: tuple[str, ...] | None = Field(
        None,
        description="glob patterns of the names of modules that stay full-rank even if `targets` "
        "matches them; if not set, output heads. Embeddings always stay full-rank",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = current_names(values, cls.__name__)
        preset = given.get("preset")
        defaults = PRESETS[preset] if preset in tuple(PRESETS) else {}
        if given.get("gradient_sync") == "sketch":
            defaults = {**SKETCH, **defaults}
        gaps = {key: defaults.get(key, cls.model_fields[key].default) for key in GAPS}
        return {**defaults, **following_gaps(given, gaps), **given}

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
        if self.gradient_sync == "sketch" and self.residual == "scaled":
            raise ValueError(
                'gradient_sync="sketch": residual="scaled" needs the norms of the mean gradient, '
                'which is not formed; use residual="orthogonalized", "matched" or "none"'
            )
        if self.max_grad_norm is not None and self.gradient_sync != "sketch":
            raise ValueError(
                'max_grad_norm is for gradient_sync="sketch"; where gradients are averaged, clip '
                "them before step(), as with torch.nn.utils.clip_grad_norm_ or by the engine"
            )
        if self.gradient_budget is not None and self.gradient_sync != "sketch":
            raise ValueError(
                'gradient_budget is for gradient_sync="sketch", also on one process; where an '
                "engine averages gradients, it needs them whole"
            )
        if self.gradient_budget is not None and self.shard_basis:
            raise ValueError(
                "gradient_budget: every process projects its gradients in the backward pass, and "
                "needs all bases for it; leave shard_basis out"
            )
        return self

    @property
    def goes_home(self) -> bool:
        """Whether a matrix's home process computes with all of it, in each step."""
        return self.residual == "orthogonalized"

    @property
    def remembers_residual(self) -> bool:
        """Whether a momentum of the residual is kept."""
        return self.goes_home and self.residual_momentum > 0

    def shards_basis(self, *, terms: bool) -> bool:
        """Whether a basis is stored once over the processes, instead of whole on each.

        Args:
            terms: every process has gradients of its own, and needs all bases in each step.
        """
        return not terms if self.shard_basis is None else self.shard_basis

    @property
    def gap_to_second(self) -> int:
        """Steps from a matrix's first basis to its second, before refreshes are staggered."""
        return self.min_gap if self.first_gap is None else self.first_gap

    def rank_bounds(self, short: int) -> tuple[int, int]:
        """Smallest and largest rank for a matrix whose shorter dimension is `short`."""
        largest = rank_of(self.max_rank, short)
        return min(rank_of(self.min_rank, short), largest), largest


def current_names(
    settings: Mapping[str, Any], where: str, *, saved: bool = False
) -> dict[str, Any]:
    """The settings under their current names; keys that are no settings stay as they are.

    Args:
        settings: values by name.
        where: their owner, for messages.
        saved: whether they were read from what an earlier version saved: nobody can change the
            names there, so that there is no warning.

    Raises:
        ConfigError: a setting has both its earlier and its current name.

    Warns:
        FutureWarning: a setting has its earlier name; once per name and process.
    """
    current = dict(settings)
    for earlier, name in RENAMED.items():
        if earlier not in current:
            continue
        if name in current:
            raise ConfigError(
                f"{where}: got {earlier} and {name}, the earlier and the current name of one "
                f"setting; remove {earlier}"
            )
        if not saved and earlier not in _WARNED_OF:
            _WARNED_OF.add(earlier)
            warnings.warn(
                f"{where}.{earlier}: the setting is called {name} now; rename it, because the "
                "earlier name will stop working",
                FutureWarning,
                stacklevel=7,  # the call that builds the optimizer
            )
        current[name] = current.pop(earlier)
    return current


def settings_at_saving(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All settings of a parameter group that was saved, by whatever version, as it trained then.

    Args:
        settings: values by name, as they were saved.
        where: their owner, for messages.
    """
    return {**BEFORE, **current_names(settings, where, saved=True)}


def following_gaps(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Gaps between refreshes that are not given, where those that are require another value.

    A gap that is given goes before the default of another: ``max_gap=10`` alone means ``min_gap``
    10, and ``min_gap=300`` alone means ``max_gap`` 300, as no other value is closer to the default.
    What is given does not change; if it contradicts itself, validation fails.

    Args:
        given: settings by name, not validated yet.
        defaults: for each of `GAPS`, its value if no gap is given.
    """
    whole = {key: given[key] for key in GAPS if _is_whole(given.get(key))}
    lowest = whole.get("min_gap", min((defaults["min_gap"], *whole.values())))
    highest = whole.get("max_gap", max((defaults["max_gap"], *whole.values())))
    first = defaults["first_gap"]
    if first is not None:
        first = min(max(first, lowest), highest)
    gaps = {"min_gap": lowest, "first_gap": first, "max_gap": highest}
    return {key: gap for key, gap in gaps.items() if key not in given and gap != defaults[key]}


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 1 and value % 1 == 0


def rank_of(rank: int | float, short: int) -> int:
    """Resolves a rank, given as an integer or a fraction of the shorter dimension `short`."""
    return min(rank, short) if isinstance(rank, int) else max(1, round(rank * short))


def plain(value: Any) -> Any:
    """Converts scalars and short arrays, as NumPy and torch have them, to Python's numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(each) for each in value)
    if not callable(getattr(value, "tolist", None)):
        return value
    values = value.tolist()
    while isinstance(values, list) and len(values) == 1:
        [values] = values
    return plain(values)


def in_bytes(number: float) -> str:
    """Formats a number of bytes: ``"0 B"``, ``"1.5 KiB"``, ``"12.3 MiB"``."""
    return ByteSize(round(number)).human_readable(separator=" ")


def nearest(key: str, valid: Mapping[str, Any] | list[str]) -> str:
    """Returns `"; did you mean 'max_rank'?"`, or an empty string if no valid name is close."""
    close = difflib.get_close_matches(key, list(valid), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def parse_config(settings: Mapping[str, Any], where: str = "AdaRankGrad") -> AdaRankGradConfig:
    """Validates `settings`; every message starts with `where`, e.g. ``optimizer.params``.

    Raises:
        ConfigError: one line per error, each with the key's path and what is needed.
    """
    given = {key: plain(value) for key, value in current_names(settings, where).items()}
    try:
        return AdaRankGradConfig.model_validate(given)
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
