"""Rows become partitions: one canonical Parquet file per period, whose identity is the hash of its rows.

A partition is a function of its period's rows alone: whatever order and chunks a source hands them over in, and
whatever else it hands over beside them, the same rows give the same identity and the same bytes. (Rows of the same
types, that is: pandas makes a column of ints float in those frames where a value is missing.)

- Columns: event time first, the others sorted by name.
- Rows: sorted by event time, then by all other columns in that order.
- Types: bool, int (64 bits), float (64 bits, one NaN, no minus zero), string, datetime (microseconds, UTC; a naive
  time is taken as UTC), date. Categoricals become strings, decimals floats. A column without a value in the period has
  the type `null` there, and takes its type from other periods when they are read together.
- Types of one column may differ from period to period only as int and float do (then it is a float), or null and any.
- No digit of a whole number is lost: where float64 would round one, be it an int beside floats or a decimal, it is
  refused.

Nothing here knows the store: the ingest stage puts the files there.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen.columns import named, read, series, stacked
from evergreen.errors import SourceError, StageError, nearest
from evergreen.pack import Partition
from evergreen.run import Manifest, PartitionFile, Window, count, floor, period_name, periods, step

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl

Frame = Any
"""A polars or pandas DataFrame, a pyarrow Table or RecordBatch."""

BUDGET_BYTES = 256 * 2**20
"""Rows held in memory before they are spilled to disk, sorted out by period. One period must fit in memory."""

IDENTITY_KEY = "evergreen.identity"
"""Where a partition's Parquet metadata keeps its identity."""

TRUNCATE = {"hour": "1h", "day": "1d", "week": "1w", "month": "1mo"}


@dataclass(frozen=True)
class File:
    """A partition on this machine's disk."""

    period: datetime
    rows: int
    identity: str
    path: Path


@dataclass(frozen=True)
class Inexact:
    """A whole number that float64 would round, and where it stands."""

    where: str
    value: int


@dataclass(frozen=True)
class Written:
    """What a source held of a window: the partitions in order of time, and every column's type over all of them."""

    files: tuple[File, ...]
    columns: dict[str, str]
    inexact: dict[str, Inexact] = field(default_factory=dict)
    """Of each int column that has one, a whole number that float64 would round."""


def write(
    frames: Iterable[Frame],
    *,
    window: Window,
    partition: Partition,
    event_time: str,
    target: str,
    folder: Path,
    origin: str,
) -> Written:
    """Write the rows of `frames` as one Parquet file per period into `folder`; periods without rows have none.

    `origin` names the source in messages. Raises SourceError for: a missing event time or target, columns that differ
    between frames, types that cannot be kept, an event time that is null, no time, or outside `window` (those rows
    would be a look beyond as-of).
    """
    folder.mkdir(parents=True, exist_ok=True)
    spill = _Spill(folder / "spill", partition, event_time)
    columns: list[str] = []
    rows, nulls, first = 0, 0, ""
    for number, raw in enumerate(frames, start=1):
        where = f"{origin}: frame {number}"
        frame = _to_polars(raw, where)
        if not frame.width:  # pandas' empty frame: a period without rows
            continue
        require_columns(frame.columns, (event_time, target), where)
        same_columns(columns or frame.columns, frame.columns, where)
        columns = columns or frame.columns
        frame = with_event_time(frame, event_time, where)
        missing = series(frame, event_time).is_null()
        if missing.any() and not nulls:
            first = f"frame {number} at position {missing.arg_max()}"
        rows, nulls = rows + frame.height, nulls + int(missing.sum())
        if nulls:
            continue  # no row is kept, and all are counted
        _refuse_stray_times(frame, event_time, window, where)
        frame = _canonical(frame[[event_time, *sorted(set(columns) - {event_time})]], where)
        if frame.height:
            spill.add(frame)
    if nulls:
        raise SourceError(
            f"{origin}: event_time {event_time!r} is null in {count(nulls, 'row')}, the first in {first}",
            fix="fill it in the source, or leave those rows out there; those of a table by a source.query that ends in "
            f"WHERE {event_time} IS NOT NULL",
        )
    files: list[File] = []
    types: dict[str, str] = {}
    rounded: dict[str, Inexact] = {}
    for group in spill.groups(origin):
        for file, found, values in _write_group(group, partition, event_time, folder):
            files.append(file)
            where = f"{origin}: {period_name(file.period, partition)}"
            types = agree(types, found, where)
            rounded = {name: Inexact(where, value) for name, value in values.items()} | rounded
    require_exact(types, rounded)
    require_all_rows(f"{origin}: partitions", rows, sum(file.rows for file in files))
    shutil.rmtree(folder / "spill", ignore_errors=True)
    return Written(files=tuple(sorted(files, key=lambda file: file.period)), columns=types, inexact=rounded)


