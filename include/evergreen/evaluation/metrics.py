"""The metrics of `TASK_METRICS`, in numpy, under weights of partitions.

Each metric is written once, as a function of rows and of a matrix of weights, one weight for each partition and
replicate: the figure itself is all ones, a resampled figure (`significance`) is another row of the matrix. numpy
rather than scikit-learn because importing the latter costs a second in every evaluation; the tests hold each metric
to scikit-learn's within 1e-12, `sample_weight` included.

Not here: intervals (`significance`), groups of rows (`slices`), what is good enough (`gate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evergreen.errors import EvaluationError, nearest
from evergreen.pack import PRECISION_AT_RECALL, is_metric

Array = NDArray[Any]

BINS = 15
"""Bins of the calibration error and of the calibration plot."""


def score(task: str, truth: Array, predicted: Array, classes: Sequence[Any] | None = None) -> dict[str, float]:
    """Every metric of `TASK_METRICS[task]` on the rows, in that order.

    `truth` (n,): 0/1 or bool for binary, classes for multiclass, numbers for regression. `predicted`: probability of 1
    (n,), probabilities (n, k) in the order of `classes`, the model's own (default: the sorted values of `truth`), or
    values (n,). Raises EvaluationError where shapes or values are not these, or a metric is undefined on the rows.
    """
    rows = Rows.of(task, truth, predicted, np.zeros(len(truth), dtype=int), classes)
    return {name: value(rows, name) for name in METRICS[task]}


def direction(metric: str) -> int:
    """+1 where greater is better, -1 where less is."""
    for task, metrics in METRICS.items():
        if metric in metrics or is_metric(task, metric):
            return metric_of(task, metric).direction
    known = {name for metrics in METRICS.values() for name in metrics}
    raise EvaluationError(f"{metric!r} is not a metric", fix=nearest(metric, known))


def metric_of(task: str, metric: str) -> Metric:
    """The metric of that name, `precision_at_recall_0.8` and its like among them. Raises EvaluationError."""
    if not is_metric(task, metric):
        raise EvaluationError(f"{metric!r} is not a metric of a {task} target", fix=nearest(metric, METRICS[task]))
    if metric in METRICS[task]:
        return METRICS[task][metric]
    target = float(metric.removeprefix(PRECISION_AT_RECALL))
    return Metric(partial(_precision_at_recall, target=target), +1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Checked rows: what is true, what one model predicted, and the partition that each row lies in."""

    task: str
    truth: Array
    """(n,) float; for multiclass (n,) int, the column of the true class."""
    predicted: Array
    """(n,) float, or (n, k)."""
    clusters: Array
    """(n,) int, 0 … partitions - 1, each of them there."""
    classes: tuple[Any, ...] = ()
    """Of multiclass rows, by column: the model's own classes, then those of the rows that it does not know."""

    @classmethod
    def of(
        cls, task: str, truth: Array, predicted: Array, clusters: Array, classes: Sequence[Any] | None = None
    ) -> Rows:
        """Rows from what jobs and partitions gave (see `score`). Raises EvaluationError.

        `classes` are those of the model that predicted. A class of the rows that is not among them gets a column of
        probability 0: the model is wrong on these rows, by every metric.
        """
        if task not in METRICS:
            raise EvaluationError(f"{task!r} is not a kind of target", fix=nearest(task, METRICS))
        n = len(truth)
        if n == 0:
            raise EvaluationError("there are no hold-out rows", fix="widen data.holdout, or choose another as-of")
        if len(predicted) != n or len(clusters) != n:
            raise EvaluationError(
                f"{len(predicted)} predictions and {len(clusters)} partition labels for {n} hold-out rows",
                fix="the model's predict must return one prediction for each row, in the order of the rows",
            )
        clusters = np.unique(clusters, return_inverse=True)[1]
        if task == "multiclass":
            own = np.unique(truth).tolist() if classes is None else classes
            known = _probabilities(predicted, len(own))
            truth, names = _codes(truth, own)
            unknown = np.zeros((n, len(names) - len(own)))
            return cls(task, truth, np.hstack((known, unknown)), clusters, names)
        truth, predicted = _numbers("target", truth), _numbers("predictions", predicted)
        if task == "binary":
            if not np.isin(truth, (0.0, 1.0)).all():
                found = ", ".join(f"{each:g}" for each in np.unique(truth)[:5])
                raise EvaluationError(f"the binary target holds {found}", fix="make it 0 and 1, or set data.task")
            if predicted.min() < 0 or predicted.max() > 1:
                raise EvaluationError(
                    f"predictions of a binary target reach from {predicted.min():g} to {predicted.max():g}",
                    fix="the model's predict must return the probability of 1",
                )
        return cls(task, truth, predicted, clusters)

    def within(self, chosen: Array) -> Rows:
        """The rows where `chosen` (n,) is true; partitions without one are gone."""
        clusters = np.unique(self.clusters[chosen], return_inverse=True)[1]
        return Rows(self.task, self.truth[chosen], self.predicted[chosen], clusters, self.classes)

    def apart(self, most: int) -> Rows:
        """The same rows, each a partition of its own; of more than `most`, as many runs of neighbours."""
        n = len(self.truth)
        return Rows(self.task, self.truth, self.predicted, np.arange(n) * min(n, most) // n, self.classes)

    @cached_property
    def partitions(self) -> int:
        return int(self.clusters.max()) + 1

    @cached_property
    def sizes(self) -> Array:
        """(partitions,) how many rows each holds."""
        return self.sums(np.ones(len(self.truth)))

    @cached_property
    def order(self) -> Array:
        """(n,) rows by falling prediction."""
        return np.argsort(-self.predicted, kind="stable")

    @cached_property
    def steps(self) -> Array:
        """Places in `order` where a prediction is met for the last time: equal predictions are one step."""
        falling = self.predicted[self.order]
        return np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1)

    def sums(self, values: Array) -> Array:
        """(partitions,) sums of `values` (n,) within each partition."""
        return np.bincount(self.clusters, weights=values, minlength=self.partitions)

    def mean(self, values: Array, weights: Array) -> Array:
        """(replicates,) weighted means of `values` (n,) under `weights` (replicates, partitions)."""
        return _divide(weights @ self.sums(values), weights @ self.sizes)


