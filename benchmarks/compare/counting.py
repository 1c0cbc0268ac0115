"""How much an optimizer keeps, counted by one rule for all: the tensors in ``optimizer.state``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

ADAMW_BYTES_PER_ELEMENT = 8
"""AdamW's two fp32 moments: what every method is held against."""


class Bytes(NamedTuple):
    """Bytes of tensors: `logical` of their elements, `storage` of the memory they keep alive.

    They differ where a tensor is a view of a larger one.
    """

    logical: int = 0
    storage: int = 0

    def most(self, other: Bytes) -> Bytes:
        """The larger of each number."""
        return Bytes(max(self.logical, other.logical), max(self.storage, other.storage))


NOTHING = Bytes()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor that can be reached from `value`, once.

    Looks into mappings, lists, tuples, sets, and into the attributes of objects, such as the
    projector that some optimizers keep.
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
    """The bytes of all tensors in `value`: every tensor once, and every storage once."""
    logical, storages = 0, {}
    for tensor in tensors_in(value):
        logical += tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return Bytes(logical, sum(storages.values()))


@dataclass
class StateCount:
    """The state of a run's optimizers: now, and the most at any step that was looked at.

    Attributes:
        counted: the parameters whose state stands for the low-rank matrices.
        now: bytes of the matrices' state.
        peak: the most of it.
        now_all: bytes of all state.
        peak_all: the most of it.
    """

    counted: list[Tensor]
    now: Bytes = NOTHING
    peak: Bytes = NOTHING
    now_all: Bytes = NOTHING
    peak_all: Bytes = NOTHING

    def look(self, optimizers: Iterable[Optimizer]) -> None:
        """Counts what `optimizers` keep now."""
        states = [optimizer.state for optimizer in optimizers]
        self.now_all = count(states)
        self.now = count([state[p] for p in self.counted for state in states if p in state])
        self.peak = self.peak.most(self.now)
        self.peak_all = self.peak_all.most(self.now_all)

    def as_json(self, *, matrix_elements: int, elements: int) -> dict[str, Any]:
        """What a record keeps, beside what AdamW keeps of the matrices and of all parameters."""
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
