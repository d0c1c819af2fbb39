"""A pack: one folder with all that keeps one model trained. What a user may write in `pack.yaml`, as frozen values.

Loads, never acts: no pack's Python is imported here (jobs do that), so one broken pack cannot harm another. Every
mistake is a `PackError` that names the file, the line, the value and the nearest thing that would have been right.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic import ValidationError as PydanticError

from evergreen.errors import PackError, masked, nearest, quoted
from evergreen.yaml_core import TEXT_TAG, CoreLoader

NAME = re.compile(r"(?!main$)[a-z][a-z0-9_]{0,47}")
NAMING = (
    "use lower-case letters, digits and _, a letter first, at most 48 characters; "
    "not main, a branch that the snapshot repository has for itself"
)
CALL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*:[A-Za-z_][A-Za-z0-9_]*")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LONGEST_S = 100 * 365 * 86400

TASK_METRICS: Mapping[str, tuple[str, ...]] = {
    "binary": ("roc_auc", "average_precision", "log_loss", "brier", "accuracy", "calibration_error"),
    "multiclass": ("accuracy", "macro_f1", "log_loss"),
    "regression": ("rmse", "mae", "r2"),
}
"""The metrics an evaluation produces, by the kind of target."""
PRECISION_AT_RECALL = "precision_at_recall_"
"""And, for a binary target, this with a recall after it where a rule names it: `precision_at_recall_0.8`."""
RECALL = re.compile(r"0\.\d{0,3}[1-9]|1")


def is_metric(task: str, name: str) -> bool:
    """Whether an evaluation of such a target can produce the metric."""
    at_recall = task == "binary" and name.startswith(PRECISION_AT_RECALL)
    return name in TASK_METRICS[task] or (
        at_recall and RECALL.fullmatch(name.removeprefix(PRECISION_AT_RECALL)) is not None
    )


def _duration(value: object) -> object:
    """`60d`, `2h`, `90m`, `45s`, `1w` as a timedelta."""
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]+)([smhdw])", value.strip())
        if found is None:
            raise ValueError("is not a duration: write a whole number and s, m, h, d or w, as in 60d")
        digits = found[1].lstrip("0")[:12] or "0"  # Python refuses to read thousands of them
        seconds = int(digits) * UNITS_S[found[2]]
        if seconds > LONGEST_S:
            raise ValueError("is longer than a hundred years")
        return timedelta(seconds=seconds)
    if isinstance(value, timedelta):
        return value
    raise ValueError("is not a duration: write a whole number and s, m, h, d or w, as in 60d")


def _instant(value: object) -> object:
    """A date or a time as an aware UTC datetime; a naive one is taken as UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError("is not a time: write 2013-04-01 or 2013-04-01T06:00:00+00:00") from error
    if isinstance(value, datetime):
        try:
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError as error:
            raise ValueError("is before the year 1 or after the year 9999 in UTC") from error
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    raise ValueError("is not a time: write 2013-04-01 or 2013-04-01T06:00:00+00:00")


def duration_text(value: timedelta) -> str:
    """A duration as pack.yaml writes it, in the largest whole unit."""
    seconds = int(value.total_seconds())
    for unit in ("d", "h", "m"):
        if seconds and seconds % UNITS_S[unit] == 0:
            return f"{seconds // UNITS_S[unit]}{unit}"
    return f"{seconds}s"


def parse_duration(value: str) -> timedelta:
    """`60d` and the like as a timedelta; ValueError says what to write instead."""
    parsed = _duration(value)
    assert isinstance(parsed, timedelta)
    return parsed


def parse_instant(value: str | date) -> datetime:
    """A date or a time as an aware UTC datetime; ValueError says what to write instead."""
    parsed = _instant(value)
    assert isinstance(parsed, datetime)
    return parsed


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("is not a boolean: write true or false, without quotes")  # noqa: TRY004  pydantic wants it
    return value


Flag = Annotated[bool, BeforeValidator(_flag)]
Duration = Annotated[timedelta, BeforeValidator(_duration), PlainSerializer(duration_text, return_type=str)]
Instant = Annotated[datetime, BeforeValidator(_instant)]


def _call(value: str) -> str:
    if not CALL.fullmatch(value):
        raise ValueError("is not 'file:function', as in model:train for the function train in model.py")
    return value


