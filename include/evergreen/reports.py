"""The report on a version, gathered: from its verdict, its run, its lineage, the champion's, and the monitor's looks."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from evergreen import database as db
from evergreen.data.store import Store
from evergreen.database import Database, Event
from evergreen.errors import EvergreenError, RegistryError
from evergreen.evaluation.report import Data, Look, Report
from evergreen.history import last_look, value_of
from evergreen.registry import approval
from evergreen.registry.models import Registry
from evergreen.run import Class, Evaluated, Ref, Verdict, count
from evergreen.settings import Settings
from evergreen.work import manifest_of


def of_version(settings: Settings, name: str, version: int, description: str) -> Report:
    """The report on a version, by the newest verdict on it. Raises RegistryError where the gate has not spoken."""
    database, registry = db.connect(settings.database_url), Registry(settings)
    judged = verdicts_on(database, name, version)[-1]
    lineage = registry.lineage(name, version)
    try:
        evaluated = Evaluated.model_validate(judged.body["saw"]["evaluated"])
    except ValidationError as error:
        raise RegistryError(
            f"{name} version {version} was judged by an older Evergreen, in a shape that is not known any more",
            fix=f"evergreen lineage {name}@{version} shows what stands on the version",
        ) from error
    champion = judged.body["saw"]["champion"]
    before = None
    if champion not in (None, version):
        with contextlib.suppress(RegistryError):  # a champion that Evergreen did not make has none
            before = registry.lineage(name, champion)
    asked = approval.newest(database, name, judged.run_id, version)
    return Report(
        model=name,
        version=version,
        description=description,
        run_id=str(judged.run_id),
        as_of=datetime.fromisoformat(judged.body["saw"]["challenger_as_of"]),
        reason=lineage["reason"],
        verdict=Verdict.model_validate(judged.body["verdict"]),
        answer=approval.said(asked) if asked is not None else None,
        evaluated=evaluated,
        data=_data(settings, database, name, lineage, before),
        look=_look(database, name),
        made_by=_gist(lineage),
        plots=tuple(sorted(_plots(settings, evaluated))),
    )


def plots(settings: Settings, report: Report) -> dict[str, bytes]:
    """The figures of a report by name; none where the store has lost them."""
    store = Store(settings)
    with contextlib.suppress(EvergreenError):
        return {name: store.read_bytes(ref) for name, ref in _plots(settings, report.evaluated).items()}
    return {}


def _plots(settings: Settings, evaluated: Evaluated) -> dict[str, Ref]:
    with contextlib.suppress(EvergreenError):
        return dict(sorted(Store(settings).listing(evaluated.plots).items())) if evaluated.plots else {}
    return {}


def verdicts_on(database: Database, name: str, version: int) -> list[Event]:
    """The verdicts on the version, oldest first; at least one. Raises RegistryError where the gate has not spoken."""
    found = [event for event in database.events(name, kind="verdict") if event.body["saw"]["version"] == version]
    if not found:
        raise RegistryError(
            f"{name} version {version}: the gate has said nothing about it",
            fix=f"evergreen runs {name} lists the versions of runs that came to their end",
        )
    return found


def _data(
    settings: Settings, database: Database, name: str, lineage: dict[str, Any], before: dict[str, Any] | None
) -> Data:
    mine = lineage["snapshot"]
    found = Data(tag=mine["tag"], rows=mine["rows"], partitions=mine["partitions"])
    if before is None:
        return found
    found = found.model_copy(update={"rows_more": mine["rows"] - before["snapshot"]["rows"]})
    now, then = (_partitions(settings, database, name, made["run_id"]) for made in (lineage, before))
    if now is None or then is None:
        return found
    both = now.keys() & then.keys()
    changed = sum(now[period] != then[period] for period in both)
    counts = {"new": len(now) - len(both), "changed": changed, "gone": len(then) - len(both)}
    return found.model_copy(update=counts)


def _partitions(settings: Settings, database: Database, name: str, run_id: str) -> dict[datetime, str] | None:
    """Period → identity of the snapshot that a run made; None where its manifest is not to be had any more."""
    value = value_of(database, name, run_id, "snapshot")
    if value is None:
        return None
    with contextlib.suppress(EvergreenError):
        manifest = manifest_of(Store(settings), Ref.model_validate(value["manifest"]))
        return {part.period: part.identity for part in manifest.partitions}
    return None


def _look(database: Database, name: str) -> Look | None:
    newest = last_look(database, name)
    if newest is None or newest["as_of"] is None:
        return None
    as_of = datetime.fromisoformat(newest["as_of"])
    return Look(as_of=as_of, kind=newest["kind"] or "nothing could be compared", reasons=tuple(newest["reasons"]))


def _gist(lineage: dict[str, Any]) -> dict[str, str]:
    """What made the version, in a few lines; `evergreen lineage` has all of it."""
    code, training, hardware, checked = (lineage[name] for name in ("code", "training", "hardware", "validation"))
    dirty = " and changes that no commit holds" if code["dirty"] else ""
    params = ", ".join(f"{name} {value}" for name, value in training["params"].items())
    return {
        "run": lineage["run_id"],
        "snapshot": f"{lineage['snapshot']['tag']}, commit {lineage['snapshot']['revision'][:12]}",
        "validated": f"{count(checked['rows_checked'], 'row')}, {checked['rows_quarantined']} in quarantine",
        "code": f"{code['revision'][:12]}{dirty}" if code["revision"] else f"evergreen {code['evergreen']}, no commit",
        "environment": f"Python {lineage['environment']['python']}"
        + (f", lock {lineage['environment']['lock_hash'][:12]}" if lineage["environment"]["lock_hash"] else ""),
        "hardware": f"{hardware['device']}, {hardware['name']}",
        "training": f"seed {training['seed']}{', ' if params else ''}{params}, {training['duration_s']:.0f} s",
        **({"classes": _classes(training["classes"])} if training.get("classes") else {}),
    }


def _classes(names: list[Class]) -> str:
    """How many classes, and the first of them."""
    shown = ", ".join(repr(name)[:40] for name in names[:10])
    return f"{len(names)}: {shown}{', …' if len(names) > 10 else ''}"
