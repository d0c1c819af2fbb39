"""Groups are compared by rates that are theirs, and those that cannot be are named."""

import numpy as np
import pytest

from evergreen.evaluation.fairness import gaps
from evergreen.pack import FairnessRule, GateRules, PrimaryRule


def gap(**rule):
    """By origin: of EWR 3 of 4 late and 1 of 4 punctual flights are predicted late, of JFK 1 of 4 and 2 of 4; LGA has 2 rows."""
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0] * 2 + [1, 0])
    predicted = np.array([0.9, 0.6, 0.6, 0.4, 0.6, 0.4, 0.1, 0.1, 0.9, 0.4, 0.4, 0.1, 0.6, 0.6, 0.1, 0.1, 0.9, 0.9])
    origin = np.array(["EWR"] * 8 + ["JFK"] * 8 + ["LGA"] * 2)
    rules = GateRules(
        primary=PrimaryRule(metric="roc_auc"),
        fairness=(FairnessRule(**{"by": "origin", "max": 0.1, "min_rows": 5} | rule),),
    )
    (found,) = gaps(rules, truth, predicted, columns={"origin": origin})
    return found


@pytest.mark.parametrize(
    ("measure", "value"), [("demographic_parity", 0.125), ("equal_opportunity", 0.5), ("equalized_odds", 0.5)]
)
def test_a_gap_is_the_largest_rate_less_the_smallest(measure, value):
    """4 of 8 against 3 of 8 predicted late; 3 of 4 against 1 of 4 of the late; 1 of 4 against 2 of 4 of the punctual."""
    assert gap(measure=measure).value == pytest.approx(value)


def test_groups_come_with_their_rates():
    """What was compared can be read, and who was not, with how many rows."""
    found = gap(measure="equalized_odds")
    assert found.groups == {
        "EWR": {"true_positive_rate": 0.75, "false_positive_rate": 0.25},
        "JFK": {"true_positive_rate": 0.25, "false_positive_rate": 0.5},
    }
    assert found.unjudged == {"LGA": 2}


def test_the_threshold_is_the_rules():
    """From 0.3 on 4 of 4 and 3 of 4 late flights are predicted late."""
    assert gap(measure="equal_opportunity", threshold=0.3).value == pytest.approx(0.25)


def test_one_group_is_no_gap():
    """With all groups but one too small there is nothing to compare, and no figure."""
    found = gap(min_rows=100)
    assert (found.value, found.unjudged) == (None, {"EWR": 8, "JFK": 8, "LGA": 2})


def test_a_group_without_a_class_has_no_such_rate():
    """A group with no late flight has no true positive rate: it is named, not taken for 0."""
    truth = np.array([1, 0] * 10 + [0] * 20)
    origin = np.array(["EWR"] * 10 + ["JFK"] * 10 + ["LGA"] * 20)
    rules = GateRules(
        primary=PrimaryRule(metric="roc_auc"),
        fairness=(FairnessRule(by="origin", measure="equal_opportunity", max=0.1, min_rows=5),),
    )
    (found,) = gaps(rules, truth, np.full(40, 0.9), columns={"origin": origin})
    assert (found.value, found.unjudged) == (0.0, {"LGA": 20})
