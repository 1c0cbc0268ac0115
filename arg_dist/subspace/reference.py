"""AdaRankGrad on one whole matrix with a dense SVD: the slow, short reference for the tests.

arXiv 2410.17881, algorithms 2 and 3, line by line, except for the `squared` transport and the
residuals, and without the inner exit rule. It shares no code with the implementation it verifies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceAdaRankGrad:
    """The state and settings of one ``m x n`` matrix.

    Attributes:
        weight: ``m x n``, updated in place by :meth:`step`.
        side: `right` if the basis spans the columns, `left` if it spans the rows.
    """

    weight: Tensor
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_rank: int = 128
    min_rank: int = 4
    energy: float = 0.9
    scale: float = 1.0
    gap: int = 200
    transport: str = "squared"
    residual: str = "none"
    residual_growth: float = 1.01
    polar_steps: int = 5
    side: str = "right"

    def __post_init__(self) -> None:
        self.steps = 0
        self.residual_norm: Tensor | None = None
        self.basis: Tensor | None = None
        self.M = self.V = self.weight.new_empty(0)

    @property
    def rank(self) -> int:
        """Rank of the present basis; 0 before the first step."""
        return 0 if self.basis is None else self.basis.shape[1]

    def step(self, gradient: Tensor) -> None:
        """Take one step on the weight with ``gradient``, ``m x n``."""
        G = gradient.double() if self.side == "right" else gradient.double().T
        if self.steps % self.gap == 0:
            self._refresh(G)
        assert self.basis is not None
        beta1, beta2 = self.betas
        self.steps += 1
        # P = G Q ;  M = b1 M + (1-b1) P ;  V = b2 V + (1-b2) P*P
        P = G @ self.basis
        self.M = beta1 * self.M + (1 - beta1) * P
        self.V = beta2 * self.V + (1 - beta2) * P * P
        # N = M / (1-b1^t) / (sqrt(V / (1-b2^t)) + eps)
        mean = self.M / (1 - beta1**self.steps)
        root = torch.sqrt(self.V / (1 - beta2**self.steps))
        N = mean / (root + self.eps)
        # W <- (1 - lr wd) W - lr scale N Q^T
        update = N @ self.basis.T
        S = G - P @ self.basis.T
        if self.residual == "scaled":
            update += self._scaled_residual(S, P, N)
        elif self.residual == "matched":
            update += self._matched_residual(S, G, N)
        elif self.residual == "orthogonalized":
            update += self._orthogonalized_residual(S, G)
        update = update if self.side == "right" else update.T
        W = (1 - self.lr * self.weight_decay) * self.weight.double()
        self.weight.copy_(W - self.lr * self.scale * update)

    def _scaled_residual(self, S: Tensor, P: Tensor, N: Tensor) -> Tensor:
        # S_i <- ||N_i|| / ||P_i|| S_i ;  ||S|| <= growth ||S_before||   (Fira)
        S = N.square().sum(1, keepdim=True).sqrt() / P.square().sum(1, keepdim=True).sqrt() * S
        if self.residual_norm is not None and S.norm() > self.residual_growth * self.residual_norm:
            S *= self.residual_growth * self.residual_norm / S.norm()
        self.residual_norm = S.norm()
        return S

    def _matched_residual(self, S: Tensor, G: Tensor, N: Tensor) -> Tensor:
        # S_i <- sqrt(mean_j N_ij^2 (n - r)) S_i / ||S_i|| ;  negligible residuals fade out
        outside = G.shape[1] - self.rank
        size = S.square().sum(1, keepdim=True) + 1e-4 * G.square().sum(1, keepdim=True)
        return (N.square().mean(1, keepdim=True) * outside / size).sqrt() * S

    def _orthogonalized_residual(self, S: Tensor, G: Tensor) -> Tensor:
        # S^_i = S_i / rms(S_i) for each row of W ;  O = U f(f(...f(s / ||s||))) V^T  (Muon)
        rows = 1 if self.side == "right" else 0
        mean_sq = S.square().mean(rows, keepdim=True)
        S = S / (mean_sq + 1e-4 * G.square().mean()).sqrt()
        U, s, Vt = torch.linalg.svd(S, full_matrices=False)
        s = s / S.numel() ** 0.5
        for _ in range(self.polar_steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        update: Tensor = max(S.shape) ** 0.5 * (U * s) @ Vt
        return update

    def _refresh(self, G: Tensor) -> None:
        # G = U S Q^T ;  r = min { r : ||G - P_r G||^2 <= (1 - energy) ||G||^2 }, within its bounds
        _, S, Qt = torch.linalg.svd(G, full_matrices=False)
        total = S.square().sum()
        rank = self.min_rank
        while rank < self.max_rank and S[rank:].square().sum() > (1 - self.energy) * total:
            rank += 1
        Q = Qt[:rank].T
        if self.basis is None:
            self.M = self.V = G.new_zeros(G.shape[0], rank)
        else:
            self._transport(Q.T @ self.basis, G @ Q)
        self.basis = Q

    def _transport(self, R: Tensor, P: Tensor) -> None:
        beta2 = self.betas[1]
        weight = 1 - beta2**self.steps
        M, V = self.M, self.V
        self.M = M @ R.T
        if self.transport == "squared":
            rank_one = P.square().sum(1, keepdim=True) * P.square().sum(0) / P.square().sum()
            self.V = V @ (R * R).T + weight * (1 - (R * R).sum(1)).clamp(0, 1) * rank_one
        elif self.transport == "paper":
            self.V = (V @ R.T).abs()
        elif self.transport == "ldadam":
            mean, mean_sq = M / (1 - self.betas[0] ** self.steps), V / weight
            self.V = weight * ((mean_sq - mean**2) @ (R * R).T + (mean @ R.T) ** 2).abs()
        else:
            raise ValueError(
                f"transport: got {self.transport!r}; squared, paper or ldadam is needed"
            )
