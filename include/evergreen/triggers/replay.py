"""The inbox replayed under another policy: what would have been decided of each alert, beside what was. Pure."""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

from evergreen.database import Event
from evergreen.pack import AdmissionPolicy
from evergreen.triggers.admission import (
    EXPIRES,
    Alert,
    Calendar,
    Decision,
    Earlier,
    Past,
    Seen,
    alert_of,
    decide,
    decision_of,
    stays,
)

OUTSIDE = ("alert", "heard", "snooze", "run", "stage", "receipt", "failure", "promotion")
"""What admission does not do itself."""


@dataclass(frozen=True)
class Look:
    """One look at an alert, and what was decided then."""

    now: datetime
    decision: Decision


@dataclass(frozen=True)
class Course:
    """What was decided of an alert, look by look, and what would have been."""

    alert: Alert
    was: tuple[Look, ...]
    would: tuple[Look, ...]


@dataclass(frozen=True)
class Totals:
    """What became of alerts, and what the runs that they started cost."""

    alerts: int
    runs: int
    merged: int
    dropped: int
    dead: int
    waiting: int
    """Alerts without a final decision at the end."""
    held: int
    """Alerts that were held at least once, whatever became of them."""
    device_hours: float


@dataclass(frozen=True)
class Replay:
    """A pack's alerts under a policy, beside what happened."""

    courses: tuple[Course, ...]
    was: Totals
    would: Totals
    guessed: int
    """How many of the runs that would have been never were: each is taken to cost `median_hours`."""
    median_hours: float | None
    """The median of the pack's known trainings; None where there is none, and what never was is taken to cost nothing."""

    @property
    def differences(self) -> tuple[Course, ...]:
        """The alerts of which something else would have been decided, or at another time."""
        return tuple(course for course in self.courses if course.was != course.would)


def simulate(
    events: Iterable[Event], policy: AdmissionPolicy | None = None, *, since: datetime | None = None
) -> Replay:
    """Replay the `events` of one pack, in order of position, under `policy`; report on the alerts from `since` on.

    None: each decision under the policy that was in force when it was made. Under that, or under the same policy given,
    the replay is what happened: every hold, every final decision, every sentence, every run id.

    What is taken from history:
    - an alert is first looked at when it was, and as long as the same is decided of it, it is looked at again when it
      was; once something else is decided, at the instants that its holds name, or when it is resolved or a snooze is
      set or ended; an alert that was never looked at is not looked at;
    - an alert that was heard again is considered again when it was; once something else was decided of it, whenever it
      was heard and nothing would have come of its last decision, as far as that is known;
    - whether the pack was paused or broken, and its calendar: as last seen;
    - runs that no alert started, with all that they did;
    - a run that an alert did start, where it would have been asked for at another time: it does what it did, as much
      earlier or later; where it would not have been asked for, it never was.

    What is assumed of a run that never was: it begins as long after it was asked for as the pack's runs do (the median),
    trains for the median of the known trainings, and is not promoted. Nor would other runs have made the world send
    other alerts.
    """
    return _Replay(list(events), policy).run(since)


class _Recorded(NamedTuple):
    """A look that history holds."""

    look: Look
    seen: Seen
    policy: AdmissionPolicy


