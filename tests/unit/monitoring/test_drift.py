"""What moved, by how much, and what kind of change it is: every measure, every fault, every line of triage's table."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evergreen.monitoring.drift import (
    ACTIONS,
    FAR,
    NOMINAL,
    ColumnDrift,
    Drift,
    Finding,
    Freshness,
    Performance,
    _shift,
    compare,
    triage,
)
from evergreen.monitoring.profiles import column_profile, profile
from evergreen.pack import Data, DriftRules, Gain, Pack
from evergreen.run import Estimate, Importance, Window, canonical_json

ROOT = Path(__file__).resolve().parents[3]
RULES = DriftRules()
DATA = Data(target="late", event_time="at")
DAY = timedelta(days=1)
START = datetime(2024, 1, 1, tzinfo=UTC)


def beside(reference, window, *, days=(30, 7), rules=RULES, **given) -> Drift:
    """Columns beside columns: a reference of `days[0]` days, then a window of `days[1]`."""
    end = START + days[0] * DAY
    return compare(
        profile(pl.DataFrame(reference), START, end),
        profile(pl.DataFrame(window), end, end + days[1] * DAY),
        rules,
        DATA,
        **given,
    )


def column(drift: Drift, name: str = "x") -> ColumnDrift:
    return next(each for each in drift.columns if each.name == name)


def measures(drift: Drift) -> set[tuple[str, str]]:
    return {(each.kind, each.measure) for each in drift.violated}


def normal(rows: int, seed: int = 1, at: float = 0.0, spread: float = 1.0):
    return np.random.default_rng(seed).normal(at, spread, rows)


# Measures


def test_psi_is_the_textbooks_less_its_bias():
    """Of shares .5 .3 .2 and .4 .3 .3: Σ (q - p) ln(q / p), less 2 (1/n + 1/m), but for the half row of smoothing."""
    n, m = 20_000, 10_000
    drift = beside({"x": ["a"] * 10_000 + ["b"] * 6_000 + ["c"] * 4_000}, {"x": ["a"] * 4_000 + ["b", "c"] * 3_000})
    textbook = 0.1 * math.log(0.5 / 0.4) + 0.1 * math.log(0.3 / 0.2)
    assert column(drift).psi == pytest.approx(textbook - 2 * (1 / n + 1 / m), abs=2e-5)


def test_psi_of_numbers_is_over_the_references_deciles():
    """A shift by half a standard deviation: within a hundredth of the exact figure for ten equal bins."""
    from statistics import NormalDist

    drift = beside({"x": normal(100_000)}, {"x": normal(100_000, 2, at=0.5)})
    edges = [NormalDist().inv_cdf(each / 10) for each in range(1, 10)]
    q = np.diff([0, *(NormalDist(0.5).cdf(each) for each in edges), 1])
    assert column(drift).psi == pytest.approx(float(np.sum((q - 0.1) * np.log(q / 0.1))), abs=0.01)


def test_where_nothing_changed_psi_is_nought_on_average_and_noise_bounds_it():
    """200 pairs of 300 and 3,000 rows: the raw figure would average 0.033; none is past what chance may leave."""
    rng = np.random.default_rng(1)
    found = [column(beside({"x": rng.normal(size=3000)}, {"x": rng.normal(size=300)})) for _ in range(200)]
    assert np.mean([each.psi for each in found]) < 0.008  # of max(0, ·), so a little above nought
    assert all(each.psi <= each.noise for each in found)


def test_small_windows_in_which_nothing_changed_stay_within_the_nominal_rate():
    """200 windows of 50 rows and eight columns, where PSI past 0.2 alone would call half of them."""
    rng = np.random.default_rng(2)
    names = [f"x{each}" for each in range(6)]

    def rows(n: int) -> dict:
        words = {"word": rng.choice(["a", "b", "c", "d"], n, p=[0.6, 0.3, 0.08, 0.02]), "yes": rng.random(n) < 0.3}
        return {name: rng.lognormal(size=n) for name in names} | words

    reference = rows(2000)
    found = [beside(reference, rows(50), days=(280, 7)) for _ in range(200)]
    assert sum(bool(each.violated) for each in found) / 200 <= 2 * NOMINAL
    bare = sum(any((each.psi or 0) + 9 * (1 / 50 + 1 / 2000) > 0.2 for each in drift.columns) for drift in found)
    assert bare / 200 > 0.5


@pytest.mark.parametrize(("rows", "few", "share"), [(600, 3, 0.02), (5000, 5, 0.005), (5000, 10, 0.02), (120, 20, 0.1)])
def test_a_few_rows_without_a_value_are_chance(rows, few, share):
    """Of windows with as many missing as before, counted by how likely each is, no more than twice the nominal are faults."""
    before = [None] * round(rows * share) + [1.0] * round(rows * (1 - share))
    faults = 0.0
    for missing in range(few + 1):
        found = beside({"x": before}, {"x": [None] * missing + [1.0] * (few - missing)}, days=(rows, few))
        likely = math.comb(few, missing) * share**missing * (1 - share) ** (few - missing)
        faults += likely * (("fault", "missing") in measures(found))
    assert faults <= 2 * NOMINAL / 5  # one column has three tests, and a window two of its own


def test_jensen_shannon_is_nought_for_the_same_and_one_for_the_disjoint():
    """A distance from 0 to 1."""
    ones, twos = {"x": ["a", "b"] * 100}, {"x": ["c", "d"] * 100}
    assert column(beside(ones, ones)).js == pytest.approx(0, abs=1e-6)
    assert column(beside(ones, twos)).js == pytest.approx(1, abs=1e-6)


def test_wasserstein_counts_in_standard_deviations_of_the_reference():
    """Everything three units further, at a spread of two: one and a half."""
    reference = normal(20_000, spread=2.0)
    assert column(beside({"x": reference}, {"x": reference + 3})).wasserstein == pytest.approx(1.5, rel=0.02)


@settings(max_examples=30)
@given(st.integers(1, 1000), st.floats(0.01, 100), st.floats(-100, 100))
def test_what_moved_does_not_depend_on_the_unit_of_both(seed, scale, offset):
    """The same change of scale and origin on both sides changes no measure."""
    before, now = normal(500, seed), normal(400, seed + 1, at=0.7)
    plain = column(beside({"x": before}, {"x": now}))
    turned = column(beside({"x": before * scale + offset}, {"x": now * scale + offset}))
    for measure in ("psi", "js", "wasserstein", "scale"):
        assert getattr(turned, measure) == pytest.approx(getattr(plain, measure), rel=0.02, abs=0.005), measure


def test_a_constant_that_changes_has_moved_either_way():
    """There are no deciles to cut it by, and up and down are seen alike."""
    for value in (4, 6):
        assert ("feature", "psi") in measures(beside({"x": [5] * 500}, {"x": [value] * 500}))
    assert not beside({"x": [5] * 500}, {"x": [5] * 100}).violated


def test_times_are_not_expected_to_stand_still():
    """A time moves on by nature: no PSI; the event time says how old the newest row is."""
    times = [START + DAY * (each / 10) for each in range(300)]
    later = [START + 30 * DAY + DAY * (each / 10) for each in range(60)]
    drift = beside({"at": times}, {"at": later})
    assert (column(drift, "at").psi, drift.violated) == (None, ())
    assert drift.newest_row_days == pytest.approx(1.1)
    assert drift.model_age_days == 7


# Faults


@pytest.mark.parametrize("empty", [0.2, 1.0])
def test_values_that_go_missing_are_a_fault(empty):
    """A tenth of all rows more than before, up to all of them."""
    lost = np.random.default_rng(1).random(700) < empty
    drift = beside({"x": normal(3000)}, {"x": [None if gone else 1.0 * n for n, gone in enumerate(lost)]})
    assert ("fault", "missing") in measures(drift)
    (fault,) = (each for each in drift.violated if each.measure == "missing")
    assert fault.value == pytest.approx(lost.mean(), abs=1e-6)
    assert f"{lost.mean():.1%}" in fault.sentence


def test_a_mostly_empty_column_speaks_by_being_empty():
    """No gust of wind was measured: nobody is called for it."""
    before = [None, None, 1.0] * 1000
    assert ("fault", "missing") not in measures(beside({"x": before}, {"x": [None] * 690 + [1.0] * 10}))


def test_late_labels_are_no_fault():
    """A target that is not known yet, in part or at all."""
    known = {"late": [True, False] * 1500}
    assert not beside(known, {"late": [None] * 650 + [True, False] * 25}).violated
    assert not beside({**known, "x": [1, 2] * 1500}, {"x": [1, 2] * 350}).violated


def test_another_type_and_a_lost_column_are_faults():
    """What the model cannot take; a column that is new to it is only named."""
    drift = beside({"x": [1.0, 2.0] * 1000, "y": [1, 2] * 1000}, {"x": ["one", "two"] * 300, "z": [1, 2] * 300})
    assert measures(drift) == {("fault", "type"), ("fault", "gone")}
    assert drift.added == ("z",)


def test_a_column_without_any_value_is_missing_and_of_no_other_type():
    """Its type cannot be told."""
    assert measures(beside({"x": [1.0, 2.0] * 1000}, {"x": [None] * 600})) == {("fault", "missing")}


@pytest.mark.parametrize("mark", [-1, -999, 9999])
def test_a_mark_for_no_value_is_a_fault(mark):
    """Two rows of a hundred that hold one, where values lie between 100 and 900."""
    rng = np.random.default_rng(1)
    rows = rng.uniform(100, 900, 1000)
    rows[:20] = mark
    assert ("fault", "sentinel") in measures(beside({"x": rng.uniform(100, 900, 5000)}, {"x": rows}))


def test_a_hot_day_is_no_mark_for_no_value():
    """99 °F after 64 °F at most: there are 98 and 97, too."""
    rng = np.random.default_rng(1)
    summer = np.append(rng.uniform(60, 99, 900), [99.0] * 100)
    assert ("fault", "sentinel") not in measures(beside({"x": rng.uniform(11, 64, 5000)}, {"x": summer}))


def test_values_far_out_of_the_range_are_a_fault():
    """Beyond it by more than half its width; just beyond it, a move."""
    reference = np.random.default_rng(1).uniform(0, 10, 5000)
    rows = np.random.default_rng(2).uniform(0, 10, 1000)
    far, near = rows.copy(), rows.copy()
    far[:100], near[:100] = 17.0, 14.0
    assert ("fault", "range") in measures(beside({"x": reference}, {"x": far}))
    assert ("fault", "range") not in measures(beside({"x": reference}, {"x": near}))


@pytest.mark.parametrize(
    ("turned", "said"),
    [
        (lambda x: x * 1.609344, "1.6"),
        (lambda x: x / 1000, "0.001"),
        (lambda x: (x - 32) / 1.8, "as °C is to °F"),
        (lambda x: x * 1.8 + 32, "as °F is to °C"),
    ],
)
def test_another_unit_is_a_fault(turned, said):
    """The same shape at another scale, and the sentence says which."""
    drift = beside({"x": normal(5000, at=60, spread=12)}, {"x": turned(normal(1000, 2, at=60, spread=12))})
    (fault,) = (each for each in drift.violated if each.measure == "unit")
    assert said in fault.sentence


@pytest.mark.parametrize(
    ("at", "spread"), [(90, 12), (60, 24), (84, 14), (78, 15.6)], ids=["further", "wider", "both", "by three tenths"]
)
def test_a_move_is_no_other_unit(at, spread):
    """Further, wider, or both: no single factor makes one of the other, or one too small to be a unit."""
    drift = beside({"x": normal(5000, at=60, spread=12)}, {"x": normal(1000, 2, at=at, spread=spread)})
    assert ("feature", "psi") in measures(drift)
    assert "unit" not in {each.measure for each in drift.violated}


def test_noise_around_zero_that_doubles_is_no_other_unit():
    """There the scale alone would speak; five times is another matter."""
    before = {"x": normal(5000)}
    assert "unit" not in {each.measure for each in beside(before, {"x": normal(1000, 2, spread=2)}).violated}
    assert "unit" in {each.measure for each in beside(before, {"x": normal(1000, 2, spread=60)}).violated}


def test_a_renamed_category_is_a_fault_and_a_new_one_a_move():
    """One stands where another stood; or it takes its share from all."""
    rng = np.random.default_rng(1)
    before = {"x": rng.choice(["a", "b", "c"], 5000, p=[0.5, 0.3, 0.2])}
    renamed = {"x": rng.choice(["a", "B", "c"], 1000, p=[0.5, 0.3, 0.2])}
    new = {"x": rng.choice(["a", "b", "c", "d"], 1000, p=[0.4, 0.24, 0.16, 0.2])}
    assert ("fault", "renamed") in measures(beside(before, renamed))
    assert measures(beside(before, new)) >= {("feature", "new")}
    assert ("fault", "renamed") not in measures(beside(before, new))
    assert column(beside(before, new)).new == pytest.approx(0.2, abs=0.03)


def test_new_names_are_expected_where_every_name_is_new():
    """A booking number is never seen twice: that is no news."""
    reference, window = [f"n{each}" for each in range(2000)], [f"n{each}" for each in range(5000, 5500)]
    drift = beside({"x": reference}, {"x": window})
    assert (column(drift).new, drift.violated) == (pytest.approx(0), ())


@pytest.mark.parametrize(("rows", "stopped"), [(0, True), (20, True), (200, False)])
def test_a_source_that_stops_is_a_fault(rows, stopped):
    """Less than a tenth of the 700 rows that seven days used to bring."""
    drift = beside({"x": normal(3000)}, {"x": pl.Series([1.0] * rows, dtype=pl.Float64)})
    assert (("fault", "rows") in measures(drift)) == stopped


def test_a_window_whose_newest_row_is_old_is_a_fault():
    """Past the pack's own `max_staleness`."""
    data = Data(target="late", event_time="at", max_staleness="2d")
    times = [START + DAY * (each / 100) for each in range(3000)]
    early = [START + 30 * DAY + DAY * (each / 200) for each in range(700)]
    before = profile(pl.DataFrame({"at": times}), START, START + 30 * DAY)
    now = profile(pl.DataFrame({"at": early}), START + 30 * DAY, START + 37 * DAY)
    assert measures(compare(before, now, RULES, data)) == {("fault", "stale")}
    assert not compare(before, now, RULES, DATA).violated