def write_one(frame: pl.DataFrame, *, period: datetime, event_time: str, path: Path) -> File:
    """Write rows of one period, of a partition read before, as a partition of their own: a clean one, say."""
    columns = [event_time, *sorted(set(frame.columns) - {event_time})]
    frame = _canonical(frame[columns], str(path)).sort(named(*columns))
    file, _, _ = _write_slice(frame, [_Bytes(frame[name]) for name in columns], slice(0, frame.height), period, path)
    return file


def load(paths: Iterable[Path], names: Sequence[str] | None = None) -> pl.DataFrame:
    """The rows of partitions, given in order of time, as one frame; a column takes the widest of its types.

    `names`: the columns to read, event time first; by default all.

    Raises SourceError where that would round a whole number.
    """
    frames = [read(path, names) for path in paths]
    require_exact_together(frames, lambda frame: f"the partition of {frame.item(0, 0):%Y-%m-%d %H:%M}")
    return _concat(frames)


# What to read, and what it makes of what is known: pure.


def to_read(known: Manifest | None, window: Window, partition: Partition, lookback: int) -> list[Window]:
    """The parts of `window` to read: periods not looked at before, and the last `lookback` others for late rows.

    Neighbouring periods are read together; the windows touch nowhere and lie within `window`.
    """
    covered = known.covered if known else None
    have = {period for period in periods(window, partition) if covered and covered.start <= period < covered.end}
    again = set(sorted(have)[len(have) - min(lookback, len(have)) :])
    windows: list[Window] = []
    for period in periods(window, partition):
        if period in have and period not in again:
            continue
        start, end = max(period, window.start), min(step(period, partition), window.end)
        if windows and windows[-1].end == start:
            start = windows.pop().start
        windows.append(Window(start=start, end=end))
    return windows


def merge(
    known: Manifest | None,
    written: Iterable[PartitionFile],
    columns: Mapping[str, str],
    read: Sequence[Window],
    window: Window,
    *,
    dataset: str,
    partition: Partition,
) -> tuple[Manifest, tuple[datetime, ...], int]:
    """The manifest of `window` after a reading, the known periods that changed, and how many partitions did not.

    `columns` are those of the reading. A partition whose identity is unchanged keeps its known entry, object included;
    one that was read again and is gone is dropped, and counts as changed. Raises SourceError where the reading's
    columns are not the known ones.
    """
    old = {part.period: part for part in known.within(_whole(window, partition))} if known else {}
    new = {part.period: part for part in written}
    looked = {period for part in read for period in periods(part, partition)}
    merged: dict[datetime, PartitionFile] = {period: part for period, part in old.items() if period not in looked}
    late = []
    for period in sorted(looked):
        before, now = old.get(period), new.get(period)
        if before is not None and (now is None or now.identity != before.identity):
            late.append(period)
        if now is not None:
            merged[period] = before if before is not None and before.identity == now.identity else now
    kept = [merged[period] for period in new if period in merged]
    require_all_rows(f"dataset {dataset}", sum(part.rows for part in new.values()), sum(part.rows for part in kept))
    types = dict(columns)
    if known is not None and old:
        first = period_name(min(new), partition) if new else "nothing"
        types = agree(known.columns, columns, f"dataset {dataset}: {first}, read now") if columns else known.columns
    parts = tuple(merged[period] for period in sorted(merged))
    covered = Window(start=_whole(window, partition).start, end=step(parts[-1].period, partition)) if parts else None
    manifest = Manifest(dataset=dataset, partition=partition, columns=types, partitions=parts, covered=covered)
    return manifest, tuple(late), sum(1 for part in parts if old.get(part.period) == part)


