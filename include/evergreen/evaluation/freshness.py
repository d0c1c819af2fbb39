"""What newer rows are worth: would a training on today's rows do better than one on the champion's? Asked of a stand-in.

How well a model does on a week says as much of the week as of the model: weeks differ in how hard they are, and a champion
that was judged on a hard one looks sound for ever after. So the model is left out of it. One cheap learner is taught
twice, on the rows that the champion learned from and on those that a training now would learn from, and both predict the
same newest rows, which neither has seen:

    gain    the second's metric less the first's, in units of the metric, by its sign: greater is better

with the gate's own interval of a paired difference. Same learner, same rows: what is left is what the rows are worth.

The stand-in is gradient boosting of histograms of the columns as they are (Friedman, "Greedy function approximation",
Annals of Statistics 29(5), 2001; Ke et al., "LightGBM", NeurIPS 2017; scikit-learn's), on at most `ROWS` rows of each
side: seconds, whatever the model costs. It knows columns of numbers, words and truth values, and nothing of times.

Not covered: what the model itself makes of the rows. One that keeps what it learned, or that columns of a table do not
say anything to, may gain more or less than the stand-in does; the gate has the last word.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from evergreen.evaluation import significance
from evergreen.evaluation.metrics import Array, Rows, direction
from evergreen.pack import Data
from evergreen.run import Estimate

if TYPE_CHECKING:
    import polars as pl

ROWS = 20_000
"""Most rows that a stand-in learns from."""
ROUNDS = 60
WORDS = 250
"""Most values of a column of words that are told apart, the most frequent ones."""
SEED = 0


def gain(
    before: pl.DataFrame,
    now: pl.DataFrame,
    judged: pl.DataFrame,
    clusters: Array,
    *,
    data: Data,
    metric: str,
    confidence: float,
    independent: bool = False,
) -> Estimate | None:
    """What the stand-in gains by learning from `now` in place of `before`; None where that cannot be said.

    All three hold rows with labels; `clusters` (n,) is the partition of each row of `judged`. It cannot be said where a
    side has no column or one class, where classes differ, or where the metric is undefined on `judged`.
    """
    columns = _columns(before, now, judged, data)
    tables = (before, now, judged)
    truths = [each[data.target].to_numpy() for each in tables]
    if not columns or not all(len(truth) for truth in truths):
        return None
    classes = None
    if data.task != "regression":
        known = [np.unique(truth) for truth in truths]
        if len(known[0]) < 2 or not np.array_equal(known[0], known[1]) or not np.isin(known[2], known[0]).all():
            return None
        if len(known[2]) < 2:
            return None
        classes = known[0].tolist()
    encoded = _encoded(tables, columns)
    told: dict[str, Any] = {"metric": metric, "confidence": confidence, "independent": independent}
    rows = []
    for learned, truth in zip(encoded[:2], truths[:2], strict=True):
        predicted = _taught(learned, truth, encoded[2], columns, data.task)
        rows.append(Rows.of(data.task, truths[2], predicted, clusters, classes))
    found = significance.paired(rows[1], rows[0], **told)
    if not math.isfinite(found.value):
        return None
    if direction(metric) > 0:
        return found
    low, high = (None if bound is None else -bound for bound in (found.high, found.low))
    return Estimate(value=-found.value, low=low, high=high)


def sampled(rows: pl.LazyFrame, count: int) -> pl.DataFrame:
    """Every k-th of `count` rows, at most `ROWS`."""
    return rows.gather_every(max(1, math.ceil(count / ROWS))).collect()


def _columns(before: pl.DataFrame, now: pl.DataFrame, judged: pl.DataFrame, data: Data) -> dict[str, bool]:
    """The columns that the stand-in learns from: name → whether it holds words."""
    import polars as pl

    words = (pl.String, pl.Categorical, pl.Enum)
    found: dict[str, bool] = {}
    for name in before.columns:
        if name in (data.target, data.event_time) or name not in now.columns or name not in judged.columns:
            continue
        kinds = [each[name].dtype for each in (before, now, judged)]
        if all(isinstance(kind, words) for kind in kinds):
            found[name] = True
        elif all(kind.is_numeric() or kind == pl.Boolean for kind in kinds):
            found[name] = False
    return found


def _encoded(tables: tuple[pl.DataFrame, ...], columns: dict[str, bool]) -> list[Array]:
    """(n, columns) float, of each table; words by their place among the most frequent, NaN for others and for none."""
    import polars as pl

    ways: list[pl.Expr] = []
    for name, words in columns.items():
        if not words:
            number = pl.col(name).cast(pl.Float64)
            ways.append(pl.when(number.is_finite()).then(number))
            continue
        seen = pl.concat([each[name].cast(pl.String) for each in tables[:2]]).drop_nulls()
        counted = seen.value_counts().sort(["count", name], descending=[True, False])
        known = counted[name].head(WORDS).to_list()
        places = list(map(float, range(len(known))))
        ways.append(pl.col(name).cast(pl.String).replace_strict(known, places, default=None, return_dtype=pl.Float64))
    return [each.select(ways).to_numpy() for each in tables]


def _taught(learned: Array, truth: Array, asked: Array, columns: dict[str, bool], task: str) -> Array:
    """The stand-in's predictions for `asked`: (n,), or (n, k) of k classes."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    learner = HistGradientBoostingRegressor if task == "regression" else HistGradientBoostingClassifier
    model = learner(
        max_iter=ROUNDS, categorical_features=list(columns.values()), early_stopping=False, random_state=SEED
    ).fit(learned, truth)
    if task == "regression":
        return np.asarray(model.predict(asked))
    probabilities = np.asarray(model.predict_proba(asked))
    return probabilities[:, 1] if task == "binary" else probabilities
