"""Free-form values come back from JSON as they were, or are refused with their path."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import random
import types
import uuid
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from arg_dist.checkpoint.value_forms import LARGEST_ARRAY
from arg_dist.checkpoint.values import DEEPEST, TYPE, decode, encode


def back(value: Any) -> Any:
    """What a reader gets: through text, in which there is nothing but JSON."""
    return decode(json.loads(json.dumps(encode(value, "job"), allow_nan=False)))


def same(one: Any, other: Any) -> bool:
    """Equal values of equal types, at every level."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        flat = [torch.empty(each.numel(), dtype=each.dtype) for each in (one, other)]
        bits = [
            to.copy_(each.reshape(-1)).view(torch.uint8)
            for to, each in zip(flat, (one, other), strict=True)
        ]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and repr(one) == repr(other)
    if isinstance(one, defaultdict) and one.default_factory is not other.default_factory:
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(*keys) and same(one[keys[0]], other[keys[1]])
            for keys in zip(one, other, strict=True)
        )
    if isinstance(one, (set, frozenset)):
        return len(one) == len(other) and all(
            any(map(same, other, [each] * len(one))) for each in one
        )
    if isinstance(one, (list, tuple, deque)):
        limits = [getattr(each, "maxlen", None) for each in (one, other)]
        return len(one) == len(other) and limits[0] == limits[1] and all(map(same, one, other))
    return repr(one) == repr(other) if isinstance(one, (float, complex)) else one == other


TEXT = st.text(st.characters(), max_size=5)  # with halves of surrogate pairs
HASHABLE = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary(max_size=4)),
        *(st.dates(), st.timedeltas(), st.uuids(), st.decimals(allow_nan=False)),
        *(st.datetimes(), st.datetimes(timezones=st.just(datetime.UTC)), st.complex_numbers()),
        st.sampled_from([*(torch.float16, torch.device("cpu"), torch.Size([2, 3])), range(3)]),
        st.sampled_from([pathlib.Path("a/b"), np.float32(0.1), np.int64(3), np.bool_(True)]),
    ),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
ARRAYS = arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=0, max_side=3))
TENSORS = arrays.arrays(
    st.sampled_from(["f4", "f8", "i8", "u1", "?", "c8"]),
    arrays.array_shapes(min_dims=0, min_side=0, max_side=3),
).map(torch.from_numpy)
NAMES = st.sampled_from([TYPE, "value", "tuple"]) | HASHABLE
VALUES = st.recursive(
    HASHABLE | ARRAYS | TENSORS,
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
        *(st.dictionaries(NAMES, inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
        st.dictionaries(NAMES, inner, max_size=3).map(OrderedDict),
        st.dictionaries(HASHABLE, inner, max_size=3).map(lambda given: defaultdict(list, given)),
        st.lists(inner, max_size=3).map(lambda given: deque(given, maxlen=3)),
        st.sets(HASHABLE, max_size=3),
    ),
    max_leaves=10,
)


@settings(max_examples=100)
@given(VALUES)
def test_what_was_given_comes_back(value):
    assert same(back(value), value)


class Held(enum.Enum):
    ONE = 1


class Text(enum.StrEnum):
    ONE = "one"


class Attributes(dict[str, int]):
    pass


Point = namedtuple("Point", "x y")


KEPT = {
    "infinity": [math.inf, -math.inf, math.nan, -0.0],
    "a number of many digits": -(7**5000),
    "a counter of steps": Counter({5: 1, 9: 2}),
    "a dictionary like an encoded value": {TYPE: "tuple", "value": [[1]]},
    "such a dictionary inside": [{TYPE: {TYPE: 1}}],
    "an array with its own order": np.arange(6).reshape(2, 3).T,
    "an array of the other byte order": np.arange(3, dtype=">i4"),
    "an array of text": np.array(["a", "", "bcd"]),
    "an empty array": np.zeros((0, 3), np.float16),
    "a long double": np.longdouble(1) / 3,
    "a date of numpy": np.datetime64("2026-01-01"),
    "text of numpy": {np.str_("a"): np.str_("b")},
    "a dtype of numpy": np.dtype("<f4"),
    "a generator of numpy": np.random.default_rng(3).bit_generator.state,
    "a generator of Python": random.Random(3).getstate(),
    "a generator of torch": torch.Generator().get_state(),
    "a learning rate": torch.tensor(0.1),
    "bf16": torch.ones(2, 3, dtype=torch.bfloat16),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "a transposed tensor": torch.arange(6.0).view(2, 3).T,
    "an expanded tensor": torch.ones(1, dtype=torch.int32).expand(4),
    "a conjugate": (torch.ones(2) * 1j).conj(),
    "an empty tensor": torch.zeros(0, 3, dtype=torch.float64),
    "a deque": deque([1, 2], maxlen=2),
    "a default": defaultdict(int, {3: 1}),
    "no default": defaultdict(None, {3: 1}),
    "paths": (pathlib.Path("a"), pathlib.PurePosixPath("b")),
    "times": (datetime.datetime(2026, 1, 2, 3, fold=1), datetime.timedelta(microseconds=1)),
    "others": (decimal.Decimal("0.10"), uuid.UUID(int=3), bytearray(b"\0\xff"), 1j, range(1, 9, 2)),
}


@pytest.mark.parametrize("value", KEPT.values(), ids=KEPT)
def test_each_kind_comes_back(value):
    assert same(back(value), value)


def test_a_tensor_comes_back_without_its_graph():
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 2).sum()
    assert same(
        back({"loss": loss, "weight": weight}), {"loss": loss.detach(), "weight": weight.detach()}
    )


