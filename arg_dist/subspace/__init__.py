"""The mathematics of AdaRankGrad: pure functions and generators; no collective, no engine.

See :mod:`arg_dist.subspace.distributed` for how a computation requests sums over processes.
"""
