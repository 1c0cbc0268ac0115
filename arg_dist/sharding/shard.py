"""This process's part of one matrix or tensor: reads its gradient, updates its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import MatrixView
from arg_dist.subspace.exchange import Interval
from arg_dist.subspace.spread import Side, Spread


@dataclass(frozen=True)
class Shard:
    """Attributes common to all shards.

    Attributes:
        unit: position among all matrices and tensors of the plan, equal on all processes.
        name: the matrix's or tensor's name.
        fragment: the fragment that contains it.
        offset: first element of the matrix or tensor within the parameter.
        range: the elements held by this process, relative to `offset`.
        group: position of its parameter group in the plan.
        me: this process's index in the group of processes.
    """

    unit: int
    name: str
    fragment: Fragment
    offset: int
    range: Interval
    group: int
    me: int

    def values(self) -> Tensor:
        """The weights held, ``numel`` or in the engine's shape; a view into the model."""
        local = self.fragment.view(self.fragment.target.detach())
        # must be a view: view() raises if the memory is no longer contiguous
        return self._cut(local if self.fragment.transposed else local.view(-1))

    def gradient(self) -> Tensor | None:
        """The gradient of the weights held, shaped like :meth:`values`; None if it is not set.

        Raises:
            RuntimeError: the gradient is a sparse tensor.
        """
        gradient = self.fragment.target.grad
        if gradient is not None and gradient.is_sparse:
            raise RuntimeError(
                f"the gradient of {self.name} is sparse; use the module with sparse=False"
            )
        return None if gradient is None else self._cut(self.fragment.view(gradient))

    @property
    def is_shared(self) -> bool:
        """Whether its step needs other processes."""
        raise NotImplementedError

    def _cut(self, local: Tensor) -> Tensor:
        if self.fragment.transposed:
            return local
        start = self.offset - self.fragment.start
        return local.reshape(-1)[start + self.range[0] : start + self.range[1]]


@dataclass(frozen=True)
class TensorShard(Shard):
    """Part of a tensor that full-rank Adam trains.

    Attributes:
        side: how its elements are distributed over the processes.
    """

    side: Side

    @property
    def is_shared(self) -> bool:
        """Whether its step needs other processes."""
        return self.side.keep != self.side.update

    def kept_gradient(self, gradient: Tensor) -> Tensor:
        """``keep``: the gradient of the elements whose state this process keeps."""
        low, high = (bound - self.range[0] for bound in self.side.keep[self.me])
        return gradient.reshape(-1)[low:high]

    def apply(self, direction: Tensor, *, lr: float, weight_decay: float) -> None:
        """``W <- (1 - lr wd) W - lr N`` on the elements held."""
        values = self.values()
        _add_scaled(values, direction.view(values.shape), 1 - lr * weight_decay, -lr)


@dataclass(frozen=True)
class MatrixShard(Shard):
    """Part of a matrix that AdaRankGrad trains.

    Attributes:
        matrix: the whole matrix, as stored.
        spread: how it is distributed over the processes.
        spans_columns: whether the basis spans its columns (`right`, unless stored transposed).
        replicated: every process holds all of it.
        phase: in [0, 1); staggers its refreshes against those of other matrices.
    """

    matrix: MatrixView
    spread: Spread
    spans_columns: bool
    replicated: bool
    phase: float

    @property
    def is_shared(self) -> bool:
        """Whether its step needs other processes."""
        return len(self.spread.owners) > 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns in the model."""
        shape = (self.matrix.rows, self.matrix.columns)
        return shape[::-1] if self.fragment.transposed else shape

    @property
    def side_name(self) -> Literal["right", "left"]:
        """`right` if the basis spans the columns of the matrix in the model, else `left`."""
        return "right" if self.spans_columns != self.fragment.transposed else "left"

    def oriented_gradient(self, gradient: Tensor) -> Tensor:
        """``moment.touch x basis.touch``: the gradient oriented as ``moment x basis``.

        A view if possible; a copy in fp32 if a row is split between processes.
        """
        block = self._whole_rows(gradient)
        if self.replicated:
            low, high = self.spread.moment.touch[self.spread.me]
            block = block[low:high] if self.spans_columns else block[:, low:high]
        return block if self.spans_columns else block.T

    def apply(
        self,
        direction: Tensor,
        basis: Tensor,
        residual: tuple[Tensor, Tensor] | None = None,
        *,
        lr: float,
        scale: float,
        weight_decay: float,
    ) -> None:
        """``W <- (1 - lr wd) W - lr scale (N Q^T + phi G)`` on the elements held.

        Args:
            direction: ``moment.update x rank``, N.
            basis: ``basis.touch x rank``, Q.
            residual: ``moment.update``, phi, and the gradient of the elements held; None if zero.
            lr: learning rate.
            scale: factor of the update.
            weight_decay: decoupled weight decay.
        """
        values = self.values()
        left, right = (direction, basis) if self.spans_columns else (basis, direction)
        keep, step = 1 - lr * weight_decay, -lr * scale
        start, stop = self.range
        columns = self.matrix.columns
        if residual is not None:
            factors, gradient = residual
            factors = factors[:, None] if self.spans_columns else factors[None]
        if self._has_whole_rows() and values.dtype == torch.float32:
            values = values.view(-1, columns)
            values.addmm_(left, right.T, beta=keep, alpha=step)
            if residual is not None:
                values.addcmul_(factors, gradient.reshape(-1, columns).float(), value=step)
            return
        first = start // columns * columns
        product = left @ right.T
        if residual is not None:
            product.addcmul_(factors, self._whole_rows(gradient).float())
        update = product.reshape(-1)[start - first : stop - first]
        _add_scaled(values, update.view(values.shape), keep, step)

    def _has_whole_rows(self) -> bool:
        return all(bound % self.matrix.columns == 0 for bound in self.range)

    def _whole_rows(self, gradient: Tensor) -> Tensor:
        """``touched rows x columns``: the elements held, and zeros for those of other processes."""
        columns = self.matrix.columns
        if self._has_whole_rows():
            return gradient.reshape(-1, columns)
        start, stop = self.range
        first, last = start // columns, -(-stop // columns)
        rows = gradient.new_zeros((last - first) * columns, dtype=torch.float32)
        rows[start - first * columns : stop - first * columns] = gradient
        return rows.view(-1, columns)


def _add_scaled(values: Tensor, update: Tensor, keep: float, step: float) -> None:
    """``values <- keep * values + step * update``, computed in at least fp32."""
    if values.dtype in (torch.float32, torch.float64):
        values.mul_(keep).add_(update, alpha=step)
    else:
        values.copy_(values.float().mul_(keep).add_(update, alpha=step))
