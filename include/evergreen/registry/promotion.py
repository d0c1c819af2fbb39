"""The one door through which the champion changes.

The alias lives in MLflow, its history in the events table, and no transaction spans both. So a promotion is first
written down (`intended`), then done to the alias, then written down as `done`; all under the lease `promotion:<pack>`,
and only if the champion is still the one that the challenger was judged against. Whoever comes next finishes an
intent that a dead process left open, or voids it with a reason. An alias that somebody else moved is recorded too
(`foreign`). Each event's `champion` is the version the alias is at when the event is written.

A rollback is the same door backwards, asked for by a person: events of kind `rollback`, by the same intent and lease.
The version it leaves is not promoted again by the gate. A drill goes the same way with another alias.
"""

from __future__ import annotations

from typing import Any

from evergreen.database import Database, Event, this_process
from evergreen.errors import RegistryError
from evergreen.registry.models import Registry
from evergreen.run import Run, Verdict

KIND = "promotion"
ROLLBACK = "rollback"
DRILL = "drill"
MOVES = (KIND, ROLLBACK)
"""The kinds of events that tell where the champion alias is."""
ALIASES = {KIND: "champion", ROLLBACK: "champion", DRILL: "drill"}
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
    holder: str | None = None,
) -> int | None:
    """Write the verdict on `version` and, if it is to promote, move the champion alias; return the champion after it.

    `holder` takes the lease, the run itself where it is None. Nothing moves, and a `void` event says why, when the
    champion is no longer `judged_against`. Again after any kill, it ends as an undisturbed call would. Raises RegistryError, DatabaseError, LeaseHeldError.
    """
    pack = run.pack.name
    with database.lease(f"promotion:{pack}", holder or run.id, wait_s=WAIT_S):
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
        if (gone := registry.version(pack, version).pruned) is not None:
            registry.judge(pack, version, verdict)
            _void(database, pack, run.id, body | {"why": f"version {version} has no files any more: {gone}"})
            return champion
        intent = database.append(
            pack, KIND, {"status": "intended", **body, "verdict": verdict.model_dump(mode="json")}, run_id=run.id
        )
        _finish(database, registry, intent)
        return version


def roll_back(
    database: Database,
    registry: Registry,
    pack: str,
    *,
    version: int,
    leave: int | None,
    asked: dict[str, Any],
    run_id: str | None = None,
    drill: bool = False,
) -> Event:
    """Move the champion alias from `leave` back to `version`, which was champion before; return the event that says so.

    `asked` is who asked, what for, and why; it stays on the events. A drill moves the alias `drill` instead. Raises
    RegistryError when the champion is not `leave` any more; then a `void` event says so. Raises LeaseHeldError too.
    """
    kind = DRILL if drill else ROLLBACK
    with database.lease(f"promotion:{pack}", run_id or this_process(), wait_s=WAIT_S):
        champion = _settle(database, registry, pack)
        body: dict[str, Any] = {"version": version, "champion": champion, "asked": asked}
        if champion != leave:
            why = f"the champion is {_named(champion)} now; the rollback was from {_named(leave)}"
            _void(database, pack, run_id, body | {"why": why}, kind=kind)
            raise RegistryError(f"{pack}: {why}", fix="look at `evergreen history`, then ask again")
        model = registry.version(pack, leave).model_hash if leave is not None else None
        intent = database.append(pack, kind, {"status": "intended", **body, "model": model}, run_id=run_id)
        _finish(database, registry, intent)
        done = database.latest(pack, kind=kind)
        assert done is not None, "it was written just now"
        return done


def answered(database: Database, pack: str, asked: dict[str, Any], run_id: str | None) -> Event | None:
    """The rollback that was asked for just so, where it was done: by a retry, then.

    Of a run of Airflow it is the run's own, whatever the champion has become since: cleared, it goes back no further. One
    from a terminal is the last that moved the champion.
    """
    if run_id is not None:
        last = database.latest(pack, kind=ROLLBACK, run_id=run_id)
        return last if last is not None and last.body["status"] == "done" else None
    moves = database.events(pack, kind=MOVES, newest_first=True)
    last = next((event for event in moves if event.body["status"] in ("done", "foreign")), None)
    if last is None or last.kind != ROLLBACK or last.run_id is not None or last.body["asked"] != asked:
        return None
    return last


