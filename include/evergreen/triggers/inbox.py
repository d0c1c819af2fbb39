"""The inbox: alerts written down before anything is decided about them, and what was decided, once each.

All of it is events. A message that comes again while its alert fires is a `heard` event of that alert, at most one in
thirty seconds for each alert. The table `undecided` is an index over them that changes in the same transactions: it says which
alerts have no final decision yet and when each is looked at next, and whoever removes an alert's row from it is the
one who may append that alert's final decision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa

from evergreen.database import COLUMNS, Chain, Database, Event, event_of, events, undecided
from evergreen.pack import AdmissionPolicy
from evergreen.triggers.admission import NEWS, Alert, Decision, alert_of

AT_ONCE = 10_000
"""How many alerts of a pack are decided in one transaction; the rest stay due."""

ASK_AGAIN = timedelta(seconds=30)
"""When a run that was asked for and does not exist is asked for again."""

SILENT = timedelta(seconds=30)
"""How long after an alert was heard its repeats are not written down; at most half a window where a policy confirms."""

MATTERS = ("intent", "decision", "run", "failure", "promotion", "snooze")
"""The kinds of events that can change what is decided of an alert that was there before them."""


@dataclass(frozen=True)
class NewAlert:
    """A message as it came in."""

    sender: str
    sender_id: str
    """The sender's own id of the message: what makes a repeat of it a repeat."""
    reason: str
    fingerprint: str
    as_of: datetime | None = None
    evidence: dict[str, Any] | None = None
    status: Literal["firing", "resolved"] = "firing"
    ended_by: str | None = None
    """The sender's id of the message that says that this alert is over."""


@dataclass(frozen=True)
class Ruling:
    """A decision, and all that it was made from but the alert and the policy."""

    decision: Decision
    seen: dict[str, Any]
    conf: dict[str, Any] | None = None
    """What the decision's run is to be started with: until that run exists, the decision is an intent. None: as it is."""
    stays: bool = False
    """The alert was heard again and keeps its earlier decision: nothing is written, unless it was held in between."""


def alert_id(pack: str, sender: str, sender_id: str) -> str:
    """`alert-` and 20 hex digits: the same for every repeat of a sender's message."""
    message = f"{pack}\0{sender}\0{sender_id}".encode("utf-8", "surrogatepass")
    return f"alert-{hashlib.sha256(message).hexdigest()[:20]}"


def keep(database: Database, pack: str, alerts: Sequence[NewAlert]) -> list[str]:
    """Write alerts down, all or none, and return their ids in order; they are committed when this returns.

    A message that was kept before, by its sender and the sender's id of it, gets the first answer and is not kept
    again: the alert is heard again, and considered again if it has a final decision. Raises DatabaseError.
    """
    ids = [alert_id(pack, alert.sender, alert.sender_id) for alert in alerts]
    ends = {key: alert_id(pack, a.sender, a.ended_by) for key, a in zip(ids, alerts, strict=True) if a.ended_by}
    with database.chain(pack) as chain:
        known = _known(chain.connection, [*ids, *ends.values()])
        repeats = [key for key in ids if key in known and ends.get(key) not in known]
        silent = _heard_lately(chain, repeats) if repeats else set()
        rows = []
        for key, alert in zip(ids, alerts, strict=True):
            if key not in known:
                known.add(key)
                rows.append(_row(chain.append("alert", _body(alert), key=key)))
                silent.add(key)
            elif key in repeats and key not in silent and alert.status == "firing" and alert.sender != NEWS:
                silent.add(key)
                rows.append(_row(chain.append("heard", {**_body(alert), "evidence": None}, key=key)))
        _reopen(chain, rows)
    return ids


def _heard_lately(chain: Chain, alerts: Sequence[str]) -> set[str]:
    """Those of `alerts` that are not to be written down again yet.

    However many repeats come, an alert is written down once in SILENT, or twice in a window where the policy of the
    pack's newest decision confirms by shorter ones.
    """
    query = sa.select(events.c.body).where(events.c.pack == chain.pack, events.c.kind == "decision")
    newest = chain.connection.execute(query.order_by(events.c.position.desc()).limit(1)).scalar()
    confirm = AdmissionPolicy.model_validate(json.loads(newest).get("policy", {})).confirm if newest else None
    since = datetime.now(UTC) - (min(SILENT, confirm.each / 2) if confirm else SILENT)
    lately = sa.select(events.c.key).where(
        events.c.pack == chain.pack, events.c.at > since.isoformat(), events.c.kind.in_(("alert", "heard"))
    )
    return set(chain.connection.execute(lately).scalars()) & set(alerts)


