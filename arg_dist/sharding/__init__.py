"""The layout of matrices over processes, and the optimizer's only collectives."""
