"""Validation: what is scanned, what is set aside, what stops the run. Real Great Expectations, a real store."""

import json
import os
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from itertools import count
from pathlib import Path

import polars as pl
import pytest
import yaml

from evergreen.data import partitions, validation
from evergreen.data.store import Store
from evergreen.errors import PackError, StageError, ValidationError
from evergreen.pack import Pack
from evergreen.run import Manifest, PartitionFile, Window
from evergreen.settings import Settings

START = datetime(2013, 1, 1, tzinfo=UTC)
YEAR = Window(start=START, end=START + timedelta(days=365))
NUMBERS = count()


@pytest.fixture
def store(tmp_path):
    return Store(Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home")}))


def pack(*expectations: tuple[str, dict], **data: object) -> Pack:
    return Pack.model_validate(
        {
            "name": "flights",
            "folder": Path("packs/flights"),
            "description": "d",
            "owner": "o",
            "source": {"kind": "csv", "path": "x.csv"},
            "data": {"target": "y", "event_time": "t", **data},
            "expectations": [{"type": kind, "arguments": arguments} for kind, arguments in expectations],
            "training": {"call": "model:train"},
            "gate": {"primary": {"metric": "roc_auc", "min": 0.5}},
        }
    )


def rows(*days: int, **columns: list) -> pl.DataFrame:
    """24 hourly rows a day: x counts the hours, s names half of them a and half b."""
    times = [START + timedelta(days=day, hours=hour) for day in days for hour in range(24)]
    frame = pl.DataFrame(
        {
            "t": times,
            "y": [n % 2 for n in range(len(times))],
            "x": [float(time.hour) for time in times],
            "s": ["ab"[time.hour % 2] for time in times],
        }
    )
    return frame.with_columns(**{name: pl.Series(values, strict=False) for name, values in columns.items()})


def manifest(store: Store, tmp_path: Path, frame: pl.DataFrame) -> Manifest:
    written = partitions.write(
        [frame],
        window=YEAR,
        partition="day",
        event_time="t",
        target="y",
        folder=tmp_path / f"partitions-{next(NUMBERS)}",
        origin="test",
    )
    parts = tuple(
        PartitionFile(period=file.period, rows=file.rows, identity=file.identity, object=store.put(file.path))
        for file in written.files
    )
    return Manifest(dataset="flights", partition="day", columns=written.columns, partitions=parts)


def validate(pack: Pack, frame: pl.DataFrame, store: Store, tmp_path: Path, known=None) -> validation.Outcome:
    work = tmp_path / f"work-{next(NUMBERS)}"
    work.mkdir()
    return validation.validate(pack, manifest(store, tmp_path, frame), store, known or {}, work)


def known(outcome: validation.Outcome, store: Store) -> dict[str, validation.Record]:
    return validation.records(store.read_json(outcome.validated.records))


def clean_rows(outcome: validation.Outcome, store: Store) -> pl.DataFrame:
    clean = Manifest.model_validate(store.read_json(outcome.validated.manifest))
    return partitions.load(store.path(part.object) for part in clean.partitions)


def results(outcome: validation.Outcome, store: Store) -> list[dict]:
    return store.read_json(outcome.validated.result)["results"]


NOT_NULL = ("expect_column_values_to_not_be_null", {"column": "x"})
POSITIVE = ("expect_column_values_to_be_between", {"column": "x", "min_value": 0})
UNIQUE = ("expect_column_values_to_be_unique", {"column": "t"})


def mostly_a(share: float) -> tuple[str, dict]:
    return ("expect_column_values_to_be_in_set", {"column": "s", "value_set": ["a"], "mostly": share})


# What is scanned.


def test_only_new_partitions_are_scanned(store, tmp_path):
    """A second run with one new day hands that day's rows only to the row-local expectations."""
    expected = pack(NOT_NULL, POSITIVE)
    first = validate(expected, rows(0, 1, 2), store, tmp_path)
    second = validate(expected, rows(0, 1, 2, 3), store, tmp_path, known(first, store))
    assert (first.rows_scanned, second.rows_scanned) == (72, 24)
    assert (second.validated.partitions_scanned, second.validated.partitions) == (1, 4)


def test_a_scan_of_the_rest_says_what_a_scan_of_all_says(store, tmp_path):
    """Counts, clean partitions and quarantine are the same, whether the days were seen at once or one after another."""
    bad = rows(0, 1, 2, x=[-1.0, None, *range(2, 72)])
    expected = pack(NOT_NULL, POSITIVE, mostly_a(0.4), quarantine=0.1)
    first = validate(expected, bad[:24], store, tmp_path)
    later = validate(expected, bad, store, tmp_path, known(first, store))
    at_once = validate(expected, bad, store, tmp_path)
    assert later.validated.manifest == at_once.validated.manifest
    assert later.validated.quarantine == at_once.validated.quarantine
    assert later.validated.records == at_once.validated.records

    def totals(outcome):
        return [
            {
                key: each["result"][key]
                for key in ("element_count", "missing_count", "unexpected_count", "unexpected_percent")
            }
            for each in results(outcome, store)
        ]

    assert totals(later) == totals(at_once)


def test_counts_are_great_expectations_own(store, tmp_path):
    """What is carried over equals what the library says of the whole window, conditions and missing values included."""
    import great_expectations.expectations as gxe

    frame = rows(0, 1, x=[None, -1.0, *range(2, 48)], z=[None, 5.0, None, 3.0, *[1.0] * 44])
    arguments = {
        "expect_column_values_to_be_between": {
            "column": "x",
            "min_value": 3,
            "row_condition": 's=="a"',
            "condition_parser": "pandas",
            "mostly": 0.1,
        },
        "expect_column_pair_values_a_to_be_greater_than_b": {
            "column_A": "x",
            "column_B": "z",
            "ignore_row_if": "either_value_is_missing",
            "mostly": 0.1,
        },
        "expect_select_column_values_to_be_unique_within_record": {
            "column_list": ["x", "z"],
            "ignore_row_if": "any_value_is_missing",
            "mostly": 0.1,
        },
        "expect_column_values_to_be_null": {"column": "z", "mostly": 0.01},
    }
    expected = pack(*arguments.items())
    first = validate(expected, frame[:24], store, tmp_path)
    ours = results(validate(expected, frame, store, tmp_path, known(first, store)), store)
    asset = validation._context().data_sources.add_pandas("p").add_dataframe_asset("a")
    batch = asset.add_batch_definition_whole_dataframe("b").get_batch({"dataframe": frame.to_pandas()})
    classes = [
        gxe.ExpectColumnValuesToBeBetween,
        gxe.ExpectColumnPairValuesAToBeGreaterThanB,
        gxe.ExpectSelectColumnValuesToBeUniqueWithinRecord,
        gxe.ExpectColumnValuesToBeNull,
    ]
    for mine, kind, given in zip(ours, classes, arguments.values(), strict=True):
        theirs = batch.validate(kind(**given)).to_json_dict()
        assert theirs["result"]["unexpected_count"] > 0
        for key in ("element_count", "unexpected_count", "unexpected_percent"):
            assert mine["result"][key] == pytest.approx(theirs["result"][key])
        assert mine["success"] == theirs["success"]


def test_nothing_new_is_no_import(store, tmp_path):
    """With every partition known and no expectation over the window, Great Expectations is not even imported."""
    found = manifest(store, tmp_path, rows(0, 1))
    expected = pack(NOT_NULL)
    (tmp_path / "work").mkdir()
    first = validation.validate(expected, found, store, {}, tmp_path / "work")
    files = {"pack": expected.model_dump(mode="json"), "manifest": found.model_dump(mode="json")}
    (tmp_path / "in.json").write_text(json.dumps({**files, "records": first.validated.records.model_dump()}))
    code = f"""
import json, sys
from pathlib import Path
from evergreen.data import validation
from evergreen.data.store import Store
from evergreen.pack import Pack
from evergreen.run import Manifest, Ref
from evergreen.settings import Settings
given = json.loads(Path({str(tmp_path / "in.json")!r}).read_text())
store = Store(Settings.from_env({{"EVERGREEN_HOME": {str(tmp_path / "home")!r}}}))
known = validation.records(store.read_json(Ref.model_validate(given["records"])))
pack = Pack.model_validate({{**given["pack"], "folder": "packs/flights"}})
outcome = validation.validate(pack, Manifest.model_validate(given["manifest"]), store, known, Path({str(tmp_path / "work")!r}))
bare = pack.model_copy(update={{"expectations": ()}})
without = validation.validate(bare, Manifest.model_validate(given["manifest"]), store, {{}}, Path({str(tmp_path / "work")!r}))
print(outcome.validated.success, outcome.rows_scanned, without.validated.success, "great_expectations" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0", "True", "False"]


def test_great_expectations_is_quiet(tmp_path):
    """Under a chatty root logger the library prints no line, draws no progress bar and leaves no folder behind."""
    code = """
import logging
logging.basicConfig(level=logging.DEBUG)
import polars as pl
from evergreen.data import validation
from evergreen.pack import Expectation
rule = validation._Rule(0, Expectation(type="expect_column_values_to_be_unique", arguments={"column": "x"}), None)
print(validation._Batch(pl.DataFrame({"x": [1, 2]}), {"x": "int"}).run([rule], "SUMMARY")[rule]["success"])
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "True\n"
    assert [line for line in done.stderr.splitlines() if "great_expectations" in line or "Calculating" in line] == []
    assert list(tmp_path.iterdir()) == []


def test_a_record_whose_objects_are_lost_is_not_trusted(store, tmp_path):
    """A partition with rows set aside is scanned again when its clean object has vanished."""
    expected = pack(POSITIVE, quarantine=0.1)
    bad = rows(0, x=[-1.0, *range(1, 24)])
    first = validate(expected, bad, store, tmp_path)
    (record,) = known(first, store).values()
    for root in (tmp_path / "home" / "cache", tmp_path / "home" / "remote"):
        (root / "files" / "md5" / record.clean.object.hash[:2] / record.clean.object.hash[2:]).unlink()
    second = validate(expected, bad, store, tmp_path, known(first, store))
    assert second.rows_scanned == 24
    assert clean_rows(second, store).height == 23


# Integers.

BIG = 2**53
"""From here on float64 rounds some whole numbers."""
IDS = [*(BIG + n for n in range(22)), None, None]
"""All different, two missing; as float64, half of them would be equal to a neighbour."""
JUDGED = {
    "unique": ("expect_column_values_to_be_unique", {}, 0),
    "bounds": ("expect_column_values_to_be_between", {"min_value": BIG + 2, "max_value": BIG + 20}, 3),
    "set": ("expect_column_values_to_be_in_set", {"value_set": [BIG + 1, BIG + 3]}, 20),
    "not in a set": ("expect_column_values_to_not_be_in_set", {"value_set": [BIG + 1]}, 1),
    "not null": ("expect_column_values_to_not_be_null", {}, 2),
    "lengths": ("expect_column_value_lengths_to_equal", {"value": 16}, 0),
    "regex": ("expect_column_values_to_match_regex", {"regex": "^[0-9]+$"}, 0),
    "increasing": ("expect_column_values_to_be_increasing", {"strictly": True}, 0),
    "pairs": ("expect_column_pair_values_a_to_be_greater_than_b", {"column_A": "id", "column_B": "before"}, 0),
    "row sums": ("expect_multicolumn_sum_to_equal", {"column_list": ["id", "back"], "sum_total": BIG}, 0),
}


@pytest.mark.parametrize("case", JUDGED)
def test_integers_are_judged_exactly_beside_missing_ones(case, store, tmp_path):
    """Whole numbers past 2**53 reach Great Expectations as they are, in rows where some are missing."""
    kind, arguments, unexpected = JUDGED[case]
    several = {"column_A", "column_list"} & set(arguments)
    rule = (kind, arguments | ({"ignore_row_if": IGNORED[kind]} if several else {"column": "id"}))
    back = [None if n is None else BIG - n for n in IDS]
    before = [None if n is None else n - 1 for n in IDS]
    outcome = validate(pack(rule, quarantine=1.0), rows(0, id=IDS, back=back, before=before), store, tmp_path)
    assert results(outcome, store)[0]["result"]["unexpected_count"] == unexpected


IGNORED = {
    "expect_column_pair_values_a_to_be_greater_than_b": "both_values_are_missing",
    "expect_multicolumn_sum_to_equal": "all_values_are_missing",
}


def test_a_row_with_one_integer_missing_is_compared_as_one_with_nan(store, tmp_path):
    """A pair of which one value is missing fails, as Great Expectations has it for numbers that are not whole."""
    rule = ("expect_column_pair_values_a_to_be_greater_than_b", {"column_A": "id", "column_B": "x"})
    outcome = validate(pack(rule, quarantine=1.0), rows(0, id=[None, *range(100, 122), None]), store, tmp_path)
    assert results(outcome, store)[0]["result"]["unexpected_count"] == 2


def test_a_bound_that_would_be_rounded_is_refused():
    """Great Expectations takes bounds as float64; the fix names the number that it would take."""
    bound = ("expect_column_values_to_be_between", {"column": "x", "min_value": BIG + 1})
    with pytest.raises(PackError, match=f"min_value: Great Expectations would round {BIG + 1} to {BIG}") as caught:
        validation.check(pack(bound))
    assert str(BIG) in caught.value.fix
    validation.check(pack(("expect_column_values_to_be_between", {"column": "x", "min_value": BIG})))


def test_sums_do_not_overflow(store, tmp_path):
    """A sum of whole numbers past 64 bits is that sum."""
    ids = [2**62] * 24
    rule = ("expect_column_sum_to_be_between", {"column": "id", "min_value": 24 * 2**62, "max_value": 24 * 2**62})
    outcome = validate(pack(rule), rows(0, id=ids), store, tmp_path)
    assert results(outcome, store)[0]["result"]["observed_value"] == 24 * 2**62


def test_the_type_of_integers_is_called_as_pandas_calls_it(store, tmp_path):
    """Packs say int64, and float64 where a value is missing."""
    rules = [("expect_column_values_to_be_of_type", {"column": name, "type_": kind}) for name, kind in TYPED]
    outcome = validate(pack(*rules), rows(0, id=IDS), store, tmp_path)
    assert [each["success"] for each in results(outcome, store)] == [True, True]


TYPED = [("id", "float64"), ("y", "int64")]


def test_quarantine_and_examples_show_integers_exactly(store, tmp_path):
    """The rows set aside and the failure's examples have the digits of the source."""
    rule = ("expect_column_values_to_be_between", {"column": "id", "max_value": BIG})
    outcome = validate(pack(rule, quarantine=0.01), rows(0, id=IDS), store, tmp_path)
    aside = pl.read_parquet(store.path(outcome.validated.quarantine))
    assert aside["id"].to_list() == IDS[1:22]
    assert f"id = {BIG + 1}" in str(outcome.error())


# What is set aside.


def test_failing_rows_go_to_quarantine_beside_a_clean_partition(store, tmp_path):
    """The rows that fail are in one object with the names of what they failed; the clean partition lacks them."""
    expected = pack(NOT_NULL, POSITIVE, quarantine=0.1)
    outcome = validate(expected, rows(0, 1, x=[None, -1.0, *range(2, 48)]), store, tmp_path)
    aside = pl.read_parquet(store.path(outcome.validated.quarantine))
    assert outcome.error() is None
    assert outcome.validated.rows_quarantined == 2
    assert aside.select("x", validation.FAILED).rows() == [
        (None, "expectations.0 expect_column_values_to_not_be_null (x)"),
        (-1.0, "expectations.1 expect_column_values_to_be_between (x)"),
    ]
    assert clean_rows(outcome, store)["x"].to_list() == list(range(2, 48))


def test_a_partition_without_failures_is_its_own_clean_one(store, tmp_path):
    """Nothing is written anew for a partition whose rows all pass."""
    frame = rows(0, 1, x=[-1.0, *range(1, 48)])
    outcome = validate(pack(POSITIVE, quarantine=0.1), frame, store, tmp_path)
    clean = Manifest.model_validate(store.read_json(outcome.validated.manifest))
    found = manifest(store, tmp_path, frame)
    assert clean.partitions[1] == found.partitions[1]
    assert clean.partitions[0].identity != found.partitions[0].identity


def test_a_row_that_fails_twice_is_set_aside_once(store, tmp_path):
    """It counts once, and names both."""
    low = ("expect_column_values_to_be_between", {"column": "x", "min_value": -0.5})
    outcome = validate(pack(POSITIVE, low, quarantine=0.1), rows(0, x=[-1.0, *range(1, 24)]), store, tmp_path)
    aside = pl.read_parquet(store.path(outcome.validated.quarantine))
    assert outcome.validated.rows_quarantined == aside.height == 1
    assert aside[validation.FAILED][0].split("; ") == [
        "expectations.0 expect_column_values_to_be_between (x)",
        "expectations.1 expect_column_values_to_be_between (x)",
    ]


def test_rows_that_mostly_allows_stay(store, tmp_path):
    """A row that fails an expectation with `mostly` is no bad row while the share holds."""
    outcome = validate(pack(mostly_a(0.5)), rows(0), store, tmp_path)
    assert (outcome.validated.success, outcome.validated.quarantine) == (True, None)
    assert clean_rows(outcome, store).height == 24


def test_nulls_are_ignored_by_all_but_not_null(store, tmp_path):
    """A missing value fails `not_be_null` alone, whatever its type."""
    gaps = {"b": [None, True] * 12, "i": [None, 3] * 12, "d": [None, date(2013, 1, 2)] * 12, "z": [None] * 24}
    frame = rows(0, **gaps, w=[None, START] * 12)
    expected = pack(
        ("expect_column_values_to_be_in_set", {"column": "b", "value_set": [True]}),
        ("expect_column_values_to_be_between", {"column": "i", "min_value": 3, "max_value": 3}),
        ("expect_column_values_to_be_between", {"column": "d", "min_value": date(2013, 1, 2)}),
        ("expect_column_values_to_be_between", {"column": "w", "max_value": "2013-01-01"}),
        ("expect_column_values_to_be_in_set", {"column": "z", "value_set": ["a"]}),
        ("expect_column_values_to_match_regex", {"column": "s", "regex": "^[ab]$"}),
    )
    outcome = validate(expected, frame, store, tmp_path)
    assert outcome.error() is None
    assert outcome.validated.rows_quarantined == 0
    assert [each["result"]["missing_count"] for each in results(outcome, store)] == [12, 12, 12, 12, 24, 0]


@pytest.mark.parametrize(
    ("column", "bound"),
    [("t", "2013-01-01T06:00:00"), ("t", datetime(2013, 1, 1, 6)), ("t", "2013-01-01T07:00:00+01:00"), ("x", 6)],  # noqa: DTZ001
)
def test_bounds_on_times_are_utc(column, bound, store, tmp_path):
    """A bound without an offset, quoted or as YAML reads it, means UTC, like everything else."""
    between = ("expect_column_values_to_be_between", {"column": column, "min_value": bound})
    outcome = validate(pack(between, quarantine=0.5), rows(0), store, tmp_path)
    assert outcome.validated.rows_quarantined == 6


@pytest.mark.parametrize("arguments", [{"min_value": "2013-01-02"}, {"value_set": ["2013-01-02"]}])
def test_dates_of_a_pack_are_compared_as_dates(arguments, store, tmp_path):
    """YAML gives a date as text; the column's type decides what it is compared as."""
    kind = "expect_column_values_to_be_between" if "min_value" in arguments else "expect_column_values_to_be_in_set"
    frame = rows(0, d=[date(2013, 1, 1)] * 6 + [date(2013, 1, 2)] * 18)
    outcome = validate(pack((kind, {"column": "d", **arguments}), quarantine=0.5), frame, store, tmp_path)
    assert outcome.validated.rows_quarantined == 6


def test_a_set_of_times_is_compared_as_times(store, tmp_path):
    """The same for times: those without an offset are UTC."""
    among = ("expect_column_values_to_not_be_in_set", {"column": "t", "value_set": ["2013-01-01T05:00:00"]})
    outcome = validate(pack(among, quarantine=0.5), rows(0), store, tmp_path)
    assert outcome.validated.rows_quarantined == 1


def test_rows_neither_clean_nor_in_quarantine_stop_the_run(store, tmp_path):
    """A record that accounts for fewer rows than its partition has is a fault of ours, not a smaller dataset."""
    expected = pack(POSITIVE, quarantine=0.5)
    first = validate(expected, rows(0, x=[-1.0, *range(1, 24)]), store, tmp_path)
    ((identity, record),) = known(first, store).items()
    assert (record.clean.rows, record.quarantined) == (23, 1)
    lost = {identity: record.model_copy(update={"quarantined": 0})}
    with pytest.raises(StageError, match="rows clean and in quarantine: 23 rows of 24 rows arrived"):
        validate(expected, rows(0, x=[-1.0, *range(1, 24)]), store, tmp_path, lost)


# What stops the run.


def test_mostly_is_judged_over_the_window(store, tmp_path):
    """A day that misses `mostly` by far does not matter while the window meets it; a day alone would fail."""
    frame = rows(0, 1, 2, s=["b"] * 24 + ["a"] * 48)
    expected = pack(mostly_a(0.6))
    window = validate(expected, frame, store, tmp_path)
    day = validate(expected, frame[:24], store, tmp_path)
    assert (window.validated.success, day.validated.success) == (True, False)


def test_days_that_each_meet_mostly_with_old_counts_can_miss_it(store, tmp_path):
    """The counts of a known day count: a new day that is fine by itself does not save the window."""
    expected = pack(mostly_a(0.6))
    first = validate(expected, rows(0, s=["b"] * 24), store, tmp_path)
    second = validate(expected, rows(0, 1, s=["b"] * 24 + ["a"] * 24), store, tmp_path, known(first, store))
    aside = pl.read_parquet(store.path(second.validated.quarantine))
    assert second.rows_scanned == 24
    assert "holds for 50 % of 48 rows in the window" in str(second.error())
    assert (aside.height, set(aside["s"])) == (24, {"b"})


def test_past_the_tolerance_the_error_has_five_rows(store, tmp_path):
    """Too many rows to set aside: what failed, five of the rows, the object with all, and the fix."""
    outcome = validate(pack(POSITIVE), rows(0, 1, x=[-1.0] * 7 + [1.0] * 41), store, tmp_path)
    error = outcome.error()
    assert isinstance(error, ValidationError)
    assert str(error).count("x = -1") == 5
    assert "pack flights: 1 expectation failed; the champion stays" in str(error)
    assert "expectations.0 expect_column_values_to_be_between (x): 7 rows of 48 fail; asked: min_value 0" in str(error)
    assert "7 rows, 14.6 % of the window, would be set aside, and data.quarantine allows 2 %" in str(error)
    assert "t 2013-01-01 00:00:00, x = -1" in str(error)
    assert outcome.validated.quarantine.hash in str(error)
    assert "packs/flights/pack.yaml" in error.fix
    assert not outcome.validated.success


def test_the_tolerance_is_a_share_of_the_window(store, tmp_path):
    """Just as many bad rows as `data.quarantine` allows go by."""
    frame = rows(0, 1, x=[-1.0] * 12 + [1.0] * 36)
    outcomes = [validate(pack(POSITIVE, quarantine=share), frame, store, tmp_path) for share in (0.25, 0.24)]
    assert [outcome.validated.success for outcome in outcomes] == [True, False]


def test_expectations_that_compare_rows_see_the_window(store, tmp_path):
    """A key that is unique within each day and not over the window is found, although all days are known."""
    expected = pack(NOT_NULL, ("expect_column_values_to_be_unique", {"column": "x"}))
    first = validate(expected, rows(0), store, tmp_path)
    second = validate(expected, rows(0, 1), store, tmp_path, known(first, store))
    assert first.error() is None
    assert "expectations.1 expect_column_values_to_be_unique (x): 48 rows of 48 fail" in str(second.error())


def test_the_window_is_seen_without_the_rows_set_aside(store, tmp_path):
    """An aggregate does not fail for a row that is in quarantine."""
    largest = ("expect_column_max_to_be_between", {"column": "x", "max_value": 47})
    below = ("expect_column_values_to_be_between", {"column": "x", "max_value": 100})
    outcome = validate(pack(below, largest, quarantine=0.1), rows(0, 1, x=[1e9, *range(1, 48)]), store, tmp_path)
    assert outcome.error() is None


def test_a_failed_aggregate_says_what_it_saw(store, tmp_path):
    """The observed value beside what was asked for."""
    outcome = validate(
        pack(("expect_column_mean_to_be_between", {"column": "x", "min_value": 50})), rows(0), store, tmp_path
    )
    assert "expect_column_mean_to_be_between (x): observed 11.5; asked: min_value 50" in str(outcome.error())


@pytest.mark.parametrize(
    "arguments",
    [
        {"row_condition": "x > x.mean()", "condition_parser": "pandas"},
        {"row_condition": "@pd.io.common.os.system('touch {marker}') == 0", "condition_parser": "pandas"},
        {"row_condition": {"type": "pass_through", "pass_through_filter": "@pd.io.common.os.system('touch {marker}')"}},
        {"mostly": {"$PARAMETER": "now()"}},
        {"json_schema": {"properties": [{"$ref": "http://127.0.0.1:9/schema.json"}]}},
    ],
    ids=str,
)
def test_an_argument_that_would_be_run_or_fetched_is_refused(arguments, store, tmp_path):
    """The pack is refused by `evergreen check` and by the stage alike, and nothing of the argument is executed."""
    marker = tmp_path / "marker"
    arguments = yaml.safe_load(yaml.safe_dump(arguments).replace("{marker}", str(marker)))
    expected = pack(("expect_column_values_to_be_in_set", {"column": "s", "value_set": ["a"], **arguments}))
    for act in (lambda: validation.check(expected), lambda: validate(expected, rows(0), store, tmp_path)):
        with pytest.raises(PackError, match=r"pack\.yaml: expectations\.0 .* \(s\)"):
            act()
    assert not marker.exists()


def test_rows_outside_of_a_condition_are_not_judged(store, tmp_path):
    """Only the row that the condition chooses and that fails goes to quarantine, at its own place."""
    arguments = {"column": "x", "max_value": 20, "row_condition": "s == 'b'"}
    expected = pack(("expect_column_values_to_be_between", arguments), quarantine=1)
    frame = rows(0, 1)
    outcome = validate(expected, frame, store, tmp_path)
    bad = frame.filter((pl.col("s") == "b") & (pl.col("x") > 20))
    assert 0 < outcome.validated.rows_quarantined == bad.height < frame.height
    aside = pl.read_parquet(store.path(outcome.validated.quarantine))
    assert aside["x"].to_list() == bad["x"].to_list()
    assert results(outcome, store)[0]["expectation_config"]["kwargs"]["row_condition"] == "s == 'b'"


def test_an_expectation_that_cannot_be_evaluated_is_no_pass(store, tmp_path):
    """A bound of the wrong type is an error that names the expectation, not a row's failure and not a success."""
    with pytest.raises(ValidationError, match=r"expectations\.0 .* \(s\) cannot be evaluated"):
        validate(
            pack(("expect_column_values_to_be_between", {"column": "s", "min_value": 1})), rows(0), store, tmp_path
        )


def test_two_expectations_on_one_column_are_two(store, tmp_path):
    """The same type on the same column with other arguments, or even the same, is another expectation."""
    outcome = validate(pack(mostly_a(0.5), mostly_a(0.4), mostly_a(0.4), quarantine=0.1), rows(0), store, tmp_path)
    asked = [each["expectation_config"]["kwargs"]["mostly"] for each in results(outcome, store)]
    assert asked == [0.5, 0.4, 0.4]


# What is wrong with the pack.


def test_an_unknown_expectation_is_refused_with_the_nearest(tmp_path):
    """File, place and the type that was meant."""
    with pytest.raises(PackError) as caught:
        validation.check(pack(NOT_NULL, ("expect_column_values_to_be_betwen", {"column": "x"})))
    assert "packs/flights/pack.yaml: expectations.1: 'expect_column_values_to_be_betwen'" in caught.value.what
    assert caught.value.fix == "did you mean 'expect_column_values_to_be_between'?"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"column": "x", "min_valu": 1}, "min_valu: extra fields not permitted"),
        ({"column": "x"}, "min_value and max_value cannot both be None"),
        ({"min_value": 1}, "column: field required"),
        ({"column": "x", "min_value": 1, "mostly": 2}, "mostly: ensure this value is less than or equal to 1"),
    ],
)
def test_arguments_that_great_expectations_refuses_are_refused(arguments, what):
    """The argument and the library's own word on it, before any data is read."""
    with pytest.raises(PackError) as caught:
        validation.check(pack(("expect_column_values_to_be_between", arguments)))
    assert what in caught.value.what


