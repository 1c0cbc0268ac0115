"""Classification metrics, by scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def classification_metrics(labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of `predicted` against `labels`, integers each.

    F1 is that of label 1 if the labels are 0 and 1, else the mean over the labels.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    two = max(labels.max(), predicted.max()) <= 1
    f1 = f1_score(labels, predicted, average="binary" if two else "macro", zero_division=0.0)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "f1": float(f1),
        "matthews": float(matthews_corrcoef(labels, predicted)),
    }


def metrics_of_logits() -> Callable[[Any], dict[str, float]]:
    """The Trainer's ``compute_metrics``, from the logits of an evaluation, `examples x labels`."""

    def compute(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        if isinstance(logits, tuple):  # some models return more than the logits
            logits = logits[0]
        return classification_metrics(prediction.label_ids, logits.argmax(-1))

    return compute