Call = Annotated[str, BeforeValidator(_call)]

CRON_NAMES = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")


def _cron(value: str) -> str:
    """A cron expression of five fields, or Airflow's name for one: a wrong one would cost every pack its DAG."""
    from croniter import croniter  # type: ignore[import-untyped]

    if value not in CRON_NAMES and not (len(value.split()) == 5 and croniter.is_valid(value)):
        raise ValueError(f"is not a cron expression: write five fields, as in 0 3 * * *, or {', '.join(CRON_NAMES)}")
    return value


Cron = Annotated[str, AfterValidator(_cron)]


class Part(BaseModel):
    """A part of a pack: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PythonSource(Part):
    """Rows from a function of the pack: `read(window) -> Iterator[Frame]`. It runs as a job."""

    kind: Literal["python"]
    call: Call


def _without_secrets(url: str) -> str:
    """A path or URL that says where, and not by which password: a pack is in git, its secrets are Airflow's."""
    if masked(url) != url:
        raise ValueError("holds a password: make an Airflow connection of it, and write connection: ITS_ID")
    return url


Url = Annotated[str, Field(min_length=1), AfterValidator(_without_secrets)]


class ParquetSource(Part):
    """Rows from Parquet files: a path or fsspec URL, with `*` and `**`. A relative path is under the pack's folder.

    `?` and `[…]` are patterns, too, unless a local file or folder is called so.
    """

    kind: Literal["parquet"]
    path: Url
    connection: str | None = None
    """The id of an Airflow connection that may read them, for s3:// and http(s)://; else what the environment gives."""


class CsvSource(Part):
    """Rows from CSV files with a header line: a path or fsspec URL, with `*` and `**`."""

    kind: Literal["csv"]
    path: Url
    connection: str | None = None
    """As for Parquet."""
    separator: str = Field(default=",", min_length=1, max_length=1)
    null_values: tuple[str, ...] = ("", "NA")


class SqlSource(Part):
    """Rows of a table or a query, of any database that SQLAlchemy has a driver for."""

    kind: Literal["sql"]
    connection: str | None = None
    """The id of an Airflow connection."""
    url: Url | None = None
    """In its place, an SQLAlchemy URL that needs no password; a SQLite file may be relative to the pack's folder."""
    table: str | None = None
    """A table or view, with its schema or without: `sales.orders`."""
    query: str | None = None
    """In its place, a SELECT; the window is asked of its result."""

    @model_validator(mode="after")
    def _says_where_and_what(self) -> SqlSource:
        if (self.connection is None) == (self.url is None):
            raise ValueError("names one of connection, the id of an Airflow connection, and url")
        if (self.table is None) == (self.query is None):
            raise ValueError("names one of table and query")
        return self


Source = Annotated[PythonSource | ParquetSource | CsvSource | SqlSource, Field(discriminator="kind")]
SOURCES: dict[str, type[Part]] = {"python": PythonSource, "parquet": ParquetSource, "csv": CsvSource, "sql": SqlSource}

Partition = Literal["hour", "day", "week", "month"]


class Clock(Part):
    """A historical source replayed as if live: at `speed`, from `start`, since the home was made."""

    start: Instant
    speed: float = Field(default=1440.0, gt=0)

    def at(self, instant: datetime, made_at: datetime) -> datetime:
        """What the clock shows at `instant`, in a home made at `made_at`; instants before that are as they are."""
        if instant < made_at:
            return instant
        try:
            return self.start + (instant - made_at) * self.speed
        except OverflowError:
            return datetime.max.replace(tzinfo=UTC)


class Data(Part):
    """The dataset: its target, its time, its windows."""

    target: str
    event_time: str
    task: Literal["binary", "multiclass", "regression"] = "binary"
    partition: Partition = "day"
    lookback: int = Field(default=0, ge=0)
    train: Duration = timedelta(days=60)
    validation: Duration = timedelta(days=7)
    holdout: Duration = timedelta(days=14)
    max_staleness: Duration = timedelta(days=30)
    quarantine: float = Field(default=0.02, ge=0, le=1)
    """Share of a window's rows that may fail an expectation and be set aside before the run ends."""

    @property
    def whole(self) -> timedelta:
        """How far back a run reads."""
        return self.train + self.validation + self.holdout

    @model_validator(mode="after")
    def _windows_hold_partitions(self) -> Data:
        longest = {"hour": 1, "day": 24, "week": 168, "month": 24 * 31}[self.partition]
        for name in ("train", "validation", "holdout"):
            if getattr(self, name) < timedelta(hours=longest):
                raise ValueError(f"{name} is shorter than one {self.partition}, the partition")
        if self.target == self.event_time:
            raise ValueError("target and event_time are the same column")
        return self


