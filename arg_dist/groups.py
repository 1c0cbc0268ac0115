"""Selects the parameters trained as low-rank matrices; the others use full-rank Adam."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from arg_dist.config import ConfigError

Kind = Literal["matrix", "convolution", "rest"]

HEADS = ("lm_head", "embed_out", "score", "classifier", "qa_outputs", "cls", "pooler")
"""Common names of output heads; kept full-rank unless a target matches them."""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Name components that wrapper modules add."""


@dataclass(frozen=True)
class Place:
    """One use of a parameter in a model.

    Attributes:
        module_name: dotted name of the module.
        module: the module.
        name: dotted name of the parameter.
        parameter: the parameter.
    """

    module_name: str
    module: nn.Module
    name: str
    parameter: nn.Parameter


def classify(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    convolutions: bool = False,
) -> dict[str, Kind]:
    """Kind of each trainable parameter; a tied parameter appears once, under its first name.

    A pattern is a glob on dotted module names. Leading components may be omitted, and submodules
    match too: ``mlp`` and ``layers.*.mlp`` both match ``model.layers.3.mlp.up_proj``.

    Args:
        model: the model.
        targets: modules whose matrices are low-rank; default: all linear layers (``nn.Linear`` and
            Hugging Face's ``Conv1D``) except output heads.
        exclude: modules kept full-rank, overriding `targets`; embeddings always are.
        convolutions: treat flattened convolution kernels as low-rank too.

    Raises:
        ConfigError: a pattern matches no module.
    """
    places = _places(model)
    for key, patterns in (("targets", targets), ("exclude", exclude)):
        _check_patterns(key, patterns or (), [place.module_name for place in _flat(places)])
    heads = _output_heads(model)
    kinds: dict[str, Kind] = {}
    for used in places:
        kinds[used[0].name] = "rest"
        if any(_is_kept(place, targets, exclude, heads) for place in used):
            continue
        kind = _matrix_kind(used[0], named=targets is not None)
        if kind != "convolution" or convolutions:
            kinds[used[0].name] = kind
    return kinds


def param_groups(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    convolutions: bool = False,
    decay_vectors: bool = True,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Build named parameter groups for :class:`arg_dist.AdaRankGrad`.

    Args:
        model: the model.
        targets: as for :func:`classify`.
        exclude: as for :func:`classify`.
        convolutions: as for :func:`classify`.
        decay_vectors: apply ``weight_decay`` to norms and biases (one dimension) too.
        **settings: settings added to every group.

    Returns:
        Up to four groups: matrices, convolution kernels, the rest with ``low_rank=False``, and,
        split off from the rest, vectors without weight decay.

    Raises:
        ConfigError: a pattern matches no module, or no parameter is trainable.
    """
    kinds = classify(model, targets=targets, exclude=exclude, convolutions=convolutions)
    if not kinds:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: nothing to optimize")
    parameters = dict(named_parameters(model))
    extra: dict[Kind | Literal["vector"], dict[str, Any]] = {
        "matrix": {},
        "convolution": {"view": "flatten"},
        "rest": {"low_rank": False},
        "vector": {"low_rank": False, "weight_decay": 0.0},
    }
    groups = []
    for group, keys in extra.items():
        names = []
        for name, kind in kinds.items():
            is_vector = not decay_vectors and len(full_shape(parameters[name])) < 2
            if group == ("vector" if is_vector else kind):
                names.append(name)
        if names:
            params = [parameters[name] for name in names]
            groups.append({"params": params, "param_names": names, **settings, **keys})
    return groups


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under the model's own names, without the parts that wrappers add.

    Names seed the sketches and are keys of checkpoints, so wrappers (``torch.compile``, DDP) must
    not change them.
    """
    return ((own_name(name), parameter) for name, parameter in unwrapped(model).named_parameters())


def own_name(name: str) -> str:
    """A dotted name without the components that wrapper modules add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DDP or an engine, nested in any order."""
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return unwrapped(compiled)
    replicated = getattr(model, "module", None)
    if isinstance(replicated, nn.Module) and type(model).__name__.endswith(
        ("DataParallel", "Engine")
    ):
        return unwrapped(replicated)
    return model


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's full shape; one sharded at creation records it as ``ds_shape``."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _places(model: nn.Module) -> list[list[Place]]:
    """All uses of each trainable parameter, in order of first use."""
    places: dict[int, list[Place]] = {}
    for module_name, module in unwrapped(model).named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if parameter.requires_grad:
                place = Place(own_name(module_name), module, own_name(name), parameter)
                places.setdefault(id(parameter), []).append(place)
    return list(places.values())


def _flat(places: list[list[Place]]) -> Iterator[Place]:
    return (place for used in places for place in used)


def _output_heads(model: nn.Module) -> set[int]:
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    head = find() if callable(find) else None
    return set() if head is None else {id(head)}


def _is_kept(
    place: Place,
    targets: Sequence[str] | None,
    exclude: Sequence[str] | None,
    heads: set[int],
) -> bool:
    """Whether this use of a parameter keeps it full-rank."""
    if isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    if _matches(place.module_name, exclude or ()):
        return True
    if targets is not None:
        return not _matches(place.module_name, targets)
    return id(place.module) in heads or (exclude is None and _matches(place.module_name, HEADS))


def _matrix_kind(place: Place, *, named: bool) -> Kind:
    if isinstance(place.module, nn.modules.conv._ConvNd):
        return "convolution" if len(full_shape(place.parameter)) > 2 else "rest"
    is_linear = isinstance(place.module, nn.Linear) or type(place.module).__name__ == "Conv1D"
    if (is_linear or named) and len(full_shape(place.parameter)) >= 2:
        return "matrix"
    return "rest"


def _matches(module_name: str, patterns: Sequence[str]) -> bool:
    parts = module_name.split(".")
    enclosing = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
        for pattern in patterns
        for name in enclosing
    )


def _check_patterns(key: str, patterns: Sequence[str], module_names: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in module_names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in module_names if name})
            close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], ends, n=3)
            known = ", ".join(close or ends[:8])
            raise ConfigError(
                f"{key}: the pattern {pattern!r} matches no module; this model has {known}"
            )
