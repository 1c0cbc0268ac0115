"""Size of an optimizer's state, by one rule for all: the tensors in ``optimizer.state``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

ADAMW_BYTES_PER_ELEMENT = 8
"""Bytes of AdamW's two fp32 moments, the baseline of every method."""


class Bytes(NamedTuple):
    """Bytes of tensors: `logical` of their elements, `storage` of the storages they keep alive.

    They differ where a tensor is a view of a larger one.
    """

    logical: int = 0
    storage: int = 0

    def most(self, other: Bytes) -> Bytes:
        """The elementwise maximum."""
        return Bytes(max(self.logical, other.logical), max(self.storage, other.storage))


NOTHING = Bytes()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor reachable from `value`, once.

    Traverses mappings, lists, tuples, sets and object attributes, such as the projectors that some
    optimizers keep.
    """
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (str, bytes, int, float, type, type(None))):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        else:
            waiting += vars(each).values() if hasattr(each, "__dict__") else ()
            waiting += (
                getattr(each, slot)
                for kind in type(each).__mro__
                for slot in getattr(kind, "__slots__", ())
                if isinstance(slot, str) and hasattr(each, slot)
            )


def count(value: Any) -> Bytes:
    """Bytes of all tensors in `value`, counting every tensor and every storage once."""
    logical, storages = 0, {}
    for tensor in tensors_in(value):
        logical += tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return Bytes(logical, sum(storages.values()))


@dataclass
class StateCount:
    """State size of a run's optimizers: current, and the maximum over all samples.

    Attributes:
        counted: the parameters whose state counts as that of the low-rank matrices.
        now: bytes of the matrices' state.
        peak: maximum of `now`.
        now_all: bytes of all state.
        peak_all: maximum of `now_all`.
    """

    counted: list[Tensor]
    now: Bytes = NOTHING
    peak: Bytes = NOTHING
    now_all: Bytes = NOTHING
    peak_all: Bytes = NOTHING

    def look(self, optimizers: Iterable[Optimizer]) -> None:
        """Sample the current state of `optimizers`."""
        states = [optimizer.state for optimizer in optimizers]
        self.now_all = count(states)
        self.now = count([state[p] for p in self.counted for state in states if p in state])
        self.peak = self.peak.most(self.now)
        self.peak_all = self.peak_all.most(self.now_all)

    def as_json(self, *, matrix_elements: int, elements: int) -> dict[str, Any]:
        """The counts as JSON, with AdamW's state for the matrices and for all parameters."""
        return {
            "matrices": {
                "peak": self.peak._asdict(),
                "end": self.now._asdict(),
                "adamw": ADAMW_BYTES_PER_ELEMENT * matrix_elements,
            },
            "all": {
                "peak": self.peak_all._asdict(),
                "end": self.now_all._asdict(),
                "adamw": ADAMW_BYTES_PER_ELEMENT * elements,
            },
        }