def agree(left: Mapping[str, str], right: Mapping[str, str], where: str) -> dict[str, str]:
    """The types that hold for two readings of the same columns. Raises SourceError where they cannot be the same."""
    if not left or not right:
        return dict(left or right)
    same_columns(list(left), list(right), where)
    return {name: _wider(name, left[name], right[name], where) for name in left}


def _wider(name: str, left: str, right: str, where: str) -> str:
    if right in (left, "null"):
        return left
    if left == "null":
        return right
    if {left, right} == {"int", "float"}:
        return "float"
    raise SourceError(
        f"{where}: column {name!r} is {right}, and {left} before",
        fix="give the column one type in the source; a new meaning deserves a new name. Where all of the window has the "
        "new type now, run once with --force, which reads the whole window again",
    )


def require_exact(types: Mapping[str, str], rounded: Mapping[str, Inexact]) -> None:
    """Raise SourceError for a column that is a float over the window and has a whole number that float64 would round."""
    for name, number in rounded.items():
        if types.get(name) == "float":
            raise SourceError(
                f"{number.where}: column {name!r} has the whole number {number.value}, and is a float elsewhere: together "
                f"they would be floats, which round it to {int(float(number.value))}",
                fix="make the column whole numbers everywhere (in pandas by the dtype Int64, which has missing values), or "
                "text everywhere; then run with --force, which reads all of the window again",
            )


def require_exact_together(frames: Sequence[pl.DataFrame], name: Callable[[pl.DataFrame], str]) -> None:
    """Raise SourceError where frames, put together, would round a whole number. `name` calls a frame in messages."""
    import polars as pl

    floats = {column for frame in frames for column, kind in frame.schema.items() if kind == pl.Float64}
    for frame in frames:
        for column, kind in frame.schema.items():
            if kind == pl.Int64 and column in floats and (value := inexact(frame[column])) is not None:
                require_exact({column: "float"}, {column: Inexact(name(frame), value)})


