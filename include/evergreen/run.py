"""Run, and the small frozen values that its stages hand on.

A value holds references into the store, hashes and numbers; never a path, never rows. Its JSON is what XCom carries
and what the events table keeps. Times are aware and in UTC; windows are half-open: `start <= t < end`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from evergreen.errors import SourceError
from evergreen.pack import Data, Fairness, Pack, Partition
from evergreen.settings import Settings


class Value(BaseModel):
    """A frozen value with stable JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def digest(content: Any) -> str:
    """sha256 of the canonical JSON of `content`: the hash of keys and of rules."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def canonical_json(content: Any) -> str:
    """`content` as JSON that is the same wherever it is written: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), default=_plain, allow_nan=False)


def _plain(content: Any) -> Any:
    if isinstance(content, BaseModel):
        return content.model_dump(mode="json")
    if isinstance(content, datetime):
        return content.isoformat()
    if isinstance(content, PurePosixPath):
        return str(content)
    raise TypeError(f"{type(content).__name__} has no canonical JSON")


Class = bool | int | float | str
"""A class of a multiclass target. As JSON it keeps its type: 1, 1.0, true and "1" stay what they are."""


class Window(Value):
    """The instants from `start` up to, not including, `end`."""

    start: datetime
    end: datetime

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%d %H:%M} … {self.end:%Y-%m-%d %H:%M}"

    def overlaps(self, other: Window) -> bool:
        """Whether an instant lies in both."""
        return self.start < other.end and other.start < self.end


def floor(instant: datetime, partition: Partition) -> datetime:
    """The start of the period that holds `instant`. Weeks begin on Monday."""
    hour = instant.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if partition == "hour":
        return hour
    day = hour.replace(hour=0)
    if partition == "day":
        return day
    if partition == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1)


