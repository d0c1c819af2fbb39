"""What only code can say about this pack: how its rows are read, and how its model is trained."""

from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import polars as pl

from evergreen.run import Window
from evergreen.training.jobs import Job, TrainingData


def read(window: Window) -> Iterator[pl.DataFrame]:
    """Rows with `window.start <= seen_at < window.end`: made up here, day by day; yours come from where they are."""
    day = window.start.replace(hour=0, minute=0, second=0, microsecond=0)
    while day < window.end:
        chance = np.random.default_rng(day.toordinal())
        rows = 200
        plan = chance.choice(["free", "team", "company"], size=rows, p=[0.6, 0.3, 0.1])
        seats = np.where(plan == "free", 1, chance.integers(2, 500, size=rows))
        days_quiet = chance.exponential(5.0, size=rows)
        odds = -2.0 + 0.3 * days_quiet - 1.0 * (plan == "company")
        frame = pl.DataFrame(
            {
                "seen_at": [day + timedelta(seconds=86400 * n // rows) for n in range(rows)],
                "plan": plan,
                "seats": seats,
                "days_quiet": days_quiet,
                "left": chance.random(rows) < 1 / (1 + np.exp(-odds)),
            }
        )
        yield frame.filter((pl.col("seen_at") >= window.start) & (pl.col("seen_at") < window.end))
        day += timedelta(days=1)


def train(data: TrainingData, job: Job) -> None:
    """The built-in tabular trainer; any framework will do that leaves a model folder in `job.model_dir`."""
    from evergreen.training import tabular

    tabular.train(data, job)