class Expectation(Part):
    """One Great Expectations expectation: its type and its arguments, verbatim."""

    type: str
    arguments: dict[str, Any]


def _bytes(value: object) -> object:
    """`8g`, `512m` as bytes."""
    found = re.fullmatch(r"(\d+)([mg])", value.strip()) if isinstance(value, str) else None
    if found is None:
        raise ValueError("is no amount of memory: write a whole number and m or g, as in 8g")
    return int(found[1]) * {"m": 2**20, "g": 2**30}[found[2]]


class Container(Part):
    """Jobs in containers of this machine's engine: isolated, and with packages of the pack's own."""

    docker: str | None = Field(default=None, min_length=1)
    """The image, which begins with Evergreen's own; none: Evergreen's own, which EVERGREEN_IMAGE names."""
    memory: Annotated[int, BeforeValidator(_bytes)] = 8 * 2**30
    """Bytes; a job that takes more is killed."""
    cpus: float = Field(default=4.0, gt=0)
    """At most so many, and no more than there are."""


def _runtime(value: object) -> object:
    if isinstance(value, str) and value not in ("process", "docker"):
        raise ValueError("is no place to run in: write process, docker, or {docker: IMAGE}")
    return {"process": None, "docker": {}}.get(value, value) if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    """Refuse `.inf` and `.nan`, which the JSON that a job gets cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"holds {value}, which is no finite number: write a large number, or leave it out")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(item)
    return value


class Training(Part):
    """The training function and what an operator may turn."""

    call: Call
    params: Annotated[dict[str, Any], AfterValidator(_finite)] = {}
    seed: int = Field(default=7, ge=0, lt=2**31)
    gpus: Literal["auto"] | Annotated[int, Field(ge=0, le=1)] = "auto"
    timeout: Duration = timedelta(hours=2)
    runtime: Annotated[Container | None, BeforeValidator(_runtime)] = None
    """Where `train` and `score` jobs run: `process`, or `docker`, or a container in so many words. A source's `read` is a process: it needs a network."""


class PrimaryRule(Part):
    """The metric that decides, its floor (or ceiling, for a loss), and the test against the champion."""

    metric: str
    min: float | None = None
    max: float | None = None
    test: Literal["non_inferior", "superior"] = "non_inferior"
    margin: float = Field(default=0.01, ge=0)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    unclear: Literal["fresher", "review"] = "fresher"
    """Where `non_inferior` shows nothing: the fresher model wins if its figure is within the margin, or a person is asked."""
    independent: Flag = False
    """The rows are independent of one another, those of one partition too: intervals are of rows, and narrower."""


class LimitRule(Part):
    """A floor or a ceiling of any metric, whatever the champion is worth."""

    metric: str
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> LimitRule:
        if self.min is None and self.max is None:
            raise ValueError("a limit names min, max, or both")
        return self


class SliceRule(Part):
    """A metric that must not fall by more than `margin` in any group of at least `min_rows` hold-out rows."""

    by: str
    metric: str
    margin: float = Field(default=0.03, ge=0)
    min_rows: int = Field(default=500, ge=1)


def _some_time(value: timedelta) -> timedelta:
    if not value:
        raise ValueError("is no time: write how long a person has to answer, as in 7d")
    return value


Fairness = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]


