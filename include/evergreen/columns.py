"""Columns by their exact names. polars reads `*` and `^…$` as patterns of names, and a user's column may be called so."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def named(*names: str) -> pl.Expr:
    """The columns of exactly these names, as an expression."""
    from polars import selectors

    return selectors.by_name(*names).as_expr()


def read(path: Path, names: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> pl.DataFrame:
    """The columns `names` of a Parquet file, by default all, less those in `without`; no others are read."""
    import polars as pl

    left_out = set(without)
    wanted = list(pl.scan_parquet(path, glob=False).collect_schema()) if names is None else names
    kept = [name for name in wanted if name not in left_out]
    return pl.scan_parquet(path, glob=False).select(named(*kept) if kept else []).collect()


def unused(name: str, names: Collection[str]) -> str:
    """`name`, with underscores after it until it is none of `names`."""
    while name in names:
        name += "_"
    return name


def series(frame: pl.DataFrame, name: str) -> pl.Series:
    """A column as a series; where its name is a pattern, under another, since polars looks a series up by its name."""
    found = frame.get_column(name)
    return found.alias(f" {name}") if name == "*" or (name.startswith("^") and name.endswith("$")) else found
