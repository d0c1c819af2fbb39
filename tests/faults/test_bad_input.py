"""Bad input ends a run with a text that names the place, the value and the fix; the champion stays; mending is enough."""

from datetime import UTC, datetime, timedelta

import polars as pl
import pytest
from tests.faults.conftest import DAYS, FIRST

from evergreen.errors import (
    EvaluationError,
    PackError,
    SourceError,
    StaleDataError,
    TrainingError,
    ValidationError,
)

NEXT = datetime(2024, 1, 14, tzinfo=UTC)
"""The as-of that sees day 12, which the champion of `first` has not seen."""
NEW = 12

pytestmark = [pytest.mark.usefixtures("kept"), pytest.mark.slow, pytest.mark.fault]


def mended(home, run_id):
    """The world as it should be, day 12 in it: the next run ends well."""
    home.write()
    home.write_model()
    for number in range(NEW + 1):
        home.write_day(number)
    return home.recovers(f"{run_id}, mended", as_of=NEXT)


def test_a_missing_column(home):
    """The file and the column are named; with the column there, the next run learns the new day."""
    home.write_day(NEW, lambda rows: rows.drop("wind"))
    home.refuses(SourceError, "lacks", as_of=NEXT, says=["012.parquet", "'wind'", "fix:"])
    assert mended(home, "lacks")["ingest"].data_until == NEXT


def test_an_as_of_that_is_still_to_come(home):
    """A day mistyped, not so far that the data would be too old: it makes no champion that nothing replaces until then."""
    today = (datetime.now(UTC) - FIRST).days
    for number in range(today - DAYS, today):
        home.write_day(number)
    soon = FIRST + timedelta(days=today + 2)
    home.refuses(SourceError, "soon", as_of=soon, says=[f"as-of {soon:%Y-%m-%d} 00:00 is in the future", "--as-of"])
    mended(home, "soon")


def test_a_renamed_column(home):
    """Both names are given, and that the one may be the other."""
    home.write_day(NEW, lambda rows: rows.rename({"wind": "wind_speed"}))
    says = ["012.parquet", "no column 'wind'", "'wind_speed'", "'wind' may have been renamed"]
    home.refuses(SourceError, "renamed", as_of=NEXT, says=says)
    mended(home, "renamed")


def test_a_target_that_the_source_lacks(home):
    """The target of pack.yaml is named, and the column that was likely meant."""
    home.write(data={"target": "floded"})
    home.refuses(SourceError, "target", says=["'floded'", "did you mean 'flooded'?"])
    mended(home, "target")


def test_a_column_of_another_type(home):
    """A number that became text is not taken for a new kind of number."""
    home.write_day(NEW, lambda rows: rows.with_columns(pl.lit("calm").alias("wind")))
    home.refuses(SourceError, "typed", as_of=NEXT, says=["'wind'", "string", "float", "one type"])
    mended(home, "typed")


@pytest.mark.parametrize("empty", [None, float("nan")], ids=["null", "nan"])
def test_a_target_with_empty_values(home, empty):
    """How many rows and from which day on is said; nothing is tagged."""

    def turn(rows):
        first_seven = pl.int_range(pl.len()) < 7
        return rows.with_columns(
            pl.when(first_seven).then(empty).otherwise(pl.col("flooded").cast(pl.Float64)).alias("flooded")
        )

    home.write_day(NEW, turn)
    says = [
        "'flooded'",
        "empty in 7 rows of 1100",
        "2024-01-13",
        "expect_column_values_to_not_be_null: {column: flooded}",
    ]
    home.refuses(SourceError, f"empty {empty}", as_of=NEXT, says=says)
    mended(home, f"empty {empty}")


@pytest.mark.parametrize(("window", "days"), [("train", range(1, 7)), ("holdout", range(9, 12))])
def test_a_target_of_one_class(home, window, days):
    """The window in which all rows have the same value is named with it."""
    home.write(data={"lookback": 11})
    for number in days:
        home.write_day(number, lambda rows: rows.with_columns(pl.lit(1).alias("flooded")))
    says = ["'flooded' is 1 in every row", f"the {window} window", f"data.{window}"]
    home.refuses(SourceError, f"one class in {window}", says=says)
    mended(home, f"one class in {window}")


@pytest.mark.parametrize(
    ("window", "lost", "shown"),
    [
        ("train", range(1, 7), "2024-01-02 00:00 … 2024-01-08 00:00"),
        ("validation", (7, 8), "2024-01-08 00:00 … 2024-01-10 00:00"),
    ],
)
def test_an_empty_window(home, window, lost, shown):
    """A window without rows is named, with its days and the key that says how long it is."""
    home.write(data={"lookback": 11})
    for number in lost:
        home.file(number).unlink()
    home.refuses(SourceError, f"empty {window}", says=[f"the {window} window {shown} is empty", f"data.{window}"])
    mended(home, f"empty {window}")


def test_a_source_without_rows(home):
    """An as-of before all data names the window that was looked at."""
    before = datetime(2023, 6, 1, tzinfo=UTC)
    says = ["no rows in 2023-05-21 00:00 … 2023-06-01 00:00", "source", "--as-of"]
    home.refuses(SourceError, "too early", as_of=before, says=says)


def test_an_as_of_beyond_the_data_runs_on_what_there_is(home):
    """The windows end where the data ends, and the run says so."""
    ingested = home.perform("ahead", as_of=NEXT + timedelta(days=3), until="ingest")["ingest"]
    assert ingested.windows.holdout.end == ingested.data_until == NEXT - timedelta(days=1)
    assert "the data ends at 2024-01-13 00:00, before as-of 2024-01-17 00:00" in ingested.summary()


