"""Sources: where rows come from. One small class per kind; each streams the rows of a window, and never drops one.

`open_source(source, folder).read(window, event_time)` yields polars frames with the rows of
`window.start <= event_time < window.end`, in bounded memory, in whatever order and chunks the files give. Rows whose
event time is null come along too, so that `partitions.write` can refuse them. Paths may be local (relative ones are
under the pack's folder) or any fsspec URL, with `*` and `**`; over HTTP, where a folder can be listed only by a page of
links, `*` stands in the file's name alone.

A database is asked for the window alone, and its answer streamed. Credentials come by an Airflow connection that the
pack names, or from the environment; they are in no message.

A `python` source is not here: it runs as a job, and leaves Arrow files that `frames` reads.

Every failure is a SourceError that names the file or the table; an UnreachableError where trying again may do.
"""

from __future__ import annotations

import csv
import errno
import fnmatch
import math
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit
from uuid import UUID

from evergreen import pack
from evergreen.columns import named
from evergreen.data import partitions
from evergreen.errors import SourceError, UnreachableError, masked, nearest
from evergreen.run import Connect, Connection, Window, no_connections

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sqlalchemy as sa

BLOCK_BYTES = 8 * 2**20
"""A CSV is read in blocks of this size; no row may be longer."""
BATCH_ROWS = 65_536
SQL_ROWS = 16_384
"""Rows are fetched from a database in lots of so many, as Python objects."""
WIDE = 64
"""Tables with more columns are read in smaller batches of rows, so that memory stays bounded."""
COLUMN_BYTES = {"local": 2**16, "remote": 2**20}
"""How much of each Parquet column is read at once: from afar more, since every read there is a request."""
HTTP = ("http", "https")
S3 = ("s3", "s3a")
NETWORK = "check the address, the network and the credentials, and run again"
SILENCE_S = 60.0
"""How long an HTTP server may say nothing, within an answer too."""
CONNECT_S = 15
CONNECT_DRIVERS = ("psycopg", "psycopg2", "pymysql")
"""Database drivers that can be told how long to wait for a server; some would for minutes."""
ASKED = "check source in pack.yaml: the table or the query, and what the connection's user may read"
DRIVERS = {"postgres": "postgresql+psycopg", "postgresql": "postgresql+psycopg"}
"""Airflow's types of connection that SQLAlchemy knows by another name, or with a driver that is not installed here."""
REMOTE = ("aiohttp", "fsspec", "botocore", "aiobotocore")
PASSING = (
    "ClientConnectorError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServerDisconnectedError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "HTTPClientError",
)
"""What the libraries call a server that is away."""
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma")
"""CSV files with these endings are unpacked."""


class Source(Protocol):
    """Something that holds rows with a time each."""

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        """The rows of `window`, in chunks. Raises SourceError."""


def open_source(
    source: pack.Source,
    folder: Path,
    connect: Connect = no_connections,
    known: Mapping[str, str] = MappingProxyType({}),
) -> Source:
    """The source that a pack in `folder` describes; `connect` knows the connection it names. Opens nothing yet.

    `known` are the types that its columns had in earlier readings, for a source whose files declare none.
    """
    if isinstance(source, pack.PythonSource):
        raise TypeError(f"a {source.kind} source is read by a job")
    connection = connect(source.connection) if source.connection else None
    if isinstance(source, pack.SqlSource):
        return Sql(source, folder, connection)
    options = _options(source.path, connection) if connection else {}
    if isinstance(source, pack.ParquetSource):
        return Parquet(source.path, folder, options)
    return Csv(source.path, folder, options, source.separator, source.null_values, known)


def frames(folder: Path) -> Iterator[pl.DataFrame]:
    """The frames that a read job left in `folder`, as Arrow IPC files `*.arrow`, in the order of their names."""
    import polars as pl

    for file in sorted(folder.glob("*.arrow")):
        with _reading(str(file), "run it again; the job's log says what it wrote"):
            frame = pl.scan_ipc(file, glob=False).collect()
        yield frame


