"""What is right: rows, windows, predictions, metrics and verdicts of a world, by plain Python, numpy and scikit-learn.

Nothing of Evergreen is used here, so that the two agree only where both are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any
from zlib import crc32

import numpy as np
from sklearn import metrics
from tests.faults.worlds import FIRST, Row, World

GREATER_IS_BETTER = {"roc_auc", "average_precision", "accuracy", "macro_f1", "r2"}


@dataclass(frozen=True)
class Expected:
    """What a run must have made of the source."""

    days: dict[int, list[Row]]
    """Day → rows, of the days that have some."""
    train: range
    validation: range
    holdout: range
    model: Model
    predicted: np.ndarray
    """Of the hold-out's rows, in order of time."""
    figures: dict[str, float]

    def rows(self, days: range) -> list[Row]:
        return [row for day in days for row in self.days.get(day, [])]


@dataclass
class Memory:
    """What the runs that were accepted have seen: the rows of the days from `start` up to `end`."""

    start: int = 0
    end: int = 0
    days: dict[int, list[Row]] = field(default_factory=dict)


def look(world: World, memory: Memory, source: dict[int, list[Row]], as_of: int, whole: int) -> tuple[Memory, int]:
    """What a run as of a day knows of the source, and the day that its data ends before.

    It reads the days of the last `whole` that no run has seen, and the newest `lookback` of the others again. Where
    the data ends earlier, it looks once more from there.
    """
    seen = _read(world, memory, source, range(as_of - whole, as_of))
    if seen.days and seen.end < as_of:
        seen = _read(world, seen, source, range(seen.end - whole, seen.end))
    return seen, seen.end


def _read(world: World, memory: Memory, source: dict[int, list[Row]], window: range) -> Memory:
    known = [day for day in window if memory.start <= day < memory.end]
    again = known[len(known) - min(world.lookback, len(known)) :]
    days = {}
    for day in window:
        rows = memory.days.get(day, []) if day in known and day not in again else source.get(day, [])
        if rows:
            days[day] = rows
    return Memory(window.start, max(days) + 1 if days else window.start, days)


def expected(world: World, days: dict[int, list[Row]], end: int, lengths: dict[str, int]) -> Expected:
    """What a run makes of clean rows whose windows end before the day `end` and are so many days long."""
    held = range(end - lengths["holdout"], end)
    validation = range(held.start - lengths["validation"], held.start)
    train = range(validation.start - lengths["train"], validation.start)
    rows = {
        part: [row for day in window for row in days.get(day, [])]
        for part, window in (("train", train), ("validation", validation), ("holdout", held))
    }
    model = Model.fit(world, rows["train"], len(rows["validation"]))
    predicted = model.predict(rows["holdout"])
    truth = [row[world.target] for row in rows["holdout"]]
    return Expected(days, train, validation, held, model, predicted, figures(world, truth, predicted, model.classes))


# The model of `worlds.MODEL`, told a second time.


@dataclass(frozen=True)
class Model:
    """Means of the target by value, for each column."""

    world: World
    names: tuple[str, ...]
    classes: list[Any] | None
    tables: dict[str, np.ndarray]
    """Column → (9, goals)."""

    @classmethod
    def fit(cls, world: World, rows: Sequence[Row], validated: int) -> Model:
        names = {column.name for column in world.columns} | ({world.event_time} if world.every_column else set())
        truth = [row[world.target] for row in rows]
        classes = sorted(set(truth)) if world.task == "multiclass" else None
        goals = np.array([[float(t == c) for c in classes] if classes else [float(t)] for t in truth])
        weight = world.params["prior"] * validated
        mean = goals.sum(axis=0) / len(goals)
        tables = {}
        for name in sorted(names):
            places = np.array([_place(world, name, row[name]) for row in rows])
            sums = np.array([goals[places == place].sum(axis=0) for place in range(9)])
            counts = np.bincount(places, minlength=9)[:, None]
            tables[name] = (sums + weight * mean) / (counts + weight)
        return cls(world, tuple(sorted(names)), classes, tables)

    def predict(self, rows: Sequence[Row]) -> np.ndarray:
        """(n,), or (n, classes)."""
        total: Any = 0.0
        for name in self.names:
            total = total + self.tables[name][[_place(self.world, name, row[name]) for row in rows]]
        mean = total / len(self.names)
        return mean if self.classes else mean[:, 0]


