"""What newer rows are worth: found where they are, and not where chance, or a hard week, looks like it."""

import numpy as np
import polars as pl
import pytest

from evergreen.evaluation import freshness
from evergreen.pack import Data

DATA = Data(target="bought", event_time="at")
DAYS = 21


def rows(seed, days, slope=1.5, noise=1.0):
    """Days of 100 rows: `bought` follows `age` by `slope`, and `shop` a little; days have effects of their own."""
    rng = np.random.default_rng(seed)
    day = np.repeat(np.arange(days), 100)
    age, shop = rng.normal(size=len(day)), rng.choice(["north", "south", None], len(day))
    score = slope * age + 0.5 * (shop == "north") + rng.normal(0, 0.3, days)[day] + rng.normal(0, noise, len(day))
    at = pl.Series(day).cast(pl.Int64) * 86_400_000_000
    return pl.DataFrame(
        {
            "age": age,
            "shop": pl.Series(shop.tolist(), dtype=pl.String),
            "at": at.cast(pl.Datetime("us", "UTC")),
            "bought": (score > 0).astype(int),
        }
    ), day


def gain(before, now, judged, clusters, **changed):
    told = {"data": DATA, "metric": "roc_auc", "confidence": 0.95} | changed
    found = freshness.gain(before.lazy(), now.lazy(), judged, clusters, **told)
    return found and found.whole


def test_rows_of_a_new_truth_are_worth_a_training():
    """What was bought by the old is bought by the young: whoever learns it does better, and surely."""
    judged, day = rows(3, DAYS, slope=-1.5)
    found = gain(rows(1, 30)[0], rows(2, 30, slope=-1.5)[0], judged, day)
    assert found.value > 0.4
    assert found.low > 0.3


def test_a_hard_week_is_none():
    """Both stand-ins do badly on rows that hardly follow anything; that is not what newer rows could mend."""
    judged, day = rows(3, DAYS, noise=8.0)
    found = gain(rows(1, 30)[0], rows(2, 30)[0], judged, day)
    assert abs(found.value) < 0.02
    assert found.low < 0 < found.high


@pytest.mark.parametrize("shared", [0, 27])
def test_where_nothing_changed_it_is_seldom_shown(shared):
    """Both learned from one truth, from some of the same days or from none: as often as a 97.5 % bound may err."""
    found = []
    for n in range(5):
        whole, day = rows(2 * n, 60)
        before, now = (whole.filter((day >= first) & (day < first + 30)) for first in (0, 30 - shared))
        found.append(gain(before, now, *rows(2 * n + 1, DAYS)))
    assert sum(each.low > 0 for each in found) <= 1
    assert max(each.value for each in found) < 0.01


