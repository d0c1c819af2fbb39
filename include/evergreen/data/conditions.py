"""Conditions on rows, as `row_condition` of an expectation has them: parsed here, never evaluated as code.

The grammar is the part of pandas' query language that people use:

    state == "CA" and not (seats in [1, 2] or `unit price` >= 9.5)     and, or, not (also &, |, ~)
    10 < age <= 65          born < "2000-01-01"         a > b          comparisons of columns with values or columns
    plan.notnull()          col("plan").isnull()                       null tests: isnull, isna, notnull, notna

A null compares as in pandas: `!=` and `not in` hold for it, every other comparison does not. NaN is a null.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

from evergreen.columns import series, unused
from evergreen.pack import parse_instant

if TYPE_CHECKING:
    import polars as pl

MAX_CHARACTERS = 1000
ALLOWED = (
    "write comparisons (==, !=, <, <=, >, >=, in, not in) of columns with values or columns, joined by and, or, not, and "
    "null tests such as plan.notnull(); a column whose name is no word stands in backticks: `unit price` > 0"
)
"""Advice for a condition that is refused."""
NULL_TESTS = {"isnull": True, "isna": True, "isNull": True, "notnull": False, "notna": False, "notNull": False}
QUOTED = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|`([^`]+)`""")

Mask = Any
"""A boolean polars Series without nulls."""


class ConditionError(Exception):
    """The condition is outside of the grammar, or does not fit the rows; the text says why."""