# Performance


def performance(now: float, wide: float = 0.01, **given) -> Performance:
    figures = {"reference": Estimate(value=0.8, low=0.79, high=0.81)}
    window = Estimate(value=now, low=now - wide, high=now + wide)
    return Performance(**{"metric": "roc_auc", "window": window, "chance": 0.5, **figures, **given})


def test_the_drop_has_the_interval_of_a_difference():
    """Half-widths of .01 and .03 are .0316 together; the other way round for a loss."""
    drop = performance(0.75, 0.03).drop
    assert (drop.value, drop.low, drop.high) == pytest.approx((0.05, 0.05 - 0.0316, 0.05 + 0.0316), abs=1e-4)
    skew = {"window": Estimate(value=0.9, low=0.88, high=0.95)}
    loss = performance(0.9, less_is_better=True, **skew).drop
    assert (loss.value, loss.low, loss.high) == pytest.approx((0.1, 0.1 - 5**0.5 / 100, 0.1 + 26**0.5 / 100), abs=1e-4)


@pytest.mark.parametrize(
    ("now", "wide", "violated"), [(0.75, 0.02, True), (0.785, 0.001, False), (0.75, 0.09, False), (0.85, 0.01, False)]
)
def test_a_drop_counts_past_the_rule_and_past_chance(now, wide, violated):
    """Large and sure; not small, not unsure, not better."""
    drift = beside({"x": [1, 2] * 300}, {"x": [1, 2] * 70}, performance=performance(now, wide))
    assert (("performance", "drop") in measures(drift)) == violated


