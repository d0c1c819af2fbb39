"""Databases as sources: types, the window they are asked for, who may read, and what goes wrong on a real PostgreSQL."""

import re
import sqlite3
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import psycopg
import pytest
from sqlalchemy.engine import make_url

from evergreen import pack
from evergreen.data import sources
from evergreen.errors import SourceError, UnreachableError
from evergreen.run import Connection, Window

START = datetime(2013, 1, 1, tzinfo=UTC)
WEEK = Window(start=START, end=START + timedelta(days=7))


@pytest.fixture
def database(postgres):
    """A new PostgreSQL database, and a function that executes statements there."""
    url = make_url(postgres.database())

    def execute(statements: str) -> None:
        with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
            connection.execute(statements)

    execute.url = url.render_as_string()
    return execute


def connection_to(database, **other) -> Connection:
    url = make_url(database.url)
    told = {"login": url.username, "host": url.host, "port": url.port, "schema": url.database}
    return Connection(name="warehouse", kind="postgres", **{**told, **other})


def frames(what, connection=None, window=WEEK, folder=Path()):
    said = pack.SqlSource.model_validate({"kind": "sql", **({"connection": "warehouse"} if connection else {}), **what})
    return sources.open_source(said, folder, lambda _name: connection).read(window, "t")


def read(*args, **more):
    return pl.concat(frames(*args, **more))


def refusal(*args, **more):
    with pytest.raises(SourceError) as caught:
        read(*args, **more)
    return caught.value


KINDS = """
    CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TABLE kinds AS SELECT timestamptz '2013-01-02 03:04:05.678901+02' AS t,
        true AS bool, 7::int2 AS int2, 8::int8 AS int8, 1.5::float4 AS float4, 0.1::float8 AS float8,
        12.25::numeric(9, 2) AS numeric, 'é'::text AS text, 'a'::varchar(3) AS varchar, 'bad'::mood AS enum,
        '6f9619ff-8b86-d011-b42d-00c04fc964ff'::uuid AS uuid, date '2013-04-01' AS date,
        timestamp '2013-04-01 05:00' AS timestamp, timestamptz '2013-04-01 05:00+02' AS timestamptz, NULL::int AS empty;
"""


@pytest.mark.parametrize(
    "what", [{"table": "kinds"}, {"table": "public.kinds"}, {"query": "SELECT * FROM kinds -- all\n;"}]
)
def test_types_are_kept(what, database):
    """bool, int, float, text, date and time come as what they are; decimals as floats, UUIDs and enums as text."""
    database(KINDS)
    assert read({"url": database.url, **what}).to_dicts() == [
        {
            "t": datetime(2013, 1, 2, 1, 4, 5, 678901, tzinfo=UTC),
            "bool": True,
            "int2": 7,
            "int8": 8,
            "float4": 1.5,
            "float8": 0.1,
            "numeric": 12.25,
            "text": "é",
            "varchar": "a",
            "enum": "bad",
            "uuid": "6f9619ff-8b86-d011-b42d-00c04fc964ff",
            "date": date(2013, 4, 1),
            "timestamp": datetime(2013, 4, 1, 5, tzinfo=UTC),
            "timestamptz": datetime(2013, 4, 1, 3, tzinfo=UTC),
            "empty": None,
        }
    ]


@pytest.mark.parametrize("type_", ["timestamptz", "timestamp", "date", "text"])
def test_the_window_is_asked_in_the_type_of_the_event_time(type_, database):
    """Its first and its last day are there, the days around it are not, whatever the column's type; nulls come along."""
    day = "(timestamp '2012-12-30' + n * interval '1 day')"
    value = f"{day} AT TIME ZONE 'UTC'" if type_ == "timestamptz" else f"{day}::{type_}"
    database(f"CREATE TABLE days AS SELECT {value} AS t, n FROM generate_series(0, 11) n UNION ALL SELECT NULL, 99")
    found = read({"url": database.url, "table": "days"})
    assert sorted(found["n"].to_list()) == [2, 3, 4, 5, 6, 7, 8, 99]
    assert found["t"].min() == START


