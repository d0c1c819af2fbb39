"""What a verdict rests on, for whoever audits it; and the verdict made again from what is stored.

That is its event, the predictions it names, and the hold-out rows of its run.

Nothing is predicted or measured anew: the models are not run, and latency and size are taken as they were written.
Whether the events are still as they were appended is for their hash chain to say (`Database.first_bad`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from evergreen import database as db
from evergreen.data.store import Store
from evergreen.database import Database, Event
from evergreen.errors import StageError
from evergreen.evaluation import gate
from evergreen.looks import predictions_in
from evergreen.pack import GateRules
from evergreen.run import Difference, Evaluated, Evaluation, Ref, SliceEstimate, Snapshot, Value, Verdict
from evergreen.settings import Settings
from evergreen.stages import scoring
from evergreen.work import manifest_of

if TYPE_CHECKING:
    import polars as pl

    from evergreen.evaluation.metrics import Rows

CLOSE = 1e-9
"""Another machine may add up the same numbers in another order."""


class Rejudged(Value):
    """What was made again, and in what it is not what was written."""

    evaluated: Evaluated | None
    """None where predictions or rows are missing or altered."""
    verdict: Verdict | None
    wrong: tuple[str, ...]
    """One sentence each; none where the verdict and all it rests on are as they were written."""


def rejudge(settings: Settings, event: Event) -> Rejudged:
    """Make the evaluation and the verdict of a `verdict` event again. Raises StageError where its run left no stages."""
    database, store = db.connect(settings.database_url), Store(settings)
    saw = event.body["saw"]
    rules = GateRules.model_validate(saw["rules"])
    recorded = Evaluated.model_validate(saw["evaluated"])
    found = {stage: _stage(database, event, stage) for stage in ("snapshot", "train", "evaluate")}
    wrong = [*_rules(database, event, rules)]
    evaluate = Evaluated.model_validate(found["evaluate"]["value"])  # as it is read now: old ones lack what came since
    wrong += [
        f"{place} is not what `evaluate` found"
        for place in _apart(evaluate.model_dump(mode="json"), recorded.model_dump(mode="json"))
    ]

    snapshot = Snapshot.model_validate(found["snapshot"]["value"])
    models = {"challenger": recorded.challenger}
    if recorded.champion is not None and recorded.champion.withheld is None:
        models["champion"] = recorded.champion
    gone = [*_gone(store, snapshot, models)]
    if gone:
        return Rejudged(evaluated=None, verdict=None, wrong=(*wrong, *gone))

    task, target = (found["train"]["parts"]["parameters"][name] for name in ("task", "target"))
    holdout = manifest_of(store, snapshot.manifest).within(snapshot.windows.holdout)
    rows = scoring.holdout_rows(store, holdout, [target, *rules.columns])
    heldout = scoring.HeldOut.of(rules, task, target, rows)

    def judged(model: Evaluation) -> Rows:
        """The rows as the model predicted them. Both were read by the challenger's classes before they kept their own."""
        classes = model.classes or scoring.classes_in(store, snapshot, task, target)
        return heldout.rows(predictions_in(store.path(_predictions(model))), classes)

    rows_of = {name: judged(model) for name, model in models.items()}
    again: dict[str, Any] = {
        name: model.model_copy(update=heldout.figures(rows_of[name])) for name, model in models.items()
    }
    if len(models) == 2:
        again["differences"] = heldout.differences(rows_of["challenger"], rows_of["champion"])
    evaluated = recorded.model_copy(update=again)
    wrong += [
        f"{place}, made again from the predictions, is not what was written"
        for place in _apart(evaluated.model_dump(mode="json"), recorded.model_dump(mode="json"))
    ]
    verdict = gate.decide(
        evaluated,
        rules,
        challenger_as_of=datetime.fromisoformat(saw["challenger_as_of"]),
        champion_as_of=datetime.fromisoformat(saw["champion_as_of"]) if saw["champion_as_of"] else None,
        rolled_back=saw.get("rolled_back"),
    )
    written = Verdict.model_validate(event.body["verdict"])
    if verdict != written:
        wrong.append(f"the verdict is {verdict.decision} ({verdict.reasons[0]}), written was {written.decision}")
    return Rejudged(evaluated=evaluated, verdict=verdict, wrong=tuple(wrong))