def test_a_figure_without_an_interval_decides_alone():
    """A window of one day has none."""
    figure = Performance(metric="roc_auc", reference=Estimate(value=0.8), window=Estimate(value=0.75))
    assert ("performance", "drop") in measures(beside({"x": [1] * 99}, {"x": [1] * 99}, performance=figure))


def test_a_model_that_is_surely_wrong_has_flipped_labels():
    """An area of .8 that becomes .2 is the same order turned round; .45 is a model that knows nothing any more."""
    rows = {"x": [1, 2] * 300}
    assert measures(beside(rows, rows, performance=performance(0.2))) == {("fault", "labels")}
    assert measures(beside(rows, rows, performance=performance(0.45))) == {("performance", "drop")}
    assert measures(beside(rows, rows, performance=performance(0.2, chance=None))) == {("performance", "drop")}


# What a model leans on


def leaning(error: float | None = 0.02, **shares: float) -> list[Importance]:
    return [
        Importance(column=name, loss=Estimate(value=share / 10), share=share, share_error=error)
        for name, share in shares.items()
    ]


def leant(before: list[Importance], now: list[Importance], rules=RULES) -> Drift:
    rows = {"x": [1, 2] * 300}
    return beside(rows, rows, importance=(before, now), rules=rules)


def test_importance_shift_is_half_the_distance_of_the_shares_less_what_chance_makes():
    """½ (.4 + .4), less ½ Σ s √(2/π) of two columns with s = .02 √2; nothing known of a column is a share of nought."""
    found = leant(leaning(a=0.9, b=0.1), leaning(a=0.5, b=0.5)).importance
    assert found.shift == pytest.approx(0.4 - 0.02 * math.sqrt(2) * math.sqrt(2 / math.pi), abs=1e-5)
    assert [(each.column, each.before, each.now) for each in found.columns] == [("a", 0.9, 0.5), ("b", 0.1, 0.5)]
    assert leant(leaning(a=1.0), leaning(b=1.0)).importance.shift > 0.95
    assert leant(leaning(a=0.9, b=0.1), leaning(a=0.9, b=0.1)).importance.shift == 0