class _Replay:
    """History, and beside it the world as it would have been so far."""

    def __init__(self, events: list[Event], policy: AdmissionPolicy | None) -> None:
        self.policy = policy
        self.recorded = list(_recorded(events))
        self.outside = deque(event for event in events if event.kind in OUTSIDE)
        self.end = max((event.at for event in events), default=datetime.min.replace(tzinfo=UTC))
        self.alerts = {str(event.key): (event.position, alert_of(event)) for event in events if event.kind == "alert"}
        self.considered = {key: alert for key, (_, alert) in self.alerts.items()}
        """The alerts as they are considered: for the first time, or again."""
        self.heard = {event.position: alert_of(event) for event in events if event.kind == "heard"}
        self.earlier: dict[str, Earlier] = {}
        self.diverged: set[str] = set()
        self.asked_then = {str(run_id): look.now for look in self._looks("retrain") if (run_id := look.decision.run_id)}
        self.did: dict[str, list[Event]] = {}
        """What the runs did that alerts started."""
        for event in self.outside:
            if event.run_id in self.asked_then:
                self.did.setdefault(event.run_id, []).append(event)
        self.median_hours = _median(_hours([event]) for event in self.outside if _is_training(event))
        self.delay = timedelta(
            seconds=_median(
                (event.at - self.asked_then[run_id]).total_seconds()
                for run_id, did in self.did.items()
                for event in did
                if event.kind == "run"
            )
            or 0.0
        )

        self.stays = False
        """The last look left its alert as it was decided before."""
        self.past = Past()
        self.position = 0
        self.would: dict[str, list[Look]] = {alert: [] for alert in self.alerts}
        self.asked: dict[str, datetime] = {}
        self.due: dict[str, datetime] = {}
        """When the alerts that went another way are looked at next."""
        self.queue: list[tuple[datetime, int, str]] = []
        """The same in order; what `due` does not say any more is passed over."""
        self.to_come: list[tuple[datetime, int, Event]] = []
        """What runs do that never were, or were asked for at another time."""
        self.numbers = itertools.count()
        self.paused: bool | None = False
        self.broken: str | None = None
        self.calendar = Calendar()
        self.in_force = AdmissionPolicy()
        self.now = datetime.min.replace(tzinfo=UTC)

    def run(self, since: datetime | None) -> Replay:
        last_pass: tuple[datetime, int] | None = None
        for look, seen, in_force in self.recorded:
            self._go_on_until(look.now)
            this_pass = (look.now, seen.upto)
            if this_pass != last_pass:
                last_pass = this_pass
                self.past.end_pass()
                while self.outside and self.outside[0].position <= seen.upto:
                    self._fold()
                self._happen_until(look.now)
            if (self.paused, self.broken) != (seen.paused, seen.broken):
                self.paused, self.broken = seen.paused, seen.broken
                self._wake(look.now, self._is_polled)
            self.calendar, self.in_force = seen.calendar or self.calendar, in_force
            alert = look.decision.alert
            if alert not in self.diverged:
                if (reopened := seen.alert.reopened) is not None and seen.earlier is not None:
                    self.considered[alert], self.earlier[alert] = self.heard[reopened], seen.earlier
                decision = self._look(alert, look.now)
                self.would[alert].append(Look(look.now, decision))
                if decision != look.decision:
                    self.diverged.add(alert)
                    self._put_off(decision)
        self._go_on_until(self.end)
        was: dict[str, list[Look]] = {alert: [] for alert in self.alerts}
        for look, _, _ in self.recorded:
            was[look.decision.alert].append(look)
        courses = tuple(
            Course(alert, tuple(was[key]), tuple(self.would[key]))
            for key, (_, alert) in self.alerts.items()
            if since is None or alert.at >= since
        )
        return Replay(
            courses=courses,
            was=_totals([course.was for course in courses], lambda run_id: _hours(self.did.get(run_id, []))),
            would=_totals([course.would for course in courses], self._cost),
            guessed=sum(
                self._never_was(str(look.decision.run_id))
                for course in courses
                for look in course.would
                if look.decision.outcome == "retrain"
            ),
            median_hours=self.median_hours,
        )

    def _look(self, alert_id: str, now: datetime) -> Decision:
        self.now = now
        alert, policy = self.considered[alert_id], self.policy or self.in_force
        outside: dict[str, Any] = {"paused": self.paused, "broken": self.broken, "calendar": self.calendar}
        seen = self.past.see(alert, policy, now, earlier=self.earlier.get(alert_id), **outside)
        decision = decide(alert, seen, policy, now)
        self.past.note(decision)
        self.stays = stays(decision, seen)
        if decision.outcome == "retrain" and decision.run_id is not None:
            self._ask(decision.run_id, alert.pack, now)
        return decision

    def _ask(self, run_id: str, pack: str, now: datetime) -> None:
        """Let a run be asked for now, and say what it will do where that is not just what it did."""
        self.asked[run_id] = now
        if self.asked_then.get(run_id) == now:
            return
        if not self._never_was(run_id):
            for event in self.did[run_id]:
                self._let_happen(event, event.at + (now - self.asked_then[run_id]))
            return
        hours = self.median_hours or 0.0
        begun = Event(pack, 0, "run", run_id, None, now + self.delay, {}, "", "")
        trained = {"stage": "train", "value": {"duration_s": hours * 3600}}
        self._let_happen(begun, begun.at)
        self._let_happen(replace(begun, kind="stage", body=trained), begun.at + timedelta(hours=hours))

    def _go_on_until(self, end: datetime) -> None:
        """Look at the alerts that went another way, as they come due; what happens meanwhile happens in its order."""
        while self.queue:
            due, _, alert = self.queue[0]
            if self.due.get(alert) != due:
                heapq.heappop(self.queue)
            elif self.outside and self.outside[0].at <= min(due, end):
                self._fold()
            elif due <= end:
                heapq.heappop(self.queue)
                del self.due[alert]
                now = max(due, self.now)
                if now != self.now:
                    self.past.end_pass()
                self._happen_until(now)
                decision, before = self._look(alert, now), self.would[alert][-1].decision
                unchanged = decision.reason == before.reason if decision.until else self.stays and before.until is None
                if not unchanged:
                    self.would[alert].append(Look(now, decision))
                self._put_off(decision)
            else:
                break

    def _put_off(self, decision: Decision) -> None:
        """Look at a held alert when its hold says; at one that is polled, when it expires if nothing changes before."""
        if decision.until is not None:
            alert = decision.alert
            expires = self.past.last_heard(self.considered[alert]) + EXPIRES
            self._look_at(alert, expires if self._is_polled(alert) else decision.until)

    def _look_at(self, alert: str, due: datetime) -> None:
        self.due[alert] = due
        heapq.heappush(self.queue, (due, self.alerts[alert][0], alert))

    def _wake(self, now: datetime, chosen: Callable[[str], bool]) -> None:
        """Look now at the alerts chosen of those that are due later."""
        for alert, due in list(self.due.items()):
            if now < due and chosen(alert):
                self._look_at(alert, now)

    def _is_polled(self, alert: str) -> bool:
        """Whether an alert is held until something is known to change."""
        return self.would[alert][-1].decision.rule in ("paused", "broken")

    def _fold(self) -> None:
        """Let the next of what happened outside happen, unless it is of a run that is another one now, or none."""
        event = self.outside.popleft()
        self._happen_until(event.at)
        self.position = event.position
        if event.run_id in self.asked_then and self.asked.get(event.run_id) != self.asked_then[event.run_id]:
            return
        self.past.add(event)
        if event.kind == "snooze":
            self._wake(event.at, lambda _: True)
        elif event.kind == "alert" and event.body["status"] == "resolved":
            ended = event.body["fingerprint"]
            self._wake(event.at, lambda alert: self.alerts[alert][1].fingerprint == ended)
        elif event.kind == "heard" and event.key in self.diverged:
            self._hear(str(event.key), event)

    def _hear(self, alert: str, event: Event) -> None:
        """Look at an alert that went another way, now that it is heard again, unless its run may have answered it."""
        last = self.would[alert][-1].decision
        if last.outcome == "hold":
            self._wake(event.at, lambda other: other == alert)
            return
        lost: Literal["failed"] | None = None
        if last.run_id is not None:
            ends = [e.kind for e in self.did.get(last.run_id, []) if e.at <= event.at and e.kind != "promotion"]
            if ends[-1:] != ["failure"]:
                return
            lost = "failed"
        self.considered[alert] = self.heard[event.position]
        self.earlier[alert] = Earlier(outcome=last.outcome, run_id=last.run_id, lost=lost)
        self._look_at(alert, event.at)

    def _let_happen(self, event: Event, at: datetime) -> None:
        heapq.heappush(self.to_come, (at, next(self.numbers), event))

    def _happen_until(self, end: datetime) -> None:
        while self.to_come and self.to_come[0][0] <= end:
            at, _, event = heapq.heappop(self.to_come)
            body = event.body
            if event.kind == "run":
                body = {"as_of": self.calendar.as_of(self.past.as_of(str(event.run_id)) or at).isoformat()}
            self.past.add(replace(event, position=self.position, at=at, body=body))

    def _never_was(self, run_id: str) -> bool:
        if self.asked[run_id] == self.asked_then.get(run_id):
            return False
        return not any(event.kind == "run" for event in self.did.get(run_id, []))

    def _cost(self, run_id: str) -> float:
        return (self.median_hours or 0.0) if self._never_was(run_id) else _hours(self.did.get(run_id, []))

    def _looks(self, outcome: str) -> Iterator[Look]:
        return (look for look, _, _ in self.recorded if look.decision.outcome == outcome)


