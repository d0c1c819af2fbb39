"""Intervals hold what they promise on days that differ, and are a function of the data alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evergreen.evaluation.metrics import Rows, figures, score
from evergreen.evaluation.significance import (
    estimate,
    holm,
    intervals,
    jackknife,
    p_worse,
    paired,
    settling,
)
from evergreen.pack import TASK_METRICS
from evergreen.run import Estimate


def difference(task, metric, truth, challenger, champion, *, clusters, confidence, independent=False):
    """Challenger minus champion, paired."""
    new, old = (Rows.of(task, truth, each, clusters) for each in (challenger, champion))
    return paired(new, old, metric, confidence, independent)


def days(rng: np.random.Generator, count: int, rows: int = 90):
    """A hold-out of `count` days, each with a difficulty and a rate of its own, and two models that share its noise.

    Returns truth, the predictions of both, and the day of each row.
    """
    day = np.repeat(np.arange(count), rng.integers(rows // 2, rows * 3 // 2, count))
    known, hidden = rng.normal(size=(2, len(day)))
    rate, skill = rng.normal(-1.2, 0.6, count)[day], rng.normal(0.8, 0.35, count)[day]
    truth = rng.random(len(day)) < 1 / (1 + np.exp(-(rate + skill * known + 0.5 * hidden)))
    noise = rng.normal(0, 0.3, (2, len(day)))
    better, worse = (
        1 / (1 + np.exp(-(-1.2 + 0.8 * known + share * hidden + each)))
        for share, each in zip((0.5, 0.3), noise, strict=True)
    )
    return truth, better, worse, day


def coverage(count: int, trials: int) -> dict[str, float]:
    """Share of trials whose nominal 95 % interval holds the figure of endlessly many days, for five figures."""
    rng = np.random.default_rng(20130401)
    truth, better, worse, day = days(rng, 3000)
    figures = score("binary", truth, better)
    wanted = {name: figures[name] for name in ("roc_auc", "average_precision", "log_loss", "brier")}
    wanted["difference"] = figures["roc_auc"] - score("binary", truth, worse)["roc_auc"]
    held = dict.fromkeys(wanted, 0)
    for _ in range(trials):
        truth, better, worse, day = days(rng, count)
        found = intervals("binary", truth, better, day, confidence=0.95)
        found["difference"] = difference("binary", "roc_auc", truth, better, worse, clusters=day, confidence=0.95)
        for name, value in wanted.items():
            held[name] += found[name].low <= value <= found[name].high
    return {name: hits / trials for name, hits in held.items()}


@pytest.mark.parametrize("count", [3, 14])
def test_an_interval_of_95_percent_holds_the_true_figure_9_times_in_10(count):
    """With days of their own difficulty and few of them, where the percentile bootstrap holds it 5 to 9 times in 10."""
    found = coverage(count, trials=250)
    assert min(found.values()) >= 0.90, found


def bootstrapped(rng: np.random.Generator, *models: Rows) -> tuple[float, float]:
    """The rival: percentiles of the AUC, or of its paired difference, on days drawn again with replacement."""
    count = models[0].partitions
    weights = rng.multinomial(count, np.ones(count) / count, 500).astype(float)
    replicates = [figures(rows, "roc_auc", weights) for rows in models]
    low, high = np.quantile(replicates[0] if len(models) == 1 else replicates[0] - replicates[1], [0.025, 0.975])
    return low, high


@pytest.mark.prove
@pytest.mark.parametrize("count", [2, 3, 7, 14])
def test_leaving_days_out_covers_better_than_drawing_them_again(count):
    """On the same days the percentile bootstrap holds the true AUC, and the true difference, less often than this."""
    rng = np.random.default_rng(20130401)
    truth, better, worse, day = days(rng, 3000)
    auc, other = (score("binary", truth, each)["roc_auc"] for each in (better, worse))
    held = np.zeros(4)
    trials = 400
    for _ in range(trials):
        truth, better, worse, day = days(rng, count)
        new, old = (Rows.of("binary", truth, each, day) for each in (better, worse))
        one, two = estimate(new, "roc_auc", 0.95), paired(new, old, "roc_auc", 0.95)
        bounds = [(one.low, one.high), (two.low, two.high), bootstrapped(rng, new), bootstrapped(rng, new, old)]
        held += [low <= true <= high for true, (low, high) in zip([auc, auc - other] * 2, bounds, strict=True)]
    ours, rivals = held[:2] / trials, held[2:] / trials
    print(f"{count} days: AUC {ours[0]:.3f} against {rivals[0]:.3f}, difference {ours[1]:.3f} against {rivals[1]:.3f}")  # noqa: T201
    assert (ours >= np.maximum(rivals, 0.9)).all()


def test_rows_of_one_day_do_not_count_as_independent():
    """Copying every row of every day ten times tells nothing new: the interval stays."""
    truth, better, _, day = days(np.random.default_rng(2), 10)
    once = intervals("binary", truth, better, day, confidence=0.95)["roc_auc"]
    tenfold = intervals("binary", *(np.tile(each, 10) for each in (truth, better, day)), confidence=0.95)["roc_auc"]
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high), abs=1e-12)


def test_the_interval_of_a_mean_is_the_textbooks():
    """On days of equal size the brier score's interval is the t interval of the days' means."""
    rng = np.random.default_rng(3)
    day = np.repeat(np.arange(8), 50)
    truth, predicted = rng.random(400) < 0.4, rng.random(400)
    means = ((predicted - truth) ** 2).reshape(8, 50).mean(axis=1)
    half = 2.364624251592785 * means.std(ddof=1) / np.sqrt(8)  # t(7) at 97.5 %
    found = intervals("binary", truth, predicted, day, confidence=0.95)["brier"]
    assert (found.low, found.high) == pytest.approx((means.mean() - half, means.mean() + half), abs=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8))
def test_a_model_does_not_differ_from_itself(seed, count):
    """The paired difference of identical predictions is exactly 0, and so is the width of its interval."""
    truth, predicted, _, day = days(np.random.default_rng(seed), count)
    for metric in TASK_METRICS["binary"]:
        found = difference("binary", metric, truth, predicted, predicted.copy(), clusters=day, confidence=0.95)
        assert (found.value, found.low, found.high, found.error) == (0.0, 0.0, 0.0, 0.0), metric


def test_pairing_narrows_the_interval_of_a_difference():
    """What both models suffer on a hard day is taken out: the difference is known better than either figure."""
    truth, better, worse, day = days(np.random.default_rng(4), 14)
    paired = difference("binary", "roc_auc", truth, better, worse, clusters=day, confidence=0.95)
    alone = intervals("binary", truth, better, day, confidence=0.95)["roc_auc"]
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_two_kinds_of_chance_are_both_in_the_interval():
    """The mean of a table whose rows and columns have effects of their own: held as promised; by the rows alone it is not."""
    rng = np.random.default_rng(19)
    held, by_rows_alone = 0, 0
    for _ in range(400):
        table = rng.normal(0, 1, (14, 1)) + rng.normal(0, 0.8, (1, 5)) + rng.normal(0, 0.3, (14, 5))
        means = [(table.sum() - table.sum(axis=1 - axis)) / (table.size - table.shape[1 - axis]) for axis in (0, 1)]
        both = jackknife(table.mean(), means[0], 0.95, also=[means[1]])
        alone = jackknife(table.mean(), means[0], 0.95)
        held += both.low <= 0 <= both.high
        by_rows_alone += alone.low <= 0 <= alone.high
    assert held / 400 >= 0.94
    assert by_rows_alone / 400 < 0.85


def test_degrees_of_freedom_of_two_kinds_of_chance_are_satterthwaites():
    """Of equal variances the freedoms add; of one that is hardly there the other's is left."""
    without = np.array([-1.0, 0.0, 1.0, 0.0])
    assert jackknife(0.0, without, 0.95, also=[without]).freedom == 6
    assert jackknife(0.0, without, 0.95, also=[without * 1e-6]).freedom == 3
    assert jackknife(0.0, without * 0, 0.95, also=[without * 0]).error == 0