def inexact(integers: pl.Series) -> int | None:
    """The first of these whole numbers that float64 would round; None where it holds all."""
    numbers = integers.alias("numbers").drop_nulls().to_numpy()
    positions = _rounded(numbers)
    return int(numbers[positions.argmax()]) if positions.any() else None


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(n,) whether float64 would round each of these int64."""
    import numpy as np

    with np.errstate(invalid="ignore"):  # 2**63 is one too many for int64: not what it was, either
        return np.asarray((np.abs(values) > 2**53) & (values.astype(np.float64).astype(np.int64) != values))


def _whole(window: Window, partition: Partition) -> Window:
    """`window` from the start of its first period on."""
    return Window(start=floor(window.start, partition), end=window.end)


# Checks that sources and partitions share.


def require_all_rows(place: str, before: int, after: int) -> None:
    """Raise StageError where rows were lost or gained on the way: a fault of Evergreen, never of the data."""
    if before != after:
        raise StageError(
            f"{place}: {count(after, 'row')} of {count(before, 'row')} arrived",
            fix="this is a fault of Evergreen: report it with the run's id; the champion stays as it was",
        )


def require_columns(found: Iterable[str], wanted: Iterable[str], where: str) -> None:
    """Raise SourceError when a column that the pack names is not there."""
    found = list(found)
    for name in wanted:
        if name not in found:
            raise SourceError(f"{where} has no column {name!r}", fix=nearest(name, found))


def same_columns(expected: Sequence[str], found: Sequence[str], where: str) -> None:
    """Raise SourceError when the columns are not the expected ones, in whatever order; name what was renamed."""
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    if not missing and not extra:
        return
    parts = []
    if missing:
        parts.append(f"has no column {', '.join(map(repr, missing[:5]))}, which was there before")
    if extra:
        parts.append(f"has a column {', '.join(map(repr, extra[:5]))}, which was not there before")
    if missing and extra:
        fix = f"{missing[0]!r} may have been renamed ({nearest(missing[0], extra)}): give all of the source the same columns"
    else:
        fix = "give all of the source the same columns; for a dataset with other columns make another pack"
    raise SourceError(f"{where} {' and '.join(parts)}", fix=fix)


def with_event_time(frame: pl.DataFrame, event_time: str, where: str) -> pl.DataFrame:
    """`frame` with its event time in microseconds UTC; nulls stay. Raises SourceError when it is not a time."""
    import polars as pl

    kind = frame.schema[event_time]
    column = named(event_time)
    if isinstance(kind, pl.Datetime):
        utc = column.dt.convert_time_zone("UTC") if kind.time_zone else column.dt.replace_time_zone("UTC")
    elif kind == pl.Date:
        utc = column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    elif kind == pl.Null:
        utc = column.cast(pl.Datetime("us", "UTC"))
    elif kind in (pl.String, pl.Categorical, pl.Enum):
        text = series(frame, event_time).cast(pl.String)
        times = parse_times(text)
        if len(odd := text.filter(times.is_null() & text.is_not_null())):
            raise no_times(where, event_time, len(odd), odd[0])
        return frame.with_columns(times.alias(event_time))
    else:
        given = series(frame, event_time).drop_nulls()
        raise no_times(where, event_time, len(given), given[0] if len(given) else None, f"holds {kind} and no time")
    return frame.with_columns(utc.dt.cast_time_unit("us"))


TIME = (
    r"^(?<date>[0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[ T](?<hour>[01][0-9]|2[0-3])(?::(?<minute>[0-5][0-9])(?::(?<second>[0-5][0-9])(?:\.(?<fraction>[0-9]+))?)?)?"
    r"(?:Z|(?<sign>[+-])(?<hours>[01][0-9]|2[0-3])(?::?(?<minutes>[0-5][0-9]))?)?)? *$"
)
"""Times in ISO 8601: a date alone, or one with a time of day, with an offset from UTC or without."""


def parse_times(text: pl.Series) -> pl.Series:
    """Times of ISO 8601 text, in microseconds UTC; null where the text is no such time.

    A time without an offset is UTC; digits beyond microseconds are cut. Texts of one column may be written differently.
    """
    import polars as pl
    import pyarrow as pa
    import pyarrow.compute as pc

    values = text.to_arrow(compat_level=pl.CompatLevel.oldest())
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):  # fast where all are written alike
        with contextlib.suppress(pa.ArrowInvalid):
            pc.cast(values[:64], kind)  # Arrow is slow at failing on many
            times = pl.from_arrow(pc.cast(values, kind).cast(pa.timestamp("us", "UTC")))
            assert isinstance(times, pl.Series)
            return times.alias(text.name)
    part = pl.col("part").struct
    clock = pl.concat_str(
        part.field("date"),
        *(
            pl.lit(before) + part.field(name).fill_null("00")
            for before, name in (("T", "hour"), (":", "minute"), (":", "second"))
        ),
        pl.lit(".") + (part.field("fraction").fill_null("") + "000000").str.slice(0, 6),
    )
    offset = pl.duration(
        hours=part.field("hours").fill_null("0").cast(pl.Int64),
        minutes=part.field("minutes").fill_null("0").cast(pl.Int64),
    )
    naive = clock.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    utc = pl.when(part.field("sign") == "-").then(naive + offset).otherwise(naive - offset).dt.replace_time_zone("UTC")
    return (
        text.to_frame("text")
        .select(part=pl.col("text").str.extract_groups(TIME))
        .select(utc.alias(text.name))
        .to_series()
    )


WRITE_ISO = "write every time in ISO 8601, such as 2013-04-01T06:00:00Z"


def no_times(where: str, event_time: str, rows: int, example: object, what: str = "", fix: str = "") -> SourceError:
    """The error for an event time that is no time in `rows` rows."""
    shown = repr(example)
    shown = f", {shown if len(shown) <= 60 else shown[:59] + '…'} for one" if rows else ""
    return SourceError(
        f"{where}: event_time {event_time!r} {what or 'holds no time'} in {count(rows, 'row')}{shown}",
        fix=fix or f"make it a timestamp, or {WRITE_ISO}",
    )


def _refuse_stray_times(frame: pl.DataFrame, event_time: str, window: Window, where: str) -> None:
    column = named(event_time)
    stray = frame.filter((column < window.start) | (column >= window.end))
    if stray.height:
        example = stray[event_time][0]
        raise SourceError(
            f"{where}: {count(stray.height, 'row')} outside the window {window} that was asked for, "
            f"{event_time} = {example:%Y-%m-%d %H:%M:%S} for one",
            fix="return rows with window.start <= event_time < window.end only: later ones are not known yet at as-of",
        )


# Canonical frames.


def _to_polars(raw: Frame, where: str) -> pl.DataFrame:
    import polars as pl

    if isinstance(raw, pl.DataFrame):
        return raw
    library = type(raw).__module__.split(".")[0]
    if library == "pandas":
        require_unrounded(raw, where)
    if library not in ("pandas", "pyarrow"):
        raise SourceError(
            f"{where} is a {type(raw).__name__}", fix="hand over polars or pandas DataFrames, or pyarrow Tables"
        )
    try:
        frame = pl.from_pandas(raw) if library == "pandas" else pl.from_arrow(raw)
    except Exception as error:
        raise SourceError(
            f"{where} cannot be read as a table: {error}", fix="give every column one type and a name of its own"
        ) from error
    assert isinstance(frame, pl.DataFrame)
    return frame


def require_unrounded(frame: pd.DataFrame, where: str) -> None:
    """Raise SourceError for whole numbers that pandas has made float64, as it does where one is missing, and so rounded.

    They are told from measurements by what no measurement is: all whole, some past 2**53, some missing.
    """
    import numpy as np

    for name, column in frame.items():
        if column.dtype != np.float64 or not column.hasnans:
            continue
        values = column.to_numpy()
        values = values[np.isfinite(values)]
        if np.abs(values).max(initial=0.0) >= 2**53 and (values == np.floor(values)).all():
            value = int(values[np.abs(values).argmax()])
            raise SourceError(
                f"{where}: column {name!r} holds whole numbers as floats, {value} for one: past 2**53 float64 rounds them",
                fix=f"keep them whole from the start, with the dtype Int64 (pandas makes a column of integers float64 "
                f"where a value is missing); if they are no integers, say so: frame.astype({{{name!r}: 'Float64'}})",
            )


NOT_KEPT = {
    "List": "write one column per element, or one row",
    "Array": "write one column per element, or one row",
    "Struct": "write one column per field",
    "Binary": "decode it to text, or leave the column out",
    "Time": "write it as a number, seconds since midnight say",
    "Duration": "write it as a number of seconds",
    "Object": "give the column one type: bool, int, float, text, datetime or date",
}


def _canonical(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    """`frame` with every column of a canonical type."""
    import polars as pl

    columns = []
    for name, kind in frame.schema.items():
        column = named(name)
        if kind.is_integer():
            columns.append(column.cast(pl.Int64))
        elif kind.is_numeric():
            if kind.is_decimal():
                _require_exact_decimals(frame[name], where)
            number = column.cast(pl.Float64)
            one_zero = pl.when(number == 0).then(0.0)
            columns.append(one_zero.when(number.is_nan()).then(float("nan")).otherwise(number).alias(name))
        elif isinstance(kind, pl.Datetime):
            utc = column.dt.convert_time_zone("UTC") if kind.time_zone else column.dt.replace_time_zone("UTC")
            columns.append(utc.dt.cast_time_unit("us"))
        elif kind in (pl.String, pl.Categorical, pl.Enum):
            columns.append(column.cast(pl.String))
        elif kind in (pl.Boolean, pl.Date, pl.Null):
            columns.append(column)
        else:
            raise SourceError(
                f"{where}: column {name!r} holds {kind}, which a partition cannot keep",
                fix=NOT_KEPT.get(str(kind.base_type()), NOT_KEPT["Object"]),
            )
    try:
        return frame.select(columns)
    except pl.exceptions.InvalidOperationError as error:
        raise SourceError(
            f"{where}: a whole number does not fit in 64 bits: {str(error).splitlines()[0]}",
            fix="write the column as float or as text",
        ) from error


def _require_exact_decimals(column: pl.Series, where: str) -> None:
    """Raise SourceError for a decimal whose whole part float64 would round; fractions are rounded as all floats are."""
    import polars as pl

    numbers = column.alias("numbers")
    large = numbers.filter(numbers.cast(pl.Float64).abs() >= 2**53)
    for value in large.unique().to_list():
        if int(float(value)) != int(value):
            raise SourceError(
                f"{where}: column {column.name!r} has the decimal {value}: decimals become floats, which round it to "
                f"{int(float(value))}",
                fix="write the column as 64-bit integers, or as text",
            )


class _Spill:
    """Canonical frames: in memory up to `BUDGET_BYTES`, beyond that in Arrow files, mapped so that a look costs little."""

    def __init__(self, folder: Path, partition: Partition, event_time: str) -> None:
        self.folder = folder
        self.every = TRUNCATE[partition]
        self.event_time = event_time
        self.held: list[pl.DataFrame] = []
        self.held_bytes = 0
        self.mapped: list[pl.DataFrame] = []

    def add(self, frame: pl.DataFrame) -> None:
        self.held.append(frame)
        self.held_bytes += int(frame.estimated_size())
        if self.held_bytes > BUDGET_BYTES:
            self.folder.mkdir(exist_ok=True)
            for table in self._tables():
                file = self.folder / f"{len(self.mapped):06}.arrow"
                table.write_ipc(file)
                self.mapped.append(_map(file))
            self.held, self.held_bytes = [], 0

    def groups(self, origin: str) -> Iterator[pl.DataFrame]:
        """The rows in frames of one schema that hold whole periods: all at once, or in groups of about the budget."""
        tables = self.mapped + self._tables()
        if len(tables) <= 1:
            yield from tables
            return
        by_period: dict[datetime, list[pl.DataFrame]] = {}
        for table in tables:
            for rows, period in _runs(series(table, self.event_time), self.every):
                by_period.setdefault(period, []).append(table[rows])
        groups: dict[Schema, list[pl.DataFrame]] = {}
        grouped_bytes = 0
        for period in sorted(by_period):
            part = _join(by_period.pop(period), f"{origin}: {period:%Y-%m-%d %H:%M}")
            groups.setdefault(_schema(part), []).append(part)
            grouped_bytes += int(part.estimated_size())
            if grouped_bytes > BUDGET_BYTES:
                yield from map(_concat, groups.values())
                groups, grouped_bytes = {}, 0
        yield from map(_concat, groups.values())

    def _tables(self) -> list[pl.DataFrame]:
        """What is held in memory, as one frame per schema, in order of time."""
        by_schema: dict[Schema, list[pl.DataFrame]] = {}
        for frame in self.held:
            by_schema.setdefault(_schema(frame), []).append(frame)
        return [_concat(frames).sort(named(self.event_time)) for frames in by_schema.values()]


Schema = tuple[tuple[str, Any], ...]


def _schema(frame: pl.DataFrame) -> Schema:
    return tuple(frame.schema.items())


def _map(file: Path) -> pl.DataFrame:
    """An uncompressed Arrow file as a frame whose rows stay on disk until they are looked at."""
    import polars as pl
    import pyarrow as pa

    frame = pl.from_arrow(pa.ipc.open_file(pa.memory_map(str(file))).read_all(), rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _runs(times: pl.Series, every: str) -> Iterator[tuple[slice, datetime]]:
    """The runs of rows that lie in one period each, of times in order."""
    runs = times.dt.truncate(every).rle()
    start = 0
    for length, period in zip(runs.struct.field("len"), runs.struct.field("value"), strict=True):
        yield slice(start, start + length), period
        start += length


def _join(parts: Sequence[pl.DataFrame], where: str) -> pl.DataFrame:
    """Frames of one period as one, once their types are known to agree."""
    types: dict[str, str] = {}
    for part in parts if len(parts) > 1 else ():
        types = agree(types, {name: _kind(part[name]) for name in part.columns}, where)
    require_exact_together(parts, lambda _: where)
    return _concat(parts)


def _concat(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Frames of the same columns below one another, each column of the widest of its types."""
    import polars as pl

    return stacked(frames) if frames else pl.DataFrame()