@pytest.mark.parametrize("text", ["{:%Y-%m-%d %H:%M:%S}", "{:%Y-%m-%dT%H:%M:%S}Z", "{:%Y-%m-%dT%H:%M}+00:00"])
def test_times_that_are_text_are_read(text, tmp_path):
    """SQLite has no times: ISO 8601 in any of its spellings, through a table or a query, bounds exact."""
    hours = [START + timedelta(hours=n) for n in (-1, 0, 1, 24 * 7 - 1, 24 * 7)]
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("CREATE TABLE a (t TEXT, n INTEGER)")
        connection.executemany("INSERT INTO a VALUES (?, ?)", [(text.format(hour), n) for n, hour in enumerate(hours)])
    for what in ({"table": "a"}, {"query": "SELECT * FROM a"}):
        found = read({"url": "sqlite:///a.db", **what}, folder=tmp_path)
        assert (found["n"].to_list(), found["t"].to_list()) == ([1, 2, 3], hours[1:4])


def test_the_database_is_asked_for_the_window_alone(database):
    """Rows outside are not read: one that cannot be computed does no harm there, and does within."""
    database(
        "CREATE TABLE a AS SELECT timestamptz '2013-01-01 UTC' + n * interval '1 day' AS t, n FROM generate_series(0, 9) n"
    )
    query = {"url": database.url, "query": "SELECT t, 1 / (n - 8) AS x FROM a"}
    assert read(query).height == 7
    later = Window(start=WEEK.end, end=WEEK.end + timedelta(days=7))
    assert "division by zero" in refusal(query, window=later).what


def test_a_query_may_hold_colons_and_percents(database):
    """Casts, patterns and times of day are no parameters of ours."""
    query = "SELECT now() - now() + '2013-01-02 12:30'::timestamptz AS t, 'x:y %s %%'::text AS x WHERE 'abc' LIKE 'a%'"
    assert read({"url": database.url, "query": query})["x"].to_list() == ["x:y %s %%"]


MEASURE = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
from evergreen import pack
from evergreen.data import sources
from evergreen.run import Window
window = Window(start=datetime(2013, 1, 1, tzinfo=UTC), end=datetime(2014, 1, 1, tzinfo=UTC))
def read(rows):
    query = f"SELECT timestamptz '2013-01-01' + n * interval '1 s' AS t, repeat('x', 100) AS x FROM generate_series(1, {rows}) n"
    source = pack.SqlSource(kind="sql", url=sys.argv[1], query=query)
    seen = sum(frame.height for frame in sources.open_source(source, Path()).read(window, "t"))
    return seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read(40_000)[1], *read(200_000))
"""


@pytest.mark.slow
def test_an_answer_is_never_in_memory(database):
    """Of an answer of more than twenty megabytes, as Python objects twice that, a process never holds all."""
    done = subprocess.run([sys.executable, "-c", MEASURE, database.url], capture_output=True, text=True, check=True)
    before, found, after = map(int, done.stdout.split())
    assert found == 200_000
    assert (after - before) * 1024 < 15e6


def test_a_connection_says_where_and_who(database):
    """An Airflow connection of type postgres is enough; its extra are the driver's options."""
    database("CREATE TABLE a AS SELECT timestamptz '2013-01-02 UTC' AS t, current_setting('application_name') AS x")
    assert read({"table": "a"}, connection_to(database, extra={"application_name": "evergreen"})).height == 1


def test_no_table_of_that_name(database):
    """The table, where it was looked for, and the one that was likely meant."""
    database("CREATE TABLE flights (t date)")
    error = refusal({"table": "flight"}, connection_to(database))
    assert re.search(r"table flight of warehouse \(postgres://127.0.0.1:\d+/\w+\) does not exist", error.what)
    assert "did you mean 'flights'?" in error.fix


def test_no_right_to_read(database):
    """What the database refuses is said in its words, and is not tried again."""
    database("CREATE TABLE a (t date); CREATE ROLE nobody_much LOGIN")
    error = refusal({"table": "a"}, connection_to(database, login="nobody_much"))
    assert "table a of warehouse" in error.what
    assert "permission denied for table a" in error.what
    assert not isinstance(error, UnreachableError)


def test_a_server_that_is_away(database):
    """It may be back soon: another kind of error, which a task tries again; neither password nor token is in it."""
    away = connection_to(database, port=9, password="hush!", extra={"options": "-c search_path=s3cret"})
    error = refusal({"table": "a"}, away)
    assert isinstance(error, UnreachableError)
    assert re.search(r"table a of warehouse .* cannot be reached: .*refused", error.what)
    assert "credentials" in error.fix
    assert not re.search("hush!|s3cret", f"{error} {away!r}")