def test_the_same_rows_are_worth_nothing():
    """In whatever order, of rows and of columns, and with a column that is new: not a hair more or less."""
    before = rows(1, 30)[0]
    now = before.sample(fraction=1, shuffle=True, seed=5).with_columns(new=pl.lit("x"))
    found = gain(before, now.select(reversed(now.columns)), *rows(2, DAYS))
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_gain_is_told_for_each_part_of_the_time():
    """The old truth until two days before the end, the new one since: found where it is; a part of one class has none."""
    old, day = rows(3, DAYS)
    new = rows(4, DAYS, slope=-1.5)[0]
    judged = pl.concat([old.filter(day < 14), new.filter(day >= 14)])

    def parts(before, now, judged, clusters):
        told = {"data": DATA, "metric": "roc_auc", "confidence": 0.95, "runs": 3}
        return freshness.gain(before.lazy(), now.lazy(), judged, clusters, **told).parts

    before, now = rows(1, 30)[0], rows(2, 30, slope=-1.5)[0]
    assert [each > 0.1 for each in parts(before, now, judged, day)] == [False, False, True]
    one_class = judged.with_columns(bought=pl.when(pl.Series(day) < 7).then(0).otherwise("bought"))
    assert [each is None for each in parts(before, now, one_class, day)] == [True, False, False]
    assert len(parts(before, now, judged, day // 11)) == 2


def test_a_metric_of_which_less_is_better_gains_by_falling():
    """The sign is that of better."""
    judged, day = rows(3, DAYS, slope=-1.5)
    found = gain(rows(1, 30)[0], rows(2, 30, slope=-1.5)[0], judged, day, metric="brier")
    assert found.low > 0.1
    assert found.low < found.value < found.high
    assert found.error > 0


@pytest.mark.parametrize(("task", "metric"), [("regression", "rmse"), ("multiclass", "accuracy")])
def test_other_targets(task, metric):
    """A number, and more than two classes."""

    def told(each):
        target = pl.col("age") * 2 if task == "regression" else (pl.col("age") * 2).round().clip(-1, 1).cast(pl.Int64)
        return each.with_columns(bought=target)

    def turned(each):
        return told(each.with_columns(age=-pl.col("age"))).with_columns(age=pl.col("age") * -1)

    judged, day = rows(3, DAYS)
    found = gain(
        told(rows(1, 30)[0]), turned(rows(2, 30)[0]), turned(judged), day,
        data=DATA.model_copy(update={"task": task}), metric=metric,
    )  # fmt: skip
    assert found.low > 0.2


def test_rows_that_have_a_new_class_are_worth_a_training():
    """The learner of the old rows is wrong on all of its rows; the other knows it, and gains about its share."""
    multiclass = DATA.model_copy(update={"task": "multiclass"})

    def classes(each, *, old):
        kind = pl.when(pl.col("age") > 1).then(pl.lit("new")).when(pl.col("age") > 0).then(pl.lit("some"))
        rows = each.with_columns(bought=kind.otherwise(pl.lit("none")))
        return rows.filter(pl.col("bought") != "new") if old else rows

    judged, day = rows(3, DAYS)
    judged = classes(judged, old=False)
    before, now = classes(rows(1, 30)[0], old=True), classes(rows(2, 30)[0], old=False)
    found = gain(before, now, judged, day, data=multiclass, metric="accuracy")
    assert found.value == pytest.approx((judged["bought"] == "new").mean(), abs=0.02)
    assert found.low > 0.1


@pytest.mark.parametrize("broken", ["one class", "a class of its own", "no column", "nothing", "few"])
def test_what_cannot_be_said_is_not(broken):
    """None, where a side has nothing to learn or to judge by."""
    before, now, (judged, day) = rows(1, 5)[0], rows(2, 5)[0], rows(3, 5)
    if broken == "one class":
        before = before.filter(pl.col("bought") == 1)
    elif broken == "a class of its own":
        now = now.with_columns(bought=pl.col("bought") * 2)
    elif broken == "no column":
        judged = judged.drop("age", "shop")
    elif broken == "nothing":
        now = now.clear()
    else:
        now = now.head(freshness.PARTS)
    assert gain(before, now, judged, day) is None


@pytest.mark.parametrize("sparse", ["number", "class", "rare"])
def test_what_a_part_does_not_hold_it_does_not_need(sparse):
    """A column with values in a few rows, one that is new, a class or a positive of which there are four: it can be said."""
    before, now, (judged, day) = rows(1, 10)[0], rows(2, 10)[0], rows(3, DAYS)
    told = {}
    if sparse == "number":
        few = pl.when(pl.int_range(pl.len()) % 400 == 7).then(pl.lit(1.0))
        before, now, judged = (
            each.with_columns(few=few, none=pl.lit(None, pl.Float64)) for each in (before, now, judged)
        )
        now = now.with_columns(none=pl.lit(2.0))
    else:
        first = pl.int_range(pl.len()) < 4
        label = pl.when(first).then(2).otherwise("bought") if sparse == "class" else first.cast(pl.Int64)
        before, now, judged = (each.with_columns(bought=label) for each in (before, now, judged))
        told = (
            {"data": DATA.model_copy(update={"task": "multiclass"}), "metric": "accuracy"} if sparse == "class" else {}
        )
    assert gain(before, now, judged, day, **told) is not None


def test_a_side_with_few_rows_learns_from_all_of_them():
    """A history that grows: of one truth, the longer one is worth what more rows are worth, and no more."""
    before, after = rows(1, 20)[0], rows(2, 1000)[0]
    found = gain(before, after, *rows(3, DAYS))
    assert abs(found.value) < 0.01


def test_many_rows_are_sampled_over_their_whole_time():
    """About so many, from the first to the last; what one side takes the other takes too; equal rows are not all one."""
    many = pl.LazyFrame({"n": range(90_000)})
    found = freshness._dealt(many, ["n"])[0]["n"]
    assert 29_000 < len(found) < 31_000
    assert (found[0] < 20, found[-1] > 89_980) == (True, True)
    fewer = freshness._dealt(many.filter(pl.col("n") >= 30_000), ["n"])[0]["n"]
    assert {n for n in found if n >= 30_000} <= set(fewer)
    alike, numbers = freshness._dealt(pl.LazyFrame({"n": [1] * 60_000 + [2] * 30_000}), ["n"])
    assert 29_000 < alike.height < 31_000
    parts = (numbers % freshness.PARTS).value_counts()["count"]
    assert 5_500 < parts.min() <= parts.max() < 6_500
