"""Convert rows to the types that a model declares: one conversion for every way into a model.

A model folder's `model.json` declares its inputs, column → type. Rows reach `predict(frame)` as a pandas frame whose
columns have the dtype of their declared type, whatever values the rows hold and wherever they come from:

    int        Int64               string     object: str or None
    float      float64             datetime   datetime64[us, UTC]
    bool       boolean             date       object: datetime.date or None

A model folder without `"dtypes": "nullable"` was made before these dtypes were fixed. It gets what pandas makes of
Parquet rows: int64, or float64 where a value is missing; bool, or object where one is missing.

A value is converted where nothing is lost: 3.0 and "3" to the int 3, "true" to a bool, ISO 8601 text to a date or time
(UTC where it names no zone). Anything else is refused with its column, row and value: a number for a text (the zeros
before "02116" would be lost already), a whole number that float64 would round, an empty text for a number. A fraction
in a column of ints makes it float64 in that frame, as a partition does with a column that is int in one period and float
in another. Other columns than the inputs stay as they are. A column declared `null` had no value in any row that the
model was made from, and stays as it is, too.

This file is stored beside each version in MLflow, where Evergreen is not installed: it imports pandas and numpy alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

INTEGER = re.compile(r"[+-]?\d+(\.0*)?")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity)|nan", re.IGNORECASE)
BOOLS = {"true": True, "false": False, "1": True, "0": False}
EXACT = 2**53
"""From here on float64 does not hold every whole number."""
INT64 = 2**63
SHOWN = 60
"""Characters of a value that a message quotes."""
FIXES = {
    "int": "give whole numbers; where some are missing, in pandas by the dtype Int64, for float64 rounds past 2**53",
    "float": "give numbers that float64 holds, and leave out what is missing",
    "bool": "give true or false",
    "string": "give text: read it as such in the first place, pandas.read_csv(…, dtype={{{name!r}: str}}) for one, since "
    "as a number a code has lost its leading zeros",
    "datetime": "give a time in ISO 8601, such as 2013-04-01T06:00:00Z, or a datetime",
    "date": "give a date in ISO 8601, such as 2013-04-01, or a time at midnight UTC",
}


class ConversionError(ValueError):
    """Rows that a model cannot take: what is wrong, and what to do."""

    def __init__(self, what: str, *, fix: str) -> None:
        super().__init__(f"{what}\n  fix: {fix}")
        self.what = what
        self.fix = fix


def convert(frame: pd.DataFrame, described: Mapping[str, Any], *, first_row: int = 0) -> pd.DataFrame:
    """Return `frame` with the dtypes that the model takes; `frame` itself where it has them already.

    `described` is the content of `model.json`; `first_row` is the number of the frame's first row in messages. Raises
    ConversionError.
    """
    inputs: Mapping[str, str] = described["inputs"]
    nullable = described.get("dtypes") == "nullable"
    dtypes = dict(zip(frame.columns, frame.dtypes, strict=True))
    missing = [name for name in inputs if name not in dtypes]
    if missing:
        raise ConversionError(
            f"the column {missing[0]!r} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""),
            fix=f"the model takes: {', '.join(inputs)}",
        )
    if len(dtypes) < frame.shape[1]:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise ConversionError(f"the column {twice!r} is there twice", fix="give each column a name of its own")
    changed: dict[Any, Any] = {}
    for name, kind in inputs.items():
        if kind not in _OF_KIND or (nullable and kind in _DTYPES and dtypes[name] == _DTYPES[kind]):
            continue
        column = frame[name]
        try:
            converted = _convert(column, kind, nullable)
        except _UnfitError as error:
            shown = repr(error.value.item() if isinstance(error.value, np.generic) else error.value)
            shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"
            raise ConversionError(
                f"column {name!r}, row {first_row + error.row} (the first is 0): {shown} is {error.why}; the model "
                f"takes {kind}",
                fix=FIXES[kind].format(name=name),
            ) from None
        if converted is not column:
            changed[name] = converted
    if not changed:
        return frame
    # A new frame of all columns: to replace them one by one takes pandas ten times as long.
    return pd.DataFrame({name: changed[name] if name in changed else frame[name] for name in dtypes}, index=frame.index)


def from_arrow(table: Any, described: Mapping[str, Any], *, first_row: int = 0) -> pd.DataFrame:
    """Return an Arrow table as the frame that the model takes: `convert`, without rounding integers on the way."""
    import pyarrow as pa

    if described.get("dtypes") != "nullable":
        return convert(table.to_pandas(), described, first_row=first_row)
    dtypes = {pa.bool_(): pd.BooleanDtype(), pa.int64(): pd.Int64Dtype(), pa.uint64(): pd.UInt64Dtype()}
    dtypes |= {
        kind: pd.Int64Dtype() for kind in (pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32())
    }
    frame = table.to_pandas(types_mapper=dtypes.get)
    others = [name for name in frame.columns if name not in described["inputs"]]
    for name in others:
        frame[name] = table.column(name).to_pandas()
    return convert(frame, described, first_row=first_row)


class _UnfitError(Exception):
    """A value that does not fit its declared type."""

    def __init__(self, row: int, value: Any, why: str) -> None:
        super().__init__(row, value, why)
        self.row, self.value, self.why = row, value, why


def _convert(column: pd.Series[Any], kind: str, nullable: bool) -> Any:
    """Return the column itself where it fits, else an array."""
    dtype = column.dtype
    if not nullable and isinstance(dtype, np.dtype) and dtype.kind in "iufb":
        return column  # as it comes from Parquet, whatever its declared type
    if not (isinstance(dtype, np.dtype | pd.DatetimeTZDtype) or _is_masked(dtype)):
        column = column.astype(object)  # categories, text of pandas' own dtypes, Arrow's
    return _OF_KIND[kind](column, nullable)


def _is_masked(dtype: Any) -> bool:
    """Return whether a dtype is one of pandas' nullable numbers and booleans: values and a mask, both of numpy."""
    return isinstance(dtype, pd.BooleanDtype) or (
        isinstance(dtype, pd.api.extensions.ExtensionDtype)
        and not isinstance(dtype, pd.DatetimeTZDtype)
        and dtype.kind in "iuf"
        and dtype.na_value is pd.NA
        and not isinstance(dtype, pd.ArrowDtype)
    )


