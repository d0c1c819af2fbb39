"""The events read as runs: how each ended, and why each of its stages ran or was skipped.

Events are for ever, and the shapes of values change: what is read here is the JSON as it was written then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evergreen.database import Database, Event
from evergreen.errors import StageError, nearest
from evergreen.run import STAGE_VALUES


def runs_of(database: Database, pack: str, limit: int = 20) -> list[dict[str, Any]]:
    """The newest runs of a pack, newest first: run_id, pack, at, as_of, reason, alerts, outcome, version, champion."""
    began = database.events(pack, kind="run", newest_first=True, limit=limit)
    keep = ("run_id", "pack", "at", "as_of", "reason", "alerts", "outcome", "version", "champion")
    runs = [history_of(database, str(event.run_id), pack) for event in began]
    return [{key: run[key] for key in keep} for run in runs]


def history_of(database: Database, run_id: str, pack: str | None = None) -> dict[str, Any]:
    """One run: its stages with state, summary and seconds; its failure, verdict, version, metrics and snapshot.

    `alerts` are those that it answers, the one that started it first. `outcome` is running, failed, promoted, rejected,
    waiting (for a person), superseded or unchanged (nothing new was learned).
    """
    events = _events_of(database, run_id, pack)
    begin = next(event for event in events if event.kind == "run")
    stages, values = _stages(database, events)
    evaluated, promoted = values.get("evaluate"), values.get("promote")
    failure = next((event.body for event in reversed(events) if event.kind == "failure"), None)
    if failure is not None and failure["stage"] in values:
        failure = None  # a later attempt succeeded
    outcome = _outcome(promoted, failure, events)
    champion = promoted["champion"] if promoted else None
    if promoted and outcome == "promoted":
        champion = promoted["version"]  # also where a person said so later
    return {
        "run_id": run_id,
        "pack": begin.pack,
        "at": begin.at.isoformat(),
        "as_of": begin.body["as_of"],
        "reason": begin.body["reason"],
        "alerts": list(dict.fromkeys(event.key for event in events if event.kind in ("intent", "decision"))),
        "outcome": outcome,
        "stages": stages,
        "failure": failure,
        "verdict": promoted["verdict"] if promoted else None,
        "version": values["register"]["version"] if "register" in values else None,
        "champion": champion,
        "metrics": _metrics(evaluated) if evaluated else None,
        "judged_against": evaluated["champion"]["version"] if evaluated and evaluated["champion"] else None,
        "snapshot": values["snapshot"]["tag"] if "snapshot" in values else None,
    }


def last_look(database: Database, pack: str) -> dict[str, Any] | None:
    """The newest look of the monitor that came to an end: run_id, at, as_of, champion, kind, reasons; None: none did.

    `kind` is None where nothing could be compared, and `not rolled back` where the look showed that the champion was to
    be taken back, and that failed.
    """
    ends = [database.latest(pack, kind=kind, stage="monitor") for kind in ("drift", "receipt", "failure")]
    ends.append(database.latest(pack, kind="failure", stage="withdraw"))
    newest = max((event for event in ends if event is not None), key=lambda event: event.position, default=None)
    if newest is None:
        return None
    at = {"run_id": newest.run_id, "at": newest.at.isoformat()}
    if newest.kind == "failure":
        kind = "not rolled back" if newest.body["stage"] == "withdraw" else None
        return at | {"as_of": None, "champion": None, "kind": kind, "reasons": [newest.body["what"]]}
    source = newest if newest.kind == "drift" else database.latest(pack, kind="drift", key=newest.key)
    assert source is not None, "a receipt names a look's event"
    return at | {name: source.body["value"][name] for name in ("as_of", "champion", "kind", "reasons")}


def value_of(database: Database, pack: str, run_id: str, stage: str) -> dict[str, Any] | None:
    """The value that a stage of a run gave or was found to have, as it was written then; None where it gave none."""
    return _stages(database, database.events(pack, run_id=run_id))[1].get(stage)


def why_run(database: Database, run_id: str, pack: str | None = None) -> list[dict[str, Any]]:
    """For each stage of a run: stage, what (ran, skipped or failed), because (in words), changed (parts of its key)."""
    answers = []
    for event in _events_of(database, run_id, pack):
        if event.kind == "receipt":
            because = f"{event.body['of']} did the same work, and its outputs were verified again"
            answers.append({"stage": event.body["stage"], "what": "skipped", "because": because, "changed": []})
        elif event.kind == "failure":
            answers.append(
                {"stage": event.body["stage"], "what": "failed", "because": event.body["what"], "changed": []}
            )
        elif event.kind == "stage":
            answers.append(_why_it_ran(database, event))
    return answers


def values_of(database: Database, run_id: str, pack: str) -> dict[str, dict[str, Any]]:
    """What each stage of a run gave, looked up or made, as it was written then."""
    return _stages(database, database.events(pack, run_id=run_id))[1]


def _events_of(database: Database, run_id: str, pack: str | None) -> list[Event]:
    """The events of a run. Airflow's run ids are unique within a DAG only: two packs' cron runs may share one.

    Raises StageError when there is no such run, or when `pack` is None and several packs have one.
    """
    events = database.events(pack, run_id=run_id)
    packs = sorted({event.pack for event in events if event.kind == "run"})
    if not packs:
        known = {str(event.run_id) for event in database.events(pack, kind="run", newest_first=True, limit=50)}
        raise StageError(f"there is no run {run_id!r}", fix=nearest(run_id, known))
    if len(packs) > 1:
        raise StageError(f"{run_id!r} is a run of {', '.join(packs)}", fix=f"say which: --pack {packs[0]}")
    return events


def _stages(database: Database, events: list[Event]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """What the live view and the tables show of each stage; and the values, as they were written then."""
    rows: dict[str, dict[str, Any]] = {}
    values: dict[str, dict[str, Any]] = {}
    for event in events:
        stage: str = event.body.get("stage", "")
        if event.kind == "failure":
            rows[stage] = {"stage": stage, "state": "failed", "summary": event.body["what"], "seconds": None}
        elif event.kind in ("stage", "receipt"):
            source = event if event.kind == "stage" else database.latest(event.pack, kind="stage", key=event.key)
            assert source is not None, "a receipt names a stage event"
            values[stage] = source.body["value"]
            rows[stage] = {
                "stage": stage,
                "state": "done" if event.kind == "stage" else "skipped",
                "summary": source.body["summary"],
                "seconds": event.body["seconds"],
            }
    return [rows[name] for name in STAGE_VALUES if name in rows], values


def _outcome(promoted: Mapping[str, Any] | None, failure: Any, events: list[Event]) -> str:
    if promoted is None:
        return "failed" if failure else "running"
    if promoted.get("waits"):
        return _answered(events)
    if promoted["previous"] == promoted["version"] == promoted["champion"]:
        return "unchanged"
    if promoted["verdict"]["decision"] == "promote":
        return "promoted" if promoted["champion"] == promoted["version"] else "superseded"
    return {"reject": "rejected", "review": "review"}[promoted["verdict"]["decision"]]


def _answered(events: list[Event]) -> str:
    """What became of a version that waited for a person."""
    last = next((event.body for event in reversed(events) if event.kind == "approval"), {"status": "asked"})
    if last["status"] != "answered":
        return {"asked": "waiting", "superseded": "superseded"}[last["status"]]
    if last["choice"] == "reject":
        return "rejected"
    moved = next((event.body for event in reversed(events) if event.kind == "promotion"), None)
    if moved is None or moved["status"] == "intended":
        return "waiting"  # for the promotion that was decided to be done
    return "promoted" if moved["status"] == "done" else "superseded"


def _metrics(evaluated: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Per metric, the primary one first: the challenger's figure and interval, the champion's, and the difference's."""
    nothing = {"value": None, "low": None, "high": None}
    champion = (evaluated["champion"] or {}).get("metrics", {})
    differences = {found["metric"]: found["estimate"] for found in evaluated["differences"] if found["by"] is None}
    figures = evaluated["challenger"]["metrics"]
    rows = {}
    for name in sorted(figures, key=lambda name: (name != evaluated.get("primary"), name)):
        difference = differences.get(name, nothing)
        rows[name] = {
            **{part: figures[name][part] for part in nothing},
            "champion": champion.get(name, nothing)["value"],
            "difference": difference["value"],
            "difference_low": difference["low"],
            "difference_high": difference["high"],
        }
    return rows


