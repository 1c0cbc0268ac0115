"""Free-form values as JSON, and back with equal types.

JSON turns tuples into lists and all keys into text, and has neither infinity nor arrays. A value
that it would change is stored with the name of its type, as ``{"$type": "tuple", "value": [...]}``.
Everything else is its own encoding. Decoding looks types up in a table
(:mod:`arg_dist.checkpoint.value_forms`): it imports nothing and calls nothing that a file names.
"""

from __future__ import annotations

import math
from typing import Any

from arg_dist.checkpoint.value_forms import BY_NAME, Form, UnfitError, form_of

TYPE = "$type"
DEEPEST = 100
"""Levels of lists and dictionaries inside each other."""


class UnstorableError(ValueError):
    """A value cannot be stored; the message has its path, the reason and the remedy."""


def encode(value: Any, key: str) -> Any:
    """Returns `value` as JSON, which later changes of `value` do not reach.

    Tensors come back on the CPU, without their graph.

    Args:
        value: numbers, text, dates, paths, arrays and tensors (also those of NumPy), and lists,
            dictionaries, tuples and sets of them.
        key: where the value is from, for the message.

    Raises:
        UnstorableError: something in it cannot be stored; the message has its full path.
    """
    return _encode(value, key, ())


def decode(data: Any) -> Any:
    """Returns a new value equal to the one that :func:`encode` was given, of equal types.

    Raises:
        ValueError: `data` was not encoded here, or by a newer version.
    """
    if isinstance(data, list):
        return [decode(each) for each in data]
    if not isinstance(data, dict):
        return data
    if TYPE not in data:
        return {key: decode(each) for key, each in data.items()}
    name = data[TYPE]
    form = BY_NAME.get(name) if isinstance(name, str) else None
    if form is None:
        raise ValueError(f"values of type {name!r} are not known to this version")
    try:
        return form.rebuild(decode(data["value"]))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"a value of type {name!r} cannot be rebuilt ({error})") from None


def _encode(value: Any, key: str, around: tuple[int, ...]) -> Any:
    kind = type(value)
    if value is None or kind is bool or _survives(value):
        return value
    if id(value) in around:
        raise UnstorableError(f"{key}: contains itself, which JSON cannot hold; store a copy of it")
    if len(around) == DEEPEST:
        raise UnstorableError(f"{key}: is {DEEPEST} levels deep; store it flat")
    around = (*around, id(value))
    if kind is list:
        return [_encode(each, f"{key}[{i}]", around) for i, each in enumerate(value)]
    if kind is dict and TYPE not in value and all(map(_is_text, value)):
        return {name: _encode(each, _below(key, name), around) for name, each in value.items()}
    try:
        form = form_of(value)
        simple = form.reduce(value)
    except UnfitError as reason:
        raise UnstorableError(f"{key}: {reason}") from None
    return {TYPE: form.name, "value": _inner(form, simple, key, around)}


def _inner(form: Form, simple: Any, key: str, around: tuple[int, ...]) -> Any:
    """Encodes what a form was reduced to, under the paths that its owner knows."""
    if form.items == "one":
        return _encode(simple, key, around)
    *rest, items = simple
    if form.items == "each":
        inner = [_encode(each, f"{key}[{i}]", around) for i, each in enumerate(items)]
    else:
        inner = [
            [
                _encode(name, f"{key}, key {name!r}", around),
                _encode(each, _below(key, name), around),
            ]
            for name, each in items
        ]
    return [*(_encode(each, key, around) for each in rest), inner]


def _survives(value: Any) -> bool:
    """Whether a number or text is the same after JSON."""
    kind = type(value)
    if kind is int:
        return bool(value.bit_length() <= _DIGITS)
    return bool(math.isfinite(value)) if kind is float else _is_text(value)


_DIGITS = 4096
"""Bits of integers written in decimal: Python limits how many digits it reads."""


def _is_text(value: Any) -> bool:
    """Whether `value` is text without halves of surrogate pairs, which JSON would join."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _below(key: str, name: Any) -> str:
    simple = isinstance(name, str) and name.isidentifier()
    return f"{key}.{name}" if simple else f"{key}[{name!r}]"
