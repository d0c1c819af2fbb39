"""What a model leans on: a column that matters, one that does not, and every kind of column and target."""

import math

import numpy as np
import polars as pl
import pytest

from evergreen.evaluation.importance import ROWS, importance, partners, sample
from evergreen.evaluation.metrics import score

DAYS = np.repeat(np.arange(10), 120)


def table(seed: int = 1) -> pl.DataFrame:
    """1,200 rows of ten days, with a column of each kind."""
    rng = np.random.default_rng(seed)
    n = len(DAYS)
    return pl.DataFrame(
        {
            "strong": rng.normal(size=n),
            "weak": rng.normal(size=n),
            "idle": rng.normal(size=n),
            "always": np.full(n, 3.0),
            "gappy": np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
            "word": rng.choice(["ant", "cod", "wren"], n),
            "tied": rng.integers(0, 2, n),
        }
    ).with_columns(word=pl.when(pl.int_range(pl.len()) % 7 == 0).then(None).otherwise("word"))


def odds(rows: pl.DataFrame) -> np.ndarray:
    """What the model of these tests reckons with: everything but `idle` and `always`."""
    told = rows.select(
        odds=2 * pl.col("strong")
        + 0.5 * pl.col("weak")
        + pl.col("gappy").fill_nan(1.0)
        + (pl.col("word") == "cod").fill_null(value=False).cast(pl.Float64)
        + 0.8 * pl.col("tied")
    )
    return told["odds"].to_numpy()


def probability(rows: pl.DataFrame) -> np.ndarray:
    return 1 / (1 + np.exp(-odds(rows)))


def three(rows: pl.DataFrame) -> np.ndarray:
    """(n, 3) probabilities of low, middle and high."""
    likely = np.column_stack([-odds(rows), np.zeros(rows.height), odds(rows)])
    likely = np.exp(likely - likely.max(axis=1, keepdims=True))
    return likely / likely.sum(axis=1, keepdims=True)


def asked(rows, task="binary", metric="roc_auc", predict=probability, truth=None, **how):
    """Importance of all columns of `rows` to the model, by name."""
    rng = np.random.default_rng(9)
    if truth is None:
        truth = rng.random(rows.height) < probability(rows)
    partner = rows[partners(rows.height)]
    shuffled = ((name, predict(rows.with_columns(partner[name]))) for name in rows.columns)
    found = importance(task, metric, truth, predict(rows), shuffled, DAYS, confidence=0.95, **how)
    return {each.column: each for each in found}


def test_importance_is_what_the_metric_loses():
    """The figure is the metric on the rows less the metric with one column of the partners."""
    rows = table()
    truth = np.random.default_rng(9).random(rows.height) < probability(rows)
    swapped = probability(rows.with_columns(rows[partners(rows.height)]["weak"]))
    before, after = (score("binary", truth, each)["roc_auc"] for each in (probability(rows), swapped))
    assert asked(rows)["weak"].loss.value == pytest.approx(before - after, abs=1e-12)


def test_what_matters_more_comes_first_and_what_does_not_matter_is_nought():
    """By the model's own weights; a column it does not read, and a constant one, lose exactly nothing."""
    found = asked(table())
    assert next(iter(found)) == "strong"
    assert found["strong"].loss.low > found["weak"].loss.value > 0
    for name in ("idle", "always"):
        assert (found[name].loss.value, found[name].share, found[name].share_error) == (0, 0, 0), name


def test_every_kind_of_column_can_be_shuffled():
    """Missing values, categories with nulls among them, and values that many rows share count like any other."""
    found = asked(table())
    assert all(found[name].loss.low > 0 for name in ("gappy", "word", "tied"))


def test_shares_are_of_all_that_is_lost():
    """They add up to one where no shuffle helps, and each has its standard error."""
    found = asked(table()).values()
    assert sum(abs(each.share) for each in found) == pytest.approx(1)
    total = sum(abs(each.loss.value) for each in found)
    assert all(each.share == pytest.approx(each.loss.value / total) for each in found)


def test_a_column_that_misleads_is_below_zero():
    """Where the truth has turned against it, the model would do better without."""
    rows = table()
    turned = probability(rows.with_columns(-pl.col("strong")))
    found = asked(rows, truth=np.random.default_rng(9).random(rows.height) < turned)
    assert found["strong"].loss.high < 0
    assert found["strong"].share < 0 < found["gappy"].share


@pytest.mark.parametrize("metric", ["accuracy", "log_loss", "macro_f1"])
def test_classes_have_importance(metric):
    """Of a metric where less is better, too: a loss is a loss."""
    rows = table()
    names = np.array(["1 low", "2 middle", "3 high"])  # sorted, as the predictions are
    truth = names[(three(rows).cumsum(axis=1) < np.random.default_rng(9).random((rows.height, 1))).sum(axis=1)]
    found = asked(rows, "multiclass", metric, three, truth, classes=names.tolist())
    assert next(iter(found)) == "strong"
    assert found["strong"].loss.low > 0 == found["idle"].loss.value


@pytest.mark.parametrize("metric", ["rmse", "mae", "r2"])
def test_numbers_have_importance(metric):
    """In the target's unit where the metric has one."""
    rows = table()
    found = asked(rows, "regression", metric, odds, odds(rows) + np.random.default_rng(9).normal(size=rows.height))
    assert next(iter(found)) == "strong"
    assert found["strong"].loss.low > 0 == found["idle"].loss.value


def test_where_the_metric_says_nothing_nothing_is_said():
    """One class only: no figure to lose anything of."""
    rows = table()
    assert asked(rows, truth=np.zeros(rows.height, dtype=bool)) == {}


def test_a_model_that_leans_on_nothing_has_shares_of_nought():
    """All losses nought: no division by it."""
    rows = table()
    found = asked(rows, predict=lambda rows: np.full(rows.height, 0.3))
    assert {(each.loss.value, each.share) for each in found.values()} == {(0.0, 0.0)}


def test_every_row_has_a_partner_that_is_another():
    """A circle through all rows, whatever their number; columns keep their values, missing ones too."""
    for n in (2, 3, 50):
        rows = pl.DataFrame({"place": np.arange(n), "word": [None, *"x" * (n - 1)]})
        partner = rows[partners(rows.height)]
        assert sorted(partner["place"]) == list(range(n))
        assert (partner["place"] != rows["place"]).all()
        assert partner["word"].null_count() == 1


def test_a_sample_has_rows_of_every_partition_in_proportion():
    """One row at least of the smallest; all rows where they are few."""
    days = np.repeat(np.arange(3), [9_000, 3_000, 2])
    places = sample(days)
    assert len(places) <= ROWS + 3
    assert np.bincount(days[places]).tolist() == [9_000 * ROWS // 12_002, 3_000 * ROWS // 12_002, 1]
    assert len(np.unique(places)) == len(places)
    assert sample(DAYS).tolist() == list(range(len(DAYS)))


def test_the_same_rows_give_the_same_figures():
    """The seed is the procedure's own."""
    days = np.repeat(np.arange(4), 2_000)
    assert sample(days).tolist() == sample(days).tolist()
    assert np.array_equal(partners(50), partners(50))
    assert asked(table()) == asked(table())
    assert not any(math.isnan(each.share) for each in asked(table()).values())
