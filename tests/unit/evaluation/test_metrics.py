"""The metrics say what scikit-learn says, under weights too, and refuse what they cannot judge."""

import numpy as np
import pytest
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from evergreen.errors import EvaluationError
from evergreen.evaluation.metrics import BINS, METRICS, Rows, direction, figures, score
from evergreen.pack import TASK_METRICS

PARTITIONS = 6
K = 4


def binary(seed: int, n: int = 702, digits: int | None = None):
    """Truth, predictions and partitions; rounding to `digits` makes ties. No quantile of 702 rows' bins is a row."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.3).astype(int)
    predicted = 1 / (1 + np.exp(-(truth + rng.normal(-1, 1.2, n))))
    return truth, predicted if digits is None else predicted.round(digits), rng.integers(0, PARTITIONS, n)


def multiclass(seed: int, n: int = 500):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, K, n)
    raw = np.exp(rng.normal(size=(n, K)) + 1.2 * np.eye(K)[truth])
    return truth, raw / raw.sum(axis=1, keepdims=True), rng.integers(0, PARTITIONS, n)


def regression(seed: int, n: int = 500):
    rng = np.random.default_rng(seed)
    truth = rng.gamma(2, 10, n) + 1000
    return truth, truth + rng.normal(1, 5, n), rng.integers(0, PARTITIONS, n)


def by_sklearn(task: str, truth, predicted, weight) -> dict[str, float]:
    """What scikit-learn says of rows that weigh `weight`; the calibration error has no such function there."""
    by_row = {"sample_weight": weight}
    if task == "binary":
        return {
            "roc_auc": reference.roc_auc_score(truth, predicted, **by_row),
            "average_precision": reference.average_precision_score(truth, predicted, **by_row),
            "log_loss": reference.log_loss(truth, predicted, labels=[0, 1], **by_row),
            "brier": reference.brier_score_loss(truth, predicted, **by_row),
            "accuracy": reference.accuracy_score(truth, predicted >= 0.5, **by_row),
        }
    if task == "multiclass":
        chosen = predicted.argmax(axis=1)
        return {
            "accuracy": reference.accuracy_score(truth, chosen, **by_row),
            "macro_f1": reference.f1_score(truth, chosen, average="macro", **by_row),
            "log_loss": reference.log_loss(truth, predicted, labels=range(K), **by_row),
        }
    return {
        "rmse": reference.root_mean_squared_error(truth, predicted, **by_row),
        "mae": reference.mean_absolute_error(truth, predicted, **by_row),
        "r2": reference.r2_score(truth, predicted, **by_row),
    }


CASES = {
    "binary": lambda: ("binary", *binary(1)),
    "binary with ties": lambda: ("binary", *binary(2, digits=1)),
    "binary with certain predictions": lambda: ("binary", *binary(3, digits=0)),
    "multiclass": lambda: ("multiclass", *multiclass(4)),
    "regression": lambda: ("regression", *regression(5)),
}


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_sklearn(case):
    """Each metric is scikit-learn's within 1e-12, in the order of TASK_METRICS."""
    task, truth, predicted, _ = CASES[case]()
    found = score(task, truth, predicted)
    assert tuple(found) == TASK_METRICS[task]
    for metric, expected in by_sklearn(task, truth, predicted, np.ones(len(truth))).items():
        assert found[metric] == pytest.approx(expected, abs=1e-12, rel=1e-12), metric


@pytest.mark.parametrize("case", CASES)
def test_metrics_under_weights_equal_sklearn_with_sample_weights(case):
    """A row counts as its partition weighs, a partition of weight 0 not at all."""
    task, truth, predicted, clusters = CASES[case]()
    weights = np.random.default_rng(0).integers(0, 4, (5, PARTITIONS)).astype(float)
    weights[:, 0] = 0
    rows = Rows.of(task, truth, predicted, clusters)
    for replicate, weight in enumerate(weights):
        kept = weight[clusters] > 0
        expected = by_sklearn(task, truth[kept], predicted[kept], weight[clusters][kept])
        for metric, value in expected.items():
            found = figures(rows, metric, weights)[replicate]
            assert found == pytest.approx(value, abs=1e-12, rel=1e-12), metric


