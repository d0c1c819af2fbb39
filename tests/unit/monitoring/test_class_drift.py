"""Classes that come and go: past chance, confirmed, and a reason to train; never a fault of the data."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from scipy.stats import binom

from evergreen.monitoring.drift import CLASS, NOMINAL, Drift, compare, triage
from evergreen.monitoring.profiles import profile
from evergreen.monitoring.report import page
from evergreen.pack import Data, DriftRules
from evergreen.run import Estimate, canonical_json

RULES = DriftRules(violated="2 of 3")
DATA = Data(target="queue", event_time="at", task="multiclass")
DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)
END = START + 30 * DAY


def profiled(queue, start=END, days=3, dtype=None):
    """The profile of rows of these classes, and of a column that never moves."""
    queue = pl.Series("queue", queue, dtype=dtype)
    return profile(pl.DataFrame({"queue": queue, "x": np.arange(len(queue)) % 10}), start, start + days * DAY)


def beside(before, now, *, knows=None, dtype=None, **given) -> Drift:
    classes = sorted(set(before)) if knows is None else knows
    reference = profiled(before, START, 30, dtype)
    return compare(reference, profiled(now, dtype=dtype), RULES, DATA, classes=classes, **given)


def measures(drift: Drift, kind="classes") -> list[str]:
    return [each.measure for each in drift.violated if each.kind == kind]


THREE = ["billing"] * 300 + ["login"] * 300 + ["shipping"] * 300
KINDS = {
    "texts": (["billing", "login", "shipping"], "fraud"),
    "texts that look like numbers": (["1", "2", "True"], "01"),
    "integers": ([1, 2, 3], 4),
    "integers that mark no value elsewhere": ([1, 2, 3], 999),
    "an integer below zero": ([1, 2, 3], -1),
    "booleans": ([True], False),
    "numbers": ([0.5, 1.5, 2.5], 3.5),
    "long texts": (["a" * 200 + "1", "a" * 200 + "2", "b"], "a" * 200 + "3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_class_is_found_whatever_its_type(kind):
    """Its share of the rows is said, and nothing is called a fault: a class is a name, also where it is a number."""
    known, new = KINDS[kind]
    drift = beside(known * 300, [*known * 60, *[new] * 20], knows=known)
    rows = len(known) * 60 + 20
    assert measures(drift) == ["new class"]
    assert measures(drift, "fault") == []
    assert drift.classes.unknown == pytest.approx(20 / rows, abs=1e-5)
    assert (drift.classes.rows, drift.classes.absent) == (rows, ())
    if kind != "long texts":
        assert [(each.name, type(each.name)) for each in drift.classes.new] == [(new, type(new))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vanished_class_is_found_whatever_its_type(kind):
    """The class that the champion knows and the window lacks is named; nothing is called a fault."""
    known, gone = KINDS[kind]
    drift = beside([*known * 300, *[gone] * 300], known * 60, knows=[*known, gone])
    assert [(name, type(name)) for name in drift.classes.absent] == [(gone, type(gone))]
    [finding] = [each for each in drift.violated if each.kind == "classes"]
    assert finding.measure.startswith("gone ")
    assert measures(drift, "fault") == []


@pytest.mark.parametrize("rows", range(20, 80, 4))
def test_a_class_has_vanished_where_no_row_is_improbable(rows):
    """Of x rows in both windows together none lies in the newest: a binomial tail, as scipy reckons it."""
    drift = beside([*THREE, *["fraud"] * rows], ["billing", "login", "shipping"] * 60)
    chance = NOMINAL / (3 * 2 + 2 + 1 + 4)
    n, m = 900 + rows, 180
    assert (measures(drift) == ["gone 'fraud'"]) == (binom.cdf(0, rows, m / (n + m)) < chance)


@pytest.mark.parametrize("rows", range(1, 12))
@pytest.mark.parametrize("once", [0, 3])
def test_a_class_is_new_where_so_many_rows_are_improbable(rows, once):
    """Classes with one row in the reference say how many unseen ones are to be expected."""
    rare = [f"rare {number}" for number in range(once)]
    drift = beside([*THREE, *rare], [*["billing", "login", "shipping"] * 60, *["fraud"] * rows])
    n, m = 900 + once, 180 + rows
    chance = NOMINAL / (3 * 2 + 2 + 1 + 3 + once)
    improbable = binom.sf(rows - 1, rows + once, m / (n + m)) < chance
    assert (measures(drift) == ["new class"]) == (improbable and rows / m >= CLASS)


def test_where_nothing_changed_no_class_comes_or_goes():
    """Twenty classes, most of them rare: of 300 windows at most as many are violated as the nominal rate allows."""
    rng = np.random.default_rng(5)
    shares = 0.6 ** np.arange(20)
    names = np.array([f"class {number:02}" for number in range(20)])
    violated = absent = unknown = 0
    for _ in range(300):
        before, now = (rng.choice(names, size, p=shares / shares.sum()) for size in (900, 180))
        drift = beside(before.tolist(), now.tolist())
        violated += bool(measures(drift))
        absent += bool(drift.classes.absent)
        unknown += bool(drift.classes.unknown)
    assert absent > 250
    assert unknown > 30
    assert violated <= 300 * NOMINAL + 3 * np.sqrt(300 * NOMINAL)


def test_a_class_that_the_champion_learned_nothing_of_is_new_though_its_holdout_had_it():
    """What counts is what the champion knows, not what its snapshot held."""
    before = [*THREE, *["fraud"] * 60]
    drift = beside(before, [*THREE[::5], *["fraud"] * 60], knows=["billing", "login", "shipping"])
    assert measures(drift) == ["new class"]
    assert drift.classes.unknown == 0.25


def test_a_class_that_is_absent_now_and_then_has_not_vanished():
    """Where a window of the reference's own time was without it, so may be the newest."""
    usual = [beside(THREE, ["billing", "login"] * 60)]
    assert measures(usual[0]) == ["gone 'shipping'"]
    assert measures(beside(THREE, ["billing", "login"] * 60, usual=usual)) == []