def test_a_database_that_is_not_there(database):
    """The database's own words, and what to check."""
    error = refusal({"table": "a"}, connection_to(database, schema="elsewhere"))
    assert 'database "elsewhere" does not exist' in error.what


def test_a_connection_that_breaks_is_no_end_of_the_rows(database, monkeypatch):
    """Half of the rows and then a dead server: an error that is tried again, not half of the rows."""
    monkeypatch.setattr(sources, "SQL_ROWS", 10)
    database(
        "CREATE TABLE a AS SELECT timestamptz '2013-01-01 UTC' + n * interval '1 min' AS t FROM generate_series(0, 9999) n"
    )
    reading = frames({"url": database.url, "table": "a"})
    assert next(reading).height == 10
    database(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with pytest.raises(UnreachableError, match="the connection broke"):
        list(reading)


def test_an_sqlite_file_that_is_missing_is_not_made(tmp_path):
    """SQLite would take it for a new database."""
    assert "no.db does not exist" in refusal({"url": "sqlite:///no.db", "table": "a"}, folder=tmp_path).what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT now() AS t, 1 AS x, 2 AS x", "column 'x' is there twice"),
        ("SELECT 7 AS t", "holds no time in 1 row, 7 for one"),
        ("SELECT now() AS tt", "has no column 't'"),
        ("SELEC", "syntax error"),
        ("SELECT timestamptz '2013-01-02' AS t, date 'infinity' AS x", "cannot be read"),
    ],
)
def test_a_query_that_cannot_be_the_source(query, says, database):
    """Each is told in one sentence, with the query's place and something to do."""
    error = refusal({"query": query}, connection_to(database))
    assert says in error.what
    assert error.what.startswith("the query of warehouse (postgres://")


def test_a_column_of_several_types_is_refused(tmp_path):
    """SQLite lets every value have its own: text among numbers is named, not guessed at."""
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.executescript("CREATE TABLE a (t, x); INSERT INTO a VALUES ('2013-01-01', 1), ('2013-01-02', 'one')")
    error = refusal({"url": "sqlite:///a.db", "query": "SELECT * FROM a"}, folder=tmp_path)
    assert "column 'x' holds values of several types: int, str" in error.what


def test_whole_numbers_are_not_rounded_among_others(tmp_path):
    """SQLite keeps integers and fractions in one column; where floats would round an integer, that is refused."""
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.execute("CREATE TABLE mixed (t TEXT, x)")
        connection.executemany("INSERT INTO mixed VALUES ('2013-01-01', ?)", [(2**53 + 1,), (0.5,)])
    error = refusal({"url": "sqlite:///a.db", "table": "mixed"}, folder=tmp_path)
    assert f"column 'x' has the number {2**53 + 1}" in error.what
    query = "SELECT t, CAST(x AS TEXT) AS x FROM mixed"  # what the fix says
    assert read({"url": "sqlite:///a.db", "query": query}, folder=tmp_path)["x"].to_list() == [str(2**53 + 1), "0.5"]


def test_decimals_that_float_would_round_are_refused(database):
    """A numeric key is cast as the fix says, and keeps its digits; one that float64 holds stays a float."""
    database("CREATE TABLE keys AS SELECT timestamptz '2013-01-02' AS t, 9007199254740993::numeric(20) AS id")
    error = refusal({"url": database.url, "table": "keys"})
    assert "column 'id' has the number 9007199254740993" in error.what
    assert "cast the column to bigint" in error.fix
    kept = read({"url": database.url, "query": "SELECT t, id::bigint AS id, 12::numeric AS n FROM keys"})
    assert kept.select("id", "n").row(0) == (2**53 + 1, 12.0)


def test_a_kind_that_no_driver_knows(database):
    """A connection of another type than a database's is told as such."""
    assert "no driver" in refusal({"table": "a"}, Connection(name="warehouse", kind="http", host="example.com")).what


# Times that the database cannot compare with a window: the right rows, or a refusal that counts them.

DIALECTS = ("sqlite", "postgresql")
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)
SHAPES = {
    "iso": "{0:%Y-%m-%d %H:%M:%S}",
    "zulu": "{0:%Y-%m-%dT%H:%M:%S}Z",
    "minutes": "{0:%Y-%m-%dT%H:%M}",
    "fraction": "{0:%Y-%m-%d %H:%M:%S.%f}",
    "nanoseconds": "{0:%Y-%m-%dT%H:%M:%S.%f}000+00:00",
    "east": "{1:%Y-%m-%dT%H:%M:%S}+14:00",
    "west": "{2:%Y-%m-%d %H:%M:%S}-1200",
    "padded": "{0:%Y-%m-%d %H:%M:%S}   ",
}
HOURS = [START + timedelta(hours=n) for n in range(-48, 24 * 9)]
WITHIN = {n for n, hour in enumerate(HOURS) if WEEK.start <= hour < WEEK.end}


