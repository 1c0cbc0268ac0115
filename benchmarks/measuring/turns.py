"""Shared by the step and refresh benchmarks: interleaved timing of optimizers on shapes."""

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
    """The optimizers to time, on what, and how often.

    Attributes:
        models: Llama sizes whose layer shapes are timed.
        ranks: ranks of the low-rank methods; skipped for shapes that are too small.
        names: optimizers, see :data:`benchmarks.measuring.contenders.NAMES`.
        device: device to run on.
        rounds: interleaved timed steps of each kind.
    """

    models: Sequence[str]
    ranks: Sequence[int]
    names: Sequence[str]
    device: torch.device
    rounds: int

    def cases(self) -> Iterator[Case]:
        """Every shape with every rank below its shorter side."""
        return cases(self.models, self.ranks)

    def left_out(self) -> list[str]:
        """A note for each omitted pair of a model and a rank."""
        return left_out(self.models, self.ranks)

    def sample(
        self,
        case: Case,
        place: Place,
        times: Mapping[str, Times],
        refused: Mapping[str, str],
        **more: Any,
    ) -> dict[str, Any]:
        """The measurements of one shape, as JSON.

        Args:
            case: the shape, its model and the rank.
            place: device and data type of its matrices.
            times: times by name.
            refused: reasons why an optimizer has no times, by name.
            more: further entries.
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
    """The shape in a sample, as shown in headings."""
    return " x ".join(map(str, sample["shape"]))


def notes(
    what: str, rounds: int, samples: Sequence[Mapping[str, Any]], left_out: Sequence[str]
) -> list[str]:
    """Notes that explain a table of timed steps.

    Args:
        what: one or two sentences on what was timed.
        rounds: timed steps of each kind.
        samples: all samples.
        left_out: notes on omitted ranks.
    """
    how = f"{rounds} interleaved rounds; medians, with quartiles in parentheses."
    return [f"{what} {how}", *left_out, *refusals.of_steps(samples)]
