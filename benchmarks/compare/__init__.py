"""Compare AdaRankGrad with other optimizers: same model, same data, sweeps of the same size.

``python -m benchmarks.compare pretrain --out DIR`` runs a comparison, ``... report DIR`` rebuilds
its table and plots. Each run is a separate process. The other optimizers are their authors'
packages, installed as an optional extra; no other package imports them.
"""
