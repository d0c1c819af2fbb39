"""What newer rows are worth: would a training on today's rows do better than one on the champion's? Asked of a stand-in.

How well a model does on a week says as much of the week as of the model: weeks differ in how hard they are, and a champion
that was judged on a hard one looks sound for ever after. So the model is left out of it. One cheap learner is taught
twice, on the rows that the champion learned from and on those that a training now would learn from, and both predict the
same newest rows, which neither has seen:

    gain    the second's metric less the first's, in units of the metric, by its sign: greater is better

Same learner, same rows: what is left is what the rows are worth, and two kinds of chance. Other days might have been
judged, as in the gate's own interval of a paired difference; and other rows might have been learned from, by which alone
two models of one truth differ by more than a margin. So each side's rows are dealt into `PARTS` parts, a learner is taught
on each, and their mean predicts. The gain without each day judged tells the first kind, without each part the second
(`significance.jackknife`). Rows are dealt by what is in them: one that both sides hold is in the same part of both, and
sides that hold the same rows gain nothing, exactly.

The stand-in is gradient boosting of histograms of the columns as they are (Friedman, "Greedy function approximation",
Annals of Statistics 29(5), 2001; Ke et al., "LightGBM", NeurIPS 2017; scikit-learn's), on at most about `ROWS` rows of
each side: seconds, whatever the model costs. It knows columns of numbers, words and truth values, and nothing of times.

Not covered: what the model itself makes of the rows. One that keeps what it learned, or that columns of a table do not
say anything to, may gain more or less than the stand-in does; the gate has the last word.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evergreen.columns import named, series, unused
from evergreen.evaluation import metrics
from evergreen.evaluation.metrics import Array, Rows
from evergreen.evaluation.significance import MOST, jackknife, without_each
from evergreen.pack import Data
from evergreen.run import Estimate

if TYPE_CHECKING:
    import polars as pl

ROWS = 30_000
"""About the most rows that a side's stand-in learns from."""
PARTS = 5
"""Learners of a side, each with rows of its own."""
ROUNDS = 60
WORDS = 250
"""Most values of a column of words that are told apart, the most frequent ones."""
SEED = 0


class Gain(NamedTuple):
    """What the stand-in gains."""

    whole: Estimate
    """On all rows that are judged."""
    parts: tuple[float | None, ...]
    """On each of so many runs of their partitions, in order of time; None where it is undefined: one class, say."""