def _recorded(events: Iterable[Event]) -> Iterator[_Recorded]:
    """The looks that history holds: of an intent and the decision that repeats it, the first."""
    intended: set[str | None] = set()
    for event in events:
        if event.kind == "decision" and event.key in intended:
            intended.remove(event.key)
        elif event.kind in ("intent", "decision"):
            if event.kind == "intent":
                intended.add(event.key)
            look = Look(datetime.fromisoformat(event.body["now"]), decision_of(event))
            yield _Recorded(
                look, Seen.from_json(event.body["seen"]), AdmissionPolicy.model_validate(event.body["policy"])
            )


def _totals(courses: Iterable[tuple[Look, ...]], cost: Callable[[str], float]) -> Totals:
    outcomes: Counter[str] = Counter()
    held = 0
    runs: list[str] = []
    for looks in courses:
        held += any(look.decision.outcome == "hold" for look in looks)
        last = looks[-1].decision if looks else None
        outcomes[last.outcome if last else "hold"] += 1
        runs += [str(look.decision.run_id) for look in looks if look.decision.outcome == "retrain"]
    return Totals(
        alerts=outcomes.total(),
        runs=len(runs),
        merged=outcomes["merge"],
        dropped=outcomes["drop"],
        dead=outcomes["dead"],
        waiting=outcomes["hold"],
        held=held,
        device_hours=math.fsum(cost(run_id) for run_id in runs),
    )


def _is_training(event: Event) -> bool:
    return event.kind == "stage" and event.body["stage"] == "train"


def _hours(events: Iterable[Event]) -> float:
    """The device-hours of the trainings among `events`."""
    return math.fsum(event.body["value"]["duration_s"] / 3600 for event in events if _is_training(event))


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
