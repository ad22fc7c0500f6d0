"""Metrics: every one against values computed by hand."""

import math
import warnings

import numpy as np
import pytest

from data_processing.metrics import METRICS, Metric

# Predictions, labels, values. Label 1 is "positive": TP, FP, FN, TN count predictions of 1 and of 0.
BY_HAND = [
    # Right at 0, 1, 3 and 4: 4 of 6.
    ("accuracy", [2, 0, 1, 1, 0, 2], [2, 0, 2, 1, 0, 1], {"acc": 4 / 6}),
    # TP 2, FP 1, FN 2, TN 1: right 3 of 6; F1 = 2 TP / (2 TP + FP + FN) = 4 / 7.
    ("accuracy_and_f1", [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], {"acc": 0.5, "f1": 4 / 7, "acc_and_f1": 15 / 28}),
    ("f1", [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0], {"acc": 0.5, "f1": 4 / 7, "acc_and_f1": 15 / 28}),
    # Label 0: TP 1, FP 1, FN 0, F1 2/3. Label 1: TP 1, FP 0, FN 2, F1 2/4. Label 2: TP 1, FP 1, FN 0, F1 2/3.
    ("macro_f1", [0, 0, 1, 2, 2], [0, 1, 1, 2, 1], {"acc": 3 / 5, "macro_f1": (2 / 3 + 2 / 4 + 2 / 3) / 3}),
    # Label 1 neither occurs nor is predicted: the mean of label 0 (TP 1, FN 1: 2/3) and 2 (TP 1, FP 1: 2/3).
    ("macro_f1", [0, 2, 2], [0, 0, 2], {"acc": 2 / 3, "macro_f1": 2 / 3}),
    # Label 1 occurs and is never predicted: its F1 is 0. Label 0: TP 2, FP 1, F1 4/5.
    ("macro_f1", [0, 0, 0], [0, 0, 1], {"acc": 2 / 3, "macro_f1": (4 / 5 + 0) / 2}),
    # TP 3, FP 1, FN 1, TN 2: (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) = 5 / sqrt(4 * 4 * 3 * 3).
    ("matthews", [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0], {"mcc": 5 / 12}),
    ("matthews", [1, 0, 1, 0], [0, 1, 0, 1], {"mcc": -1.0}),
    ("matthews", [1, 1, 0, 0], [1, 0, 1, 0], {"mcc": 0.0}),
    # Deviations from the means 3 and 2: (-2, -1, 3) and (-2, 0, 2); sum of products 10, of squares 14 and 8.
    # Ranks are the same, so Spearman's is 1.
    (
        "correlation",
        [1, 2, 6],
        [0, 2, 4],
        {"pearson": 10 / math.sqrt(14 * 8), "spearmanr": 1, "corr": (10 / math.sqrt(112) + 1) / 2},
    ),
    # A tie has the mean of its ranks: (1, 2.5, 2.5, 4), less 2.5 (-1.5, 0, 0, 1.5), against (-1.5, -0.5, 0.5, 1.5):
    # products 4.5, squares 4.5 and 5. Pearson's: (-1, 0, 0, 1) against the same, 3 / sqrt(2 * 5).
    (
        "correlation",
        [0, 1, 1, 2],
        [1, 2, 3, 4],
        {
            "pearson": 3 / math.sqrt(10),
            "spearmanr": 4.5 / math.sqrt(22.5),
            "corr": (3 / math.sqrt(10) + 4.5 / math.sqrt(22.5)) / 2,
        },
    ),
    # Ties on both sides: ranks (1.5, 1.5, 3.5, 3.5) and (1.5, 3.5, 1.5, 3.5): the products' sum is 0.
    ("correlation", [0, 0, 5, 5], [0, 5, 0, 5], {"pearson": 0, "spearmanr": 0, "corr": 0}),
    ("correlation", [5, 3, 1], [1, 3, 5], {"pearson": -1, "spearmanr": -1, "corr": -1}),
    ("correlation", [1, 2], [4, 3], {"pearson": -1, "spearmanr": -1, "corr": -1}),
]