class Table:
    """A table `a` of (t, n) in a database of its own."""

    def __init__(self, dialect: str, request, folder: Path, type_: str = "text") -> None:
        self.dialect = dialect
        self.folder = folder
        self.execute = request.getfixturevalue("database") if dialect == "postgresql" else self._lite
        self.url = self.execute.url if dialect == "postgresql" else "sqlite:///a.db"
        self.execute(f"CREATE TABLE a (t {type_}, n integer)")

    def _lite(self, statements: str) -> None:
        with sqlite3.connect(self.folder / "a.db") as connection:
            connection.executescript(statements)

    def fill(self, times) -> None:
        values = ", ".join(f"({'NULL' if time is None else repr(time)}, {number})" for number, time in enumerate(times))
        self.execute(f"INSERT INTO a VALUES {values}")

    def rows(self, window: Window = WEEK, **what) -> pl.DataFrame:
        return read({"url": self.url, **(what or {"table": "a"})}, folder=self.folder, window=window)

    def refusal(self, **what) -> SourceError:
        return refusal({"url": self.url, **(what or {"table": "a"})}, folder=self.folder)


@pytest.fixture
def table(request, tmp_path):
    return lambda dialect, type_="text": Table(dialect, request, tmp_path, type_)


def written(hour: datetime, shape: str) -> str:
    return SHAPES[shape].format(hour, hour + timedelta(hours=14), hour - timedelta(hours=12))


@every_dialect
@pytest.mark.parametrize("shape", [*SHAPES, "mixed"])
def test_text_in_any_shape_of_iso_gives_the_rows_of_the_window(dialect, shape, table):
    """Whatever the separator, the offset and the digits, alike or mixed; through a table and a query."""
    rows = table(dialect)
    shapes = list(SHAPES) if shape == "mixed" else [shape]
    rows.fill([written(hour, shapes[n % len(shapes)]) for n, hour in enumerate(HOURS)])
    for what in ({}, {"query": "SELECT * FROM a"}):
        frame = rows.rows(**what)
        assert set(frame["n"]) == WITHIN
        assert all(frame["t"] == pl.Series([HOURS[n] for n in frame["n"]]))


@every_dialect
@pytest.mark.parametrize("strange", ["05.01.2013 10:00", "20130105", "2013-13-05 10:00", "yesterday", "1357380000"])
def test_text_that_is_no_iso_time_is_counted_and_refused(dialect, strange, table):
    """Half of the rows are written another way: all of those are counted, and one is shown."""
    rows = table(dialect)
    rows.fill([written(hour, "iso") if n % 2 else strange for n, hour in enumerate(HOURS)])
    error = rows.refusal()
    assert f"event_time 't' holds no time in {len(HOURS) // 2} rows, '{strange}' for one" in error.what
    rows.execute("UPDATE a SET t = '2013-01-05 10:00:00' WHERE t = '" + strange + "'")
    assert rows.rows().height == len(HOURS) // 2 + len(WITHIN) // 2


@every_dialect
@pytest.mark.parametrize("strange", ["2013-01-05 25:00", "2013-01-05 soon", "2013-02-30"])
def test_a_date_with_a_strange_time_of_day_is_refused_in_its_window_only(dialect, strange, table):
    """The date says whether the row lies in the window; only there does the rest of it matter."""
    rows = table(dialect)
    rows.fill([*(written(hour, "iso") for hour in HOURS), strange])
    month = Window(start=START, end=START + timedelta(days=80))
    with pytest.raises(SourceError, match=rf"holds no time in 1 row, '{strange}' for one"):
        rows.rows(window=month)
    earlier = Window(start=START - timedelta(days=2), end=START)
    assert rows.rows(window=earlier).height == 48


def test_a_query_rewrites_german_times_as_advised(table):
    """PostgreSQL: the advice of the refusal, put into the pack, reads all rows of the window."""
    rows = table("postgresql")
    rows.fill([f"{hour:%d.%m.%Y %H:%M}" for hour in HOURS])
    error = rows.refusal()
    call = re.search(r"SELECT (.*), … FROM …", error.fix)[1]
    assert call == "to_timestamp(t, 'DD.MM.YYYY HH24:MI') AS t"
    query = f"SELECT {call}, n FROM a"
    rows.execute(f"ALTER DATABASE {make_url(rows.url).database} SET timezone TO 'UTC'")
    assert set(rows.rows(query=query)["n"]) == WITHIN