def left(database: Database, pack: str) -> dict[int, Event]:
    """The versions that a rollback left for an older one and that nobody chose again since, with its event."""
    found: dict[int, Event] = {}
    for event in database.events(pack, kind=MOVES):
        if event.body["status"] == "done":
            version, before = event.body["version"], event.body["previous"]
            found.pop(version, None)
            if event.kind == ROLLBACK and before is not None and version < before:
                found[before] = event
    return found


def rolled_back(database: Database, pack: str, version: int, model_hash: str | None) -> str | None:
    """Why `version`, or another with the same model folder, is not to be promoted by the gate; None where it may be."""
    for known, event in left(database, pack).items():
        if known == version or (model_hash is not None and event.body["model"] == model_hash):
            asked = event.body["asked"]
            return (
                f"version {known}{'' if known == version else ', the same model,'} was rolled back from at "
                f"{event.at:%Y-%m-%d %H:%M} UTC by {asked['by']}: {asked['why']}"
            )
    return None


def settle(database: Database, registry: Registry, pack: str, *, holder: str | None = None) -> int | None:
    """Finish or void what a dead process left open, record a foreign move, and return the champion's version.

    With a run's id as `holder`, the lease of a dead attempt of the same run is taken over at once instead of waited for.
    """
    with database.lease(f"promotion:{pack}", holder or this_process(), wait_s=WAIT_S):
        return _settle(database, registry, pack)


def moved_by(database: Database, run: Run, version: int) -> Event | None:
    """The event of this run's promotion of `version`: `done`, or `intended` where it was killed; None without one."""
    last = database.latest(run.pack.name, kind=KIND, run_id=run.id)
    moves = last is not None and last.body["status"] in ("intended", "done") and last.body["version"] == version
    return last if moves else None


def _settle(database: Database, registry: Registry, pack: str) -> int | None:
    last = database.latest(pack, kind=MOVES)
    found = registry.champion(pack)
    champion = found.version if found else None
    if last is not None and last.body["status"] == "intended":
        version, before = last.body["version"], last.body["champion"]
        known = {one.version for one in registry.versions(pack) if one.pruned is None}
        if champion in (version, before) and version in known:
            _finish(database, registry, last)
            return int(version)
        why = f"before the alias moved, {_named(version)} was deleted or the champion became {_named(champion)}"
        kept: dict[str, Any] = {
            name: last.body[name] for name in ("version", "judged_against", "asked") if name in last.body
        }
        _void(database, pack, last.run_id, kept | {"champion": before, "why": why}, kind=last.kind)
    expected = last.body["champion"] if last else None
    if champion != expected:
        why = f"the champion alias was left at {_named(expected)} and somebody else put it at {_named(champion)}"
        database.append(pack, KIND, {"status": "foreign", "expected": expected, "champion": champion, "why": why})
    return champion


def _finish(database: Database, registry: Registry, intent: Event) -> None:
    """Move the alias and close the intent, unless somebody settled it while this process slept."""
    pack, version, before = intent.pack, intent.body["version"], intent.body["champion"]
    if database.latest(pack, kind=intent.kind if intent.kind == DRILL else MOVES) != intent:
        return
    registry.set_alias(pack, ALIASES[intent.kind], version)
    body = {"status": "done", "version": version, "champion": version, "previous": before}
    if intent.kind == DRILL:
        body |= {"champion": before, "asked": intent.body["asked"]}
    elif intent.kind == ROLLBACK:
        asked = intent.body["asked"]
        body |= {"asked": asked, "model": intent.body["model"]}
        if before in {one.version for one in registry.versions(pack)}:
            said = f"to version {version} at {intent.at:%Y-%m-%d %H:%M} UTC by {asked['by']}: {asked['why']}"
            registry.tag(pack, before, {"evergreen.rolled_back": said})
    else:
        registry.drop_alias(pack, "challenger", version)
        registry.judge(pack, version, Verdict(**intent.body["verdict"]))
    database.append(pack, intent.kind, body, run_id=intent.run_id)


def _void(database: Database, pack: str, run_id: str | None, body: dict[str, Any], *, kind: str = KIND) -> None:
    """Record, once, that a promotion or a rollback did not happen, and why."""
    event = {"status": "void", **body}
    last = database.latest(pack, kind=kind, run_id=run_id)
    if last is None or last.body != event:
        database.append(pack, kind, event, run_id=run_id)


def _named(version: int | None) -> str:
    return f"version {version}" if version is not None else "no version"