class FairnessRule(Part):
    """How far apart any two groups of at least `min_rows` hold-out rows may be treated; binary targets only."""

    by: str
    measure: Fairness = "equalized_odds"
    max: float = Field(ge=0, le=1)
    """The largest difference of rates between two groups."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """The probability from which a row counts as predicted 1."""
    min_rows: int = Field(default=500, ge=1)


class GateRules(Part):
    """What a challenger must show before the alias moves."""

    primary: PrimaryRule
    limits: tuple[LimitRule, ...] = ()
    slices: tuple[SliceRule, ...] = ()
    fairness: tuple[FairnessRule, ...] = ()
    latency_p95_ms: float | None = Field(default=None, gt=0)
    latency_ratio: float | None = Field(default=None, gt=0)
    """How many times the champion's p95, measured in the same minute, one row may take."""
    size_ratio: float | None = Field(default=None, gt=0)
    """How many times the champion's bytes the model folder may have."""
    promotion: Literal["automatic", "approval"] = "automatic"
    """Who has the last word on a challenger that the gate would promote: the gate, or a person."""
    approval_timeout: Annotated[Duration, AfterValidator(_some_time)] = timedelta(days=7)
    """How long a person has to answer; then the challenger is rejected."""

    def metrics(self, task: str) -> tuple[str, ...]:
        """What an evaluation produces for these rules: all metrics of the task, and those that a rule names beside."""
        return tuple(dict.fromkeys((*TASK_METRICS[task], *self.named)))

    @property
    def named(self) -> tuple[str, ...]:
        """The metrics that rules name, the primary one first."""
        rest = (*(rule.metric for rule in self.limits), *(rule.metric for rule in self.slices))
        return tuple(dict.fromkeys((self.primary.metric, *rest)))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns whose groups are looked at."""
        return tuple(dict.fromkeys((*(rule.by for rule in self.slices), *(rule.by for rule in self.fairness))))


WINDOWS = re.compile(r"([1-9]\d?) of ([1-9]\d?)")


def _windows(value: str) -> str:
    found = WINDOWS.fullmatch(value)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError("is not 'M of N' windows: write 2 of 3 for two of the newest three")
    return value


class Confirm(Part):
    """Act only on a complaint that lasts: heard in M of the newest N windows of `each`, the newest among them."""

    windows: Annotated[str, AfterValidator(_windows)]
    each: Duration = timedelta(hours=1)

    @property
    def heard(self) -> int:
        """M: in how many windows the complaint must have been heard."""
        return int(self.windows.split()[0])

    @property
    def of(self) -> int:
        """N: how many windows are looked at."""
        return int(self.windows.split()[2])

    @model_validator(mode="after")
    def _windows_last(self) -> Confirm:
        if self.each <= timedelta(0):
            raise ValueError("each is no time: write how long one window is, as in 1h")
        if self.of * self.each > timedelta(seconds=LONGEST_S):
            raise ValueError("its windows reach back more than a hundred years")
        return self


class Budget(Part):
    """What alerts may spend in any period of `per`: runs they start, and hours of training on whatever device."""

    runs: int | None = Field(default=None, ge=1)
    device_hours: float | None = Field(default=None, gt=0)
    per: Duration = timedelta(days=7)

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if self.runs is None and self.device_hours is None:
            raise ValueError("a budget names runs, device_hours, or both")
        if self.per <= timedelta(0):
            raise ValueError("per is no time: write a period, as in 7d")
        return self


class AdmissionPolicy(Part):
    """What admission makes of this pack's alerts. The defaults keep a storm of alerts to one run in six hours."""

    dedupe: Duration = timedelta(hours=1)
    """The same complaint again within this is dropped."""
    confirm: Confirm | None = None
    cooldown: Duration = timedelta(hours=6)
    """How long after a run began alerts wait."""
    budget: Budget | None = None
    brake: int = Field(default=60, ge=1)
    """Above so many alerts a minute they are looked at together, once the minute is over."""


class Move(Part):
    """How far a distribution may move from what the champion was trained on before it counts."""

    psi: float = Field(default=0.2, gt=0)
    """Population stability index: 0.1 is a small move, 0.25 a large one."""


class Drop(Part):
    """How far the champion may fall before it counts, in units of the gate's primary metric."""

    drop: float = Field(default=0.02, gt=0)


class Lean(Part):
    """How far what the champion leans on may move before it counts."""

    shift: float = Field(default=0.2, gt=0, le=1)
    """Half of what the columns' shares of importance differ by, less what chance makes: 0 for none, 1 for all."""


class Gain(Part):
    """How much better a training on newer rows must promise to do before it counts, in units of the gate's primary metric."""

    gain: float = Field(gt=0)
    """Of a stand-in, taught on the champion's rows and on today's, on the same newest rows; shown, not only measured."""


