"""Retention carried out: what `registry/retention.py` says goes is written down, then removed, then said to be done.

Nothing of any pack acts meanwhile, for packs share objects: a stage pushes what no event names yet. So the lease of
every pack is held, from before the events are read until the last object is gone. Killed anywhere and asked for again,
it ends as an undisturbed call would: what was written down to go and is still there goes first.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from evergreen import database as db
from evergreen.data.store import Store
from evergreen.database import Database, Event, this_process
from evergreen.errors import PackError, StoreError
from evergreen.pack import load, parse_instant
from evergreen.registry import approval, promotion
from evergreen.registry.models import Registry
from evergreen.registry.retention import Claim, Fate, Kind, Needed, Plan, decide
from evergreen.run import Value, count
from evergreen.settings import Settings

log = logging.getLogger("evergreen")

KIND = "retention"
"""The kind of the events that say what a call removes, `intended` and `done`; each claim that goes has one of PRUNED."""
PRUNED = "pruned"
THINGS = "things"
"""What an intended removal is about, by name: an object that named others is gone before they are."""
WAIT_S = 60.0
"""How long it waits for a pack that is acting: twice a dead one's lease."""
VALUES = ("stage", "drift")
NAMING = (*VALUES, "run", "watch", "receipt", "failure", "verdict", approval.KIND, *promotion.ALIASES)
"""The kinds of events that may name objects and versions. What strangers post, alerts, names none."""
OBJECT = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])(?:\.dir)?")
"""Whatever looks like an object's hash is taken for one: too much is kept rather than too little."""
HOLDERS = ("manifest", "records")
"""The fields of values whose objects name others; so does every folder."""


class Pruned(Value):
    """What went, or would go."""

    pack: str
    age: str
    """The pack's rule."""
    dry_run: bool
    goes: tuple[dict[str, Any], ...]
    """run_id, what (run, look or profile), ended_at, version, reason."""
    stays: tuple[dict[str, Any], ...]
    """The same."""
    versions: tuple[int, ...]
    """Those whose files in MLflow go."""
    objects: int
    bytes: int


def prune(settings: Settings, name: str, *, dry_run: bool = False, now: datetime | None = None) -> Pruned:
    """Remove what the rule of the pack `name` lets go of, or only say what that is.

    Raises PackError for a pack without a rule; LeaseHeldError while a pack acts; StoreError, RegistryError, DatabaseError.
    """
    pack, now = load(settings.packs, name), now or datetime.now(UTC)
    if pack.retention is None:
        raise PackError(
            f"{pack.folder / 'pack.yaml'}: pack {name} says nothing of retention: everything is kept for ever",
            fix="write retention: 90d, as long as you want to look back at what became no champion",
        )
    work = _Work(settings, name, str(pack.model_dump(mode="json")["retention"]), now)
    _, planned = work.plan(pack.retention)
    if dry_run or not (planned.goes or work.opened()):
        return planned.model_copy(update={"dry_run": dry_run})
    with _nobody_acts(work.database, name):
        if (opened := work.opened()) is not None:
            plan, _ = work.plan(timedelta.max)
            work.carry_out(plan, opened.body)
        plan, found = work.plan(pack.retention)
        if found.goes:
            body = found.model_dump(mode="json", include={"age", "versions", "objects", "bytes"})
            body |= {"status": "intended", "now": now.isoformat(), "claims": len(found.goes)}
            with work.database.chain(name) as chain:
                for told in found.goes:
                    chain.append(PRUNED, told | {"age": found.age}, run_id=told["run_id"])
                chain.append(KIND, body | {THINGS: sorted(plan.things)})
            work.carry_out(plan, body)
    log.info("%s: %s and %s removed", name, count(found.objects, "object"), count(len(found.versions), "version"))
    return found


