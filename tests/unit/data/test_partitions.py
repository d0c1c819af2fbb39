"""Partitions: what makes their identity, and what is refused."""

import hashlib
import math
import struct
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evergreen.data import partitions
from evergreen.errors import SourceError, StageError
from evergreen.run import Manifest, PartitionFile, Ref, Window

START = datetime(2013, 1, 1, tzinfo=UTC)
WEEK = Window(start=START, end=START + timedelta(days=7))


def day(n: int) -> datetime:
    return START + timedelta(days=n)


def write(frames, folder: Path, window: Window = WEEK, partition="day") -> partitions.Written:
    return partitions.write(
        frames, window=window, partition=partition, event_time="t", target="y", folder=folder, origin="source x"
    )


def sample(rows: int = 50) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "y": [n % 2 for n in range(rows)],
            "t": [START + timedelta(hours=3 * n) for n in range(rows)],
            "name": ["ab"[n % 2] if n % 5 else None for n in range(rows)],
            "when": [date(2013, 1, 1 + n % 28) for n in range(rows)],
        }
    )


def contents(written: partitions.Written) -> list[tuple[datetime, int, str, bytes]]:
    return [(file.period, file.rows, file.identity, file.path.read_bytes()) for file in written.files]


ROW = st.fixed_dictionaries(
    {
        "t": st.datetimes(datetime(2013, 1, 1), datetime(2013, 1, 3, 23)),  # noqa: DTZ001 naive, that is UTC
        "y": st.integers(-(2**63), 2**63 - 1) | st.none(),
        "x": st.floats(allow_nan=True) | st.none() | st.sampled_from([0.0, -0.0]),
        "s": st.text(max_size=4) | st.none(),
        "b": st.booleans() | st.none(),
        "d": st.dates() | st.none(),
        "never": st.none(),
    }
)
SCHEMA = {
    "t": pl.Datetime("us"),
    "y": pl.Int64,
    "x": pl.Float64,
    "s": pl.String,
    "b": pl.Boolean,
    "d": pl.Date,
    "never": pl.Float64,
}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.lists(ROW, min_size=1, max_size=12))
def test_identity_and_bytes_know_no_order_and_no_chunks(data, rows, tmp_path_factory):
    """The same rows in any order and any chunking give the same identity and the same bytes."""
    folder = tmp_path_factory.mktemp("partitions")
    whole = pl.DataFrame(rows, schema=SCHEMA)
    shuffled = pl.DataFrame(data.draw(st.permutations(rows)), schema=SCHEMA)
    shuffled = shuffled.select(data.draw(st.permutations(shuffled.columns)))
    cut = data.draw(st.integers(0, len(rows)))
    chunks = [shuffled[:cut], shuffled[cut:].with_columns(pl.col("s").cast(pl.Categorical))]
    assert contents(write([whole], folder / "a")) == contents(write(chunks, folder / "b"))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), rows=st.lists(ROW, min_size=1, max_size=6))
def test_identity_tells_any_change(data, rows, tmp_path_factory):
    """A row more in a period changes that period's identity, and no other's."""
    folder = tmp_path_factory.mktemp("partitions")
    more = [*rows, data.draw(ROW)]
    before = {file.period: file.identity for file in write([pl.DataFrame(rows, schema=SCHEMA)], folder / "a").files}
    after = {file.period: file.identity for file in write([pl.DataFrame(more, schema=SCHEMA)], folder / "b").files}
    touched = more[-1]["t"].replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
    assert {period for period in after if after[period] != before.get(period)} == {touched}


def test_identity_is_the_documented_byte_form(tmp_path):
    """Anyone can compute an identity from the values alone, without the libraries that wrote the file."""
    frame = pl.DataFrame(
        {"y": [1, None], "t": [START, START + timedelta(hours=1)], "s": ["é", None], "n": [None, None]}
    )
    columns = [
        (b"t", b"datetime", b"\x03" + struct.pack("<qq", 1356998400_000_000, 1357002000_000_000)),
        (b"n", b"null", b""),
        (b"s", b"string", b"\x01" + struct.pack("<qq", 2, 0) + "é".encode()),
        (b"y", b"int", b"\x01" + struct.pack("<qq", 1, 0)),
    ]
    expected = hashlib.sha256(struct.pack("<QI", 2, 4))
    for name, kind, values in columns:
        expected.update(struct.pack("<I", len(name)) + name + struct.pack("<I", len(kind)) + kind + values)
    assert write([frame], tmp_path).files[0].identity == expected.hexdigest()