def test_a_column_that_the_dataset_lacks_is_refused(store, tmp_path):
    """A renamed column is found before anything is scanned, with its new name."""
    with pytest.raises(PackError, match="the dataset has no column 'x'") as caught:
        validate(pack(NOT_NULL), rows(0).rename({"x": "xx"}), store, tmp_path)
    assert caught.value.fix == "did you mean 'xx'?"


def test_every_row_local_type_exists():
    """The explicit list names types that Great Expectations has, and none that compares rows."""
    validation._great_expectations()
    from great_expectations.expectations.registry import list_registered_expectation_implementations

    assert set(list_registered_expectation_implementations()) >= validation.ROW_LOCAL
    assert not [kind for kind in validation.ROW_LOCAL if kind.endswith(("be_unique", "increasing", "decreasing"))]


def test_the_suite_hash_knows_arguments_and_order():
    """Another bound or another order is another suite; the same words are the same one, dates included."""

    def of(*expectations):
        return validation.suite_hash(pack(*expectations).expectations)

    since = ("expect_column_values_to_be_between", {"column": "d", "min_value": date(2013, 1, 1)})
    assert of(NOT_NULL, since) == of(NOT_NULL, since)
    assert len({of(NOT_NULL, since), of(since, NOT_NULL), of(NOT_NULL, POSITIVE), of()}) == 4