def _place(world: World, name: str, value: Any) -> int:
    if value is None:
        return 8
    match value:
        case bool():
            text = f"bool {int(value)}"
        case int():
            text = f"number {value}"
        case float():
            text = f"number {int(value)}" if value == math.floor(value) else f"number {value!r}"
        case str():
            text = f"text {value}"
        case datetime():
            since = value - FIRST
            text = (
                f"instant {1704067200_000000 + (since.days * 86400 + since.seconds) * 1_000_000 + since.microseconds}"
            )
        case date():
            text = f"date {value.isoformat()}"
    return crc32(f"{world.params['salt']}|{name}|{text}".encode()) % 8


# Metrics.


def figures(world: World, truth: Sequence[Any], predicted: np.ndarray, classes: list[Any] | None) -> dict[str, float]:
    """Every metric of the task; NaN where it is undefined on the rows."""
    if world.task == "regression":
        spread = len(set(truth)) > 1
        return {
            "rmse": math.sqrt(metrics.mean_squared_error(truth, predicted)),
            "mae": metrics.mean_absolute_error(truth, predicted),
            "r2": metrics.r2_score(truth, predicted) if spread else math.nan,
        }
    if world.task == "binary":
        y = np.array(truth, dtype=int)
        both = len(set(truth)) > 1
        return {
            "roc_auc": metrics.roc_auc_score(y, predicted) if both else math.nan,
            "average_precision": metrics.average_precision_score(y, predicted) if y.any() else math.nan,
            "log_loss": metrics.log_loss(y, predicted, labels=[0, 1]),
            "brier": metrics.brier_score_loss(y, predicted, pos_label=1),
            "accuracy": metrics.accuracy_score(y, predicted >= 0.5),
            "calibration_error": _calibration_error(y, predicted),
        }
    assert classes is not None
    names = [repr(name) for name in classes]  # as text, so that classes of any type can stand beside one another
    said = [repr(value) for value in truth]
    chosen = [names[place] for place in predicted.argmax(axis=1)]
    # A class that the model does not know has the probability 0, which the loss keeps one float away from it.
    given = [row[names.index(value)] if value in names else 0.0 for row, value in zip(predicted, said, strict=True)]
    least = np.finfo(float).eps
    return {
        "accuracy": metrics.accuracy_score(said, chosen),
        "macro_f1": metrics.f1_score(said, chosen, average="macro", labels=sorted({*said, *chosen}), zero_division=0),
        "log_loss": float(np.mean(-np.log(np.clip(given, least, 1 - least)))),
    }


def _calibration_error(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The mean distance of predicted from observed shares in 15 bins of equal mass, weighted by their rows."""
    cuts = np.quantile(predicted, np.arange(1, 15) / 15)
    bins = np.array([int((cuts < value).sum()) for value in predicted])
    gaps = [abs((predicted[bins == place] - truth[bins == place]).sum()) for place in range(15)]
    return float(sum(gaps) / len(truth))


# The gate.


def decision(world: World, figure: float, difference: tuple[float, float | None, float | None] | None) -> str:
    """The gate's decision by the primary rule: `difference` is challenger less champion with its interval, if there is one.

    Where the interval cannot be told, a person decides.
    """
    rules = world.rules
    if figure < rules.get("min", -math.inf) or figure > rules.get("max", math.inf):
        return "reject"
    if difference is None:
        return "promote"
    value, low, high = difference
    if low is None or high is None:
        return "review"
    if world.metric not in GREATER_IS_BETTER:
        value, low, high = -value, -high, -low
    margin = rules["margin"]
    if low >= -margin:
        return "promote"
    if high < -margin:
        return "reject"
    return "promote" if value >= -margin and rules.get("unclear") != "review" else "review"
