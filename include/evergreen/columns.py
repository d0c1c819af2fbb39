"""Columns by their exact names. polars reads `*` and `^…$` as patterns of names, and a user's column may be called so."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def column(*names: str) -> pl.Expr:
    """The columns of exactly these names, as an expression."""
    from polars import selectors

    return selectors.by_name(*names).as_expr()


def read(path: Path, names: Iterable[str] | None = None, *, without: Iterable[str] = ()) -> pl.DataFrame:
    """The columns `names` of a Parquet file, by default all, less those in `without`; no others are read."""
    import polars as pl

    left_out = set(without)
    wanted = list(pl.read_parquet_schema(path)) if names is None else names
    kept = [name for name in wanted if name not in left_out]
    return pl.scan_parquet(path, glob=False).select(column(*kept) if kept else []).collect()