def inputs_of(snapshot: Snapshot, evaluated: Evaluated) -> dict[str, Any]:
    """What the gate is given, as JSON: where the rows and both models' predictions for them lie in the store's remote."""

    def lies(ref: Ref | None) -> dict[str, Any] | None:
        return {"object": Store.place(ref), **ref.model_dump()} if ref is not None else None

    models = {"challenger": evaluated.challenger, "champion": evaluated.champion}
    return {
        "snapshot": snapshot.tag,
        "manifest": lies(snapshot.manifest),
        "holdout": evaluated.holdout.model_dump(mode="json"),
        **{
            name: model.model_dump(include={"version", "model", "classes", "withheld"})
            | {"predictions": lies(model.predictions)}
            if model is not None
            else None
            for name, model in models.items()
        },
    }


def groups_of(evaluated: Evaluated) -> pl.DataFrame:
    """A row for each group that a rule looks at: its figure, the champion's, and the difference, with their intervals."""
    import polars as pl

    def of(each: SliceEstimate | Difference) -> tuple[str | None, str | None, str]:
        return each.by, each.group, each.metric

    champion = {of(each): each.estimate for each in (evaluated.champion.slices if evaluated.champion else ())}
    differences = {of(each): each.estimate for each in evaluated.differences}
    rows = []
    for each in evaluated.challenger.slices:
        row: dict[str, Any] = {"by": each.by, "group": each.group, "metric": each.metric, "rows": each.rows}
        found = {
            "challenger": each.estimate,
            "champion": champion.get(of(each)),
            "difference": differences.get(of(each)),
        }
        for name, estimate in found.items():
            row |= {f"{name}_{part}": getattr(estimate, part, None) for part in ("value", "low", "high")}
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _stage(database: Database, event: Event, stage: str) -> dict[str, Any]:
    """What the verdict's run did at `stage`, or the earlier run whose work it used: the body of that event."""
    done = database.events(event.pack, kind=("stage", "receipt"), run_id=event.run_id, newest_first=True)
    own = next((each for each in done if each.body["stage"] == stage), None)
    if own is not None and own.kind == "receipt":
        own = database.latest(event.pack, kind="stage", key=own.key)
    if own is None:
        raise StageError(
            f"run {event.run_id} of {event.pack} has a verdict, and no event of {stage}",
            fix="restore the events database: `evergreen why RUN` shows what is there of the run",
        )
    return own.body


def _rules(database: Database, event: Event, rules: GateRules) -> Iterator[str]:
    """Where the rules of the verdict are not those it was made by."""
    saw = event.body["saw"]
    if "policy" in saw and gate.policy_hash(rules) != saw["policy"]:
        yield "the rules are not those whose hash was written with them"
    for each in database.events(event.pack, kind="stage", run_id=event.run_id):
        if each.body["stage"] == "promote" and each.body["parts"]["parameters"]["rules"] != saw["rules"]:
            yield "the rules are not those that `promote` was given"


def _gone(store: Store, snapshot: Snapshot, models: dict[str, Evaluation]) -> Iterator[str]:
    """What is not to be had intact."""
    if not store.verify(snapshot.manifest):
        yield "the manifest of the snapshot is missing or altered"
        return
    for part in manifest_of(store, snapshot.manifest).within(snapshot.windows.holdout):
        if not store.verify(part.object):
            yield f"the hold-out rows of {part.period:%Y-%m-%d %H:%M} are missing or altered"
    for name, model in models.items():
        if not store.verify(_predictions(model)):
            yield f"the predictions of the {name} are missing or altered"


def _predictions(model: Evaluation) -> Ref:
    assert model.predictions is not None, "what was evaluated was predicted, and what was withheld is not asked for"
    return model.predictions


def _apart(here: Any, there: Any, place: str = "the evaluation") -> Iterator[str]:
    """The places at which two JSON values differ, numbers by more than CLOSE."""
    if isinstance(here, dict) and isinstance(there, dict) and here.keys() == there.keys():
        for key in here:
            yield from _apart(here[key], there[key], f"{place}.{key}")
    elif isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        for number, (one, other) in enumerate(zip(here, there, strict=True)):
            yield from _apart(one, other, f"{place}.{number}")
    elif isinstance(here, float) and isinstance(there, int | float):
        if not math.isclose(here, there, rel_tol=CLOSE, abs_tol=CLOSE):
            yield place
    elif here != there:
        yield place
