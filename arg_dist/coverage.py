"""What share of a model is trained in low rank, and what is left to full-rank Adam, in words."""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from arg_dist.config import AdaRankGradConfig
from arg_dist.parameter_groups import settings_of, trained_views
from arg_dist.uses import Use, full_shape

NOTED_USE = "_arg_dist_use"
"""Attribute of a parameter that notes its use in the model."""

TOLERATED = 0.1
"""Share of the elements of matrices that may be left to Adam without a warning."""

NAMED = 4
"""Maximum number of modules named in a message; the others are counted."""

PLURALS: dict[Use, str] = {
    "embedding": "embeddings",
    "head": "output heads",
    "router": "routers",
    "vector": "norms, biases and other vectors",
    "complex": "complex tensors",
    "convolution": "convolutions",
    "matrix": "matrices no larger than max_rank",
    "kept": "what targets and exclude leave",
    "other": "tensors of unknown use",
}
"""Words for the uses of the parameters that full-rank Adam trains."""

log = logging.getLogger("arg_dist")


@dataclass(frozen=True)
class Part:
    """One parameter of an optimizer.

    Attributes:
        name: its name.
        shape: its full shape.
        use: its use in the model; None if unknown, as for bare parameters.
        matrices: number of low-rank matrices in it; 0 if full-rank Adam trains it.
        is_guess: its use was concluded from its name or shape, without the model.
    """

    name: str
    shape: tuple[int, ...]
    use: Use | None
    matrices: int = 0
    is_guess: bool = False

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)

    @property
    def is_left(self) -> bool:
        """Whether it might be in low rank, and nobody has asked that it is not."""
        left = ("router", "convolution", "matrix", "other")
        return not self.matrices and self.use in left and len(self.shape) > 1


def note_use(parameter: Tensor, use: Use) -> None:
    """Note the use of a parameter with it, for the optimizers that will train it."""
    setattr(parameter, NOTED_USE, use)


def needs_no_guess(parameter: Tensor) -> bool:
    """Whether a parameter's use is noted, or its shape unknown until it has been used."""
    return hasattr(parameter, NOTED_USE) or is_lazy(parameter)


class Coverage:
    """The parameters of an optimizer, and how much of them is trained in low rank."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self._is_told = False

    def add(self, name: str, parameter: Tensor, guess: Use | None = None) -> None:
        """Add a parameter of the optimizer; `guess` is its use, concluded without the model."""
        if parameter.requires_grad and not is_lazy(parameter):
            noted: Use | None = getattr(parameter, NOTED_USE, None)
            use: Use | None = "complex" if parameter.is_complex() else guess or noted
            self._parts[name] = Part(name, full_shape(parameter), use, is_guess=guess is not None)

    def rename(self, names: Mapping[str, str], uses: Mapping[str, Use]) -> None:
        """Rename parameters; `uses` are those of the model's, by new name."""
        renamed = {}
        for old, part in self._parts.items():
            name = names.get(old, old)
            renamed[name] = replace(part, name=name, use=uses.get(name, part.use), is_guess=False)
        self._parts = renamed

    def tell(
        self,
        groups: Iterable[Mapping[str, Any]],
        full_rank: Collection[str],
        *,
        is_classified: bool,
        aloud: bool,
    ) -> None:
        """Log what is trained in low rank, and warn of what may be an oversight; once.

        Args:
            groups: the optimizer's parameter groups.
            full_rank: names of parameters that full-rank Adam trains whatever their shape.
            is_classified: whether someone chose what is trained in low rank.
            aloud: whether this is the process that reports.
        """
        if self._is_told or not aloud:
            return
        self._is_told = True
        parts = self._trained(groups, full_rank)
        log.info(summary(parts))
        known = (part.use for part in parts if not part.is_guess)
        is_known = is_classified or any(use not in (None, "complex") for use in known)
        text = oversight(parts) if is_known else of_bare_parameters(parts)
        if text:
            warnings.warn(text, stacklevel=2)

    def _trained(
        self, groups: Iterable[Mapping[str, Any]], full_rank: Collection[str]
    ) -> list[Part]:
        found = []
        for group in groups:
            settings = settings_of(group)
            for name in group["param_names"]:
                if name in self._parts:
                    found.append(_with_matrices(self._parts[name], settings, name in full_rank))
        return found