def test_identity_is_pinned(tmp_path):
    """The identity of known rows is what it was when this was written: partitions stay known over upgrades."""
    identities = [file.identity for file in write([sample()], tmp_path).files]
    assert hashlib.sha256("".join(identities).encode()).hexdigest()[:16] == "4b86cfb0d4ca5809"


def test_identity_is_in_the_files_metadata(tmp_path):
    """A partition's Parquet file says its identity itself."""
    file = write([sample()], tmp_path).files[0]
    assert pl.read_parquet_metadata(file.path)[partitions.IDENTITY_KEY] == file.identity


def test_spilling_changes_nothing(tmp_path, monkeypatch):
    """Past the memory budget rows go over disk, and the partitions are the same, byte for byte."""
    in_memory = contents(write([sample()], tmp_path / "a"))
    monkeypatch.setattr(partitions, "BUDGET_BYTES", 500)
    spilled = write(sample().sample(fraction=1, shuffle=True, seed=1).iter_slices(7), tmp_path / "b")
    assert contents(spilled) == in_memory
    assert not (tmp_path / "b" / "spill").exists()


def test_pandas_polars_and_arrow_frames_are_one(tmp_path):
    """The library that a frame comes from leaves no trace, dates apart, which pandas has none of."""
    frame = sample().drop("when")
    of = [write([each], tmp_path / str(n)) for n, each in enumerate((frame, frame.to_pandas(), frame.to_arrow()))]
    assert contents(of[0]) == contents(of[1]) == contents(of[2])


def test_rows_are_in_order_of_time_and_columns_in_theirs(tmp_path):
    """Event time comes first, then the columns by name; rows come in order of time."""
    frame = pl.read_parquet(write([sample()[::-1]], tmp_path).files[0].path)
    assert frame.columns == ["t", "name", "when", "y"]
    assert frame["t"].is_sorted()


def test_types_are_canonical(tmp_path):
    """Every width of a type becomes one; naive times are UTC, others are turned to it."""
    zoned = pl.Series([START]).dt.convert_time_zone("America/New_York")
    frame = pl.DataFrame(
        {
            "t": pl.Series([datetime(2013, 1, 1, 5)], dtype=pl.Datetime("ns")),  # noqa: DTZ001 naive, that is UTC
            "y": pl.Series([True]),
            "small": pl.Series([1], dtype=pl.UInt8),
            "single": pl.Series([0.5], dtype=pl.Float32),
            "kind": pl.Series(["a"], dtype=pl.Categorical),
            "price": pl.Series(["1.5"]).cast(pl.Decimal(10, 2)),
            "zoned": zoned,
            "on": pl.Series([date(2013, 1, 1)]),
        }
    )
    written = write([frame], tmp_path)
    assert written.columns == {
        "t": "datetime",
        "kind": "string",
        "on": "date",
        "price": "float",
        "single": "float",
        "small": "int",
        "y": "bool",
        "zoned": "datetime",
    }
    row = pl.read_parquet(written.files[0].path).row(0, named=True)
    assert (row["t"], row["zoned"]) == (datetime(2013, 1, 1, 5, tzinfo=UTC), START)


def test_an_empty_column_takes_the_type_found_elsewhere(tmp_path):
    """A column without values in one period is read with the type it has in another."""
    frame = pl.DataFrame({"t": [day(0), day(1)], "y": [1, 0], "note": [None, "late"]})
    written = write([frame], tmp_path)
    together = partitions.load(file.path for file in written.files)
    assert (written.columns["note"], together["note"].to_list()) == ("string", [None, "late"])


