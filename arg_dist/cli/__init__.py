"""The ``arg-dist`` command: exports and inspects checkpoints, and plans runs."""