class Condition:
    """A parsed condition."""

    def __init__(self, text: str) -> None:
        """Parse `text`. Raises ConditionError."""
        if len(text) > MAX_CHARACTERS:
            raise ConditionError(f"it has {len(text)} characters, and {MAX_CHARACTERS} are allowed")
        self._names: dict[str, str] = {}
        self._word = unused("_column", re.findall(r"\w+(?=_\d)", text))  # none that the condition itself has
        try:
            self._tree = ast.parse(QUOTED.sub(self._placeholder, text.strip()), mode="eval").body
            columns = self._columns(self._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConditionError(f"it cannot be parsed: {getattr(error, 'msg', error)}") from None
        self.columns = tuple(dict.fromkeys(columns))
        """The columns it names, in order."""

    def mask(self, rows: pl.DataFrame) -> pl.Series:
        """Return a boolean for each row: whether the condition holds. Raises ConditionError where types do not fit."""
        import polars as pl

        try:
            mask: pl.Series = self._holds(self._tree, rows)
        except (pl.exceptions.PolarsError, RecursionError) as error:
            raise ConditionError(str(error).splitlines()[0]) from error
        return mask

    def _placeholder(self, found: re.Match[str]) -> str:
        """Put a word in place of a name in backticks; leave texts as they are."""
        if found[2] is None:
            return found[0]
        word = f"{self._word}_{len(self._names)}_"
        self._names[word] = found[2]
        return word

    def _columns(self, node: ast.expr) -> list[str]:
        """The columns that a condition names. Raises ConditionError for what the grammar does not have."""
        match node:
            case ast.BoolOp(values=parts):
                return [name for part in parts for name in self._columns(part)]
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
                return self._columns(left) + self._columns(right)
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=inner):
                return self._columns(inner)
            case ast.Compare():
                return self._compared(node)
            case ast.Call(func=ast.Attribute(value=inner, attr=test), args=[], keywords=[]) if test in NULL_TESTS:
                if (name := self._name(inner)) is not None:
                    return [name]
            case _ if (name := self._name(node)) is not None:
                return [name]  # a column of booleans
        raise ConditionError(f"{ast.unparse(node)[:80]!r} is not allowed")

    def _compared(self, node: ast.Compare) -> list[str]:
        """The columns that a comparison names. Raises ConditionError."""
        for operator, other in zip(node.ops, node.comparators, strict=True):
            self._check_comparison(operator, other)
        names = [self._name(side) for side in (node.left, *node.comparators)]
        if not any(names):
            raise ConditionError(f"{ast.unparse(node)[:80]!r} names no column")
        if names[0] is None:
            self._value(node.left)
        return [name for name in names if name]

    def _check_comparison(self, operator: ast.cmpop, other: ast.expr) -> None:
        if isinstance(operator, ast.Is | ast.IsNot):
            raise ConditionError("`is` is not allowed")
        if isinstance(operator, ast.In | ast.NotIn):
            if not isinstance(other, ast.List | ast.Tuple | ast.Set):
                raise ConditionError("`in` needs a list of values")
            for element in other.elts:
                self._value(element)
        elif self._name(other) is None:
            self._value(other)

    def _name(self, node: ast.expr) -> str | None:
        """The column that a node names: `plan`, a name in backticks, or `col("plan")`; None where it names none."""
        match node:
            case ast.Name(id=word):
                return self._names.get(word, word)
            case ast.Call(func=ast.Name(id="col"), args=[ast.Constant(value=str(name))], keywords=[]):
                return name
        return None

    def _value(self, node: ast.expr) -> Any:
        """The constant that a node is. Raises ConditionError where it is none."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
        raise ConditionError(f"{ast.unparse(node)[:80]!r} is no text, number, true or false")

    def _holds(self, node: ast.expr, rows: pl.DataFrame) -> Mask:
        match node:
            case ast.BoolOp(op=operator, values=parts):
                masks = [self._holds(part, rows) for part in parts]
                return _all(masks) if isinstance(operator, ast.And) else ~_all([~mask for mask in masks])
            case ast.BinOp(left=left, op=operator, right=right):
                masks = [self._holds(left, rows), self._holds(right, rows)]
                return _all(masks) if isinstance(operator, ast.BitAnd) else ~_all([~mask for mask in masks])
            case ast.UnaryOp(operand=inner):
                return ~self._holds(inner, rows)
            case ast.Compare(left=left, ops=operators, comparators=others):
                sides = [left, *others]
                return _all([self._compare(a, op, b, rows) for a, op, b in zip(sides, operators, others, strict=False)])
            case ast.Call(func=ast.Attribute(value=inner, attr=test)):
                is_null = _series(rows, str(self._name(inner))).is_null()
                return is_null if NULL_TESTS[test] else ~is_null
        column = _series(rows, str(self._name(node)))
        if str(column.dtype) != "Boolean":
            raise ConditionError(f"column {column.name!r} alone is no condition: it holds {column.dtype}, no booleans")
        return column.fill_null(value=False)

    def _compare(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, rows: pl.DataFrame) -> Mask:
        names = self._name(left), self._name(right)
        column = _series(rows, next(name for name in names if name is not None)) if any(names) else None
        if column is None:
            raise ConditionError("a chained comparison needs a column on one side of each operator")
        if isinstance(operator, ast.In | ast.NotIn):
            assert isinstance(right, ast.List | ast.Tuple | ast.Set)
            inside = column.is_null() & False
            for element in right.elts:
                inside = inside | (column == _fitting(self._value(element), column)).fill_null(value=False)
            return inside if isinstance(operator, ast.In) else ~inside
        sides = [
            _series(rows, name) if name is not None else _fitting(self._value(node), column)
            for name, node in zip(names, (left, right), strict=True)
        ]
        result = OPERATORS[type(operator)](*sides)
        return result.fill_null(value=isinstance(operator, ast.NotEq))


OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}


def _all(masks: list[Mask]) -> Mask:
    whole = masks[0]
    for mask in masks[1:]:
        whole = whole & mask
    return whole


def _series(rows: pl.DataFrame, name: str) -> pl.Series:
    """The column, its NaN as nulls. Raises ConditionError where the rows have none of this name."""
    if name not in rows.columns:
        raise ConditionError(f"there is no column {name!r}")
    column = series(rows, name)
    return column.fill_nan(None) if column.dtype.is_float() else column


def _fitting(value: Any, column: pl.Series) -> Any:
    """The value as the column's type compares it: a time written as text, say. Raises ConditionError where it does not."""
    import polars as pl

    kind = column.dtype
    if isinstance(kind, pl.Datetime) or kind == pl.Date:
        try:
            instant = parse_instant(value) if isinstance(value, str) else None
        except ValueError as error:
            raise ConditionError(f"column {column.name!r} holds times, and {value!r} {error}") from None
        if instant is not None:
            return instant.date() if kind == pl.Date else instant
    fits = {
        bool: kind == pl.Boolean or kind.is_numeric(),
        int: kind.is_numeric() or kind == pl.Boolean,
        float: kind.is_numeric(),
        str: kind == pl.String,
    }
    if kind != pl.Null and not fits.get(type(value), isinstance(value, date | datetime)):
        raise ConditionError(f"column {column.name!r} holds {kind}, which cannot be compared with {value!r}")
    return bool(value) if kind == pl.Boolean else value