def test_whole_numbers_and_fractions_make_a_float(tmp_path):
    """Whole numbers in one period and fractions in another are floats when read together; each period keeps its own."""
    frames = [pl.DataFrame({"t": [day(0)], "y": [1]}), pl.DataFrame({"t": [day(1)], "y": [0.5]})]
    written = write(frames, tmp_path)
    assert written.columns["y"] == "float"
    assert written.files[0].identity == write(frames[:1], tmp_path / "alone").files[0].identity
    assert partitions.load(file.path for file in written.files)["y"].to_list() == [1.0, 0.5]


BIG = 2**53 + 1
"""As float64, this is 2**53."""
MEETINGS = {
    "in two periods": [{"t": day(0), "y": BIG}, {"t": day(1), "y": 0.5}],
    "the float first": [{"t": day(0), "y": 0.5}, {"t": day(1), "y": BIG}],
    "in one period": [{"t": day(0), "y": BIG}, {"t": day(0), "y": 0.5}],
    "negative": [{"t": day(0), "y": 0.5}, {"t": day(1), "y": -BIG}],
    "the largest": [{"t": day(0), "y": 0.5}, {"t": day(1), "y": 2**63 - 1}],
}


@pytest.mark.parametrize("case", MEETINGS)
def test_a_float_that_would_round_whole_numbers_is_refused(case, tmp_path):
    """Whole numbers that float64 cannot hold, and fractions: the message names the period, the column and the value."""
    numbers = [pl.DataFrame([row]) for row in MEETINGS[case]]
    with pytest.raises(SourceError) as caught:
        write(numbers, tmp_path)
    number = next(row for row in MEETINGS[case] if isinstance(row["y"], int))
    assert f"{number['t']:%Y-%m-%d}" in caught.value.what
    assert f"column 'y' has the whole number {number['y']}" in caught.value.what
    assert "--force" in caught.value.fix


def test_whole_numbers_that_float64_holds_may_meet_floats(tmp_path):
    """Past 2**53 every second whole number is exact as a float, and nothing is lost."""
    frames = [pl.DataFrame({"t": [day(0)], "y": [2**53 + 2]}), pl.DataFrame({"t": [day(1)], "y": [0.5]})]
    written = write(frames, tmp_path)
    assert partitions.load(file.path for file in written.files)["y"].to_list() == [2.0**53 + 2, 0.5]


def test_partitions_are_not_put_together_where_that_rounds(tmp_path):
    """Partitions of a home whose rows were rounded by an earlier version are not either."""
    whole = write([pl.DataFrame({"t": [day(0)], "y": [BIG]})], tmp_path / "a")
    fraction = write([pl.DataFrame({"t": [day(1)], "y": [0.5]})], tmp_path / "b")
    with pytest.raises(SourceError, match=rf"the partition of 2013-01-01 00:00: column 'y' has the whole number {BIG}"):
        partitions.load(file.path for file in (*whole.files, *fraction.files))


def test_a_decimal_whose_whole_part_would_be_rounded_is_refused(tmp_path):
    """Decimals become floats; an id kept as one would become another id."""
    cents = pl.Series(["9007199254740992.25", "0.1"]).cast(pl.Decimal(38, 2))
    exact = pl.DataFrame({"t": [day(0), day(1)], "y": [0, 1], "price": cents})
    assert write([exact], tmp_path / "exact").columns["price"] == "float"
    ids = exact.with_columns(price=pl.Series([str(BIG), "1"]).cast(pl.Decimal(20, 0)))
    with pytest.raises(SourceError, match=f"column 'price' has the decimal {BIG}") as caught:
        write([ids], tmp_path / "ids")
    assert "text" in caught.value.fix


def test_whole_numbers_that_pandas_has_rounded_are_refused(tmp_path):
    """A pandas column of integers with a missing value is float64; the fixes keep it whole, or say that it is a float."""
    frame = pd.DataFrame({"t": [day(0)] * 3, "y": [0, 1, 0], "id": [BIG, None, 7]})
    with pytest.raises(SourceError, match=f"column 'id' holds whole numbers as floats, {2**53} for one") as caught:
        write([frame], tmp_path / "a")
    assert "frame.astype({'id': 'Float64'})" in caught.value.fix
    whole = frame.assign(id=pd.array([BIG, None, 7], dtype="Int64"))
    kept = pl.read_parquet(write([whole], tmp_path / "b").files[0].path)
    assert sorted(kept["id"].drop_nulls()) == [7, BIG]
    assert write([frame.astype({"id": "Float64"})], tmp_path / "c").columns["id"] == "float"


