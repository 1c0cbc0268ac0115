"""Selects the parameters trained as low-rank matrices; the others use full-rank Adam."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, Unpack

from torch import nn

from arg_dist.config import ConfigError
from arg_dist.coverage import note_use
from arg_dist.heads import HEADS as HEADS
from arg_dist.heads import output_heads
from arg_dist.library_internals import CHECKPOINTED_MODULE, COMPILED_MODEL
from arg_dist.settings import GroupSettings
from arg_dist.sharding.entry import entry_point
from arg_dist.uses import Owner, Place, Use, full_shape, is_added, is_convolution, owner_of, use_of

Kind = Literal["matrix", "convolution", "rest"]

WRAPPERS = (COMPILED_MODEL.name, CHECKPOINTED_MODULE.name)
"""Name components that wrapper modules add."""


@entry_point
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
        targets: modules whose matrices are low-rank; default: all whose weights multiply their
            input (:mod:`arg_dist.uses`): linear layers, attention, fused experts, recurrent layers;
            but no output heads (:mod:`arg_dist.heads`) and no routers.
        exclude: modules kept full-rank, overriding `targets`; embeddings always are.
        convolutions: treat flattened convolution kernels as low-rank too.

    Raises:
        ConfigError: a pattern matches no module.
    """
    kinds: dict[str, Kind] = {}
    for name, use in uses(model, targets=targets, exclude=exclude).items():
        is_low_rank = use == "matrix" or (use == "convolution" and convolutions)
        kinds[name] = use if is_low_rank else "rest"  # type: ignore[assignment]
    return kinds


def uses(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, Use]:
    """Use of each trainable parameter, from which :func:`classify` follows; recorded with each.

    Args:
        model: the model.
        targets: as for :func:`classify`.
        exclude: as for :func:`classify`.

    Raises:
        ConfigError: a pattern matches no module.
    """
    places = _places(model)
    for key, patterns in (("targets", targets), ("exclude", exclude)):
        _check_patterns(key, patterns or (), [place.module_name for place in _flat(places)])
    heads = output_heads(unwrapped(model), by_name=exclude is None)
    modules = {own_name(name): module for name, module in unwrapped(model).named_modules()}
    found: dict[str, Use] = {}
    for used in places:
        each = [_use(place, modules, targets, exclude, heads) for place in used]
        kept = [use for use in each if use in ("embedding", "head", "kept")]
        found[used[0].name] = kept[0] if kept else each[0]
        note_use(used[0].parameter, found[used[0].name])
    return found


@entry_point
def param_groups(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    convolutions: bool = False,
    decay_vectors: bool = True,
    **settings: Unpack[GroupSettings],
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
    compiled = COMPILED_MODEL.get(model)
    if isinstance(compiled, nn.Module):
        return unwrapped(compiled)
    replicated = getattr(model, "module", None)
    if isinstance(replicated, nn.Module) and type(model).__name__.endswith(
        ("DataParallel", "Engine")
    ):
        return unwrapped(replicated)
    return model


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


def _use(
    place: Place,
    modules: Mapping[str, nn.Module],
    targets: Sequence[str] | None,
    exclude: Sequence[str] | None,
    heads: set[int],
) -> Use:
    """How this use of a parameter is to be trained, after `targets` and `exclude`."""
    owner, shape = owner_of(place, modules), full_shape(place.parameter)
    use = use_of(owner, shape, modules)
    if len(shape) < 2:
        return use
    if place.parameter.is_complex():
        return "complex"
    if isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if _matches(place.module_name, exclude or ()):
        return "kept"
    if targets is not None:
        if not _matches(place.module_name, targets):
            return use if use in ("embedding", "vector") else "kept"
        return _use_if_named(owner, shape, use)
    return "head" if id(owner.module) in heads and use != "vector" else use


def _use_if_named(owner: Owner, shape: tuple[int, ...], use: Use) -> Use:
    """Use of a tensor in a module that `targets` names: what is not clearly no matrix is one."""
    is_kernel = is_convolution(owner.module)
    return use if is_kernel or is_added(owner, shape) else "matrix"


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