def _reopen(chain: Chain, rows: Sequence[dict[str, Any]]) -> None:
    """Let these alerts be looked at; those that wait already keep their place, and are looked at at once."""
    waiting: dict[str, str | None] = {}
    for some in _batches([row["alert"] for row in rows]):
        query = sa.select(undecided.c.alert, undecided.c.run_id).where(undecided.c.alert.in_(some))
        waiting |= {row.alert: row.run_id for row in chain.connection.execute(query)}
    if new := [row for row in rows if row["alert"] not in waiting]:
        chain.connection.execute(sa.insert(undecided), new)
    held = [row for row in rows if row["alert"] in waiting and waiting[row["alert"]] is None]
    _change(chain, [{"row": row["alert"], "due_at": row["due_at"]} for row in held])


def packs_due(database: Database, now: datetime) -> list[str]:
    """The packs that have an alert to look at, sorted."""
    query = sa.select(undecided.c.pack).where(undecided.c.due_at <= _text(now)).distinct()
    with database.reading() as connection:
        return sorted(connection.execute(query).scalars())


def newest_due(database: Database, now: datetime) -> dict[str, int]:
    """The packs that have an alert to look at, each with the position of the newest of those."""
    query = sa.select(undecided.c.pack, sa.func.max(undecided.c.position)).where(undecided.c.due_at <= _text(now))
    with database.reading() as connection:
        return dict(connection.execute(query.group_by(undecided.c.pack)).tuples().all())


def due(database: Database, pack: str, now: datetime) -> list[Alert]:
    """The alerts of a pack to decide now, oldest first, at most AT_ONCE; with those that a resolved one among them ends."""
    waiting = _waiting(pack)
    with database.reading() as connection:
        rows = connection.execute(waiting.where(undecided.c.due_at <= _text(now)).limit(AT_ONCE))
        found = [event_of(row) for row in rows]
        ended = {event.body["fingerprint"] for event in found if event.body["status"] == "resolved"}
        if ended:
            held = (event_of(row) for row in connection.execute(waiting.where(undecided.c.due_at > _text(now))))
            found += [event for event in held if event.body["fingerprint"] in ended]
    return [alert_of(event) for event in sorted(found, key=lambda event: event.position)]


def intended(database: Database, pack: str | None = None, *, due_at: datetime | None = None) -> list[Event]:
    """The open intents: of `pack` or of all, those to be looked at by `due_at` or all; in the order of their alerts."""
    with database.reading() as connection:
        return _intents(connection, pack, due_at)


def history(database: Database, pack: str, reach: Mapping[str, timedelta | None], *, before: datetime) -> list[Event]:
    """The events of `pack`, by kind no older than `reach` before an instant, as they were at one moment.

    Of a kind whose reach is None, the newest only.
    """
    since = {kind: (before - span).isoformat() for kind, span in reach.items() if span is not None}
    recent = sa.or_(*(sa.and_(events.c.kind == kind, events.c.at >= start) for kind, start in since.items()))
    newest = (
        sa.select(sa.func.max(events.c.position)).where(events.c.pack == pack, events.c.kind == kind).scalar_subquery()
        for kind, span in reach.items()
        if span is None
    )
    query = sa.union_all(
        sa.select(*COLUMNS).where(events.c.pack == pack, events.c.at >= min(since.values()), recent),
        *(sa.select(*COLUMNS).where(events.c.pack == pack, events.c.position == position) for position in newest),
    )
    with database.reading() as connection:
        return sorted(map(event_of, connection.execute(query)), key=lambda event: event.position)