def test_where_one_kind_of_chance_is_not_known_there_is_no_interval():
    """One column only says nothing of columns."""
    assert jackknife(1.0, np.array([0.5, 1.5]), 0.95, also=[np.array([1.0])]).low is None


def test_a_difference_is_the_challenger_less_the_champion():
    """Its value is that of the two figures, and changing sides changes its sign and turns its interval over."""
    truth, better, worse, day = days(np.random.default_rng(5), 14)
    there = difference("binary", "log_loss", truth, better, worse, clusters=day, confidence=0.9)
    back = difference("binary", "log_loss", truth, worse, better, clusters=day, confidence=0.9)
    apart = score("binary", truth, better)["log_loss"] - score("binary", truth, worse)["log_loss"]
    assert there.value == pytest.approx(apart, abs=1e-12)
    assert (back.value, back.low, back.high) == pytest.approx((-there.value, -there.high, -there.low), abs=1e-12)


@pytest.mark.parametrize("task", TASK_METRICS)
def test_every_metric_has_a_value_within_its_bounds(task):
    """All metrics of all kinds of target come with bounds, and their value is `metrics.score`'s."""
    rng = np.random.default_rng(6)
    day = np.repeat(np.arange(7), 40)
    truth = {"binary": rng.random(280) < 0.4, "multiclass": rng.integers(0, 3, 280), "regression": rng.normal(size=280)}
    predicted = {
        "binary": rng.random(280),
        "multiclass": rng.dirichlet(np.ones(3), 280),
        "regression": rng.normal(size=280),
    }
    found = intervals(task, truth[task], predicted[task], day, confidence=0.95)
    values = {name: each.value for name, each in found.items()}
    assert values == pytest.approx(score(task, truth[task], predicted[task]), abs=1e-12)
    assert all(each.low < each.value < each.high for each in found.values())