def gain(
    before: pl.LazyFrame,
    now: pl.LazyFrame,
    judged: pl.DataFrame,
    clusters: Array,
    *,
    data: Data,
    metric: str,
    confidence: float,
    runs: int = 1,
    independent: bool = False,
) -> Gain | None:
    """What the stand-in gains by learning from `now` in place of `before`; None where that cannot be said.

    All three hold rows with labels; `clusters` (n,) is the partition of each row of `judged`, numbered in order of time,
    which are told apart in as many `runs`, or in one each of fewer. It cannot be said where the sides share no column to
    learn from, have one class, or unlike ones of a binary target, or fewer than `PARTS` rows, or where the metric is
    undefined on `judged`. Of several classes, one that a side lacks is an error of its learner, as it is of a model.
    """
    columns, same = _columns(before, now, judged, data), _same(before, now)
    if not columns or not same or not judged.height:
        return None
    tables, numbers = zip(*(_dealt(rows, same) for rows in (before, now)), strict=True)
    truths = [each[data.target].to_numpy() for each in (*tables, judged)]
    known: list[list[Any] | None] = [None, None]  # of each side: as of two models, each is read by its own classes
    if data.task != "regression":
        if any(len(np.unique(truth)) < 2 for truth in truths):
            return None
        known = [np.unique(truth).tolist() for truth in truths[:2]]
        if data.task == "binary" and (known[0] != known[1] or not np.isin(truths[2], truths[0]).all()):
            return None
    asked, *sides_rows = _encoded((judged, *tables), columns)
    sides = []
    for number, learned, truth, classes in zip(numbers, sides_rows, truths[:2], known, strict=True):
        masks = [(number % PARTS == each).to_numpy() for each in range(PARTS)]
        if not all(mask.any() for mask in masks):
            return None
        sides.append([_taught(learned[mask], truth[mask], asked, columns, data.task, classes) for mask in masks])

    def by(side: list[Array], classes: list[Any] | None, without_part: int | None = None) -> Rows:
        """The rows as the mean of a side's learners predicts them, the one of a part left out."""
        kept = [predicted for k, predicted in enumerate(side) if k != without_part]
        rows = Rows.of(data.task, truths[2], np.mean(kept, axis=0), clusters, classes)
        return rows.apart(MOST) if independent else rows

    pairs = [
        [by(side, classes, without_part) for side, classes in zip(sides, known, strict=True)]
        for without_part in (None, *range(PARTS))
    ]
    gains = [metrics.value(new, metric) - metrics.value(old, metric) for old, new in pairs]
    old, new = pairs[0]
    days = without_each(new)
    by_day = metrics.figures(new, metric, days) - metrics.figures(old, metric, days)
    sign = metrics.direction(metric)
    found = jackknife(sign * gains[0], sign * by_day, confidence, also=[sign * np.array(gains[1:])])
    if not math.isfinite(found.value):
        return None
    runs = min(runs, new.partitions)
    chosen = np.where(np.arange(new.partitions) * runs // new.partitions == np.arange(runs)[:, None], 1.0, 0.0)
    by_run = sign * (metrics.figures(new, metric, chosen) - metrics.figures(old, metric, chosen))
    return Gain(whole=found, parts=tuple(float(each) if math.isfinite(each) else None for each in by_run))


def _dealt(rows: pl.LazyFrame, same: list[str]) -> tuple[pl.DataFrame, pl.Series]:
    """About `ROWS` of them, or all of fewer, with the number that each is dealt by.

    The number follows from what the row holds in the columns that are the `same` on both sides, and from how many such
    rows came before it: equal rows are not all taken, or all left. A row that one side takes as one of fewer is taken by
    the other, too, as far as that one's share goes.
    """
    import polars as pl

    # Of a large table only these numbers and the rows that are taken are ever in memory.
    held = rows.select(pl.struct([named(name) for name in same]).hash(SEED).alias("held")).collect(engine="streaming")
    again = pl.int_range(pl.len()).over("held").alias("again")
    numbers = held.select(pl.struct("held", again).hash(SEED).alias("number")).to_series()
    if held.height <= ROWS:
        return rows.collect(), numbers
    taken = (numbers // PARTS % 1_000_000 < round(1_000_000 * ROWS / held.height)).arg_true()
    place = unused("place", rows.collect_schema().names())
    chosen = rows.with_row_index(place).filter(named(place).is_in(taken.implode())).collect(engine="streaming")
    return chosen[[name for name in chosen.columns if name != place]], numbers.gather(taken)


def _same(before: pl.LazyFrame, now: pl.LazyFrame) -> list[str]:
    """The columns of one kind on both sides that a row can be told by."""
    import polars as pl

    plain = (pl.String, pl.Boolean)
    kinds, others = before.collect_schema(), now.collect_schema()
    return [
        name
        for name, kind in kinds.items()
        if others.get(name) == kind and (kind.is_numeric() or kind.is_temporal() or kind in plain)
    ]


def _columns(before: pl.LazyFrame, now: pl.LazyFrame, judged: pl.DataFrame, data: Data) -> dict[str, bool]:
    """The columns that the stand-in learns from: name → whether it holds words."""
    import polars as pl

    words = (pl.String, pl.Categorical, pl.Enum)
    schemas = [before.collect_schema(), now.collect_schema(), judged.schema]
    found: dict[str, bool] = {}
    if not all(data.target in schema for schema in schemas):
        return found
    for name in schemas[0]:
        if name in (data.target, data.event_time) or not all(name in schema for schema in schemas):
            continue
        kinds = [schema[name] for schema in schemas]
        if all(isinstance(kind, words) for kind in kinds):
            found[name] = True
        elif all(kind.is_numeric() or kind == pl.Boolean for kind in kinds):
            found[name] = False
    return found


def _encoded(tables: tuple[pl.DataFrame, ...], columns: dict[str, bool]) -> list[Array]:
    """(n, columns) float, of each table; words by their place among the most frequent, NaN for others and for none.

    What is judged is the first, and has no say in which words are frequent.
    """
    import polars as pl

    ways: list[pl.Expr] = []
    for name, words in columns.items():
        if not words:
            number = named(name).cast(pl.Float64)
            ways.append(pl.when(number.is_finite()).then(number))
            continue
        seen = pl.concat([series(each, name).cast(pl.String) for each in tables[1:]]).drop_nulls()
        counted = seen.rename("word").value_counts(name="rows").sort(["rows", "word"], descending=[True, False])
        known = counted["word"].head(WORDS).to_list()
        places = list(map(float, range(len(known))))
        ways.append(named(name).cast(pl.String).replace_strict(known, places, default=None, return_dtype=pl.Float64))
    return [each.select(ways).to_numpy() for each in tables]


def _taught(
    learned: Array, truth: Array, asked: Array, columns: dict[str, bool], task: str, classes: list[Any] | None
) -> Array:
    """The stand-in's predictions for `asked`: (n,), or (n, k) of k classes, of which a part may hold only some."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    told: Any = np.isfinite(learned).any(axis=0)  # of a column that says nothing in this part, nothing can be learned
    present = np.unique(truth) if classes else truth[:1]
    learner = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    predicted = np.zeros((len(asked), len(classes) if classes else 1))
    if not told.any() or (classes and len(present) == 1):
        mean = [np.mean(truth == each) for each in classes] if classes else [np.mean(truth)]
        predicted += mean
    else:
        # So few rows are learned from sooner by one core than by cores that wait for each other.
        with threadpool_limits(1):
            model = learner(
                max_iter=ROUNDS,
                categorical_features=[words for words, kept in zip(columns.values(), told, strict=True) if kept],
                early_stopping=False,
                random_state=SEED,
            ).fit(learned[:, told], truth)
            if classes:
                predicted[:, np.isin(classes, present)] = model.predict_proba(asked[:, told])
            else:
                predicted[:, 0] = model.predict(asked[:, told])
    return predicted if task == "multiclass" else predicted[:, -1]
