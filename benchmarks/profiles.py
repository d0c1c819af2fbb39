"""What it costs to profile a million rows of twenty columns, and to merge a year of days, beside what else is there.

Goals: at least 30 million values a second on one core; 365 daily profiles of 20 columns merged within a second; ranks
within 0.5 %. Peers, on the same rows in the same run: polars' `describe` with `value_counts` of the categories, which
is what one would write first, and whose result does not merge; and for the numbers the KLL sketches of Apache
DataSketches, which merge too, of a size that promises 0.5 %. Seconds are of one core's work, the best of some rounds,
so that others on the machine do not count.

    python benchmarks/profiles.py
"""

from __future__ import annotations

import os

os.environ |= {"POLARS_MAX_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when they are imported

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import numpy as np
import polars as pl
from datasketches import kll_doubles_sketch

from evergreen.monitoring.profiles import Profile, merge, profile

ROWS = 1_000_000
DAYS, DAY_ROWS = 365, 10_000
ROUNDS = 5
KLL = 550  # the smallest that promises a normalized rank error of 0.5 %, with a confidence of 99 %
Result = TypeVar("Result")
START, DAY = datetime(2013, 1, 1, tzinfo=UTC), timedelta(days=1)


def main() -> None:
    frame = rows(ROWS, seed=1)
    numeric = [name for name, kind in frame.schema.items() if kind.is_numeric()]
    print(f"{ROWS} rows of {frame.width} columns, one core, best of {ROUNDS} rounds")
    ours, made = best(lambda: profile(frame, START, START + DAY))
    first, _ = best(lambda: described(frame))
    print(f"profile                  {ours:6.3f} s  {rate(frame, ours)}, {size(made)}  (goal ≥ 30)")
    print(f"describe, value_counts   {first:6.3f} s  {rate(frame, first)}")
    print(f"profile / describe and value_counts            {ours / first:.2f}")
    numbers = frame.select(numeric)
    ours, _ = best(lambda: profile(numbers, START, START + DAY))
    peer, _ = best(lambda: sketched(numbers))
    print(f"the {len(numeric)} numbers alone     {ours:6.3f} s  {rate(numbers, ours)}")
    print(f"KLL sketches of them     {peer:6.3f} s  {rate(numbers, peer)}")
    print(f"profile / KLL                                  {ours / peer:.2f}")
    ids = frame.select(pl.int_range(pl.len()).shuffle(3).cast(pl.String).alias("id"))
    alone, _ = best(lambda: profile(ids, START, START + DAY))
    print(f"a column of {ROWS} different texts, beside those: {alone:.3f} s, {rate(ids, alone)}")

    print(f"\n{DAYS} days of {DAY_ROWS} rows of {frame.width} columns")
    days = [rows(DAY_ROWS, seed=100 + day) for day in range(DAYS)]
    profiles = [profile(each, START + day * DAY, START + (day + 1) * DAY) for day, each in enumerate(days)]
    stored = [each.to_bytes() for each in profiles]
    merging, year = best(lambda: merge(profiles))
    reading, _ = best(lambda: [Profile.from_bytes(each) for each in stored])
    sketches = [sketched(each.select(numeric)) for each in days]
    peer, kll = best(lambda: joined(sketches))
    print(f"merged in                {merging:6.3f} s, read from bytes before in {reading:.3f} s  (goal ≤ 1.00 s)")
    print(f"KLL sketches merged in   {peer:6.3f} s, of the {len(numeric)} numbers only")
    whole = pl.concat(days)
    off = {
        name: (rank_error(whole[name], year.columns[name].cdf), rank_error(whole[name], kll_cdf(kll[name])))
        for name in numeric
    }
    bound = max(year.columns[name].rank_error for name in numeric)
    largest = [max(each[side] for each in off.values()) for side in (0, 1)]
    kept = [
        sum(len(Profile({name: year.columns[name]}, 0, START, START).to_bytes()) for name in numeric),
        sum(len(sketch.serialize()) for sketch in kll.values()),
    ]
    print(
        f"rank off by at most      {largest[0]:.5f}, promised {bound:.5f} always, {kept[0] / len(numeric) / 1024:.1f} KiB a column"
    )
    print(
        f"KLL off by at most       {largest[1]:.5f}, promised 0.00500 in 99 of 100, {kept[1] / len(numeric) / 1024:.1f} KiB a column"
    )
    again = profile(frame, START, START + DAY).to_bytes() == made.to_bytes()
    theirs = [next(iter(sketched(numbers).values())).serialize() for _ in range(2)]
    print(f"the same rows again give the same bytes: {again}; KLL: {theirs[0] == theirs[1]}")


def rows(count: int, seed: int) -> pl.DataFrame:
    """Twenty columns as tables of events have them."""
    rng = np.random.default_rng(seed)
    columns: dict[str, object] = {
        "prediction": rng.beta(2, 5, count),
        "normal": rng.normal(size=count),
        "price": rng.lognormal(3, 1, count),
        "price_cents": rng.lognormal(3, 1, count).round(2),
        "temperature": rng.normal(55, 18, count).round(1),
        "humidity": pl.Series(rng.normal(60, 10, count)).set(pl.Series(rng.random(count) < 0.1), None),
        "delay": pl.Series(rng.normal(5, 30, count).round()).set(pl.Series(rng.random(count) < 0.02), None),
        "amount": np.where(rng.random(count) < 0.6, 0.0, rng.gamma(2, 50, count)),
        "distance": rng.integers(80, 5000, count),
        "hour": rng.integers(0, 24, count),
        "seats": rng.poisson(150, count),
        "customer": rng.integers(0, 10**9, count),
        "late": rng.random(count) < 0.23,
        "holiday": rng.random(count) < 0.03,
        "carrier": texts(rng.integers(0, 16, count)),
        "origin": texts(rng.integers(0, 3, count)),
        "destination": texts(rng.integers(0, 300, count)),
        "plane": texts(np.minimum(rng.zipf(1.3, count), 100_000)),
        "day": pl.Series(rng.integers(15_700, 15_760, count)).cast(pl.Int32).cast(pl.Date),
        "scheduled": pl.Series(1_356_998_400_000_000 + rng.integers(0, 86_400, count) * 10**6).cast(
            pl.Datetime("us", "UTC")
        ),
    }
    return pl.DataFrame(columns)


def texts(keys: np.ndarray) -> pl.Series:
    return "N" + pl.Series(keys).cast(pl.String)


def described(frame: pl.DataFrame) -> object:
    text = [name for name, kind in frame.schema.items() if kind in (pl.String, pl.Boolean)]
    return frame.describe(), [frame[name].value_counts() for name in text]


def sketched(frame: pl.DataFrame) -> dict[str, kll_doubles_sketch]:
    sketches = {}
    for name in frame.columns:
        sketch = sketches[name] = kll_doubles_sketch(KLL)
        sketch.update(frame[name].drop_nulls().cast(pl.Float64).to_numpy(writable=True))
    return sketches


def joined(days: list[dict[str, kll_doubles_sketch]]) -> dict[str, kll_doubles_sketch]:
    year = {name: kll_doubles_sketch(KLL) for name in days[0]}
    for sketches in days:
        for name, sketch in sketches.items():
            year[name].merge(sketch)
    return year


def kll_cdf(sketch: kll_doubles_sketch) -> Callable[[np.ndarray], np.ndarray]:
    return lambda points: np.array(sketch.get_cdf(points, inclusive=True))[:-1]


def rank_error(rows: pl.Series, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """The most by which `cdf` is off at the values that cut the rows in a thousand."""
    ordered = np.sort(rows.drop_nulls().cast(pl.Float64).to_numpy())
    points = np.unique(ordered[:: max(1, len(ordered) // 1000)])
    return float(np.abs(cdf(points) - np.searchsorted(ordered, points, side="right") / len(ordered)).max())


def rate(frame: pl.DataFrame, seconds: float) -> str:
    return f"{frame.height * frame.width / seconds / 1e6:.0f} million values/s"


def size(made: Profile) -> str:
    return f"{len(made.to_bytes()) / 1024 / len(made.columns):.1f} KiB a column"


def best(act: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of one core's work, of the best round, and what came of it."""
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        result = act()
        taken.append(time.process_time() - began)
    return min(taken), result


if __name__ == "__main__":
    main()
