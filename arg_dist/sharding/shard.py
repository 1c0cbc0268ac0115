"""This process's part of one matrix or tensor: reads its gradient, updates its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from arg_dist.sharding.fragment import Fragment
from arg_dist.sharding.layout import MatrixView
from arg_dist.subspace.distributed import (
    FP32_BYTES,
    DimensionSharding,
    Interval,
    MatrixSharding,
    row_count,
    select_rows,
)
from arg_dist.subspace.rounding import to_bf16
from arg_dist.subspace.state import OF_EACH_DIRECTION, OF_TENSOR, WITH_ROWS, State


@dataclass(frozen=True)
class Shard:
    """Attributes common to all shards.

    Attributes:
        unit: position among all matrices and tensors of the plan, equal on all processes.
        name: the matrix's or tensor's name.
        fragment: the fragment that contains it.
        offset: first element of the matrix or tensor within the parameter.
        range: the elements held by this process, relative to `offset`; of a complex tensor, the
            real numbers.
        group: position of its parameter group in the plan.
        me: this process's index in the group of processes.
        sharding: how the matrix, or the elements of the tensor, are distributed over the processes.
    """

    unit: int
    name: str
    fragment: Fragment
    offset: int
    range: Interval
    group: int
    me: int
    sharding: MatrixSharding | DimensionSharding

    required: ClassVar[tuple[str, ...]]
    """Keys of the tensors of every state that is not empty."""

    def values(self) -> Tensor:
        """The weights held, flat or (if not contiguous) in their own shape; a view into the model.

        Raises:
            RuntimeError: they are not a view: their strides have changed since the first step.
        """
        local = as_reals(self.fragment.view(self.fragment.target.detach()))
        values = self._cut(local)
        if values.untyped_storage().data_ptr() != local.untyped_storage().data_ptr():
            raise RuntimeError(
                f"{self.name}: it is held in part and no longer contiguous (strides "
                f"{local.stride()}); set parameter.data = parameter.data.contiguous()"
            )
        return values

    def gradient(self) -> Tensor | None:
        """The gradient of the weights held, in the order of :meth:`values`; None if it is not set.

        Raises:
            RuntimeError: the gradient is not dense, or complex where the parameter is not.
        """
        target = self.fragment.target
        gradient = target.grad
        if gradient is None:
            return None
        local = self.fragment.view(gradient)
        if gradient.is_sparse:
            raise RuntimeError(
                f"the gradient of {self.name} is sparse; use the module with sparse=False"
            )
        if local.layout != torch.strided:
            raise RuntimeError(
                f"the gradient of {self.name} has the layout {local.layout}; a dense one is "
                "needed: set parameter.grad = parameter.grad.to_dense() before step()"
            )
        if local.is_complex() != target.is_complex():
            if local.is_complex():
                raise RuntimeError(
                    f"the gradient of {self.name} is of type {local.dtype}, but the parameter of "
                    f"type {target.dtype}; take its real part before step()"
                )
            local = local.to(target.dtype)
        return self._cut(as_reals(local))

    @property
    def is_shared(self) -> bool:
        """Whether its step needs other processes."""
        return self.sharding.is_shared

    @property
    def held_bytes(self) -> int:
        """Bytes that the weights held would take in fp32."""
        return FP32_BYTES * (self.range[1] - self.range[0])

    @property
    def terms(self) -> int:
        """Number of gradients, one of each process, of which the gradient is the mean; else 1."""
        raise NotImplementedError

    def fits(self, state: State) -> bool:
        """Whether `state` has the rows that this process holds of it; empty state fits."""
        stored, held = self.sharding.stored(), state.keys() & set(WITH_ROWS)
        return not state or (
            set(self.required) <= held <= stored.keys()
            and all(state[key].shape[0] == row_count(stored[key][self.me]) for key in held)
        )

    def is_elsewhere(self, state: State) -> bool:
        """Whether `state` is on another device than the weights, as one of them was moved."""
        return bool(state) and state[self.required[0]].device != self.fragment.target.device

    def _cut(self, local: Tensor) -> Tensor:
        if self.fragment.transposed:
            return local
        start = (self.offset - self.fragment.start) * self.fragment.width
        return elements(local, start + self.range[0], start + self.range[1])


@dataclass(frozen=True)
class TensorShard(Shard):
    """Part of a tensor that full-rank Adam trains."""

    required = OF_TENSOR

    sharding: DimensionSharding

    @property
    def terms(self) -> int:
        """Number of gradients, one of each process, of which the gradient is the mean; else 1."""
        return self.sharding.terms

    @property
    def moment_type(self) -> torch.dtype:
        """Type of new moments: fp64 for parameters in fp64 or complex128, else fp32."""
        is_double = self.fragment.target.dtype in (torch.float64, torch.complex128)
        return torch.float64 if is_double else torch.float32

    def touched_gradient(self, gradient: Tensor) -> Tensor:
        """``touch``: the gradient of the elements that this process contributes to."""
        held, touched = self.sharding.update[self.me], self.sharding.touch[self.me]
        return select_rows(gradient.reshape(-1), held, touched)

    def apply(
        self, direction: Tensor, *, keep: float, step: float, by_chance: int | None = None
    ) -> None:
        """``W <- keep W + step N`` on the elements held; see :meth:`MatrixShard.apply`."""
        values = self.values()
        _add_scaled(values, direction.view(values.shape), keep, step, by_chance)


@dataclass(frozen=True)
class MatrixShard(Shard):
    """Part of a matrix that AdaRankGrad trains.

    Attributes:
        matrix: the whole matrix, as stored.
        spans_columns: whether the basis spans its columns (`right`, unless stored transposed).
        replicated: every process holds all of it.
        phase: in [0, 1); staggers its refreshes against those of other matrices.
    """

    required = OF_EACH_DIRECTION

    sharding: MatrixSharding
    matrix: MatrixView
    spans_columns: bool
    replicated: bool
    phase: float

    @property
    def terms(self) -> int:
        """Number of gradients, one of each process, of which the gradient is the mean; else 1."""
        return 1 if self.sharding.terms is None else self.sharding.terms.count

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
        block = block if self.spans_columns else block.T
        moment, me = self.sharding.moment, self.sharding.me
        return select_rows(block, moment.update[me], moment.touch[me])

    def apply(
        self,
        direction: Tensor,
        basis: Tensor,
        factors: Tensor | None,
        gradient: Tensor | None,
        outside: Tensor | None,
        *,
        keep: float,
        step: float,
        by_chance: int | None = None,
    ) -> None:
        """``W <- keep W + step (N Q^T + phi G + O)`` on the elements held.

        Args:
            direction: ``moment.update x rank``, N.
            basis: ``basis.touch x rank``, Q.
            factors: ``moment.update``, phi.
            gradient: of the elements held; None without factors, or if it is zero.
            outside: ``elements.update``, O; None if zero.
            keep: factor of the weights.
            step: factor of the update.
            by_chance: number of the step by which weights in bf16 are rounded up or down at random
                (:mod:`arg_dist.subspace.rounding`); None: to the nearest.
        """
        values = self.values()
        left, right = (direction, basis) if self.spans_columns else (basis, direction)
        start, stop = self.range
        first = start // self.width * self.width
        product = left @ right.T
        if factors is not None and gradient is not None:
            factors = factors[:, None] if self.spans_columns else factors[None]
            product.addcmul_(factors, self._whole_rows(gradient).float())
        update = product.reshape(-1)[start - first : stop - first]
        if outside is not None:
            update.add_(self._as_stored(outside))
        _add_scaled(values, update.view(values.shape), keep, step, by_chance)

    def oriented_weights(
        self, gradient: Tensor | None, outside: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """``moment.update x basis.touch``: the weights held, and what is added beside N Q^T.

        None if no matrix of the weights held can be viewed. Arguments as of :meth:`apply`.
        """
        values, columns = self.values(), self.width
        if not self.has_whole_rows:
            return None
        if not (values.is_contiguous() or values.shape[-1] == columns):
            return None
        added = gradient if outside is None else self._as_stored(outside)
        added = None if added is None else added.reshape(-1, columns)
        weights = values.view(-1, columns)
        if self.spans_columns:
            return weights, added
        return weights.T, None if added is None else added.T

    def _as_stored(self, flat: Tensor) -> Tensor:
        """The elements held, of ``elements.update``, in the order in which they are stored."""
        if self.sharding.blocks:
            rows = flat.view(-1, row_count(self.sharding.basis.touch[self.me]))
            return (rows if self.spans_columns else rows.T).reshape(-1)
        if self.sharding.cuts_moment == self.spans_columns:
            return flat
        return self.sharding.matrix(flat).T.reshape(-1)  # all of them, and the moment side is cut

    @cached_property
    def width(self) -> int:
        """Columns, as stored, of the rows that are held: all of them, or those of a block."""
        if not self.sharding.blocks:
            return self.matrix.columns
        columns = self.sharding.basis.touch if self.spans_columns else self.sharding.moment.update
        return row_count(columns[self.me])

    @cached_property
    def has_whole_rows(self) -> bool:
        """Whether no row of that width is split between processes."""
        return all(bound % self.width == 0 for bound in self.range)

    def _whole_rows(self, gradient: Tensor) -> Tensor:
        """``touched rows x columns``: the elements held, and zeros for those of other processes."""
        columns = self.width
        if self.has_whole_rows:
            return gradient.reshape(-1, columns)
        start, stop = self.range
        first, last = start // columns, -(-stop // columns)
        rows = gradient.new_zeros((last - first) * columns, dtype=torch.float32)
        rows[start - first * columns : stop - first * columns] = gradient.reshape(-1)
        return rows.view(-1, columns)


def _add_scaled(
    values: Tensor, update: Tensor, keep: float, step: float, by_chance: int | None
) -> None:
    """``values <- keep * values + step * update``, computed in at least fp32."""
    if values.dtype in (torch.float32, torch.float64):
        values.mul_(keep).add_(update, alpha=step)
        return
    moved = values.float().mul_(keep).add_(update, alpha=step)
    if by_chance is not None and values.dtype == torch.bfloat16:
        moved = to_bf16(moved, by_chance)
    values.copy_(moved)


# -- the local part of a tensor, and parts of that: views wherever its strides allow it ------------


def local_part(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this process: the local tensor of a DTensor, else the tensor itself.

    A DTensor's own storage reports the size of the whole tensor.
    """
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def as_reals(tensor: Tensor) -> Tensor:
    """The tensor itself if it is real; ``... x 2``, real and imaginary parts, if it is complex."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def elements(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements ``[start, stop)`` of `tensor` in row-major order, whatever its strides.

    Of a contiguous tensor a flat view. Of any other a view of some shape in the same order; a copy
    if the range is not made of whole rows (of one or more of the leading dimensions).
    """
    is_whole = (start, stop) == (0, tensor.numel())
    if tensor.is_contiguous():
        return tensor.view(-1) if is_whole else tensor.view(-1)[start:stop]
    if is_whole:
        return tensor
    each = tensor[0].numel()
    if start % each == 0 and stop % each == 0:
        return tensor[start // each : stop // each]
    first = start // each
    if stop <= (first + 1) * each:
        return elements(tensor[first], start - first * each, stop - first * each)
    return tensor.reshape(-1)[start:stop]
