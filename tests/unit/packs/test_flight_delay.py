"""The pack `flight_delay`: its rows, what they cannot know, and what its expectations say of them."""

import importlib.util
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from evergreen.pack import Pack
from evergreen.run import Window

FOLDER = Path(__file__).resolve().parents[3] / "include" / "packs" / "flight_delay"
APRIL = Window(start=datetime(2013, 4, 1, tzinfo=UTC), end=datetime(2013, 4, 8, tzinfo=UTC))


@pytest.fixture(scope="module")
def model():
    """The pack's module, as a job imports it."""
    found = importlib.util.spec_from_file_location("flight_delay_model", FOLDER / "model.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def read(model, window):
    return pl.concat(model.read(window))


@pytest.fixture(scope="module")
def april(model):
    return read(model, APRIL)


@pytest.fixture(scope="module")
def raw(model):
    """(flights, weather, planes) with every column of the flights' file, as they lie on disk."""
    every = ["dep_time", "dep_delay", "arr_time", "air_time", "flight", "year", "month", "day", "hour", "minute"]
    table = model.zipfile.ZipFile(model._data("flights.csv.zip")).read("flights.csv")
    return model._csv(table, [*model.SCHEDULE, model.OUTCOME, *every]), model._weather(), model._planes()


def test_the_pack_loads():
    """pack.yaml is right, and its schedule and windows are those the model card tells."""
    pack = Pack.load(FOLDER)
    assert (pack.data.train.days, pack.data.validation.days, pack.data.holdout.days) == (60, 7, 14)
    assert pack.triggers.schedule == "*/10 * * * *"


def test_the_module_imports_without_torch():
    """Reading rows does not pay for torch."""
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import model; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_reads_only_its_window_in_order(april):
    """Rows leave within the half-open window, in order of time."""
    times = april["scheduled_departure"]
    assert times.is_sorted()
    assert (times.min() >= APRIL.start, times.max() < APRIL.end, april.height) == (True, True, 6561)


def test_windows_side_by_side_make_the_whole(model, april):
    """Reading two halves gives the rows of the whole, none twice, none lost."""
    middle = datetime(2013, 4, 3, 14, 15, tzinfo=UTC)
    halves = [Window(start=APRIL.start, end=middle), Window(start=middle, end=APRIL.end)]
    assert_frame_equal(pl.concat([read(model, half) for half in halves]), april)


def test_nothing_that_happens_after_departure_reaches_a_feature(model, raw):
    """With every outcome altered, all columns but the target stay what they were."""
    flights, weather, planes = raw
    outcomes = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]
    altered = flights.with_columns(
        *(pl.col(name).shuffle(seed=1) for name in outcomes if name != "arr_delay"),
        arr_delay=pl.when(pl.col("arr_delay").is_not_null()).then(500 - pl.col("arr_delay")),
    )
    truth = model.assemble(flights, weather, planes, APRIL)
    lied = model.assemble(altered, weather, planes, APRIL)
    assert lied["late"].mean() != truth["late"].mean()
    assert_frame_equal(lied.drop("late"), truth.drop("late"))


def test_nothing_beyond_the_window_reaches_a_row(model, raw):
    """Without the flights and the weather after the window's end, its rows are the same."""
    flights, weather, planes = raw
    past = [table.filter(pl.col("time_hour") < APRIL.end) for table in (flights, weather)]
    assert_frame_equal(
        model.assemble(*past, planes, APRIL),
        model.assemble(flights, weather, planes, APRIL),
    )


def test_the_only_outcome_that_is_read_is_the_arrival_delay(model):
    """The file's other outcomes are not even parsed."""
    read_columns = {*model.SCHEDULE, model.OUTCOME}
    assert read_columns & {"dep_time", "dep_delay", "arr_time", "air_time", "arr_delay"} == {"arr_delay"}


def test_late_is_more_than_15_minutes(model, raw):
    """15 minutes are not late, 16 are; flights that never arrived are not there."""
    flights, weather, planes = raw
    some = flights.filter(pl.col("time_hour").is_between(APRIL.start, APRIL.start + timedelta(hours=23))).head(3)
    told = some.with_columns(arr_delay=pl.Series([15, 16, None], dtype=pl.Int64))
    assert sorted(model.assemble(told, weather, planes, APRIL)["late"].to_list()) == [False, True]


@pytest.mark.parametrize(
    ("day", "hours"), [((2013, 3, 9), 5), ((2013, 3, 11), 4), ((2013, 11, 2), 4), ((2013, 11, 4), 5)]
)
def test_departure_is_the_schedule_of_new_york_in_utc(model, day, hours):
    """Summer time included: a flight at 6:00 leaves at 11:00 UTC in winter, at 10:00 in summer."""
    start = datetime(*day, hours, tzinfo=UTC)
    rows = read(model, Window(start=start, end=start + timedelta(days=1)))
    minute = rows["scheduled_departure"].dt.hour().cast(pl.Int64) * 60 + rows["scheduled_departure"].dt.minute()
    assert ((minute - rows["departure_minute"]) % 1440).unique().to_list() == [hours * 60]


def test_weekday_is_that_of_new_york(model):
    """A Monday night's flight, Tuesday in UTC, is a Monday's."""
    late_evening = Window(start=datetime(2013, 4, 2, 1, tzinfo=UTC), end=datetime(2013, 4, 2, 3, tzinfo=UTC))
    assert read(model, late_evening)["weekday"].unique().to_list() == [1]


def test_weather_is_that_of_the_scheduled_hour_at_the_origin(model, april, raw):
    """Each row's temperature is what its airport reported for its hour."""
    _, weather, _ = raw
    row = april.filter(pl.col("temperature").is_not_null()).row(100, named=True)
    hour = row["scheduled_departure"].replace(minute=0)
    reported = weather.filter(origin=row["origin"], time_hour=hour)["temperature"].to_list()
    assert reported == [row["temperature"]]


def test_a_flight_without_weather_or_aeroplane_stays(model, raw):
    """The joins lose no flight and make none."""
    flights, weather, planes = raw
    full = model.assemble(flights, weather, planes, APRIL)
    bare = model.assemble(flights, weather.head(0), planes.head(0), APRIL)
    assert bare.height == full.height
    assert bare["temperature"].null_count() == bare["seats"].null_count() == full.height


def test_its_expectations_hold_all_year(model):
    """No month of 2013 breaks an expectation of the pack: what lands in quarantine has a cause."""
    rows = read(model, Window(start=datetime(2013, 1, 1, tzinfo=UTC), end=datetime(2014, 1, 1, tzinfo=UTC)))
    broken = [
        (month, expectation.type, expectation.arguments["column"])
        for month, part in rows.group_by(pl.col("scheduled_departure").dt.month())
        for expectation in Pack.load(FOLDER).expectations
        if not holds(part[expectation.arguments["column"]], expectation)
    ]
    assert broken == []


def holds(values, expectation):
    """What Great Expectations would say, nulls left out as it does."""
    told = expectation.arguments
    known = values.drop_nulls()
    if expectation.type == "expect_column_values_to_not_be_null":
        return len(known) >= told.get("mostly", 1) * len(values)
    if expectation.type == "expect_column_values_to_match_regex":
        return known.str.contains(told["regex"]).all()
    if expectation.type == "expect_column_values_to_be_in_set":
        return known.is_in(told["value_set"]).all()
    if expectation.type == "expect_column_values_to_be_between":
        return told["min_value"] <= known.min() <= known.max() <= told["max_value"]
    assert expectation.type == "expect_column_mean_to_be_between"
    return told["min_value"] <= known.mean() <= told["max_value"]
