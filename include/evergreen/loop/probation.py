"""The champion on probation: for a while after its promotion it is held beside the champion before it, by the monitor.

The look that shows it worse writes that down with all it saw; then the way back is taken as a person takes it, once:
`loop/rollback.py` verifies the version to restore, and nothing moves unless the champion is still the one that was judged.
"""

from __future__ import annotations

import logging
import math
from datetime import datetime
from typing import TYPE_CHECKING, Any

from evergreen import columns, looks
from evergreen import database as db
from evergreen.data.store import Store
from evergreen.errors import EvaluationError, RegistryError
from evergreen.evaluation import metrics, probation, significance
from evergreen.evaluation.probation import Ruling, Seen
from evergreen.keys import on_the_clock, recorded
from evergreen.loop.rollback import rollback
from evergreen.registry import ledger, promotion
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import Manifest, PartitionFile, Run, Value, Window, periods
from evergreen.work import checkpoint

if TYPE_CHECKING:
    import numpy as np

    from evergreen.loop.monitor import Champion

log = logging.getLogger("evergreen")

BY = "the monitor"


class Standing(Value):
    """A champion on probation, by the ledger."""

    champion: int
    since: datetime
    until: datetime
    """Both on the pack's clock."""
    before: int | None
    model: str | None
    """The model folder of the champion before."""
    excused: str | None
    """Why the two are not to be compared."""


def standing(run: Run, registry: Registry, champion: ModelVersion | None) -> Standing | None:
    """How the champion stands at the run's as-of; None where it is not on probation, which is for what was promoted."""
    rule, pack = run.pack.rollback, run.pack.name
    if rule is None or champion is None:
        return None
    database = db.connect(run.settings.database_url)
    reigns = ledger.reigns(database, pack)
    if not reigns or reigns[-1].version != champion.version or reigns[-1].by not in ("gate", "person"):
        return None
    since = on_the_clock(run.pack, reigns[-1].since, database.made_at())
    if run.as_of >= since + rule.probation:
        return None
    known = {one.version: one.model_hash for one in registry.versions(pack)}
    before = next((one.version for one in reversed(reigns) if one.version not in (None, champion.version)), None)
    excused = None
    if before is None:
        excused = "there was no champion before it"
    elif before in promotion.left(database, pack):
        excused = f"version {before}, the champion before it, was rolled back from"
    elif known.get(before) is None:
        excused = f"version {before}, the champion before it, is not there any more, or Evergreen did not make it"
    return Standing(
        champion=champion.version,
        since=since,
        until=since + rule.probation,
        before=before,
        model=known.get(before) if before is not None else None,
        excused=excused,
    )


def judge(
    run: Run,
    store: Store,
    manifest: Manifest,
    at: Standing,
    champion: Champion,
    before: Champion | None,
    fault: str | None,
) -> Ruling:
    """Have both predict the rows with labels that came since the champion's hold-out, and decide.

    `before`: None where nothing is known of what it was made from. `fault`: what makes the rows no measure of a model.
    """
    rule, primary = run.pack.rollback, run.pack.gate.primary
    assert rule is not None, "without a rule nobody is on probation"
    window = Window(start=champion.judged.end, end=run.as_of)
    looks_at_most = len([*periods(Window(start=at.since, end=at.until), run.pack.data.partition)])
    confidence = probation.confidence_over(looks_at_most, primary.confidence)
    plain: dict[str, Any] = {
        **at.model_dump(include={"champion", "before", "since", "until"}),
        "as_of": run.as_of,
        "metric": primary.metric,
        "drop": rule.drop,
        "confidence": confidence,
        "independent": primary.independent,
    }

    def compared() -> dict[str, Any]:
        """The figures; or why there are none."""
        if at.excused is not None or fault is not None:
            return {"excused": at.excused or fault}
        name = f"version {at.before}, the champion before it,"
        if before is None:
            return {"excused": f"{name} has no profile, having been registered before there were any"}
        if before.seen.overlaps(window):
            return {"excused": f"{name} has learned from rows of {before.seen}, and these are of {window}"}
        labelled = [(part, truth) for part in manifest.within(window) if (truth := _labels(run, store, part))[1].any()]
        if not labelled:
            return {"excused": f"no labels have come since its hold-out, which ended {window.start:%Y-%m-%d %H:%M}"}
        if not store.verify(before.model):
            return {"excused": f"the model folder of {name} is not to be had intact from the store"}
        try:
            ours, theirs = (_rows(run, store, each, labelled) for each in (champion, before))
        except EvaluationError as error:
            return {"excused": f"the two could not both predict the rows: {error.what}"}
        if run.pack.data.task != "regression" and len(set(ours.truth.tolist())) < 2:
            return {"excused": "all labels that have come are of one class"}
        figures = {
            "figure": significance.estimate(ours, primary.metric, primary.confidence, primary.independent),
            "figure_before": significance.estimate(theirs, primary.metric, primary.confidence, primary.independent),
            "difference": significance.paired(ours, theirs, primary.metric, confidence, primary.independent),
        }
        if not all(math.isfinite(each.value) for each in figures.values()):
            return {"excused": f"{primary.metric} is not defined on the rows that have come"}
        return {"window": window, "rows": len(ours.truth), **figures}

    return probation.decide(Seen(**plain, **compared()))


def _labels(run: Run, store: Store, part: PartitionFile) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the target of a partition's rows, and whether it is there."""
    target = run.pack.data.target
    column = columns.series(columns.read(store.path(part.object), [target]), target)
    return column.to_numpy(), looks.labelled(column)


def _rows(
    run: Run, store: Store, model: Champion, parts: list[tuple[PartitionFile, tuple[np.ndarray, np.ndarray]]]
) -> metrics.Rows:
    """The rows with labels, as `model` predicts them. Raises EvaluationError."""
    import numpy as np

    predicted, _ = looks.predictions(run, store, model.model, [part for part, _ in parts])
    return metrics.Rows.of(
        run.pack.data.task,
        np.concatenate([truth[there] for _, (truth, there) in parts]),
        np.concatenate([predicted[part.identity][there] for part, (_, there) in parts]),
        np.repeat(np.arange(len(parts)), [int(there.sum()) for _, (_, there) in parts]),
        model.reference.classes,
    )


@recorded
def withdraw(run: Run, ruling: Ruling) -> Ruling:
    """Do what was decided, and say it: nothing, or go back, once for each run that saw it.

    Where the champion is another by now, nothing moves, and a `void` event says why. Raises RegistryError where the
    version to restore is not what it was; the champion stays.
    """
    pack, seen = run.pack.name, ruling.seen
    log.info("%s: %s", pack, ruling.why)
    if ruling.decision == "keep":
        return ruling
    database = db.connect(run.settings.database_url)
    last = database.latest(pack, kind=promotion.ROLLBACK, run_id=run.id)
    if last is not None and last.body["status"] == "done":  # a person may have chosen otherwise since
        checkpoint(run.settings, last)
        return ruling
    try:
        rollback(run.settings, pack, to=seen.before, leave=seen.champion, why=ruling.why, by=BY, run_id=run.id)
    except RegistryError as error:
        if ledger.champion(database, pack) == seen.champion:
            raise
        log.info("%s: not rolled back: %s", pack, error.what)
    return ruling
