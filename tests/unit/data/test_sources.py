"""Sources: what is special about each kind. What is common to all is in tests/contract/test_sources.py."""

import bz2
import gzip
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evergreen import pack
from evergreen.data import sources
from evergreen.errors import SourceError
from evergreen.run import Window

START = datetime(2013, 1, 1, tzinfo=UTC)
MONTH = Window(start=START, end=START + timedelta(days=31))


def read_csv(folder: Path, path: str = "*.csv", event_time: str = "t", **options: object) -> pl.DataFrame:
    source = pack.CsvSource.model_validate({"kind": "csv", "path": path, **options})
    return pl.concat(sources.open_source(source, folder).read(MONTH, event_time), how="vertical_relaxed")


def read_parquet(folder: Path, path: str = "*.parquet", window: Window = MONTH) -> pl.DataFrame:
    source = pack.ParquetSource(kind="parquet", path=path)
    return pl.concat(sources.open_source(source, folder).read(window, "t"))


def column(folder: Path, *values: str) -> pl.Series:
    """The type and the values that a CSV column of `values` gets."""
    lines = [f"2013-01-01,{value}" for value in values]
    (folder / "column.csv").write_text("\n".join(["t,x", *lines, ""]))
    return read_csv(folder)["x"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1", "-2", "NA"], [1, -2, None]),
        (["1", "2.5", ""], [1.0, 2.5, None]),
        (["true", "False"], [True, False]),
        (["2013-04-01", "2013-04-02"], [date(2013, 4, 1), date(2013, 4, 2)]),
        (["2013-04-01", "2013-04-01 05:00"], [datetime(2013, 4, 1), datetime(2013, 4, 1, 5)]),  # noqa: DTZ001
        (["2013-04-01T05:00:00+02:00"], [datetime(2013, 4, 1, 3, tzinfo=UTC)]),
        (["1", "one"], ["1", "one"]),
        (["a,b".join('""'), '"line\nbreak"'], ["a,b", "line\nbreak"]),
        (["NA", ""], [None, None]),
    ],
)
def test_a_csv_column_has_the_type_that_all_its_values_have(values, expected, tmp_path):
    """int, float, bool, date, time, else text; `null_values` are null."""
    assert column(tmp_path, *values).to_list() == expected


def test_a_csv_type_is_that_of_the_whole_file(tmp_path, monkeypatch):
    """A value far down, blocks after the first, still counts: nothing turns null, nothing is cut."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    found = column(tmp_path, *[str(n) for n in range(500)], "0.5")
    assert (found.dtype, found[-1], found.null_count()) == (pl.Float64, 0.5, 0)


@pytest.mark.parametrize("values", [[str(2**53 + 1), "0.5"], [str(2**64 + 1), "1"], [f"-{2**53 + 1}", "", "0.5"]])
def test_digits_that_a_csv_column_of_floats_would_round_are_refused(values, tmp_path):
    """Whole numbers among fractions, or beyond 64 bits; as text, which the fix says, they are kept."""
    with pytest.raises(SourceError, match=rf"column\.csv: column 'x' holds numbers, {values[0]} for one") as caught:
        column(tmp_path, *values)
    assert "id-1 instead of 1" in caught.value.fix
    named = [f"id-{value}" for value in values if value]
    assert column(tmp_path, *named).to_list() == named


def test_digits_that_float_holds_are_kept(tmp_path):
    """2**54 is a float as it stands."""
    assert column(tmp_path, str(2**54), "0.5").to_list() == [2.0**54, 0.5]


OUTSIDE = "2012-12-31,n/a\n2013-02-01,none\n2013-03-01,1e999\n"


@pytest.mark.parametrize("block", [100, 8 * 2**20])
def test_values_outside_of_the_window_change_no_type(block, tmp_path, monkeypatch):
    """Text in last year's rows does not make text of this month's numbers, whichever rows share a block."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    inside = "".join(f"2013-01-{day:02},{day}\n" for day in range(1, 32))
    (tmp_path / "a.csv").write_text("t,x\n" + OUTSIDE + inside + OUTSIDE)
    frame = read_csv(tmp_path)
    assert (frame["x"].dtype, frame["x"].to_list()) == (pl.Int64, list(range(1, 32)))


