"""Where the rooms meet for the loop around the chain: what asks for a run, and what becomes of it."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from evergreen import database as db
from evergreen.database import Database
from evergreen.errors import DatabaseError, PackError
from evergreen.pack import AdmissionPolicy, load
from evergreen.run import count
from evergreen.settings import Settings
from evergreen.triggers import inbox
from evergreen.triggers.admission import LOST, NEWS, Alert, Calendar, Decision, Earlier, Past, Seen, decide, stays
from evergreen.triggers.inbox import NewAlert, Ruling

log = logging.getLogger("evergreen")

PUT_OFF = timedelta(minutes=1)
"""When a pack whose admission failed is looked at again."""

TRIES = 5
"""How often a pack is decided again because something happened in the meantime; then the next drain does it."""


class Scheduler(Protocol):
    """What admission asks of whoever runs the training."""

    def is_paused(self, pack: str) -> bool | None:
        """Whether runs of `pack` that are asked for wait for a person; None where the pack is not known."""

    def run_exists(self, pack: str, run_id: str) -> bool:
        """Whether the run is there, whatever its state."""

    def run_failed(self, pack: str, run_id: str) -> bool:
        """Return True where the run is there and failed, for good."""


@dataclass(frozen=True)
class Start:
    """A run that must be made to exist. Asked for twice, it is still one run: its id says so."""

    pack: str
    run_id: str
    conf: dict[str, Any]
    """What the run is to know: `as_of`, `reason`, `force`."""


def data_arrived(settings: Settings, pack: str, event_id: str, at: datetime, what: str) -> str:
    """Keep an alert for new data of `pack`, once for each `event_id`; return its id.

    `at` is when the data was said to be there, `what` who said so.
    """
    asset = f"data/{pack}"
    alert = NewAlert(
        sender=NEWS,
        sender_id=event_id,
        reason=f"new data in {asset}",
        fingerprint=asset,
        evidence={"event": event_id, "at": at.astimezone(UTC).isoformat(), "by": what},
    )
    return inbox.keep(db.connect(settings.database_url), pack, [alert])[0]


def admit(settings: Settings, scheduler: Scheduler, now: datetime | None = None) -> list[Start]:
    """Decide all alerts that are due, and return the runs that must be made to exist.

    A pack that fails is put off and logged; the others go on. Raises DatabaseError.
    """
    database = db.connect(settings.database_url)
    starts: list[Start] = []
    for pack in inbox.packs_due(database, now or datetime.now(UTC)):
        try:
            starts += _ask_again(database, scheduler, pack, now or datetime.now(UTC))
            starts += _decide(settings, database, scheduler, pack, now)
        except DatabaseError:
            raise
        except Exception:
            log.exception("admission of %s failed; it is looked at again in a minute", pack)
            at = now or datetime.now(UTC)
            waiting = [alert.id for alert in inbox.due(database, pack, at)]
            waiting += [str(intent.key) for intent in inbox.intended(database, pack, due_at=at)]
            inbox.put_off(database, pack, dict.fromkeys(waiting, at + PUT_OFF))
    return starts


def confirm(settings: Settings, scheduler: Scheduler, pack: str | None = None) -> None:
    """Make the intents final whose run exists, of `pack` or of all. Raises DatabaseError."""
    database = db.connect(settings.database_url)
    asked: dict[str, set[str]] = {}
    for intent in inbox.intended(database, pack):
        asked.setdefault(intent.pack, set()).add(str(intent.run_id))
    for name, runs in asked.items():
        try:
            inbox.finish(database, name, {run_id for run_id in runs if scheduler.run_exists(name, run_id)})
        except DatabaseError:
            raise
        except Exception:
            log.exception("the runs of %s could not be read back; its decisions are made final later", name)


def _ask_again(database: Database, scheduler: Scheduler, pack: str, now: datetime) -> list[Start]:
    """The runs that were asked for some time ago and still do not exist. Those that do are final from here."""
    intents = inbox.intended(database, pack, due_at=now)
    if not intents:
        return []
    existing = {run_id for run_id in {str(intent.run_id) for intent in intents} if scheduler.run_exists(pack, run_id)}
    if existing:
        inbox.finish(database, pack, existing)
    missing = {intent.key: intent for intent in intents if intent.run_id not in existing}
    # The longer in vain, the more seldom: a pack that is gone for good is not asked for twice a minute for ever.
    waits = {str(key): max(inbox.ASK_AGAIN, (now - intent.at) / 10) for key, intent in missing.items()}
    inbox.put_off(database, pack, {key: now + wait for key, wait in waits.items()})
    if not missing or scheduler.is_paused(pack) is None:
        return []
    confs = {str(intent.run_id): intent.body["conf"] for intent in missing.values()}
    return [Start(pack, run_id, conf) for run_id, conf in confs.items()]


def _decide(
    settings: Settings, database: Database, scheduler: Scheduler, pack: str, now: datetime | None
) -> list[Start]:
    """Decide the alerts of `pack` that are due, and write down what the rules say of them in one transaction.

    What happens between the reading and the writing is not overlooked: then they are decided again. So two drains
    need no lease to keep out of each other's way, and one that dies keeps nobody waiting.
    """
    outside = None
    for _ in range(TRIES):
        at = now or datetime.now(UTC)
        last = database.latest(pack)
        alerts = inbox.due(database, pack, at)
        if last is None or not alerts:
            return []
        outside = outside or _outside(settings, database, scheduler, pack)
        policy, calendar, facts = outside
        earlier = _earlier(database, scheduler, pack, alerts, at)
        past = Past(
            inbox.history(database, pack, Past.horizon(policy, calendar), before=min(each.at for each in alerts))
        )
        decided: list[tuple[Decision, Seen]] = []
        for alert in alerts:
            seen = past.see(alert, policy, at, calendar=calendar, earlier=earlier.get(alert.id), **facts)
            decision = decide(alert, seen, policy, at)
            past.note(decision)
            decided.append((decision, seen))
        moved = [decision for decision, seen in decided if not stays(decision, seen)]
        confs = _confs(database, scheduler, past, pack, alerts, moved)
        rulings = [
            Ruling(decision, seen.to_json(), confs.get(decision.run_id or ""), stays(decision, seen))
            for decision, seen in decided
        ]
        said = policy.model_dump(mode="json")
        if inbox.record(database, pack, rulings, policy=said, now=at, after=last.position):
            return [Start(pack, run_id, conf) for run_id, conf in confs.items()]
    log.warning("%s: its past changed %d times while its alerts were decided; the next drain goes on", pack, TRIES)
    return []


def _earlier(
    database: Database, scheduler: Scheduler, pack: str, alerts: list[Alert], now: datetime
) -> dict[str, Earlier]:
    """What was decided last of each alert that is considered again, and what came of its run."""
    settled = inbox.settled(database, [alert.id for alert in alerts if alert.reopened is not None])
    runs = {str(event.run_id) for event in settled.values() if event.run_id is not None}
    lost = {run_id: _lost(database, scheduler, pack, run_id, now) for run_id in runs}
    return {
        alert: Earlier(outcome=event.body["outcome"], run_id=event.run_id, lost=lost.get(str(event.run_id)))
        for alert, event in settled.items()
    }


def _lost(
    database: Database, scheduler: Scheduler, pack: str, run_id: str, now: datetime
) -> Literal["failed", "gone"] | None:
    """Why nothing came of a run: it failed, or Airflow has it no more; None where it goes on, or got to its end."""
    ended = database.events(pack, run_id=run_id, stage="promote", kind=("stage", "receipt"), limit=1)
    if ended:
        return None
    if scheduler.run_exists(pack, run_id):
        return "failed" if scheduler.run_failed(pack, run_id) else None
    # `evergreen run` may make a run that Airflow never hears of.
    last = database.latest(pack, run_id=run_id, kind=("run", "stage", "receipt", "failure"))
    if last is None or (last.kind != "failure" and now - last.at >= LOST):
        return "gone"
    return "failed" if last.kind == "failure" else None


def _outside(
    settings: Settings, database: Database, scheduler: Scheduler, name: str
) -> tuple[AdmissionPolicy, Calendar | None, dict[str, Any]]:
    """The policy of a pack, its calendar, and how the world around it is just now."""
    try:
        pack = load(settings.packs, name)
    except PackError as error:
        return AdmissionPolicy(), None, {"broken": error.what}
    return pack.triggers.admission, Calendar.of(pack, database.made_at()), {"paused": scheduler.is_paused(name)}


def _confs(
    database: Database,
    scheduler: Scheduler,
    past: Past,
    pack: str,
    alerts: list[Alert],
    decisions: list[Decision],
) -> dict[str, dict[str, Any]]:
    """By its id, what each run that these decisions name and that does not exist yet is to be started with."""
    answered = Counter(decision.run_id for decision in decisions if decision.run_id)
    known = {alert.id: alert for alert in alerts}
    confs: dict[str, dict[str, Any]] = {}
    for decision in decisions:
        if decision.outcome == "retrain" and decision.run_id:
            alert, as_of, more = known[decision.alert], past.as_of(decision.run_id), answered[decision.run_id] - 1
            reason = f"{alert.sender}: {alert.reason}" + (f" (and {count(more, 'more alert')})" if more else "")
            confs[decision.run_id] = {"as_of": as_of.isoformat() if as_of else None, "reason": reason, "force": False}
    for run_id in answered.keys() - confs.keys():
        # Asked for in an earlier pass, with what an intent says. If it is there by now, nothing is needed.
        asked = database.latest(pack, kind="intent", run_id=run_id)
        begun = database.latest(pack, kind="run", run_id=run_id)
        if asked is not None and begun is None and not scheduler.run_exists(pack, run_id):
            confs[run_id] = asked.body["conf"]
    return confs
