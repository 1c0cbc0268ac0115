"""How many directions to keep, and when to look for new ones."""

from __future__ import annotations

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
) -> int:
    """The smallest rank whose directions keep the share `energy` of ``||G||_F^2``.

    Information-based selection (IASS, arXiv 2410.17881, algorithm 2) by one cumulative sum instead
    of a search, since ``||G - P_r G||^2 = ||G||^2 - sum_{i<=r} s_i^2``. The paper bounds what is
    discarded: ``eta_th = 1 - energy``. A gradient of lower rank than `smallest` gets only the
    directions it has: Adam would blow the rounding noise in the others up to full steps.

    Args:
        energies: ``width``, fp64, descending: ``s_i^2``.
        norm_sq: ``||G||_F^2``.
        energy: share to keep, in (0, 1].
        smallest: smallest rank to return.
        largest: largest rank to return.
        before: the rank so far; None if there was none.
        hysteresis: a rank stays where it keeps a share within `energy` -+ `hysteresis`, and goes no
            further than there: one batch's gradient is a noisy word on the spectrum.

    Returns:
        A rank between 1 and ``min(largest, width)``.
    """
    largest = min(largest, energies.numel())
    # kept_r = sum_{i<=r} s_i^2 / ||G||^2
    kept = energies.cumsum(0) / norm_sq

    def needed(share: float) -> int:
        # min { r : kept_r >= share }
        return int((kept < share).sum()) + 1

    if before is None:
        rank = needed(energy)
    else:
        rank = max(needed(energy - hysteresis), min(before, needed(energy + hysteresis)))
    rank = max(min(smallest, largest), min(rank, largest))
    return max(1, min(rank, numerical_rank(energies)))


def numerical_rank(energies: Tensor) -> int:
    """Number of directions clear of fp32 rounding: ``s_i > 4 eps sqrt(width) s_1``.

    Args:
        energies: ``width``, fp64, descending.
    """
    tolerance = 16 * torch.finfo(torch.float32).eps ** 2 * energies.numel()
    return int((energies > tolerance * energies[0]).sum())


def exit_early(
    *,
    since_refresh: int,
    shortest: int,
    kept_sq: float,
    kept_sq_at_refresh: float,
    decay: float,
) -> bool:
    """Whether a basis has served its time before the longest gap is over.

    At least `shortest` steps after the refresh, once the projected gradient has fallen below
    `decay` times its norm at the refresh: the inner exit rule of arXiv 2410.17881, algorithm 3,
    ``||P||_F <= sigma``, made relative, so that it does not depend on the loss's scale or the
    layer's size.
    """
    return since_refresh >= shortest and kept_sq < decay * decay * kept_sq_at_refresh


def gap_after_decay(gap: int, *, since_refresh: int, spread: int, phase: float) -> int:
    """Steps from a refresh to the next, once :func:`exit_early` has ended the basis.

    The gradients of all matrices may fall together, for instance as the learning rate does; each
    then waits for its turn within `spread` steps. It is decided once: seen again, later, the decay
    changes nothing.

    Args:
        gap: steps from the refresh to the next so far; never more.
        since_refresh: steps since the refresh.
        spread: steps over which the refreshes of different matrices are spread.
        phase: in [0, 1), the matrix's turn.
    """
    return min(gap, since_refresh + 1 + int(phase * spread))


def gap_until_next(refreshes: int, *, first: int, longest: int, phase: float) -> int:
    """Steps from a refresh to the next: doubles from about `first` up to `longest`.

    The first gradients say little: they have almost no rank, and the subspace turns fastest while
    the learning rate warms up.

    Args:
        refreshes: bases of this matrix found before.
        first: steps from the first refresh to the second, before it is stretched.
        longest: most steps between two refreshes.
        phase: in [0, 1); stretches the gaps, so that the refreshes of different matrices, which all
            begin on the first step, do not fall on the same steps later.
    """
    return min(longest, int(first * (1 + phase) * 2.0 ** min(refreshes, 32)))