@contextmanager
def _nobody_acts(database: Database, name: str) -> Iterator[None]:
    """No stage of any pack acts, and the champion of `name` does not change."""
    with ExitStack() as held:
        for pack in sorted(database.packs().keys() - {db.HOME}):
            held.enter_context(database.lease(f"stage:{pack}", this_process(), wait_s=WAIT_S))
        held.enter_context(database.lease(f"promotion:{name}", this_process(), wait_s=WAIT_S))
        yield


class _Work:
    """One pack's claims and things, as they are just now, and what is done about them."""

    def __init__(self, settings: Settings, name: str, age: str, now: datetime) -> None:
        self.name, self.age, self.now = name, age, now
        self.database, self.store = db.connect(settings.database_url), Store(settings)
        self.registry = Registry(settings)

    def opened(self) -> Event | None:
        """What a call that was killed intended."""
        last = self.database.latest(self.name, kind=KIND)
        return last if last is not None and last.body["status"] == "intended" else None

    def plan(self, age: timedelta) -> tuple[Plan, Pruned]:
        """What goes, and how it is told. Raises StoreError where it cannot be told what something that stays names."""
        claims: list[Claim] = []
        holders: set[str] = set()
        for pack in self.database.packs():
            events = self.database.events(pack, kind=(*NAMING, PRUNED, KIND))
            claims += _claims(pack, events)
            holders |= {found for event in events if event.kind in VALUES for found in _holders(event.body["value"])}
        holders |= {found for claim in claims for found in claim.names if found.endswith(".dir")}
        there = self.store.bytes_of(holders)
        contents = {holder: _names(content) for holder, content in self.store.contents(there.keys()).items()}
        needed = _needed(self.database, self.registry, self.name)
        plan = decide(claims, contents, pack=self.name, age=age, needed=needed, now=self.now)
        going = {fate.claim for fate in plan.goes}
        _require_known(holders - there.keys(), [each for each in claims if each not in going and not each.pruned])
        objects = self.store.bytes_of({thing for thing in plan.things if "@" not in thing})
        return plan, Pruned(
            pack=self.name,
            age=self.age,
            dry_run=False,
            goes=tuple(_told(fate) for fate in plan.goes),
            stays=tuple(_told(fate) for fate in plan.fates if fate.stays),
            versions=tuple(self.versions(plan)),
            objects=len(objects),
            bytes=sum(objects.values()),
        )

    def versions(self, plan: Plan) -> list[int]:
        """The versions that go, of those that MLflow knows."""
        there = {f"{self.name}@{version.version}": version.version for version in self.registry.versions(self.name)}
        return sorted(there[thing] for thing in plan.things & there.keys())

    def carry_out(self, plan: Plan, body: dict[str, Any]) -> None:
        """Versions first, which nobody may promote any more; then objects that name others; then the rest."""
        why = f"{body['now'][:10]}, by retention: {body['age']} of {self.name}; no champion ever came of it"
        for version in self.versions(plan):
            self.registry.prune(self.name, version, why)
        self.store.remove(plan.holders)
        self.store.remove({thing for thing in plan.things if "@" not in thing})
        done = {name: value for name, value in body.items() if name != THINGS}
        self.database.append(self.name, KIND, done | {"status": "done"})


def _require_known(lost: set[str], stay: Iterable[Claim]) -> None:
    """Raise StoreError where a claim that stays names an object that would name others, and is not to be had."""
    for claim in stay:
        if unknown := sorted(lost & claim.names):
            raise StoreError(
                f"{claim.pack}: the run {claim.run_id} stays, and {unknown[0]}, which says what else it needs, is not to be "
                "had: nothing was removed",
                fix="bring the object back into the store's remote, from a copy or from another machine's cache",
            )