def test_importance_that_moved_is_a_finding_past_the_rule_and_past_chance():
    """Both: within the pack's rule, or within what its errors may make, or with no errors to tell by, it is none."""
    before, now = {"a": 0.9, "b": 0.1}, {"a": 0.5, "b": 0.5}
    [found] = leant(leaning(**before), leaning(**now)).violated
    assert found.rule == ("importance", None, "shift")
    assert "a 90% → 50%, b 10% → 50%" in found.sentence
    lenient = DriftRules.model_validate({"importance": {"shift": 0.5}})
    assert not leant(leaning(**before), leaning(**now), lenient).violated
    for error in (0.2, None):
        assert not leant(leaning(error, **before), leaning(error, **now)).violated


def test_without_importance_on_either_side_nothing_is_said():
    """A version from before there was any, or a window without labels."""
    assert leant([], leaning(a=1.0)).importance is None
    assert leant(leaning(a=1.0), []).importance is None


def test_what_chance_makes_of_importance_is_no_finding():
    """2,000 pairs of the same ten shares, each with an error: none moved past the nominal rate."""
    rng = np.random.default_rng(3)
    true = rng.dirichlet(np.ones(10))
    names = [f"x{place}" for place in range(10)]

    def measured() -> list[Importance]:
        return leaning(0.15, **dict(zip(names, (true + rng.normal(0, 0.15, 10)).tolist(), strict=True)))

    rules = DriftRules.model_validate({"importance": {"shift": 0.001}})
    found = [_shift(measured(), measured(), NOMINAL) for _ in range(2000)]
    assert sum(each.shift > each.noise for each in found) / 2000 <= 1.5 * NOMINAL
    assert rules.importance.shift < max(each.shift for each in found)


