"""The one door through which the champion changes.

The alias lives in MLflow, its history in the events table, and no transaction spans both. So a promotion is first
written down (`intended`), then done to the alias, then written down as `done`; all under the lease `promotion:<pack>`,
and only if the champion is still the one that the challenger was judged against. Whoever comes next finishes an
intent that a dead process left open, or voids it with a reason. An alias that somebody else moved is recorded too
(`foreign`). Each event's `champion` is the version the alias is at when the event is written.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from evergreen.database import Database, Event
from evergreen.registry.models import Registry
from evergreen.run import Run, Verdict

KIND = "promotion"
WAIT_S = 60.0
"""How long a second promotion of the same pack waits for the first: twice a dead one's lease."""


def promote(
    database: Database,
    registry: Registry,
    *,
    run: Run,
    version: int,
    judged_against: int | None,
    verdict: Verdict,
) -> int | None:
    """Write the verdict on `version` and, if it is to promote, move the champion alias; return the champion after it.

    Nothing moves, and a `void` event says why, when the champion is no longer `judged_against`. Again after any kill,
    it ends as an undisturbed call would. Raises RegistryError, DatabaseError, LeaseHeldError.
    """
    pack = run.pack.name
    with database.lease(f"promotion:{pack}", run.id, wait_s=WAIT_S):
        champion = _settle(database, registry, pack)
        if verdict.decision != "promote" or champion == version:
            registry.judge(pack, version, verdict)
            if verdict.decision != "review":
                registry.drop_alias(pack, "challenger", version)
            return champion
        body = {"version": version, "judged_against": judged_against, "champion": champion}
        if champion != judged_against:
            registry.judge(pack, version, verdict)
            why = f"the champion is {_named(champion)} now; the verdict was against {_named(judged_against)}"
            _void(database, pack, run.id, body | {"why": why})
            return champion
        intent = database.append(
            pack, KIND, {"status": "intended", **body, "verdict": verdict.model_dump(mode="json")}, run_id=run.id
        )
        _finish(database, registry, intent)
        return version


def settle(database: Database, registry: Registry, pack: str, *, holder: str | None = None) -> int | None:
    """Finish or void what a dead process left open, record a foreign move, and return the champion's version.

    With a run's id as `holder`, the lease of a dead attempt of the same run is taken over at once instead of waited for.
    """
    holder = holder or f"{socket.gethostname()}:{os.getpid()}"
    with database.lease(f"promotion:{pack}", holder, wait_s=WAIT_S):
        return _settle(database, registry, pack)


def moved_by(database: Database, run: Run, version: int) -> Event | None:
    """The event of this run's promotion of `version`: `done`, or `intended` where it was killed; None without one."""
    last = database.latest(run.pack.name, kind=KIND, run_id=run.id)
    moves = last is not None and last.body["status"] in ("intended", "done") and last.body["version"] == version
    return last if moves else None


def _settle(database: Database, registry: Registry, pack: str) -> int | None:
    last = database.latest(pack, kind=KIND)
    found = registry.champion(pack)
    champion = found.version if found else None
    if last is not None and last.body["status"] == "intended":
        version, judged_against = last.body["version"], last.body["judged_against"]
        known = {one.version for one in registry.versions(pack)}
        if champion in (version, judged_against) and version in known:
            _finish(database, registry, last)
            return int(version)
        why = f"before it was promoted, {_named(version)} was deleted or the champion became {_named(champion)}"
        body = {"version": version, "judged_against": judged_against, "champion": last.body["champion"], "why": why}
        _void(database, pack, last.run_id, body)
    expected = last.body["champion"] if last else None
    if champion != expected:
        why = f"the champion alias was left at {_named(expected)} and somebody else put it at {_named(champion)}"
        database.append(pack, KIND, {"status": "foreign", "expected": expected, "champion": champion, "why": why})
    return champion


def _finish(database: Database, registry: Registry, intent: Event) -> None:
    """Move the alias and close the intent, unless somebody settled it while this process slept."""
    pack, version = intent.pack, intent.body["version"]
    if database.latest(pack, kind=KIND) != intent:
        return
    registry.set_alias(pack, "champion", version)
    registry.drop_alias(pack, "challenger", version)
    registry.judge(pack, version, Verdict(**intent.body["verdict"]))
    body = {"status": "done", "version": version, "champion": version, "previous": intent.body["champion"]}
    database.append(pack, KIND, body, run_id=intent.run_id)


def _void(database: Database, pack: str, run_id: str | None, body: dict[str, Any]) -> None:
    """Record, once, that a promotion did not happen, and why."""
    event = {"status": "void", **body}
    last = database.latest(pack, kind=KIND, run_id=run_id)
    if last is None or last.body != event:
        database.append(pack, KIND, event, run_id=run_id)


def _named(version: int | None) -> str:
    return f"version {version}" if version is not None else "no version"