@pytest.mark.parametrize(
    ("known", "values", "expected"),
    [
        ("string", ["12", "013"], ["12", "013"]),
        ("string", ["true", ""], ["true", None]),
        ("float", ["12"], [12.0]),
        ("datetime", ["2013-04-01"], [datetime(2013, 4, 1)]),  # noqa: DTZ001
        ("int", ["1.5"], [1.5]),
        ("null", ["1"], [1]),
        ("bool", ["x"], ["x"]),
    ],
)
def test_a_csv_column_keeps_the_type_it_had(known, values, expected, tmp_path):
    """A day of numbers in a column of text is text; what the known type cannot hold has a type of its own."""
    (tmp_path / "a.csv").write_text("\n".join(["t,x", *(f"2013-01-02,{value}" for value in values), ""]))
    source = sources.open_source(
        pack.CsvSource(kind="csv", path="a.csv"), tmp_path, known={"t": "datetime", "x": known}
    )
    column = pl.concat(source.read(MONTH, "t"))["x"]
    assert (column.to_list(), [type(value) for value in column]) == (expected, [type(value) for value in expected])


def test_csv_times_may_be_written_in_several_ways(tmp_path):
    """With an offset and without, by the second and by the day; the count of those that are no times is whole."""
    times = ["2013-01-02T01:00:00+02:00", "2013-01-02 01:00", "2013-01-02", "2013-01-02T01:00:00.5Z"]
    (tmp_path / "a.csv").write_text("\n".join(["t,x", *(f"{time},1" for time in times), ""]))
    hours = [time.isoformat()[5:16] for time in read_csv(tmp_path)["t"]]
    assert hours == ["01-01T23:00", "01-02T01:00", "01-02T00:00", "01-02T01:00"]
    (tmp_path / "a.csv").write_text("\n".join(["t,x", *(f"{time},1" for time in [*times, "soon", "1357084800"]), ""]))
    with pytest.raises(SourceError, match="'t' holds no time in 2 rows, 'soon' for one"):
        read_csv(tmp_path)


def test_a_csv_time_with_an_offset_is_utc(tmp_path):
    """An event time with an offset is turned to UTC."""
    (tmp_path / "a.csv").write_text("t,x\n2013-01-02T01:00:00+02:00,1\n")
    assert read_csv(tmp_path)["t"].to_list() == [datetime(2013, 1, 1, 23, tzinfo=UTC)]


def test_a_csv_may_have_other_separators_and_null_values(tmp_path):
    """`separator` and `null_values` of the pack are used."""
    (tmp_path / "a.csv").write_text("t;x\n2013-01-01;-\n2013-01-01;1\n")
    assert read_csv(tmp_path, separator=";", null_values=("-",))["x"].to_list() == [None, 1]