@pytest.mark.parametrize("values", [[1e300, None, 0.5], [2.0**60, 3.0], [7.0, None, 8.0], [math.inf, None, 1.0]])
def test_floats_of_pandas_are_kept(values, tmp_path):
    """A measurement has fractions, or no value is missing, or all are small."""
    frame = pd.DataFrame({"t": [day(0)] * len(values), "y": [0] * len(values), "x": values})
    assert write([frame], tmp_path).columns["x"] == "float"


def test_no_rows_are_no_partitions(tmp_path):
    """A source with nothing in the window gives nothing, and no error."""
    assert write([sample()[:0]], tmp_path) == partitions.Written(files=(), columns={})


@pytest.mark.parametrize(
    ("partition", "names"),
    [
        ("hour", ["2013-01-06T23", "2013-01-07T00"]),
        ("day", ["2013-01-06", "2013-01-07"]),
        ("week", ["2013-W01", "2013-W02"]),
        ("month", ["2013-01"]),
    ],
)
def test_periods(partition, names, tmp_path):
    """Hours, days, weeks from Monday on, months."""
    times = [datetime(2013, 1, 6, 23, 59, tzinfo=UTC), datetime(2013, 1, 7, tzinfo=UTC)]
    window = Window(start=START, end=day(31))
    written = write([pl.DataFrame({"t": times, "y": [0, 1]})], tmp_path, window, partition)
    assert [file.path.stem for file in written.files] == names