# What is usual


def test_what_the_references_own_windows_do_is_no_move():
    """Every day has its weekday; a day that is further out than any of them has moved all the same."""
    weekdays = [day % 7 for day in range(28) for _ in range(100)]
    usual = [beside({"x": weekdays}, {"x": [day] * 100}, days=(28, 1)) for day in range(7)]
    assert all(("feature", "psi") in measures(each) for each in usual)
    assert not beside({"x": weekdays}, {"x": [3] * 100}, days=(28, 1), usual=usual).violated
    assert ("feature", "psi") in measures(beside({"x": weekdays}, {"x": [12] * 100}, days=(28, 1), usual=usual))


def test_missing_values_count_from_the_most_of_the_references_own_windows():
    """A week in which a quarter was missing makes three tenths no news, and half of it a fault."""
    before = [None] * 175 + [1.0, 2.0] * 1400
    usual = [beside({"x": before}, {"x": before[:700]})]
    for missing, fault in ((210, False), (350, True)):
        drift = beside({"x": before}, {"x": [None] * missing + [1.0] * (700 - missing)}, usual=usual)
        assert (("fault", "missing") in measures(drift)) == fault


def scored(columns, predictions, start=START, days=30):
    found = profile(pl.DataFrame(columns), start, start + days * DAY)
    return replace(found, predictions=column_profile(pl.Series(predictions)))


def test_predictions_and_a_column_of_that_name_are_told_apart():
    """Each is beside its own past: the score of another model may stand still while the champion's predictions move."""
    score, low, high = 1000 * normal(3000), normal(3000, 2, 0.2, 0.05), normal(3000, 3, 0.6, 0.05)
    reference = scored({"prediction": score}, low)
    still = compare(reference, scored({"prediction": score[::-1]}, low), RULES, DATA)
    assert not still.violated
    moved = compare(reference, scored({"prediction": score[::-1]}, high), RULES, DATA)
    assert [each.rule for each in moved.violated] == [("prediction", None, "psi")]
    assert (moved.by_name["prediction"].role, moved.by_name["prediction"].psi) == ("feature", 0)
    assert (moved.predictions.role, moved.predictions.psi) == ("prediction", pytest.approx(moved.violated[0].value))
    other = compare(reference, scored({"prediction": score + 2000}, low), RULES, DATA)
    assert ("feature", "prediction", "psi") in other.rules
    assert not [each for each in other.violated if each.kind == "prediction"]


def test_a_stored_drift_that_has_predictions_among_its_columns_is_read():
    """Their role tells them: a version that was registered so is watched on."""
    now = compare(scored({"x": [1.0] * 50}, normal(50)), scored({"x": [1.0] * 50}, normal(50) + 9), RULES, DATA)
    then = now.model_dump(mode="json")
    then["columns"].append({**then.pop("predictions"), "name": "prediction"})
    for each in then["violated"]:
        each["column"] = "prediction" if each["kind"] == "prediction" else each["column"]
    read = Drift.model_validate(then)
    assert read.columns == now.columns
    assert read.predictions.psi == now.predictions.psi > 1
    assert read.rules == now.rules == {("prediction", None, "psi")}


# Triage


def finding(kind: str, name: str | None = "x", measure: str = "psi") -> Finding:
    return Finding(kind=kind, column=name, measure=measure, value=0.5, limit=0.2, sentence=f"{name} {measure} {kind}")


DROP = finding("performance", None, "drop")
LEANS = finding("importance", None, "shift")
MOVED, TARGET, PREDICTED = finding("feature"), finding("target", "late"), finding("prediction", None)


def week(number: int, *violated: Finding, now: float | None = None, predicted: bool = True, **reading) -> Drift:
    """The `number`th window, with what it violates; `now`: the champion's figure, where labels have arrived."""
    start = START + number * 7 * DAY
    columns = [ColumnDrift(**{"name": "x", "role": "feature", "kind": "number", "rows": 9} | NONE | reading)]
    predictions = ColumnDrift(name="predictions", role="prediction", kind="number", rows=9, **NONE)
    return Drift(
        start=start,
        end=start + 7 * DAY,
        rows=9,
        reference_start=START - 30 * DAY,
        reference_end=START,
        reference_rows=99,
        columns=tuple(columns),
        predictions=predictions if predicted else None,
        model_age_days=7 * number,
        newest_row_days=0,
        performance=None if now is None else performance(now),
        violated=violated,
    )


NONE = {"missing": 0.0, "missing_before": 0.0}


def kind(*violated: tuple[Finding, ...], season: Drift | None = None, **given) -> str:
    return triage([week(number, *each, **given) for number, each in enumerate(violated)], RULES, season).kind