class DriftRules(Part):
    """When the monitor looks and at what, what it calls a violation, and in how many windows it must be seen."""

    schedule: Cron = "@hourly"
    window: Duration = timedelta(days=7)
    """How long a window is, in whole partitions; the newest ends at as-of."""
    features: Move = Move()
    target: Move = Move(psi=0.1)
    prediction: Move = Move(psi=0.1)
    performance: Drop = Drop()
    importance: Lean = Lean()
    freshness: Gain | None = None
    """None: it is not asked. It reads the champion's rows again, and seconds of learning, at every look."""
    violated: Annotated[str, AfterValidator(_windows)] = "2 of 3"
    """M of the newest N windows, the newest among them."""

    @model_validator(mode="after")
    def _window_lasts(self) -> DriftRules:
        if self.window <= timedelta(0):
            raise ValueError("window is no time: write how long one window is, as in 7d")
        return self

    @property
    def seen(self) -> int:
        """M: in how many windows a violation must be seen."""
        return int(self.violated.split()[0])

    @property
    def of(self) -> int:
        """N: how many windows are looked at."""
        return int(self.violated.split()[2])

    @property
    def reach(self) -> timedelta:
        """How long they are together."""
        return self.window * self.of


class RollbackRule(Drop):
    """When the monitor takes a new champion back: on probation, and shown worse than the champion before it by more than `drop`."""

    probation: Duration
    """How long after its promotion, on the pack's clock."""

    @model_validator(mode="after")
    def _probation_lasts(self) -> RollbackRule:
        if self.probation <= timedelta(0):
            raise ValueError("probation is no time: write how long it lasts, as in 14d")
        return self


def _a_day(value: timedelta) -> timedelta:
    if value < timedelta(days=1):
        raise ValueError("is less than 1d: what failed in the night must be there to be mended in the morning")
    return value


class Triggers(Part):
    """What starts a run beside people."""

    schedule: Cron | None = None
    on_new_data: Flag = False
    """Whether an update of the Airflow asset `data/<dataset>` is an alert."""
    drift: DriftRules | None = None
    """A pack that does not say is not monitored."""
    admission: AdmissionPolicy = AdmissionPolicy()


