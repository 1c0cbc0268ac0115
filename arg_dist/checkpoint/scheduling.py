"""The learning-rate scheduler's state in a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Mapping
from typing import Any

from arg_dist.checkpoint.index import PLAIN_VERSION, CheckpointError, Index
from arg_dist.checkpoint.values import UnstorableError, decode, encode

CODE = (
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    functools.partial,
)
"""Attributes of a scheduler that are not saved; when loading, those of the new one stay."""


def scheduler_state(scheduler: Any) -> Any:
    """Returns the state of a scheduler, encoded; None without one.

    Raises:
        UnstorableError: it has something that cannot be stored; the message has its full path.
    """
    if scheduler is None:
        return None
    state = scheduler.state_dict()
    if _code_in(state):
        state = {key: value for key, value in state.items() if not isinstance(value, CODE)}
    return encode(state, "scheduler")


def check_scheduler(scheduler: Any) -> None:
    """Checks as early as possible that a scheduler's state can be stored.

    Raises:
        CheckpointError: it has something that cannot; the message has its full path.
    """
    try:
        scheduler_state(scheduler)
    except UnstorableError as error:
        raise CheckpointError(str(error)) from None
    except Exception:  # some schedulers have a state only once they have begun
        return


def load_scheduler(scheduler: Any, index: Index) -> None:
    """Restores the state of a scheduler from a checkpoint that has one."""
    state, present = decode(index.scheduler), scheduler.state_dict()
    if index.schema_version == PLAIN_VERSION:
        state = retyped(state, present)
    code = _code_in(present)
    scheduler.load_state_dict({**state, **code} if code else state)


def retyped(stored: Any, present: Any) -> Any:
    """Returns a state that JSON has changed, with the types of a present state.

    Keys of dictionaries became text, tuples became lists, and infinity became None.

    Args:
        stored: what JSON left of it.
        present: a state of the same structure.
    """
    if isinstance(stored, dict) and isinstance(present, dict):
        kinds = {type(key) for key in present}
        [kind] = kinds if len(kinds) == 1 else [str]
        with contextlib.suppress(ValueError):
            if kind in (int, float):
                return type(present)({kind(key): value for key, value in stored.items()})
        return {key: retyped(value, present.get(key)) for key, value in stored.items()}
    if isinstance(stored, list) and isinstance(present, (list, tuple)):
        same = len(stored) == len(present)
        pairs = zip(stored, present, strict=True) if same else ((each, None) for each in stored)
        return type(present)(retyped(*pair) for pair in pairs)
    if stored is None and isinstance(present, float) and not math.isfinite(present):
        return present
    return stored


def _code_in(state: Any) -> dict[Any, Any]:
    """The functions and methods among the attributes of a scheduler."""
    named = state if isinstance(state, Mapping) else {}
    return {key: value for key, value in named.items() if isinstance(value, CODE)}
