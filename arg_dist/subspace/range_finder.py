"""The randomized range finder: an ordered orthonormal basis of a gradient's leading subspace.

Subspace selection of AdaRankGrad (SSRF, arXiv 2410.17881, algorithm 1), after Halko, Martinsson and
Tropp (2011), algorithms 4.4 and 5.1: a sketch by random signs, power passes, then a small
eigenproblem that orders the directions by energy. Only ordered directions can be truncated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arg_dist.subspace.distributed import (
    MatrixSharding,
    Steps,
    from_home,
    gather,
    sum_scatter,
    to_home,
)
from arg_dist.subspace.norms import to_host_memory
from arg_dist.subspace.orthonormal import orthonormalize

Part = Callable[[], Tensor]
"""Returns a process's part of a gradient, ``moment.touch x basis.touch``, in its own type.

Called once per product, so that a copy, if one is necessary at all, lives only that long.
"""


@dataclass(frozen=True)
class Directions:
    """Ordered directions of a gradient.

    Attributes:
        vectors: ``basis x width``, orthonormal columns, on the home process; no rows elsewhere.
        energies: ``width``, fp64, descending: ``||G q_i||^2``, bitwise equal on every owner; in
            host memory.
        norm_sq: an estimate of ``||G||_F^2``, an fp64 scalar, equal on every owner; None without
            probes. In host memory.
    """

    vectors: Tensor
    energies: Tensor
    norm_sq: Tensor | None = None


def range_finder(
    gradient: Part, omega: Tensor, sharding: MatrixSharding, *, power_passes: int
) -> Steps[Tensor]:
    """An orthonormal basis of the leading range of ``G^T``, not yet ordered.

    Args:
        gradient: this process's part of G.
        omega: ``moment.touch x width``, this process's rows of the sketch matrix.
        sharding: how G is distributed over the processes.
        power_passes: number of times the sketch is multiplied by ``G^T G``.

    Returns:
        ``basis x width`` on the home process, no rows elsewhere.
    """
    moment, basis, me = sharding.moment, sharding.basis, sharding.me
    # Y = G^T Omega ;  Q = orth(Y)
    sketch = yield from to_home(gradient().float().T @ omega, basis.touch, basis.size, sharding)
    vectors = orthonormalize(sketch)
    for _ in range(power_passes):
        # Y <- G^T (G Q) ;  Q = orth(Y)
        vectors = yield from from_home(vectors, basis.size, basis.touch, sharding)
        image = yield from sum_scatter(gradient().float() @ vectors, moment.touch, moment.keep, me)
        image = yield from gather(image, moment.keep, moment.touch, me)
        sketch = yield from to_home(gradient().float().T @ image, basis.touch, basis.size, sharding)
        vectors = orthonormalize(sketch)
    return vectors


def leading_directions(
    gradient: Part,
    omega: Tensor,
    sharding: MatrixSharding,
    *,
    power_passes: int,
    probes: Tensor | None = None,
) -> Steps[Directions]:
    """The leading right singular directions of G, ordered, with their energies.

    Everything that rounding could decide differently on two processes (orthonormalization, order,
    signs) is computed on the home process alone.

    Args:
        gradient: this process's part of G.
        omega: ``moment.touch x width``, this process's rows of the sketch matrix.
        sharding: how G is distributed over the processes.
        power_passes: as of :func:`range_finder`.
        probes: ``basis x probes`` on the home process, no rows elsewhere; random signs, from which
            the norm of G is estimated (Hutch++, Meyer et al. 2021, algorithm 1).
    """
    moment, basis, me = sharding.moment, sharding.basis, sharding.me
    width = omega.shape[1]
    found = yield from range_finder(gradient, omega, sharding, power_passes=power_passes)
    vectors = found
    if probes is not None:
        # Z = (I - Q Q^T) Z: ||G||^2 = ||G Q||^2 + E ||G z||^2
        vectors = torch.cat([found, probes.addmm(found, found.T @ probes, alpha=-1)], 1)
    vectors = yield from from_home(vectors, basis.size, basis.touch, sharding)
    # B = G Q ;  B^T B = U diag(energy) U^T ;  Q <- Q U, in fp64: squaring halves the precision
    image = yield from sum_scatter(gradient().float() @ vectors, moment.touch, moment.keep, me)
    image, both = image.double(), vectors.shape[1]
    gram = yield from to_home(image.T @ image, sharding.whole(both), both, sharding)
    # the refresh's only wait for the device: eigh would wait as well, and so would the energies
    gram = to_host_memory(gram)
    told = gram.new_zeros(0, width if probes is None else width + 1)
    if me == sharding.home:
        values, rotation = torch.linalg.eigh(gram[:width, :width])
        rotation = rotation.flip(1).to(found.device, non_blocking=True)
        told = values.flip(0).clamp_min(0.0)[None]
        found = positive_peaks((found.double() @ rotation).to(found.dtype))
        if probes is not None:
            told = torch.cat([told, gram.diagonal()[width:].mean().view(1, 1)], 1)
    told = (yield from gather(told, sharding.at_home(1), sharding.whole(1), me)).reshape(-1)
    return Directions(found, told[:width], None if probes is None else told.sum())


def positive_peaks(vectors: Tensor) -> Tensor:
    """Flip columns of `vectors`, ``rows x width``, to make each one's largest entry positive.

    The sign of an eigenvector is arbitrary; this makes it independent of the LAPACK implementation.
    """
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * (1 - 2 * (peaks < 0).to(vectors.dtype))