def step(start: datetime, partition: Partition, count: int = 1) -> datetime:
    """The start of the period `count` periods after the one that begins at `start`; `count` may be negative."""
    if partition == "month":
        months = start.year * 12 + start.month - 1 + count
        return start.replace(year=months // 12, month=months % 12 + 1)
    return start + count * {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}[partition]


def periods(window: Window, partition: Partition) -> Iterator[datetime]:
    """The starts of the periods that begin within `window`, its first one holding `window.start`."""
    start = floor(window.start, partition)
    while start < window.end:
        yield start
        start = step(start, partition)


def period_name(start: datetime, partition: Partition) -> str:
    """The period's name in file names and messages: `2013-04-01`, `2013-04-01T05`, `2013-04`, `2013-W14`."""
    formats = {"hour": "%Y-%m-%dT%H", "day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}
    return start.strftime(formats[partition])


class Windows(Value):
    """Where training, validation and hold-out rows lie; they touch and end at `end`."""

    train: Window
    validation: Window
    holdout: Window

    @classmethod
    def ending(cls, end: datetime, data: Data) -> Windows:
        """The pack's windows, ending at `end`, each floored to whole partitions."""
        holdout = floor(end - data.holdout, data.partition)
        validation = floor(holdout - data.validation, data.partition)
        train = floor(validation - data.train, data.partition)
        return cls(
            train=Window(start=train, end=validation),
            validation=Window(start=validation, end=holdout),
            holdout=Window(start=holdout, end=end),
        )

    @property
    def whole(self) -> Window:
        """From the first training row to the last hold-out row."""
        return Window(start=self.train.start, end=self.holdout.end)


class Ref(Value):
    """An object of the store: the md5 of a file's bytes, or of a folder's DVC listing (then it ends in `.dir`)."""

    hash: str
    size: int
    """Bytes; for a folder, of all its files together."""

    @property
    def is_folder(self) -> bool:
        return self.hash.endswith(".dir")


class PartitionFile(Value):
    """One partition: the rows of one period as a Parquet object."""

    period: datetime
    """The start of its period."""
    rows: int
    identity: str
    """sha256 of the rows in canonical order, whatever wrote the file."""
    object: Ref


class Manifest(Value):
    """The partitions of a dataset over a window, in order of time. Itself an object of the store, as JSON."""

    dataset: str
    partition: Partition
    columns: dict[str, str]
    """Column → canonical type: bool, int, float, string, datetime, date; null where no row has a value."""
    partitions: tuple[PartitionFile, ...]
    covered: Window | None = None
    """Every period in it was looked at: one without a partition had no rows. Ends with the last that has some."""

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.partitions)

    @property
    def bytes(self) -> int:
        return sum(part.object.size for part in self.partitions)

    def within(self, window: Window) -> tuple[PartitionFile, ...]:
        """The partitions whose period begins within `window`."""
        return tuple(part for part in self.partitions if window.start <= part.period < window.end)


def count(number: int, noun: str) -> str:
    """`1 row`, `28 834 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}".replace(",", " ")


def sayable(text: str) -> str:
    """`text` with `?` for what not every database and terminal takes: nulls, and what is no character of UTF-8.

    The latter come from a terminal of another encoding.
    """
    return text.encode(errors="replace").decode().replace("\0", "?")


class Ingested(Value):
    """What the source held up to as-of."""

    manifest: Ref
    rows: int
    partitions: int
    known: int
    """Partitions that were there already, unchanged."""
    late: tuple[datetime, ...] = ()
    """Periods known before whose rows changed since."""
    data_until: datetime
    """End of the last period that has rows; the windows end here."""
    windows: Windows
    note: str | None = None
    """What an operator should know: data that ends before as-of, say."""

    def summary(self) -> str:
        text = f"{count(self.rows, 'row')} in {count(self.partitions, 'partition')}, {self.known} known"
        if self.late:
            text += f", {len(self.late)} changed by late rows"
        return f"{text}; {self.note}" if self.note else text


class Validated(Value):
    """The clean partitions, and what Great Expectations said of them."""

    manifest: Ref
    result: Ref
    """Great Expectations' own JSON result."""
    suite_hash: str
    success: bool
    expectations: int
    rows_checked: int
    rows_quarantined: int
    quarantine: Ref | None = None
    """Parquet of the rows set aside, with the expectation that failed them; None when there are none."""
    records: Ref
    """JSON: partition identity → failures of each row-local expectation and its clean object, for the next run."""
    partitions: int
    partitions_scanned: int
    """Partitions that the row-local expectations had not seen before."""

    def summary(self) -> str:
        text = (
            f"{self.partitions_scanned} of {count(self.partitions, 'partition')} new, "
            f"{count(self.expectations, 'expectation')} {'holds' if self.expectations == 1 else 'hold'}"
        )
        return f"{text}, {count(self.rows_quarantined, 'row')} in quarantine" if self.rows_quarantined else text


class Snapshot(Value):
    """An immutable DVC version of the clean partitions."""

    dataset: str
    repository: str
    revision: str
    """The git commit."""
    tag: str
    hash: str
    """The DVC tree hash: md5 with `.dir`."""
    manifest: Ref
    rows: int
    bytes: int
    partitions: int
    windows: Windows
    data_until: datetime

    def summary(self) -> str:
        return f"{self.tag}: {count(self.rows, 'row')}, {self.bytes / 1e6:,.1f} MB"


class Hardware(Value):
    """What a job ran on."""

    device: str
    """`cpu` or `cuda`."""
    name: str
    driver: str | None = None


class Trained(Value):
    """A model folder, and what made it."""

    job: str
    model: Ref
    task: str
    inputs: dict[str, str]
    """Raw column → type, as the model takes them: bool, int, float, string, datetime, date."""
    requirements: tuple[str, ...]
    """Pinned distributions that the model folder needs, beside Python."""
    classes: tuple[Class, ...] | None = None
    """Of a multiclass model, in the order of its predictions; None for other targets, and in older events."""
    windows: Windows
    snapshot: str
    """The snapshot's tree hash."""
    params: dict[str, Any]
    seed: int
    metrics: dict[str, float]
    """What the training function reported last."""
    curve: Ref | None = None
    """Its progress, as JSON Lines: {step, …}."""
    log: Ref
    hardware: Hardware
    image: str | None = None
    """What the job ran in, by digest, where it was a container."""
    duration_s: float

    def summary(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in list(self.metrics.items())[:3])
        size = self.model.size / 1e6
        where = f"{size:.1f} MB on {self.hardware.device}"
        return f"{shown}, {where}" if shown else where


class Estimate(Value):
    """A metric and its interval, resampled by partition; bounds are None where it cannot be resampled."""

    value: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    """Its standard error; the bounds are Student's t times this away, or the ends of what the metric can be."""
    freedom: int | None = None
    """Student's degrees of freedom; None, beside an error, for the normal distribution: rows taken as independent."""
    partitions: int | None = None
    """How many partitions its rows lie in."""


class SliceEstimate(Value):
    """A metric within one group of hold-out rows."""

    by: str
    group: str
    rows: int
    metric: str
    estimate: Estimate | None
    """None where the group has too few rows or one class only."""


class Gap(Value):
    """How far apart groups of hold-out rows are treated: the largest less the smallest of a rate."""

    by: str
    measure: Fairness
    threshold: float
    """The probability from which a row counts as predicted 1."""
    value: float | None
    """None where fewer than two groups have rows enough, or a rate is undefined."""
    groups: dict[str, dict[str, float]]
    """Group → its rates; those of the groups that were compared."""
    unjudged: dict[str, int] = {}
    """Group → rows, of those with too few."""


class Evaluation(Value):
    """One model on the hold-out rows, scored through its own model folder in a fresh process."""

    model: str
    """The model folder's hash."""
    version: int | None = None
    classes: tuple[Class, ...] | None = None
    """Of a multiclass model: its own, in the order of its predictions."""
    rows: int
    metrics: dict[str, Estimate] = {}
    slices: tuple[SliceEstimate, ...] = ()
    gaps: tuple[Gap, ...] = ()
    latency_p95_ms: float | None = None
    """Of predicting one row, 95th percentile."""
    size_bytes: int
    predictions: Ref | None = None
    withheld: str | None = None
    """Why there are no figures: the model has seen hold-out rows, say."""


class Difference(Value):
    """Challenger minus champion on the same rows, with the paired interval, resampled by partition."""

    metric: str
    by: str | None = None
    group: str | None = None
    rows: int
    estimate: Estimate


class Importance(Value):
    """What a model leans on: what is lost of the primary metric when a column's values are shuffled among the rows."""

    column: str
    loss: Estimate
    """In units of the metric; below zero where the shuffle helps."""
    share: float
    """Of what all columns' losses come to, regardless of sign: -1 … 1."""
    share_error: float | None
    """The standard error of `share`; None where it cannot be resampled."""


class Evaluated(Value):
    """Challenger and champion on the same hold-out rows."""

    challenger: Evaluation
    champion: Evaluation | None
    differences: tuple[Difference, ...] = ()
    confidence: float
    primary: str
    """The metric that decides."""
    holdout: Window
    plots: Ref | None = None
    """Folder of ROC, precision-recall and calibration figures, and of importance."""
    importance: tuple[Importance, ...] = ()
    """Of each column that the challenger takes, the greatest first; none in what was evaluated before there was any."""
    importance_note: str | None = None
    """Why it is not known, or not of every column; None where nothing kept it from being measured."""

    def summary(self) -> str:
        estimate = self.challenger.metrics[self.primary]
        parts = [f"{self.primary} {estimate.value:.3f}"]
        if self.champion is not None and self.primary in self.champion.metrics:
            parts.append(f"champion {self.champion.metrics[self.primary].value:.3f}")
        if self.champion is None:
            parts.append("no champion to compare with")
        elif self.champion.withheld:
            parts.append(f"champion withheld: {self.champion.withheld}")
        text = f"{', '.join(parts)}, on {count(self.challenger.rows, 'row')}"
        return f"{text}; {self.importance_note}" if self.importance_note else text


class Verdict(Value):
    """What the gate says, and why, in plain words."""

    decision: Literal["promote", "reject", "review"]
    reasons: tuple[str, ...]


class Registered(Value):
    """A version in the MLflow registry."""

    model: str
    version: int
    mlflow_run: str
    model_hash: str
    new: bool = True
    """False when this very model was registered before: nothing new was learned."""

    def summary(self) -> str:
        return f"{self.model} version {self.version}" + (
            "" if self.new else ", registered before: nothing new was learned"
        )


class Promoted(Value):
    """How the run ended."""

    model: str
    version: int
    verdict: Verdict
    champion: int | None
    """The champion's version after the run."""
    previous: int | None
    """The champion's version before it."""
    waits: bool = False
    """The version waits for a person's answer."""

    def summary(self) -> str:
        stays = f"version {self.champion} stays champion" if self.champion else "there is still no champion"
        if self.champion == self.version and self.previous == self.version:
            head = f"version {self.version} is champion already"
        elif self.champion == self.version:
            head = f"version {self.version} is champion"
        elif self.waits:
            head = f"{self.verdict.decision} version {self.version}, which waits for approval; {stays}"
        else:
            head = f"{self.verdict.decision} version {self.version}; {stays}"
        return f"{head}: {self.verdict.reasons[0]}" if self.verdict.reasons else head


@dataclass(frozen=True)
class Connection:
    """An Airflow connection, as a source needs it. What it may know that others must not is in no message and no key."""

    name: str
    kind: str
    """Airflow's connection type."""
    host: str = ""
    port: int | None = None
    schema: str = ""
    """Of a database server: the database."""
    login: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """Where it leads, whoever asks: rows known from one place are not rows of another."""
        port = f":{self.port}" if self.port else ""
        return f"{self.kind}://{self.host}{port}/{self.schema}{self.extra.get('endpoint_url', '')}"

    def without_secrets(self, text: str) -> str:
        """`text`, a driver's words say, without what is secret here."""
        words = ("key", "token", "secret", "pass", "auth")
        extras = [str(value) for name, value in self.extra.items() if any(word in name.lower() for word in words)]
        for secret in filter(None, [self.password, *extras]):
            text = text.replace(secret, "***")
        return text


Connect = Callable[[str], Connection]
"""The connection of an id. Raises SourceError where there is none."""


def no_connections(name: str) -> Connection:
    """What a run outside of Airflow answers."""
    raise SourceError(
        f"connection {name!r} is not known here: connections are Airflow's", fix="run the pack by `evergreen run`"
    )


@dataclass(frozen=True)
class Run:
    """One pass of the chain for one pack."""

    pack: Pack
    id: str
    """The Airflow run_id. It may hold `:` and `+`; paths, tags and container names use `slug`."""
    as_of: datetime
    """It sees no data at or after this instant; the end of a complete partition."""
    reason: str
    settings: Settings
    force: bool = False
    """Do the work again even where an earlier run did the same."""
    connect: Connect = field(default=no_connections, repr=False, compare=False)
    """Where its source's connection is asked for, at the moment it is needed: no run, value or key holds a secret."""

    @property
    def slug(self) -> str:
        """12 hex digits of the id's sha256."""
        return slug_of(self.id)


def slug_of(run_id: str) -> str:
    """12 hex digits of the id's sha256."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:12]


STAGE_VALUES: dict[str, type[Value]] = {
    "ingest": Ingested,
    "validate": Validated,
    "snapshot": Snapshot,
    "train": Trained,
    "evaluate": Evaluated,
    "register": Registered,
    "promote": Promoted,
}
"""The stages in order, and the value each gives."""
