"""Random small packs: what their rows hold, what happens to them day by day, and how it is written for Evergreen to read.

A `World` follows from its seed. It says everything that a test must know of it in plain Python values, so that
`reference.py` can say what is right without Evergreen. Days are numbers; day 0 is 1 January 2024.
"""

from __future__ import annotations

import csv
import json
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import polars as pl
from tests.faults.troubles import TROUBLES

FIRST = datetime(2024, 1, 1, tzinfo=UTC)
NAME = "net"

Row = dict[str, Any]
Kind = Literal["bool", "int", "id", "float", "string", "code", "datetime", "date", "constant", "empty", "wandering"]
KINDS: tuple[Kind, ...] = (
    "bool",
    "int",
    "id",
    "float",
    "string",
    "code",
    "datetime",
    "date",
    "constant",
    "empty",
    "wandering",
)
DTYPES = {
    "bool": pl.Boolean,
    "int": pl.Int64,
    "id": pl.Int64,
    "float": pl.Float64,
    "string": pl.String,
    "code": pl.String,
    "datetime": pl.Datetime("us", "UTC"),
    "date": pl.Date,
    "empty": pl.Null,
}
SQL_TYPES = {
    "bool": "BOOLEAN",
    "int": "BIGINT",
    "id": "BIGINT",
    "float": "FLOAT",
    "string": "TEXT",
    "code": "TEXT",
    "datetime": "TIMESTAMP",
    "date": "DATE",
    "empty": "TEXT",
    "wandering": "FLOAT",
}
PLAIN = ("height", "wind", "station", "price", "age", "zone", "signed", "paid", "grade", "units")
INTERNAL = (
    *("prediction", "prediction_0", "prediction_1", "rows", "index", "level_0", "count", "len", "literal", "period"),
    *("partition", "target", "event_time", "identity", "clusters", "weight", "missing", "time", "label", "champion"),
    *(
        "challenger",
        "performance",
        "freshness",
        "importance",
        "(all)",
        "name",
        "column",
        "value",
        "expectation",
        "self",
    ),
)
"""Names that the code of a platform like this one is likely to use for itself."""
HOSTILE = (
    *("^x.*$", "a b", "ä", "it's", 'say "x"', "*", "a.b", "a/b", "x,y", "%s", "{x}", "[bold]", "<b>", "None", "null"),
    *("0", "$x", "#", "📈", "-x", "a:b", "NO", "true", "1e5", "a;b", "a\\b", "__index_level_0__", "x" * 120),
)
TIMES = {
    "text with a space": "%Y-%m-%d %H:%M:%S",
    "text with a T": "%Y-%m-%dT%H:%M:%S",
    "text in UTC": "%Y-%m-%dT%H:%M:%SZ",
    "timestamp": "%Y-%m-%d %H:%M:%S.%f",
}
"""How a database holds the event time: as SQLite's own timestamp, or as text."""


VALUES: dict[Kind, Callable[[int, random.Random], Any]] = {
    "bool": lambda _, chance: chance.random() < 0.4,
    "int": lambda _, chance: chance.randint(-40, 40),
    "float": lambda _, chance: round(chance.gauss(0, 3), 4),
    "string": lambda _, chance: chance.choice(["north", "Süd", "o'east", "west, far"]),
    "code": lambda _, chance: f"{chance.randrange(60):05}",
    "datetime": lambda _, chance: datetime(2023, 1, 1, tzinfo=UTC) + timedelta(seconds=chance.randrange(10**7)),
    "date": lambda _, chance: date(2023, 1, 1) + timedelta(days=chance.randrange(200)),
    "empty": lambda _day, _chance: None,
    # Whole numbers on some days: in files, the column is of integers there.
    "wandering": lambda day, chance: chance.randint(0, 30) if day % 3 == 0 else chance.randint(0, 60) / 2,
}
"""Kind → a value of some row of a day."""


