"""Profiles say what the rows say: exactly where little is there, within the bound they name where much is."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from evergreen.errors import SourceError, StoreError
from evergreen.monitoring.profiles import BUCKETS, NAMES, POINTS, Profile, column_profile, merge, profile

START = datetime(2013, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
COLUMN_BYTES = 64 * 1024


def of(frame: pl.DataFrame, day: int = 0) -> Profile:
    return profile(frame, START + day * DAY, START + (day + 1) * DAY)


def column(values, dtype=None, *, strict=True):
    return of(pl.DataFrame({"x": pl.Series(values, dtype=dtype, strict=strict)})).columns["x"]


def drawn(shape: str, rows: int, seed: int) -> np.ndarray:
    """Numbers of shapes that are hard to keep: long tails, heavy values, gaps, order."""
    rng = np.random.default_rng(seed)
    match shape:
        case "normal":
            return rng.normal(size=rows)
        case "tails":
            return np.exp(rng.normal(size=rows) * 30) * rng.choice([-1, 1], rows)
        case "heavy":
            return np.where(rng.random(rows) < 0.6, rng.integers(0, 4, rows) / 7, rng.random(rows))
        case "zipf":
            return np.minimum(rng.zipf(1.2, rows), 10**15).astype(float)
        case "ids":
            return rng.permutation(rows) * 1000.0 + 10**9
        case "rising":
            return np.sort(rng.gamma(2, size=rows))
        case "repeated":
            return rng.normal(size=rows // 3)[rng.integers(0, rows // 3, rows)]
    raise ValueError(shape)


SHAPES = ("normal", "tails", "heavy", "zipf", "ids", "rising", "repeated")


def farthest(found, rows: np.ndarray) -> float:
    """By how much `cdf` is off at most: at every value, and just below it."""
    ordered = np.sort(rows)
    at, below = np.unique(ordered), np.nextafter(np.unique(ordered), -np.inf)
    exact = [np.searchsorted(ordered, points, side="right") / len(ordered) for points in (at, below)]
    return max(np.abs(found.cdf(points) - share).max() for points, share in zip((at, below), exact, strict=True))


# Few values: everything is exact.

numbers = st.lists(st.one_of(st.none(), st.floats(width=64), st.integers(-9, 9).map(float)), max_size=60)


@given(numbers)
def test_few_numbers_are_kept_exactly(values):
    found = column(values, pl.Float64)
    told = np.array([value for value in values if value is not None], dtype=float)
    finite = told[np.isfinite(told)]
    assert (found.rows, found.seen, found.slack) == (len(values), len(finite), 0)
    assert found.infinite == np.isinf(told).sum()
    assert found.missing == values.count(None) + np.isnan(told).sum()
    assert found.distinct == len(np.unique(finite))
    at = np.arange(11) / 10
    if not len(finite):
        assert found.mean is found.spread is found.minimum is found.maximum is None
        assert np.isnan(found.quantiles(at)).all()
        assert np.isnan(found.cdf([0.0])).all()
        return
    assert (found.minimum, found.maximum) == (finite.min(), finite.max())
    assert found.quantiles(at).tolist() == np.quantile(finite, at, method="inverted_cdf").tolist()
    assert found.cdf(finite).tolist() == [(finite <= value).mean() for value in finite]
    scale = np.abs(finite).max() or 1.0
    assert found.mean == pytest.approx((finite / scale).mean() * scale, abs=1e-12 * scale)
    assert found.spread == pytest.approx((finite / scale).std() * scale, abs=1e-7 * scale)


def test_the_seventh_of_a_hundred_values_is_the_quantile_at_seven_percent():
    assert column(range(1, 101)).quantiles([0.0, 0.07, 0.14, 0.29, 1.0]).tolist() == [1, 7, 14, 29, 100]


def test_the_largest_numbers_do_not_overflow_when_profiles_are_merged():
    """Half of the rows at either end of what a float holds: the spread is that end itself, and not infinite."""
    most = sys.float_info.max
    parts = [of(pl.DataFrame({"x": [-most] * 10})), of(pl.DataFrame({"x": [most] * 28 + [-most] * 18}), 1)]
    merged = merge(parts).columns["x"]
    assert (merged.mean, merged.spread) == (pytest.approx(0, abs=most * 1e-15), pytest.approx(most))


def test_huge_numbers_have_a_mean_and_a_spread():
    found = column([1.7e308, -1.7e308, 1.7e308, -1.7e308])
    assert (found.mean, found.spread) == (0.0, 1.7e308)
    found = column([2**64 - 1, 2**64 - 1], pl.UInt64)
    assert (found.mean, found.spread, found.minimum) == (2.0**64, 0.0, 2.0**64)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.0, -1e300])
def test_a_constant_column_has_no_spread_however_often_it_is_merged(value):
    found = merge([of(pl.DataFrame({"x": [value] * rows}), rows) for rows in (1, 3, 7, 49)]).columns["x"]
    assert (found.mean, found.spread, found.distinct, found.minimum) == (value, 0.0, 1, value)


def test_zero_has_no_sign():
    assert column([-0.0, 0.5, 0.0]).values.tolist() == [0.0, 0.5]
    assert not np.signbit(column([-0.0, 0.5]).values).any()
    assert not np.signbit(column([-0.0, 0.0]).values).any()


@pytest.mark.parametrize("dtype", [pl.Int8, pl.Int32, pl.Int64, pl.UInt8, pl.Float32, pl.Float64, pl.Decimal(9, 2)])
def test_a_number_is_the_same_whatever_its_type(dtype):
    values = [Decimal(value) for value in (3, 1, 2, 2)] if dtype == pl.Decimal(9, 2) else [3, 1, 2, 2]
    found = column([*values, None], dtype)
    assert (found.kind, found.rows, found.missing, found.mean) == ("number", 5, 1, 2.0)
    assert (found.values.tolist(), found.weights.tolist()) == ([1.0, 2.0, 3.0], [1, 2, 1])


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_a_time_is_seconds_since_1970_in_utc_whatever_its_unit_and_zone(unit, zone):
    instants = pl.Series("x", [START, START + DAY, None]).dt.cast_time_unit(unit)
    series = instants.dt.convert_time_zone(zone) if zone else instants.dt.replace_time_zone(None)
    found = of(series.to_frame()).columns["x"]
    assert (found.kind, found.missing) == ("time", 1)
    assert (found.minimum, found.maximum) == (START.timestamp(), (START + DAY).timestamp())


def test_a_date_is_the_time_it_begins_and_no_date_is_too_far():
    found = column([date(2013, 1, 1), date(1, 1, 1), date(9999, 12, 31)])
    assert found.kind == "time"
    assert START.timestamp() in found.values.tolist()
    assert found.maximum == datetime(9999, 12, 31, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("dtype", [pl.String, pl.Categorical, pl.Enum(["AA", "UA", "unused", ""])])
def test_a_category_is_its_text_whatever_its_type(dtype):
    found = column(["UA", "AA", "UA", "", None], dtype)
    assert (found.kind, found.missing, found.distinct, found.slack) == ("category", 1, 3, 0)
    assert found.shares() == {"UA": 0.5, "": 0.25, "AA": 0.25}
    assert found.rest == 0.0


def test_a_boolean_has_the_shares_of_true_and_false():
    found = column([True, False, True, True, None])
    assert (found.kind, found.missing, found.shares()) == ("boolean", 1, {"true": 0.75, "false": 0.25})


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(pl.Null, "null"), (pl.Float64, "number"), (pl.String, "category"), (pl.Boolean, "boolean"), (pl.Date, "time")],
)
@pytest.mark.parametrize("rows", [0, 3])
def test_a_column_without_a_value_has_a_profile_too(dtype, kind, rows):
    found = column([None] * rows, dtype)
    assert (found.kind, found.rows, found.missing, found.seen) == (kind, rows, rows, 0)
    assert (found.mean, found.distinct, found.shares(), found.rest, found.rank_error) == (None, 0, {}, 0.0, 0.0)


def test_a_type_that_no_partition_keeps_is_refused_by_name():
    with pytest.raises(SourceError, match=r"column 'x' holds List\(Int64\)"):
        column([[1], [2]])


# Many values: within the bound that the profile names.


@settings(max_examples=40)
@given(st.sampled_from(SHAPES), st.integers(POINTS // 2, 20_000), st.integers(0, 2**32 - 1))
def test_no_rank_is_farther_off_than_the_profile_says(shape, rows, seed):
    drawn_rows = drawn(shape, rows, seed)
    found = column(drawn_rows)
    assert farthest(found, drawn_rows) <= found.rank_error + 1e-12 <= 1 / BUCKETS + 1e-12
    assert len(found.values) <= POINTS
    assert found.weights.sum() == rows
    assert (found.minimum, found.maximum) == (drawn_rows.min(), drawn_rows.max())
    assert (found.slack == 0) == (len(np.unique(drawn_rows)) <= POINTS)


def test_a_value_that_many_rows_share_keeps_its_exact_count():
    rows = drawn("heavy", 50_000, 3)
    found = column(rows)
    assert found.slack > 0
    for value in np.arange(4) / 7:
        assert found.weights[np.searchsorted(found.values, value)] == (rows == value).sum()


@settings(max_examples=20)
@given(st.lists(st.sampled_from(SHAPES), min_size=2, max_size=8), st.data())
def test_a_merge_is_within_its_bound_of_all_rows_and_does_not_depend_on_their_order(shapes, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    days = [drawn(shape, data.draw(st.integers(3, 4000)), seed + at) for at, shape in enumerate(shapes)]
    parts = [of(pl.DataFrame({"x": rows}), at) for at, rows in enumerate(days)]
    together = np.concatenate(days)
    merged = merge(parts)
    found, whole = merged.columns["x"], column(together)
    assert farthest(found, together) <= found.rank_error + 1e-12 <= 2 / BUCKETS + 1e-12
    assert (found.rows, found.minimum, found.maximum) == (whole.rows, whole.minimum, whole.maximum)
    scale = np.abs(together).max()
    assert found.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-12 * scale)
    assert found.spread == pytest.approx(whole.spread, rel=1e-9, abs=1e-12 * scale)
    assert merge(data.draw(st.permutations(parts))).to_bytes() == merged.to_bytes()


def test_merges_of_merges_stay_within_half_a_percent():
    days = [drawn(SHAPES[day % len(SHAPES)], 2000, day) for day in range(56)]
    weeks = [
        merge(of(pl.DataFrame({"x": days[day]}), day) for day in range(week, week + 7)) for week in range(0, 56, 7)
    ]
    months = [merge(weeks[:4]), merge(weeks[4:])]
    year = merge(months)
    assert (year.start, year.end, year.rows) == (START, START + 56 * DAY, 56 * 2000)
    found = year.columns["x"]
    assert farthest(found, np.concatenate(days)) <= found.rank_error + 1e-12 < 0.005


def test_folding_days_in_one_by_one_is_worse_but_within_its_own_bound():
    days = [drawn("normal", 1500, day) for day in range(20)]
    fold = of(pl.DataFrame({"x": days[0]}))
    for rows in days[1:]:
        fold = merge([fold, of(pl.DataFrame({"x": rows}))])
    found = fold.columns["x"]
    at_once = merge(of(pl.DataFrame({"x": rows})) for rows in days).columns["x"]
    assert farthest(found, np.concatenate(days)) <= found.rank_error + 1e-12
    assert at_once.rank_error < found.rank_error


def test_a_profile_merged_with_nothing_is_itself():
    frame = pl.DataFrame({"x": drawn("normal", 5000, 1), "y": [f"{key}" for key in drawn("zipf", 5000, 2)]})
    assert merge([of(frame)]).to_bytes() == of(frame).to_bytes()


def test_rows_in_another_order_give_the_same_bytes():
    rng = np.random.default_rng(5)
    frame = pl.DataFrame(
        {
            "number": drawn("tails", 5000, 1),
            "ties": rng.integers(0, 700, 5000).astype(str),  # more than are kept, most of them as frequent as others
            "id": [f"user-{key}" for key in range(5000)],
            "flag": rng.random(5000) < 0.5,
        }
    )
    other = frame.sample(fraction=1.0, shuffle=True, seed=9).select(sorted(frame.columns, reverse=True))
    assert of(frame).to_bytes() == of(other).to_bytes()


def test_a_column_may_be_int_one_day_and_float_or_null_the_next():
    days = [pl.Series([1, 2], dtype=pl.Int64), pl.Series([0.5, None]), pl.Series([None, None], dtype=pl.Null)]
    found = merge(of(pl.DataFrame({"x": series})) for series in days).columns["x"]
    assert (found.kind, found.rows, found.missing) == ("number", 6, 3)
    assert found.values.tolist() == [0.5, 1.0, 2.0]
    assert merge([of(pl.DataFrame({"x": days[2]}))] * 2).columns["x"].kind == "null"


def test_kinds_that_differ_are_not_merged():
    with pytest.raises(SourceError, match="column 'x' is a category here and a number there"):
        merge([of(pl.DataFrame({"x": [1]})), of(pl.DataFrame({"x": ["1"]}))])


def test_a_column_that_some_days_lack_has_the_rows_of_the_others():
    merged = merge([of(pl.DataFrame({"x": [1, 2]})), of(pl.DataFrame({"x": [3], "late": [0.5]}), 1)])
    assert (merged.rows, merged.columns["x"].rows, merged.columns["late"].rows) == (3, 3, 1)
    assert (merged.start, merged.end) == (START, START + 2 * DAY)


# Categories beyond those kept.


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(1.05, 2.0))
def test_no_category_is_understated_by_more_than_the_profile_says(seed, parts, steepness):
    rng = np.random.default_rng(seed)
    days = [[f"user-{key}" for key in np.minimum(rng.zipf(steepness, 3000), 10**6)] for _ in range(parts)]
    found = merge(of(pl.DataFrame({"x": names})) for names in days).columns["x"]
    exact = dict(pl.Series("name", [name for names in days for name in names]).value_counts().iter_rows())
    kept = dict(zip(found.names, found.weights.tolist(), strict=True))
    assert len(kept) <= NAMES
    assert all(0 <= exact[name] - kept.get(name, 0) <= found.slack for name in exact)
    assert found.slack <= 2 * found.rows / NAMES
    assert sum(found.shares().values()) + found.rest == pytest.approx(1)
    assert (found.slack == 0) == (len(exact) <= NAMES)
    assert list(found.weights) == sorted(found.weights, reverse=True)


def test_long_names_are_cut_and_stay_apart():
    ends = ["x" * 500 + end for end in ("a", "b", "b")] + ["日本" * 200, "short"]
    found = column(ends)
    assert (found.distinct, found.shares()["short"]) == (4, 0.2)
    assert max(found.shares().values()) == 0.4
    assert all(len(name.encode()) <= 80 for name in found.names)
    assert sum(name.startswith("x" * 60) for name in found.names) == 2


# Distinct values.


@pytest.mark.parametrize("make", [float, str, lambda key: key * 1_000_003, lambda key: f"user-{key:09}"])
def test_the_number_of_distinct_values_is_estimated_and_days_that_share_them_do_not_add_up(make):
    keys = [make(key) for key in range(30_000)]
    days = [of(pl.DataFrame({"x": keys[start : start + 20_000]})) for start in (0, 5_000, 10_000)]
    assert days[0].columns["x"].distinct == pytest.approx(20_000, rel=0.2)  # five standard errors, but seeded
    assert merge(days).columns["x"].distinct == pytest.approx(30_000, rel=0.2)


def test_small_days_that_together_are_many_have_their_distinct_values_estimated():
    days = [
        of(pl.DataFrame({"n": range(at, at + 900), "c": [str(key) for key in range(at, at + 400)] + [None] * 500}))
        for at in range(0, 9000, 450)
    ]
    merged = merge(days)
    assert merged.columns["n"].distinct == pytest.approx(9450, rel=0.2)
    assert merged.columns["c"].distinct == pytest.approx(8000, rel=0.2)


# Bytes.


def everything(rows: int = 3000) -> pl.DataFrame:
    rng = np.random.default_rng(11)
    return pl.DataFrame(
        {
            "normal": rng.normal(size=rows),
            "count": rng.poisson(4, rows),
            "gaps": pl.Series(rng.normal(size=rows)).set(pl.Series(rng.random(rows) < 0.2), None),
            "odd": pl.Series([np.nan, np.inf, -np.inf, None] + [1.5] * (rows - 4)),
            "when": [START + timedelta(seconds=float(second)) for second in rng.integers(0, 86_400, rows)],
            "carrier": rng.choice(["UA", "AA", "日本", "a\0b", ""], rows),
            "user": [f"user-{key}" for key in rng.permutation(rows)],
            "late": rng.random(rows) < 0.2,
            "nothing": pl.Series([None] * rows, dtype=pl.Null),
            'name "with" \\ signs, ü': range(rows),
        }
    )


def same(left: Profile, right: Profile) -> bool:
    """Whether all that can be read from them is the same."""

    def read(each):
        plain = {key: value for key, value in vars(each).items() if not isinstance(value, np.ndarray)}
        return plain, each.values.tolist(), each.weights.tolist(), each.hashes.tolist()

    window = [(each.rows, each.start, each.end, list(each.columns)) for each in (left, right)]
    return window[0] == window[1] and all(
        read(left.columns[name]) == read(right.columns[name]) for name in left.columns
    )


@pytest.mark.parametrize("rows", [4, 3000])
def test_a_profile_comes_back_from_its_bytes(rows):
    for original in (of(everything(rows)), merge([of(everything(rows)), of(everything(4), 1)])):
        again = Profile.from_bytes(original.to_bytes())
        assert same(original, again)
        assert again.to_bytes() == original.to_bytes()


@pytest.mark.parametrize("frame", [pl.DataFrame(), everything().head(0), pl.DataFrame({"x": [None]})])
def test_an_empty_profile_comes_back_from_its_bytes(frame):
    assert same(of(frame), Profile.from_bytes(of(frame).to_bytes()))
    assert same(merge([of(frame), of(frame)]), Profile.from_bytes(merge([of(frame), of(frame)]).to_bytes()))


def test_a_column_takes_no_more_than_64_kib_however_much_is_in_it():
    rows = 40_000
    rng = np.random.default_rng(2)
    worst = {
        "long": ['\u0001"\\𝄞日' * 8 + str(key) for key in range(rows)],
        "number": np.concatenate([rng.normal(size=rows // 2), np.repeat(rng.normal(size=500), rows // 1000)]),
        "when": pl.Series(rng.integers(0, 2**62, rows)).cast(pl.Datetime("ns")),
    }
    for name, values in worst.items():
        part = of(pl.DataFrame({name: values}))
        assert len(part.to_bytes()) <= COLUMN_BYTES
        assert len(merge([part] * 30).to_bytes()) <= COLUMN_BYTES


def test_another_process_with_other_threads_makes_the_same_bytes(tmp_path):
    everything().write_parquet(tmp_path / "rows.parquet")
    script = (
        "import hashlib, sys, polars as pl; from datetime import UTC, datetime\n"
        "from evergreen.monitoring.profiles import profile\n"
        "frame = pl.read_parquet(sys.argv[1]).reverse()\n"
        "made = profile(frame, datetime(2013, 1, 1, tzinfo=UTC), datetime(2013, 1, 2, tzinfo=UTC)).to_bytes()\n"
        "print(hashlib.sha256(made).hexdigest())"
    )
    environment = {**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", script, str(tmp_path / "rows.parquet")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(of(everything()).to_bytes()).hexdigest()


def test_the_format_of_version_2_does_not_change_unnoticed():
    frame = pl.DataFrame(
        {"number": [float(key * key % 4099) for key in range(4099)], "name": [str(key % 9) for key in range(4099)]}
    )
    assert (
        hashlib.sha256(of(frame).to_bytes()).hexdigest()
        == "95baccceda263009b66b5b380e6aa6f2294f2c61ea062ea5887d42ef04d597e0"
    )


def test_bytes_that_are_no_profile_are_refused():
    good = of(everything(4)).to_bytes()
    for bad in (b"", b"no profile", good[: len(good) // 2], save({}), save({}, metadata={"other": "{}"})):
        with pytest.raises(StoreError, match="that should be a profile are none"):
            Profile.from_bytes(bad)


def test_a_profile_of_another_version_is_refused_by_its_number():
    told = {"version": 3, "start": START.isoformat(), "end": START.isoformat()}
    with pytest.raises(StoreError, match="of version 3, where this Evergreen reads versions up to 2"):
        Profile.from_bytes(save({}, metadata={"evergreen.profile": json.dumps(told)}))


def of_both(column, predictions):
    """The profile of a column called `prediction`, and of predictions beside it."""
    made = of(pl.DataFrame({"prediction": column, "x": [float(each) for each in range(len(column))]}))
    return replace(made, predictions=column_profile(pl.Series(predictions)))


def test_predictions_are_apart_from_a_column_of_that_name():
    """Stored, read again and merged, either keeps its own values; so does a profile without predictions."""
    one, two = of_both([700.0, 800.0], [0.25, 0.5]), of_both([900.0], [0.75])
    for whole in (merge([one, two]), Profile.from_bytes(merge([one, two]).to_bytes())):
        assert list(whole.columns) == ["prediction", "x"]
        assert whole.columns["prediction"].values.tolist() == [700.0, 800.0, 900.0]
        assert whole.predictions.values.tolist() == [0.25, 0.5, 0.75]
    without = merge([one, of(pl.DataFrame({"prediction": [5.0], "x": [1.0]}))])
    assert (without.rows, without.columns["prediction"].rows, without.predictions.rows) == (3, 3, 2)
    assert Profile.from_bytes(of(pl.DataFrame({"x": [1]})).to_bytes()).predictions is None


def test_a_profile_read_column_by_column_is_the_same(tmp_path):
    """What is merged from files, one column of all of them at a time, has the bytes of what is merged in memory."""
    made = [of_both([700.0, float(day)], [0.25, day / 10]) for day in range(3)]
    for day, each in enumerate(made):
        (tmp_path / str(day)).write_bytes(each.to_bytes())
    assert merge(Profile.from_file(tmp_path / str(day)) for day in range(3)).to_bytes() == merge(made).to_bytes()
    (tmp_path / "0").write_bytes(made[0].to_bytes()[:-1])
    with pytest.raises(StoreError, match="that should be a profile are none"):
        Profile.from_file(tmp_path / "0")


def test_the_predictions_of_a_profile_of_version_1_are_read_from_its_column():
    """Its other columns are as they were; registered versions have such profiles for as long as they are kept."""
    content = of(pl.DataFrame({"prediction": [0.25, 0.5], "x": [1.0, 2.0]})).to_bytes()
    told = json.loads(
        json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["evergreen.profile"]
    )
    del told["predictions"]
    found = Profile.from_bytes(save(load(content), metadata={"evergreen.profile": json.dumps(told | {"version": 1})}))
    assert list(found.columns) == ["x"]
    assert found.columns["x"].values.tolist() == [1.0, 2.0]
    assert found.predictions.values.tolist() == [0.25, 0.5]


@pytest.mark.prove
def test_a_year_of_days_of_every_shape_is_within_its_bound():
    for seed, shape in enumerate(SHAPES):
        days = [drawn(shape, 3000, 1000 * seed + day) for day in range(365)]
        found = merge(of(pl.DataFrame({"x": rows}), day) for day, rows in enumerate(days)).columns["x"]
        off = farthest(found, np.concatenate(days))
        print(f"{shape:<9} rank off by {off:.5f}, bound {found.rank_error:.5f}")  # noqa: T201
        assert off <= found.rank_error + 1e-12 <= 2 / BUCKETS + 1e-12