@pytest.mark.parametrize(
    ("violated", "given", "expected"),
    [
        ([(), (), ()], {}, "quiet"),
        ([(), (), (MOVED,)], {}, "quiet"),
        ([(MOVED,), (MOVED,), ()], {}, "quiet"),
        ([(finding("feature", "y"),), (), (MOVED,)], {}, "quiet"),
        ([(MOVED,), (), (), (MOVED,)], {}, "quiet"),
        ([(MOVED,), (), (MOVED,)], {}, "withstood"),
        ([(MOVED, PREDICTED), (), (MOVED, PREDICTED)], {}, "shift"),
        ([(MOVED, PREDICTED), (), (MOVED, PREDICTED)], {"now": 0.79}, "withstood"),
        ([(MOVED,), (MOVED,)], {"now": 0.7}, "withstood"),
        ([(MOVED,), (MOVED,)], {"predicted": False}, "shift"),
        ([(MOVED,), (MOVED,)], {"predicted": False, "now": 0.8}, "withstood"),
        ([(TARGET,), (TARGET,)], {"now": 0.8}, "shift"),
        ([(TARGET, PREDICTED), (TARGET, PREDICTED)], {"now": 0.8}, "withstood"),
        ([(DROP,), (), (DROP,)], {"now": 0.7}, "shift"),
        ([(DROP, MOVED), (DROP, MOVED)], {"now": 0.7}, "shift"),
        ([(DROP,), (), ()], {"now": 0.7}, "quiet"),
        ([(LEANS,), (), (LEANS,)], {"now": 0.79}, "withstood"),
        ([(LEANS,), (), (LEANS,)], {"now": 0.75}, "shift"),
        ([(LEANS,), (), ()], {"now": 0.75}, "quiet"),
        ([(LEANS, DROP), (LEANS, DROP)], {"now": 0.7}, "shift"),
        ([(LEANS, MOVED), (LEANS, MOVED)], {"now": 0.79}, "withstood"),
        ([(), (), (finding("fault", measure="missing"),)], {}, "data fault"),
        ([(DROP,), (DROP,), (DROP, finding("fault", measure="type"))], {"now": 0.7}, "data fault"),
    ],
)
def test_each_line_of_the_table(violated, given, expected):
    """The newest window and M of the newest N, in the same column; the first line that holds decides."""
    assert kind(*violated, **given) == expected


@pytest.mark.parametrize(
    ("gain", "low", "parts", "violated", "expected"),
    [
        (0.03, 0.01, (0.03,) * 3, (), "shift"),
        (0.03, 0.01, (0.03,) * 3, (MOVED,), "shift"),  # held, by the table, and newer rows would still do better
        (0.03, -0.01, (0.03,) * 3, (), "quiet"),
        (0.009, 0.005, (0.03,) * 3, (), "quiet"),
        (-0.03, -0.05, (-0.03,) * 3, (MOVED,), "withstood"),
        (0.03, 0.01, (0.03,) * 3, (finding("fault", measure="missing"),), "data fault"),
        (0.03, None, (0.03,) * 3, (), "quiet"),
        (0.03, 0.01, (None, 0.03, 0.03), (), "shift"),
        (0.03, 0.01, (0.0, 0.01, 0.09), (), "quiet"),  # past the rule in one part of the time only
        (0.03, 0.01, (0.09, 0.09, 0.0), (), "quiet"),  # and no more
        (0.03, 0.01, (0.03,), (), "shift"),  # there is one day
        (0.03, 0.01, (), (), "quiet"),  # written down before the parts were asked for
    ],
)
def test_newer_rows_count_past_the_rule_and_past_chance(gain, low, parts, violated, expected):
    """And in as many parts of the time as any move; whatever else moved or did not, but for a fault.

    Asked or not, what they are worth is told and goes with the alert.
    """
    rules = RULES.model_copy(update={"freshness": Gain(gain=0.01)})
    high = None if low is None else 2 * gain - low
    days = Window(start=START, end=START + 60 * DAY)
    fresh = Freshness(
        metric="roc_auc",
        gain=Estimate(value=gain, low=low, high=high),
        parts=parts,
        rows=900,
        judged=days,
        before=days,
        now=days,
    )
    history = [week(number, *violated, now=0.79) for number in range(3)]
    found = triage(history, rules, None, fresh)
    assert found.kind == expected
    assert found.evidence["freshness"]["gain"]["value"] == gain
    said = [reason for reason in found.reasons if f"gains {gain:+.3f} of roc_auc" in reason]
    assert len(said) == (expected != "data fault")
    assert triage(history, RULES).kind == triage(history, RULES, None, fresh).kind