def record(
    database: Database, pack: str, rulings: Sequence[Ruling], *, policy: dict[str, Any], now: datetime, after: int
) -> bool:
    """Write down what was decided, in one transaction; False, and nothing, when it was decided on a past that is gone.

    `after` is the position of an event that was there before anything was read to decide on. A hold that says what
    the alert's last one said is not written again: only its next look moves.
    """
    with database.chain(pack) as chain:
        held = {
            row.alert: row.held
            for row in chain.connection.execute(
                sa.select(undecided.c.alert, undecided.c.held).where(
                    undecided.c.pack == pack, undecided.c.run_id.is_(None)
                )
            )
        }
        if _has_moved(chain, after) or any(ruling.decision.alert not in held for ruling in rulings):
            return False
        finals: list[str] = []
        later: list[dict[str, Any]] = []
        for ruling in rulings:
            decision = ruling.decision
            body = {
                "outcome": decision.outcome,
                "rule": decision.rule,
                "reason": decision.reason,
                "policy": policy,
                "now": now.isoformat(),
                "seen": ruling.seen,
            }
            if ruling.stays and held[decision.alert] is None:
                finals.append(decision.alert)
            elif decision.outcome == "hold":
                assert decision.until is not None, "a hold says until when"
                if held[decision.alert] != decision.reason:
                    body["until"] = decision.until.isoformat()
                    chain.append("decision", body, key=decision.alert)
                later.append({"row": decision.alert, "held": decision.reason, "due_at": _text(decision.until)})
            elif ruling.conf is not None:
                chain.append("intent", {**body, "conf": ruling.conf}, run_id=decision.run_id, key=decision.alert)
                due_at = _text(now + ASK_AGAIN)
                later.append({"row": decision.alert, "held": None, "due_at": due_at, "run_id": decision.run_id})
            else:
                chain.append("decision", {**body, "until": None}, run_id=decision.run_id, key=decision.alert)
                finals.append(decision.alert)
        _change(chain, later)
        _remove(chain, finals)
        heard = (event for event in _of(chain.connection, finals, "heard") if event.position > after)
        _reopen(chain, list({event.key: _row(event) for event in heard}.values()))
    return True


def finish(database: Database, pack: str, existing: Collection[str]) -> None:
    """Make the open intents final whose run, read back, exists."""
    with database.chain(pack) as chain:
        finals = []
        for intent in _intents(chain.connection, pack):
            if intent.run_id in existing:
                body = {**intent.body, "until": None}
                del body["conf"]
                chain.append("decision", body, run_id=intent.run_id, key=intent.key)
                finals.append(str(intent.key))
        _remove(chain, finals)


def put_off(database: Database, pack: str, until: Mapping[str, datetime]) -> None:
    """Look at undecided alerts next when `until` says, by their ids; nothing is decided by that."""
    with database.chain(pack) as chain:
        _change(chain, [{"row": alert, "due_at": _text(instant)} for alert, instant in until.items()])


def snooze(database: Database, pack: str, *, until: datetime | None, why: str, by: str) -> Event:
    """Hold all alerts of `pack` until then, or no longer; those that wait already are looked at again at once."""
    with database.chain(pack) as chain:
        event = chain.append("snooze", {"until": until and until.isoformat(), "why": why, "by": by})
        waiting = undecided.c.run_id.is_(None) & (undecided.c.due_at > _text(event.at))
        chain.connection.execute(
            sa.update(undecided).where(undecided.c.pack == pack, waiting).values(due_at=_text(event.at))
        )
    return event


def rebuild(database: Database, pack: str) -> int:
    """Make the index of undecided alerts of `pack` again from its events; return how many there are."""
    with database.chain(pack) as chain:
        rows: dict[str, dict[str, Any]] = {}
        query = sa.select(*COLUMNS).where(
            events.c.pack == pack, events.c.kind.in_(("alert", "heard", "intent", "decision"))
        )
        for row in chain.connection.execute(query.order_by(events.c.position)):
            event = event_of(row)
            key, body = str(event.key), event.body
            if event.kind == "alert" or (event.kind == "heard" and key not in rows):
                rows[key] = {**_row(event), "run_id": None, "held": None}
            elif event.kind == "heard":
                rows[key]["due_at"] = _text(event.at)
            elif event.kind == "intent":
                rows[key] |= {"run_id": event.run_id, "held": None, "due_at": _text(event.at)}
            elif body["outcome"] == "hold":
                rows[key] |= {"held": body["reason"], "due_at": _text(datetime.fromisoformat(body["until"]))}
            else:
                rows.pop(key, None)
        chain.connection.execute(sa.delete(undecided).where(undecided.c.pack == pack))
        if rows:
            chain.connection.execute(sa.insert(undecided), list(rows.values()))
    return len(rows)


def alerts_of(
    database: Database, pack: str | None = None, *, since: datetime | None = None, limit: int | None = None
) -> list[tuple[Alert, Event | None]]:
    """The newest alerts, newest first, each with the last that was decided of it: a decision, an open intent, or None."""
    found = database.events(pack, kind="alert", since=since, newest_first=True, limit=limit)
    with database.reading() as connection:
        last = {
            event.key: event for event in _of(connection, [str(event.key) for event in found], "intent", "decision")
        }
    return [(alert_of(event), last.get(event.key)) for event in found]