@dataclass(frozen=True)
class Parquet:
    """Rows from Parquet files. Row groups outside the window are not read where the file has statistics.

    A file without a row of the window decides nothing: it may have other columns and types. Its footer is read all the
    same, and it must have the event time.
    """

    path: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """How fsspec is to reach them."""

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        columns: list[str] = []
        for file in _files(self.path, self.folder, self.options):
            with _seekable(file) as opened:
                with _reading(file.name, "write the file again: it is not a whole Parquet file"):
                    table = self._table(opened, file)
                    schema = table.schema_arrow
                partitions.require_columns(schema.names, (event_time,), file.name)
                with _reading(file.name, "write the file again: it is damaged"):
                    groups = self._row_groups(opened, schema.field(event_time), window)
                # Not a dataset's scan, which holds whole row groups: here a batch costs a few pages of each column.
                batches = table.iter_batches(batch_size=_at_once(BATCH_ROWS, schema.names), row_groups=groups)
                while True:
                    with _reading(file.name, "write the file again: it is damaged"):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    _require_names(schema.names, file.name)
                    if (frame := _in_window(batch, window, event_time, file.name)).height:
                        columns = _check_columns(columns, schema.names, file.name)
                        yield frame

    def _table(self, opened: Any, file: _File) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        size = COLUMN_BYTES["local" if file.is_local else "remote"]
        return pq.ParquetFile(opened, buffer_size=size, pre_buffer=False, page_checksum_verification=True)

    def _row_groups(self, opened: Any, event_time: pa.Field, window: Window) -> list[int]:
        """The row groups that may hold rows of the window, by the file's statistics."""
        import pyarrow.dataset as ds

        fragment = ds.ParquetFileFormat().make_fragment(opened)
        wanted = _pushed_down(event_time, window)
        return [group.id for group in (fragment if wanted is None else fragment.subset(wanted)).row_groups]


