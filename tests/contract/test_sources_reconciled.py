"""No source loses a row, gains one or shows it twice: rows in the window, outside and without a time are all there are.

The rows are made up by Hypothesis, always the same ones. What each row's time is follows from how it was made, not from
the code under test.
"""

import sqlite3
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import polars as pl
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from evergreen import pack
from evergreen.data import partitions, sources
from evergreen.errors import SourceError
from evergreen.run import Window

START = datetime(2013, 1, 1, tzinfo=UTC)
WEEK = Window(start=START, end=START + timedelta(days=7))
WINDOWS = (
    Window(start=START - timedelta(days=400), end=START),
    WEEK,
    Window(start=WEEK.end, end=WEEK.end + timedelta(days=400)),
)
"""All of the time that rows may have, cut at the edges of the week."""

always_the_same = settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

near_an_edge = st.builds(
    lambda edge, off: edge + off,
    st.sampled_from((WEEK.start, WEEK.end)),
    st.sampled_from(
        [
            timedelta(0),
            *(
                sign * step
                for sign in (1, -1)
                for step in (timedelta(microseconds=1), timedelta(seconds=1), timedelta(hours=13))
            ),
        ]
    ),
)
anywhere = st.datetimes(datetime(2012, 1, 2), datetime(2013, 12, 30)).map(lambda at: at.replace(tzinfo=UTC))  # noqa: DTZ001
instants = st.lists(st.one_of(near_an_edge, near_an_edge, anywhere, st.none()), min_size=1, max_size=120)
ISO = (
    lambda at: at.isoformat(),
    lambda at: at.strftime("%Y-%m-%d %H:%M:%S.%f"),
    lambda at: at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
    lambda at: at.astimezone(_zone(14)).isoformat(),
    lambda at: at.astimezone(_zone(-12)).strftime("%Y-%m-%d %H:%M:%S.%f%z"),
)
STRANGE = (lambda at: at.strftime("%d.%m.%Y %H:%M"), lambda at: at.strftime("%Y%m%d"), lambda _at: "soon")
mostly_iso = st.lists(st.sampled_from((*ISO * 3, *STRANGE)), min_size=1, max_size=5)
"""How a column's times are written: in about half of the examples, one of the ways is none of ISO 8601."""


def _zone(hours: int):
    return timezone(timedelta(hours=hours))


def texts(times, written) -> list[str | None]:
    """Each time as text, by one writer after the other."""
    return [None if at is None else written[n % len(written)](at) for n, at in enumerate(times)]


def read(source: dict, folder: Path, window: Window) -> pl.DataFrame:
    opened = sources.open_source(pack.SOURCES[source["kind"]].model_validate(source), folder)
    frames = list(opened.read(window, "t"))
    return pl.concat(frames, how="vertical_relaxed") if frames else pl.DataFrame({"t": [], "n": []})


def assert_reconciled(source: dict, folder: Path, times: list[datetime | None], strange: bool = False) -> None:
    """Every row comes with the one window that holds it, rows without a time with each; or the source is refused."""
    nulls = [n for n, at in enumerate(times) if at is None]
    for window in WINDOWS:
        within = [n for n, at in enumerate(times) if at is not None and window.start <= at < window.end]
        if strange:
            with pytest.raises(SourceError, match="'t' holds no time in"):
                read(source, folder, window)
            continue
        frame = read(source, folder, window)
        assert sorted(frame["n"]) == sorted(within + nulls)
        assert [at for at in frame["t"] if at is not None and not window.start <= at < window.end] == []


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


PARQUET = {
    "us utc": pa.timestamp("us", "UTC"),
    "ns new york": pa.timestamp("ns", "America/New_York"),
    "us": pa.timestamp("us"),
    "ms": pa.timestamp("ms"),
    "date": pa.date32(),
    "text": pa.string(),
}


