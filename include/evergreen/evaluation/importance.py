"""What a model leans on: how much of its primary metric is lost when a column's values are shuffled among the rows.

    importance of a column    the metric on the rows, less the metric where each row has the column's value of its
                              partner, in units of the metric, by its sign: greater where the model leans on it more
    share of a column         its importance as a share of what all of them come to, regardless of sign

Breiman, "Random forests", Machine Learning 45(1), 2001, for the shuffle; Fisher, Rudin, Dominici, "All models are
wrong, but many are useful", Journal of Machine Learning Research 20(177), 2019, for its reading as a property of any
model on given rows (their model reliance, as a difference). Rows are paired in one circle through a random order, so
that no row is its own partner; the circle, and which rows are asked, are seeded: the same rows give the same figures.

At most `ROWS` rows are asked, from every partition its share: each column costs a prediction of all of them. On the 14
days of `flight_delay` more rows hardly tell more: of what chance makes between two profiles 0.39 is left with 2,000 rows,
0.34 with 4,000, 0.30 with all 12,900. The rest is that days differ.

Intervals leave out a partition at a time (`significance`): they hold the days' differences and the shuffle's chance.

Not covered: columns that say the same stand in for each other, so that each seems to matter less than both; and a
shuffle makes rows that never happen, of which the model may say anything (Hooker, Mentch, Zhou, "Unrestricted
permutation forces extrapolation", Statistics and Computing 31, 2021). It says what the model uses, not what is true.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evergreen.evaluation.metrics import Array, Rows, direction, figures
from evergreen.evaluation.significance import jackknife, standard_error, without_each
from evergreen.run import Importance

ROWS = 2000
"""Most rows that are asked; more only where there are more partitions."""
SEED = 0


def sample(clusters: Array) -> Array:
    """Which of the rows are asked: their places, rising; of each partition its share, and one at least.

    `clusters` (n,): the partition of each row.
    """
    rng = np.random.default_rng(SEED)
    chosen = []
    for partition in np.unique(clusters):
        places = np.flatnonzero(clusters == partition)
        many = max(1, len(places) * ROWS // max(ROWS, len(clusters)))
        chosen.append(np.sort(rng.permutation(places)[:many]))
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=int)


def partners(rows: int) -> Array:
    """(rows,) the place of each row's partner, which is another row."""
    order = np.random.default_rng(SEED).permutation(rows)
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    return partner


def importance(
    task: str,
    metric: str,
    truth: Array,
    predicted: Array,
    shuffled: Iterable[tuple[str, Array]],
    clusters: Array,
    *,
    confidence: float,
    classes: Sequence[Any] | None = None,
) -> tuple[Importance, ...]:
    """The importance of each column, the greatest first; none where the metric is undefined on the rows.

    `shuffled`: each column, and the predictions where its values are the partners'; they are looked at one at a time, so
    that those of a wide table need not be in memory together. The rest is as `significance.intervals` takes it. Raises
    EvaluationError where `metrics.score` would.
    """
    rows = Rows.of(task, truth, predicted, clusters, classes)
    sign, without = direction(metric), without_each(rows)
    weights = np.concatenate((np.ones((1, rows.partitions)), without))  # as they are; then less each partition

    def loss_of(permuted: Array) -> Array:
        return sign * (whole - figures(Rows.of(task, truth, permuted, clusters, classes), metric, weights))

    whole = figures(rows, metric, weights)
    if math.isnan(whole[0]):
        return ()
    losses = {name: loss_of(permuted) for name, permuted in shuffled}
    if not losses:
        return ()
    total = np.sum([np.abs(each) for each in losses.values()], axis=0)
    found = []
    for name, loss in losses.items():
        share = np.divide(loss, total, out=np.zeros_like(loss), where=total != 0)
        found.append(
            Importance(
                column=name,
                loss=jackknife(float(loss[0]), loss[1:], confidence),
                share=float(share[0]),
                share_error=standard_error(float(share[0]), share[1:]),
            )
        )
    return tuple(sorted(found, key=lambda each: (-each.loss.value, each.column)))