@dataclass(frozen=True)
class Csv:
    """Rows from CSV files with a header line, compressed or not; quoted fields may hold line breaks.

    Each file is read twice: first for its types, then for its rows. A column is the first that all its values in the
    window can be: int, float, bool (true and false), date, time (ISO 8601, all with an offset or all without), else text.
    Rows outside decide nothing: neither types nor columns. Only their times are looked at, since every file must be read
    to learn what lies in it, and a time that cannot be read may be one of the window.
    """

    path: str
    folder: Path
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    separator: str = ","
    null_values: tuple[str, ...] = ("", "NA")
    known: Mapping[str, str] = field(default_factory=dict)
    """The types that columns had in earlier readings: a day of whole numbers in a column of text is text."""

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        import pyarrow as pa

        columns: list[str] = []
        for file in _files(self.path, self.folder, self.options):
            with _on_disk(file) as path:
                names = self._header(path, file.name)
                partitions.require_columns(names, (event_time,), file.name)
                types = self._types(path, names, window, event_time, file.name)
                if types is None:
                    continue
                columns = _check_columns(columns, names, file.name)
                for batch in self._batches(path, names, file.name):
                    times = partitions.parse_times(_column(batch, event_time))
                    rows = _rows(batch, times, window)
                    if rows.num_rows:
                        _require_exact(rows, types, file.name)
                        typed = [_cast(column, kind) for column, kind in zip(rows.columns, types, strict=True)]
                        yield _in_window(pa.record_batch(typed, names=names), window, event_time, file.name)

    def _header(self, path: Path, name: str) -> list[str]:
        with _reading(name, "save it as UTF-8, whole"), path.open(encoding="utf-8-sig", newline="") as file:
            names = next((row for row in csv.reader(file, delimiter=self.separator) if row), None)
        if names is None:
            raise SourceError(f"{name} is empty", fix="write a header line, or leave the file out of the path")
        _require_names(names, f"{name}:1")
        return names

    def _types(
        self, path: Path, names: list[str], window: Window, event_time: str, name: str
    ) -> list[pa.DataType] | None:
        """The type of each column over the file's rows of the window, null without values; None where there is no row."""
        import pyarrow as pa

        types = [pa.null()] * len(names)
        rows, strange, example = 0, 0, None
        for batch in self._batches(path, names, name):
            text = _column(batch, event_time)
            times = partitions.parse_times(text)
            odd = text.filter(times.is_null() & text.is_not_null())
            strange, example = strange + len(odd), example or (odd[0] if len(odd) else None)
            within = _rows(batch, times, window)
            rows += within.num_rows
            types = [_both(kind, _type_of(column)) for kind, column in zip(types, within.columns, strict=True)]
        _require_closed_quotes(path, self.separator, name)
        if strange:
            raise partitions.no_times(name, event_time, strange, example)
        if not rows:
            return None
        types[names.index(event_time)] = pa.string()
        return [_as_known(kind, self.known.get(column)) for column, kind in zip(names, types, strict=True)]

    def _batches(self, path: Path, names: list[str], name: str) -> Iterator[pa.RecordBatch]:
        """The file's rows, all as text, nulls as such."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        fix = "mend the row: it has too many or too few fields, an unclosed quote or bytes that are not UTF-8"
        with _reading(name, fix):
            reader = arrow_csv.open_csv(
                path,
                read_options=arrow_csv.ReadOptions(block_size=BLOCK_BYTES),
                parse_options=arrow_csv.ParseOptions(delimiter=self.separator, newlines_in_values=True),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=True,
                    null_values=list(self.null_values),
                ),
            )
        while True:
            with _reading(name, fix):
                batch = next(reader, None)
            if batch is None:
                return
            yield batch


@dataclass(frozen=True)
class Sql:
    """Rows of a table, a view or a query of a database.

    Types are those that the table declares; of a query, those that its driver gives. Decimals become floats, UUIDs text.
    The window is part of what is asked, in the type that the event time has there: a time with a zone, one without
    (UTC), a date, or text in ISO 8601, which is all that SQLite has. Event times that are neither are counted over the
    whole table and refused: nobody knows which window they belong to.
    """

    source: pack.SqlSource
    folder: Path
    connection: Connection | None = None

    def read(self, window: Window, event_time: str) -> Iterator[pl.DataFrame]:
        name = self._name()
        with self._connected(name) as connection:
            with self._asking(name):
                rows, time = self._rows(connection, name, event_time)
                kind = _kind(connection, rows, time)
                self._require_times(connection, rows, time, kind, event_time)
                answer = connection.execution_options(yield_per=SQL_ROWS).execute(
                    rows.where(_asked(connection, time, kind, window))
                )
                names, batches = list(answer.keys()), answer.partitions()
            while True:
                with self._asking(name):
                    batch = next(batches, None)
                if batch is None:
                    return
                if (frame := _in_window(_typed(batch, names, name), window, event_time, name)).height:
                    yield frame

    def _rows(self, connection: sa.Connection, name: str, event_time: str) -> tuple[sa.Select[Any], Any]:
        """A statement for all rows, and the event time as the database has it."""
        import sqlalchemy as sa

        lite = connection.dialect.name == "sqlite"
        if self.source.query is not None:
            query = self.source.query.strip().rstrip(";")
            # A colon in it begins no parameter of ours; a comment may end its last line.
            inner = query.replace(":", r"\:")
            rows = sa.select(sa.text("*")).select_from(sa.text(f"(\n{inner}\n) AS source"))
            # SQLite calls the second of two columns `x` of an inner query `x:1`.
            asked = sa.text(inner) if lite else rows.where(sa.false())
            with connection.execute(asked) as answer:
                names = list(answer.keys())
            time: Any = sa.column(event_time)
        else:
            schema, _, table = str(self.source.table).rpartition(".")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sa.exc.SAWarning)  # a type that is not known is as its driver gives it
                try:
                    columns = sa.Table(
                        table, sa.MetaData(), schema=schema or None, autoload_with=connection, resolve_fks=False
                    ).columns
                except sa.exc.NoSuchTableError:
                    inspector = sa.inspect(connection)
                    known = [
                        *inspector.get_table_names(schema or None),
                        *inspector.get_view_names(schema or None),
                    ]
                    raise SourceError(f"{name} does not exist", fix=nearest(table, known)) from None
            names = list(columns.keys())
            time = columns.get(event_time)
            # SQLite keeps any value in a column of any type, so that the event time is read as it is.
            rows = sa.select(
                *(
                    sa.type_coerce(column, sa.types.NullType()).label(key) if lite and key == event_time else column
                    for key, column in columns.items()
                )
            )
        partitions.require_columns(names, (event_time,), name)
        if twice := sorted({column for column in names if names.count(column) > 1}):
            raise SourceError(f"{name}: column {twice[0]!r} is there twice", fix="name each column of the query")
        return rows, sa.type_coerce(time, sa.types.NullType())

    def _require_times(
        self, connection: sa.Connection, rows: sa.Select[Any], time: Any, kind: TimeKind, event_time: str
    ) -> None:
        """Raise SourceError for event times that no window would hold, since they are no times.

        Costs one scan for each window that is read where the event time is text, an index on it or not: about a second
        for a million rows of SQLite or PostgreSQL, on two cores in use. Costs nothing where it is a time. Text that begins
        with a date has its place; the rest of it is looked at in its window only.
        """
        import sqlalchemy as sa

        iso = _is_iso(connection, time) if kind == "text" else sa.false() if kind == "other" else None
        if iso is None:
            return
        odd = sa.and_(time.is_not(None), sa.not_(iso))
        if number := connection.scalar(rows.with_only_columns(sa.func.count()).where(odd)):
            example = connection.scalar(rows.with_only_columns(time).where(odd).limit(1))
            quoted = connection.dialect.identifier_preparer.quote(event_time)
            fix = _time_fix(connection.dialect.name, quoted, example)
            raise partitions.no_times(self._name(), event_time, number, example, fix=fix)

    def _url(self) -> sa.URL:
        import sqlalchemy as sa

        if self.source.url is not None:
            url = sa.make_url(self.source.url)
        else:
            told = self.connection
            assert told is not None, "open_source found it"
            is_file = told.kind == "sqlite"
            url = sa.URL.create(
                DRIVERS.get(told.kind, told.kind),
                username=told.login or None,
                password=told.password or None,
                host=None if is_file else told.host or None,
                port=told.port,
                database=(told.schema or told.host if is_file else told.schema) or None,
                query={key: str(value) for key, value in told.extra.items()},
            )
        if url.get_backend_name() == "sqlite":
            file = self.folder / (url.database or "")
            if not file.is_file():  # SQLite would make it
                raise SourceError(f"{file} does not exist", fix="check source in pack.yaml: it names an SQLite file")
            url = url.set(database=str(file))
        return url

    def _name(self) -> str:
        """As messages call it."""
        what = f"table {self.source.table}" if self.source.table else "the query"
        where = f"{self.connection.name} ({self.connection.place})" if self.connection else self.source.url
        return f"{what} of {where}"

    @contextmanager
    def _connected(self, name: str) -> Iterator[sa.Connection]:
        """A connection for one reading. Nothing is ever committed."""
        import sqlalchemy as sa

        with self._asking(name):
            try:
                url = self._url()
                waits = {"connect_timeout": CONNECT_S} if url.get_driver_name() in CONNECT_DRIVERS else {}
                engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args=waits)
            except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as error:
                raise SourceError(
                    f"{name}: SQLAlchemy has no driver for it: {error}",
                    fix="install the driver beside Evergreen, or check the type of the connection or the URL",
                ) from error
            try:
                connection = engine.connect()
            except sa.exc.DBAPIError as error:
                words = self._words(error)
                raise UnreachableError(f"{name} cannot be reached: {words}", fix=NETWORK) from error
        with connection:
            yield connection

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        import sqlalchemy as sa

        try:
            yield
        except SourceError:
            raise
        except sa.exc.DBAPIError as error:
            words = self._words(error)
            if error.connection_invalidated:
                raise UnreachableError(f"{name}: the connection broke: {words}", fix=NETWORK) from error
            raise SourceError(f"{name} cannot be read: {words}", fix=ASKED) from error
        except Exception as error:
            raise SourceError(f"{name} cannot be read: {self._words(error)}", fix=ASKED) from error

    def _words(self, error: Exception) -> str:
        """What the database says, on one line, without the statement and without secrets."""
        said = " ".join(str(getattr(error, "orig", None) or error).split())[:300] or type(error).__name__
        return self.connection.without_secrets(said) if self.connection else said


TimeKind = Literal["zoned", "naive", "date", "text", "none", "other"]


def _kind(connection: sa.Connection, rows: sa.Select[Any], time: Any) -> TimeKind:
    """The kind of values that the event time has in the database; `none` where no row has a value."""
    import sqlalchemy as sa

    if connection.dialect.name == "sqlite":  # it has no times, and its columns no types
        return "text"
    one = rows.with_only_columns(time).where(time.is_not(None)).limit(1)
    if connection.dialect.name == "postgresql":  # by name: Python has no value for `infinity`
        named = connection.scalar(rows.with_only_columns(sa.cast(sa.func.pg_typeof(time), sa.Text)).limit(1))
        names: dict[str | None, TimeKind] = {
            "timestamp with time zone": "zoned",
            "timestamp without time zone": "naive",
            "date": "date",
        }
        if kind := names.get(named):
            return kind
    sample = connection.scalar(one)
    if isinstance(sample, datetime):
        return "naive" if sample.tzinfo is None else "zoned"
    kinds: tuple[tuple[type, TimeKind], ...] = ((date, "date"), (str, "text"), (type(None), "none"))
    return next((kind for type_, kind in kinds if isinstance(sample, type_)), "other")


def _asked(connection: sa.Connection, time: Any, kind: TimeKind, window: Window) -> Any:
    """The window as a condition on `time`; rows without a time belong to it.

    It may let more through, which `_in_window` sees to: a date is a whole day, and text may have an offset of a day.
    """
    import sqlalchemy as sa

    type_: Any
    start: Any = window.start.astimezone(UTC)
    end: Any = window.end.astimezone(UTC)
    if kind == "zoned":
        type_ = sa.DateTime(timezone=True)
    elif kind == "naive":
        type_, start, end = sa.DateTime(), start.replace(tzinfo=None), end.replace(tzinfo=None)
    elif kind == "date":
        type_, start, end = sa.Date(), start.date(), end.date() + timedelta(days=1)
    elif kind == "text" and _is_iso(connection, time) is not None:
        type_, start, end = sa.String(), str(start.date() - timedelta(days=1)), str(end.date() + timedelta(days=2))
    else:
        return sa.true()
    bounds = sa.and_(time >= sa.bindparam("start", start, type_), time < sa.bindparam("end", end, type_))
    return sa.or_(bounds, time.is_(None))


def _is_iso(connection: sa.Connection, time: Any) -> Any:
    """The condition that text begins with a date in ISO 8601, whose order is that of time; None where it cannot be put."""
    import sqlalchemy as sa

    if connection.dialect.name == "sqlite":
        digits = time.op("GLOB")("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*")
        day = sa.func.date(sa.func.substr(time, 1, 10), type_=sa.types.NullType())
        return sa.and_(sa.func.typeof(time) == "text", digits, day.is_not(None))
    condition = time.regexp_match("^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])")
    try:
        sa.select(condition).compile(dialect=connection.dialect)
    except sa.exc.CompileError:
        return None  # a database without regular expressions is read whole, and every row looked at here
    return condition


def _time_fix(dialect: str, column: str, example: Any) -> str:
    """Advice on times that a database has as numbers or as text in an order of its own."""
    if isinstance(example, int | float | Decimal):
        in_ms = abs(float(example)) > 1e11  # as seconds since 1970, after the year 5138
        seconds = f"{column} / 1000.0" if in_ms else column
        calls = {
            "sqlite": f"strftime('%Y-%m-%d %H:%M:%f', {seconds}, 'unixepoch')",
            "postgresql": f"to_timestamp({seconds})",
        }
    else:
        calls = {"postgresql": f"to_timestamp({column}, 'DD.MM.YYYY HH24:MI')"}
    call = f", such as SELECT {calls[dialect]} AS {column}, … FROM …" if dialect in calls else ""  # noqa: S608  advice, executed by nobody
    return f"{partitions.WRITE_ISO}, in the table or by a query in source.query{call}"


def _typed(rows: Sequence[Sequence[Any]], names: list[str], where: str) -> pa.RecordBatch:
    """Rows of Python objects as columns of one type each."""
    import polars as pl
    import pyarrow as pa

    columns = []
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        kinds = set(map(type, values)) - {type(None)}
        column: list[Any] = list(values)
        if kinds <= {int, float, Decimal} and len(kinds - {int}) > 0:
            column = [None if value is None else _as_float(value, f"{where}: column {name!r}") for value in values]
        elif kinds == {UUID}:
            column = [None if value is None else str(value) for value in values]
        elif kinds == {datetime}:
            column = [None if value is None else _in_utc(value) for value in values]
        elif len(kinds) > 1:
            shown = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise SourceError(
                f"{where}: column {name!r} holds values of several types: {shown}", fix="cast it to one in a query"
            )
        try:
            series = pl.Series(column, strict=True)  # without its name, which polars may take for a pattern
        except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
            raise SourceError(
                f"{where}: column {name!r}: {error}", fix="cast it in a query, or leave it out"
            ) from error
        columns.append(series.to_arrow(compat_level=pl.CompatLevel.oldest()))
    return pa.record_batch(columns, names=names)


def _as_float(value: float | Decimal, what: str) -> float:
    """A number of a column that is not all integers. Raises SourceError where digits of its whole part would be lost."""
    number = float(value)
    if math.isfinite(number) and abs(number) >= 2**53 and int(number) != int(value):
        raise SourceError(
            f"{what} has the number {value} among others that are no integers: as floats they would round it to {int(number)}",
            fix="cast the column to bigint, or to text, in a query",
        )
    return number


def _in_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Files.


def _options(path: str, connection: Connection) -> dict[str, Any]:
    """What an Airflow connection says to fsspec about the file system of `path`. Raises SourceError."""
    protocol = path.partition("://")[0]
    if protocol in S3:
        told = {**connection.extra}
        options = {
            "key": connection.login or None,
            "secret": connection.password or None,
            "token": told.pop("aws_session_token", None),
            "endpoint_url": told.pop("endpoint_url", None),
            "client_kwargs": {"region_name": told.pop("region_name", None)},
        }
        if told:
            raise SourceError(
                f"connection {connection.name!r}: {', '.join(sorted(told))} of its extra is not understood",
                fix="give key and secret, and in extra region_name, endpoint_url, aws_session_token; for another way "
                "of signing in leave source.connection out: AWS's own variables and roles then count",
            )
        return options
    if protocol in HTTP:
        import aiohttp

        signs_in = {"auth": aiohttp.BasicAuth(connection.login, connection.password or "")} if connection.login else {}
        headers = {name: str(value) for name, value in connection.extra.items()}
        return {"client_kwargs": {**signs_in, "headers": headers}}
    raise SourceError(
        f"connection {connection.name!r}: {protocol}:// takes its credentials from the environment",
        fix="leave source.connection out of pack.yaml; it serves s3:// and http(s)://",
    )


@dataclass(frozen=True)
class _File:
    """A file of an fsspec file system."""

    system: Any
    path: str
    name: str
    """As messages call it: the local path, or the URL without what may be secret in it."""

    @property
    def is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.system, LocalFileSystem)

    @property
    def is_http(self) -> bool:
        return bool(self.system.protocol == HTTP)

    @property
    def ending(self) -> str:
        """What of its path tells how it is packed; a URL may have more behind it, as in `a.csv.gz?signature=…`."""
        return urlsplit(self.path).path if self.is_http else self.path


def _files(path: str, folder: Path, options: Mapping[str, Any]) -> list[_File]:
    """The files that `path` means, in the order of their names. Raises SourceError when there is none."""
    import fsspec

    url = path if "://" in path or "::" in path else str(folder / path)
    shown = _shown(url)
    with _reading(shown, NETWORK):
        protocol = url.partition("://")[0]
        own: dict[str, Any] = {"get_client": _client} if protocol in HTTP else {}
        if protocol in S3:
            own["use_listings_cache"] = False  # what was there a run ago need not be now
        system, inside = fsspec.core.url_to_fs(url, **own, **options)
        file = _File(system, inside, shown)
        if file.is_local:
            paths = _matching(Path(inside))
            if paths == [Path(inside)] and Path(inside).is_dir():
                raise SourceError(f"{shown} is a folder", fix="end source.path in /*.parquet, /**/*.csv or the like")
            files = [_File(system, str(found), str(found)) for found in paths if not found.is_dir()]
        else:
            magic = "*[" if file.is_http else "*?["  # in a URL, `?` begins the query
            if not set(magic) & set(inside):
                return [file]
            if file.is_http and set(magic) & set(inside.rpartition("/")[0]):
                raise SourceError(f"{shown}: HTTP has no folders to look through", fix="use * in the file's name only")
            entries = system.glob(inside, detail=True, **({"on_error": "raise"} if file.is_http else {}))
            files = [
                _File(system, name, _shown(system.unstrip_protocol(name)))
                for name, info in sorted(entries.items())
                if info["type"] != "directory"
            ]
    if not files:
        links = "; over HTTP, the folder must answer with a page that links to its files" if file.is_http else ""
        raise SourceError(f"{shown} matches no file", fix=f"check source.path in pack.yaml{links}")
    return files


def _matching(pattern: Path) -> list[Path]:
    """The local files and folders that a path with `*`, `**`, `?` and `[…]` means, in the order of their names.

    A name that is there as it is written means itself, brackets and question marks included. A path without any of these
    signs means itself, there or not. Raises PermissionError for a folder that may not be read: its files would be missing.
    """
    if not set("*?[") & set(str(pattern)):
        return [pattern]
    return sorted(_matching_below(Path(pattern.anchor or "."), pattern.parts[1:] if pattern.anchor else pattern.parts))


def _matching_below(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if "*" not in part and _is_there(folder / part):
        yield from _matching_below(folder / part, rest)
    elif part == "**":
        yield from _matching_below(folder, rest or ("*",))
        for entry in folder.iterdir():
            if entry.is_dir() and not (entry.is_symlink() and folder.is_relative_to(entry.resolve())):
                yield from _matching_below(entry, parts)
    elif set("*?[") & set(part) and folder.is_dir():
        for entry in folder.iterdir():
            if fnmatch.fnmatchcase(entry.name, part):
                yield from _matching_below(entry, rest)


def _is_there(path: Path) -> bool:
    """Return True for a file, a folder or a link. Raises PermissionError where this cannot be known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(path.parent)) from None
    return True


