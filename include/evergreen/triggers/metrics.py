"""What Prometheus sees of the loop, counted from the events: no restart forgets anything or counts it twice."""

from __future__ import annotations

import bisect
import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from evergreen import database as db
from evergreen.database import COLUMNS, HOME, Database, Event, event_of, events
from evergreen.errors import LeaseHeldError, PackError
from evergreen.keys import WATCH
from evergreen.pack import AdmissionPolicy, Pack, find
from evergreen.settings import Settings
from evergreen.triggers.admission import Past

KINDS = ("alert", "intent", "decision", "drift", "run", "failure", "promotion", "rollback")
STAGES = ("train", "promote")
LOOK = "monitor"
"""The stage whose receipts count: a look at what was looked at before ends as one, and it did come to its end."""

SHOWN = ("data fault", "seasonal", "withstood", "shift", "quiet", "not compared")
"""What a look may show (`monitoring/drift.py`)."""

AT_ONCE = 10_000
"""How many events are read at a time."""

LATENCY_S = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
"""The bounds of the latency's buckets: two seconds is what the bell promises, a minute the sweeper."""


def exposition(settings: Settings) -> bytes:
    """The metrics in Prometheus' text format. Raises DatabaseError."""
    return generate_latest(registry(settings))


@functools.cache
def registry(settings: Settings) -> CollectorRegistry:
    """The one registry of this process for these settings: it goes on counting where the last scrape ended."""
    found = CollectorRegistry()
    found.register(Loop(settings))
    return found


@dataclass
class Count:
    """What the events of one pack, up to `position`, add up to."""

    position: int = 0
    decided: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Final decisions, by sender and outcome."""
    undecided: dict[str, str] = field(default_factory=dict)
    """The alerts without one, each with its sender."""
    unseen: dict[str, datetime] = field(default_factory=dict)
    """The alerts that nothing was decided of yet, not even to hold them; each with the instant it was kept."""
    latencies: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_S) + 1))
    """How many alerts waited up to each bound of LATENCY_S, and longer, for their first decision."""
    waited_s: float = 0.0
    trained_at: datetime | None = None
    looks: Counter[str] = field(default_factory=Counter)
    """Of the monitor, by what each said."""
    spending: Past = field(default_factory=Past)
    """Of the past only what a budget counts: the runs that alerts started, and training."""
    runs: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Stages that failed, by name; one that is tried again may fail again."""
    failing: dict[str, bool] = field(default_factory=lambda: {"training": False, "monitor": False})
    """Whether each failed since it last came to its end."""
    verdicts: Counter[str] = field(default_factory=Counter)
    trainings: Counter[str] = field(default_factory=Counter)
    """By device."""
    trained_s: Counter[str] = field(default_factory=Counter)
    samples_per_s: float | None = None
    """Of the newest training, where its trainer says so."""
    champion: int | None = None
    champion_since: datetime | None = None
    scores: dict[str, float] = field(default_factory=dict)
    """PSI by column in the newest window that the monitor compared with this champion."""
    prediction_score: float | None = None
    """The same of its predictions."""
    showed: str | None = None
    """What the newest look found."""

    def add(self, event: Event) -> None:
        """Count one more event: the next of its pack."""
        self.position = event.position
        if event.kind in ("alert", "intent", "decision"):
            self._add_alert(event)
        elif event.kind == "run":
            self.runs += 1
        elif event.kind == "failure":
            self._add_failure(event)
        elif event.kind == "drift":
            self.failing["monitor"] = False
            value = event.body["value"]
            self.showed = value["kind"] or "not compared"
            self.looks[self.showed] += 1
            self._add_scores(value)
        elif event.kind == "receipt":
            self.failing["monitor"] = False
        elif event.kind in ("promotion", "rollback"):
            if event.body["status"] in ("done", "foreign"):
                if event.body["champion"] != self.champion:
                    self.scores, self.prediction_score, self.showed = {}, None, None  # of another model
                self.champion, self.champion_since = event.body["champion"], event.at
        elif event.body["stage"] == "promote":
            self.failing["training"] = False
            self.verdicts[event.body["value"]["verdict"]["decision"]] += 1
        else:
            self._add_training(event)

    def _add_scores(self, value: dict[str, Any]) -> None:
        if not (
            scores := dict(value.get("scores") or {})
        ):  # nothing was compared; looks of an older Evergreen kept none
            return
        if "prediction_score" in value:
            self.prediction_score = value["prediction_score"]
        else:  # of a look that had predictions among the columns
            self.prediction_score = scores.pop("prediction", None)
        self.scores = scores

    def _add_failure(self, event: Event) -> None:
        look, stage = str(event.run_id).startswith(WATCH), event.body["stage"]
        if look and event.body.get("error") == LeaseHeldError.__name__:
            self.looks["skipped"] += stage == "monitor"  # for a run of the pack that acted: nothing failed
            return
        self.failures[stage] += 1
        self.failing["monitor" if look else "training"] = True

    def _add_training(self, event: Event) -> None:
        value = event.body["value"]
        self.trained_at = event.at
        self.trainings[value["hardware"]["device"]] += 1
        self.trained_s[value["hardware"]["device"]] += value["duration_s"]
        self.samples_per_s = value["metrics"].get("samples_per_s")
        self.spending.add(event)

    def _add_alert(self, event: Event) -> None:
        alert = str(event.key)
        if event.kind == "alert":
            self.undecided[alert] = event.body["sender"]
            self.unseen[alert] = event.at
            return
        if (kept := self.unseen.pop(alert, None)) is not None:
            seconds = (event.at - kept).total_seconds()
            self.latencies[bisect.bisect_left(LATENCY_S, seconds)] += 1
            self.waited_s += max(seconds, 0.0)
        if event.body["outcome"] == "retrain":
            self.spending.add(event)
        about = event.body.get("seen", {}).get("alert", {})
        if about.get("reopened") is not None:
            self.undecided.setdefault(alert, about["sender"])
        if event.kind == "decision" and event.body["outcome"] != "hold":
            self.decided[self.undecided.pop(alert), event.body["outcome"]] += 1