@pytest.mark.parametrize(
    ("violated", "given", "expected"),
    [
        ((TARGET,), {"now": 0.8}, "withstood"),
        ((MOVED, PREDICTED), {"now": 0.75}, "withstood"),
        ((LEANS,), {"now": 0.75}, "withstood"),
        ((DROP,), {"now": 0.7}, "shift"),
    ],
)
def test_what_moved_starts_nothing_where_newer_rows_are_worth_nothing(violated, given, expected):
    """A move is a reason to ask, and this is the answer; a drop that is proven is alerted all the same."""
    rules = RULES.model_copy(update={"freshness": Gain(gain=0.01)})
    days = Window(start=START, end=START + 60 * DAY)
    gain = Estimate(value=0.001, low=-0.01, high=0.012)
    fresh = Freshness(metric="roc_auc", gain=gain, parts=(0.001,), rows=900, judged=days, before=days, now=days)
    history = [week(number, *violated, **given) for number in range(3)]
    assert triage(history, rules).kind == "shift"
    assert triage(history, rules, None, fresh).kind == expected


@pytest.mark.parametrize(
    ("high", "head", "worth"),
    [
        (0.012, "newer rows are not shown to make a better model", "not shown to be enough"),
        (0.010, "newer rows promise no better model", "not enough"),
    ],
)
def test_what_too_few_rows_cannot_show_is_not_called_worthless(high, head, worth):
    """Newer rows promise nothing only where the whole interval is within the rule; either way nothing starts."""
    rules = RULES.model_copy(update={"freshness": Gain(gain=0.01)})
    days = Window(start=START, end=START + 60 * DAY)
    gain = Estimate(value=0.002, low=0.004 - high, high=high)
    fresh = Freshness(metric="roc_auc", gain=gain, parts=(0.002,), rows=900, judged=days, before=days, now=days)
    found = triage([week(number, TARGET) for number in range(3)], rules, None, fresh)
    assert found.kind == "withstood"
    assert found.reasons[0].endswith(head)
    assert found.reasons[-1].endswith(f"{worth} to train for")


def test_a_move_that_the_same_season_before_knew_is_seasonal():
    """Against that season nothing moved; where something else did, or the model fell, it is not the season."""
    moves = [(MOVED, PREDICTED)] * 2
    assert kind(*moves, season=week(0)) == "seasonal"
    assert kind(*moves, season=week(0, MOVED)) != "seasonal"
    assert kind(*[(MOVED, DROP)] * 2, season=week(0), now=0.7) == "shift"


def test_a_season_does_not_speak_for_what_the_model_leans_on():
    """Where only that moved, no column is as in the season before; where columns did too, they are."""
    assert kind(*[(LEANS,)] * 2, season=week(0), now=0.79) == "withstood"
    assert kind(*[(LEANS, MOVED)] * 2, season=week(0), now=0.79) == "seasonal"


def test_what_the_model_leans_on_is_part_of_the_shifts_reasons():
    """Beside the drop, and in what the alert carries."""
    found = triage([week(number, LEANS, DROP, now=0.7) for number in range(2)], RULES)
    assert found.reasons[1] == f"{LEANS.sentence}, in 2 of the newest 2 windows"
    assert {"importance", "performance"} <= {each["kind"] for each in found.evidence["violated"]}


def test_labels_that_come_late_confirm_by_the_windows_that_have_them():
    """The newest two windows have none; the drop of the two before is confirmed all the same."""
    history = [week(0, DROP, now=0.7), week(1, DROP, now=0.7), week(2), week(3)]
    assert triage(history, RULES).kind == "shift"


def test_of_a_window_with_a_fault_only_the_fault_counts():
    """Its drop and its moves are the fault's: a sound window after it confirms nothing with them."""
    broken = finding("fault", measure="missing")
    history = [week(0, DROP, MOVED, broken, now=0.7), week(1, DROP, MOVED, broken, now=0.7), week(2, MOVED)]
    assert triage(history, RULES).kind == "quiet"


@pytest.mark.parametrize(("scales", "fault"), [((1.0, 1.6), True), ((1.0, 1.3, 1.5, 1.9), False), ((1.6,), True)])
def test_a_unit_comes_at_once_and_growth_by_steps(scales, fault):
    """1.6 times at once, or 1.9 by steps of less than 1.4; and it stays what it was in the window after."""
    history = [
        week(number, *([finding("fault", measure="unit"), MOVED] if scale >= 1.4 else []), scale=scale)
        for number, scale in enumerate((*scales, scales[-1]))
    ]
    assert [triage(history[:end], RULES).kind == "data fault" for end in (-1, None)] == [fault, fault]
    assert fault or "it got there by steps" in " ".join(triage(history, RULES).reasons)


def test_a_range_that_was_seen_coming_is_no_fault():
    """Summer after winter; a broken sensor comes out of nowhere, and stays a fault."""
    broken = finding("fault", measure="range")
    assert triage([week(0, outside=FAR + 0.1), week(1, broken, outside=0.4)], RULES).kind == "quiet"
    calm = week(1, outside=0.0)
    assert triage([week(0, outside=FAR + 0.1), calm, week(2, broken, outside=0.4)], RULES).kind == "quiet"
    assert triage([week(0, outside=0.0), week(1, broken, outside=0.4)], RULES).kind == "data fault"
    assert triage([week(0), week(1, broken, outside=0.4), week(2, broken, outside=0.4)], RULES).kind == "data fault"