def _shown(url: str) -> str:
    """A URL without its password, and over HTTP without its query, which may be a signature; a path as it is."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    shown = masked(url)
    return f"{shown.partition('?')[0]}?…" if parts.query and parts.scheme in HTTP else shown


async def _client(**options: Any) -> Any:
    """An HTTP session that waits as long as bytes come; aiohttp's own ends every download after five minutes."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S / 2, sock_read=SILENCE_S)
    return aiohttp.ClientSession(**{"timeout": timeout, **options})


@contextmanager
def _seekable(file: _File) -> Iterator[Any]:
    """The file, open, where any part of it can be read; a copy on disk where an HTTP server sends only all of it.

    A file of an HTTP server that is another one at the end is refused: what was read may be of both.
    """
    import pyarrow as pa

    if file.is_http and not _sends_parts(file):
        with _on_disk(file) as path, pa.OSFile(str(path)) as copy:
            yield copy
        return
    with _reading(file.name, NETWORK):
        before = _edition(file)
        # Columns are read in turns: what a cache would read ahead of one is in the way of the next.
        opened = pa.OSFile(file.path) if file.is_local else file.system.open(file.path, "rb", cache_type="none")
    with opened:
        yield opened
    with _reading(file.name, NETWORK):
        if _edition(file) != before:
            raise SourceError(f"{file.name} was replaced while it was read", fix="run again")