def figures(rows: Rows, metric: str, weights: Array) -> Array:
    """(replicates,) the metric under `weights` (replicates, partitions): each row counts as its partition weighs.

    NaN where it is undefined: one class only under a replicate, say. Raises EvaluationError for an unknown metric.
    """
    return metric_of(rows.task, metric).under(rows, weights)


def value(rows: Rows, metric: str) -> float:
    """The metric on the rows as they are. Raises EvaluationError where it is undefined."""
    found = float(figures(rows, metric, np.ones((1, rows.partitions)))[0])
    if np.isnan(found):
        raise EvaluationError(
            f"{metric} is undefined on these {len(rows.truth)} hold-out rows: the target has one value only",
            fix="widen data.holdout, or look at what the source gave for these days",
        )
    return found


def curve(rows: Rows, weight: Array) -> tuple[Array, Array]:
    """Weighted counts of true and of false positives at each threshold, from the highest down, under `weight`.

    `weight` (partitions,); both results (thresholds,). ROC and precision-recall are readings of it.
    """
    by_row = weight[rows.clusters[rows.order]]
    positive = by_row * rows.truth[rows.order]
    return np.cumsum(positive)[rows.steps], np.cumsum(by_row - positive)[rows.steps]


def calibration_bins(rows: Rows) -> Array:
    """(n,) the equal-mass bin of each row, 0 … BINS - 1: cut at quantiles of the predictions, equal ones together."""
    cuts = np.quantile(rows.predicted, np.arange(1, BINS) / BINS)
    return np.searchsorted(cuts, rows.predicted, side="left")


def _roc_auc(rows: Rows, weights: Array) -> Array:
    """Chance that a positive row is ranked above a negative one, ties counting half: the area under the ROC curve."""

    def area(weight: Array) -> float:
        tp, fp = curve(rows, weight)
        heights = tp + np.concatenate(([0.0], tp[:-1]))
        return float(_divide(np.sum(np.diff(fp, prepend=0.0) * heights) / 2, tp[-1] * fp[-1]))

    return np.array([area(weight) for weight in weights])