# Undefined values are 0: F1 if label 1 neither occurs nor is predicted, correlations of constant values.
CONSTANT = [
    ("accuracy", [1, 1], [1, 1], {"acc": 1.0}),
    ("accuracy", [1, 1], [0, 0], {"acc": 0.0}),
    ("f1", [0, 0], [0, 0], {"acc": 1.0, "f1": 0.0, "acc_and_f1": 0.5}),
    ("f1", [0, 0], [0, 1], {"acc": 0.5, "f1": 0.0, "acc_and_f1": 0.25}),
    # TP 1, FP 1, FN 0.
    ("f1", [1, 1], [0, 1], {"acc": 0.5, "f1": 2 / 3, "acc_and_f1": 7 / 12}),
    ("accuracy_and_f1", [1, 1], [1, 1], {"acc": 1.0, "f1": 1.0, "acc_and_f1": 1.0}),
    ("macro_f1", [2, 2], [2, 2], {"acc": 1.0, "macro_f1": 1.0}),
    ("macro_f1", [0, 0], [1, 1], {"acc": 0.0, "macro_f1": 0.0}),
    ("matthews", [1, 1, 1], [1, 0, 1], {"mcc": 0.0}),
    ("matthews", [1, 0, 1], [1, 1, 1], {"mcc": 0.0}),
    ("matthews", [1, 1], [1, 1], {"mcc": 0.0}),
    ("correlation", [2, 2, 2], [1, 2, 3], {"pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}),
    ("correlation", [1, 2, 3], [2, 2, 2], {"pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}),
    ("correlation", [2, 2], [2, 2], {"pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}),
]

ONE_EXAMPLE = [
    ("accuracy", [1], [1], {"acc": 1.0}),
    ("accuracy", [1], [0], {"acc": 0.0}),
    ("f1", [1], [1], {"acc": 1.0, "f1": 1.0, "acc_and_f1": 1.0}),
    ("accuracy_and_f1", [0], [1], {"acc": 0.0, "f1": 0.0, "acc_and_f1": 0.0}),
    ("macro_f1", [2], [2], {"acc": 1.0, "macro_f1": 1.0}),
    ("matthews", [1], [1], {"mcc": 0.0}),
    ("correlation", [1], [1], {"pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}),
]


@pytest.mark.parametrize(("name", "predictions", "labels", "values"), BY_HAND + CONSTANT + ONE_EXAMPLE)
def test_a_metric_has_the_values_computed_by_hand(name, predictions, labels, values):
    """Under their names, in order, as floats that JSON can hold, and without warnings."""
    kind = np.float32 if METRICS[name].regression else np.int64
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        computed = METRICS[name](np.array(predictions, dtype=kind), np.array(labels, dtype=kind))
    assert warned == []
    assert computed == pytest.approx(values, abs=1e-12)
    assert list(computed) == list(values)
    assert {type(value) for value in computed.values()} == {float}


def test_every_metric_has_examples():
    for cases in (BY_HAND, CONSTANT, ONE_EXAMPLE):
        assert {name for name, *_ in cases} == set(METRICS)


def test_predictions_come_before_labels():
    calls = []

    def compute(predictions, labels):
        calls.append((predictions.tolist(), labels.tolist()))
        return {"value": 1.0}

    assert Metric(compute, "value")(np.array([1, 2]), np.array([3, 4])) == {"value": 1.0}
    assert calls == [([1, 2], [3, 4])]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_becomes_0(value):
    """NaN compares false with everything, so no checkpoint would be the best."""
    metric = Metric(lambda predictions, labels: {"other": 0.25, "value": value}, "value")
    assert metric(np.zeros(2), np.zeros(2)) == {"other": 0.25, "value": 0.0}


def test_an_undefined_correlation_is_0_in_the_mean():
    """An infinite score has a rank, but no deviation: ranks (1, 3, 2) and (1, 2, 3), so 1 - 6 (0 + 1 + 1) / (3 * 8)."""
    values = METRICS["correlation"](np.array([1, np.inf, 2], dtype=np.float32), np.array([1, 2, 3], dtype=np.float32))
    assert values == pytest.approx({"pearson": 0, "spearmanr": 0.5, "corr": 0.25})
    values = METRICS["correlation"](np.array([1, np.nan, 2], dtype=np.float32), np.array([1, 2, 3], dtype=np.float32))
    assert values == {"pearson": 0, "spearmanr": 0, "corr": 0}


def test_correlations_are_computed_in_double_precision():
    """Around a mean of 1000, fp32 keeps four decimals of a score; products of deviations need more."""
    labels = np.array([1, 2, 3, 4], dtype=np.float32)
    predictions = (1000 + np.array([1, 2, 3, 4]) / 1024).astype(np.float32)  # exact in fp32, and a line
    values = METRICS["correlation"](predictions, labels)
    assert values["pearson"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accuracy", "acc"),
        ("accuracy_and_f1", "acc"),
        ("f1", "f1"),
        ("macro_f1", "macro_f1"),
        ("matthews", "mcc"),
        ("correlation", "corr"),
    ],
)
def test_a_metric_selects_checkpoints_by_one_of_its_values(name, value):
    metric = METRICS[name]
    assert metric.chosen_by == value
    assert value in metric(np.array([0, 1]), np.array([0, 1]))


def test_metrics_for_regressions_and_for_two_labels():
    assert [name for name, metric in METRICS.items() if metric.regression] == ["correlation"]
    assert [name for name, metric in METRICS.items() if metric.two_labels] == ["accuracy_and_f1", "f1"]
