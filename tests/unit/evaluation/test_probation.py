"""When a champion on probation is taken back: past the pack's figure and past chance, by a pure function."""

import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from evergreen.evaluation import significance
from evergreen.evaluation.metrics import Rows
from evergreen.evaluation.probation import Seen, confidence_over, decide
from evergreen.run import Estimate, Window

START = datetime(2024, 1, 1, tzinfo=UTC)
WINDOW = Window(start=START, end=START + timedelta(days=9))


def seen(value, low, high, *, metric="roc_auc", drop=0.02, **changes):
    of = {"figure": Estimate(value=0.7), "figure_before": Estimate(value=0.7 - value)}
    of |= {"difference": Estimate(value=value, low=low, high=high), "window": WINDOW, "rows": 900}
    plain = {"champion": 2, "before": 1, "since": START, "until": START + timedelta(days=14), "as_of": WINDOW.end}
    return Seen(**plain, metric=metric, drop=drop, confidence=0.95, independent=False, **(of | changes))


@pytest.mark.parametrize(
    ("value", "low", "high", "decision"),
    [
        (-0.03, -0.04, -0.01, "roll back"),
        (-0.03, -0.07, 0.01, "keep"),
        (-0.01, -0.015, -0.005, "keep"),
        (-0.02, -0.03, -0.01, "keep"),
        (0.03, 0.01, 0.05, "keep"),
        (-0.03, None, None, "keep"),
    ],
    ids=["past both", "chance", "within the rule", "at the rule", "better", "one partition"],
)
def test_past_the_rule_and_past_chance(value, low, high, decision):
    """Only a difference beyond `drop` whose interval leaves out no difference at all."""
    assert decide(seen(value, low, high)).decision == decision


@pytest.mark.parametrize(("value", "decision"), [(0.03, "roll back"), (-0.03, "keep")])
def test_of_a_loss_more_is_worse(value, decision):
    assert decide(seen(value, value - 0.01, value + 0.01, metric="log_loss")).decision == decision


def test_it_says_what_it_saw():
    """Both figures, the difference with its interval, the rows and where they lie."""
    assert decide(seen(-0.03, -0.04, -0.01)).why == (
        "version 2 is worse by more than 0.02: roc_auc 0.700 beside 0.730 of version 1, "
        "-0.030, interval -0.040 … -0.010, on 900 rows of 2024-01-01 00:00 … 2024-01-10 00:00"
    )


def test_what_was_not_compared_is_kept():
    """Whatever the figures, which are not there then; the reason is said."""
    found = decide(seen(-0.3, -0.4, -0.2, excused="all labels that have come are of one class"))
    assert found.decision == "keep"
    assert found.why == "version 2 is on probation, and was not judged: all labels that have come are of one class"


def taken_back(chance, loss, drop, days=14, rows=300):
    """Whether one of the looks after each of 14 days takes back a champion that is worse by some 0.9 `loss` of ROC-AUC.

    Two models with a score of their own each; days differ in difficulty, and in which model they suit.
    """
    x = chance.normal(size=(days, rows))
    truth = (x + chance.normal(size=(days, rows)) > 0).astype(float)
    noise = 1.0 + 0.3 * chance.random((days, 1))
    champion = x + (noise + 10 * loss + 0.1 * chance.random((days, 1))) * chance.normal(size=(days, rows))
    before = x + (noise + 0.1 * chance.random((days, 1))) * chance.normal(size=(days, rows))
    for day in range(2, days + 1):
        ours, theirs = (
            Rows.of(
                "binary",
                truth[:day].ravel(),
                1 / (1 + np.exp(-score[:day].ravel())),
                np.repeat(np.arange(day), rows),
            )
            for score in (champion, before)
        )
        difference = significance.paired(ours, theirs, "roc_auc", confidence_over(days, 0.95))
        if decide(seen(difference.value, difference.low, difference.high, drop=drop)).decision == "roll back":
            return True
    return False


@pytest.mark.prove
def test_how_often_a_champion_that_is_as_good_is_taken_back(capsys):
    """Over a whole probation of 14 days, looked at each day, no more often than the gate's level, 2.5 in a hundred."""
    trials, told = 300, {}
    for loss in (0.0, 0.03, 0.06):
        for drop in (0.001, 0.02):
            chance = np.random.default_rng(7)
            told[loss, drop] = sum(taken_back(chance, loss, drop) for _ in range(trials)) / trials
    with capsys.disabled():
        sys.stdout.write(
            "".join(f"\nworse by {loss:g}, drop {drop:g}: {rate:.3f}" for (loss, drop), rate in told.items())
        )
    assert told[0.0, 0.001] < 0.025 + 3 * np.sqrt(0.025 * 0.975 / trials)
    assert told[0.06, 0.02] > 0.9