def _claims(pack: str, events: list[Event]) -> Iterator[Claim]:
    """What holds on to things in the events of a pack; nothing more of what was removed and said to be.

    What a run says after it was pruned, having been cleared and performed again, say, is a claim of its own.
    """
    by_key = {event.key: event for event in events if event.kind in VALUES}
    removals = [event for event in events if event.kind == KIND]
    last = removals[-1] if removals else None
    done = max((event.position for event in removals if event.body["status"] == "done"), default=0)
    kinds: dict[str | None, Kind] = {event.run_id: "run" for event in events if event.kind == "run"}
    kinds |= {event.run_id: "look" for event in events if event.kind == "watch"}
    decided: dict[tuple[str | None, Kind], int] = {}
    times: Counter[str | None] = Counter()
    said: dict[tuple[str | None, int], list[Event]] = {}
    for event in events:
        if event.kind == PRUNED:
            decided[event.run_id, event.body["what"]] = event.position
            times[event.run_id] += event.body["what"] != "profile"
        elif event.kind != KIND:
            said.setdefault((event.run_id, times[event.run_id]), []).append(event)
    for (run_id, _), own in said.items():
        for claim in _claims_of(pack, run_id, kinds.get(run_id, "record"), own, by_key):
            position = decided.get((run_id, claim.kind), 0)
            if position < own[-1].position:
                yield claim
            elif position > done:
                yield replace(claim, pruned=True)
    if last is not None and last.body["status"] == "intended":
        things = frozenset(last.body.get(THINGS, ()))  # older ones name none
        yield Claim(pack=pack, run_id=None, kind="record", ended_at=last.at, names=things, pruned=True)


def _claims_of(
    pack: str, run_id: str | None, kind: Kind, events: list[Event], by_key: Mapping[str | None, Event]
) -> Iterator[Claim]:
    """What a run, or a look and its profile, hold on to. What a receipt stands for is theirs."""
    said = [by_key[event.key] if event.kind == "receipt" else event for event in events]
    values = {event.body["stage"]: event.body["value"] for event in said if event.kind in VALUES}
    version = values["register"]["version"] if "register" in values else None
    looked = values.get("monitor", {"profile": None})
    profile = {looked["profile"]["hash"]} if looked["profile"] else set()
    names = set().union(*(_names(event.body) for event in said)) - profile
    claim = Claim(
        pack=pack,
        run_id=run_id,
        kind=kind,
        ended_at=events[-1].at,
        names=frozenset(names | ({f"{pack}@{version}"} if version is not None else set())),
        version=version,
        has_snapshot="snapshot" in values,
    )
    yield claim
    if profile:
        as_of = parse_instant(looked["as_of"])
        yield replace(claim, kind="profile", names=frozenset(profile), as_of=as_of, version=None, has_snapshot=False)


def _needed(database: Database, registry: Registry, pack: str) -> Needed:
    """The versions of a pack that somebody needs."""
    moves = database.events(pack, kind=promotion.MOVES)
    told = [event.body.get(part) for event in moves for part in ("champion", "previous", "expected")]
    champions = {int(version) for version in told if version is not None}
    versions = registry.versions(pack)
    champions |= {each.version for each in versions if promotion.ALIASES[promotion.KIND] in each.aliases}
    asked = database.events(pack, kind=approval.KIND)
    waiting = {event.body["version"] for event in approval.pending(asked)}
    promised = (event for event in asked if event.body.get("choice") == "promote")
    waiting |= {event.body["version"] for event in promised if approval.is_owed(database, event)}
    for kind in promotion.ALIASES:
        last = database.latest(pack, kind=kind)
        if last is not None and last.body["status"] == "intended":
            waiting.add(last.body["version"])
    return Needed(
        champions=frozenset(champions),
        waiting=frozenset(waiting),
        aliases={each.version: ", ".join(each.aliases) for each in versions if each.aliases},
    )


def _holders(value: dict[str, Any]) -> Iterable[str]:
    """The objects of a value that name others, folders apart."""
    return [value[field]["hash"] for field in HOLDERS if value.get(field)]


def _names(content: Any) -> set[str]:
    return set(OBJECT.findall(json.dumps(content)))


def _told(fate: Fate) -> dict[str, Any]:
    claim = fate.claim
    return {
        "run_id": claim.run_id,
        "what": claim.kind,
        "ended_at": claim.ended_at.isoformat(),
        "version": claim.version,
        "reason": fate.reason,
    }
