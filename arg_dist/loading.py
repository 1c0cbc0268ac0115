"""What ``load_state_dict`` accepts: this optimizer's state, or an error that says whose it is.

Everything is checked before anything of the optimizer is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from arg_dist.config import ConfigError, parse_config, settings_at_saving
from arg_dist.packing import is_bytes, is_packed, unpack, unpack_bytes
from arg_dist.parameter_groups import SETTINGS, check_names, keep_newer, members
from arg_dist.state_dict import WHOLE, Holder
from arg_dist.subspace.state import OF_TENSOR, REQUIRED, State, unknown_keys

OURS = ("energy", "max_rank")
"""Settings in every parameter group of AdaRankGrad, and of no other optimizer."""

AFRESH = (
    "AdaRankGrad cannot continue from it; load the model's weights alone and let the optimizer "
    "start afresh"
)


@dataclass
class Loaded:
    """Contents of a state dictionary for this process.

    Attributes:
        calls: steps taken before it was saved.
        holder: the process that the state belongs to; None if that is not known.
        states: states of the matrices and tensors in each target, by name.
        packed: number of matrices and tensors that were saved in packed form.
    """

    calls: int | None
    holder: Holder | None
    states: dict[Tensor, dict[str, State]] = field(default_factory=dict)
    packed: int | None = None

    @property
    def units(self) -> int:
        """Number of matrices and tensors, including those without a gradient so far."""
        return sum(map(len, self.states.values()))


# -- parameter groups ----------------------------------------------------------------------------


def groups_to_load(
    current: Sequence[dict[str, Any]], saved: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The parameter groups of a state dictionary, with the optimizer's own tensors.

    Args:
        current: the optimizer's groups.
        saved: the state dictionary.

    Raises:
        ConfigError: it is of another optimizer or model, or its groups are incomplete.
    """
    _check_form(saved)
    groups = [dict(group) for group in saved["param_groups"]]
    _check_whose(groups, saved["state"])
    _restore_names(groups, current, saved["state"])
    check_names(list(current), groups)
    sizes = [[len(group["params"]) for group in each] for each in (current, groups)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"load_state_dict: the saved parameter groups have {sizes[1]} parameters, and the "
            f"optimizer's have {sizes[0]}; build it with the parameter groups used at saving"
        )
    loaded = []
    for position, (group, own) in enumerate(zip(groups, current, strict=True)):
        where = f"load_state_dict: parameter group {position}"
        named = settings_at_saving(group, where)
        new = {k: deepcopy(v) for k, v in named.items() if k != "params"}
        keep_newer([new], [own])
        settings = {key: new[key] for key in SETTINGS if key != "lr"}
        checked = parse_config({**settings, "lr": _as_number(new["lr"])}, where)
        new.update({key: value for key, value in checked if key != "lr"})
        loaded.append({**new, "params": own["params"]})
    return loaded


