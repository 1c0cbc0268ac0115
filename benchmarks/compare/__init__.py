"""AdaRankGrad beside other optimizers: the same model, the same data, sweeps of the same size.

``python -m benchmarks.compare pretrain --out DIR`` runs a comparison, ``... report DIR`` draws its
table and pictures again. Each run is a process of its own. The other optimizers are those that
their authors published, an optional extra of the package; nothing outside this room imports them.
"""
