"""Columns by their exact names. polars reads `*` and `^…$` as patterns of names, and a user's column may be called so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
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


def stacked(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The rows of frames of the same columns below one another, each column of the widest of its types.

    `pl.concat` alone takes a name for a pattern where it widens the column.
    """
    import polars as pl

    names = frames[0].columns
    if any(frame.columns != names for frame in frames):
        return pl.concat(frames, how="vertical_relaxed")  # which says how they differ
    numbered = [frame.clone() for frame in frames]
    for frame in numbered:
        frame.columns = [str(place) for place in range(len(names))]
    rows = pl.concat(numbered, how="vertical_relaxed")
    rows.columns = names
    return rows