@pytest.mark.parametrize(("ending", "pack_bytes"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_a_csv_may_be_compressed(ending, pack_bytes, tmp_path):
    """Compressed files are unpacked by their ending."""
    (tmp_path / f"a.csv.{ending}").write_bytes(pack_bytes(b"t,x\n2013-01-01,1\n"))
    assert read_csv(tmp_path, f"*.{ending}")["x"].to_list() == [1]


def test_a_csv_may_begin_with_a_byte_order_mark(tmp_path):
    """A spreadsheet's UTF-8 mark is no part of the first column's name."""
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbft,x\n2013-01-01,1\n")
    assert read_csv(tmp_path).columns == ["t", "x"]


def test_a_lone_quote_within_a_field_is_no_open_field(tmp_path):
    """An inch sign in a bare field is text, although it leaves an odd number of quotes."""
    assert column(tmp_path, '5" pipe').to_list() == ['5" pipe']


BAD_CSV = {
    "a row too short": (b"t,x\n2013-01-01,1\n2013-01-02\n", "Expected 2 columns, got 1: 2013-01-02", "mend the row"),
    "a row too long": (b"t,x\n2013-01-01,1,2\n", "Expected 2 columns, got 3", "mend the row"),
    "cut within quotes": (b't,x\n2013-01-01,1\n2013-01-02,"abc\nd', "bad.csv:3: a quoted field is not closed", "cut"),
    "nothing": (b"", "is empty", "header"),
    "a column twice": (b"t,x,x\n", "column 'x' is there twice", "name of its own"),
    "not UTF-8": (b"t,x\n2013-01-01,\xff\n", "bad.csv cannot be read", "UTF-8"),
    "times unlike": (b"t,x\n2013-01-01,1\n02/01/2013,2\n", "holds no time in 1 row, '02/01/2013'", "ISO 8601"),
    "misspelt time": (b"tt,x\n", "bad.csv has no column 't'", "did you mean 'tt'?"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_a_bad_csv_is_refused(case, tmp_path):
    """A CSV that is no whole table is refused: file, line or value, and fix."""
    content, what, fix = BAD_CSV[case]
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        read_csv(tmp_path)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_a_truncated_archive_is_refused(tmp_path):
    """A gzip file cut short gives no rows at all, not some."""
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"t,x\n" + b"2013-01-01,1\n" * 1000)[:-10])
    with pytest.raises(SourceError, match=r"a\.csv\.gz cannot be read"):
        read_csv(tmp_path, "*.gz")


def test_a_zip_archive_is_refused(tmp_path):
    """A zip may hold several files: reading one of them would drop the others in silence."""
    (tmp_path / "a.csv.zip").write_bytes(b"PK")
    with pytest.raises(SourceError, match="is an archive"):
        read_csv(tmp_path, "*.zip")


def parquet(folder: Path, row_group_size: int = 1000) -> Path:
    """A month of hourly rows, with a checksum of each page."""
    file = folder / "a.parquet"
    rows = {"t": [START + timedelta(hours=n) for n in range(24 * 31)], "x": list(range(24 * 31))}
    pq.write_table(pa.table(rows), file, row_group_size=row_group_size, write_page_checksum=True)
    return file


def damage(file: Path) -> None:
    """Overwrite a few bytes within the first page."""
    content = bytearray(file.read_bytes())
    content[100:110] = b"damaged..."
    file.write_bytes(content)


def test_a_parquet_file_without_its_footer_is_refused(tmp_path):
    """A file cut short is named, with what to do."""
    file = parquet(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read") as caught:
        read_parquet(tmp_path)
    assert "not a whole Parquet file" in caught.value.fix


def test_a_damaged_parquet_file_is_refused(tmp_path):
    """Bytes overwritten within the data, footer intact, are noticed where the file has checksums."""
    damage(parquet(tmp_path))
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read"):
        read_parquet(tmp_path)


def test_parquet_row_groups_outside_the_window_are_not_read(tmp_path):
    """Damage in the first day's row group goes unnoticed by who reads the last day: it was never looked at."""
    damage(parquet(tmp_path, row_group_size=24))
    last = Window(start=START + timedelta(days=30), end=START + timedelta(days=31))
    assert read_parquet(tmp_path, window=last)["x"].to_list() == list(range(720, 744))
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read"):
        read_parquet(tmp_path)


@pytest.mark.parametrize("kind", [pl.Datetime("ms"), pl.Datetime("ns", "America/New_York"), pl.Date])
def test_parquet_times_of_all_kinds(kind, tmp_path):
    """Naive times are UTC, zoned ones are turned to it, a date is its midnight."""
    days = pl.Series([date(2012, 12, 31), date(2013, 1, 1), date(2013, 2, 1)]).cast(pl.Datetime("us"))
    utc = days.dt.replace_time_zone("UTC")
    zoned = utc.dt.convert_time_zone("America/New_York") if kind == pl.Datetime("ns", "America/New_York") else days
    pl.DataFrame({"t": zoned.cast(kind)}).write_parquet(tmp_path / "a.parquet")
    assert read_parquet(tmp_path)["t"].to_list() == [START]


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    """Two columns of one name cannot both be kept."""
    table = pa.table([[START], [1], [2]], names=["t", "x", "x"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet: column 'x' is there twice"):
        read_parquet(tmp_path)
    pq.write_table(table.rename_columns(["t", "x", "y"]), tmp_path / "a.parquet")
    assert read_parquet(tmp_path).height == 1


def test_the_frames_of_a_read_job(tmp_path):
    """Arrow files come back in the order of their names."""
    for n in (1, 0):
        pl.DataFrame({"x": [n]}).write_ipc(tmp_path / f"{n}.arrow")
    assert [frame["x"][0] for frame in sources.frames(tmp_path)] == [0, 1]


def test_a_truncated_frame_of_a_read_job_is_refused(tmp_path):
    """A job killed while it wrote leaves nothing to be trusted."""
    file = tmp_path / "0.arrow"
    pl.DataFrame({"x": list(range(1000))}).write_ipc(file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(SourceError, match=r"0\.arrow cannot be read"):
        list(sources.frames(tmp_path))