def test_reasons_and_evidence_are_plain_and_say_how_often():
    """What a person reads and what an alert carries: every number is JSON's."""
    found = triage([week(0, MOVED), week(1), week(2, MOVED, DROP, now=0.7)], RULES)
    assert found.reasons[0] == "x moved, and the predictions did not"
    assert "x psi feature, in 2 of the newest 3 windows" in found.reasons
    assert any("not confirmed" in each and "drop" in each for each in found.reasons)
    assert found.evidence["violated"][0]["value"] == 0.5
    assert [each["violated"] for each in found.evidence["windows"]] == [["x"], [], ["performance", "x"]]
    canonical_json(found)
    assert {found.action} <= set(ACTIONS.values())


def test_evidence_fits_into_an_inbox():
    """A thousand columns that moved, under long names, in every window: 64 KiB are more than enough."""
    moves = [finding("feature", f"{number:060}") for number in range(1000)]
    found = triage([week(number, *moves) for number in range(3)], RULES)
    assert found.evidence["violations"] == 1000
    assert len(canonical_json(found.evidence)) < 48 * 1024


def test_no_window_yet_is_quiet():
    """The first look finds nothing to say."""
    assert triage([], RULES).kind == "quiet"


# Whatever comes


values = st.one_of(
    st.lists(st.one_of(st.none(), st.floats()), max_size=60),
    st.lists(st.one_of(st.none(), st.booleans()), max_size=60),
    st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=60),
    st.lists(st.integers(-(2**60), 2**60), max_size=60),
)


@settings(max_examples=150)
@given(values, values)
@example([1e307, -1e307] * 20, [5e-324] * 20)
@example([5e-324] * 20, [1e307, -1e307] * 20)
def test_whatever_is_compared_gives_numbers_that_json_has(before, now):
    """No values, infinities, other types: no exception, no NaN, no infinity."""
    columns = [{"x": pl.Series(each, strict=False)} for each in (before, now)]
    drift = beside(*columns)
    json.loads(canonical_json(drift))
    assert Drift.model_validate_json(drift.model_dump_json()) == drift
    json.loads(canonical_json(triage([drift, drift], RULES)))


def test_the_least_number_that_a_float_holds_is_a_number_too():
    """There is a bin below it, and nothing in it."""
    least = [-1.7976931348623157e308] * 60 + [float(number) for number in range(40)]
    column(beside({"x": least}, {"x": least[::-1]}))


def test_importing_it_costs_a_parsed_dag_nothing():
    """Neither numpy nor polars nor scipy comes with it."""
    heavy = "{'numpy', 'polars', 'scipy', 'pandas'} & set(sys.modules)"
    code = f"import evergreen.monitoring.drift, sys; print(sorted({heavy}))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


# The whole way


@pytest.fixture(scope="module")
def bench():
    """benchmarks/triage.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_triage", ROOT / "benchmarks" / "triage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_triage"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_triage"]


def test_planted_causes_are_taken_for_what_they_are(bench):
    """One world of the benchmark, every cause: rows → profiles → drift → triage."""
    world = bench.World(3)
    found = {name: bench.planted(world, name)[0] for name in bench.CAUSES}
    assert found == {name: expected for name, (_, _, expected) in bench.CAUSES.items()}


@pytest.mark.slow
def test_a_real_spring_has_no_fault_and_the_last_day_of_the_year_has():
    """Flights of 2013: weather moves every week and is no fault; on 31 December the weather reports are not there."""
    pack = Pack.load(ROOT / "include" / "packs" / "flight_delay")
    spec = importlib.util.spec_from_file_location("flights", pack.folder / "model.py")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    year = pl.concat(model.read(Window(start=datetime(2013, 1, 1, tzinfo=UTC), end=datetime(2014, 1, 1, tzinfo=UTC))))
    time = pl.col("scheduled_departure")

    def cut(start: datetime, days: int):
        end = start + days * DAY
        return profile(year.filter(time >= start, time < end), start, end)

    begin = datetime(2013, 1, 20, tzinfo=UTC)
    reference = cut(begin, 60)
    usual = [compare(reference, cut(begin + 7 * each * DAY, 7), RULES, pack.data) for each in range(8)]
    weeks = [cut(begin + (60 + 7 * each) * DAY, 7) for each in range(10)]
    history = [compare(reference, each, RULES, pack.data, usual=usual) for each in weeks]
    found = [triage(history[: end + 1], RULES).kind for end in range(len(history))]
    assert "data fault" not in found
    assert sum(bool(each.violated) for each in history) > 5

    last = compare(reference, cut(datetime(2013, 12, 31, tzinfo=UTC), 1), RULES, pack.data, usual=usual)
    assert {"temperature", "humidity", "wind_speed"} <= {
        each.column for each in last.violated if each.measure == "missing"
    }