# Numbers.


def _ints(column: pd.Series[Any], nullable: bool) -> Any:
    if isinstance(column.dtype, pd.Int64Dtype):
        return _without_mask(column.array)
    values, missing = _numbers(column)
    if values.dtype == np.float64:
        known = values[~missing]
        _refuse(column, ~missing & np.isnan(values), "no whole number")  # as text: among numbers NaN is missing
        if not (np.isfinite(known) & (known == np.floor(known))).all():
            return _floats(column, nullable)  # int and float may meet; then they are floats
        _refuse(column, ~missing & (np.abs(np.where(missing, 0, values)) >= EXACT), "a float, which may be rounded")
        values = np.where(missing, 0, values).astype(np.int64)
    whole = pd.arrays.IntegerArray(values, missing)
    return whole if nullable else _without_mask(whole)


def _floats(column: pd.Series[Any], _nullable: bool) -> Any:
    if column.dtype == np.float64:
        return column
    values, missing = _numbers(column)
    if values.dtype != np.float64:
        _refuse(column, _is_rounded(values) & ~missing, "a whole number that float64 would round")
        values = values.astype(np.float64)
    return np.where(missing, np.nan, values)


def _numbers(column: pd.Series[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return numbers as int64 or float64, and which are missing; a missing one counts as 0 among int64."""
    kind = column.dtype.kind if isinstance(column.dtype, np.dtype) or _is_masked(column.dtype) else "O"
    if kind == "i" and isinstance(column.dtype, np.dtype):
        return column.to_numpy(dtype=np.int64), np.zeros(len(column), dtype=bool)
    missing = column.isna().to_numpy(dtype=bool)
    if kind in "iub":
        filled = column.fillna(0) if missing.any() else column
        values = filled.to_numpy(dtype=np.uint64 if kind == "u" else np.int64)
        if kind == "u":
            _refuse(column, values >= np.uint64(INT64), "too large for 64 bits")
        return values.astype(np.int64), missing
    if kind == "f":
        return column.to_numpy(dtype=np.float64, na_value=np.nan), missing
    if kind != "O":
        _refuse(column, ~missing, "no number")
        return np.zeros(len(column), dtype=np.int64), missing
    parsed = [0 if gone else _number(row, value) for row, (value, gone) in enumerate(zip(column, missing, strict=True))]
    if all(isinstance(number, int) for number in parsed):
        large = [not -INT64 <= number < INT64 for number in parsed]
        _refuse(column, np.array(large, dtype=bool), "too large for 64 bits")
        return np.array(parsed, dtype=np.int64), missing
    for row, number in enumerate(parsed):
        if isinstance(number, int) and int(float(number)) != number:
            raise _UnfitError(row, column.iloc[row], "a whole number among fractions, which float64 would round")
    return np.where(missing, np.nan, np.array([float(number) for number in parsed])), missing


def _number(row: int, value: Any) -> int | float:
    """Return one value as an int where it is whole and exact, else as a float."""
    if isinstance(value, bool | int | np.bool_ | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return int(number) if number.is_integer() and abs(number) < EXACT else number
    if isinstance(value, Decimal):
        number = float(value)
        if value.is_finite() and value == value.to_integral_value():
            return int(value)
        if math.isfinite(number) and abs(number) >= EXACT and int(number) != int(value):
            raise _UnfitError(row, value, "a decimal that float64 would round")
        return number
    if isinstance(value, str):
        text = value.strip()
        if INTEGER.fullmatch(text):
            return int(text.partition(".")[0])
        if NUMBER.fullmatch(text):
            return _number(row, float(text))
    raise _UnfitError(row, value, "no number")


def _is_rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return (n,) whether float64 would round each of these int64."""
    with np.errstate(invalid="ignore"):  # 2**63 is one too many for int64: not what it was, either
        return np.asarray((np.abs(values) > EXACT) & (values.astype(np.float64).astype(np.int64) != values))


def _without_mask(integers: Any) -> np.ndarray[Any, Any]:
    """Return an Int64 array as int64, or as float64 where a value is missing."""
    missing = integers.isna()
    return np.asarray(
        integers.to_numpy(dtype=np.float64 if missing.any() else np.int64, na_value=np.nan if missing.any() else 0)
    )


def _bools(column: pd.Series[Any], nullable: bool) -> Any:
    missing = column.isna().to_numpy(dtype=bool)
    if column.dtype == np.bool_ or isinstance(column.dtype, pd.BooleanDtype):
        values = column.to_numpy(dtype=bool, na_value=False)
    else:
        values = np.array(
            [not gone and _bool(row, value) for row, (value, gone) in enumerate(zip(column, missing, strict=True))],
            dtype=bool,
        )
    if nullable:
        return pd.arrays.BooleanArray(values, missing)
    return np.where(missing, None, values) if missing.any() else values  # type: ignore[call-overload]


def _bool(row: int, value: Any) -> bool:
    text = value.strip().lower() if isinstance(value, str) else None
    if text in BOOLS:
        return BOOLS[text]
    if text is None and isinstance(value, bool | int | float | np.bool_ | np.number) and value in (0, 1):
        return bool(value)
    raise _UnfitError(row, value, "neither true nor false")


# Text.


def _strings(column: pd.Series[Any], nullable: bool) -> Any:
    if column.dtype == object and all(type(value) is str or value is None for value in column.tolist()):
        return column
    missing = column.isna().to_numpy(dtype=bool)
    if column.dtype == object:
        wrong = [row for row, value in enumerate(column) if not (missing[row] or isinstance(value, str))]
    else:
        wrong = np.flatnonzero(~missing).tolist()
    if wrong and not nullable:
        return column  # a column without a value in training was declared as string, too
    if wrong:
        raise _UnfitError(wrong[0], column.iloc[wrong[0]], "no text")
    return _objects([None if gone else value for value, gone in zip(column, missing, strict=True)])


# Times.


def _datetimes(column: pd.Series[Any], _nullable: bool) -> Any:
    dtype = column.dtype
    if isinstance(dtype, pd.DatetimeTZDtype):
        times: Any = column.dt.tz_convert("UTC")
    elif dtype.kind == "M":
        times = column.dt.tz_localize("UTC")
    else:
        missing = column.isna()
        instants = [
            None if gone else _instant(row, value)
            for row, (value, gone) in enumerate(zip(column, missing, strict=True))
        ]
        naive = [None if at is None else at.astimezone(UTC).replace(tzinfo=None) for at in instants]
        times = pd.Series(np.array(naive, "datetime64[us]")).dt.tz_localize("UTC")
    return times.dt.as_unit("us").array


def _dates(column: pd.Series[Any], _nullable: bool) -> Any:
    missing = column.isna().to_numpy(dtype=bool)
    kept = column.dtype == object
    dates: list[date | None] = []
    for row, (value, gone) in enumerate(zip(column, missing, strict=True)):
        kept = kept and (value is None if gone else type(value) is date)
        dates.append(None if gone else value if type(value) is date else _day(row, value))
    return column if kept else _objects(dates)


def _instant(row: int, value: Any) -> datetime:
    """Return a time with its zone, UTC where it has none."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.strip())
        except ValueError:
            raise _UnfitError(row, value, "no time in ISO 8601") from None
    if isinstance(value, np.datetime64):
        value = pd.Timestamp(value)
    if isinstance(value, pd.Timestamp):
        value = value.as_unit("us").to_pydatetime()
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise _UnfitError(row, value, "no time")
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)


def _day(row: int, value: Any) -> date:
    at = _instant(row, value).astimezone(UTC)
    if at.time() != time():
        raise _UnfitError(row, value, "no date but a time of a day")
    return at.date()


# Columns.


def _objects(values: list[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _refuse(column: pd.Series[Any], wrong: np.ndarray[Any, Any], why: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise _UnfitError(row, column.iloc[row], why)


_DTYPES = {
    "int": pd.Int64Dtype(),
    "float": np.dtype(np.float64),
    "bool": pd.BooleanDtype(),
    "datetime": pd.DatetimeTZDtype("us", "UTC"),
}
"""The dtype that says by itself that a column fits; the object columns of text and dates are looked at."""
_OF_KIND: Mapping[str, Callable[[pd.Series[Any], bool], Any]] = {
    "int": _ints,
    "float": _floats,
    "bool": _bools,
    "string": _strings,
    "datetime": _datetimes,
    "date": _dates,
}
