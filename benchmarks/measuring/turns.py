"""What ``bench step`` and ``bench refresh`` have alike: optimizers take turns on shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measuring import refusals
from benchmarks.measuring.shapes import Case, Place, cases, left_out
from benchmarks.measuring.timing import Times


@dataclass(frozen=True)
class Turns:
    """Which optimizers are timed, on what, and how often.

    Attributes:
        models: sizes of Llamas, whose layers' shapes are taken.
        ranks: of the low-rank methods; one that a shape does not have is left out.
        names: of the optimizers, see :data:`benchmarks.measuring.contenders.NAMES`.
        device: where.
        rounds: timed steps of each kind, in turns.
    """

    models: Sequence[str]
    ranks: Sequence[int]
    names: Sequence[str]
    device: torch.device
    rounds: int

    def cases(self) -> Iterator[Case]:
        """Every shape with every rank that it has."""
        return cases(self.models, self.ranks)

    def left_out(self) -> list[str]:
        """A sentence for each rank that a model does not have."""
        return left_out(self.models, self.ranks)

    def sample(
        self,
        case: Case,
        place: Place,
        times: Mapping[str, Times],
        refused: Mapping[str, str],
        **more: Any,
    ) -> dict[str, Any]:
        """What was measured of one shape, as JSON.

        Args:
            case: the shape, its model and the rank.
            place: where its matrices lay, and in which type.
            times: by name.
            refused: why an optimizer has none, by name.
            more: what else there is to tell.
        """
        return {
            "model": case.model,
            "shape": [case.shape.rows, case.shape.columns],
            "rank": case.rank,
            "dtype": place.dtype_name,
            "device": place.device.type,
            "optimizers": list(self.names),
            "seconds": {name: taken.as_json() for name, taken in times.items()},
            "not_possible": dict(refused),
            **more,
        }


def times_in(sample: Mapping[str, Any]) -> dict[str, Times]:
    """The times in a sample, by name."""
    return {name: Times.from_json(taken) for name, taken in sample["seconds"].items()}


def shape_in(sample: Mapping[str, Any]) -> str:
    """The shape in a sample, as headings have it."""
    return " x ".join(map(str, sample["shape"]))


def notes(
    what: str, rounds: int, samples: Sequence[Mapping[str, Any]], left_out: Sequence[str]
) -> list[str]:
    """What a reader of the table must know.

    Args:
        what: was timed; one sentence or two.
        rounds: timed steps of each kind.
        samples: all of them.
        left_out: sentences about ranks that were.
    """
    how = f"{rounds} rounds in turns; medians, and quartiles in brackets."
    return [f"{what} {how}", *left_out, *refusals.of_steps(samples)]