@pytest.mark.parametrize("kind", PARQUET)
@always_the_same
@given(times=instants, group=st.sampled_from((1, 3, 100)), parts=st.integers(1, 3), data=st.data())
def test_parquet(kind, folder, times, group, parts, data):
    """Timestamps of any unit and zone, and dates; row groups of any size, statistics or none, one file or several."""
    type_ = PARQUET[kind]
    if kind == "date":
        times = [at and at.replace(hour=0, minute=0, second=0, microsecond=0) for at in times]
        values = pa.array([at and at.date() for at in times], type_)
    elif kind == "text":
        values = pa.array(texts(times, ISO), type_)
    else:
        step = timedelta(milliseconds=1) if kind == "ms" else timedelta(microseconds=1)
        times = [at and START + (at - START) // step * step for at in times]
        values = pa.array([at and (at if type_.tz else at.replace(tzinfo=None)) for at in times], type_)
    statistics = data.draw(st.booleans())
    table = pa.table({"t": values, "n": list(range(len(times)))})
    size = -(-len(times) // parts)
    for file in folder.glob("*"):
        file.unlink()
    for part in range(parts):
        rows = table.slice(part * size, size)
        pq.write_table(rows, folder / f"{part}.parquet", row_group_size=group, write_statistics=statistics)
    assert_reconciled({"kind": "parquet", "path": "*.parquet"}, folder, times)


@always_the_same
@given(times=instants, written=mostly_iso, block=st.sampled_from((64, 300, 8 * 2**20)), parts=st.integers(1, 2))
def test_csv(folder, times, written, block, parts):
    """Times in any mixture of shapes, blocks of any size; one row that is no time refuses the source."""
    lines = [f"{text or ''},{n}" for n, text in enumerate(texts(times, written))]
    for part in range(parts):
        (folder / f"{part}.csv").write_text("\n".join(["t,n", *lines[part::parts], ""]))
    for left in folder.glob(f"{parts}.csv"):
        left.unlink()
    strange = any(at is not None and written[n % len(written)] in STRANGE for n, at in enumerate(times))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block)
        assert_reconciled({"kind": "csv", "path": "*.csv"}, folder, times, strange)


LITE = ("TEXT", "DATETIME", "DATE", "")


@pytest.mark.parametrize("what", [{"table": "a"}, {"query": "SELECT * FROM a"}], ids=["table", "query"])
@always_the_same
@given(times=instants, written=mostly_iso, type_=st.sampled_from(LITE), numbers=st.booleans())
def test_sqlite(what, folder, times, written, type_, numbers):
    """Text in a column of any declared type, numbers among it; through a table and a query."""
    rows = list(zip(texts(times, written), range(len(times)), strict=True))
    strange = any(at is not None and written[n % len(written)] in STRANGE for n, at in enumerate(times))
    if numbers and times[0] is not None:
        rows[0], strange = (int(times[0].timestamp()), 0), True
    (folder / "a.db").unlink(missing_ok=True)
    with sqlite3.connect(folder / "a.db") as connection:
        connection.execute(f"CREATE TABLE a (t {type_}, n INTEGER)")
        connection.executemany("INSERT INTO a VALUES (?, ?)", rows)
    connection.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SQL_ROWS", 7)
        assert_reconciled({"kind": "sql", "url": "sqlite:///a.db", **what}, folder, times, strange)


POSTGRES = ("timestamptz", "timestamp", "date", "text", "varchar(40)", "char(40)")


@pytest.mark.parametrize("type_", POSTGRES)
def test_postgresql(type_, postgres):
    """Times of each of its types, and text; through a query, which is not asked for its columns' types each time."""
    url = postgres.database()
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE a (t {type_}, n integer)")

        @settings(always_the_same, max_examples=4)
        @given(times=instants, written=mostly_iso)
        def reconciled(times, written):
            strange = False
            if type_ == "date":
                times = [at and at.replace(hour=0, minute=0, second=0, microsecond=0) for at in times]
                values = [at and at.date() for at in times]
            elif type_.startswith("timestamp"):
                values = [at and (at if type_ == "timestamptz" else at.replace(tzinfo=None)) for at in times]
            else:
                values = texts(times, written)
                strange = any(at is not None and written[n % len(written)] in STRANGE for n, at in enumerate(times))
            connection.execute("TRUNCATE a")
            with connection.cursor() as cursor:
                cursor.executemany("INSERT INTO a VALUES (%s, %s)", list(zip(values, range(len(times)), strict=True)))
            assert_reconciled({"kind": "sql", "url": url, "query": "SELECT * FROM a"}, Path(), times, strange)

        reconciled()


FRAMES = {
    "polars": lambda times, n: pl.DataFrame({"t": pl.Series(times, dtype=pl.Datetime("us", "UTC")), "n": n, "y": 1}),
    "pandas": lambda times, n: pd.DataFrame({"t": pd.to_datetime(pd.Series(times), utc=True), "n": n, "y": 1}),
    "pyarrow": lambda times, n: pa.table({"t": pa.array(times, pa.timestamp("ns", "UTC")), "n": n, "y": [1] * len(n)}),
    "text": lambda times, n: pl.DataFrame({"t": [at and at.isoformat() for at in times], "n": n, "y": 1}),
}
LIBRARIES = tuple(FRAMES)


@pytest.mark.parametrize("partition", ["hour", "day", "week", "month"])
@always_the_same
@given(times=instants, chunk=st.integers(1, 9), library=st.sampled_from(LIBRARIES), budget=st.sampled_from((1, 2**28)))
def test_frames_become_partitions(partition, folder, times, chunk, library, budget):
    """What a Python source hands over, in frames of any library and size: each row is in one partition, that of its time."""
    window = Window(start=WINDOWS[0].start, end=WINDOWS[-1].end)
    rows = list(enumerate(times))
    frames = [
        FRAMES[library]([at for _, at in some], [n for n, _ in some])
        for some in (rows[first : first + chunk] for first in range(0, len(rows), chunk))
    ]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=folder) as out:
        patch.setattr(partitions, "BUDGET_BYTES", budget)

        def write() -> partitions.Written:
            return partitions.write(
                frames,
                window=window,
                partition=partition,
                event_time="t",
                target="y",
                folder=Path(out),
                origin="a test",
            )

        if None in times:
            with pytest.raises(SourceError, match=rf"'t' is null in {times.count(None)} row"):
                write()
            return
        files = write().files
        kept = [pl.read_parquet(file.path) for file in files]
    assert sorted(n for frame in kept for n in frame["n"]) == list(range(len(times)))
    for file, frame in zip(files, kept, strict=True):
        assert frame.height == file.rows
        assert {partitions.floor(at, partition) for at in frame["t"]} == {file.period}