# What is left behind.


def test_the_result_is_great_expectations_own(store, tmp_path):
    """The stored JSON loads as the library's validation result, in the order of the pack, our words under meta."""
    outcome = validate(pack(UNIQUE, POSITIVE, quarantine=0.1), rows(0, x=[-1.0, *range(1, 24)]), store, tmp_path)
    result = store.read_json(outcome.validated.result)
    assert [each["expectation_config"]["type"] for each in result["results"]] == [UNIQUE[0], POSITIVE[0]]
    assert (result["success"], result["statistics"]["successful_expectations"]) == (False, 1)
    assert result["meta"]["evergreen"]["success"] is True
    assert result["meta"]["evergreen"]["rows_quarantined"] == 1
    assert result["results"][1]["result"]["partial_unexpected_list"] == [-1.0]


def test_all_objects_are_pushed(store, tmp_path):
    """Any machine can go on from the outcome: what it refers to is in the remote."""
    outcome = validate(pack(POSITIVE, quarantine=0.1), rows(0, x=[-1.0, *range(1, 24)]), store, tmp_path)
    elsewhere = Store(
        Settings.from_env({"EVERGREEN_HOME": str(tmp_path / "home"), "EVERGREEN_CACHE": str(tmp_path / "other")})
    )
    found = outcome.validated
    (clean,) = Manifest.model_validate(elsewhere.read_json(found.manifest)).partitions
    assert elsewhere.path(clean.object).is_file()
    assert elsewhere.path(found.quarantine).is_file()
    assert elsewhere.read_json(found.records)
    assert elsewhere.read_json(found.result)


def test_data_docs_show_the_stored_result(store, tmp_path):
    """Data Docs are built from the stored JSON alone, by the library's own renderers."""
    expected = pack(POSITIVE, UNIQUE, quarantine=0.1)
    outcome = validate(expected, rows(0, x=[-1.0, *range(1, 24)]), store, tmp_path)
    index = validation.docs(expected, store.read_json(outcome.validated.result), tmp_path / "docs")
    (page,) = (tmp_path / "docs" / "validations").rglob("*.html")
    assert "flights" in index.read_text()
    assert "values must be unique" in page.read_text()
