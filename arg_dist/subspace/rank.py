"""Selection of the rank, and scheduling of refreshes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def choose_rank(
    energies: Tensor,
    norm_sq: float,
    *,
    energy: float,
    smallest: int,
    largest: int,
    before: int | None = None,
    hysteresis: float = 0.0,
    multiple: int = 1,
) -> int:
    """The smallest rank whose directions keep the share `energy` of ``||G||_F^2``.

    Information-based selection (IASS, arXiv 2410.17881, algorithm 2) by one cumulative sum instead
    of a search, since ``||G - P_r G||^2 = ||G||^2 - sum_{i<=r} s_i^2``. The paper bounds the
    discarded share: ``eta_th = 1 - energy``. Decided in Python from one read of the energies, so
    that all devices decide alike. A gradient of lower rank than `smallest` gets only its own
    directions: in the others, Adam would amplify rounding noise to full steps.

    Args:
        energies: ``width``, fp64, descending: ``s_i^2``.
        norm_sq: ``||G||_F^2``.
        energy: share to keep, in (0, 1].
        smallest: smallest rank to return.
        largest: largest rank to return.
        before: the previous rank; None at the first refresh.
        hysteresis: the rank changes only if it keeps a share outside `energy` -+ `hysteresis`, and
            only up to that bound: one batch's gradient is a noisy estimate of the spectrum.
        multiple: the rank is rounded up to a multiple of it, as far as `largest` allows.

    Returns:
        A rank between 1 and ``min(largest, width)``.
    """
    values: list[float] = energies.tolist()
    largest = min(largest, len(values))
    # kept_r = sum_{i<=r} s_i^2 / ||G||^2
    kept = [total / norm_sq for total in accumulate(values)]

    def needed(share: float) -> int:
        # min { r : kept_r >= share }
        return sum(each < share for each in kept) + 1

    if before is None:
        rank = needed(energy)
    else:
        rank = max(needed(energy - hysteresis), min(before, needed(energy + hysteresis)))
    rank = max(min(smallest, largest), min(rank, largest))
    rank = min(-(-rank // multiple) * multiple, largest)
    return max(1, min(rank, numerical_rank(values)))


def numerical_rank(energies: Sequence[float]) -> int:
    """Number of directions above fp32 rounding noise: ``s_i > 4 eps sqrt(width) s_1``.

    Args:
        energies: ``width``, descending.
    """
    tolerance = 16 * torch.finfo(torch.float32).eps ** 2 * len(energies)
    return sum(each > tolerance * energies[0] for each in energies)


def exit_early(
    *,
    since_refresh: int,
    shortest: int,
    kept_sq: float,
    kept_sq_at_refresh: float,
    refresh_below: float,
) -> bool:
    """Whether a basis is due for an early refresh, before the longest gap is over.

    This is at least `shortest` steps after the refresh, once the norm of the projected gradient has
    fallen below `refresh_below` times its value at the refresh: the inner exit rule of arXiv
    2410.17881, algorithm 3, ``||P||_F <= sigma``, made relative to be independent of the scale of
    the loss and the size of the layer.
    """
    smallest_sq = refresh_below * refresh_below * kept_sq_at_refresh
    return since_refresh >= shortest and kept_sq < smallest_sq


def gap_after_decay(gap: int, *, since_refresh: int, spread: int, phase: float) -> int:
    """Steps from a refresh to the next, after :func:`exit_early` holds.

    The gradients of all matrices may decay together, for instance with the learning rate, so their
    refreshes are staggered over `spread` steps. Later calls for the same basis do not postpone the
    refresh.

    Args:
        gap: currently scheduled steps from the refresh to the next; an upper bound of the result.
        since_refresh: steps since the refresh.
        spread: steps over which the refreshes of different matrices are staggered.
        phase: in [0, 1), the matrix's position within `spread`.
    """
    return min(gap, since_refresh + 1 + int(phase * spread))


def gap_until_next(refreshes: int, *, first: int, longest: int, phase: float) -> int:
    """Steps from a refresh to the next: doubles from about `first` up to `longest`.

    Early bases are short-lived: the first gradients have almost no rank, and the subspace rotates
    fastest during the learning rate's warmup.

    Args:
        refreshes: previous refreshes of this matrix.
        first: steps from the first refresh to the second, before stretching.
        longest: most steps between two refreshes.
        phase: in [0, 1); stretches the gaps to stagger the refreshes of different matrices, all of
            which start on the first step.
    """
    return min(longest, int(first * (1 + phase) * 2.0 ** min(refreshes, 32)))