REFUSED = {
    "no event time": ([{"time": START, "y": 1}], "has no column 't'", "known: time, y"),
    "misspelt target": ([{"t": START, "yy": 1}], "has no column 'y'", "did you mean 'yy'?"),
    "renamed column": (
        [{"t": START, "y": 1, "carrier": "UA"}, {"t": START, "y": 1, "carriers": "UA"}],
        "frame 2 has no column 'carrier', which was there before and has a column 'carriers'",
        "did you mean 'carriers'?",
    ),
    "missing column": ([{"t": START, "y": 1, "x": 1}, {"t": START, "y": 1}], "no column 'x'", "same columns"),
    "null time": ([{"t": START, "y": 1}, {"t": None, "y": 1}], "'t' is null in 1 row", "leave those rows out"),
    "no time": ([{"t": 20130101, "y": 1}], "holds Int64 and no time in 1 row, 20130101", "timestamp"),
    "text": ([{"t": "soon", "y": 1}], "holds no time in 1 row, 'soon'", "ISO 8601"),
    "beyond as-of": ([{"t": day(7), "y": 1}], "1 row outside the window 2013-01-01 00:00 … 2013-01-08 00:00", "as-of"),
    "nested": ([{"t": START, "y": 1, "tags": ["a"]}], "'tags' holds List(String)", "one column per element"),
    "bytes": ([{"t": START, "y": 1, "raw": b"a"}], "'raw' holds Binary", "decode"),
    "another type": ([{"t": day(0), "y": 1}, {"t": day(1), "y": "yes"}], "'y' is string, and int before", "one type"),
    "another type that day": ([{"t": START, "y": 1}, {"t": START, "y": "yes"}], "'y' is string, and int before", "one"),
    "too large": ([{"t": START, "y": 2**64 - 1}], "64 bits", "float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    """What cannot be the dataset is refused, with the place, the value and the fix."""
    rows, what, fix = REFUSED[case]
    frames = [
        pl.DataFrame([row], schema={"t": pl.Datetime, "y": pl.Int64} if row.get("t", 0) is None else None)
        for row in rows
    ]
    with pytest.raises(SourceError) as caught:
        write(frames, tmp_path)
    assert "source x" in caught.value.what
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_mixed_pandas_column_is_refused(tmp_path):
    """A pandas column of numbers and text has no type to keep."""
    frame = pd.DataFrame({"t": [START, START], "y": [1, "one"]})
    with pytest.raises(SourceError, match="frame 1 cannot be read as a table"):
        write([frame], tmp_path)


def test_something_that_is_no_frame_is_refused(tmp_path):
    """A function that returns dicts is told what to return."""
    with pytest.raises(SourceError, match="frame 1 is a dict"):
        write([{"t": [START], "y": [1]}], tmp_path)


def test_a_record_batch_is_a_frame(tmp_path):
    """A pyarrow RecordBatch will do."""
    batch = pa.RecordBatch.from_pylist([{"t": START, "y": 1}])
    assert write([batch], tmp_path).files[0].rows == 1


# Merging what was read with what was known.


def manifest(*days: int, identity: str = "i", columns: dict[str, str] | None = None) -> Manifest:
    parts = tuple(part(n, f"{identity}{n}") for n in days)
    return Manifest(
        dataset="flights",
        partition="day",
        columns=columns or {"t": "datetime", "y": "int"},
        partitions=parts,
        covered=Window(start=day(min(days)), end=day(max(days) + 1)),
    )


def part(n: int, identity: str, content: str = "old") -> PartitionFile:
    return PartitionFile(period=day(n), rows=1, identity=identity, object=Ref(hash=f"{content}{n}", size=1))


def merge(known, written, read, window=WEEK, columns=None):
    columns = {"t": "datetime", "y": "int"} if columns is None else columns
    return partitions.merge(known, written, columns, read, window, dataset="flights", partition="day")


def test_all_of_the_window_is_read_at_first():
    """Nothing known: one look at the whole window."""
    assert partitions.to_read(None, WEEK, "day", 2) == [WEEK]


def test_the_new_day_and_the_lookback_are_read_in_one_go():
    """The newest known periods and what comes after them make one window."""
    found = partitions.to_read(manifest(0, 1, 2, 3, 4, 5), WEEK, "day", 2)
    assert found == [Window(start=day(4), end=day(7))]


def test_a_period_known_to_be_empty_is_not_read_again():
    """A weekend without rows was looked at: it costs no second look, and no window of its own."""
    found = partitions.to_read(manifest(0, 1, 4), WEEK, "day", 0)
    assert found == [Window(start=day(5), end=day(7))]


def test_what_lies_before_the_known_periods_is_read():
    """A window that reaches further back than the last look reads the days before it, and the new ones."""
    found = partitions.to_read(manifest(2, 3, 4), WEEK, "day", 0)
    assert found == [Window(start=day(0), end=day(2)), Window(start=day(5), end=day(7))]


def test_periods_after_the_last_row_are_not_covered():
    """A feed that is late by days is found when it comes: only what lies before a row counts as looked at."""
    merged, _, _ = merge(None, [part(0, "i0"), part(3, "i3")], [WEEK])
    assert merged.covered == Window(start=day(0), end=day(4))


def test_a_known_period_outside_the_window_is_no_lookback():
    """Lookback counts periods of the window, so a backfill reads nothing after its as-of."""
    found = partitions.to_read(manifest(0, 1, 2, 8, 9), Window(start=day(0), end=day(3)), "day", 1)
    assert found == [Window(start=day(2), end=day(3))]


def test_a_window_that_cuts_a_period_is_read_within_its_bounds():
    """Never a row before the window's start or after its end."""
    window = Window(start=day(0) + timedelta(hours=5), end=day(1) + timedelta(hours=7))
    assert partitions.to_read(None, window, "day", 0) == [window]


def test_an_unchanged_partition_keeps_its_known_object():
    """The same identity read again is the same partition: its known entry stays, and it is not late."""
    merged, late, unchanged = merge(manifest(0, 1), [part(1, "i1", "new")], [Window(start=day(1), end=day(2))])
    assert (merged.partitions, late, unchanged) == ((part(0, "i0"), part(1, "i1")), (), 2)


def test_late_rows_make_a_new_partition():
    """Another identity for a known period: the new one takes its place, and the period is named."""
    merged, late, unchanged = merge(manifest(0, 1), [part(1, "j1", "new")], [Window(start=day(1), end=day(2))])
    assert (merged.partitions[1], late, unchanged) == (part(1, "j1", "new"), (day(1),), 1)


def test_a_period_that_vanished_is_dropped_and_named():
    """Read again and empty now: gone from the manifest, and among the changed."""
    merged, late, _ = merge(manifest(0, 1), [], [Window(start=day(1), end=day(2))], columns={})
    assert ([each.period for each in merged.partitions], late) == ([day(0)], (day(1),))


def test_partitions_outside_the_window_are_left_behind():
    """The manifest covers the window, no more."""
    merged, late, _ = merge(manifest(0, 1, 2), [part(3, "i3")], [WEEK], Window(start=day(1), end=day(4)))
    assert [each.period for each in merged.partitions] == [day(3)]
    assert late == (day(1), day(2))


def test_a_column_renamed_between_partitions_is_refused():
    """A reading with other columns than the known partitions names the period and the new name."""
    with pytest.raises(SourceError, match=r"flights: 2013-01-03, read now has no column 'y'") as caught:
        merge(
            manifest(0, 1), [part(2, "i2")], [Window(start=day(2), end=day(3))], columns={"t": "datetime", "yy": "int"}
        )
    assert "'yy'" in caught.value.fix


def test_types_of_known_and_new_agree():
    """A column that was empty, or whole, so far takes the type it has now."""
    known = manifest(0, columns={"t": "datetime", "y": "null", "x": "int"})
    read = [Window(start=day(1), end=day(2))]
    merged, _, _ = merge(known, [part(1, "i1")], read, columns={"t": "datetime", "y": "string", "x": "float"})
    assert merged.columns == {"t": "datetime", "y": "string", "x": "float"}


def test_rows_of_a_period_that_was_not_asked_for_are_not_lost():
    """A partition outside of what was read is a fault of ours, and no reason to leave its rows out."""
    with pytest.raises(StageError, match="dataset flights: 1 row of 2 rows arrived"):
        merge(manifest(0), [part(1, "i1"), part(5, "i5")], [Window(start=day(1), end=day(2))])


@pytest.mark.parametrize("kind", [pl.String, pl.Categorical])
def test_times_may_be_text_in_iso_8601(kind, tmp_path):
    """Each with an offset of its own or with none, which means UTC; in a column of text or of categories."""
    texts = ["2013-01-02", "2013-01-02T01:00:00+02:00", "2013-01-01 22:00:00.123456789Z"]
    frame = pl.DataFrame({"t": pl.Series(texts, dtype=kind), "y": [1, 2, 3]})
    files = write([frame], tmp_path).files
    assert [(file.period, file.rows) for file in files] == [(day(0), 2), (day(1), 1)]
    assert pl.read_parquet(files[0].path)["t"].dt.to_string().to_list() == [
        "2013-01-01 22:00:00.123456+00:00",
        "2013-01-01 23:00:00.000000+00:00",
    ]


def test_nulls_are_counted_over_all_frames(tmp_path):
    """The whole number, and where the first is."""
    frames = [pl.DataFrame({"t": times, "y": [1, 1]}) for times in ([day(0), day(1)], [day(1), None], [None, day(2)])]
    with pytest.raises(SourceError, match="'t' is null in 2 rows, the first in frame 2 at position 1"):
        write(frames, tmp_path)


@pytest.mark.parametrize("name", ["*", "^x.*$"])
def test_columns_with_names_that_are_patterns_are_widened(tmp_path, name):
    """A column of whole numbers on one day and of others on the next is read as numbers, whatever its name."""
    days = [pl.DataFrame({"x1": ["a"], name: [1]}), pl.DataFrame({"x1": ["b"], name: [1.5]})]
    files = [tmp_path / f"{number}.parquet" for number in range(2)]
    for day, file in zip(days, files, strict=True):
        day.write_parquet(file)
    assert partitions.load(files).to_dict(as_series=False) == {"x1": ["a", "b"], name: [1.0, 1.5]}