def test_a_class_whose_labels_may_still_come_has_not_vanished():
    """A third of the labels is missing: the class may be among them. A new class is there, whatever comes."""
    late = [*["billing", "login"] * 60, *[None] * 60]
    assert measures(beside(THREE, late)) == []
    assert measures(beside(THREE, [*late, *["fraud"] * 60])) == ["new class"]
    assert beside(THREE, [None] * 60, dtype=pl.String).classes is None


def test_a_class_that_is_renamed_is_no_fault():
    """The old name vanishes and the new one comes: a training learns it. Of a feature it stays a fault."""
    drift = beside(THREE, ["billing", "login", "SHIPPING"] * 60)
    assert sorted(measures(drift)) == ["gone 'shipping'", "new class"]
    assert measures(drift, "fault") == []


def test_of_more_classes_than_a_profile_keeps_none_is_said_to_have_vanished():
    """What is not kept may be there."""
    many = [f"class {number:04}" for number in range(600)]
    drift = beside([*many * 3, *["common"] * 900], many)
    assert (measures(drift), drift.classes.absent) == ([], ())


def test_other_targets_have_no_classes():
    """A window of a binary target, and one that was measured by an older Evergreen, have none."""
    drift = compare(
        profiled([0, 1] * 300, START, 30), profiled([0, 1] * 60), RULES, Data(target="queue", event_time="at")
    )
    assert drift.classes is None
    older = drift.model_dump(mode="json")
    del older["classes"]
    assert Drift.model_validate(older) == drift


NEW = ["billing", "login", "shipping", "fraud"] * 50
SAME = ["billing", "login", "shipping"] * 60
FEW = ["billing", "login"] * 60


def held(drift: Drift) -> Drift:
    """The same window, the champion as good in it as it was."""
    from evergreen.monitoring.drift import Performance

    figure = Estimate(value=0.8, low=0.78, high=0.82)
    return drift.model_copy(update={"performance": Performance(metric="accuracy", reference=figure, window=figure)})


@pytest.mark.parametrize(
    ("windows", "kind", "head"),
    [
        (
            [SAME, NEW, NEW],
            "shift",
            "queue has classes that the champion does not know in 25.0% of rows: 'fraud' in 25.0%",
        ),
        ([SAME, FEW, FEW], "shift", "queue is 'shipping' in none of 120 rows, and was in 33.3% of 900 rows"),
        ([NEW, SAME, NEW], "shift", "queue has classes that the champion does not know in 25.0% of rows"),
        ([SAME, SAME, NEW], "quiet", "queue has classes that the champion does not know in 25.0% of rows"),
        ([NEW, NEW, SAME], "quiet", "nothing moved further than the pack allows"),
    ],
)
def test_a_class_that_comes_or_goes_is_a_shift_once_it_is_confirmed(windows, kind, head):
    """As often as the pack asks of any move, the newest window among them; though performance held."""
    history = [held(beside(THREE, window)) for window in windows]
    found = triage(history, RULES)
    assert found.kind == kind, found.reasons
    assert found.reasons[0].startswith(head)
    assert found.action == ("alert" if kind == "shift" else "nothing")


def test_two_classes_that_each_are_absent_once_confirm_nothing():
    """One window without one class, and one without another, are no class that vanished."""
    history = [beside(THREE, window) for window in (["billing", "shipping"] * 60, SAME, FEW)]
    reasons = triage(history, RULES).reasons
    once = "queue is 'shipping' in none of 120 rows, and was in 33.3% of 900 rows, in 1 of the newest 3 windows: "
    assert any(reason.startswith(f"{once}not confirmed") for reason in reasons), reasons


def test_a_class_that_was_absent_in_the_same_season_before_is_expected():
    """Nothing is trained that would forget it. A new class is trained for in any season."""
    season = compare(profiled(FEW), profiled(FEW), RULES, DATA)
    found = triage([beside(THREE, FEW)] * 3, RULES, season)
    assert found.kind == "seasonal", found.reasons
    season = compare(profiled(NEW), profiled(NEW), RULES, DATA)
    assert triage([beside(THREE, NEW)] * 3, RULES, season).kind == "shift"


def test_the_page_and_the_alert_say_which_classes():
    """In words on the page, names escaped; as plain JSON in the evidence."""
    now = [*SAME, *["<fraud>"] * 60]
    history = [beside(THREE, now)] * 3
    found = triage(history, RULES)
    html = page("ticket", found, history, RULES, profiled(THREE, START, 30), profiled(now))
    assert (
        "25.0% of 240 rows are of classes that the champion does not know: &#x27;&lt;fraud&gt;&#x27; in 25.0%" in html
    )
    assert "Classes that the champion does not know count from 1% of rows on" in html
    assert found.evidence["classes"]["new"] == [{"name": "<fraud>", "share": 0.25}]
    assert '"unknown":0.25' in canonical_json(found.evidence)
