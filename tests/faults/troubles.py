"""What goes wrong with a pack of chance: how it comes about, what the refusal recommends, and how that is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl
import yaml

if TYPE_CHECKING:
    from tests.faults.test_any_pack import Life
    from tests.faults.worlds import Column, Row, World


@dataclass(frozen=True)
class Trouble:
    """A mistake in the source or the pack; `advice` is what the fix must say, as a regular expression."""

    fits: Callable[[World], bool]
    plant: Callable[[Life, int], None]
    """Bring it about in what the source holds as of a day."""
    error: str
    advice: str
    mend: Callable[[Life, int, str], None]
    """Do what the fix says."""
    earliest_only: bool = False
    """It must be there when the pack is first looked at: later, the days that it concerns are known."""


def newest(life: Life, as_of: int) -> int:
    """The newest day that the source has rows of; every run reads it."""
    return max(day for day in life.source(as_of) if day < as_of)


def written_again(life: Life, as_of: int, _fix: str) -> None:
    """The source holds again what it should."""
    life.edits.clear()
    life.pack.fill(life.source(as_of))


def _edit(life: Life, as_of: int, turn: Callable[[int, Row], Row]) -> None:
    """Change the rows of the newest day, given their numbers, as the source holds them."""
    day = newest(life, as_of)
    life.edits[day] = [turn(number, dict(row)) for number, row in enumerate(life.source(as_of)[day])]
    life.pack.fill(life.source(as_of))


def _rewrite(life: Life, as_of: int, turn: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Change the file of the newest day."""
    file = life.pack.file(newest(life, as_of))
    if file.suffix == ".csv":
        turn(pl.read_csv(file, infer_schema=False, glob=False)).write_csv(file)
    else:
        turn(pl.read_parquet(file, glob=False)).write_parquet(file)


def _feature(world: World, *kinds: str) -> Column | None:
    return next((column for column in world.columns if column.shown in kinds), None)


def _files(world: World) -> bool:
    return world.source != "sql"


# A target that is empty in one row.


def _empty_target(life: Life, as_of: int) -> None:
    target = life.world.target
    _edit(life, as_of, lambda number, row: row | {target: None} if number == 3 else row)


def _set_aside(life: Life, _as_of: int, fix: str) -> None:
    """The expectation that the fix quotes goes into `pack.yaml`."""
    quoted = re.search(r"(expect_column_values_to_not_be_null: \{.*?\}) under expectations", fix)
    assert quoted is not None, fix
    expectation = yaml.safe_load(quoted[1])
    assert expectation == {"expect_column_values_to_not_be_null": {"column": life.world.target}}
    life.pack.expectations.append(expectation)
    life.pack.write()


# A hold-out of one class.


def _one_class(life: Life, as_of: int) -> None:
    world = life.world
    for day in range(as_of - world.holdout - 2, as_of):
        if rows := life.source(as_of).get(day):
            life.edits[day] = [row | {world.target: world.classes[0]} for row in rows]
    life.pack.fill(life.source(as_of))
    life.moved = True


def _longer(life: Life, _as_of: int, fix: str) -> None:
    """The window that the fix names is made longer: as long as it says, or by some days."""
    exact = re.search(r"write (\w+): (\d+)d under data in pack\.yaml", fix)
    named = exact or re.search(r"make data\.(\w+) longer", fix)
    assert named is not None, fix
    length = int(exact[2]) if exact else getattr(life.world, named[1]) + 4
    life.pack.changes.setdefault("data", {})[named[1]] = f"{length}d"
    life.lengths[named[1]] = length
    life.pack.write()


# A validation window whose only day is empty.


def _empty_day(life: Life, as_of: int) -> None:
    end = newest(life, as_of) + 1
    life.edits[end - life.world.holdout - 1] = []
    life.pack.fill(life.source(as_of))


# Values that are none.


def _lost_column(life: Life, as_of: int) -> None:
    lost = life.world.columns[-1].name
    _rewrite(life, as_of, lambda frame: pl.DataFrame([frame[name] for name in frame.columns if name != lost]))


