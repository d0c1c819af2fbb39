"""What the columns of a window look like, in a few kilobytes each, merged from the profiles of its parts.

A profile is a function of its rows: in whatever order they come, the same rows give the same bytes, and a merge gives
the same bytes whatever the order of the parts. So it can be named by its hash, and found again.

**Numbers and times** are points: sorted values, and how many rows each stands for. Up to `POINTS` distinct values, that
is all of them, and everything read from them is exact. Beyond, the rows in order are cut into `BUCKETS` buckets of as
many rows each. A value that fills a bucket alone keeps its exact count, and so do the smallest and the largest; the rest
of a bucket becomes its median. `slack` is the number of rows by which the rank of any value may be off: found while
cutting, and added up in merging. As a share, `rank_error`, cutting costs at most 1 / `BUCKETS`, 0.2 %, and half of that
where few values repeat; a profile has been cut once, a merge of any number of profiles once more. So merge many at once.

**Categories and booleans** are counts: of up to `NAMES` of them, all; beyond, of the most frequent, and `slack` is the
number of rows by which any category, kept or not, may be understated.

**Distinct values** are counted where all are kept, else estimated from the `HASHES` smallest hashes, with a standard
error of 4 %.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evergreen.errors import SourceError, StoreError
from evergreen.run import canonical_json

if TYPE_CHECKING:
    import polars as pl

Kind = Literal["number", "time", "boolean", "category", "null"]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Hashes = NDArray[np.uint64]

POINTS = 1024
"""Values kept of a number or time."""

BUCKETS = POINTS // 2 - 1
"""Buckets that more values are cut into: each leaves one median at most, and one value that fills a bucket."""

NAMES = 512
"""Categories kept."""

NAME_BYTES = 80
"""UTF-8 bytes of a category's name; of a longer one, its beginning and its hash are kept."""

HASHES = 512
"""Hashes kept of values that are not all kept."""

VERSION = 2
"""Of the format of `to_bytes`. Of version 1, whose predictions were a column called `prediction`, `from_bytes` makes them
what they are."""

