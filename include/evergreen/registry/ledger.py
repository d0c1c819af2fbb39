"""The events read as the history of a model's champions, and held to what was noted of them elsewhere.

What proves what: the chain of hashes shows an edit, a removal, an insertion or a reordering that left the rest of the
chain as it was. A chain that was made anew from there on, or whose end was cut off, is consistent in itself; it shows
beside the checkpoints, which lie in the repository of snapshots: position and hash of an event, noted when the
champion changed and whenever the ledger was verified.

Not covered: what came after the newest checkpoint; an event that somebody who may write to the database appends; and
somebody who can rewrite both the database and the repository's branch (let its server refuse forced pushes).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal

from evergreen.database import Database, Event
from evergreen.errors import RegistryError, nearest
from evergreen.history import values_of
from evergreen.registry import approval
from evergreen.registry.promotion import MOVES, ROLLBACK
from evergreen.run import Value, count


class Reign(Value):
    """A time in which one version was champion."""

    version: int | None
    """None: there was no champion."""
    since: datetime
    until: datetime | None
    """None: it is so still."""
    by: Literal["gate", "person", "rollback", "foreign"]
    """Who decided. `foreign`: somebody who moved the alias behind our back; `since` is when that was noticed."""
    who: str | None
    """The person, where one is known."""
    why: str
    """The verdict's headline, or what the person said."""
    run_id: str | None
    """The run whose verdict it was, or that moved the alias."""
    as_of: datetime | None
    """The run's."""
    alerts: tuple[str, ...]
    """The alerts that the run answered."""
    verdict: dict[str, Any] | None
    position: int
    """Of the event that began it."""


class Checkpoint(Value):
    """An event of a pack, as it was noted outside of the database."""

    position: int
    hash: str

    @classmethod
    def of(cls, event: Event) -> Checkpoint:
        return cls(position=event.position, hash=event.hash)

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """What `str` gave. Raises RegistryError."""
        position, _, sha256 = text.partition(" ")
        if not position.isdecimal() or len(sha256) != 64:
            raise RegistryError(
                f"{text[:100]!r} is no checkpoint of a ledger", fix="find out who wrote to the branch that holds them"
            )
        return cls(position=int(position), hash=sha256)

    def __str__(self) -> str:
        return f"{self.position} {self.hash}"


class Verified(Value):
    """What came of holding a pack's events to their chain and to the checkpoints."""

    pack: str
    holds: bool
    events: int
    checkpoints: int
    uncovered: int
    """Events after the newest checkpoint, which a cut or a chain made anew from there would not show."""
    good: int
    """The position of the newest checkpoint before which nothing is bad; 0 without one."""
    first_bad: int | None
    """The position of the first event that is not what it was, or not there: a chain made anew from somewhere after
    `good` shows here at the next checkpoint."""
    what: str
    """One sentence."""


def reigns(database: Database, pack: str) -> list[Reign]:
    """Who was champion when, oldest first. Raises RegistryError where nothing is known of `pack`."""
    moves = database.events(pack, kind=MOVES)
    if not moves and database.latest(pack) is None:
        raise RegistryError(f"nothing is known of a model {pack!r}", fix=nearest(pack, set(database.packs())))
    began = [event for event in moves if event.body["status"] in ("done", "foreign")]
    ends = [*(event.at for event in began[1:]), *([None] if began else [])]
    return [_reign(database, moves, event, until) for event, until in zip(began, ends, strict=True)]


def at(reigns: Iterable[Reign], instant: datetime) -> Reign | None:
    """The reign that `instant` falls into; None before the first."""
    return next(
        (reign for reign in reigns if reign.since <= instant and (not reign.until or instant < reign.until)), None
    )


def champion(database: Database, pack: str) -> int | None:
    """The champion, as the ledger knows it."""
    last = database.latest(pack, kind=MOVES)
    return last.body["champion"] if last else None