def _calm(life: Life, as_of: int) -> None:
    """Text in a column of numbers."""
    column = _feature(life.world, "int", "float", "id")
    assert column is not None
    if life.world.source == "sql":
        _edit(life, as_of, lambda number, row: row | {column.name: "calm" if number % 3 else row[column.name]})
    else:
        _rewrite(life, as_of, lambda frame: frame.with_columns(pl.lit("calm " * 2000).alias(column.name)))


def _spelt_otherwise(life: Life, as_of: int) -> None:
    """Some times are as a new version of the till writes them."""
    life.pack.odd_times = True
    _edit(life, as_of, lambda _, row: row)


def _spelt_well(life: Life, as_of: int, fix: str) -> None:
    life.pack.odd_times = False
    written_again(life, as_of, fix)


def _no_time(life: Life, as_of: int) -> None:
    time = life.world.event_time
    _edit(life, as_of, lambda number, row: row | {time: None} if number == 5 else row)


def _broken_file(life: Life, as_of: int) -> None:
    file = life.pack.file(newest(life, as_of))
    file.write_bytes(file.read_bytes()[:200])


def _floats_for_ids(life: Life, as_of: int) -> None:
    column = _feature(life.world, "id")
    assert column is not None
    _rewrite(life, as_of, lambda frame: frame.with_columns(frame[column.name].cast(pl.Float64)))


# Expectations.


def _expected(life: Life, as_of: int) -> None:
    """An expectation that the newest day does not meet."""
    column = life.world.columns[0]
    life.pack.expectations.append({"expect_column_values_to_not_be_null": {"column": column.name}})
    life.pack.write()
    _edit(life, as_of, lambda number, row: row | {column.name: None} if number else row)


# The pack itself.


def _misspelt(life: Life, _as_of: int) -> None:
    life.pack.changes.setdefault("data", {})["holdot"] = "3d"
    life.pack.write()


def _spelt_right(life: Life, _as_of: int, _fix: str) -> None:
    del life.pack.changes["data"]["holdot"]
    life.pack.write()


def _text_times(world: World) -> bool:
    return world.source == "csv" or (world.source == "sql" and world.times != "timestamp")


def _always(_world: World) -> bool:
    return True


TROUBLES: dict[str, Trouble] = {
    "an empty target": Trouble(
        _always, _empty_target, "SourceError", "expect_column_values_to_not_be_null", _set_aside
    ),
    "one class": Trouble(
        lambda world: world.task != "regression" and world.validation == 2,
        _one_class,
        "SourceError",
        r"make data\.holdout longer",
        _longer,
        earliest_only=True,
    ),
    "an empty validation window": Trouble(
        lambda world: world.validation == 1,
        _empty_day,
        "SourceError",
        r"write validation: \d+d under data",
        _longer,
        earliest_only=True,
    ),
    "a lost column": Trouble(
        lambda world: _files(world) and len(world.columns) > 1,
        _lost_column,
        "SourceError",
        "the same columns",
        written_again,
    ),
    "text among numbers": Trouble(
        lambda world: _feature(world, "int", "float", "id") is not None,
        _calm,
        "SourceError",
        "one type|cast it|SQLAlchemy",
        written_again,
    ),
    "times in another spelling": Trouble(
        _text_times, _spelt_otherwise, "SourceError", "ISO 8601", _spelt_well, earliest_only=True
    ),
    "a row without a time": Trouble(
        lambda world: world.source != "python", _no_time, "SourceError", "fill it in", written_again
    ),
    "a broken file": Trouble(
        lambda world: world.source == "parquet", _broken_file, "SourceError", "write the file again", written_again
    ),
    "floats for ids": Trouble(
        lambda world: world.source in ("parquet", "python") and _feature(world, "id") is not None,
        _floats_for_ids,
        "SourceError",
        "Int64|whole numbers|integers",
        written_again,
    ),
    "a failed expectation": Trouble(
        lambda world: not world.columns[0].nulls, _expected, "ValidationError", "source", written_again
    ),
    "a misspelt key": Trouble(_always, _misspelt, "PackError", "did you mean 'holdout'", _spelt_right),
}
"""By what a reader would call it."""
