"""Admission: what becomes of an alert. Pure: what was seen of the past and the pack's policy in, a decision out.

`Past` folds a pack's events and says what there is to see; the rules, in their order, make a decision of it. A
decision holds all it saw, so that it can be made again from its row alone (law 3): `again` does.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from evergreen.database import Event
from evergreen.pack import AdmissionPolicy, Clock, Pack, Partition
from evergreen.run import Value, count, floor, step

Outcome = Literal["retrain", "merge", "drop", "dead", "hold"]
"""`hold` is looked at again at the instant it names; the others are final."""

EXPIRES = timedelta(days=30)
"""After so long an alert is given up."""

AGAIN = timedelta(minutes=1)
"""When a pack that is paused or cannot be loaded is looked at again."""

LOST = timedelta(days=1)
"""A run that was asked for and has not begun after so long is not waited for any more."""

MINUTE = timedelta(minutes=1)

NEWS = "data"
"""The sender of what is no complaint: new data is news each time it comes, so it is no repeat and needs no second."""

KINDS = ("alert", "heard", "intent", "decision", "snooze", "run", "stage", "receipt", "failure", "promotion")
"""The kinds of events that admission reads."""


@dataclass(frozen=True)
class Alert:
    """A message that a model may need retraining, as it was written down."""

    id: str
    """`alert-` and 20 hex digits: of the pack, the sender, and the sender's own id of the message."""
    pack: str
    at: datetime
    """When it was written down."""
    sender: str
    """Who said so: a name of the senders file, `data`, `monitor`."""
    reason: str
    fingerprint: str
    """What makes two alerts the same complaint."""
    as_of: datetime | None = None
    """The run that it asks for should pretend to be at this instant; None: at the time it runs."""
    evidence: dict[str, Any] | None = None
    status: Literal["firing", "resolved"] = "firing"
    reopened: int | None = None
    """Position of the `heard` event by which it is considered again, as if it had come then; None: for the first time."""


@dataclass(frozen=True)
class Decision:
    """What admission made of an alert."""

    alert: str
    outcome: Outcome
    rule: str
    """The rule that decided: one of RULES."""
    reason: str
    """One sentence, fit for a person."""
    until: datetime | None = None
    """Of a `hold`: when it is looked at again."""
    run_id: str | None = None
    """Of `retrain` and `merge`: the run that answers the alert."""


# What is seen.


