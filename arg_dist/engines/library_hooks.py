"""A library's method with something of ours around it, where the library has no better place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_WRAPPED = "wrapped_by_arg_dist"


def wrap_method(
    owner: type, name: str, around: Callable[..., Any], *, library: str, tested: str
) -> None:
    """Lets calls of ``owner.name`` go through ``around(method, self, ...)``; once for each method.

    Args:
        owner: a class of the library.
        name: the method.
        around: is given the library's method first, then what the caller gave, `self` included.
        library: its name, for the error.
        tested: the library's version with which this is tested.

    Raises:
        RuntimeError: this version of the library has no such method.
    """
    method = getattr(owner, name, None)
    if method is None:
        raise RuntimeError(
            f"{library}: {owner.__name__} has no {name} in the installed version, which is not "
            f"supported (tested: {tested})"
        )
    if getattr(method, _WRAPPED, False):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)