@pytest.mark.parametrize("digits", [None, 1])
def test_calibration_error_equals_sklearns_calibration_curve(digits):
    """It is the mean gap of scikit-learn's quantile bins, weighted by their sizes."""
    truth, predicted, _ = binary(6, digits=digits)
    positive, mean = calibration_curve(truth, predicted, n_bins=BINS, strategy="quantile")
    edges = np.quantile(predicted, np.linspace(0, 1, BINS + 1)[1:-1])
    sizes = np.bincount(np.searchsorted(edges, predicted), minlength=BINS)
    expected = np.sum(sizes[sizes > 0] / len(truth) * np.abs(positive - mean))
    assert score("binary", truth, predicted)["calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_a_constant_is_its_distance_from_the_rate():
    """A model that always says 0.4 where 30 of 100 happen is off by 0.1."""
    truth = np.repeat([1, 0], [30, 70])
    assert score("binary", truth, np.full(100, 0.4))["calibration_error"] == pytest.approx(0.1, abs=1e-12)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), min_size=2, max_size=60).filter(
        lambda rows: len({truth for truth, _ in rows}) == 2
    ),
    st.floats(0.2, 4),
)
def test_ranking_metrics_do_not_change_under_monotone_maps(rows, power):
    """ROC-AUC and average precision look at the order of predictions only."""
    truth = np.array([each for each, _ in rows])
    predicted = np.array([each for _, each in rows]) / 1000
    before, after = (Rows.of("binary", truth, each, np.zeros(len(truth))) for each in (predicted, predicted**power))
    one = np.ones((1, 1))
    assert figures(before, "roc_auc", one) == figures(after, "roc_auc", one)
    assert figures(before, "average_precision", one) == figures(after, "average_precision", one)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["binary", "multiclass", "regression"]))
def test_the_order_of_rows_does_not_matter(seed, task):
    """Rows in another order are the same evaluation."""
    truth, predicted, _ = {"binary": binary, "multiclass": multiclass, "regression": regression}[task](
        seed % 1000, n=80
    )
    shuffled = np.random.default_rng(seed).permutation(len(truth))
    found = score(task, truth[shuffled], predicted[shuffled])
    assert found == pytest.approx(score(task, truth, predicted), abs=1e-12)


def test_classes_may_be_text_in_any_order():
    """Columns of predictions follow `classes`, whatever their type and order."""
    truth, predicted, _ = multiclass(7)
    names = np.array(["wren", "ant", "mole", "cod"])
    for text in (names[truth], names[truth].astype(object)):
        assert score("multiclass", text, predicted, classes=list(names)) == score("multiclass", truth, predicted)


def test_a_known_class_may_be_absent_from_the_holdout():
    """A class without a hold-out row keeps its column."""
    truth, predicted, _ = multiclass(8)
    kept = truth != 2
    found = score("multiclass", truth[kept], predicted[kept], classes=range(K))
    assert found == pytest.approx(by_sklearn("multiclass", truth[kept], predicted[kept], None), abs=1e-12)


def test_inputs_are_not_mutated():
    """Scoring leaves truth and predictions as they were."""
    for case in CASES.values():
        task, truth, predicted, _ = case()
        before = truth.copy(), predicted.copy()
        score(task, truth, predicted)
        np.testing.assert_array_equal((truth, predicted)[0], before[0])
        np.testing.assert_array_equal((truth, predicted)[1], before[1])


def test_every_metric_of_a_pack_has_its_formula():
    """What `pack.yaml` may name is what an evaluation produces, in the same order."""
    assert {task: tuple(metrics) for task, metrics in METRICS.items()} == dict(TASK_METRICS)


def test_direction_says_which_way_is_better():
    """+1 for scores, -1 for losses and errors."""
    up = {"roc_auc", "average_precision", "accuracy", "macro_f1", "r2"}
    for metrics in TASK_METRICS.values():
        for metric in metrics:
            assert direction(metric) == (1 if metric in up else -1), metric