DTYPES = {"F64": "<f8", "I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
"""Types in a safetensors file → numpy's."""


@dataclass(frozen=True, eq=False)
class ColumnProfile:
    """One column of a window. Shares, ranks, mean and spread are of its finite values: neither missing nor infinite."""

    name: str
    kind: Kind  # "null": no value was seen that would tell
    rows: int
    missing: int  # null or NaN
    infinite: int = 0
    mean: float | None = None  # of numbers, and of times in seconds since 1970; None where there is none
    spread: float | None = None  # the standard deviation of all of them, not of a sample
    values: Floats = field(default_factory=lambda: np.empty(0))  # numbers and times: sorted, distinct
    names: tuple[str, ...] = ()  # categories and booleans ("false", "true"): the most frequent first
    weights: Counts = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # rows that each of them stands for
    slack: int = 0  # rows; 0: everything is exact
    hashes: Hashes = field(default_factory=lambda: np.empty(0, dtype=np.uint64))  # none where everything is exact

    @property
    def seen(self) -> int:
        """Rows with a finite value."""
        return self.rows - self.missing - self.infinite

    @property
    def minimum(self) -> float | None:
        """The smallest number, or time in seconds since 1970."""
        return float(self.values[0]) if len(self.values) else None

    @property
    def maximum(self) -> float | None:
        """The largest number, or time in seconds since 1970."""
        return float(self.values[-1]) if len(self.values) else None

    @property
    def rank_error(self) -> float:
        """The most by which `cdf` may be off, or a category's share understated."""
        return self.slack / self.seen if self.seen else 0.0

    @property
    def distinct(self) -> int:
        """How many different values: exact where `slack` is 0, else estimated, with a standard error of 4 %."""
        if not self.slack or len(self.hashes) < HASHES:
            return max(len(self.weights), len(self.hashes))
        return round((HASHES - 1) * 2.0**64 / float(self.hashes[-1]))

    def quantiles(self, at: ArrayLike) -> Floats:
        """For each share in `at`, the smallest value with that share of values up to it; NaN without values."""
        at = np.asarray(at, dtype=np.float64)
        if not len(self.values):
            return np.full(at.shape, np.nan)
        through = np.cumsum(self.weights)
        rank = (
            at * float(through[-1]) * (1 - 1e-12)
        )  # 0.07 × 100 is 7.000000000000001 in floats, and the seventh value is meant
        return self.values[np.minimum(np.searchsorted(through, rank), len(through) - 1)]

    def cdf(self, points: ArrayLike) -> Floats:
        """For each of `points`, the share of values up to and with it; NaN without values."""
        points = np.asarray(points, dtype=np.float64)
        if not len(self.values):
            return np.full(points.shape, np.nan)
        through = np.concatenate([[0], np.cumsum(self.weights)])
        return np.asarray(through[np.searchsorted(self.values, points, side="right")] / through[-1])

    def shares(self) -> dict[str, float]:
        """The share of each category that is kept, the largest first; with `rest` they add up to 1."""
        return {name: weight / self.seen for name, weight in zip(self.names, self.weights.tolist(), strict=False)}

    @property
    def rest(self) -> float:
        """The share of all categories that are not kept."""
        return (self.seen - int(self.weights.sum())) / self.seen if self.seen else 0.0


@dataclass(frozen=True, eq=False)
class Profile:
    """The columns of the rows in the window [start, end), and a model's predictions for rows of it."""

    columns: Mapping[str, ColumnProfile]
    rows: int
    start: datetime
    end: datetime
    predictions: ColumnProfile | None = None
    """None where there are none. No column's name leads here: a column may have any name."""

    def to_bytes(self) -> bytes:
        """Deterministic, at most 64 KiB a column: a safetensors file whose metadata is JSON."""
        from safetensors.numpy import save

        columns = []
        arrays: dict[str, NDArray[Any]] = {}
        every = [*self.columns.values(), *([self.predictions] if self.predictions else [])]
        for number, column in enumerate(every):
            plain = ("name", "kind", "rows", "missing", "infinite", "mean", "spread", "slack")
            columns.append({field: getattr(column, field) for field in plain})
            names = [name.encode() for name in column.names]
            parts: dict[str, NDArray[Any]] = {
                "values": column.values,
                "weights": column.weights.astype(np.min_scalar_type(int(column.weights.max(initial=0)))),
                "hashes": column.hashes,
                "names": np.frombuffer(b"".join(names), dtype=np.uint8),
                "lengths": np.array([len(name) for name in names], dtype=np.uint8),
            }
            arrays |= {f"{number}.{part}": array for part, array in parts.items() if len(array)}
        content = {"version": VERSION, "rows": self.rows, "columns": columns}
        content |= {"predictions": self.predictions is not None}  # then the last of the columns is they
        content |= {"start": self.start.astimezone(UTC), "end": self.end.astimezone(UTC)}
        return bytes(save(arrays, metadata={"evergreen.profile": canonical_json(content)}))

    @classmethod
    def from_bytes(cls, content: bytes) -> Profile:
        """What `to_bytes` wrote. Raises StoreError for anything else."""
        whole = cls._lazy(lambda start, size: content[start : start + size], len(content))
        return replace(whole, columns=dict(whole.columns))

    @classmethod
    def from_file(cls, file: Path) -> Profile:
        """What `to_bytes` wrote, its columns read one at a time as they are looked at. Raises StoreError, OSError."""

        def read(start: int, size: int) -> bytes:
            with file.open("rb") as opened:
                opened.seek(start)
                return opened.read(size)

        return cls._lazy(read, file.stat().st_size)

    @classmethod
    def _lazy(cls, read: Read, size: int) -> Profile:
        try:
            begins, told, arrays = _header(read, size)
            start, end = (datetime.fromisoformat(told[bound]) for bound in ("start", "end"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{size} bytes that should be a profile are none: {error!r}", fix="profile the window again"
            ) from error
        if told["version"] not in (1, VERSION):
            raise StoreError(
                f"a profile of version {told['version']}, where this Evergreen reads versions up to {VERSION}",
                fix="profile the window again, or use the Evergreen that wrote it",
            )
        places = {plain["name"]: number for number, plain in enumerate(told["columns"])}
        last = None
        if told["version"] == 1:
            last = places.pop(PREDICTION_1, None)
        elif told["predictions"]:
            last = len(told["columns"]) - 1
            places = {plain["name"]: number for number, plain in enumerate(told["columns"][:-1])}
        columns = _Stored(read, begins, told["columns"], arrays, places)
        predictions = None if last is None else replace(columns.at(last), name=PREDICTIONS)
        return cls(columns=columns, rows=told["rows"], start=start, end=end, predictions=predictions)


PREDICTIONS = "predictions"
"""The name that the profile of predictions has for whoever reads it; nobody looks it up by its name."""
PREDICTION_1 = "prediction"
"""The column of a profile of version 1 that holds them."""

Read = Callable[[int, int], bytes]
"""The bytes from a place on, so many."""


Arrays = Mapping[str, tuple[str, int, int]]
"""Of a safetensors file: name → numpy's type, and where it begins and ends behind the header."""


def _header(read: Read, size: int) -> tuple[int, dict[str, Any], Arrays]:
    """Where the arrays of a stored profile begin, what is told of it, and its arrays. Raises for what is none."""
    length = int.from_bytes(read(0, 8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError("its header is cut off")
    header = json.loads(read(8, length))
    told = json.loads(header.pop("__metadata__")["evergreen.profile"])
    arrays = {name: (DTYPES[each["dtype"]], *each["data_offsets"]) for name, each in header.items()}
    if max((end for _, _, end in arrays.values()), default=0) != size - 8 - length:
        raise ValueError("its arrays are cut off")
    return 8 + length, told, arrays


class _Stored(Mapping[str, ColumnProfile]):
    """The columns of a profile that is stored; each is read when it is looked at, and not kept."""

    def __init__(
        self,
        read: Read,
        begins: int,
        plain: Sequence[dict[str, Any]],
        arrays: Arrays,
        places: Mapping[str, int],
    ) -> None:
        self._read, self._begins, self._plain, self._arrays, self._places = read, begins, plain, arrays, places

    def __getitem__(self, name: str) -> ColumnProfile:
        return self.at(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def at(self, number: int) -> ColumnProfile:
        lengths = self._array(f"{number}.lengths", "u1").tolist()
        text = self._array(f"{number}.names", "u1").tobytes()
        ends = np.cumsum([0, *lengths]).tolist()
        return ColumnProfile(
            **self._plain[number],
            values=self._array(f"{number}.values", "<f8"),
            names=tuple(text[begin:end].decode() for begin, end in pairwise(ends)),
            weights=self._array(f"{number}.weights", "<i8").astype(np.int64),
            hashes=self._array(f"{number}.hashes", "<u8"),
        )

    def _array(self, name: str, otherwise: str) -> NDArray[Any]:
        kind, start, end = self._arrays.get(name, (otherwise, 0, 0))
        return np.frombuffer(self._read(self._begins + start, end - start) if end > start else b"", dtype=kind)


def profile(frame: pl.DataFrame, start: datetime, end: datetime) -> Profile:
    """The profile of `frame`, whose rows lie in [start, end). Raises SourceError for a type that no partition keeps."""
    columns = {name: column_profile(frame[name]) for name in sorted(frame.columns)}
    return Profile(columns=columns, rows=frame.height, start=start, end=end)


def merge(profiles: Iterable[Profile]) -> Profile:
    """The profile of the rows of all `profiles`, of which there is at least one.

    A column that some of them lack has the rows of the others. Raises SourceError where a column's kinds differ.
    """
    profiles = list(profiles)
    names = sorted({name for each in profiles for name in each.columns})
    predictions = [each.predictions for each in profiles if each.predictions is not None]
    return Profile(
        # One column of all of them at a time: of a wide table, all together may not fit in memory.
        columns={
            name: _merged(name, [each.columns[name] for each in profiles if name in each.columns]) for name in names
        },
        rows=sum(each.rows for each in profiles),
        start=min(each.start for each in profiles),
        end=max(each.end for each in profiles),
        predictions=_merged(PREDICTIONS, predictions) if predictions else None,
    )


# From rows.


def column_profile(series: pl.Series) -> ColumnProfile:
    """The profile of one column. Raises SourceError for a type that no partition keeps."""
    import polars as pl

    type_ = series.dtype
    column = ColumnProfile(series.name, "null", rows=len(series), missing=series.null_count())
    present = series.alias("values").drop_nulls()  # polars looks a series up by its name, which may be a pattern
    if type_.is_numeric():
        return _of_numbers(replace(column, kind="number"), present.cast(pl.Float64).to_numpy())
    if type_ == pl.Date:
        return _of_numbers(replace(column, kind="time"), present.to_physical().to_numpy() * 86_400.0)
    if isinstance(type_, pl.Datetime):  # without a zone it is taken as UTC, as partitions do
        unit = {"ms": 1e3, "us": 1e6, "ns": 1e9}[type_.time_unit]
        return _of_numbers(replace(column, kind="time"), present.to_physical().to_numpy() / unit)
    if type_ in (pl.Boolean, pl.String, pl.Categorical, pl.Enum):
        counted = present.rename("name").value_counts(name="rows")
        counted = counted.select(_short(counted["name"].cast(pl.String)), pl.col("rows").cast(pl.Int64))
        return _with_names(replace(column, kind="boolean" if type_ == pl.Boolean else "category"), counted)
    if type_ == pl.Null:
        return column
    raise SourceError(
        f"column {series.name!r} holds {type_}, of which there is no profile",
        fix="give the column one type: bool, int, float, text, datetime or date",
    )


def _of_numbers(column: ColumnProfile, numbers: Floats) -> ColumnProfile:
    finite = np.isfinite(numbers)
    if not finite.all():
        infinite = int(np.isinf(numbers).sum())
        nans = len(numbers) - int(finite.sum()) - infinite
        column = replace(column, missing=column.missing + nans, infinite=infinite)
        numbers = numbers[finite]
    values, weights = _count(numbers)
    mean, spread = _moments(values, weights)
    return _with_points(replace(column, mean=mean, spread=spread), values, weights)


def _count(numbers: Floats) -> tuple[Floats, Counts]:
    """The distinct finite numbers in order, and how often each is there."""
    if not len(numbers):
        return numbers, np.empty(0, dtype=np.int64)
    low, high = float(numbers.min()), float(numbers.max())
    if high - low <= len(numbers) and bool((np.rint(numbers) == numbers).all()):  # counting is quicker than sorting
        counts: Counts = np.bincount((numbers - low).astype(np.int64)).astype(np.int64, copy=False)
        steps = np.flatnonzero(counts)
        return np.asarray(low + steps, dtype=np.float64), counts[steps]
    ordered = _sorted(numbers)
    starts = _starts(ordered)
    return ordered[starts], np.diff(starts, append=len(ordered))


def _sorted(numbers: Floats) -> Floats:
    """Finite numbers in order; polars sorts whole numbers in little more than half the time it takes for floats."""
    import polars as pl

    keys = pl.Series(_keys((numbers + 0.0).view(np.int64))).sort().to_numpy()  # + 0.0: there is one zero
    return _keys(keys).view(np.float64)


def _keys(bits: Counts) -> Counts:
    """Whole numbers in the same order as the floats of these bits; of those, the bits again."""
    return bits ^ ((bits >> 63) & np.int64(2**63 - 1))


def kept_name(name: str) -> str:
    """The category's name in a profile: one longer than `NAME_BYTES` is cut, its hash in place of what is cut."""
    whole = name.encode()
    if len(whole) <= NAME_BYTES:
        return name
    return f"{whole[: NAME_BYTES - 19].decode(errors='ignore')}…{blake2b(whole, digest_size=8).hexdigest()}"


def _short(names: pl.Series) -> pl.Series:
    """`names` as a profile keeps them."""
    import polars as pl

    long = names.str.len_bytes() > NAME_BYTES
    if not long.any():
        return names
    return pl.Series(names.name, [kept_name(name) if cut else name for name, cut in zip(names, long, strict=True)])


# From profiles.


def _merged(name: str, parts: Sequence[ColumnProfile]) -> ColumnProfile:
    import polars as pl

    kinds = sorted({part.kind for part in parts} - {"null"})
    if len(kinds) > 1:
        raise SourceError(
            f"column {name!r} is a {' here and a '.join(kinds)} there, in profiles of the same data",
            fix="give the column one type in the source; a new meaning deserves a new name",
        )
    mean, spread = _merged_moments(parts)
    column = ColumnProfile(
        name,
        kinds[0] if kinds else "null",
        rows=sum(part.rows for part in parts),
        missing=sum(part.missing for part in parts),
        infinite=sum(part.infinite for part in parts),
        mean=mean,
        spread=spread,
        slack=sum(part.slack for part in parts),
        hashes=np.concatenate([part.hashes for part in parts]),
    )
    weights = np.concatenate([part.weights for part in parts])
    if column.kind in ("boolean", "category"):
        names = pl.Series("name", [each for part in parts for each in part.names], dtype=pl.String)
        return _with_names(column, pl.DataFrame([names, pl.Series("rows", weights)]).group_by("name").sum())
    values = np.concatenate([part.values for part in parts])
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    starts = _starts(values)
    return _with_points(column, values[starts], np.add.reduceat(weights, starts) if len(starts) else weights)


def _merged_moments(parts: Sequence[ColumnProfile]) -> tuple[float | None, float | None]:
    known = sorted((part.mean, part.spread or 0.0, part.seen) for part in parts if part.mean is not None)
    means, spreads, seen = (np.array([each[at] for each in known]) for at in range(3))
    mean, between = _moments(means, seen)
    scale = spreads.max(initial=0.0) or 1.0
    within = scale * math.sqrt(float((np.square(spreads / scale) * seen).sum()) / max(int(seen.sum()), 1))
    # No numbers spread further than the largest of them is from zero; rounding may say a little more.
    return mean, None if between is None else min(math.hypot(between, within), sys.float_info.max)


# What is kept, of either.


def _with_points(column: ColumnProfile, values: Floats, weights: Counts) -> ColumnProfile:
    """`column` with these values, sorted and distinct; it has the slack and hashes of those merged in them."""
    points, thick, more = _thinned(values, weights)
    slack = column.slack + more
    hashes = _smallest(column.hashes, _mixed(values.view(np.uint64))) if slack else column.hashes
    return replace(column, values=points, weights=thick, slack=slack, hashes=hashes)


def _with_names(column: ColumnProfile, counted: pl.DataFrame) -> ColumnProfile:
    """`column` with the most frequent of these distinct names; it has the slack and hashes of those merged in them."""
    order: dict[str, Any] = {"by": ["rows", "name"]}
    top = counted.top_k(NAMES + 1, **order, reverse=[False, True]).sort(**order, descending=[True, False])
    slack = column.slack + (int(top["rows"][NAMES]) if top.height > NAMES else 0)
    hashes = _smallest(column.hashes, _hashed(counted["name"])) if slack else column.hashes
    kept = top.head(NAMES)
    return replace(column, names=tuple(kept["name"]), weights=kept["rows"].to_numpy(), slack=slack, hashes=hashes)


def _moments(values: Floats, weights: Counts) -> tuple[float | None, float | None]:
    """Mean and standard deviation of weighted numbers in order; scaled, so that huge ones do not overflow."""
    if not len(values):
        return None, None
    scale = max(abs(float(values[0])), abs(float(values[-1]))) or 1.0
    parts, rows = values / scale, int(weights.sum())
    mean = min(max(float((parts * weights).sum()) / rows, -1.0), 1.0)
    parts -= mean
    parts *= parts
    parts *= weights
    return mean * scale, min(math.sqrt(float(parts.sum()) / rows), 1.0) * scale


def _thinned(values: Floats, weights: Counts) -> tuple[Floats, Counts, int]:
    """At most `POINTS` of sorted distinct values, the rows each stands for, and by how many a rank is off at most."""
    if len(values) <= POINTS:
        return values, weights, 0
    through = np.cumsum(weights)  # the last row of each value
    bucket = -(-int(through[-1]) // BUCKETS)  # rows
    edges = np.searchsorted(through, np.arange(0, through[-1], bucket), side="right")
    alone = np.concatenate([[0], np.flatnonzero(weights >= bucket), [len(values) - 1]])
    starts = np.unique(np.concatenate([edges, alone, alone + 1]))[:-1]
    after = through[np.append(starts[1:], len(values)) - 1]
    before = through[starts] - weights[starts]
    median = np.searchsorted(through, before + (after - before + 1) // 2)
    below, above = through[median] - weights[median] - before, after - through[median]
    return values[median], after - before, int(max(below.max(), above.max()))


def _starts(ordered: Floats) -> NDArray[np.intp]:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])


def _smallest(*parts: Hashes) -> Hashes:
    """The `HASHES` smallest of all, each once, sorted."""
    hashes = np.concatenate(parts)
    share = 2**64 // (len(hashes) // (4 * HASHES) + 1)  # hashes are even: among that many, this part of them will do
    few = np.unique(hashes[hashes < np.uint64(share - 1)])
    return (few if len(few) >= HASHES else np.unique(hashes))[:HASHES]


def _hashed(names: pl.Series) -> Hashes:
    """A hash of each name, for ever the same; that of polars is another in its next version."""
    import polars as pl

    sums = map(zlib.crc32, names.cast(pl.Binary).to_list())
    return _mixed(np.fromiter(sums, dtype=np.uint64, count=len(names)))


def _mixed(words: Hashes) -> Hashes:
    """The finaliser of splitmix64: one to one, and every bit of the result depends on every bit of the word."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words