def test_more_confidence_is_a_wider_interval():
    """99 % reaches further than 90 %."""
    truth, better, _, day = days(np.random.default_rng(7), 14)
    wide, narrow = (intervals("binary", truth, better, day, confidence=each)["roc_auc"] for each in (0.99, 0.9))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_bounds_stay_within_what_a_metric_can_be():
    """Two days tell little, but never that an AUC exceeds 1 or an error falls below 0."""
    truth, better, _, day = days(np.random.default_rng(8), 2)
    for name, each in intervals("binary", truth, better, day, confidence=0.95).items():
        assert each.low >= 0, name
        assert each.high <= 1 or name == "log_loss", name


def test_one_partition_has_no_interval():
    """With a single day there is nothing to leave out: the value stands without bounds."""
    truth, better, worse, _ = days(np.random.default_rng(9), 3)
    once = np.zeros(len(truth), dtype=int)
    found = intervals("binary", truth, better, once, confidence=0.95)
    assert all((each.low, each.high) == (None, None) for each in found.values())
    paired = difference("binary", "roc_auc", truth, better, worse, clusters=once, confidence=0.95)
    assert (paired.low, paired.high) == (None, None)


def test_a_figure_that_hangs_on_one_day_has_no_interval():
    """All positives on one day: without that day there is no AUC, so it has no bounds; the brier score has."""
    day = np.repeat(np.arange(4), 30)
    truth, predicted = (day == 2) & (np.arange(120) % 2 == 0), np.random.default_rng(10).random(120)
    found = intervals("binary", truth, predicted, day, confidence=0.95)
    assert (found["roc_auc"].low, found["roc_auc"].high) == (None, None)
    assert found["brier"].low < found["brier"].value < found["brier"].high


def test_labels_of_partitions_are_names_only():
    """Any integers may name the days."""
    truth, better, _, day = days(np.random.default_rng(11), 6)
    plain = intervals("binary", truth, better, day, confidence=0.95)["roc_auc"]
    named = intervals("binary", truth, better, 1000 - 7 * day, confidence=0.95)["roc_auc"]
    assert (named.value, named.low, named.high) == pytest.approx((plain.value, plain.low, plain.high), abs=1e-12)


