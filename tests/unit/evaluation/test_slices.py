"""Groups are judged by rows of their own, and those that cannot be are still named."""

import numpy as np
import pytest

from evergreen.errors import EvaluationError
from evergreen.evaluation.metrics import Rows
from evergreen.evaluation.significance import intervals, paired
from evergreen.evaluation.slices import differences, estimates
from evergreen.pack import GateRules, PrimaryRule, SliceRule


def rules(*slices: SliceRule) -> GateRules:
    return GateRules(primary=PrimaryRule(metric="roc_auc"), slices=slices)


BY_CARRIER = SliceRule(by="carrier", metric="roc_auc", min_rows=100)


@pytest.fixture
def rows():
    """1 000 rows of two models over ten days: carriers AA and UA in numbers, HA with 40 rows, OO never late."""
    rng = np.random.default_rng(1)
    n = 1000
    carrier = np.repeat(["AA", "UA", "HA", "OO"], [500, 300, 40, 160])
    truth = (rng.random(n) < 0.4) & (carrier != "OO")
    return {
        "truth": truth,
        "challenger": np.clip(0.4 + 0.2 * truth + rng.normal(0, 0.2, n), 0, 1),
        "champion": np.clip(0.4 + 0.1 * truth + rng.normal(0, 0.2, n), 0, 1),
        "day": rng.integers(0, 10, n),
        "carrier": carrier,
        "origin": rng.choice(["EWR", "JFK"], n),
    }


def of(rows, model: str) -> Rows:
    return Rows.of("binary", rows["truth"], rows[model], rows["day"])


def estimated(rows, *slices: SliceRule):
    return estimates(rules(*slices), of(rows, "challenger"), columns=rows, confidence=0.95)


def compared(rows, *slices: SliceRule):
    new, old = of(rows, "challenger"), of(rows, "champion")
    return differences(rules(*slices), new, old, columns=rows, confidence=0.95)


def test_every_group_is_named_with_its_rows(rows):
    """Small groups and groups of one class are there as well, sorted by name."""
    found = [(each.group, each.rows) for each in estimated(rows, BY_CARRIER)]
    assert found == [("AA", 500), ("HA", 40), ("OO", 160), ("UA", 300)]


def test_groups_too_small_or_of_one_class_are_not_judged(rows):
    """HA has 40 rows of the 100 asked for and OO has no late flight, so neither has an AUC."""
    assert {each.group for each in estimated(rows, BY_CARRIER) if each.estimate is None} == {"HA", "OO"}


def test_a_group_is_judged_by_its_own_rows(rows):
    """The estimate is the interval of the group's rows alone."""
    aa = rows["carrier"] == "AA"
    (found,) = (each.estimate for each in estimated(rows, BY_CARRIER) if each.group == "AA")
    alone = intervals("binary", rows["truth"][aa], rows["challenger"][aa], rows["day"][aa], confidence=0.95)
    assert found == alone["roc_auc"]


def test_a_difference_within_a_group_is_that_of_its_rows(rows):
    """Paired, on the group's rows alone."""
    ua = rows["carrier"] == "UA"
    (found,) = (each for each in compared(rows, BY_CARRIER) if each.group == "UA")
    alone = paired(of(rows, "challenger").within(ua), of(rows, "champion").within(ua), "roc_auc", 0.95)
    assert (found.by, found.metric, found.rows, found.estimate) == ("carrier", "roc_auc", 300, alone)


def test_differences_are_of_the_groups_that_are_judged(rows):
    """What has an estimate has a difference, and nothing else has."""
    judged = [each.group for each in estimated(rows, BY_CARRIER) if each.estimate is not None]
    assert [each.group for each in compared(rows, BY_CARRIER)] == judged


def test_a_metric_that_one_class_can_have_is_judged(rows):
    """The brier score of never-late OO is defined, so it is given."""
    found = estimated(rows, SliceRule(by="carrier", metric="brier", min_rows=100))
    assert [each.group for each in found if each.estimate is None] == ["HA"]


def test_several_rules_are_kept_in_their_order(rows):
    """First the first rule's groups, then the second's."""
    found = estimated(rows, SliceRule(by="origin", metric="brier", min_rows=1), BY_CARRIER)
    assert [(each.by, each.metric) for each in found] == [("origin", "brier")] * 2 + [("carrier", "roc_auc")] * 4


def test_no_rules_no_slices(rows):
    """A pack without slice rules gets none."""
    assert (estimated(rows), compared(rows)) == ((), ())


def test_nulls_are_a_group_of_their_own(rows):
    """Rows whose column is null are not dropped."""
    rows["carrier"] = np.where(rows["carrier"] == "HA", None, rows["carrier"].astype(object))
    assert ("null", 40) in [(each.group, each.rows) for each in estimated(rows, BY_CARRIER)]


def test_classes_are_those_of_the_whole_holdout():
    """A group in which one class never occurs is judged by all columns of the predictions."""
    rng = np.random.default_rng(2)
    group = np.repeat(["a", "b"], 100)
    truth = np.where(group == "a", rng.integers(0, 3, 200), rng.integers(0, 2, 200))
    predicted = rng.dirichlet(np.ones(3), 200)
    rows = Rows.of("multiclass", truth, predicted, rng.integers(0, 5, 200))
    rule = SliceRule(by="group", metric="accuracy", min_rows=1)
    found = estimates(rules(rule), rows, columns={"group": group}, confidence=0.95)
    shares = [float((predicted.argmax(axis=1) == truth)[group == name].mean()) for name in ("a", "b")]
    assert [each.estimate.value for each in found] == pytest.approx(shares)


def test_a_column_that_is_not_there_is_an_error(rows):
    """It names the column and the nearest one."""
    with pytest.raises(EvaluationError, match=r"no column 'carier'\n  fix: did you mean 'carrier'\?"):
        estimated(rows, SliceRule(by="carier", metric="roc_auc"))