class Calendar(Value):
    """Which partitions a run sees: by the pack's partition, and by its clock since the home was made."""

    partition: Partition = "day"
    clock: Clock | None = None
    made_at: datetime | None = None

    @classmethod
    def of(cls, pack: Pack, made_at: datetime) -> Calendar:
        """The calendar of `pack` in a home made at `made_at`."""
        return cls(partition=pack.data.partition, clock=pack.clock, made_at=made_at if pack.clock else None)

    def as_of(self, instant: datetime) -> datetime:
        """The as-of of a run at `instant`: the end of the last partition that is complete then."""
        if self.clock is not None and self.made_at is not None:
            instant = self.clock.at(instant, self.made_at)
        return floor(instant, self.partition)

    def next_end(self, now: datetime) -> datetime:
        """When the partition that runs at `now` ends, and a run sees one more."""
        if self.clock is None or self.made_at is None or now < self.made_at:
            return step(floor(now, self.partition), self.partition)
        end = step(self.as_of(now), self.partition)
        # A millisecond late rather than a microsecond early, which would be looked at in vain.
        return self.made_at + (end - self.clock.start) / self.clock.speed + timedelta(milliseconds=1)

    @property
    def longest(self) -> timedelta:
        """How long a partition lasts at most, on people's clocks."""
        days = {"hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 31.0}[self.partition]
        return timedelta(days=days) / (self.clock.speed if self.clock else 1.0) + timedelta(seconds=1)


class About(Value):
    """What the rules look at of the alert itself."""

    at: datetime
    sender: str
    as_of: datetime | None = None
    status: Literal["firing", "resolved"] = "firing"
    reopened: int | None = None
    last_heard: datetime | None = None
    """When it was heard last; None: at `at`."""


class Earlier(Value):
    """The final decision that an alert had before it was heard again."""

    outcome: Outcome
    run_id: str | None = None
    lost: Literal["failed", "gone"] | None = None
    """Why nothing came of the run: it failed, or Airflow has no such run and it never ended. None: it goes on, or ended."""


class Named(Value):
    """An alert or a run, and when it came."""

    id: str
    at: datetime


class Repeated(Named):
    """The same complaint as the alert's, before it, not dropped."""

    unconfirmed: bool = False
    """It waits still, and too few windows had heard it."""


class Answer(Named):
    """A run that answers the alert: it sees all that the alert wants seen."""

    as_of: datetime
    begun: bool


class Last(Named):
    """The run that began last, or that was asked for last and has not begun."""

    begun: bool


class Champion(Named):
    """The run that made the champion, and when it did."""

    as_of: datetime


class Snoozed(Value):
    """The pack's alerts are to wait."""

    until: datetime
    by: str
    why: str


class Spent(Value):
    """What alerts' runs, and all training, took of the budget in the period that ends now."""

    runs: int = 0
    runs_until: datetime | None = None
    """When enough runs have fallen out of the period for one more; None: one is left now."""
    hours: float = 0.0
    hours_until: datetime | None = None


class Seen(Value):
    """All that the rules look at, for one alert at one instant."""

    alert: About
    upto: int
    """The position of the newest event that was known."""
    broken: str | None = None
    """Why the pack cannot be loaded."""
    paused: bool | None = False
    """Whether the pack's training is paused; None: Airflow does not know it."""
    earlier: Earlier | None = None
    """Of an alert that is considered again."""
    resolved: Named | None = None
    """The message that ended the complaint."""
    same: Repeated | None = None
    heard: int = 0
    """In how many of the policy's windows up to it the complaint was heard."""
    held: str | None = None
    """What an alert that is too old was last held for."""
    snoozed: Snoozed | None = None
    answer: Answer | None = None
    minute: int = 0
    """How many alerts of the pack there were in the minute up to it."""
    champion: Champion | None = None
    """Of an alert that came after the promotion: by a run from which no run could differ but by newer partitions."""
    last: Last | None = None
    """The last run, where the cooldown after it is not over."""
    spent: Spent | None = None
    calendar: Calendar | None = None

    def to_json(self) -> dict[str, Any]:
        """What there was to see; what there was not is left out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Seen:
        """What `to_json` gave."""
        return cls.model_validate(found)


# What is decided.


class Ruled(NamedTuple):
    """What one rule says where it applies."""

    outcome: Outcome
    reason: str
    until: datetime | None = None
    run_id: str | None = None


class Case(NamedTuple):
    """What `decide` was given."""

    alert: Alert
    seen: Seen
    policy: AdmissionPolicy
    now: datetime


def decide(alert: Alert, seen: Seen, policy: AdmissionPolicy, now: datetime) -> Decision:
    """What becomes of `alert`: what the first rule says that applies. Depends on nothing but its arguments."""
    case = Case(alert, seen, policy, now)
    for name, rule in RULES.items():
        if (ruled := rule(case)) is not None:
            return Decision(alert.id, ruled.outcome, name, ruled.reason, ruled.until, ruled.run_id)
    raise AssertionError("the last rule always applies")


def _resolved(case: Case) -> Ruled | None:
    """A message that a complaint is over starts nothing, and ends those that wait with the complaint."""
    if case.alert.status == "resolved":
        return Ruled("drop", "it says that a complaint is over: that starts nothing")
    if case.seen.resolved is not None:
        return Ruled("drop", f"resolved by {case.seen.resolved.id}, {_after(case.seen.resolved.at - case.alert.at)}")
    return None


def _answered(case: Case) -> Ruled | None:
    """An alert that was heard again keeps its run, unless that failed or is gone."""
    earlier = case.seen.earlier
    if earlier is None or earlier.run_id is None or earlier.lost is not None:
        return None
    return Ruled("merge", f"{earlier.run_id} answers it already, and has not failed", run_id=earlier.run_id)


def _expired(case: Case) -> Ruled | None:
    """An alert that still fires does not expire."""
    if case.now - _last_heard(case) < EXPIRES:
        return None
    held = f"last held for: {case.seen.held}" if case.seen.held else "never looked at"
    return Ruled("dead", f"undecided for {_span(EXPIRES)}; {held}")


def _broken(case: Case) -> Ruled | None:
    if case.seen.broken is not None:
        return Ruled("hold", f"the pack cannot be loaded: {case.seen.broken}", case.now + AGAIN)
    return None


def _dedupe(case: Case) -> Ruled | None:
    """A repeat is dropped, unless it is what the first one waits for to be confirmed.

    It is so even where alerts are held: a storm of repeats that comes while the pack is paused is not kept waiting.
    """
    same, confirm = case.seen.same, case.policy.confirm
    if same is None or (same.unconfirmed and confirm is not None and case.seen.heard >= confirm.heard):
        return None
    before = f"the same complaint as {same.id}, {_before(case.alert.at - same.at)}"
    return Ruled("drop", f"{before}; the pack drops repeats within {_span(case.policy.dedupe)}")


def _paused(case: Case) -> Ruled | None:
    if case.seen.paused is None:
        return Ruled("hold", f"Airflow does not know {case.alert.pack}__train", case.now + AGAIN)
    if case.seen.paused:
        return Ruled("hold", f"{case.alert.pack}__train is paused", case.now + AGAIN)
    return None


def _snooze(case: Case) -> Ruled | None:
    if case.seen.snoozed is None:
        return None
    snoozed = case.seen.snoozed
    return Ruled("hold", f"snoozed until {_time(snoozed.until)} by {snoozed.by}: {snoozed.why}", snoozed.until)


def _merge(case: Case) -> Ruled | None:
    if case.seen.answer is None:
        return None
    run = case.seen.answer
    when = f"began at {_time(run.at)}, after it" if run.begun else f"was asked for at {_time(run.at)} and has not begun"
    return Ruled("merge", f"{run.id} {when}; it sees the data up to {_time(run.as_of)}", run_id=run.id)


def _confirm(case: Case) -> Ruled | None:
    """A complaint waits for others of its kind. The one that confirms it starts the run; the others merge into that."""
    confirm = case.policy.confirm
    if confirm is None or case.alert.sender == NEWS or case.seen.heard >= confirm.heard:
        return None
    windows = f"{case.seen.heard} of the newest {count(confirm.of, 'window')} of {_span(confirm.each)}"
    heard = f"heard in {windows}; the pack acts on {confirm.heard}"
    until = _last_heard(case) + confirm.of * confirm.each
    if case.now < until:
        return Ruled("hold", heard, until)
    return Ruled("drop", f"{heard}, and until {_time(until)} no later one started a run")


def _brake(case: Case) -> Ruled | None:
    over = floor(case.alert.at, "hour") + timedelta(minutes=case.alert.at.minute + 1)
    if case.seen.minute <= case.policy.brake or case.now >= over:
        return None
    storm = f"{count(case.seen.minute, 'alert')} in the minute up to it"
    return Ruled("hold", f"{storm}; above {case.policy.brake} they are looked at together, once it is over", over)


def _loop_guard(case: Case) -> Ruled | None:
    """An alert that our own promotion may have caused waits for data that the champion has not seen."""
    if case.seen.champion is None or case.seen.calendar is None:
        return None
    champion, sees = case.seen.champion, case.seen.calendar.as_of(case.alert.as_of or case.now)
    if sees > champion.as_of:
        return None
    came = f"it came after {champion.id} was promoted at {_time(champion.at)}"
    if case.alert.as_of is None:
        until = case.seen.calendar.next_end(case.now)
        return Ruled("hold", f"{came}, and a run now would see no newer data than {_time(champion.as_of)}", until)
    asked = f"a run as of {_time(sees)} would see no newer data than the champion, as of {_time(champion.as_of)}"
    return Ruled("drop", f"{came}, and {asked}")


def _cooldown(case: Case) -> Ruled | None:
    last = case.seen.last
    if last is None:
        return None
    until = last.at + case.policy.cooldown
    began = f"{last.id} {'began' if last.begun else 'was asked for'} at {_time(last.at)}"
    return Ruled("hold", f"{began}; alerts wait {_span(case.policy.cooldown)} after that, until {_time(until)}", until)


def _budget(case: Case) -> Ruled | None:
    budget, spent = case.policy.budget, case.seen.spent
    if budget is None or spent is None:
        return None
    per, used = _span(budget.per), []
    if spent.runs_until is not None:
        used.append(f"alerts started {count(spent.runs, 'run')} in the last {per}, and {budget.runs} are allowed")
    if spent.hours_until is not None:
        allowed = f"{budget.device_hours:g} are allowed"
        used.append(f"training took {spent.hours:.2f} device-hours in the last {per}, and {allowed}")
    untils = [until for until in (spent.runs_until, spent.hours_until) if until is not None]
    if not untils:
        return None
    return Ruled("hold", f"{'; '.join(used)}: one more from {_time(max(untils))}", max(untils))


def _retrain(case: Case) -> Ruled:
    return Ruled(
        "retrain",
        "no run answers it yet, and no rule holds it back",
        run_id=run_id_of(case.alert.id, case.alert.reopened),
    )


def _last_heard(case: Case) -> datetime:
    return case.seen.alert.last_heard or case.alert.at


Rule = Callable[[Case], Ruled | None]

RULES: dict[str, Rule] = {
    "resolved": _resolved,
    "answered": _answered,
    "expired": _expired,
    "broken": _broken,
    "dedupe": _dedupe,
    "paused": _paused,
    "snooze": _snooze,
    "merge": _merge,
    "confirm": _confirm,
    "brake": _brake,
    "loop_guard": _loop_guard,
    "cooldown": _cooldown,
    "budget": _budget,
    "retrain": _retrain,
}
"""The rules by their names, in their order."""


def run_id_of(alert: str, reopened: int | None = None) -> str:
    """Return the id of the one run that this alert can start: the first time, or considered again from that position."""
    return f"alert__{alert.removeprefix('alert-')}" + (f"__{reopened}" if reopened is not None else "")


def stays(decision: Decision, seen: Seen) -> bool:
    """Return True where an alert that was heard again keeps the final decision that it had."""
    return seen.earlier is not None and (decision.outcome == "drop" or decision.rule == "answered")


def again(event: Event) -> Decision:
    """The decision in `event`, an intent or a decision, made again from that row alone."""
    body = event.body
    seen = Seen.from_json(body["seen"])
    about = seen.alert
    of = (about.as_of, None, about.status, about.reopened)
    alert = Alert(str(event.key), event.pack, about.at, about.sender, "", "", *of)
    return decide(alert, seen, AdmissionPolicy.model_validate(body["policy"]), datetime.fromisoformat(body["now"]))


def decision_of(event: Event) -> Decision:
    """The decision in `event`, an intent or a decision, as it was made."""
    body = event.body
    until = datetime.fromisoformat(body["until"]) if body.get("until") else None
    return Decision(str(event.key), body["outcome"], body["rule"], body["reason"], until, event.run_id)


def alert_of(event: Event) -> Alert:
    """The alert in its event, or in the `heard` event by which it is considered again."""
    body = event.body
    as_of = datetime.fromisoformat(body["as_of"]) if body["as_of"] else None
    what = (body["sender"], body["reason"], body["fingerprint"], as_of, body["evidence"], body["status"])
    reopened = event.position if event.kind == "heard" else None
    return Alert(str(event.key), event.pack, event.at, *what, reopened)


# What is seen of the past.


@dataclass
class _Begun:
    position: int
    id: str
    at: datetime
    as_of: datetime


@dataclass
class _Asked:
    id: str
    at: datetime
    as_of: datetime | None
    """What it is to pretend to be at; None: the newest."""
    open: bool
    """Asked for in the pass that goes on: what it is to be started with is not written down yet."""


@dataclass
class _Complaints:
    """The alerts of one fingerprint."""

    at: list[datetime] = field(default_factory=list)
    """Of all that fire, each time that one was heard, in order of time."""
    kept: list[tuple[int, str, datetime]] = field(default_factory=list)
    """Position, id and instant of those that fire and were not dropped."""
    resolved: list[tuple[int, str]] = field(default_factory=list)


class Past:
    """A pack's events, folded: what there is to see for an alert, in O(log n).

    One pass makes one `Past`, asks it to `see` each alert in order of position, and lets it `note` each decision
    before the next is made. After `end_pass`, decisions noted leave it as the same ones read back as events would.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.upto = 0
        self._now: datetime | None = None
        self._alerts: dict[str, Alert] = {}
        self._seen: dict[str, Alert] = {}
        self._held: dict[str, str] = {}
        self._final: set[str] = set()
        self._last_heard: dict[str, datetime] = {}
        self._fingerprints: dict[str, str] = {}
        self._places: dict[str, tuple[int, datetime]] = {}
        """From where each alert is considered: its position and instant, or those at which it was heard again."""
        self._complaints: dict[str, _Complaints] = {}
        self._firing: list[datetime] = []
        self._data: int = 0
        self._begun: list[_Begun] = []
        self._begun_by_id: dict[str, _Begun] = {}
        self._failed: set[str] = set()
        self._asked: dict[str, _Asked] = {}
        self._waiting: dict[str, _Asked] = {}
        self._starts: list[datetime] = []
        self._trained: list[tuple[datetime, float]] = []
        self._promoted: tuple[int, str, datetime] | None = None
        self._snoozed: Snoozed | None = None
        for event in events:
            self.add(event)

    @staticmethod
    def horizon(policy: AdmissionPolicy, calendar: Calendar | None = None) -> dict[str, timedelta | None]:
        """By kind of event, how far back before the oldest alert to decide its events can matter.

        None: only the newest event of the kind matters, however old it is. What is older may be given and changes
        nothing.
        """
        partition = (calendar or Calendar()).longest
        period = policy.budget.per if policy.budget else timedelta(0)
        heard = policy.confirm.of * policy.confirm.each if policy.confirm else timedelta(0)
        # A repeat is compared with one that may itself have waited to be confirmed.
        repeats = policy.dedupe + heard
        runs = max(policy.cooldown, partition)
        return {
            "alert": max(repeats, partition, MINUTE),
            "heard": max(repeats, partition, MINUTE),
            "decision": max(repeats, period, LOST),
            "intent": max(repeats, period, LOST),
            "run": max(runs, LOST),
            "stage": max(runs, period if policy.budget and policy.budget.device_hours else timedelta(0)),
            "receipt": runs,
            "failure": runs,
            "promotion": partition,
            "snooze": None,
        }

    def add(self, event: Event) -> None:  # noqa: C901  one kind of event a line
        """Fold one more event; they come in order of position. Kinds that do not matter are passed over."""
        self.upto = max(self.upto, event.position)
        kind, body, run_id = event.kind, event.body, event.run_id
        if kind == "alert":
            self._heard(event.position, alert_of(event))
        elif kind == "heard":
            self._heard_again(alert_of(event))
        elif kind in ("intent", "decision"):
            self._written(event)
        elif kind == "snooze":
            until = body["until"]
            self._snoozed = Snoozed(until=until, by=body["by"], why=body["why"]) if until else None
        elif run_id is None:
            return
        elif kind == "run" and run_id not in self._begun_by_id:
            run = _Begun(event.position, run_id, event.at, _instant(body["as_of"]))
            self._begun.append(run)
            self._begun_by_id[run_id] = run
            self._waiting.pop(run_id, None)
        elif kind == "failure":
            self._failed.add(run_id)
        elif kind in ("stage", "receipt"):
            self._failed.discard(run_id)  # a later attempt went on
            if kind == "stage" and body["stage"] == "train":
                bisect.insort(self._trained, (event.at, body["value"]["duration_s"] / 3600))
        elif kind == "promotion" and body["status"] == "done":
            self._promoted = (event.position, run_id, event.at)

    def see(
        self,
        alert: Alert,
        policy: AdmissionPolicy,
        now: datetime,
        *,
        paused: bool | None = False,
        broken: str | None = None,
        calendar: Calendar | None = None,
        earlier: Earlier | None = None,
    ) -> Seen:
        """What the rules look at for `alert` at `now`; beside the past, that is what the world is like just now.

        `paused` is None where Airflow does not know the pack; `broken` says why the pack cannot be loaded: its policy
        and its calendar are then not known either. `earlier` is the last final decision of an alert that is considered
        again, and what came of its run.
        """
        self._now = now
        if alert.reopened is not None:
            self._fingerprints[alert.id], self._places[alert.id] = alert.fingerprint, (alert.reopened, alert.at)
        elif alert.id not in self._alerts:
            self._heard(self.upto, alert)
        self._seen[alert.id] = alert
        position, _ = self._places[alert.id]
        last_heard = self.last_heard(alert)
        about = About(
            at=alert.at,
            sender=alert.sender,
            as_of=alert.as_of,
            status=alert.status,
            reopened=alert.reopened,
            last_heard=last_heard if last_heard > alert.at else None,
        )
        facts: dict[str, Any] = {"alert": about, "upto": self.upto, "paused": paused, "broken": broken}
        if alert.status == "resolved":
            return Seen(**facts)
        complaints = self._complaints.setdefault(alert.fingerprint, _Complaints())
        facts["resolved"] = self._resolved(complaints, position)
        facts["earlier"] = earlier
        if earlier is not None and earlier.run_id is not None and earlier.lost is None:
            return Seen(**facts)
        if now - last_heard >= EXPIRES:
            facts["held"] = self._held.get(alert.id)
        if broken is not None:
            return Seen(**facts)
        if policy.confirm is not None:
            facts["heard"] = _windows(complaints.at, last_heard, policy)
        facts["same"] = same = self._same(complaints, alert, position, policy)
        if same is not None and not same.unconfirmed:
            return Seen(**facts)  # a storm of repeats: the other rules are not asked, so no more is kept of each
        calendar = calendar or Calendar()
        return Seen(
            **facts,
            snoozed=self._snoozed if self._snoozed is not None and now < self._snoozed.until else None,
            answer=self._answer(alert, position, now, calendar, earlier.run_id if earlier else None),
            minute=_within(self._firing, alert.at - MINUTE, alert.at),
            champion=self._champion(position, now, calendar),
            last=self._last(policy.cooldown, now),
            spent=self.spent(policy, now),
            calendar=calendar,
        )

    def note(self, decision: Decision) -> None:
        """Let the decision just made be seen by the next."""
        assert self._now is not None, "a decision is noted after what it saw"
        self._decided(decision, self._now, self._seen[decision.alert].as_of, written=False)

    def end_pass(self) -> None:
        """What was asked for so far has been written down: it is as it is."""
        for asked in self._waiting.values():
            asked.open = False

    def as_of(self, run_id: str) -> datetime | None:
        """The as-of that a run asked for is to be started with: the latest that the alerts it answers ask for.

        None: the newest when it begins.
        """
        return self._asked[run_id].as_of

    def spent(self, policy: AdmissionPolicy, now: datetime) -> Spent | None:
        """What is spent of the policy's budget at `now`; None where there is no budget."""
        budget = policy.budget
        if budget is None:
            return None
        since = now - budget.per
        spent: dict[str, Any] = {}
        if budget.runs is not None:
            starts = self._starts[bisect.bisect_right(self._starts, since) :]
            spent["runs"] = len(starts)
            if len(starts) >= budget.runs:
                spent["runs_until"] = starts[-budget.runs] + budget.per
        if budget.device_hours is not None:
            trained = self._trained[bisect.bisect_right(self._trained, (since, math.inf)) :]
            # newest[n]: what the newest n trainings took. The budget is free again when the next older one is out.
            newest = list(itertools.accumulate((hours for _, hours in reversed(trained)), initial=0.0))
            spent["hours"] = newest[-1]
            if newest[-1] >= budget.device_hours:
                fit = bisect.bisect_left(newest, budget.device_hours)
                spent["hours_until"] = trained[-fit][0] + budget.per
        return Spent(**spent)

    def _heard(self, position: int, alert: Alert) -> None:
        if alert.id in self._alerts:
            return
        self._alerts[alert.id] = alert
        self._fingerprints[alert.id], self._places[alert.id] = alert.fingerprint, (position, alert.at)
        complaints = self._complaints.setdefault(alert.fingerprint, _Complaints())
        if alert.status == "resolved":
            complaints.resolved.append((position, alert.id))
            return
        bisect.insort(complaints.at, alert.at)
        bisect.insort(self._firing, alert.at)
        bisect.insort(complaints.kept, (position, alert.id, alert.at))
        if alert.sender == NEWS:
            self._data = max(self._data, position)

    def _written(self, event: Event) -> None:
        """Fold an intent or a decision."""
        about = event.body["seen"]["alert"]
        as_of = event.body["conf"]["as_of"] if event.kind == "intent" else about.get("as_of")
        if (reopened := about.get("reopened")) is not None and event.key in self._fingerprints:
            self._places[str(event.key)] = (reopened, _instant(about["at"]))
        self._decided(decision_of(event), _instant(event.body["now"]), as_of and _instant(as_of), written=True)

    def _heard_again(self, alert: Alert) -> None:
        self._last_heard[alert.id] = alert.at
        self._fingerprints[alert.id] = alert.fingerprint
        bisect.insort(self._complaints.setdefault(alert.fingerprint, _Complaints()).at, alert.at)

    def last_heard(self, alert: Alert) -> datetime:
        """When an alert was heard last."""
        return max(alert.at, self._last_heard.get(alert.id, alert.at))

    def _decided(self, decision: Decision, now: datetime, as_of: datetime | None, *, written: bool) -> None:
        alert_id, run_id = decision.alert, decision.run_id
        if alert_id in self._places and decision.rule != "answered":
            self._keep(alert_id, decision.outcome != "drop")
        if decision.outcome == "hold":
            self._held[alert_id] = decision.reason
            self._final.discard(alert_id)
            return
        self._final.add(alert_id)
        if decision.outcome == "retrain" and run_id is not None and run_id not in self._asked:
            self._asked[run_id] = asked = _Asked(run_id, now, as_of, open=not written)
            bisect.insort(self._starts, now)
            if run_id not in self._begun_by_id:
                self._waiting[run_id] = asked
        elif decision.outcome == "merge" and run_id in self._waiting and self._waiting[run_id].open:
            self._waiting[run_id].as_of = _later(self._waiting[run_id].as_of, as_of, now)

    def _keep(self, alert_id: str, kept: bool) -> None:
        """Let later alerts be repeats of this one, or not."""
        position, at = self._places[alert_id]
        complaints = self._complaints[self._fingerprints[alert_id]].kept
        index = bisect.bisect_left(complaints, (position, alert_id))
        there = index < len(complaints) and complaints[index][:2] == (position, alert_id)
        if there and not kept:
            del complaints[index]
        elif kept and not there:
            complaints.insert(index, (position, alert_id, at))

    def _resolved(self, complaints: _Complaints, position: int) -> Named | None:
        index = bisect.bisect_right(complaints.resolved, (position, chr(0x10FFFF)))
        if index == len(complaints.resolved):
            return None
        alert_id = complaints.resolved[index][1]
        return Named(id=alert_id, at=self._alerts[alert_id].at)

    def _same(self, complaints: _Complaints, alert: Alert, position: int, policy: AdmissionPolicy) -> Repeated | None:
        """The nearest of the same complaint before it that was not dropped, if it is near enough to be repeated."""
        index = bisect.bisect_left(complaints.kept, (position, alert.id))
        if index == 0 or alert.sender == NEWS:
            return None
        _, before, at = complaints.kept[index - 1]
        if alert.at - at >= policy.dedupe:
            return None
        confirm = policy.confirm
        unconfirmed = (
            confirm is not None
            and before not in self._final
            and _windows(complaints.at, self._last_heard.get(before, at), policy) < confirm.heard
        )
        return Repeated(id=before, at=at, unconfirmed=unconfirmed)

    def _answer(
        self, alert: Alert, position: int, now: datetime, calendar: Calendar, without: str | None
    ) -> Answer | None:
        """The run that answers the alert: one that began after it, or one asked for that has not begun.

        `without` is a run of which nothing came.
        """
        wanted = calendar.as_of(alert.as_of or alert.at)
        start = bisect.bisect_right(self._begun, position, key=lambda run: run.position)
        for run in self._begun[start:]:
            if run.as_of >= wanted and run.id not in self._failed:
                return Answer(id=run.id, at=run.at, as_of=run.as_of, begun=True)
        for asked in self._waiting.values():
            as_of = calendar.as_of(asked.as_of or asked.at)
            if now - asked.at < LOST and (as_of >= wanted or asked.open) and asked.id != without:
                return Answer(id=asked.id, at=asked.at, as_of=max(as_of, wanted), begun=False)
        return None

    def _champion(self, position: int, now: datetime, calendar: Calendar) -> Champion | None:
        if self._promoted is None or self._promoted[1] not in self._begun_by_id:
            return None
        promoted, run_id, at = self._promoted
        run = self._begun_by_id[run_id]
        if position < promoted or self._data > run.position or run.at <= now - calendar.longest:
            return None
        return Champion(id=run_id, at=at, as_of=run.as_of)

    def _last(self, cooldown: timedelta, now: datetime) -> Last | None:
        found = [Last(id=run.id, at=run.at, begun=True) for run in self._begun[-1:]]
        found += [
            Last(id=asked.id, at=asked.at, begun=False) for asked in self._waiting.values() if now - asked.at < LOST
        ]
        last = max(found, key=lambda last: last.at, default=None)
        return last if last is not None and now < last.at + cooldown else None


def _windows(heard: list[datetime], at: datetime, policy: AdmissionPolicy) -> int:
    """In how many of the policy's windows up to `at` there is one of `heard`, which are in order."""
    confirm = policy.confirm
    if confirm is None:
        return 0
    ends = (at - index * confirm.each for index in range(confirm.of))
    return sum(_within(heard, end - confirm.each, end) > 0 for end in ends)


def _within(times: list[datetime], start: datetime, end: datetime) -> int:
    """How many of `times`, which are in order, are after `start` and not after `end`."""
    return bisect.bisect_right(times, end) - bisect.bisect_right(times, start)


def _later(one: datetime | None, other: datetime | None, now: datetime) -> datetime | None:
    """The later of two as-ofs, where None is the newest there is at `now`."""
    latest = max(one or now, other or now)
    return latest if latest > now or (one and other) else None


def _instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _time(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M} UTC"


def _span(span: timedelta) -> str:
    """`1 hour`, `3 minutes`, `7 days`: in the largest unit of which there are at least two, or an exact number."""
    seconds = int(span.total_seconds())
    for unit, noun in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * unit or (seconds >= unit and seconds % unit == 0):
            return count(seconds // unit, noun)
    return count(seconds, "second")


def _before(span: timedelta) -> str:
    return f"{_span(span)} before" if span >= timedelta(seconds=1) else "less than a second before"


def _after(span: timedelta) -> str:
    return f"{_span(span)} after it" if span >= timedelta(seconds=1) else "less than a second after it"