def _restore_names(
    groups: Sequence[dict[str, Any]], current: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> None:
    """Name the parameters of saved groups whose names a tool has dropped.

    Their state has its name; what has none is named by its position, as torch does.
    """
    for group, own in zip(groups, current, strict=False):
        if "param_names" not in group and len(group["params"]) == len(own["param_names"]):
            pairs = zip(group["params"], own["param_names"], strict=True)
            group["param_names"] = [_name_in(state.get(index), name) for index, name in pairs]


def _name_in(entry: Any, own: str) -> str:
    """Name of the parameter whose state an entry is; `own` if that can be the one of this name."""
    units = entry.items() if isinstance(entry, Mapping) else ()
    name = next((name for name, unit in units if isinstance(unit, Mapping)), own)
    return own if name.startswith(f"{own}[") else name  # a matrix of a stack


def _as_number(lr: Any) -> Any:
    return float(lr) if isinstance(lr, Tensor) else lr


def _check_form(saved: Any) -> None:
    parts = ("state", "param_groups")
    if isinstance(saved, Mapping) and all(part in saved for part in parts):
        return
    found = ", ".join(map(str, list(saved)[:6])) if isinstance(saved, Mapping) else type(saved)
    raise ConfigError(
        f"load_state_dict: got {found or 'an empty dictionary'}; the dictionary that state_dict() "
        "returned is needed, with state and param_groups"
    )


def _check_whose(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    for position, group in enumerate(groups):
        if not all(key in group for key in OURS):
            keys = sorted(k for k in group if k not in ("params", "param_names"))
            raise ConfigError(
                f"load_state_dict: got the state of {_owner(state)}: its parameter group "
                f"{position} has {', '.join(keys) or 'no settings'}, and no {' and '.join(OURS)}; "
                f"{AFRESH}"
            )
        for key in ("lr", "params"):
            if key not in group:
                raise ConfigError(
                    f"load_state_dict: the saved parameter group {position} has no {key}; pass "
                    "the dictionary that state_dict() returned, unchanged"
                )


def _owner(state: Mapping[Any, Any]) -> str:
    """Whose state it probably is, and what is in it."""
    entries = [entry for entry in state.values() if isinstance(entry, Mapping)]
    keys = sorted({str(key) for entry in entries for key in entry})
    if set(OF_TENSOR) <= set(keys):
        return f"another optimizer, such as AdamW (entries {', '.join(keys[:6])})"
    if "momentum_buffer" in keys:
        return f"another optimizer, such as SGD (entries {', '.join(keys[:6])})"
    return "another optimizer" + (f" (entries {', '.join(keys[:6])})" if keys else "")


def check_shapes(saved: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that the saved state is of parameters of these shapes, where both are known.

    Raises:
        ConfigError: it is of another model; the message has the first difference.
    """
    for name, shape in (saved.get("shapes") or {}).items():
        if name in shapes and list(shape) != list(shapes[name]):
            raise ConfigError(
                f"load_state_dict: the saved state belongs to another model: {name} has the shape "
                f"{tuple(shapes[name])}, and had {tuple(shape)}; build the model as when it was "
                "saved"
            )


# -- states --------------------------------------------------------------------------------------


def states_to_load(
    saved: Mapping[str, Any],
    targets: Sequence[Tensor],
    holder_of: Callable[[Tensor], Holder],
    *,
    merged: bool,
) -> Loaded:
    """The states of a state dictionary for this process.

    Args:
        saved: the state dictionary, whose groups have been checked.
        targets: the tensors of the optimizer's groups.
        holder_of: this process among those that divide the state of a tensor.
        merged: whether a checkpoint that merges all processes by key passes it.

    Raises:
        ConfigError: an entry is not AdaRankGrad's, or of other processes, or is missing.
    """
    by_index = dict(zip(members(saved["param_groups"]), targets, strict=True))
    strangers = [index for index in saved["state"] if index not in by_index]
    if strangers:
        raise ConfigError(
            f"load_state_dict: the saved state has an entry {strangers[0]!r}, which is none of the "
            "parameters in its groups; pass the dictionary that state_dict() returned, unchanged"
        )
    holder = saved.get("process")
    loaded = Loaded(saved.get("calls"), None if holder is None else (holder[0], holder[1]))
    for index, target in by_index.items():
        if index in saved["state"]:
            _read_entry(loaded, index, saved["state"][index], target, holder_of)
    _check_complete(loaded, saved, targets, merged=merged)
    return loaded


def _read_entry(
    loaded: Loaded,
    index: Any,
    entry: Any,
    target: Tensor,
    holder_of: Callable[[Tensor], Holder],
) -> None:
    if not isinstance(entry, Mapping):
        raise _not_ours(index, f"is a {type(entry).__name__}")
    if is_bytes(entry):
        loaded.holder, loaded.calls, loaded.states[target] = unpack_bytes(entry, holder_of(target))
        return
    states = loaded.states[target] = {}
    for name, unit in entry.items():
        if not isinstance(unit, Mapping):
            if not _is_placeholder(unit):
                raise _not_ours(index, f"has {', '.join(map(str, entry))}")
        elif is_packed(unit):
            loaded.holder = holder_of(target)
            packed = unpack(unit, name, tuple(target.shape), loaded.holder)
            loaded.calls, loaded.packed, states[name] = packed
        elif unit and not unit.keys() >= REQUIRED:
            raise _not_ours(index, f"has {', '.join(map(str, unit))} for {name}")
        elif unknown := unknown_keys(unit):
            raise ConfigError(
                f"load_state_dict: the state of {name} has {', '.join(unknown)}, which this "
                "arg_dist does not know; use the version that saved it"
            )
        else:
            states[name] = dict(unit)


def _is_placeholder(value: Any) -> bool:
    """Whether a value that an engine added for its own tools is no state: a number, or zeros."""
    if not isinstance(value, Tensor):
        return isinstance(value, (int, float))
    return not any(value.stride()) or not bool(value.any())


def _not_ours(index: Any, what: str) -> ConfigError:
    return ConfigError(
        f"load_state_dict: the entry {index!r} of the saved state {what}: it is another "
        f"optimizer's; {AFRESH}"
    )


def _check_complete(
    loaded: Loaded, saved: Mapping[str, Any], targets: Sequence[Tensor], *, merged: bool
) -> None:
    """Check that all that was saved has arrived."""
    found = loaded.units
    if loaded.packed is not None and found < loaded.packed:
        raise ConfigError(
            f"load_state_dict: the state of {loaded.packed} matrices and tensors was saved, and "
            f"that of {found} arrived. {_left_out(saved, targets, loaded)}"
        )
    nameless = any("param_names" not in group for group in saved["param_groups"])
    if loaded.calls is None and (found or merged or nameless):
        raise ConfigError(
            "load_state_dict: the saved state has "
            + ("no calls, the steps taken" if found else "no state of any parameter")
            + ": a tool that kept only a part of it has written it; save all of what state_dict() "
            "returned, or with arg_dist.checkpoint"
        )
    loaded.calls = loaded.calls or 0
    of_one = loaded.holder in (None, WHOLE)
    expected = saved.get("units", 1 if loaded.calls and of_one else 0)
    if loaded.packed is None and found < expected:
        raise ConfigError(
            f"load_state_dict: the saved state is of an optimizer that has taken {loaded.calls} "
            f"steps, with the state of at least {expected} matrices and tensors, and that of "
            f"{found} is in it: it was emptied; pass the dictionary that state_dict() returned, "
            "unchanged"
        )


def _left_out(saved: Mapping[str, Any], targets: Sequence[Tensor], loaded: Loaded) -> str:
    names = [name for group in saved["param_groups"] for name in group.get("param_names", ())]
    frozen = [
        name
        for name, target in zip(names, targets, strict=False)  # a tool may have dropped names
        if target not in loaded.states and not target.requires_grad
    ]
    if not frozen:
        return "Build the optimizer with all parameters that it had when it was saved"
    more = f" and {len(frozen) - 1} others" if len(frozen) > 1 else ""
    return (
        f"torch.distributed.checkpoint leaves out frozen parameters ({frozen[0]}{more}): call "
        "requires_grad_(True) on those that have been trained before get_state_dict and "
        "set_state_dict, and freeze them again afterwards"
    )