@dataclass(frozen=True)
class Column:
    """A column beside the target and the event time."""

    name: str
    kind: Kind
    nulls: float
    """The share of rows without a value."""
    constant: Any = None

    def value(self, day: int, number: int, chance: random.Random) -> Any:
        """The value of a row of `day`, its number within the day being 0 to 49."""
        if chance.random() < self.nulls:
            return None
        if self.kind == "constant":
            return self.constant
        if self.kind == "id":  # each but once, and so close to one another that a float cannot tell them apart
            return 2**53 + (50 * day + number) * 7919 % 2003
        return VALUES[self.kind](day, chance)

    @property
    def shown(self) -> str:
        """The kind of its values."""
        if self.kind != "constant":
            return self.kind
        return {bool: "bool", int: "int", float: "float", str: "string"}[type(self.constant)]


@dataclass(frozen=True)
class World:
    """A pack, its rows, and its story."""

    seed: int
    task: Literal["binary", "multiclass", "regression"]
    target: str
    event_time: str
    classes: tuple[Any, ...]
    """The classes that are there from the first day to the last; of a regression none."""
    signal: str
    """The name of the column that the target depends on."""
    columns: tuple[Column, ...]
    source: Literal["parquet", "csv", "sql", "python"]
    times: str
    """A key of TIMES; how an SQL source holds the event time."""
    train: int
    validation: int
    holdout: int
    lookback: int
    per_day: int
    metric: str
    rules: dict[str, Any]
    """What the gate's primary rule says beside its metric."""
    every_column: bool
    """Whether the model takes the event time, too, and does not say which columns it takes."""
    prior: str
    salt: str
    """The training's parameters, as `pack.yaml` has them."""
    folder: str
    """The name of the folder that everything lies in."""
    as_ofs: tuple[int, ...]
    """The days that the runs are at, rising."""
    looked: int
    """The day that the monitor looks at in the end."""
    window: int
    """How many days a window of the monitor has."""
    empty_days: frozenset[int]
    late: dict[int, int] = field(default_factory=dict)
    """Day → the as-of from which on its rows are there."""
    trouble: str | None = None
    """What goes wrong at the run `troubled`: a key of `troubles.TROUBLES`."""
    troubled: int = 0
    cleared: bool = False
    """Whether the run that was refused is cleared once it is mended; else a new one begins."""
    incidents: dict[int, str] = field(default_factory=dict)
    """Run → what happens to the home before it; the monitor's look is the last."""
    arrives: int | None = None
    """The day from which on there is another class."""
    retires: int | None = None
    """The day from which on one class is gone."""
    shifts: int | None = None
    """The day from which on the signal is another."""
    alerts: bool = False
    """Whether somebody else's alert keeps firing meanwhile."""
    everything_else: bool = False
    """Whether older days than any run needs have other columns."""

    @property
    def params(self) -> dict[str, Any]:
        """The training's parameters, as YAML 1.2 reads them."""
        return {"prior": PRIORS[self.prior], "salt": SALTS[self.salt]}

    @property
    def whole(self) -> int:
        return self.train + self.validation + self.holdout

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def rows(self, day: int) -> list[Row]:
        """The rows of a day, in order of time; the same whenever they are asked for."""
        if day in self.empty_days:
            return []
        chance = random.Random(f"{self.seed} {day}")
        rows = []
        for number in range(self.per_day):
            at = FIRST + timedelta(days=day, seconds=86400 * number // self.per_day)
            row: Row = {self.event_time: at}
            row |= {column.name: column.value(day, number, chance) for column in self.columns}
            if self.shifts is not None and day >= self.shifts:
                row[self.signal] = "far, west"
            rows.append(row | {self.target: self._truth(day, row[self.signal], chance)})
        return rows

    def _truth(self, day: int, signal: str | None, chance: random.Random) -> Any:
        level = 0 if signal is None else len(signal)
        if self.task == "regression":
            return level * 4 + chance.randrange(64) / 64  # sums of such numbers are exact in floating point
        classes = self.classes
        if self.retires is not None and day >= self.retires:
            classes = classes[:-1]
        if self.arrives is not None and day >= self.arrives and chance.random() < (0.12 if self.seed % 2 else 0.4):
            return NEWCOMER[type(classes[0])]
        return classes[level % len(classes)] if chance.random() < 0.7 else chance.choice(classes)

    def visible(self, as_of: int) -> dict[int, list[Row]]:
        """Day → rows, as the source holds them when a run as of that day begins: also of days that are still to come."""
        days = range(as_of + 2)
        return {day: rows for day in days if self.late.get(day, 0) <= as_of and (rows := self.rows(day))}


def world(seed: int) -> World:
    """The world of a seed."""
    chance = random.Random(seed)
    task = chance.choice(["binary", "binary", "multiclass", "regression"])
    names = list(chance.choice([PLAIN, PLAIN + INTERNAL, INTERNAL, INTERNAL + HOSTILE, HOSTILE]))
    chance.shuffle(names)
    source = chance.choice(["parquet", "parquet", "csv", "sql", "python"])
    columns = [Column(names.pop(), "string", chance.choice([0, 0.05]))]
    for _ in range(chance.randint(1, 6)):
        kind = chance.choice(KINDS)
        if kind == "code" and source == "csv":
            kind = "string"  # a CSV file says nothing of types: digits are numbers there
        constant = chance.choice([True, 3, 0.25, "same"]) if kind == "constant" else None
        nulls = chance.choice([0, 0, 0.05, 0.4])
        columns.append(Column(names.pop(), kind, nulls, constant))
    first = 16
    as_ofs = [first]
    for _ in range(chance.choice([0, 1, 1, 2])):
        as_ofs.append(as_ofs[-1] + chance.randint(1, 4))
    validation, holdout = chance.randint(1, 2), chance.randint(2, 3)
    window = 2
    late, empty = {}, set()
    if chance.random() < 0.4:
        at = chance.choice(as_ofs)
        late[at - chance.randint(1, 2)] = at + 1
    if validation > 1 and not late and chance.random() < 0.5:
        empty.add(chance.randrange(as_ofs[-1]))
    classes = chance.choice([classes for classes in CLASSES[task] if source != "csv" or "10" not in classes])
    metric = chance.choice(METRICS[task])
    rules: dict[str, Any] = {"margin": chance.choice([0.02, 0.5, 5.0])}
    if chance.random() < 0.2:
        rules |= {"unclear": "review"}
    if chance.random() < 0.3:
        rules |= chance.choice(LIMITS[task].get(metric, [{}]))
    made = World(
        seed=seed,
        task=task,
        target=names.pop(),
        event_time=names.pop(),
        classes=classes,
        signal=columns[0].name,
        columns=tuple(columns),
        source=source,
        times=chance.choice(list(TIMES)),
        train=chance.randint(4, 6),
        validation=validation,
        holdout=holdout,
        lookback=chance.randint(0, 2),
        per_day=chance.randint(30, 50),
        metric=metric,
        rules=rules,
        every_column=chance.random() < 0.3,
        prior=chance.choice(list(PRIORS)),
        salt=chance.choice(list(SALTS)),
        folder=chance.choice(["place", "place", "a place", "pl[a]ce", "place?", "plätze*"]),
        as_ofs=tuple(as_ofs),
        looked=as_ofs[-1] + 3 * window,
        window=window,
        empty_days=frozenset(empty),
        late=late,
    )
    return replace(made, **_story(made, chance))


def _story(world: World, chance: random.Random) -> dict[str, Any]:
    """What befalls a world's pack."""
    story: dict[str, Any] = {"alerts": chance.random() < 0.2}
    looked = len(world.as_ofs)
    fitting = [name for name, trouble in TROUBLES.items() if trouble.fits(world)]
    if chance.random() < 0.5:
        name = chance.choice(fitting)
        troubled = 0 if TROUBLES[name].earliest_only else chance.randrange(looked)
        story |= {"trouble": name, "troubled": troubled, "cleared": chance.random() < 0.5}
    if chance.random() < 0.4:
        story["incidents"] = {max(1, chance.randint(1, looked) - 1): chance.choice(INCIDENTS)}
    elif chance.random() < 0.06 and story.get("troubled") != 0:
        story["incidents"] = {0: "two at once"}
    changes = ["shifts", *(["arrives", "retires"] if world.task == "multiclass" and len(world.classes) > 2 else [])]
    if chance.random() < (0.5 if world.task == "multiclass" else 0.15):
        day = chance.choice([world.as_ofs[0] - 1, *world.as_ofs[1:], world.as_ofs[-1]])
        story[chance.choice(changes)] = day
    if world.source in ("parquet", "csv") and chance.random() < 0.2:
        story["everything_else"] = True
    return story


NEWCOMER = {str: "fraud", int: 5, bool: True}
PRIORS = {"1e-4": 0.0001, "0.5": 0.5, "5E-1": 0.5}
SALTS = {"NO": "NO", "on": "on", "y": "y", '"1e5"': "1e5", "12:30": "12:30"}
INCIDENTS = ("home moved", "all moved", "home copied", "checked out")
METRICS = {
    "binary": ["roc_auc", "average_precision", "log_loss", "brier", "accuracy"],
    "multiclass": ["accuracy", "macro_f1", "log_loss"],
    "regression": ["rmse", "mae", "r2"],
}
LIMITS = {
    "binary": {"roc_auc": [{"min": 0.3}, {"min": 0.9999}], "log_loss": [{"max": 5.0}, {"max": 0.0001}]},
    "multiclass": {"accuracy": [{"min": 0.0}, {"min": 0.9999}]},
    "regression": {"rmse": [{"max": 1000.0}, {"max": 0.0001}]},
}
CLASSES = {
    "binary": [(0, 1), (False, True)],
    "multiclass": [("billing", "login", "ä b"), (3, 1, 7), (False, True), ("10", "9", "x y", "'")],
    "regression": [()],
}


# The pack, as its author writes it.

LOADER = '''
"""Means of the target by value, column by column: exact in floating point, and every digit of every value counts."""
import json
import math
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def text(value):
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bool, np.bool_)):
        return f"bool {int(value)}"
    if isinstance(value, (int, np.integer)) or (isinstance(value, float) and value.is_integer()):
        return f"number {int(value)}"
    if isinstance(value, float):
        return f"number {float(value)!r}"
    if isinstance(value, str):
        return f"text {value}"
    if isinstance(value, datetime):
        at = value if value.tzinfo else value.replace(tzinfo=timezone.utc)
        return f"instant {(at - EPOCH) // timedelta(microseconds=1)}"
    if isinstance(value, date):
        return f"date {value.isoformat()}"
    raise TypeError(f"{value!r} of {type(value)}")


def cell(salt, name, value):
    said = text(value)
    return 8 if said is None else crc32(f"{salt}|{name}|{said}".encode()) % 8


class Model:
    def __init__(self, known):
        self.salt, self.tables, self.flat = known["salt"], known["tables"], known["classes"] is None

    def predict(self, frame):
        columns = [(self.tables[name], name, frame[name].tolist()) for name in sorted(self.tables)]
        predicted = []
        for place in range(len(frame)):
            total = None
            for table, name, values in columns:
                means = table[cell(self.salt, name, values[place])]
                total = means if total is None else [a + b for a, b in zip(total, means)]
            predicted.append([sum_ / len(columns) for sum_ in total])
        return np.array(predicted)[:, 0] if self.flat else np.array(predicted)


def load(folder):
    return Model(json.loads((Path(folder) / "known.json").read_text(encoding="utf-8")))
'''
MODEL = f"""
import json

LOADER = {LOADER!r}
INPUTS = None


def train(data, job):
    code = {{}}
    exec(LOADER, code)
    rows, names = data.train, INPUTS or sorted(set(data.train.columns) - {{data.target}})
    truth = rows[data.target].to_list()
    classes = sorted(set(truth)) if data.task == "multiclass" else None
    goals = [[float(value == one) for one in classes] if classes else [float(value)] for value in truth]
    weight = job.params["prior"] * data.validation.height
    overall = [sum(goal) / len(goals) for goal in zip(*goals)]
    tables = {{}}
    for name in names:
        sums, counts = [[0.0] * len(overall) for _ in range(9)], [0] * 9
        for value, goal in zip(rows[name].to_list(), goals):
            place = code["cell"](job.params["salt"], name, value)
            counts[place] += 1
            sums[place] = [a + b for a, b in zip(sums[place], goal)]
        tables[name] = [
            [(s + weight * mean) / (count + weight) for s, mean in zip(row, overall)] for row, count in zip(sums, counts)
        ]
    known = {{"salt": job.params["salt"], "tables": tables, "classes": classes}}
    (job.model_dir / "known.json").write_text(json.dumps(known), encoding="utf-8")
    (job.model_dir / "loader.py").write_text(LOADER, encoding="utf-8")
    if INPUTS:
        job.describe(inputs=INPUTS, requirements=["numpy", "pandas"])
"""
READ = '''
from pathlib import Path

import polars as pl

def read(window):
    """The files of the lake, each a frame."""
    for file in sorted(Path({lake!r}).iterdir()):
        frame = pl.read_parquet(file)
        yield frame.filter((frame[{time!r}] >= window.start) & (frame[{time!r}] < window.end))
'''


@dataclass
class Pack:
    """The folder of a world's pack, and its source."""

    world: World
    folder: Path
    lake: Path
    """Where a Python source reads; it stays where it is when the pack moves."""
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was changed in `pack.yaml` since, by section."""
    expectations: list[dict[str, Any]] = field(default_factory=list)
    odd_times: bool = False
    """Whether every third time is spelt otherwise."""

    def write(self) -> None:
        """Write `pack.yaml` and the Python files."""
        world = self.world
        self.folder.mkdir(parents=True, exist_ok=True)
        sources = {
            "parquet": {"path": "rows/*.parquet"},
            "csv": {"path": "rows/*.csv"},
            "sql": {"url": "sqlite:///rows.db", "table": "rows"},
            "python": {"call": "source:read"},
        }
        content: dict[str, Any] = {
            "description": "A pack of chance",
            "owner": "chance@example.com",
            "source": {"kind": world.source, **sources[world.source]},
            "data": {
                "target": world.target,
                "event_time": world.event_time,
                "task": world.task,
                "lookback": world.lookback,
                "train": f"{world.train}d",
                "validation": f"{world.validation}d",
                "holdout": f"{world.holdout}d",
                "max_staleness": "3650d",
                "quarantine": 0.05,
            },
            "expectations": self.expectations,
            "training": {"call": "model:train", "params": "PARAMS", "gpus": 0, "timeout": "2m"},
            "gate": {"primary": {"metric": world.metric, **world.rules}},
            "triggers": {
                "drift": {
                    "window": f"{world.window}d",
                    "features": {"psi": 0.6},
                    "target": {"psi": 0.4},
                    "prediction": {"psi": 0.6},
                    "performance": {"drop": {"rmse": 2.0, "mae": 2.0, "r2": 0.5}.get(world.metric, 0.3)},
                    "importance": {"shift": 0.7},
                },
                "admission": {"confirm": {"windows": "2 of 99", "each": "1s"}, "cooldown": "0s"},
            },
        }
        for section, changes in self.changes.items():
            content[section] = {**content[section], **changes}
        # JSON is YAML, too, and leaves no doubt what is text.
        text = json.dumps(content, ensure_ascii=False, indent=1)
        text = text.replace('"PARAMS"', f"{{prior: {world.prior}, salt: {world.salt}}}")
        (self.folder / "pack.yaml").write_text(text, encoding="utf-8")
        inputs = None if world.every_column else sorted(column.name for column in world.columns)
        (self.folder / "model.py").write_text(MODEL.replace("INPUTS = None", f"INPUTS = {inputs!r}"), encoding="utf-8")
        if world.source == "python":
            read = READ.format(lake=str(self.lake), time=world.event_time)
            (self.folder / "source.py").write_text(read, encoding="utf-8")

    @property
    def rows(self) -> Path:
        return self.lake if self.world.source == "python" else self.folder / "rows"

    def file(self, day: int) -> Path:
        """The file of a day, where the source is made of files."""
        return self.rows / f"{day:03}.{'csv' if self.world.source == 'csv' else 'parquet'}"

    def fill(self, days: dict[int, list[Row]]) -> None:
        """Write these rows as all that the source holds."""
        if self.world.source == "sql":
            self._fill_database([row for day in sorted(days) for row in days[day]])
            return
        self.rows.mkdir(parents=True, exist_ok=True)
        for file in self.rows.iterdir():
            if int(file.stem) not in days:
                file.unlink()
        for day, rows in days.items():
            if rows and self.world.source == "csv":
                write_csv(self.file(day), self._spelt(rows))
            elif rows:
                self.write_parquet(self.file(day), rows)

    def _spelt(self, rows: list[Row]) -> list[Row]:
        """The rows, some of their times in another spelling if that is the trouble."""
        time = self.world.event_time
        odd = [row | {time: row[time].strftime("%d.%m.%Y %H:%M")} if row[time] else row for row in rows[::3]]
        return [*odd, *rows[1::3], *rows[2::3]] if self.odd_times else rows

    def write_parquet(self, file: Path, rows: list[Row]) -> None:
        self.frame(rows).write_parquet(file)

    def frame(self, rows: list[Row]) -> pl.DataFrame:
        """The rows as a polars frame, each column of its type."""
        world = self.world
        truths = {"binary": pl.Int64, "regression": pl.Float64, "multiclass": pl.String}
        types: dict[str, Any] = {world.event_time: pl.Datetime("us", "UTC"), world.target: truths[world.task]}
        if world.classes:
            types[world.target] = {bool: pl.Boolean, int: pl.Int64, str: pl.String}[type(world.classes[0])]
        for column in world.columns:
            if column.kind == "wandering":
                whole = all(isinstance(row[column.name], int | None) for row in rows)
                types[column.name] = pl.Int64 if whole else pl.Float64
            else:
                types[column.name] = DTYPES[column.shown]
        # Named afterwards: polars takes a name such as ^x.*$ for a pattern while it makes a column.
        return pl.DataFrame({name: pl.Series([row[name] for row in rows], dtype=kind) for name, kind in types.items()})

    def _fill_database(self, rows: list[Row]) -> None:
        world, file = self.world, self.folder / "rows.db"
        file.unlink(missing_ok=True)
        truth = {bool: "BOOLEAN", int: "BIGINT", str: "TEXT"}.get(type(world.classes[0])) if world.classes else "FLOAT"
        types = {world.event_time: "TIMESTAMP" if world.times == "timestamp" else "TEXT", world.target: truth}
        types |= {column.name: SQL_TYPES[column.shown] for column in world.columns}
        quoted = {name: '"' + name.replace('"', '""') + '"' for name in types}
        database = sqlite3.connect(file)
        database.execute(f"create table rows ({', '.join(f'{quoted[name]} {kind}' for name, kind in types.items())})")
        marks = ", ".join("?" * len(types))
        values = [[self._in_database(name, row[name]) for name in types] for row in self._spelt(rows)]
        database.executemany(f"insert into rows values ({marks})", values)
        database.commit()
        database.close()

    def _in_database(self, name: str, value: Any) -> Any:
        if isinstance(value, datetime):
            return value.strftime(TIMES[self.world.times if name == self.world.event_time else "timestamp"])
        return value.isoformat() if isinstance(value, date) else value


def write_csv(file: Path, rows: list[Row]) -> None:
    """Write rows as CSV with a header; nothing stands for no value."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(rows[0])
        writer.writerows([[_as_text(value) for value in row.values()] for row in rows])


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%SZ")
    return str(value)
