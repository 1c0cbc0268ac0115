"""The optimizer against the paper's steps with a dense SVD."""

from __future__ import annotations

import pytest
import torch
from matrices import changing_spectrum, gaussian
from one_process import feed, optimizer_of, parameters_of
from tolerances import REFERENCE

from arg_dist.subspace.range_finder import positive_peaks
from arg_dist.subspace.reference import ReferenceAdaRankGrad

RATIOS = (0.45, 0.8, 0.3, 0.9, 0.6)


@pytest.fixture
def sign_fixed_svd(monkeypatch):
    """The SVD with the signs that the range finder gives: the rule `paper` depends on them."""
    svd = torch.linalg.svd

    def fixed(matrix, full_matrices):
        left, values, right = svd(matrix, full_matrices=full_matrices)
        signed = positive_peaks(right.T).T
        return left * (signed * right).sum(1).sign(), values, signed

    monkeypatch.setattr(torch.linalg, "svd", fixed)


@pytest.mark.usefixtures("sign_fixed_svd")
@pytest.mark.parametrize("residual", ["none", "scaled", "matched", "orthogonalized"])
@pytest.mark.parametrize("transport", ["squared", "ldadam", "paper"])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((13, 7), "right"), ((7, 13), "left"), ((8, 8), "left"), ((7, 11), "right")],
)
def test_fifty_steps_with_changing_ranks_are_the_references(shape, side, transport, residual):
    shared = {
        "lr": 1e-3, "weight_decay": 0.1, "max_rank": 6, "min_rank": 2, "energy": 0.95,
        "scale": 0.5, "transport": transport, "side": side, "residual": residual,
    }  # fmt: skip
    weight = gaussian(*shape, seed=1)
    reference = ReferenceAdaRankGrad(weight.clone(), gap=10, **shared)
    optimizer = optimizer_of(weight, min_gap=10, max_gap=10, decay=0.0, hysteresis=0.0, **shared)
    ranks = []
    for gradient in changing_spectrum(*shape, RATIOS, each=10):
        reference.step(gradient)
        feed(optimizer, gradient)
        ranks.append(reference.rank)
        assert optimizer.stats()[0]["rank"] == reference.rank
    assert ranks[::10] == [2, 6, 2, 6, ranks[40]] and ranks[40] in (3, 4)
    REFERENCE.check(parameters_of(optimizer)[0].detach(), reference.weight)


def test_the_reference_refuses_a_rule_it_does_not_know():
    reference = ReferenceAdaRankGrad(gaussian(5, 4), gap=1, transport="none")
    reference.step(gaussian(5, 4))
    with pytest.raises(ValueError, match="transport: got 'none'"):
        reference.step(gaussian(5, 4))