@every_dialect
@pytest.mark.parametrize(("unit", "type_"), [(1, "integer"), (1000, "bigint"), (1000, "real"), (1, "datetime")])
def test_numbers_of_seconds_are_refused_and_read_as_advised(dialect, unit, type_, table):
    """Seconds or milliseconds since 1970: the query that the refusal advises gives the rows of the window."""
    if dialect == "postgresql":
        type_ = {"datetime": "integer", "real": "double precision"}.get(type_, type_)
    rows = table(dialect, type_)
    rows.fill([int(hour.timestamp()) * unit for hour in HOURS])
    error = rows.refusal()
    assert f"holds no time in {len(HOURS)} rows, {int(HOURS[0].timestamp()) * unit}" in error.what
    call = re.search(r"SELECT (.*), … FROM …", error.fix)[1]
    frame = rows.rows(query=f"SELECT {call}, n FROM a")
    assert (set(frame["n"]), frame["t"].min(), frame["t"].max()) == (WITHIN, START, WEEK.end - timedelta(hours=1))


def test_values_of_several_types_in_sqlite_are_refused(table):
    """SQLite sorts numbers before all text: they would be in no window."""
    rows = table("sqlite", "datetime")
    rows.fill([int(hour.timestamp()) if n % 3 == 0 else f"{hour:%Y-%m-%d %H:%M:%S}" for n, hour in enumerate(HOURS)])
    assert f"holds no time in {len(HOURS) // 3} rows" in rows.refusal().what


@pytest.mark.parametrize("type_", ["datetime", "timestamp", "date", "text", "varchar(30)", ""])
def test_the_declared_type_of_sqlite_changes_nothing(type_, table):
    """SQLite keeps text in a column of any type; the same rows come out."""
    rows = table("sqlite", type_)
    rows.fill([written(hour, ("iso", "zulu", "fraction")[n % 3]) for n, hour in enumerate(HOURS)])
    assert set(rows.rows()["n"]) == WITHIN


@pytest.mark.parametrize("type_", ["timestamptz", "timestamp", "date"])
def test_times_without_end_lie_outside_of_every_window(type_, database):
    """`infinity` has no counterpart in Python, and does no harm to a window that it is not in."""
    database(f"CREATE TABLE a (t {type_}, n integer); INSERT INTO a VALUES ('infinity', 1), ('-infinity', 2)")
    database("INSERT INTO a VALUES ('2013-01-02', 3)")
    assert read({"url": database.url, "table": "a"})["n"].to_list() == [3]


def test_a_column_that_sqlite_would_rename_is_refused(tmp_path):
    """Of a join that gives `n` twice, SQLite makes `n` and `n:1` where it is asked for part of it."""
    with sqlite3.connect(tmp_path / "a.db") as connection:
        connection.executescript("CREATE TABLE a (t, n); INSERT INTO a VALUES ('2013-01-02', 1)")
    query = "SELECT a.*, b.n FROM a JOIN a AS b USING (t)"
    error = refusal({"url": "sqlite:///a.db", "query": query}, folder=tmp_path)
    assert "column 'n' is there twice" in error.what
    named = query.replace("b.n", "b.n AS m")
    assert read({"url": "sqlite:///a.db", "query": named}, folder=tmp_path).columns == ["t", "n", "m"]


@pytest.mark.parametrize("name", ["*", "^x.*$"])
def test_a_column_of_times_whose_name_is_a_pattern(name, tmp_path):
    """Its times are read, whatever a library takes its name for."""
    with sqlite3.connect(tmp_path / "rows.db") as connection:
        connection.execute(f'CREATE TABLE rows (t TIMESTAMP, "{name}" TIMESTAMP)')
        connection.execute("INSERT INTO rows VALUES ('2013-01-02 03:00:00.000000', '2012-05-06 07:00:00.000000')")
    rows = read({"url": "sqlite:///rows.db", "table": "rows"}, folder=tmp_path)
    assert rows.rows() == [(datetime(2013, 1, 2, 3, tzinfo=UTC), datetime(2012, 5, 6, 7, tzinfo=UTC))]