def _kind(column: pl.Series) -> str:
    """The canonical type of a canonical column; `null` where it holds no value."""
    import polars as pl

    if column.null_count() == len(column):
        return "null"
    kinds = {pl.Boolean: "bool", pl.Int64: "int", pl.Float64: "float", pl.String: "string", pl.Date: "date"}
    return kinds.get(column.dtype.base_type(), "datetime")


def _write_group(
    group: pl.DataFrame, partition: Partition, event_time: str, folder: Path
) -> Iterator[tuple[File, dict[str, str], dict[str, int]]]:
    """Sort a frame of whole periods and write each of its periods."""
    group = group.sort(named(*group.columns))
    columns = [_Bytes(group[name]) for name in group.columns]
    for rows, period in _runs(series(group, event_time), TRUNCATE[partition]):
        yield _write_slice(group, columns, rows, period, folder / f"{period_name(period, partition)}.parquet")


def _write_slice(
    frame: pl.DataFrame, columns: Sequence[_Bytes], rows: slice, period: datetime, path: Path
) -> tuple[File, dict[str, str], dict[str, int]]:
    """Write `rows` of a sorted canonical frame as the partition of `period`.

    → it, its columns' types, and of each int column that has one a value that float64 would round.
    """
    import polars as pl

    types = {column.name: column.kind(rows) for column in columns}
    digest = hashlib.sha256(struct.pack("<QI", rows.stop - rows.start, len(columns)))
    for column in columns:
        column.feed(digest, rows)
    identity = digest.hexdigest()
    part = frame[rows].with_columns(named(name).cast(pl.Null) for name, kind in types.items() if kind == "null")
    part.write_parquet(path, compression="zstd", metadata={IDENTITY_KEY: identity})
    rounded = {column.name: value for column in columns if (value := column.inexact(rows)) is not None}
    return File(period=period, rows=part.height, identity=identity, path=path), types, rounded


