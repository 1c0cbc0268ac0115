"""Wrap a library's method where the library offers no hook."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from arg_dist.library_internals import Internal, check_versions

_WRAPPED = "wrapped_by_arg_dist"

_meetings: tuple[Callable[[], None], ...] = ()


def use_meetings(meetings: tuple[Callable[[], None], ...]) -> None:
    """Sets what is done with libraries that have been imported.

    The package does so once, when it is imported: nothing here may import ``integrations``.

    Args:
        meetings: each checks a library or wraps methods of it, if it has been imported by then;
            idempotent.
    """
    global _meetings
    _meetings = meetings


def meet_libraries() -> None:
    """Checks the versions of libraries and wraps their methods, once they have been imported.

    For whenever an optimizer is built or first bound to replicated parameters.

    Raises:
        RuntimeError: a library is too old.
    """
    check_versions()
    for meet in _meetings:
        meet()


def wrap_method(owner: type, internal: Internal, around: Callable[..., Any]) -> None:
    """Routes calls of a method through ``around(method, self, ...)``; idempotent.

    Args:
        owner: the class of the library, or one that inherits from it.
        internal: the method.
        around: receives the library's method, then the caller's arguments including `self`.

    Raises:
        RuntimeError: the installed version of the library has no such method.
    """
    method = internal.of(owner)
    if is_wrapped(owner, internal):
        return

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(method, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, internal.name, wrapped)


def is_wrapped(owner: type, internal: Internal) -> bool:
    """Whether :func:`wrap_method` has wrapped a method of a class."""
    return getattr(internal.get(owner), _WRAPPED, False)


def overriding(owner: type, internal: Internal) -> list[type]:
    """Returns `owner` and those of its subclasses that define the method themselves."""
    children: list[type] = type.__subclasses__(owner)
    below = [each for child in children for each in overriding(child, internal)]
    return [owner, *(each for each in dict.fromkeys(below) if internal.name in vars(each))]