def settled(database: Database, alerts: Sequence[str]) -> dict[str, Event]:
    """The last final decision of each of `alerts` that has one, by the alert's id."""
    with database.reading() as connection:
        decisions = _of(connection, alerts, "decision")
        return {str(event.key): event for event in decisions if event.body["outcome"] != "hold"}


def heard_of(database: Database, alerts: Sequence[str]) -> dict[str, tuple[int, datetime]]:
    """By its id, how often each of `alerts` that was heard again was, and when last."""
    query = sa.select(events.c.key, sa.func.count(), sa.func.max(events.c.at)).where(events.c.kind == "heard")
    with database.reading() as connection:
        return {
            str(key): (number, datetime.fromisoformat(last))
            for some in _batches(alerts)
            for key, number, last in connection.execute(query.where(events.c.key.in_(some)).group_by(events.c.key))
        }


def decisions_of(
    database: Database, pack: str | None = None, *, since: datetime | None = None, limit: int | None = None
) -> list[Event]:
    """The newest decisions, holds among them, newest first."""
    return database.events(pack, kind="decision", since=since, newest_first=True, limit=limit)


def _body(alert: NewAlert) -> dict[str, Any]:
    body = {**vars(alert), "as_of": alert.as_of and alert.as_of.isoformat()}
    del body["ended_by"]
    return body


def _row(event: Event) -> dict[str, Any]:
    """The row of the index for an alert that is due since this event."""
    return {"alert": event.key, "pack": event.pack, "position": event.position, "due_at": _text(event.at)}


def _known(connection: sa.Connection, alerts: Sequence[str]) -> set[str]:
    """Those of `alerts` that were kept before."""
    query = sa.select(events.c.key).where(events.c.kind == "alert")
    return {
        key for some in _batches(alerts) for key in connection.execute(query.where(events.c.key.in_(some))).scalars()
    }


def _of(connection: sa.Connection, alerts: Sequence[str], *kinds: str) -> Iterator[Event]:
    """The events of these kinds about `alerts`, each alert's in the order in which they were appended."""
    query = sa.select(*COLUMNS).where(events.c.kind.in_(kinds)).order_by(events.c.id)
    for some in _batches(alerts):
        for row in connection.execute(query.where(events.c.key.in_(some))):
            yield event_of(row)


def _waiting(pack: str) -> sa.Select[Any]:
    """The events of the alerts of `pack` that wait for a decision, oldest first."""
    return (
        sa.select(*COLUMNS)
        .join(undecided, sa.and_(events.c.pack == undecided.c.pack, events.c.position == undecided.c.position))
        .where(undecided.c.pack == pack, undecided.c.run_id.is_(None))
        .order_by(undecided.c.position)
    )


def _intents(connection: sa.Connection, pack: str | None, due_at: datetime | None = None) -> list[Event]:
    query = sa.select(undecided.c.alert).where(undecided.c.run_id.is_not(None))
    if pack is not None:
        query = query.where(undecided.c.pack == pack)
    if due_at is not None:
        query = query.where(undecided.c.due_at <= _text(due_at))
    query = query.order_by(undecided.c.pack, undecided.c.position)
    alerts = list(connection.execute(query).scalars())
    intents = {event.key: event for event in _of(connection, alerts, "intent")}
    return [intents[alert] for alert in alerts]


def _has_moved(chain: Chain, after: int) -> bool:
    """Whether anything came after position `after` that a decision would have to see."""
    query = sa.select(events.c.position).where(
        events.c.pack == chain.pack, events.c.kind.in_(MATTERS), events.c.position > after
    )
    return chain.connection.execute(query.limit(1)).first() is not None


def _change(chain: Chain, rows: list[dict[str, Any]]) -> None:
    """Change rows of the index; each names its alert as `row`."""
    for columns in {frozenset(row) for row in rows}:
        chosen = [row for row in rows if row.keys() == columns]
        values: dict[str, Any] = {name: sa.bindparam(name) for name in columns - {"row"}}
        change = sa.update(undecided).where(undecided.c.alert == sa.bindparam("row")).values(values)
        chain.connection.execute(change, chosen)


def _batches(alerts: Sequence[str]) -> Iterator[Sequence[str]]:
    """So many at a time as one statement may name."""
    return (alerts[start : start + 1000] for start in range(0, len(alerts), 1000))


def _remove(chain: Chain, alerts: list[str]) -> None:
    for some in _batches(alerts):
        chain.connection.execute(sa.delete(undecided).where(undecided.c.alert.in_(some)))


def _text(instant: datetime) -> str:
    """All of one length, so that they order as text, whatever the database's rules of ordering are."""
    return instant.astimezone(UTC).isoformat(timespec="microseconds")
