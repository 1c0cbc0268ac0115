"""Wrap a library's method where the library offers no hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_WRAPPED = "wrapped_by_arg_dist"


def wrap_method(
    owner: type, name: str, around: Callable[..., Any], *, library: str, tested: str
) -> None:
    """Routes calls of ``owner.name`` through ``around(method, self, ...)``; idempotent.

    Args:
        owner: a class of the library.
        name: name of the method.
        around: receives the library's method, then the caller's arguments including `self`.
        library: name of the library, for the error.
        tested: version of the library with which the wrapper is tested.

    Raises:
        RuntimeError: the installed version of the library has no such method.
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
