"""Wrap a library's method where the library offers no hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_WRAPPED = "wrapped_by_arg_dist"

LIBRARIES: list[Callable[[], None]] = []
"""Called whenever an optimizer is built or first bound to replicated parameters: each wraps methods
of a library, if that has been imported by then; idempotent."""


def meet_libraries() -> None:
    """Wraps methods of the libraries that have been imported since the last call."""
    for meet in LIBRARIES:
        meet()


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
    if is_wrapped(owner, name):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)


def is_wrapped(owner: type, name: str) -> bool:
    """Whether :func:`wrap_method` has wrapped ``owner.name``."""
    return getattr(getattr(owner, name, None), _WRAPPED, False)


def overriding(owner: type, name: str) -> list[type]:
    """Returns `owner` and those of its subclasses that define the method `name` themselves."""
    children: list[type] = type.__subclasses__(owner)
    below = [each for child in children for each in overriding(child, name)]
    return [owner, *(each for each in dict.fromkeys(below) if name in vars(each))]
