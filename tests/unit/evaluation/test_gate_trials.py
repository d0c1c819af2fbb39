"""The gate keeps its level on pairs of models whose true difference is known: `benchmarks/gate.py` has the pairs."""

import pytest
from benchmarks.gate import LEVEL, MARGIN, loss_of, slice_trials, trials, within

DAYS = 14


def test_luck_neither_promotes_nor_rejects():
    """In A/A few challengers are `superior` and none is inferior, where two point values promote every other one."""
    said = trials(60, DAYS, 0.0)
    assert said["superior"]["promote"] / 60 <= within(LEVEL, 60)
    assert said["non_inferior"]["reject"] / 60 <= within(LEVEL, 60)
    assert 20 <= said["two point values"]["promote"] <= 40


def test_a_regression_in_one_slice_of_twenty_is_found():
    """And it is one that rejects, though the model as a whole may be as good."""
    found = slice_trials(12, DAYS, planted=True)
    assert found["difference"] < -0.1
    assert found["rejected"] >= 0.7


@pytest.mark.prove
@pytest.mark.parametrize("days", [7, 14])
def test_the_level_holds_over_a_thousand_pairs(days):
    """A/A under both tests, and a loss of exactly the margin, which is where a false rejection is likeliest."""
    equal, worse = trials(1000, days, 0.0), trials(1000, days, loss_of(-MARGIN))
    print(days, equal, worse)  # noqa: T201
    allowed = within(LEVEL, 1000)
    assert equal["superior"]["promote"] / 1000 <= allowed
    assert equal["non_inferior"]["reject"] / 1000 <= allowed
    assert worse["non_inferior"]["reject"] / 1000 <= allowed
    assert worse["non_inferior, unclear: review"]["promote"] / 1000 <= allowed


@pytest.mark.prove
def test_twenty_equal_slices_are_rejected_no_more_often_than_one():
    """By Holm's correction; each tested by itself they would be, many times as often. A planted regression is found."""
    equal, planted = slice_trials(1000, DAYS, planted=False), slice_trials(200, DAYS, planted=True)
    print(equal, planted)  # noqa: T201
    assert equal["rejected"] <= within(LEVEL, 1000)
    assert equal["alone"] > 4 * LEVEL
    assert planted["rejected"] >= 0.9
