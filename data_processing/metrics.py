"""The metrics of GLUE, and others, under the names that logs and results use.

A metric takes predictions and labels, both [examples] label ids or scores, and returns its values by name. A value that
is not defined, such as the correlation of constant predictions, is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Values = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A function that evaluates predictions.

    compute: takes predictions and labels, both [examples] and not empty, and returns values by name.
    chosen_by: the value that selects the best checkpoint.
    regression: whether it takes scores; otherwise it takes label ids.
    two_labels: whether it is only for tasks of two labels.
    """

    compute: Callable[[np.ndarray, np.ndarray], Values]
    chosen_by: str
    regression: bool = False
    two_labels: bool = False

    def __call__(self, predictions: np.ndarray, labels: np.ndarray) -> Values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about undefined values, which become 0
            values = self.compute(predictions, labels)
        return {name: value if math.isfinite(value) else 0.0 for name, value in values.items()}

    def chance_level(self, labels: np.ndarray) -> float:
        """Return the best value of `chosen_by` for one and the same prediction for all examples; 0 for scores."""
        if self.regression:
            return 0.0
        return max(self(np.full_like(labels, label), labels)[self.chosen_by] for label in np.unique(labels))


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> Values:
    """Return `acc`: the share of correct label ids."""
    return {"acc": float((predictions == labels).mean())}


def accuracy_and_f1(predictions: np.ndarray, labels: np.ndarray) -> Values:
    """Return `acc`, `f1` of label id 1, and their mean `acc_and_f1`."""
    from sklearn.metrics import f1_score  # not above: importing it takes a second

    acc, f1 = accuracy(predictions, labels)["acc"], float(f1_score(labels, predictions, zero_division=0))
    return {"acc": acc, "f1": f1, "acc_and_f1": (acc + f1) / 2}


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> Values:
    """Return `acc`, and `macro_f1`: the mean F1 of the labels that occur in `labels` or `predictions`."""
    from sklearn.metrics import f1_score

    value = float(f1_score(labels, predictions, average="macro", zero_division=0))
    return {**accuracy(predictions, labels), "macro_f1": value}


def matthews(predictions: np.ndarray, labels: np.ndarray) -> Values:
    """Return `mcc`: Matthews' correlation coefficient, from -1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    return {"mcc": float(matthews_corrcoef(labels, predictions))}


def correlation(predictions: np.ndarray, labels: np.ndarray) -> Values:
    """Return `pearson` and `spearmanr` of scores, and their mean `corr`."""
    from scipy.stats import pearsonr, spearmanr

    if len(labels) < 2:
        return {"pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}
    predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
    both = (float(test(predictions, labels).statistic) for test in (pearsonr, spearmanr))
    pearson, spearman = (value if math.isfinite(value) else 0.0 for value in both)
    return {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}


METRICS = {  # by their names in task files
    "accuracy": Metric(accuracy, "acc"),
    "accuracy_and_f1": Metric(accuracy_and_f1, "acc", two_labels=True),
    "f1": Metric(accuracy_and_f1, "f1", two_labels=True),
    "macro_f1": Metric(macro_f1, "macro_f1"),
    "matthews": Metric(matthews, "mcc"),
    "correlation": Metric(correlation, "corr", regression=True),
}
