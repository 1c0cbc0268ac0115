"""Every tolerance of the tests that is not zero, with its reason.

A comparison is exact (``torch.equal``) unless it stands here. A tolerance belongs to a class of
comparisons, never to one test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """How far two results may lie apart: ``|a - b| <= absolute + relative * |b|``."""

    absolute: float
    relative: float
    reason: str

    def check(self, actual: Tensor | float, expected: Tensor | float) -> None:
        """Asserts that `actual` is `expected`, in value and shape; dtypes may differ."""
        torch.testing.assert_close(
            torch.as_tensor(actual),
            torch.as_tensor(expected),
            atol=self.absolute,
            rtol=self.relative,
            check_dtype=False,
            msg=lambda difference: f"{difference}\n\ntolerance: {self.reason}",
        )


FP64 = Tolerance(0.0, 1e-12, "a few roundings in fp64")
ROUNDING = Tolerance(
    1e-6, 1e-5, "the same fp32 formula in another order, over one step or one matrix product"
)
ORTHONORMAL = Tolerance(
    5e-6, 0.0, "Householder QR and a rotation in fp32: a few eps for each of up to 64 columns"
)
CHOLESKY_QR = Tolerance(
    1e-6, 0.0, "orthonormal in fp64, then rounded to fp32: half a last place of every entry"
)
ENERGY = Tolerance(
    1e-5, 1e-4, "squares of fp32 singular values: twice their relative error, summed over rows"
)
REFERENCE = Tolerance(
    1e-5, 0.0, "fp32 against AdaRankGradSimple in fp64: 50 steps of 1e-3, that is 2e-4 of the way"
)
REDUCTION_ORDER = Tolerance(
    0.0, 1e-4, "fp32 sums in another order at another world size: losses over 20 steps"
)
REDUCTION_ORDER_WEIGHTS = Tolerance(
    1e-5, 0.0, "fp32 sums in another order: weights after 20 steps of 1e-2 each, so 5e-5 of the way"
)
CODES = Tolerance(
    0.0,
    1e-3,
    "momentum in 4 bits: where sums in another order fall on the other side of a threshold, an "
    "element of it differs by a level, a third of its size; losses over 20 steps",
)
CODES_WEIGHTS = Tolerance(
    1e-3, 0.0, "the same: weights after 20 steps of 1e-2 each, so 5e-3 of the way"
)
CODES_DISTANCE = Tolerance(
    0.0, 5e-3, "the same: distance of two tensors of weights after 50 steps, by their norm"
)
RANDOM_ROUNDING = Tolerance(
    1e-2, 0.0, "numbers of 8 bits, rounded at random 2000 times: mean of 8192, each 15 % off"
)
RANDOM_STEPS = Tolerance(
    0.1, 0.0, "30 small steps of 9216 bf16 weights, of which each moves some hundred by 2^-7"
)
LOW_PRECISION = Tolerance(
    0.0, 2**-8, "bf16 weights keep 8 bits: one rounding of a weight, whatever computed it"
)
BF16_PRODUCTS = Tolerance(
    2**-8, 0.0, "both factors of a product rounded to the 8 bits of bf16: norm of what is lost"
)
TWO_PARTS = Tolerance(
    2**-17, 0.0, "one factor of a product rounded to two numbers of 8 bits: norm of what is lost"
)
LOSSES = Tolerance(
    1e-4, 0.0, "fp32 losses of 20 steps under another engine or world size: sums in another order"
)
PROJECTORS = Tolerance(
    1e-3, 0.0, "bases of weights that differ by the order of sums, divided by small spectral gaps"
)
CODES_LOSSES = Tolerance(
    1e-3, 0.0, "losses of 20 steps with momentum in 4 bits, whose codes differ here and there"
)
LOW_PRECISION_LOSSES = Tolerance(
    1e-2, 0.0, "losses of 20 steps with bf16 or fp16 weights against fp32: 8 or 11 bits of 5.4"
)
ROUNDED_LOSSES = Tolerance(
    1e-2 + 2**-6,
    0.0,
    "the same where the model gives its loss in bf16, too: half a last place between 4 and 8",
)
PLANNED_PEAK = Tolerance(
    0.0, 0.05, "what is kept is planned exactly, and temporaries are a small part of a run's peak"
)
PLANNED_TEMPORARIES = Tolerance(
    0.0,
    0.25,
    "what passes in a step, added up by the lines of its code, against every allocation of a run: "
    "a few rows of numbers are left out, and messages counted beside what becomes of them",
)
REFACTORED = Tolerance(
    1e-4, 0.0, "fp32 logits of weights that were subtracted, factored and added again"
)
CLIPPED = Tolerance(
    0.0, 0.12, "a norm from a sketch of 1024 numbers: a standard deviation of 2 to 3 %"
)