def summary(parts: Sequence[Part]) -> str:
    """One line: how much is in low rank, and what full-rank Adam trains."""
    total = sum(part.numel for part in parts)
    count = sum(part.matrices for part in parts)
    low_rank = sum(part.numel for part in parts if part.matrices)
    left: Counter[str] = Counter()
    for part in parts:
        if not part.matrices:
            left[PLURALS[part.use] if part.use else "other parameters"] += part.numel
    rest = ", ".join(f"{words} {_percent(numel, total)}" for words, numel in left.most_common())
    return (
        f"AdaRankGrad trains {count} matrices in low rank, {_percent(low_rank, total)} of "
        f"{total:,} weights; full-rank Adam trains {rest or 'nothing'}"
    )


def oversight(parts: Sequence[Part]) -> str:
    """A warning if much that might be in low rank is left to Adam; else empty."""
    left = [part for part in parts if part.is_left]
    numel = sum(part.numel for part in left)
    total = numel + sum(part.numel for part in parts if part.matrices)
    if not total or numel <= TOLERATED * total:
        return ""
    places = Counter[str]()
    for part in left:
        places[f"{part.name} {part.shape}"] += part.numel
    names = [name for name, _ in places.most_common(NAMED)]
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return (
        f"AdaRankGrad: full-rank Adam trains {_percent(numel, total)} of the weights of matrices "
        f"outside embeddings and output heads: {', '.join(names)}{more}. To train them in low "
        f"rank, {'; '.join(remedies(parts))}"
    )


def remedies(parts: Sequence[Part]) -> list[str]:
    """What would train the parameters in low rank that are left to Adam."""
    left = [part for part in parts if part.is_left]
    found = []
    asked = [_pattern(part.name) for part in left if part.use in ("other", "router")]
    if any(asked):
        chosen = [part for part in parts if part.matrices or part.use in ("matrix", "other")]
        patterns = sorted({_pattern(part.name) for part in chosen} - {""})
        found.append(f"pass targets={patterns} (an entry that is not wanted can be left out)")
    if not all(asked):  # of the model itself, which no pattern names
        found.append("give parameters of the model itself a group of their own with low_rank=True")
    if any(part.use == "convolution" for part in left):
        found.append("pass convolutions=True to arg_dist.param_groups")
    if any(part.use == "matrix" for part in left):
        found.append("lower max_rank below their shorter dimension")
    return found


def of_bare_parameters(parts: Sequence[Part]) -> str:
    """A warning that nothing is known of the model; empty if nothing is in low rank."""
    count = sum(part.matrices > 0 for part in parts)
    if not count:
        return ""
    found = [f"{part.name} {part.shape}" for part in parts if part.is_guess]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    apart = "embeddings and output heads, if there are any, as well"
    if found:
        apart = f"but for embeddings and output heads: {', '.join(found[:NAMED])}{more}"
    return (
        f"AdaRankGrad: built from bare parameters, without the model: every tensor of two or more "
        f"dimensions is trained in low rank ({count}), {apart}. Pass the model "
        "(AdaRankGrad(model, ...)), which says what they are, or groups with low_rank=True and "
        "low_rank=False"
    )


def _with_matrices(part: Part, settings: AdaRankGradConfig, is_full_rank: bool) -> Part:
    views = [] if is_full_rank else trained_views(part.name, part.shape, settings)
    asked = settings.low_rank or part.use != "matrix"
    return replace(part, matrices=len(views), use=part.use if asked else "kept")


def _pattern(name: str) -> str:
    """The last words of a parameter's module, which match it in every layer."""
    module = name.rpartition(".")[0].partition(".parametrizations")[0]
    return next((word for word in reversed(module.split(".")) if not word.isdigit()), "")


def _percent(part: int, total: int) -> str:
    return f"{100 * part / max(1, total):.3g} %"