def _sends_parts(file: _File) -> bool:
    """Whether the server sends a part of the file when asked for one."""
    with _reading(file.name, NETWORK), file.system.open(file.path, "rb", cache_type="none") as opened:
        try:
            opened.seek(1)
            return len(opened.read(1)) == 1
        except ValueError:  # it sends all of it, or does not say how much there is
            return False


def _edition(file: _File) -> list[Any]:
    """What a server says of which file it is; of an open local file nothing is needed, since it stays what it is."""
    info = {} if file.is_local else file.system.info(file.path)
    return [info.get(name) for name in ("size", "ETag", "Last-Modified", "LastModified")]


@contextmanager
def _on_disk(file: _File) -> Iterator[Path]:
    """The file as plain bytes on this machine's disk: itself, or a copy that is fetched, unpacked, and removed after."""
    if file.ending.endswith(".zip"):
        raise SourceError(f"{file.name} is an archive", fix="unpack it, or compress each file with gzip, bzip2 or xz")
    compressed = file.ending.endswith(COMPRESSED)
    if file.is_local and not compressed:
        yield Path(file.path)
        return
    from fsspec.utils import infer_compression

    how: dict[str, Any] = {"compression": infer_compression(file.ending) if compressed else None}
    if file.is_http:
        how["block_size"] = 0  # one request for all of it, so that it is one version of the file
    with tempfile.NamedTemporaryFile(suffix=".csv") as copy:
        with (
            _reading(file.name, "write the file again, or check the network; it cannot be fetched and unpacked whole"),
            file.system.open(file.path, "rb", **how) as packed,
        ):
            shutil.copyfileobj(packed, copy, BLOCK_BYTES)
        copy.flush()
        yield Path(copy.name)