class _Bytes:
    """One canonical column as the bytes that a partition's identity is the sha256 of, whatever library holds it.

    A partition's bytes are: number of rows (u64) and of columns (u32), then for each column its name and its type as
    length (u32) and UTF-8, and, unless the type is null: a bit per row, lowest first, whether there is a value; and
    the values, little-endian, zero where there is none. bool u8; int i64; float IEEE 754 double; datetime i64
    microseconds since 1970 UTC; date i32 days since 1970; string all lengths in bytes (i64), then all UTF-8.
    """

    def __init__(self, column: pl.Series) -> None:
        import numpy as np
        import polars as pl

        self.name = column.name
        column = column.alias("values")
        self.type = _kind(column)
        self.rounded: np.ndarray[Any, Any] | None = None
        self.valid: np.ndarray[Any, Any] = column.is_not_null().to_numpy()
        if self.type == "null":
            return
        if self.type == "string":
            column = column.fill_null("")
            self.values: np.ndarray[Any, Any] = column.str.len_bytes().to_numpy().astype("<i8")
            self.ends = np.concatenate([[0], np.cumsum(self.values)])
            self.text = "".join(column.to_list()).encode()
        else:
            width = {"bool": "u1", "float": "<f8", "date": "<i4"}.get(self.type, "<i8")
            plain = (
                column.to_physical()
                if self.type in ("date", "datetime")
                else column.cast(pl.UInt8)
                if self.type == "bool"
                else column
            )
            self.values = plain.fill_null(0).to_numpy().astype(width)
        self.rounded = _rounded(self.values) if self.type == "int" else None

    def inexact(self, rows: slice) -> int | None:
        """The first whole number in these rows that float64 would round; None where it holds all."""
        if self.rounded is None or not self.rounded[rows].any():
            return None
        return int(self.values[rows][self.rounded[rows].argmax()])

    def kind(self, rows: slice) -> str:
        """The canonical type in these rows; `null` where they hold no value."""
        return self.type if self.valid[rows].any() else "null"

    def feed(self, digest: hashlib._Hash, rows: slice) -> None:
        import numpy as np

        kind = self.kind(rows)
        for text in (self.name.encode(), kind.encode()):
            digest.update(struct.pack("<I", len(text)) + text)
        if kind == "null":
            return
        digest.update(np.packbits(self.valid[rows], bitorder="little").tobytes())
        digest.update(self.values[rows].tobytes())
        if kind == "string":
            digest.update(self.text[self.ends[rows.start] : self.ends[rows.stop]])
