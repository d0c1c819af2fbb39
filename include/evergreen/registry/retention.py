"""What may be removed, and what stays because something needs it. Pure: what there is in, what goes out (law 3).

    goes = reach(names of the claims that go) - reach(names of the claims that stay)

A **claim** is what a run, or a look of the monitor, holds on to: it names objects of the store by their hash, and
versions of the registry. `reach` follows what those objects name in turn: a manifest its partitions, a folder its files.
Claims of all packs are looked at together, since packs share objects; one pack's are decided at a time, by its rule.

Not covered: what no event names (somebody else's objects may lie in the same remote), and the events themselves, which
nothing removes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

SEASON = timedelta(days=548)
"""How long a look's profile is the season before: a year, and half of the longest window that there may be."""

Kind = Literal["run", "look", "profile", "record"]


@dataclass(frozen=True)
class Claim:
    """What holds on to things."""

    pack: str
    run_id: str | None
    kind: Kind
    """`profile`: of a look's newest window, which outlives the rest of the look; `record`: events of no run."""
    ended_at: datetime
    """When its last event was appended."""
    names: frozenset[str]
    """Objects by their hash, versions as `pack@version`."""
    as_of: datetime | None = None
    """Of a profile."""
    version: int | None = None
    """The version that the run made, or found made."""
    has_snapshot: bool = False
    pruned: bool = False
    """It was decided before that it goes."""


@dataclass(frozen=True)
class Needed:
    """The versions of a pack that are needed, whatever their age."""

    champions: frozenset[int] = frozenset()
    """The champion, and every one there has been."""
    waiting: frozenset[int] = frozenset()
    """Those that a person is asked about, or that an intent is to promote or to restore."""
    aliases: Mapping[int, str] = field(default_factory=dict)
    """Any other that somebody has given a name."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a claim, and why, in words."""

    claim: Claim
    stays: bool
    reason: str


@dataclass(frozen=True)
class Plan:
    """What becomes of a pack's claims, and of the things that they alone name."""

    fates: tuple[Fate, ...]
    """Of the claims that were not decided before."""
    things: frozenset[str]
    """What no claim that stays reaches; of claims that were decided before, too."""
    holders: frozenset[str]
    """Of these, the objects that name others."""

    @property
    def goes(self) -> tuple[Fate, ...]:
        return tuple(fate for fate in self.fates if not fate.stays)


def reach(names: Iterable[str], contents: Mapping[str, Collection[str]]) -> set[str]:
    """`names`, and all that they name in turn, as far as `contents` tells: object → what is named in it."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += contents.get(name, ())
    return found


def decide(
    claims: Iterable[Claim],
    contents: Mapping[str, Collection[str]],
    *,
    pack: str,
    age: timedelta,
    needed: Needed,
    now: datetime,
) -> Plan:
    """What of `pack` goes after `age`, among the claims of all packs. `contents` must tell of all objects that name others."""
    claims = list(claims)
    own = [claim for claim in claims if claim.pack == pack and claim.kind != "record" and not claim.pruned]
    newest = _newest(own)
    looked = max((claim.as_of for claim in own if claim.as_of is not None), default=None)
    fates = []
    for claim in own:
        stays = _stays(claim, needed, newest, looked, age, now)
        old = f"its last event is {(now - claim.ended_at).days} days old, and nothing needs it"
        fates.append(Fate(claim=claim, stays=stays is not None, reason=stays or old))
    going = {fate.claim for fate in fates if not fate.stays}
    gone = [claim for claim in claims if claim in going or (claim.pruned and claim.pack == pack)]
    kept = [claim for claim in claims if claim not in going and not claim.pruned]
    named = reach((name for claim in gone for name in claim.names), contents)
    things = frozenset(named - reach((name for claim in kept for name in claim.names), contents))
    return Plan(fates=tuple(fates), things=things, holders=things & contents.keys())


def _newest(claims: Iterable[Claim]) -> dict[Claim, str]:
    """The claims that the next run or the next look reads on from."""
    found: dict[str, Claim] = {}
    for claim in sorted(claims, key=lambda claim: claim.ended_at):
        found[f"the newest {claim.kind}"] = claim
        if claim.has_snapshot:
            found["the newest snapshot"] = claim
    return {claim: what for what, claim in found.items()}


def _stays(
    claim: Claim, needed: Needed, newest: Mapping[Claim, str], looked: datetime | None, age: timedelta, now: datetime
) -> str | None:
    """Why a claim stays; None where nothing keeps it."""
    version = claim.version
    if version is not None and version in needed.champions:
        return f"version {version} is champion, or was"
    if version is not None and version in needed.waiting:
        return f"version {version} waits for what was decided, or is to be decided"
    if version is not None and version in needed.aliases:
        return f"version {version} is called {needed.aliases[version]}"
    if claim in newest:
        return f"{newest[claim]}: the next one reads on from there"
    if claim.as_of is not None and looked is not None and looked - claim.as_of < SEASON:
        return "the season before, of looks a year later"
    if now - claim.ended_at < age:
        return f"its last event is {(now - claim.ended_at).days} days old"
    return None