@contextmanager
def _reading(name: str, fix: str) -> Iterator[None]:
    """Turn what a library raises while it reads `name` into a SourceError."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        said = (getattr(each, "status", None) for each in (error, error.__cause__))
        status = next((code for code in said if isinstance(code, int)), None)
        kind = UnreachableError if _is_passing(error, status) else SourceError
        if status is not None:  # an HTTP server's; its words may hold the URL
            what = f"{name} cannot be read: the server answers {status}"
            fix = NETWORK if status < 500 else "run again when the server is well"
        elif isinstance(error, FileNotFoundError) and "://" in name:  # said of a refused connection too
            what, fix = f"{name} does not exist or cannot be reached", NETWORK
        elif isinstance(error, FileNotFoundError):
            what, fix = f"{name} does not exist", "check source.path in pack.yaml"
        elif isinstance(error, PermissionError):
            what, fix = (
                f"{error.filename or name} may not be read by this user",
                "grant read access to it; to a folder, the right to enter it, too",
            )
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
            what = f"{name} cannot be fetched: the disk of {tempfile.gettempdir()} is full"
            fix = "make room there, or point TMPDIR at a larger disk"
        else:
            if kind is UnreachableError or type(error).__module__.partition(".")[0] in REMOTE:
                fix = NETWORK  # the file need not be to blame
            what = f"{name} cannot be read: {' '.join(str(error).split())[:300] or type(error).__name__}"
        raise kind(what, fix=fix) from error


def _is_passing(error: BaseException, status: int | None) -> bool:
    """Whether it may go well the next time: a server that is away, overloaded or unwell."""
    if status is not None:
        return status >= 500 or status in (408, 429)
    causes = (error, error.__cause__, error.__context__)
    return any(
        isinstance(each, ConnectionError | TimeoutError)
        or (isinstance(each, OSError) and each.errno in (errno.EBUSY, errno.EIO, errno.ETIMEDOUT))
        or (type(each).__module__.partition(".")[0] in REMOTE and type(each).__name__ in PASSING)
        for each in causes
    )


# Rows.


def _check_columns(columns: list[str], names: list[str], name: str) -> list[str]:
    """The columns that every file with rows of the window must have: those of the first such file."""
    partitions.same_columns(columns or names, names, name)
    return columns or names


def _require_names(names: list[str], name: str) -> None:
    if twice := sorted({column for column in names if names.count(column) > 1}):
        raise SourceError(f"{name}: column {twice[0]!r} is there twice", fix="give every column a name of its own")


def _column(batch: pa.RecordBatch, name: str) -> pl.Series:
    import polars as pl

    column = pl.from_arrow(batch.column(name))
    assert isinstance(column, pl.Series)
    return column.alias(name)


def _rows(batch: pa.RecordBatch, times: pl.Series, window: Window) -> pa.RecordBatch:
    """The batch's rows of the window, and those without a time."""
    return batch.filter((times.is_null() | ((times >= window.start) & (times < window.end))).to_arrow())


