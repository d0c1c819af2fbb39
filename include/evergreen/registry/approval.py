"""A person's word on a challenger: asked for once, answered once, then done through the one door (`promotion.py`).

Everything about it is an event of kind `approval` of the training run that asks. The first is `asked`; one more ends it:
`answered`, by a person or by the time-out, or `superseded`, by a newer challenger, by one of fresher data that waits
already, or by a champion that is no longer the one it was judged against. Whoever appends that second event decides;
everybody else is told what it says. A run that is cleared may come to another version, and then asks about that one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from evergreen.database import Chain, Database, Event
from evergreen.errors import RegistryError
from evergreen.keys import note
from evergreen.registry import promotion
from evergreen.registry.models import Registry
from evergreen.run import Run, Value, Verdict

KIND = "approval"
CHALLENGER = "challenger"
"""The alias of the version that waits."""


class Answer(Value):
    """What somebody said, or nobody in time."""

    choice: Literal["promote", "reject"]
    person: str | None
    """None: nobody answered in time."""
    comment: str = ""
    through: str
    """Where it was said: `Airflow` or `terminal`."""

    def sentence(self) -> str:
        done = {"promote": "promoted", "reject": "rejected"}[self.choice]
        said = f"{done} by {self.person}" if self.person else f"{done}: nobody answered in time"
        return f"{said}: {self.comment}" if self.comment else said


def ask(
    database: Database,
    registry: Registry,
    *,
    run: Run,
    version: int,
    judged_against: int | None,
    verdict: Verdict,
) -> int | None:
    """Have `version` wait for a person's answer, in place of whatever waited before; → the champion, which stays.

    The alias `challenger` goes to what waits. A challenger that was made as of later than this one goes on waiting, and
    this one does not: time only moves forward. Again after any kill, it ends as an undisturbed call would.
    """
    pack = run.pack.name
    champion = registry.champion(pack)
    last = database.latest(pack, kind=KIND, run_id=run.id)
    if last is None or last.body["version"] != version:
        registry.judge(pack, version, verdict)
        with database.chain(pack) as chain:
            waiting = pending(database.events(pack, kind=KIND))
            fresher = [event for event in waiting if _as_of(database, event) > run.as_of]
            for event in waiting if not fresher else ():
                again = event.body["version"] == version
                newer = "the same version was judged again" if again else f"version {version} is newer"
                _supersede(chain, event, run, f"{newer}, and waits for approval")
            body = {"status": "asked", "version": version, "judged_against": judged_against}
            asked = chain.append(KIND, {**body, "verdict": verdict.model_dump(mode="json")}, run_id=run.id)
            for event in fresher[:1]:
                why = f"version {event.body['version']} was made as of later, and waits for approval"
                _supersede(chain, asked, run, why)
    for event in pending(database.events(pack, kind=KIND)):
        registry.set_alias(pack, CHALLENGER, event.body["version"])
    return champion.version if champion else None


def _as_of(database: Database, event: Event) -> datetime:
    """Of the run that asks."""
    begun = database.latest(event.pack, kind="run", run_id=event.run_id)
    return datetime.fromisoformat(begun.body["as_of"]) if begun else datetime.min.replace(tzinfo=UTC)


def retire(database: Database, registry: Registry, run: Run, champion: int) -> None:
    """End what waits although `champion`, which is not what it was judged against, was promoted meanwhile, by `run`."""
    pack = run.pack.name
    for event in _outdated(database, pack, champion):
        registry.drop_alias(pack, CHALLENGER, event.body["version"])
    with database.chain(pack) as chain:
        for event in _outdated(database, pack, champion):
            _supersede(chain, event, run, f"version {champion} was promoted meanwhile")


def rejudged(database: Database, run: Run, version: int, verdict: Verdict) -> None:
    """End what asks about `version`, where `run` came to it again and to a verdict that is for nobody to give."""
    with database.chain(run.pack.name) as chain:
        for event in pending(database.events(run.pack.name, kind=KIND)):
            if event.body["version"] == version:
                _supersede(chain, event, run, f"the same version was judged again: {verdict.decision}")


def _outdated(database: Database, pack: str, champion: int | None) -> list[Event]:
    """What waits although the champion is neither what it was judged against nor itself."""
    waiting = pending(database.events(pack, kind=KIND))
    return [event for event in waiting if champion not in (event.body["judged_against"], event.body["version"])]


def _supersede(chain: Chain, asked: Event, by: Run, why: str) -> None:
    chain.append(KIND, _ended(asked, "superseded", why=why), run_id=asked.run_id)
    note(by, "promote", "progress", f"version {asked.body['version']} waits for approval no longer: {why}")


def pending(events: list[Event]) -> list[Event]:
    """Of events of kind `approval`, those that ask and have no answer."""
    last = {(event.run_id, event.body["version"]): event for event in events}
    return [event for event in last.values() if event.body["status"] == "asked"]


def is_owed(database: Database, event: Event) -> bool:
    """Whether an event of kind `approval` answers, and what it says was not carried out yet."""
    if event.body["status"] != "answered":
        return False
    moved = database.latest(event.pack, kind=promotion.KIND, run_id=event.run_id)
    return moved is None or moved.position < event.position or moved.body["status"] not in ("done", "void")


def newest(database: Database, pack: str, run_id: str | None, version: int | None = None) -> Event | None:
    """The last event of the approval that a training run asked for, about `version` or whichever was last, or None."""
    found = database.events(pack, kind=KIND, run_id=run_id, newest_first=True)
    return next((event for event in found if version in (None, event.body["version"])), None)


def state(database: Database, pack: str, run_id: str, version: int | None = None) -> Event:
    """What `newest` finds. Raises RegistryError where the run asked for no approval."""
    found = newest(database, pack, run_id, version)
    if found is None:
        raise RegistryError(
            f"{pack}: the run {run_id!r} has not asked for approval" + (f" of version {version}" if version else ""),
            fix=f"evergreen runs {pack} shows which version waits",
        )
    return found


def overtaken(database: Database, pack: str, run_id: str, version: int | None = None) -> str | None:
    """Why nobody needs to answer any more; None while the answer is waited for."""
    last = state(database, pack, run_id, version)
    if last.body["status"] != "asked":
        return said(last)
    moved = database.latest(pack, kind=promotion.MOVES)
    champion = moved.body["champion"] if moved else None
    if moved is None or champion in (last.body["judged_against"], last.body["version"]):
        return None
    return f"the champion is {_named(champion)} now; the verdict was against {_named(last.body['judged_against'])}"


def answer(
    database: Database,
    registry: Registry,
    *,
    run: Run,
    version: int | None = None,
    answer: Answer | None,
    holder: str,
) -> Event:
    """Write down `answer` to what `run` asked, if it still waits, and do what was decided; → the event that ended it.

    `version` is what was asked about, the last that `run` asked about where it is None.

    None answers nothing, and only does what was decided before or ends what was overtaken. An answer that comes after
    another changes nothing. `holder` takes the lease of the promotion: a retry of a dead one has its name.
    """
    pack = run.pack.name
    promotion.settle(database, registry, pack, holder=holder)
    with database.chain(pack) as chain:
        last = state(database, pack, run.id, version)
        if last.body["status"] == "asked":
            why = overtaken(database, pack, run.id, last.body["version"])
            if answer is not None:
                body = _ended(last, "answered", **answer.model_dump(mode="json"))
            elif why is not None:
                body = _ended(last, "superseded", why=why)
            else:
                return last
            last = chain.append(KIND, body, run_id=run.id)
    _carry_out(database, registry, run, last, holder)
    return last


def _carry_out(database: Database, registry: Registry, run: Run, ended: Event, holder: str) -> None:
    """Promote or reject the version, once, as the event says; either way it asks no longer."""
    pack, version = run.pack.name, ended.body["version"]
    if is_owed(database, ended):
        asked = database.events(pack, kind=KIND, run_id=run.id, before=ended.position, newest_first=True)
        gate = next(Verdict.model_validate(one.body["verdict"]) for one in asked if _asks(one, version))
        promotion.promote(
            database,
            registry,
            run=run,
            version=version,
            judged_against=ended.body["judged_against"],
            verdict=Verdict(decision=ended.body["choice"], reasons=(said(ended), *gate.reasons)),
            holder=holder,
        )
    if version not in {event.body["version"] for event in pending(database.events(pack, kind=KIND))}:
        registry.drop_alias(pack, CHALLENGER, version)


def _asks(event: Event, version: int) -> bool:
    return bool(event.body["status"] == "asked" and event.body["version"] == version)


def said(ended: Event) -> str:
    """One sentence on how an approval ended, or that it has not."""
    body = ended.body
    if body["status"] == "answered":
        return Answer.model_validate({name: body[name] for name in Answer.model_fields}).sentence()
    return f"superseded: {body['why']}" if body["status"] == "superseded" else "waits for approval"


def _ended(asked: Event, status: str, **more: object) -> dict[str, object]:
    kept = {name: asked.body[name] for name in ("version", "judged_against")}
    return {"status": status, **kept, **more}


def _named(version: int | None) -> str:
    return f"version {version}" if version is not None else "no version"