def test_direction_of_an_unknown_metric_names_the_nearest():
    """A misspelt metric is met with the right one."""
    with pytest.raises(EvaluationError, match=r"'roc_acu' is not a metric\n  fix: did you mean 'roc_auc'\?"):
        direction("roc_acu")


HALF = np.full(4, 0.5)
MIXED = np.array([0, 1, 0, 1])
REFUSED = {
    "one class": ("binary", np.zeros(4), HALF, None, "roc_auc is undefined on these 4 hold-out rows"),
    "constant target": ("regression", np.full(4, 0.1), HALF, None, "r2 is undefined on these 4 hold-out rows"),
    "wrong length": ("binary", MIXED, HALF[:3], None, "3 predictions .* for 4 hold-out rows"),
    "no rows": ("binary", MIXED[:0], HALF[:0], None, "there are no hold-out rows"),
    "NaN predictions": ("binary", MIXED, np.array([0.5, np.nan, np.inf, 0.5]), None, "predictions hold 2 nulls"),
    "null targets": ("binary", np.array([0, 1, None, 1], dtype=object), HALF, None, "target hold 1 nulls"),
    "not probabilities": ("binary", MIXED, np.array([0.5, -3.0, 2.0, 0.5]), None, "reach from -3 to 2"),
    "not 0 and 1": ("binary", np.array([0, 1, 2, 1]), HALF, None, "the binary target holds 0, 1, 2"),
    "text for numbers": ("regression", np.array(list("abcd")), HALF, None, "the target are not numbers"),
    "two columns for one": ("regression", MIXED, np.ones((4, 2)), None, r"shape \(4, 2\)"),
    "too few columns": (
        "multiclass",
        np.arange(4),
        np.full((4, 3), 1 / 3),
        None,
        r"\(4, 3\), and the model has 4 classes",
    ),
    "rows without a class": (
        "multiclass",
        np.array(["a", None, "b", None]),
        np.full((4, 2), 0.5),
        "ab",
        "holds 2 nulls",
    ),
    "rows not summing to 1": ("multiclass", MIXED, np.ones((4, 2)), None, "no probabilities"),
    "unknown task": ("binry", MIXED, HALF, None, "did you mean 'binary'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_be_judged_are_refused(case):
    """Each is an EvaluationError that says what is wrong, with no warning of numpy's beside it (they are errors here)."""
    task, truth, predicted, classes, message = REFUSED[case]
    with pytest.raises(EvaluationError, match=message):
        score(task, truth, predicted, classes)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 0.5, 0.8, 1]))
def test_precision_at_a_recall_is_scikit_learns_step(seed, target):
    """The precision of the highest threshold of scikit-learn's curve that finds so many, ties and weights included."""
    rng = np.random.default_rng(seed)
    truth, predicted, day = rng.random(200) < 0.3, rng.random(200).round(2), rng.integers(0, 5, 200)
    rows, weight = Rows.of("binary", truth, predicted, day), rng.integers(1, 4, 5).astype(float)
    precision, recall, _ = reference.precision_recall_curve(truth, predicted, sample_weight=weight[rows.clusters])
    reached = precision[np.flatnonzero(recall >= target - 1e-12)[-1]]
    found = figures(rows, f"precision_at_recall_{target}", weight[None])
    assert found == pytest.approx([reached], abs=1e-12)


def test_precision_at_a_recall_is_a_metric_of_binary_targets_only():
    """It has a direction as others have; a recall that cannot be, or another target, is refused."""
    assert direction("precision_at_recall_0.95") == 1
    rows = Rows.of("regression", np.arange(3.0), np.arange(3.0), np.zeros(3, int))
    with pytest.raises(EvaluationError, match=r"'precision_at_recall_0\.8' is not a metric of a regression target"):
        figures(rows, "precision_at_recall_0.8", np.ones((1, 1)))
    with pytest.raises(EvaluationError, match=r"'precision_at_recall_1\.5' is not a metric"):
        direction("precision_at_recall_1.5")