def _at_once(rows: int, columns: Collection[Any]) -> int:
    """Return the number of rows in a batch of a table with these columns."""
    return max(1, rows * WIDE // max(WIDE, len(columns)))


def _in_window(batch: pa.RecordBatch, window: Window, event_time: str, name: str) -> pl.DataFrame:
    """The batch's rows of the window, and those without a time."""
    import polars as pl

    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    frame = partitions.with_event_time(frame, event_time, name)
    time = named(event_time)
    return frame.filter(time.is_null() | ((time >= window.start) & (time < window.end)))


def _pushed_down(field: pa.Field, window: Window) -> Any:
    """The window as a filter for row groups and rows, where the event time is a timestamp; else none."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    if not pa.types.is_timestamp(field.type):
        return None
    bounds = [
        pa.scalar(
            bound if field.type.tz else bound.astimezone(UTC).replace(tzinfo=None), pa.timestamp("us", field.type.tz)
        )
        for bound in (window.start, window.end)
    ]
    time = ds.field(field.name)
    return time.is_null() | ((time >= bounds[0]) & (time < bounds[1]))


def _type_of(column: pa.Array) -> pa.DataType:
    """The narrowest type that all of a text column's values have; null when there is none."""
    import pyarrow as pa

    if column.null_count == len(column):
        return pa.null()
    for kind in (pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        # A few values first: Arrow is slow at failing on many.
        if _fits(column[:64], kind) and _fits(column, kind):
            return kind
    return pa.string()


def _both(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """The narrowest type that holds the values of two."""
    import pyarrow as pa

    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    for wide, narrow in ((pa.float64(), pa.int64()), (pa.timestamp("us"), pa.date32())):
        if {left, right} == {wide, narrow}:
            return wide
    return pa.string()


def _as_known(kind: pa.DataType, known: str | None) -> pa.DataType:
    """The type of a column that had a type before: the known one, where it holds these values as well."""
    import pyarrow as pa

    if pa.types.is_null(kind) or known == "string":
        return pa.string() if known == "string" else kind
    if known == "float" and pa.types.is_integer(kind):
        return pa.float64()
    return pa.timestamp("us") if known == "datetime" and pa.types.is_date(kind) else kind


def _fits(column: pa.Array, kind: pa.DataType) -> bool:
    import pyarrow as pa

    try:
        _cast(column, kind)
    except pa.ArrowInvalid:
        return False
    return True


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pa.nulls(len(column)) if pa.types.is_null(kind) else pc.cast(column, kind)


def _require_exact(batch: pa.RecordBatch, types: Sequence[pa.DataType], name: str) -> None:
    """Raise SourceError for digits of a column of text that is to become float64, and would round them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for column, kind, header in zip(batch.columns, types, batch.schema.names, strict=True):
        if not pa.types.is_floating(kind) or (pc.max(pc.binary_length(column)).as_py() or 0) < 16:
            continue
        for text in column.filter(pc.match_substring_regex(column, r"^[+-]?\d{16,}$")).to_pylist():
            if text is not None and int(text) != int(float(text)):
                raise SourceError(
                    f"{name}: column {header!r} holds numbers, {text} for one, which as float64 would be {int(float(text))}",
                    fix="a CSV has no types: write such a column as text, id-1 instead of 1, leave it out, or use Parquet",
                )


def _require_closed_quotes(path: Path, separator: str, name: str) -> None:
    """Raise SourceError when the file ends within a quoted field, which the Arrow reader takes for the field's end.

    An even number of quotes is closed; only otherwise are the rows read once more, by a reader that counts lines.
    """
    with path.open("rb") as file:
        quotes = sum(block.count(b'"') for block in iter(lambda: file.read(BLOCK_BYTES), b""))
    if quotes % 2 == 0:
        return
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter=separator, strict=True)
        start = 1
        try:
            for _ in rows:
                start = rows.line_num + 1
        except csv.Error as error:
            raise SourceError(
                f"{name}:{start}: a quoted field is not closed: {error}",
                fix="the file may have been cut: copy it again, or close the quote",
            ) from error
