"""What all shards know before a step changes anything."""

from __future__ import annotations

import math

import pytest
import torch
from cuts import element_ranges
from hypothesis import given
from matrices import whole_numbers
from tolerances import FP64

from arg_dist.sharding.drivers import run_local, run_lockstep
from arg_dist.step import ALIKE, Agreement, Likeness, agree
from arg_dist.subspace.norms import norm_sq


def agreed(ranges, gradients, rounds, strangers=(), steps=(), likenesses=()) -> list[Agreement]:
    """The agreement of shards that hold these ranges of each gradient, as each of them sees it."""
    return run_lockstep(
        [
            agree(
                [
                    (i, norm_sq(gradient[start:stop]))
                    for i, gradient in enumerate(gradients)
                    if start < stop
                ],
                [(0, torch.tensor(me + 1.0).double())],
                [rounds[me], 1],
                own_state=me not in strangers,
                steps=steps[me] if steps else 0,
                units=len(gradients),
                processes=len(ranges),
                me=me,
                likeness=likenesses[me] if likenesses else ALIKE,
            )
            for me, (start, stop) in enumerate(ranges)
        ]
    )


@given(element_ranges(30))
def test_norms_are_summed_and_the_most_rounds_are_taken(ranges):
    gradients = [whole_numbers(30, seed=seed) for seed in range(3)]
    rounds = [(7 * me) % 5 for me in range(len(ranges))]
    answers = agreed(ranges, gradients, rounds)
    assert all(answer == answers[0] for answer in answers)
    norms = torch.stack([gradient.double().square().sum() for gradient in gradients])
    FP64.check(torch.tensor(answers[0].norm_sq, dtype=torch.float64), norms)
    assert answers[0].kept_sq == [sum(range(1, len(ranges) + 1)), 0, 0]
    assert answers[0].rounds == [max(rounds), 1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_no_number_anywhere_is_known_everywhere(value):
    gradients = [torch.ones(8), torch.ones(8), torch.ones(8)]
    gradients[1][5] = value
    for answer in agreed(((0, 3), (3, 3), (3, 8)), gradients, [0, 0, 0]):
        assert answer.nonfinite() == [1]


def test_everyone_knows_who_holds_the_state_of_another_process():
    answers = agreed(((0, 3), (3, 3), (3, 8)), [torch.ones(8)], [0, 0, 0], strangers=(1, 2))
    assert [answer.strangers for answer in answers] == [[1, 2]] * 3


def test_everyone_knows_who_has_taken_another_number_of_steps():
    answers = agreed(((0, 3), (3, 3), (3, 8)), [torch.ones(8)], [0, 0, 0], steps=(7, 7, 6))
    assert [answer.strangers for answer in answers] == [[2]] * 3


def test_norms_do_not_overflow():
    gradient = torch.full((4,), 3e38)
    steps = agree(
        [(0, norm_sq(gradient))], [], [0], own_state=True, steps=0, units=1, processes=1, me=0
    )
    agreed_norm_sq = torch.tensor(run_local(steps).norm_sq, dtype=torch.float64)
    FP64.check(agreed_norm_sq, gradient.double().square().sum()[None])


def summed(value: float) -> Likeness:
    return Likeness(summary=torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize(
    ("likenesses", "unlike"),
    [
        ((ALIKE, ALIKE, ALIKE), False),
        ((Likeness(7), Likeness(7), Likeness(7)), False),
        ((Likeness(7), Likeness(7), Likeness(2**31 - 1)), True),
        ((summed(-3.5), summed(-3.5), summed(-3.5)), False),
        ((summed(math.nan),) * 3, False),
        ((summed(-3.5), summed(-3.5 + 1e-6), summed(-3.5)), False),
        ((summed(-3.5), summed(3.5), summed(-3.5)), True),
        ((summed(-3.5), summed(math.nan), summed(-3.5)), True),
        ((summed(0.0), ALIKE, summed(0.0)), True),
        ((ALIKE, ALIKE, Likeness(apart=True)), True),
    ],
)
def test_everyone_knows_whether_all_are_alike(likenesses, unlike):
    ranges, last_step = ((0, 3), (3, 3), (3, 8)), (2**24 - 1,) * 3
    answers = agreed(ranges, [torch.ones(8)], [2, 9, 0], steps=last_step, likenesses=likenesses)
    for answer in answers:
        assert (answer.unlike, answer.strangers, answer.rounds) == (unlike, [], [9, 1])
