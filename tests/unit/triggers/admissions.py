"""A pack's admission in memory, for tests: events come, a drain decides as `evergreen.loop` does, runs begin late."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from evergreen.database import Event
from evergreen.pack import AdmissionPolicy
from evergreen.triggers.admission import Calendar, Decision, Earlier, Past, Seen, alert_of, decide, stays

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)

SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class World:
    """The events of one pack, and what of them is undecided."""

    def __init__(self, policy: AdmissionPolicy | None = None, calendar: Calendar | None = None) -> None:
        self.policy = policy or AdmissionPolicy()
        self.calendar = calendar or Calendar()
        self.now = NOON
        self.events: list[Event] = []
        self.paused: bool | None = False
        self.broken: str | None = None
        self.alerts: dict[str, Event] = {}
        self.reopened: dict[str, Event] = {}
        """By which event each alert is considered again."""
        self.undecided: dict[str, datetime] = {}
        self.held: dict[str, str] = {}
        self.intents: dict[str, Event] = {}
        self.begun: set[str] = set()
        self.known = 0
        """How many events the last pass knew."""
        self.looked_at = self.now
        self.decided: list[tuple[Decision, Seen]] = []
        """What the last pass decided."""

    def append(self, kind: str, body: dict[str, Any], *, key: str | None = None, run_id: str | None = None) -> Event:
        """An event, a microsecond after whatever was before it."""
        self.now += timedelta(microseconds=1)
        event = Event("p", len(self.events) + 1, kind, run_id, key, self.now, body, "", "")
        self.events.append(event)
        return event

    def alert(self, fingerprint: str = "drift", *, sender: str = "monitor", as_of=None, status="firing") -> str:
        """Keep an alert; its id."""
        body = {
            "sender": sender,
            "reason": f"{fingerprint} is up",
            "fingerprint": fingerprint,
            "as_of": as_of and as_of.isoformat(),
            "evidence": None,
            "status": status,
        }
        key = f"alert-{len(self.events) + 1:020x}"
        self.alerts[key] = self.append("alert", body, key=key)
        self.undecided[key] = self.now
        return key

    def hear(self, alert: str) -> None:
        """A repeat of an alert's message comes."""
        event = self.append("heard", self.alerts[alert].body, key=alert)
        if alert not in self.undecided:
            self.reopened[alert] = event
            self.held.pop(alert, None)
            self.undecided[alert] = self.now
        elif alert not in self.intents:
            self.undecided[alert] = min(self.undecided[alert], self.now)

    def earlier(self, alert: str) -> Earlier | None:
        """What was decided last of an alert that is considered again; its run failed where its last event says so."""
        if alert not in self.reopened:
            return None
        finals = [e for e in self.events if (e.kind, e.key) == ("decision", alert) and e.body["outcome"] != "hold"]
        run_id = finals[-1].run_id
        ends = [e.kind for e in self.events if e.run_id == run_id and e.kind in ("run", "stage", "failure")]
        lost = "failed" if run_id and ends[-1:] == ["failure"] else None
        return Earlier(outcome=finals[-1].body["outcome"], run_id=run_id, lost=lost)

    def run(self, run_id: str, *, as_of: datetime | None = None) -> None:
        """A run begins."""
        self.begun.add(run_id)
        instant = self.calendar.as_of(as_of or self.now).isoformat()
        self.append("run", {"as_of": instant, "reason": "…", "force": False}, run_id=run_id)

    def train(self, run_id: str, hours: float) -> None:
        """A run has trained."""
        self.append("stage", {"stage": "train", "value": {"duration_s": hours * 3600}}, run_id=run_id)

    def fail(self, run_id: str) -> None:
        """A run's stage fails."""
        self.append("failure", {"stage": "validate"}, run_id=run_id)

    def promote(self, run_id: str) -> None:
        """A run's model becomes champion."""
        self.append("promotion", {"status": "intended"}, run_id=run_id)
        self.append("promotion", {"status": "done"}, run_id=run_id)

    def snooze(self, until: datetime | None, why: str = "the source is being moved") -> None:
        """Hold all alerts until then; None: no longer."""
        self.append("snooze", {"until": until and until.isoformat(), "why": why, "by": "ada"})
        for alert in self.undecided:
            if alert not in self.intents:
                self.undecided[alert] = min(self.undecided[alert], self.now)

    def past(self, oldest: datetime | None = None) -> Past:
        """The past, from no more events than `Past.horizon` asks for where `oldest` is given."""
        if oldest is None:
            return Past(self.events)
        reach = Past.horizon(self.policy, self.calendar)
        recent = [e for e in self.events if e.kind in reach and _is_recent(e, reach[e.kind], oldest)]
        snoozes = [event for event in self.events if event.kind == "snooze"][-1:]
        return Past(sorted([*recent, *snoozes], key=lambda event: event.position))

    def due(self) -> list[Event]:
        """The alerts to look at, oldest first; with those that a resolved one among them ends."""
        waiting = {
            alert: self.reopened.get(alert, self.alerts[alert]) for alert in self.undecided if alert not in self.intents
        }
        due = {alert for alert in waiting if self.undecided[alert] <= self.now}
        ended = {waiting[alert].body["fingerprint"] for alert in due if waiting[alert].body["status"] == "resolved"}
        found = [event for alert, event in waiting.items() if alert in due or event.body["fingerprint"] in ended]
        return sorted(found, key=lambda event: event.position)

    def drain(self, *, dies: bool = False) -> dict[str, Decision]:
        """One pass over what is due, written down unless it dies first; the decisions by alert."""
        self.now += timedelta(microseconds=1)
        due, now = self.due(), self.now
        self.known, self.looked_at = len(self.events), now
        if not due:
            self.decided = []
            return {}
        past = self.past(min(event.at for event in due))
        self.decided = []
        for event in due:
            alert = alert_of(event)
            outside = {"paused": self.paused, "broken": self.broken, "earlier": self.earlier(alert.id)}
            seen = past.see(alert, self.policy, now, calendar=self.calendar, **outside)
            decision = decide(alert, seen, self.policy, now)
            past.note(decision)
            self.decided.append((decision, seen))
        if not dies:
            self._record(past, now)
        return {decision.alert: decision for decision, _ in self.decided}

    def one(self, alert: str) -> Decision:
        """The decision on one alert in a pass of now."""
        return self.drain()[alert]

    def asked(self) -> dict[str, datetime | None]:
        """The runs that were asked for and have not begun, with what each is to pretend to be at."""
        asks = [event for event in self.events if event.kind == "intent" and event.body["outcome"] == "retrain"]
        texts = {str(event.run_id): event.body["conf"]["as_of"] for event in asks if event.run_id not in self.begun}
        return {run_id: text and datetime.fromisoformat(text) for run_id, text in texts.items()}

    def confirm(self, existing: Iterable[str] | None = None) -> None:
        """Make the intents final whose run exists; None: all of them."""
        for alert, intent in list(self.intents.items()):
            if existing is None or intent.run_id in set(existing):
                body = {key: value for key, value in intent.body.items() if key != "conf"}
                self.append("decision", body | {"until": None}, key=alert, run_id=intent.run_id)
                del self.intents[alert], self.undecided[alert]

    def _record(self, past: Past, now: datetime) -> None:
        for decision, seen in self.decided:
            body = {
                "outcome": decision.outcome,
                "rule": decision.rule,
                "reason": decision.reason,
                "policy": self.policy.model_dump(mode="json"),
                "now": now.isoformat(),
                "seen": seen.to_json(),
            }
            alert, run_id = decision.alert, decision.run_id
            if stays(decision, seen) and alert not in self.held:
                del self.undecided[alert]
            elif decision.until is not None:
                if self.held.get(alert) != decision.reason:
                    self.append("decision", body | {"until": decision.until.isoformat()}, key=alert)
                self.held[alert], self.undecided[alert] = decision.reason, decision.until
            elif run_id is not None and run_id not in self.begun:
                as_of = past.as_of(run_id)
                conf = {"as_of": as_of and as_of.isoformat(), "reason": "…", "force": False}
                self.intents[alert] = self.append("intent", body | {"conf": conf}, key=alert, run_id=run_id)
            else:
                self.append("decision", body | {"until": None}, key=alert, run_id=run_id)
                del self.undecided[alert]


def _is_recent(event: Event, reach: timedelta | None, oldest: datetime) -> bool:
    return reach is not None and event.at >= oldest - reach
