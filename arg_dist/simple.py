"""AdaRankGrad from beginning to end, for one process: read this file first.

arXiv 2410.17881, algorithms 2 and 3, with what this package adds. Everything is in fp64, with a
dense SVD where :class:`arg_dist.AdaRankGrad` has a randomized one, and the tests compare that
optimizer with this one. Of each matrix W, seen so that its basis is on the right of the gradient:

==== ========= ======================================================================
G    ``m x n`` gradient
Q    ``n x r`` basis: leading right singular vectors of a recent G, orthonormal
P    ``m x r`` projected gradient ``G Q``
M, V ``m x r`` Adam's moments of P, carried over when the basis changes
N    ``m x r`` direction: Adam's step for P
S    ``m x n`` residual ``G - P Q^T``, what the basis does not keep; without moments
U    ``m x n`` update ``N Q^T + phi(S)``:  ``W <- (1 - lr wd) W - lr scale U``
==== ========= ======================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from arg_dist.config import AdaRankGradConfig, ConfigError, parse_config
from arg_dist.group_keys import numbers, tensors
from arg_dist.optimizer import RENEWED_TOGETHER
from arg_dist.parameter_groups import checked_last, complete_group, settings_of, trained_views
from arg_dist.sharding.layout import MatrixView
from arg_dist.sharding.plan import phase_of
from arg_dist.sharding.shard import as_reals
from arg_dist.subspace.codes import Coded, decode, encode

State = dict[str, Any]

IMPLEMENTED = {
    "transport": ("squared", "paper", "ldadam"),
    "matmul_precision": ("highest",),
    "polar_precision": ("fp32",),
    "state_dtype": ("fp32",),
    "full_rank_state": ("fp32",),
    "weight_rounding": ("nearest",),
    **dict.fromkeys(("state_budget", "targets", "exclude"), (None,)),
}
"""Values of these settings; of all others, every one. Those of the randomized SVD (`oversample`,
`power_passes`, `seed`) and of sharding (`bucket_size`, `shard_basis`, `collective_timeout`) change
nothing.
"""

FAINT = 1e-4
"""Share of ||G||^2 below which a row of the residual fades out: in fp32 it is mostly rounding."""
FP32_EPS = torch.finfo(torch.float32).eps
TINY = 1e-300
"""Keeps zero rows from being divided by zero."""


class AdaRankGradSimple(torch.optim.Optimizer):
    """AdaRankGrad in one process, in fp64, with a dense SVD: for reading, and for tests.

    The state of a matrix is ``state[parameter][name]``, under the names that it has in
    :class:`arg_dist.AdaRankGrad`.

    Args:
        params: parameters, ``(name, parameter)`` pairs, or groups, as from
            :func:`arg_dist.param_groups`.
        **settings: the fields of :class:`arg_dist.AdaRankGradConfig`.

    Raises:
        ConfigError: a setting is unknown, out of range or not implemented here, or a parameter
            cannot be trained.
    """

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        config = parse_config(numbers(settings))
        super().__init__(params, {**dict(config), **tensors(settings)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; its settings are validated like the optimizer's own."""
        known = [name for group in self.param_groups for name in group["param_names"]]
        group = complete_group(param_group, len(self.param_groups), self.defaults)
        for key, values in IMPLEMENTED.items():
            if group[key] not in values:
                raise ConfigError(
                    f"{key}: got {group[key]!r}; AdaRankGradSimple implements "
                    f"{', '.join(map(repr, values))}; use arg_dist.AdaRankGrad"
                )
        super().add_param_group(group)
        checked_last(self.param_groups, known)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` returned, bit by bit."""
        super().load_state_dict(state_dict)
        # torch has rounded it to the type of the weights
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        self.state.update({params[i]: deepcopy(held) for i, held in state_dict["state"].items()})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step on all parameters; a missing gradient counts as zero.

        Raises:
            FloatingPointError: a gradient is NaN or infinite, and ``nonfinite="error"``.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        named = [
            (name, parameter, settings_of(group))
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        ]
        for name, parameter, settings in named:
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                if settings.nonfinite == "skip":
                    return loss
                raise FloatingPointError(
                    f"the gradient of {name} is NaN or infinite; nothing has changed. Clip "
                    'gradients, check the batch, or set nonfinite="skip"'
                )
        for name, parameter, settings in named:
            self._train(name, parameter, settings, stagger=max(1, len(named) // RENEWED_TOGETHER))
        return loss

    def _train(
        self, name: str, parameter: Tensor, settings: AdaRankGradConfig, *, stagger: int
    ) -> None:
        """One step on a parameter: AdaRankGrad on its matrices, Adam on one that has none."""
        weights = as_reals(parameter.detach())  # in pairs if they are complex, which form no matrix
        W = in_fp64(weights)
        G = torch.zeros_like(W) if parameter.grad is None else in_fp64(as_reals(parameter.grad))
        shape = () if parameter.is_complex() else tuple(parameter.shape)
        matrices = trained_views(name, shape, settings)  # of a stack, each by itself
        for part in matrices or [MatrixView(name, 1, W.numel(), 0)]:
            elements = slice(part.offset, part.offset + part.rows * part.columns)
            w, g = (each.view(-1)[elements].view(part.rows, part.columns) for each in (W, G))
            state = self.state[parameter].setdefault(part.name, {})
            if not state and not g.any():
                continue  # before the first gradient, nothing changes
            if matrices:
                lr, scale = settings.lr, settings.scale
                U = low_rank_update(g, state, settings, phase=phase_of(part.name), stagger=stagger)
            else:
                lr, scale = settings.lr * settings.full_rank_scale, 1.0
                U = adam_direction(g, state, settings)
            # W <- (1 - lr wd) W - lr scale U
            w.mul_(1 - lr * settings.weight_decay).sub_(U, alpha=lr * scale)
        weights.copy_(W)


def in_fp64(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def low_rank_update(
    gradient: Tensor, state: State, settings: AdaRankGradConfig, *, phase: float, stagger: int
) -> Tensor:
    """Like the gradient: the update U of one matrix, whose state is advanced by one step.

    Matrices refresh in different steps: by `phase`, in [0, 1), which follows from their names, and
    where they would all do so early, distributed over so many steps, `stagger`.
    """
    rows, columns = gradient.shape
    on_right = settings.side == "right" or (settings.side == "auto" and rows >= columns)
    G = gradient if on_right else gradient.T
    if not state or (state["since_refresh"] >= state["gap"] and G.any()):
        refresh(G, state, settings, phase)
    # P = G Q ;  N = Adam's step for P ;  S = G - P Q^T
    Q: Tensor = state["basis"]
    P = G @ Q
    N = adam_direction(P, state, settings)
    S = G - P @ Q.T
    # U = N Q^T + phi(S)
    U = N @ Q.T
    if not settings.remembers_residual:
        for key in ("residual_codes", "residual_scales", "residual_reach"):
            state.pop(key, None)
    if settings.residual == "orthogonalized":
        size = float(G.norm())
        if settings.remembers_residual:
            S, size = with_momentum(S, size, Q, state, settings)
        U += orthogonalized(S, size, settings.polar_steps, outputs=0 if on_right else 1)
    elif settings.residual == "matched":
        U += matched(S, G, N)
    elif settings.residual == "scaled":
        U += scaled(S, P, N, state, settings.residual_growth)
    # refresh early once ||P|| < refresh_below ||P at the refresh||, but not all matrices at once
    since = state["since_refresh"] = state["since_refresh"] + 1
    decayed = P.square().sum() < settings.refresh_below**2 * state["kept_sq_at_refresh"]
    if since >= settings.min_gap and decayed:
        turn = int(phase * min(stagger, settings.min_gap))
        state["gap"] = min(state["gap"], since + 1 + turn)
    return U if on_right else U.T


def adam_direction(P: Tensor, state: State, settings: AdaRankGradConfig) -> Tensor:
    """Like P: Adam's step N (Kingma and Ba, 2015); updates both moments."""
    beta1, beta2 = settings.betas
    t = state["step"] = state.get("step", 0) + 1
    # M <- b1 M + (1 - b1) P ;  V <- b2 V + (1 - b2) P*P
    M = state["exp_avg"] = beta1 * state.get("exp_avg", 0) + (1 - beta1) * P
    V = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * P * P
    # N = M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps)
    N: Tensor = M / (1 - beta1**t) / ((V / (1 - beta2**t)).sqrt() + settings.eps)
    return N


def refresh(G: Tensor, state: State, settings: AdaRankGradConfig, phase: float) -> None:
    """Replace the basis by the leading directions of G, and carry the moments over."""
    # G = L diag(s) Q^T ;  Q <- its first r columns, their signs such that the largest entry is > 0
    _, s, Qt = torch.linalg.svd(G, full_matrices=False)
    Q = Qt[: chosen_rank(s, state, settings)].T
    Q = Q * Q.gather(0, Q.abs().argmax(0, keepdim=True)).sign()
    if state:
        transport(state, Q, G @ Q, settings)
    # steps to the next refresh: doubled each time, up to max_gap
    refreshes = state.get("refreshes", 0)
    gap = int(settings.gap_to_second * (1 + phase) * 2.0 ** min(refreshes, 32))
    kept_sq = float((G @ Q).square().sum())
    state.update(basis=Q, kept_sq_at_refresh=kept_sq, refreshes=refreshes + 1)
    state.update(since_refresh=0, gap=min(gap, settings.max_gap))


def chosen_rank(s: Tensor, state: State, settings: AdaRankGradConfig) -> int:
    """The smallest rank that keeps the energy wanted, from all singular values of G, descending."""
    # kept_r = sum_{i<=r} s_i^2 / ||G||^2, as ||G - P_r Q_r^T||^2 = ||G||^2 - sum_{i<=r} s_i^2
    shares: list[float] = (s.square() / s.square().sum()).tolist()
    kept = list(accumulate(shares))

    def needed(share: float) -> int:
        return 1 + sum(each < share for each in kept)

    # r = min { r : kept_r >= energy }, or the last one if it keeps energy +- hysteresis
    lowest, r, highest = (needed(settings.energy + h * settings.hysteresis) for h in (-1, 0, 1))
    if state:
        last: int = state["basis"].shape[1]
        r = max(lowest, min(last, highest))
    smallest, largest = settings.rank_bounds(len(s))
    r = max(smallest, min(r, largest))
    r = min(largest, math.ceil(r / settings.rank_multiple) * settings.rank_multiple)
    # Adam would follow a direction that is rounding error as far as any other
    return min(r, int((s > 4 * FP32_EPS * math.sqrt(len(s)) * s[0]).sum()))


def transport(state: State, Q: Tensor, P: Tensor, settings: AdaRankGradConfig) -> None:
    """Carry the moments over to the basis Q, ``n x new``, in which G is P, ``m x new``."""
    M, V = state["exp_avg"], state["exp_avg_sq"]
    correction1, correction2 = (1 - beta ** state["step"] for beta in settings.betas)
    # R = Q_new^T Q_old ;  M <- M R^T, as M is linear in G
    R = Q.T @ state["basis"]
    state["exp_avg"] = M @ R.T
    if settings.transport == "squared":
        # V <- V (R*R)^T + (1 - sum_j R_ij^2) (1 - b2^t) E, the last for what Q_old did not cover:
        # E_ki = (sum_i P_ki^2) (sum_k P_ki^2) / ||P||^2 estimates P*P
        E = P.square().sum(1, keepdim=True) * P.square().sum(0) / P.square().sum()
        uncovered = (1 - R.square().sum(1)).clamp(0, 1)
        state["exp_avg_sq"] = V @ R.square().T + uncovered * correction2 * E
    elif settings.transport == "paper":
        # V <- |V R^T|, as R alone would make it negative
        state["exp_avg_sq"] = (V @ R.T).abs()
    else:
        # V^ <- |(V^ - M^*M^) (R*R)^T + (M^ R^T)^2| of the moments without bias (LDAdam)
        mean, mean_sq = M / correction1, V / correction2
        variance = (mean_sq - mean.square()) @ R.square().T
        state["exp_avg_sq"] = correction2 * (variance + (mean @ R.T).square()).abs()


def with_momentum(
    S: Tensor, size: float, Q: Tensor, state: State, settings: AdaRankGradConfig
) -> tuple[Tensor, float]:
    """Like S, of norm `size`: it and those before it; and the norm that this may have at most."""
    beta = settings.residual_momentum
    # R <- b R + (1 - b) S, kept in few bits an element ;  rho <- b rho + (1 - b) size >= ||R||
    R, rho = (1 - beta) * S, (1 - beta) * size
    if "residual_codes" in state:
        coded = Coded(state["residual_codes"], state["residual_scales"])
        R += beta * decode(coded, S.numel()).view(S.shape)
        rho += beta * state["residual_reach"]
    coded = encode(R.float().reshape(-1), settings.residual_bits)
    state.update(residual_codes=coded.codes, residual_scales=coded.scales, residual_reach=rho)
    # S <- (1 - b) S + b R (Nesterov), of which only what is outside today's basis
    S = (1 - beta) * S + beta * R
    return S - S @ Q @ Q.T, (1 - beta) * size + beta * rho


def orthogonalized(S: Tensor, size: float, steps: int, *, outputs: int) -> Tensor:
    """Like S: all directions outside the basis move by one size, that of Adam's updates (Muon).

    The rows of W lie along the dimension `outputs` of S, whose norm is at most `size`.
    """
    # X_i = S_i / (||S_i|| sqrt(rows)) for the rows of W, so that ||X|| = 1; faint rows fade out
    rows_sq = S.square().sum(1 - outputs, keepdim=True)
    X = S / (S.shape[outputs] * rows_sq + FAINT * size**2).clamp_min(TINY).sqrt()
    # X = L diag(x) K^T ;  O = L K^T, by polynomials that bring all x near one (Newton-Schulz)
    for _ in range(steps):
        # x <- a x + b x^3 + c x^5
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * A @ X + 2.0315 * A @ A @ X
    # rms(O) = 1 / sqrt(max(m, n))
    return math.sqrt(max(S.shape)) * X


def matched(S: Tensor, G: Tensor, N: Tensor) -> Tensor:
    """Like S: each direction outside the basis moves as far as one inside does on average."""
    # phi_i = ||N_i|| sqrt((n - r) / r) / ||S_i||; faint rows fade out
    n, r = G.shape[1], N.shape[1]
    size_sq = S.square().sum(1, keepdim=True) + FAINT * G.square().sum(1, keepdim=True)
    reach_sq = N.square().sum(1, keepdim=True) * ((n - r) / r)
    return (reach_sq / size_sq.clamp_min(TINY)).sqrt() * S


def scaled(S: Tensor, P: Tensor, N: Tensor, state: State, growth: float) -> Tensor:
    """Like S: in proportion to the step inside the basis, and its norm without jumps (Fira)."""
    # phi_i = ||N_i|| / ||P_i||
    inside = P.norm(dim=1, keepdim=True)
    S = S * torch.where(inside > 0, N.norm(dim=1, keepdim=True) / inside, 0.0)
    # S <- S min(1, growth ||S_before|| / ||S||)
    before, norm = state.get("residual_norm", torch.inf), float(S.norm())
    state["residual_norm"] = min(norm, growth * before)
    return S * (state["residual_norm"] / norm) if norm > 0 else S