def test_data_older_than_max_staleness(home):
    """How old the data is and how old it may be are said; bringing newer data is enough."""
    late = NEXT + timedelta(days=6)
    says = ["ends at 2024-01-13", "7 days before as-of 2024-01-20", "data.max_staleness is 5 days", "fix:"]
    home.refuses(StaleDataError, "stale", as_of=late, says=says)
    for number in range(NEW, 18):
        home.write_day(number)
    assert home.perform("stale, mended", as_of=late, until="ingest")["ingest"].data_until == late - timedelta(days=1)


def test_an_as_of_far_beyond_the_data(home):
    """Although the source has nothing at all in the window, where the data ended when a run last looked is said."""
    far = NEXT + timedelta(days=120)
    home.perform("near", until="ingest")
    says = [
        "no rows in 2024-05-02 00:00 … 2024-05-13 00:00",
        "ends at 2024-01-13",
        "121 days",
        "data.max_staleness is 5",
    ]
    home.refuses(StaleDataError, "far", as_of=far, says=says)


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "text"])
def test_a_parquet_file_that_is_none(home, damage):
    """The file is named, and that it must be written again."""
    home.write_day(NEW)
    whole = home.file(NEW).read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "altered": whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :],
        "empty": b"",
        "text": b"no such object\n",
    }
    home.file(NEW).write_bytes(content[damage])
    home.refuses(SourceError, damage, as_of=NEXT, says=["012.parquet", "write the file again"])
    mended(home, damage)


def as_csv(home):
    """The source as CSV files with the same rows."""
    home.write(source={"kind": "csv", "path": "rows/*.csv"})
    for file in home.rows.glob("*.parquet"):
        pl.read_parquet(file).write_csv(file.with_suffix(".csv"), datetime_format="%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: text.rindex(",")], "011.csv"),
        (lambda text: text.replace("north", '"north', 1), "quote"),
        (lambda text: text.replace("north", "no\xff\xferth", 1), "UTF-8"),
    ],
    ids=["truncated", "unclosed", "bytes"],
)
def test_a_damaged_csv_file(home, damage, says):
    """The file is named, and what about it is wrong; whole again, it is read."""
    as_csv(home)
    file = home.file(11).with_suffix(".csv")
    whole = file.read_bytes()
    file.write_bytes(damage(whole.decode("latin-1")).encode("latin-1"))
    home.refuses(SourceError, f"csv {says}", says=["011.csv", says, "fix:"])
    file.write_bytes(whole)
    assert home.perform(f"csv {says}, mended", until="ingest")["ingest"].rows == 1100


def test_an_unknown_expectation(home):
    """The expectation and the file are named, and the nearest that Great Expectations knows."""
    home.write(expectations=[{"expect_column_values_to_not_be_nul": {"column": "wind"}}])
    says = ["pack.yaml", "'expect_column_values_to_not_be_nul'", "expect_column_values_to_not_be_null"]
    home.refuses(PackError, "unknown", says=says)
    home.write(expectations=[{"expect_column_values_to_not_be_null": {"column": "wind"}}])
    assert home.perform("known", until="validate")["validate"].expectations == 1


def test_rows_that_fail_expectations_past_the_tolerance(home):
    """The run stops before the snapshot: expectation, share, at most five examples; good rows are enough."""
    home.write(
        expectations=[{"expect_column_values_to_be_in_set": {"column": "station", "value_set": ["north", "south"]}}]
    )
    home.write_day(NEW, lambda rows: rows.with_columns(pl.lit("east").alias("station")))
    says = ["expect_column_values_to_be_in_set (station)", "100 rows of 1100 fail", "station = 'east'", "pack.yaml"]
    home.refuses(ValidationError, "failing", as_of=NEXT, says=says)
    home.write_day(NEW)
    assert home.perform("holding", as_of=NEXT, until="validate")["validate"].rows_quarantined == 0


def test_a_loss_that_is_no_number(home):
    """The step and the metric are named; the job's log stays."""
    home.write_model("loss=float(", "loss=float('nan') if step == 3 else float(")
    home.refuses(TrainingError, "nan", says=["NaN loss at step 3 of 40", "model.py", "learning rate"], left="train")
    mended(home, "nan")


def test_a_training_function_that_raises(home):
    """The line of the pack's own file is shown, and where the whole traceback is."""
    home.write_model("    weights = np.zeros(3)\n", "    weights = np.zeros(3) / data.tides\n")
    says = ["AttributeError", "'tides'", "model.py:", "weights = np.zeros(3) / data.tides", "log.txt"]
    home.refuses(TrainingError, "raises", says=says, left="train")
    mended(home, "raises")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("-x @ self.weights))", "-x @ self.weights))[1:]", "returned 299 predictions for 300 rows"),
        ("np.exp(-x @ self.weights))", "np.exp(-x @ self.weights)) * np.nan", "returned nan for row 0"),
    ],
    ids=["length", "nan"],
)
def test_predictions_that_are_not_what_was_asked_for(home, old, new, says):
    """How many came for how many rows, or which value for which row; the model is not registered."""
    home.write_model(old, new)
    home.refuses(EvaluationError, says, says=[says, "tide", "predict", "fix:"], left="score")
    mended(home, f"{says}")