class Pack(Part):
    """One model to keep trained. `Pack.load(folder)` makes it from a folder; two packs are equal when they say the same."""

    name: str
    folder: Path = Field(exclude=True)
    description: str = Field(min_length=1)
    owner: str = Field(min_length=1)
    tags: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] = ()
    source: Source
    clock: Clock | None = None
    data: Data
    expectations: tuple[Expectation, ...] = ()
    training: Training
    gate: GateRules
    rollback: RollbackRule | None = None
    """A pack that does not say goes back when a person says so, and never by itself. Not one of the gate's rules, which
    every verdict is made again by; nor a trigger: it starts no run."""
    triggers: Triggers = Triggers()
    retention: Annotated[Duration, AfterValidator(_a_day)] | None = None
    """How long what a run alone needs is kept after its last event, where no champion ever came of it; None: for ever."""

    @property
    def dataset(self) -> str:
        """The dataset's name: the branch and the tag prefix of its snapshots."""
        return self.name

    @cached_property
    def python_files(self) -> tuple[Path, ...]:
        """The pack's own Python, sorted: what a job of this pack may import."""
        return tuple(sorted(self.folder.glob("*.py")))

    @cached_property
    def code_hash(self) -> str:
        """sha256 over the names and bytes of the pack's Python files."""
        digest = hashlib.sha256()
        for file in self.python_files:
            digest.update(file.name.encode() + b"\0" + read_own(file) + b"\0")
        return digest.hexdigest()

    @property
    def card(self) -> str:
        """The model card, `README.md` of the folder; the description where there is none."""
        file = self.folder / "README.md"
        return read_own(file).decode(errors="replace") if file.is_file() else self.description

    @classmethod
    def load(cls, folder: Path) -> Pack:
        """The pack in `folder`. Raises PackError naming file, line, value and fix, whatever `pack.yaml` holds."""
        try:
            return cls._load(folder)
        except PackError:
            raise
        except Exception as error:  # one pack must not stop what serves all of them
            raise PackError(
                f"{folder / 'pack.yaml'} holds a value that cannot be used: {type(error).__name__}: {error}",
                fix="change the value that the text names; `evergreen new NAME` makes a pack to compare with",
            ) from error

    @classmethod
    def _load(cls, folder: Path) -> Pack:
        file = folder / "pack.yaml"
        if not NAME.fullmatch(folder.name):
            raise PackError(f"{folder}: {folder.name!r} cannot name a pack", fix=NAMING)
        try:
            text = read_own(file, MAX_YAML_BYTES).decode()
        except FileNotFoundError:
            raise PackError(
                f"{file} does not exist", fix=f"write it, or start from `evergreen new {folder.name}`"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise PackError(f"{file} cannot be read: {error}", fix="make it a readable UTF-8 file") from error
        for other in (*sorted(folder.glob("*.py")), folder / "README.md"):
            _require_own(other)
        values, lines = _parse(file, text)
        expectations = values.get("expectations")
        if isinstance(expectations, list):
            values["expectations"] = _expectations(file, expectations, lines)
        try:
            pack = cls.model_validate({**values, "name": folder.name, "folder": folder})
        except PydanticError as error:
            raise _explain(file, error, lines) from error
        for where, value, known, kind in _names(pack):
            if value not in known:
                raise PackError(
                    f"{file}:{lines.get(where, 1)}: {'.'.join(map(str, where))}: {quoted(value)} is not {kind}",
                    fix=nearest(value, known),
                )
        _agrees(file, pack, lines)
        return pack


def read_own(file: Path, most_bytes: int | None = None) -> bytes:
    """The bytes of a file of a pack, opened without following a link: others' files are none of a pack's.

    Raises PackError for a link, for anything but a regular file, and for more than `most_bytes`; OSError.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _foreign(file, "a link") from error
        raise
    with os.fdopen(descriptor, "rb") as opened:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise _foreign(file, "no regular file")
        if most_bytes is not None and about.st_size > most_bytes:
            raise PackError(f"{file} has {about.st_size} bytes, and {most_bytes} are allowed", fix="make it shorter")
        return opened.read()


def _require_own(file: Path) -> None:
    """Raise PackError where `file` is there and is no regular file."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(file.lstat().st_mode):
            raise _foreign(file, "a link" if file.is_symlink() else "no regular file")


def _foreign(file: Path, kind: str) -> PackError:
    return PackError(f"{file} is {kind}", fix="put the file itself into the pack's folder")


def find(packs: Path) -> list[Path]:
    """The folders of all packs under `packs`, sorted by name: those that hold a `pack.yaml`."""
    return sorted(file.parent for file in packs.glob("*/pack.yaml"))


def load(packs: Path, name: str) -> Pack:
    """The pack called `name`. Raises PackError with the nearest name when there is none."""
    return Pack.load(folder_of(packs, name))


def folder_of(packs: Path, name: str) -> Path:
    """The folder of the pack called `name`, sound or not. Raises PackError with the nearest name when there is none."""
    if not (packs / name / "pack.yaml").is_file():
        known = [folder.name for folder in find(packs)]
        raise PackError(f"{packs}: there is no pack {name!r}", fix=nearest(name, known))
    return packs / name


def load_policy(file: Path) -> AdmissionPolicy:
    """The admission policy in `file`: what may stand below `admission:`, with or without that word, or a whole pack.yaml.

    Raises PackError as Pack.load does.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PackError(f"{file} cannot be read: {error}", fix="name a YAML file, as in {cooldown: 1h}") from error
    values, found = _parse(file, text)
    whole = values.keys() & Pack.model_fields.keys()
    at: Location = () if whole else ("triggers",) if "admission" in values else ("triggers", "admission")
    lines = {(*at, *where): line for where, line in found.items()}
    for part in reversed(at):
        values = {str(part): values}
    try:
        return Triggers.model_validate(values.get("triggers", {})).admission
    except PydanticError as error:
        raise _explain(file, error, lines, within=("triggers",)) from error


Location = tuple[str | int, ...]
MAX_YAML_BYTES = 2**20
"""Of a `pack.yaml`: what is read by everything that serves all packs."""
MAX_DEPTH = 100
"""Levels of mappings and lists within one another."""


def _parse(file: Path, text: str) -> tuple[dict[str, Any], dict[Location, int]]:  # noqa: C901  one case a line
    """The YAML mapping as plain values, and the 1-based line of every key and item by its path."""
    _require_shallow(file, text)
    loader = CoreLoader(text)
    lines: dict[Location, int] = {}
    seen: set[int] = set()

    def scalar_of(node: yaml.Node) -> Any:
        if node.tag == TEXT_TAG:
            return node.value
        try:
            return loader.construct_object(node, deep=True)
        except ValueError as error:  # Python makes no integer of thousands of digits
            where = f"{file}:{node.start_mark.line + 1}"
            raise PackError(
                f"{where}: {node.value[:60]!r}… is too long for a number", fix="shorten or quote it"
            ) from error

    def value_of(node: yaml.Node, where: Location) -> Any:
        line = node.start_mark.line + 1
        lines.setdefault(where, line)
        if id(node) in seen:
            raise PackError(f"{file}:{line}: YAML aliases (&, *) are refused", fix="write the value out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            found: dict[Any, Any] = {}
            for key_node, child in node.value:
                key = scalar_of(key_node)
                key_line = key_node.start_mark.line + 1
                if not isinstance(key, str):
                    raise PackError(f"{file}:{key_line}: the key {quoted(key)} is not text", fix="quote it")
                if key in found:
                    raise PackError(f"{file}:{key_line}: the key {quoted(key)} is there twice", fix="keep one")
                lines[(*where, key)] = key_line
                found[key] = value_of(child, (*where, key))
            return found
        if isinstance(node, yaml.SequenceNode):
            return [value_of(child, (*where, index)) for index, child in enumerate(node.value)]
        return scalar_of(node)

    try:
        node = loader.get_single_node()
        values = value_of(node, ()) if node is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise PackError(f"{file}:{line}: not YAML: {problem}", fix="mend the line; indent with spaces") from error
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise PackError(f"{file}:1: holds no mapping", fix="start from `evergreen new NAME`")
    for reserved in ("name", "folder"):
        if reserved in values:
            raise PackError(
                f"{file}:{lines[(reserved,)]}: {reserved}: is not written; the folder says it", fix="delete the line"
            )
    return values, lines


def _require_shallow(file: Path, text: str) -> None:
    """Raise PackError for YAML that is nested deeper than `MAX_DEPTH`: composing it recurses, and would end the process."""
    indents = (len(line) - len(line.lstrip(" -?:")) for line in text.splitlines())
    if text.count("[") + text.count("{") + max(indents, default=0) <= MAX_DEPTH:
        return  # each level needs a bracket, or a column before the text of a line: parsing can be saved
    depth = 0
    try:
        for event in yaml.parse(text, Loader=CoreLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise PackError(
                    f"{file}:{getattr(event.start_mark, 'line', 0) + 1}: nested deeper than {MAX_DEPTH} levels",
                    fix="write fewer brackets, or indent less",
                )
    except yaml.YAMLError:
        return  # `_parse` meets it again, and says where


def _expectations(file: Path, items: list[Any], lines: Mapping[Location, int]) -> list[dict[str, Any]]:
    """`- expect_x: {column: a}` as `{type, arguments}`."""
    found = []
    for index, item in enumerate(items):
        if not (isinstance(item, dict) and len(item) == 1):
            line = lines.get(("expectations", index), 1)
            raise PackError(
                f"{file}:{line}: expectations.{index}: {quoted(item)} is not one expectation with its arguments",
                fix="write - expect_column_values_to_not_be_null: {column: NAME}",
            )
        ((kind, arguments),) = item.items()
        if arguments is not None and not isinstance(arguments, dict):
            line = lines.get(("expectations", index, kind), 1)
            raise PackError(
                f"{file}:{line}: expectations.{index}.{kind}: {quoted(arguments)} are not arguments",
                fix=f"write - {kind}: {{column: NAME}}",
            )
        found.append({"type": kind, "arguments": arguments or {}})
    return found


def _names(pack: Pack) -> Iterator[tuple[Location, str, Sequence[str], str]]:
    """What a pack names beyond itself: where, the name, the names there are, and what they are called."""
    task = pack.data.task
    known = (*TASK_METRICS[task], *((f"{PRECISION_AT_RECALL}0.8",) if task == "binary" else ()))
    named: list[tuple[Location, str]] = [(("gate", "primary", "metric"), pack.gate.primary.metric)]
    named += [(("gate", "limits", place, "metric"), rule.metric) for place, rule in enumerate(pack.gate.limits)]
    named += [(("gate", "slices", place, "metric"), rule.metric) for place, rule in enumerate(pack.gate.slices)]
    for where, metric in named:
        yield where, metric, (*known, metric) if is_metric(task, metric) else known, f"a metric of a {task} target"
    files = [file.name for file in pack.python_files]
    yield ("training", "call"), f"{pack.training.call.split(':')[0]}.py", files, f"a file in {pack.folder}"
    if isinstance(pack.source, PythonSource):
        yield ("source", "call"), f"{pack.source.call.split(':')[0]}.py", files, f"a file in {pack.folder}"


def _agrees(file: Path, pack: Pack, lines: Mapping[Location, int]) -> None:
    """Raise PackError where two keys of a pack cannot both be meant."""
    if pack.gate.fairness and pack.data.task != "binary":
        raise PackError(
            f"{file}:{lines.get(('gate', 'fairness'), 1)}: gate.fairness: the rates it compares are of a binary "
            f"target, and data.task is {pack.data.task}",
            fix="use slices: how far a metric may fall in any group",
        )
    if pack.rollback is not None and pack.triggers.drift is None:
        raise PackError(
            f"{file}:{lines.get(('rollback',), 1)}: rollback: it is the monitor that sees a champion on probation, "
            "and triggers.drift is not there",
            fix="add drift: {} to triggers",
        )
    if pack.triggers.drift is not None and pack.triggers.drift.reach > pack.data.whole:
        where = ("triggers", "drift")
        line = lines.get((*where, "window"), lines.get((*where, "violated"), lines.get(where, 1)))
        reach, whole = (duration_text(each) for each in (pack.triggers.drift.reach, pack.data.whole))
        raise PackError(
            f"{file}:{line}: triggers.drift: its windows reach {reach} back, and a run reads {whole} of data",
            fix="shorten window, look at fewer by violated, or make data.train longer",
        )


def _explain(file: Path, error: PydanticError, lines: Mapping[Location, int], within: Location = ()) -> PackError:
    """The first five mistakes of a pack, or of the part `within` it, as one PackError, in the order of their lines."""
    mistakes = []
    fixes = []
    for item in error.errors(include_url=False):
        parts = (part for part in item["loc"] if part not in (*SOURCES, "literal['auto']"))
        where: Location = (*within, *parts)
        line = next((lines[where[:n]] for n in range(len(where), -1, -1) if where[:n] in lines), 1)
        name = ".".join(str(part) for part in where)
        kind = item["type"]
        if kind == "extra_forbidden":
            known = _known_keys(where)
            what = f"{name}: unknown key"
            fixes.append(f"{where[-1]}: {nearest(str(where[-1]), known)}")
        elif kind == "missing":
            what = f"{name}: is missing"
            fixes.append(f"add {name}")
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            found = item["input"].get("kind") if isinstance(item["input"], dict) else item["input"]
            what = f"{name}.kind: {quoted(found)} is not a kind of {name}"
            fixes.append(nearest(str(found), SOURCES))
        else:
            message = item["msg"].removeprefix("Value error, ")
            value = item.get("input")
            shown = (
                ""
                if isinstance(value, dict | list | BaseModel)
                else " " + quoted(masked(value) if isinstance(value, str) else value)
            )
            what = f"{name + ':' if name else ''}{shown} {message[:1].lower() + message[1:]}".strip()
        mistakes.append((line, what))
    mistakes.sort(key=lambda mistake: mistake[0])
    shown_mistakes = [f"{file}:{line}: {what}" for line, what in mistakes[:5]]
    if len(mistakes) > 5:
        shown_mistakes.append(f"… and {len(mistakes) - 5} more")
    return PackError(
        "\n".join(shown_mistakes), fix="; ".join(fixes[:5]) or "change the value; DESIGN of a pack: README.md"
    )


def _known_keys(where: Location) -> list[str]:
    """The keys that may stand where `where`'s last part stands."""
    model: Any = Pack
    for part in where[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        model = _model_in(field.annotation) or PythonSource
        if part == "source":
            return sorted({key for kind in SOURCES.values() for key in kind.model_fields})
    names = set(model.model_fields) - {"name", "folder"}
    return sorted(names)


def _model_in(annotation: Any) -> Any:
    """The first Part class within an annotation such as `tuple[SliceRule, ...]` or `Clock | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