def before(reigns: Iterable[Reign], champion: int | None, out: Iterable[int]) -> int | None:
    """The version to go back to from `champion`: the newest that was champion before it came, and is not in `out`."""
    versions = [reign.version for reign in reigns]
    first = versions.index(champion) if champion in versions else len(versions)
    earlier = [version for version in versions[:first] if version is not None and version not in out]
    return earlier[-1] if earlier else None


def verify(database: Database, pack: str, checkpoints: Iterable[Checkpoint]) -> Verified:
    """Whether the events of `pack` are those that were written, as far as the chain and the checkpoints tell."""
    heads = {one.position: one.hash for one in checkpoints}
    events = database.packs().get(pack, 0)
    bad = database.first_bad(pack, heads)
    newest = max(heads, default=0)
    good = max((position for position in heads if bad is None or position < bad), default=0)
    known: dict[str, Any] = {"pack": pack, "events": events, "checkpoints": len(heads), "good": good, "first_bad": bad}
    if bad is None:
        what = f"{count(events, 'event')} and {count(len(heads), 'checkpoint')} agree"
        return Verified(**known, holds=True, uncovered=events - newest, what=what)
    if database.first_bad(pack) == bad:
        what = f"event {bad} is not what was written, is out of its place, or is not there"
    elif bad > events:
        lost = f"event {bad} was" if newest == bad else f"events {bad} to {newest} were"
        what = f"{lost} cut off, with whatever came after"
    else:
        what = f"the chain was made anew: event {good + 1}, or one after it up to {bad}, is not what was written"
    return Verified(**known, holds=False, uncovered=0, what=what)


def registered(database: Database, pack: str, version: int) -> tuple[str, dict[str, dict[str, Any]]]:
    """The hash of the model folder of `version`, and what each stage gave of the run that registered it.

    It stands in the chain, which the tags of the registry do not. Raises RegistryError where no run registered it.
    """
    # The newest that made it: MLflow counts from 1 again once somebody has deleted the model.
    for event in database.events(pack, kind="stage", newest_first=True):
        value = event.body["value"]
        if event.body["stage"] == "register" and value["version"] == version and value.get("new", True):
            return event.body["value"]["model_hash"], values_of(database, str(event.run_id), pack)
    raise RegistryError(
        f"{pack}: no run registered version {version}: nothing tells what its model folder should be",
        fix=f"choose one that `evergreen runs {pack}` lists",
    )


def _reign(database: Database, moves: list[Event], event: Event, until: datetime | None) -> Reign:
    """The reign that `event` began."""
    body = event.body
    reign: dict[str, Any] = {"who": None, "as_of": None, "alerts": (), "verdict": None}
    if body["status"] == "foreign":
        reign |= {"by": "foreign", "why": body["why"]}
    elif event.kind == ROLLBACK:
        reign |= {"by": "rollback", "who": body["asked"]["by"], "why": body["asked"]["why"]}
    else:
        intent = next(
            one for one in reversed(moves) if one.position < event.position and one.body["status"] == "intended"
        )
        verdict = intent.body["verdict"]
        begun = database.latest(event.pack, kind="run", run_id=event.run_id)
        answered = database.events(event.pack, kind=("intent", "decision"), run_id=event.run_id)
        answer = approval.newest(database, event.pack, event.run_id, body["version"]) if event.run_id else None
        approved = answer is not None and answer.body["status"] == "answered"
        reign |= {
            "by": "person" if approved else "gate",
            "who": answer.body["person"] if answer is not None and approved else None,
            "why": next(iter(verdict["reasons"]), ""),
            "as_of": begun.body["as_of"] if begun else None,
            "alerts": tuple(dict.fromkeys(str(one.key) for one in answered)),
            "verdict": verdict,
        }
    return Reign(
        version=body["champion"],
        since=event.at,
        until=until,
        run_id=event.run_id,
        position=event.position,
        **reign,
    )
