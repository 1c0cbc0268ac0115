"""The types of values that JSON would change, and how each is stored."""

from __future__ import annotations

import base64
import datetime
import decimal
import pathlib
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_ARRAY = 2**24
"""Bytes of the largest array or tensor that is stored; a larger one belongs in a file."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}

_FACTORIES: dict[str, Any] = {
    "None": None,
    **{each.__name__: each for each in (int, float, complex, bool, str, list, dict, set, tuple)},
}
"""Defaults of a defaultdict that are known by name."""


class UnfitError(Exception):
    """Why a value cannot be stored, and what to do."""


class Form(NamedTuple):
    """How values of one type are stored.

    Attributes:
        name: in the file.
        kind: their type.
        reduce: to simpler values, which are encoded in turn.
        rebuild: from the simpler values.
        items: whether the simpler value is `one`; or ends with a list of the value's elements
            (`each`) or of its keys and values (`pairs`).
    """

    name: str
    kind: type
    reduce: Callable[[Any], Any]
    rebuild: Callable[[Any], Any]
    items: str = "one"


def _pairs(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    _hashed_by_value(mapping)
    return list(mapping.items())


def _hashed_by_value(keys: Iterable[Any]) -> Iterable[Any]:
    for each in keys:
        if isinstance(each, Tensor):
            raise UnfitError(
                "has a tensor as a key or in a set, where it stands for the object itself; use "
                "its name or its values"
            )
    return keys


def _default(mapping: defaultdict[Any, Any]) -> str:
    for name, factory in _FACTORIES.items():
        if mapping.default_factory is factory:
            return name
    raise UnfitError(
        f"got a defaultdict of {mapping.default_factory!r}, which is code; use a plain dict, or "
        f"one of the defaults {', '.join(_FACTORIES)}"
    )


def _time(value: datetime.datetime) -> list[Any]:
    if value.tzinfo is not None and type(value.tzinfo) is not datetime.timezone:
        raise UnfitError(
            f"got a time in the zone {value.tzinfo}, whose rules are not stored; convert it with "
            ".astimezone(datetime.timezone.utc)"
        )
    return [value.isoformat(), value.fold]


def _array(value: np.ndarray[Any, Any] | np.generic) -> list[Any]:
    dtype = value.dtype
    if dtype.hasobject or np.dtype(dtype.str) != dtype:
        raise UnfitError(f"got an array of dtype {dtype}; use one of numbers or text")
    return [dtype.str, list(value.shape), _bytes(value.nbytes, value.tobytes)]


def _from_array(stored: list[Any]) -> np.ndarray[Any, Any]:
    name, shape, content = stored
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise ValueError(f"dtype {name}")
    return np.ndarray(shape, dtype, buffer=_content(content)).copy()


def _tensor(value: Tensor) -> list[Any]:
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        raise UnfitError(
            f"got a tensor that is not a dense one in memory ({value.layout}, {value.device}); "
            "use its .to_dense() or its values"
        )
    shape, name = list(value.shape), str(value.dtype).removeprefix("torch.")

    def content() -> bytes:
        dense = torch.empty(value.numel(), dtype=value.dtype, device="cpu")
        dense.copy_(value.detach().reshape(-1))
        return bytes(dense.view(torch.uint8).numpy().tobytes())

    return [name, shape, _bytes(value.nbytes, content)]


def _from_tensor(stored: list[Any]) -> Tensor:
    name, shape, content = stored
    flat = torch.from_numpy(np.frombuffer(bytearray(_content(content)), np.uint8))
    return flat.view(_DTYPES[name]).reshape(shape)


def _bytes(size: int, content: Callable[[], bytes]) -> str:
    if size > LARGEST_ARRAY:
        raise UnfitError(
            f"got an array of {size} bytes; up to {LARGEST_ARRAY} are stored with the index: save "
            "it to a file of its own, and store the file's name"
        )
    return base64.b64encode(content()).decode()


def _content(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _each(name: str, kind: type) -> Form:
    return Form(name, kind, lambda value: [list(value)], lambda stored: kind(stored[0]), "each")


def _hashed(name: str, kind: type) -> Form:
    def reduce(value: Any) -> list[Any]:
        return [list(_hashed_by_value(value))]

    return Form(name, kind, reduce, lambda stored: kind(stored[0]), "each")


def _mapping(name: str, kind: type) -> Form:
    def rebuild(stored: list[Any]) -> Any:
        return kind(dict(stored[0]))

    return Form(name, kind, lambda value: [_pairs(value)], rebuild, "pairs")


def _text(name: str, kind: type, write: Callable[[Any], str] = str) -> Form:
    return Form(name, kind, write, kind)


FORMS = (
    _mapping("dict", dict),
    _mapping("OrderedDict", OrderedDict),
    _mapping("Counter", Counter),
    Form("defaultdict", defaultdict, lambda value: [_default(value), _pairs(value)],
          lambda stored: defaultdict(_FACTORIES[stored[0]], stored[1]), "pairs"),
    _each("tuple", tuple),
    _each("torch.Size", torch.Size),
    _hashed("set", set),
    _hashed("frozenset", frozenset),
    Form("deque", deque, lambda value: [value.maxlen, list(value)],
          lambda stored: deque(stored[1], stored[0]), "each"),
    _text("float", float, repr),  # nan, inf and -inf
    Form("int", int, hex, lambda text: int(text, 16)),
    Form("str", str, lambda value: value.encode("utf-8", "surrogatepass").hex(),
          lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass")),
    Form("complex", complex, lambda value: [value.real, value.imag], lambda two: complex(*two)),
    Form("bytes", bytes, lambda value: _bytes(len(value), lambda: value), _content),
    Form("bytearray", bytearray, lambda value: _bytes(len(value), lambda: value),
          lambda text: bytearray(_content(text))),
    Form("range", range, lambda value: [value.start, value.stop, value.step],
          lambda three: range(*three)),
    Form("datetime", datetime.datetime, _time,
          lambda two: datetime.datetime.fromisoformat(two[0]).replace(fold=two[1])),
    Form("date", datetime.date, lambda value: value.isoformat(), datetime.date.fromisoformat),
    Form("timedelta", datetime.timedelta,
          lambda value: [value.days, value.seconds, value.microseconds],
          lambda three: datetime.timedelta(*three)),
    _text("Decimal", decimal.Decimal),
    _text("UUID", uuid.UUID),
    _text("Path", type(pathlib.Path())),
    _text("PurePath", pathlib.PurePosixPath),
    _text("numpy.str_", np.str_),
    _text("numpy.dtype", np.dtype, lambda value: _array(np.empty(0, value))[0]),
    Form("numpy.ndarray", np.ndarray, _array, _from_array),
    Form("numpy.generic", np.generic, _array, lambda stored: _from_array(stored)[()]),
    Form("torch.Tensor", Tensor, _tensor, _from_tensor),
    Form("torch.dtype", torch.dtype, lambda value: str(value).removeprefix("torch."),
          _DTYPES.__getitem__),
    _text("torch.device", torch.device),
)  # fmt: skip

BY_NAME = {form.name: form for form in FORMS}
_BY_KIND = {form.kind: form for form in FORMS}


def form_of(value: Any) -> Form:
    """Returns how a value is stored.

    Raises:
        UnfitError: its type has no form.
    """
    kind = type(value)
    if isinstance(value, np.dtype):  # numpy has a class for each
        kind = np.dtype
    elif isinstance(value, np.generic) and kind is not np.str_:
        kind = np.generic
    if kind not in _BY_KIND:
        named = kind.__qualname__ if kind.__module__ == "builtins" else _full_name(kind)
        raise UnfitError(
            f"got a value of type {named}, which cannot be read back without its code; "
            "numbers, text, dates, paths, arrays, tensors, and lists, dictionaries, tuples and "
            f"sets of them are needed; {_remedy(value)}"
        )
    return _BY_KIND[kind]


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _remedy(value: Any) -> str:
    if isinstance(value, Enum):
        return f"use its value, {value.value!r}"
    if isinstance(value, torch.nn.Parameter):
        return "parameters are saved with the model and the optimizer; leave it out"
    if isinstance(value, Tensor):
        return "use a plain tensor of its values"
    if isinstance(value, (Mapping, tuple, list, set, str, int, float, np.ndarray)):
        bases = (dict, tuple, list, set, str, int, float, np.ndarray)
        plain = next((each for each in bases if isinstance(value, each)), dict)
        return f"convert it to a plain {plain.__name__}"
    if callable(getattr(value, "state_dict", None)):
        return "use its state_dict()"
    return "use its values, or leave it out (a scheduler may define its own state_dict)"