def test_plain_json_is_its_own_encoding():
    value = {"a": [1, 2.5, "b", None, True, {"c": {}}], "é": -0.0}
    assert encode(value, "job") == value


def test_what_is_encoded_does_not_follow_later_changes():
    history, weights = [1, {"a": [2]}], torch.ones(2)
    value = {"history": history, "weights": weights, "set": {1}, "array": np.ones(2)}
    encoded = encode(value, "job")
    history[1]["a"].append(3)
    history.append(4)
    weights.zero_()
    value["set"].add(2)
    value["array"][:] = 0
    decoded = decode(encoded)
    assert decoded["history"] == [1, {"a": [2]}] and decoded["set"] == {1}
    assert decoded["weights"].tolist() == [1, 1] and decoded["array"].tolist() == [1, 1]


def test_what_is_decoded_can_be_changed_and_decoded_again():
    encoded = encode({"a": np.ones(2), "b": torch.ones(2), "c": {1: []}}, "job")
    for _ in range(2):
        decoded = decode(encoded)
        decoded["a"] += 1
        decoded["b"] += 1
        decoded["c"][1].append(2)
        assert decoded["a"].tolist() == decoded["b"].tolist() == [2, 2] and decoded["c"] == {1: [2]}


circle: list[Any] = [1]
circle.append({"again": circle})
deep: list[Any] = []
for _ in range(DEEPEST + 1):
    deep = [deep]

REFUSED = {
    "an object": (object(), r"job.a\[0\]: got a value of type object, .* leave it out"),
    "a function": (lambda: 0, r"job.a\[0\]: got a value of type function"),
    "a class": (int, r"job.a\[0\]: got a value of type type"),
    "a module": (torch.nn.Linear(1, 1), r"torch.nn.modules.linear.Linear, .*its state_dict\(\)"),
    "a parameter": (torch.nn.Parameter(torch.ones(1)), "type torch.nn.parameter.Parameter, "),
    "an enum": (Held.ONE, r"test_values.Held, .* use its value, 1$"),
    "an enum of text": (Text.ONE, r"test_values.Text, .* use its value, 'one'$"),
    "a dictionary of another class": (Attributes(a=1), "convert it to a plain dict$"),
    "a view": (types.MappingProxyType({}), "convert it to a plain dict$"),
    "a named tuple": (Point(1, 2), "convert it to a plain tuple$"),
    "a data class": (dataclasses.make_dataclass("Data", "a")(1), "use its values"),
    "a masked array": (np.ma.array([1.0]), "convert it to a plain ndarray$"),
    "an array of objects": (np.array([None]), r"job.a\[0\]: got an array of dtype object"),
    "an array of records": (np.zeros(1, [("x", "f4")]), r"job.a\[0\]: got an array of dtype"),
    "a large array": (np.zeros(LARGEST_ARRAY + 1, np.uint8), r"\[0\]: got an array of 16777217 b"),
    "a large tensor": (torch.zeros(2**23), r"job.a\[0\]: got an array of 33554432 bytes"),
    "a sparse tensor": (torch.eye(2).to_sparse(), r"job.a\[0\]: got a tensor .*\.to_dense\(\)"),
    "a tensor without values": (torch.ones(2, device="meta"), r"job.a\[0\]: got a tensor .*meta"),
    "a tensor as a key": ({torch.ones(1): 1}, r"job.a\[0\]: has a tensor as a key"),
    "a default that is code": (defaultdict(lambda: 0), r"a\[0\]: got a defaultdict of .*lambda"),
    "a time zone": (
        datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
        r"job.a\[0\]: got a time in the zone UTC, .*astimezone",
    ),
    "a circle": (circle, r"job.a\[0\]\[1\].again: contains itself"),
    "a deep list": (deep, r"\]: is 100 levels deep"),
    "a key": ({Held.ONE: 1}, r"job.a\[0\], key <Held.ONE: 1>: got a value of type"),
    "a value under a number": ({3: {"b c": object()}}, r"job.a\[0\]\[3\]\['b c'\]: got a value"),
    "an element of a tuple": ((1, [object()]), r"job.a\[0\]\[1\]\[0\]: got a value"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_come_back_is_refused_with_its_path(value, words):
    with pytest.raises(ValueError, match=words):
        encode({"a": [value]}, "job")


@pytest.mark.parametrize(
    "data",
    [
        {TYPE: "os.system", "value": "true"},
        {TYPE: "builtins.eval", "value": "1"},
        {TYPE: "torch.dtype", "value": "load"},
        {TYPE: "defaultdict", "value": ["eval", []]},
        {TYPE: "torch.Tensor", "value": ["load", [1], ""]},
        {TYPE: "numpy.ndarray", "value": ["O", [1], "AAAAAAAAAAA="]},
        {TYPE: "tuple"},
        {TYPE: ["tuple"], "value": 1},
    ],
)
def test_decoding_calls_nothing_that_a_file_names(data):
    with pytest.raises(ValueError, match=r"not known to this version|cannot be rebuilt"):
        decode([data])