def test_many_partitions_are_left_out_in_runs_of_neighbours():
    """400 hours are judged as 100 runs of four, so cost does not grow with the square of the hold-out."""
    truth, better, worse, hour = days(np.random.default_rng(12), 400, rows=10)
    found = difference("binary", "roc_auc", truth, better, worse, clusters=hour, confidence=0.95)
    in_fours = difference("binary", "roc_auc", truth, better, worse, clusters=hour // 4, confidence=0.95)
    assert (found.value, found.low, found.high) == pytest.approx(
        (in_fours.value, in_fours.low, in_fours.high), abs=1e-12
    )


# Rows that a pack declares independent


def covariance(truth, *models):
    """DeLong's covariance of the AUCs as their paper writes it: every positive beside every negative."""
    places = []
    for predicted in models:
        beside = np.subtract.outer(predicted[truth], predicted[~truth])
        places.append((beside > 0) + 0.5 * (beside == 0))
    positives, negatives = (
        np.array([each.mean(axis=1) for each in places]),
        np.array([each.mean(axis=0) for each in places]),
    )
    return np.cov(positives) / truth.sum() + np.cov(negatives) / (~truth).sum()


@pytest.mark.parametrize("decimals", [1, 6])
def test_the_difference_of_independent_rows_is_delongs(decimals):
    """Midranks give what every positive beside every negative gives, with ties and without."""
    truth, better, worse, day = days(np.random.default_rng(13), 5)
    better, worse = better.round(decimals), worse.round(decimals)
    found = difference("binary", "roc_auc", truth, better, worse, clusters=day, confidence=0.95, independent=True)
    of = covariance(truth, better, worse)
    error = np.sqrt(of[0, 0] + of[1, 1] - 2 * of[0, 1])
    assert found.error == pytest.approx(error, abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.959963984540054 * error, abs=1e-12)
    assert (found.freedom, found.partitions) == (None, None)


def test_delongs_error_is_the_published_one():
    """Hanley and McNeil's 109 images rated 1 to 5 (Radiology 143, 1982): AUC 0.8932, standard error 0.0307.

    As Stata's manual prints them for `roctab`; against a constant, whose AUC is 0.5 without any error.
    """
    normal, abnormal = [33, 6, 6, 11, 2], [3, 2, 2, 11, 33]
    truth = np.repeat([False, True], [sum(normal), sum(abnormal)])
    rating = np.concatenate([np.repeat(np.arange(1, 6), counts) for counts in (normal, abnormal)]) / 5
    found = difference(
        "binary", "roc_auc", truth, rating, np.full(109, 0.5), clusters=np.zeros(109, int), confidence=0.95,
        independent=True,
    )  # fmt: skip
    assert (round(found.value + 0.5, 4), round(found.error, 4)) == (0.8932, 0.0307)
    assert (round(found.low + 0.5, 5), round(found.high + 0.5, 5)) == (0.83295, 0.95339)


@pytest.mark.parametrize("metric", ["roc_auc", "brier", "average_precision"])
def test_intervals_of_independent_rows_hold_the_true_difference(metric):
    """Rows without days: DeLong and the jackknife over runs of rows both cover as they say, and need no partitions."""
    rng = np.random.default_rng(14)

    def rows(n):
        known, hidden = rng.normal(size=(2, n))
        truth = rng.random(n) < 1 / (1 + np.exp(1.2 - 0.8 * known - 0.5 * hidden))
        return truth, *(1 / (1 + np.exp(1.2 - 0.8 * known - share * hidden)) for share in (0.4, 0.1))

    truth, better, worse = rows(400_000)
    true = score("binary", truth, better)[metric] - score("binary", truth, worse)[metric]
    held = 0
    for _ in range(150):
        truth, better, worse = rows(600)
        found = difference(
            "binary", metric, truth, better, worse, clusters=np.zeros(600, int), confidence=0.9, independent=True
        )
        held += found.low <= true <= found.high
    assert 0.84 <= held / 150 <= 0.96


def test_one_row_of_a_class_has_no_interval_of_delongs():
    """There is no variance of one."""
    truth = np.arange(50) == 0
    predicted = np.linspace(0, 1, 50)
    found = difference(
        "binary", "roc_auc", truth, predicted, predicted[::-1], clusters=np.zeros(50, int), confidence=0.95,
        independent=True,
    )  # fmt: skip
    assert (found.low, found.high, found.error) == (None, None, None)


# What the gate asks of an interval


def test_a_p_value_is_where_the_interval_ends():
    """The one-sided p-value is 2.5 % just where the 95 % interval ends, for Student's t and for the normal."""
    truth, better, worse, day = days(np.random.default_rng(15), 9)
    for independent in (False, True):
        found = difference(
            "binary", "roc_auc", truth, worse, better, clusters=day, confidence=0.95, independent=independent
        )
        assert p_worse(found.value, found, -found.high) == pytest.approx(0.025, abs=1e-9)
        assert p_worse(found.value, found, -found.low) == pytest.approx(0.975, abs=1e-9)


def test_without_spread_a_loss_is_certain_or_none():
    """A standard error of 0: past the margin p is 0, within it 1; without one there is no p."""
    exact = Estimate(value=-0.02, low=-0.02, high=-0.02, error=0.0, freedom=5)
    assert [p_worse(exact.value, exact, margin) for margin in (0.01, 0.02, 0.03)] == [0.0, 1.0, 1.0]
    assert p_worse(0.1, Estimate(value=0.1), 0.0) is None


@pytest.mark.parametrize(
    ("p_values", "rejected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),
        ([0.04], [True]),
        ([0.04, 0.04], [False, False]),
        ([0.026, 0.024], [True, True]),
        ([0.024, 0.051], [True, False]),
        ([], []),
    ],
)
def test_holms_steps_are_his(p_values, rejected):
    """The k-th smallest of n is held to 0.05 / (n - k + 1), and the first that fails stops it."""
    assert holm(p_values, 0.05) == rejected


def test_so_much_more_hold_out_would_settle_it():
    """Given k times the days, each as those there are, the interval ends about where it had to."""
    truth, better, worse, day = days(np.random.default_rng(16), 10)
    found = difference("binary", "brier", truth, worse, better, clusters=day, confidence=0.95)
    distance = (found.high - found.low) / 5
    times = round(settling(found, distance, 0.95))
    more = [np.tile(each, times) for each in (truth, worse, better)]
    longer = difference(
        "binary", "brier", *more, clusters=np.concatenate([day + 10 * copy for copy in range(times)]), confidence=0.95
    )
    assert (longer.high - longer.low) / 2 == pytest.approx(distance, rel=0.12)


def test_what_cannot_be_settled_says_so():
    """A figure on the bound itself never; without a standard error nobody knows; and what is settled needs no more."""
    found = Estimate(value=0.0, low=-1.0, high=1.0, error=0.4, freedom=13)
    assert settling(found, 0.0, 0.95) == float("inf")
    assert settling(Estimate(value=0.0), 1.0, 0.95) is None
    assert settling(found, 2.0, 0.95) == 1.0