def _average_precision(rows: Rows, weights: Array) -> Array:
    """Sum over thresholds of precision times gain in recall (no interpolation, as scikit-learn's)."""

    def area(weight: Array) -> float:
        tp, fp = curve(rows, weight)
        gains = np.diff(tp, prepend=0.0)
        kept = gains > 0
        return float(_divide(np.sum(gains[kept] * tp[kept] / (tp[kept] + fp[kept])), tp[-1]))

    return np.array([area(weight) for weight in weights])


def _precision_at_recall(rows: Rows, weights: Array, *, target: float) -> Array:
    """Precision at the highest threshold whose recall is at least `target`: what a user who must find that share pays.

    The step of scikit-learn's `precision_recall_curve` at which recall first reaches the target, not the best step
    beyond it: that one would profit from luck among few rows.
    """

    def at(weight: Array) -> float:
        tp, fp = curve(rows, weight)
        if not tp[-1]:
            return float("nan")
        # Sums of weights may miss the target by a rounding.
        place = int(np.searchsorted(tp, target * tp[-1] * (1 - 1e-12)))
        return float(tp[place] / (tp[place] + fp[place]))

    return np.array([at(weight) for weight in weights])


def _binary_log_loss(rows: Rows, weights: Array) -> Array:
    """Mean of -log of the probability given to what happened, probabilities kept one float away from 0 and 1."""
    return rows.mean(-np.log(_kept_inside(np.where(rows.truth == 1, rows.predicted, 1 - rows.predicted))), weights)


def _brier(rows: Rows, weights: Array) -> Array:
    """Mean squared distance of the probability from what happened."""
    return rows.mean((rows.predicted - rows.truth) ** 2, weights)


def _binary_accuracy(rows: Rows, weights: Array) -> Array:
    """Share of rows on the right side of one half; one half itself says 1."""
    return rows.mean((rows.predicted >= 0.5) == (rows.truth == 1), weights)


def _calibration_error(rows: Rows, weights: Array) -> Array:
    """Expected calibration error: sum over bins b of n_b / n * |mean prediction in b - share of positives in b|.

    Naeini, Cooper, Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015; with 15
    bins of equal mass, which lie less than bins of equal width (Roelofs et al., "Mitigating bias in calibration error
    estimation", AISTATS 2022). The bins are those of all rows, whatever the weights. Biased upwards on few rows.
    """
    cells = rows.clusters * BINS + calibration_bins(rows)
    gaps = np.bincount(cells, weights=rows.predicted - rows.truth, minlength=rows.partitions * BINS)
    return _divide(np.abs(weights @ gaps.reshape(rows.partitions, BINS)).sum(axis=1), weights @ rows.sizes)


def _accuracy(rows: Rows, weights: Array) -> Array:
    """Share of rows whose likeliest class is the true one; of equals the first."""
    return rows.mean(rows.predicted.argmax(axis=1) == rows.truth, weights)


def _macro_f1(rows: Rows, weights: Array) -> Array:
    """Mean over classes, true or predicted somewhere, of 2 tp / (2 tp + fp + fn)."""
    chosen = rows.predicted.argmax(axis=1)
    k = rows.predicted.shape[1]

    def counts(labels: Array, counted: Array) -> Array:
        cells = np.bincount(rows.clusters * k + labels, weights=counted, minlength=rows.partitions * k)
        return weights @ cells.reshape(rows.partitions, k)

    every = np.ones(len(chosen))
    both = counts(chosen, every) + counts(rows.truth, every)
    f1 = np.where(both > 0, _divide(2 * counts(chosen, chosen == rows.truth), both), 0.0)
    return _divide(f1.sum(axis=1), (both > 0).sum(axis=1))


def _log_loss(rows: Rows, weights: Array) -> Array:
    """Mean of -log of the probability given to the true class, kept one float away from 0 and 1."""
    given = np.take_along_axis(rows.predicted, rows.truth[:, None], axis=1)[:, 0]
    return rows.mean(-np.log(_kept_inside(given)), weights)


def _rmse(rows: Rows, weights: Array) -> Array:
    """Root of the mean squared error, in the target's unit."""
    return np.sqrt(rows.mean((rows.predicted - rows.truth) ** 2, weights))


def _mae(rows: Rows, weights: Array) -> Array:
    """Mean absolute error, in the target's unit."""
    return rows.mean(np.abs(rows.predicted - rows.truth), weights)


