"""The command ``arg-dist``: what one does with a checkpoint outside of training."""
