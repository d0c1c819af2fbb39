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
from evergreen.run import Ref, Value, count
from evergreen.settings import Settings

log = logging.getLogger("evergreen")

KIND = "retention"
"""The kind of the events that say what a call removes, `intended` and `done`; each claim that goes has one of PRUNED."""
PRUNED = "pruned"
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
    database, store, registry = db.connect(settings.database_url), Store(settings), Registry(settings)
    age = str(pack.model_dump(mode="json")["retention"])
    with _nobody_acts(database, name) if not dry_run else ExitStack():
        opened = database.latest(name, kind=KIND)
        if not dry_run and opened is not None and opened.body["status"] == "intended":
            _remove(store, registry, name, _plan(database, store, registry, name, timedelta.max, now), opened.body)
            database.append(name, KIND, opened.body | {"status": "done"})
        plan = _plan(database, store, registry, name, pack.retention, now)
        objects = store.bytes_of({thing for thing in plan.things if "@" not in thing})
        there = {version.version for version in registry.versions(name)}
        found = Pruned(
            pack=name,
            age=age,
            dry_run=dry_run,
            goes=tuple(_told(fate) for fate in plan.fates if not fate.stays),
            stays=tuple(_told(fate) for fate in plan.fates if fate.stays),
            versions=tuple(sorted(_versions(plan, name) & there)),
            objects=len(objects),
            bytes=sum(objects.values()),
        )
        if dry_run or not found.goes:
            return found
        body = found.model_dump(mode="json", include={"age", "versions", "objects", "bytes"})
        body |= {"status": "intended", "now": now.isoformat(), "claims": len(found.goes)}
        with database.chain(name) as chain:
            for told in found.goes:
                chain.append(PRUNED, told | {"age": age}, run_id=told["run_id"])
            chain.append(KIND, body)
        _remove(store, registry, name, plan, body)
        database.append(name, KIND, body | {"status": "done"})
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


def _plan(database: Database, store: Store, registry: Registry, name: str, age: timedelta, now: datetime) -> Plan:
    """What of the pack `name` goes. Raises StoreError where it cannot be told what something that stays names."""
    claims: list[Claim] = []
    holders: set[str] = set()
    for pack in database.packs():
        events = database.events(pack, kind=(*NAMING, PRUNED, KIND))
        claims += _claims(pack, events)
        holders |= {found for event in events if event.kind in VALUES for found in _holders(event.body["value"])}
    holders |= {found for claim in claims for found in claim.names if found.endswith(".dir")}
    there = store.bytes_of(holders)
    contents = {holder: _names(store.read_json(Ref(hash=holder, size=0))) for holder in there}
    plan = decide(claims, contents, pack=name, age=age, needed=_needed(database, registry, name), now=now)
    lost = holders - there.keys()
    going = {fate.claim for fate in plan.goes}
    for claim in claims:
        if claim not in going and not claim.pruned and (unknown := sorted(lost & claim.names)):
            raise StoreError(
                f"{claim.pack}: the run {claim.run_id} stays, and {unknown[0]}, which says what else it needs, is not to be "
                "had: nothing was removed",
                fix="bring the object back into the store's remote, from a copy or from another machine's cache",
            )
    return plan


def _claims(pack: str, events: list[Event]) -> Iterator[Claim]:
    """What holds on to things in the events of a pack; nothing more of what was removed and said to be.

    What a run says after it was pruned, having been cleared and performed again, say, is a claim of its own.
    """
    by_key = {event.key: event for event in events if event.kind in VALUES}
    done = max((event.position for event in events if event.kind == KIND and event.body["status"] == "done"), default=0)
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


def _remove(store: Store, registry: Registry, name: str, plan: Plan, body: dict[str, Any]) -> None:
    """Remove what a plan says: versions first, which nobody may promote any more; then what names others."""
    why = f"{body['now'][:10]}, by retention: {body['age']} of {name}; no champion ever came of it"
    there = {version.version for version in registry.versions(name)}
    for version in sorted(_versions(plan, name) & there):
        registry.prune(name, version, why)
    objects = {thing for thing in plan.things if "@" not in thing}
    store.remove(objects & plan.holders)
    store.remove(objects)


def _versions(plan: Plan, name: str) -> set[int]:
    return {int(thing.rpartition("@")[2]) for thing in plan.things if thing.startswith(f"{name}@")}


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