class Loop:
    """Collects the metrics. Each scrape reads the events that came since the last one, pack by pack."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.counts: dict[str, Count] = {}
        self.packs: set[str] = set()
        """Those that are there: of one that is gone nothing is overdue, and nobody can end what failed last."""
        self.lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """All families, each with a sample for every pack that has something to say of it."""
        with self.lock:
            self._read()
            now = datetime.now(UTC)
            yield from self._of_admission(now)
            yield from self._of_the_chain(now)
            yield from self._of_the_monitor()

    def _read(self) -> None:
        database = db.connect(self.settings.database_url)
        self.packs = {folder.name for folder in find(self.settings.packs)}
        for pack in self.packs.union(_packs_of(database)):
            count = self.counts.setdefault(pack, Count())
            # By position, which has no gaps: ids of rows may become visible out of their order.
            counted = (
                events.c.kind.in_(KINDS)
                | ((events.c.kind == "stage") & events.c.stage.in_(STAGES))
                | ((events.c.kind == "receipt") & (events.c.stage == LOOK))
            )
            query = sa.select(*COLUMNS).where(events.c.pack == pack, counted)
            while True:
                newer = query.where(events.c.position > count.position).order_by(events.c.position).limit(AT_ONCE)
                with database.reading() as connection:
                    rows = connection.execute(newer).all()
                for row in rows:
                    count.add(event_of(row))
                if len(rows) < AT_ONCE:
                    break

    def _of_admission(self, now: datetime) -> Iterator[Metric]:
        alerts = CounterMetricFamily(
            "evergreen_alerts", "Alerts with a final decision, by what it was.", labels=("pack", "sender", "decision")
        )
        latency = HistogramMetricFamily(
            "evergreen_decision_latency_seconds",
            "From an alert's being written down to the first decision of it, be it to hold it.",
            labels=("pack",),
        )
        undecided = GaugeMetricFamily(
            "evergreen_undecided_alerts", "Alerts without a final decision, held ones among them.", labels=("pack",)
        )
        age = GaugeMetricFamily(
            "evergreen_days_since_training", "Days since a model of the pack was last trained.", labels=("pack",)
        )
        runs = GaugeMetricFamily(
            "evergreen_budget_runs_left", "Runs that alerts may start now, by the pack's budget.", labels=("pack",)
        )
        hours = GaugeMetricFamily(
            "evergreen_budget_device_hours_left",
            "Device-hours of training left before alerts start no more runs, by the pack's budget.",
            labels=("pack",),
        )
        for pack, count in sorted(self.counts.items()):
            for (sender, outcome), number in sorted(count.decided.items()):
                alerts.add_metric((pack, sender, outcome), number)
            bounds = (*(str(float(bound)) for bound in LATENCY_S), "+Inf")
            heights = [sum(count.latencies[: index + 1]) for index in range(len(bounds))]
            latency.add_metric((pack,), list(zip(bounds, heights, strict=True)), count.waited_s)
            undecided.add_metric((pack,), len(count.undecided))
            if count.trained_at is not None and pack in self.packs:
                age.add_metric((pack,), (now - count.trained_at).total_seconds() / 86400)
            policy = self._policy(pack)
            spent = policy and count.spending.spent(policy, now)
            if policy and policy.budget and spent:
                if policy.budget.runs is not None:
                    runs.add_metric((pack,), max(policy.budget.runs - spent.runs, 0))
                if policy.budget.device_hours is not None:
                    hours.add_metric((pack,), max(policy.budget.device_hours - spent.hours, 0.0))
        yield from (alerts, latency, undecided, age, runs, hours)

    def _of_the_chain(self, now: datetime) -> Iterator[Metric]:
        begun = CounterMetricFamily("evergreen_runs", "Runs of the chain that began.", labels=("pack",))
        failures = CounterMetricFamily(
            "evergreen_stage_failures", "Stages that failed, each try counted.", labels=("pack", "stage")
        )
        failing = GaugeMetricFamily(
            "evergreen_failing", "1 from a failure until a run, or a look, comes to its end.", labels=("pack", "what")
        )
        verdicts = CounterMetricFamily(
            "evergreen_verdicts", "Verdicts of the gate, by what they were.", labels=("pack", "decision")
        )
        champion = GaugeMetricFamily("evergreen_champion_version", "The version in use.", labels=("pack",))
        reign = GaugeMetricFamily(
            "evergreen_champion_days", "Days since the version in use became champion.", labels=("pack",)
        )
        trainings = CounterMetricFamily("evergreen_trainings", "Models trained, by device.", labels=("pack", "device"))
        trained = CounterMetricFamily(
            "evergreen_training_seconds", "Seconds of training, by device.", labels=("pack", "device")
        )
        speed = GaugeMetricFamily(
            "evergreen_training_samples_per_second",
            "Of the newest training, where its trainer tells.",
            labels=("pack",),
        )
        for pack, count in sorted(self.counts.items()):
            begun.add_metric((pack,), count.runs)
            for stage, number in sorted(count.failures.items()):
                failures.add_metric((pack, stage), number)
            for what, fails in count.failing.items() if pack in self.packs else ():
                failing.add_metric((pack, what), fails)
            for decision, number in sorted(count.verdicts.items()):
                verdicts.add_metric((pack, decision), number)
            if count.champion is not None and count.champion_since is not None:
                champion.add_metric((pack,), count.champion)
                reign.add_metric((pack,), (now - count.champion_since).total_seconds() / 86400)
            for device, number in sorted(count.trainings.items()):
                trainings.add_metric((pack, device), number)
                trained.add_metric((pack, device), count.trained_s[device])
            if count.samples_per_s is not None:
                speed.add_metric((pack,), count.samples_per_s)
        yield from (begun, failures, failing, verdicts, champion, reign, trainings, trained, speed)

    def _of_the_monitor(self) -> Iterator[Metric]:
        looks = CounterMetricFamily(
            "evergreen_looks", "Looks of the monitor, by the kind of change they showed.", labels=("pack", "kind")
        )
        scores = GaugeMetricFamily(
            "evergreen_drift_psi",
            "How far a column lies from what the champion was made from, in the newest window compared.",
            labels=("pack", "column"),
        )
        predictions = GaugeMetricFamily(
            "evergreen_prediction_psi",
            "How far the predictions lie from those of the champion's hold-out, in the newest window compared.",
            labels=("pack",),
        )
        showed = GaugeMetricFamily(
            "evergreen_newest_look",
            "1 for the kind of change that the newest look showed, 0 for the others.",
            labels=("pack", "kind"),
        )
        for pack, count in sorted(self.counts.items()):
            for column, score in sorted(count.scores.items()) if pack in self.packs else ():
                scores.add_metric((pack, column), score)
            if count.prediction_score is not None and pack in self.packs:
                predictions.add_metric((pack,), count.prediction_score)
            for kind in SHOWN if count.showed and pack in self.packs else ():
                showed.add_metric((pack, kind), kind == count.showed)
            for kind, number in sorted(count.looks.items()):
                looks.add_metric((pack, kind), number)
        yield from (looks, scores, predictions, showed)

    def _policy(self, pack: str) -> AdmissionPolicy | None:
        """The policy in force; None of a pack that is broken or gone."""
        with contextlib.suppress(PackError):
            return Pack.load(self.settings.packs / pack).triggers.admission
        return None


def _packs_of(database: Database) -> Iterator[str]:
    """The packs that have events: each found by the index, without reading their events."""
    pack: str | None = ""
    with database.reading() as connection:
        while pack is not None:
            pack = connection.execute(sa.select(sa.func.min(events.c.pack)).where(events.c.pack > pack)).scalar()
            if pack not in (None, HOME):
                yield pack