def _why_it_ran(database: Database, event: Event) -> dict[str, Any]:
    stage = event.body["stage"]
    before = next(database.newest(event.pack, kind="stage", stage=stage, before=event.position), None)
    if before is None:
        return {"stage": stage, "what": "ran", "because": "for the first time", "changed": []}
    changed = sorted(set(_differences(before.body["parts"], event.body["parts"])))
    shown = [name for name in changed if name not in ("inputs.run", "inputs.look")]
    if event.body["parts"]["inputs"].get("look") and before.run_id == event.run_id:
        because = "the run was cleared after the rows that it had read were refused, so it looked at the source again"
    elif "inputs.run" in changed:
        because = {"ingest": "every run looks at the source once", "promote": "every run asks the gate once"}[stage]
        because += f"; changed since {before.run_id}: {', '.join(shown)}" if shown else ""
    elif shown:
        because = f"changed since {before.run_id}: {', '.join(shown)}"
    else:
        because = f"asked for by force, or what {before.run_id} left was missing or altered"
    return {"stage": stage, "what": "ran", "because": because, "changed": shown}


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between the parts of two keys: `code`, `inputs.data`, `parameters.params.epochs` and the like."""
    found = []
    for part in before.keys() | after.keys():
        old, new = before.get(part), after.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            depth = (
                _differences(old, new)
                if part in ("inputs", "parameters", "environment", "params")
                else [""] * (old != new)
            )
            found += [f"{part}.{name}" if name else part for name in depth]
        elif old != new:
            found.append(part)
    return found