def _r2(rows: Rows, weights: Array) -> Array:
    """1 - squared error / squared distance of the target from its own mean."""
    # Seen from the median the two sums below differ enough to be subtracted, and a constant target gives exactly 0.
    truth = rows.truth - np.median(rows.truth)
    squares = rows.mean(truth**2, weights)
    spread = squares - rows.mean(truth, weights) ** 2
    spread = np.where(spread > 1e-12 * squares, spread, np.nan)
    return 1 - rows.mean((rows.predicted - rows.truth) ** 2, weights) / spread


@dataclass(frozen=True)
class Metric:
    """A formula, which way is better, and the values it can take."""

    under: Callable[[Rows, Array], Array]
    direction: int
    least: float = 0.0
    most: float = 1.0


METRICS: Mapping[str, Mapping[str, Metric]] = {
    "binary": {
        "roc_auc": Metric(_roc_auc, +1),
        "average_precision": Metric(_average_precision, +1),
        "log_loss": Metric(_binary_log_loss, -1, most=np.inf),
        "brier": Metric(_brier, -1),
        "accuracy": Metric(_binary_accuracy, +1),
        "calibration_error": Metric(_calibration_error, -1),
    },
    "multiclass": {
        "accuracy": Metric(_accuracy, +1),
        "macro_f1": Metric(_macro_f1, +1),
        "log_loss": Metric(_log_loss, -1, most=np.inf),
    },
    "regression": {
        "rmse": Metric(_rmse, -1, most=np.inf),
        "mae": Metric(_mae, -1, most=np.inf),
        "r2": Metric(_r2, +1, least=-np.inf),
    },
}
"""Kind of target → metric → how it is reckoned, in the order of `pack.TASK_METRICS`."""


def _divide(above: Any, below: Any) -> Array:
    """The quotient, NaN where below is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(below) != 0, np.true_divide(above, below), np.nan)


def _kept_inside(probabilities: Array) -> Array:
    epsilon = np.finfo(float).eps
    return np.clip(probabilities, epsilon, 1 - epsilon)


def _numbers(what: str, values: Array) -> Array:
    """`values` as (n,) float. Raises EvaluationError for other shapes, text, nulls and infinities."""
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"the {what} are not numbers: {error}", fix="set data.task to multiclass, or give numbers"
        ) from error
    if numbers.ndim != 1:
        raise EvaluationError(f"the {what} have the shape {numbers.shape}", fix="give one number for each row")
    _finite(what, numbers)
    return numbers


def _probabilities(predicted: Array, many: int) -> Array:
    """`predicted` as (n, many) float, rows summing to 1. Raises EvaluationError."""
    predicted = np.asarray(predicted, dtype=float)
    if predicted.ndim != 2 or predicted.shape[1] != many:
        raise EvaluationError(
            f"predictions have the shape {predicted.shape}, and the model has {many} classes",
            fix="the model's predict must return one probability for each of its classes, in their order; "
            "job.describe(classes=…) states which they are",
        )
    _finite("predictions", predicted)
    if predicted.min() < 0 or np.abs(predicted.sum(axis=1) - 1).max() > 1e-3:
        raise EvaluationError(
            "predictions of a multiclass target are no probabilities: some are below 0, or a row does not sum to 1",
            fix="the model's predict must return probabilities (a softmax, say)",
        )
    return predicted


def _codes(truth: Array, own: Sequence[Any]) -> tuple[Array, tuple[Any, ...]]:
    """(n,) the place of each true value among the classes, and the classes: `own`, then those that are not among them.

    Equal is what Python calls equal: 1, 1.0 and True are one class, and "1" is another. Raises EvaluationError for rows
    without a class.
    """
    places = {name: place for place, name in enumerate(own)}
    values = np.asarray(truth).tolist()
    if empty := sum(value is None or (isinstance(value, float) and math.isnan(value)) for value in values):
        raise EvaluationError(f"the target holds {empty} nulls", fix="leave the rows without a target out")
    for name in sorted(set(values) - places.keys()):
        places[name] = len(places)
    return np.array([places[value] for value in values], dtype=int), tuple(places)


def _finite(what: str, numbers: Array) -> None:
    bad = int((~np.isfinite(numbers)).sum())
    if bad:
        raise EvaluationError(
            f"the {what} hold {bad} nulls or infinities", fix="look for them in the rows, then in the model"
        )
