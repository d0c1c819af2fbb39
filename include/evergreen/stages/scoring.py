"""How `evaluate` scores two models on the same rows through their own folders, and compares them; and `predict`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen import database as db
from evergreen import looks
from evergreen.data.store import Store
from evergreen.errors import EvaluationError
from evergreen.pack import TASK_METRICS
from evergreen.registry import promotion
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import (
    Difference,
    Evaluated,
    Evaluation,
    Importance,
    Manifest,
    PartitionFile,
    Ref,
    Run,
    Snapshot,
    Trained,
    Window,
    Windows,
    step,
)
from evergreen.settings import Settings
from evergreen.work import manifest_of

if TYPE_CHECKING:
    import polars as pl


def incumbent(run: Run, registry: Registry, model: Ref) -> ModelVersion | None:
    """The champion that `model` is compared with: none where it is this very model.

    Where a killed attempt of this run has made it champion, the one before it, so that a retry compares the same two.
    """
    name = run.pack.name
    champion = registry.champion(name)
    if champion is None or champion.model_hash != model.hash:
        return champion
    mine = promotion.moved_by(db.connect(run.settings.database_url), run, champion.version)
    if mine is None:
        return None
    before = mine.body["previous" if mine.body["status"] == "done" else "champion"]
    return registry.version(name, before) if before is not None else None


def withheld_because(registry: Registry, champion: ModelVersion | None, holdout: Window) -> str | None:
    """Why the champion's figures would not be honest: law 5, no model is scored on rows it has seen."""
    if champion is None:
        return None
    windows = Windows.model_validate(registry.lineage(champion.name, champion.version)["windows"])
    seen = Window(start=windows.train.start, end=windows.validation.end)
    if not seen.overlaps(holdout):
        return None
    return f"version {champion.version} was made with rows of {seen}, which overlaps the hold-out {holdout}"


def holdout_rows(store: Store, manifest: Manifest, holdout: Window) -> list[tuple[PartitionFile, pl.DataFrame]]:
    import polars as pl

    return [(part, pl.read_parquet(store.path(part.object))) for part in manifest.within(holdout)]


def classes_of(run: Run, store: Store, snapshot: Snapshot) -> list[Any] | None:
    """The classes of a multiclass target, sorted: those of the training window, in the order of the predictions."""
    import polars as pl

    data = run.pack.data
    if data.task != "multiclass":
        return None
    parts = manifest_of(store, snapshot.manifest).within(snapshot.windows.train)
    seen = pl.concat([pl.read_parquet(store.path(part.object), columns=[data.target]) for part in parts])
    return sorted(seen[data.target].unique().to_list())


def compare(
    run: Run,
    store: Store,
    rows: list[tuple[PartitionFile, pl.DataFrame]],
    scored: dict[str, looks.Scored],
    sample: looks.Sample | None,
    champion: ModelVersion | None,
    trained: Trained,
    withheld: str | None,
    classes: list[Any] | None,
    folder: Path,
) -> Evaluated:
    """Figures, slices and differences from predictions that are there already."""
    import numpy as np
    import polars as pl

    from evergreen.evaluation import plots, significance, slices  # numpy: every parse of a DAG would pay for it

    pack = run.pack
    task = pack.data.task
    table = pl.concat([frame for _, frame in rows], how="vertical_relaxed")
    clusters = np.repeat(np.arange(len(rows)), [frame.height for _, frame in rows])
    truth = table[pack.data.target].to_numpy()
    how: dict[str, Any] = {"clusters": clusters, "confidence": pack.gate.primary.confidence, "classes": classes}
    for rule in pack.gate.slices:
        if rule.by not in table.columns:
            raise EvaluationError(
                f"pack {pack.name}: gate.slices: there is no column {rule.by!r} in the hold-out rows",
                fix=f"name one of: {', '.join(table.columns[:12])}",
            )
    groups = {rule.by: table[rule.by].cast(pl.String).fill_null("(missing)").to_numpy() for rule in pack.gate.slices}

    def evaluation(name: str, model: str, version: int | None, size: int) -> Evaluation:
        of_it = scored[name]
        return Evaluation(
            model=model,
            version=version,
            rows=table.height,
            metrics=significance.intervals(task, truth, of_it.predicted, **how),
            slices=slices.estimates(pack.gate, task, truth, of_it.predicted, columns=groups, **how),
            latency_p95_ms=of_it.result.metrics.get("latency_p95_ms"),
            size_bytes=size,
            predictions=of_it.predictions,
        )

    challenger = evaluation("challenger", trained.model.hash, None, trained.model.size)
    incumbent = None
    differences: tuple[Any, ...] = ()
    if champion is not None and withheld is not None:
        incumbent = Evaluation(
            model=looks.model_of(champion).hash,
            version=champion.version,
            rows=table.height,
            size_bytes=0,
            withheld=withheld,
        )
    elif champion is not None:
        model = looks.model_of(champion)
        size = sum(ref.size for ref in store.listing(model).values())
        incumbent = evaluation("champion", model.hash, champion.version, size)
        pair = (scored["challenger"].predicted, scored["champion"].predicted)
        differences = (
            *(
                Difference(
                    metric=metric,
                    rows=table.height,
                    estimate=significance.difference(task, metric, truth, *pair, **how),
                )
                for metric in TASK_METRICS[task]
            ),
            *slices.differences(pack.gate, task, truth, *pair, columns=groups, **how),
        )
    drawn = folder / "plots"
    drawn.mkdir()
    titles = {"challenger": "challenger", "champion": f"champion, version {champion.version}" if champion else ""}
    plots.draw(task, truth, {titles[name]: each.predicted for name, each in scored.items()}, drawn, classes=classes)
    importance: tuple[Importance, ...] = ()
    if sample is not None:
        swapped = scored["challenger"].swapped[0]
        importance = looks.importance_of(run, sample, swapped, pack.gate.primary.metric, classes)
    if importance:
        plots.draw_importance(importance, pack.gate.primary.metric, drawn)
    figures = store.put(drawn)
    store.push([figures])
    return Evaluated(
        challenger=challenger,
        champion=incumbent,
        differences=differences,
        confidence=pack.gate.primary.confidence,
        primary=pack.gate.primary.metric,
        holdout=Window(start=rows[0][0].period, end=step(rows[-1][0].period, pack.data.partition)),
        plots=figures,
        importance=importance,
    )


def predict(settings: Settings, version: ModelVersion, file: Path) -> pl.DataFrame:
    """Predictions of a registered version for the raw rows of `file`, Parquet or CSV, by a job; columns as a job's.

    Raises EvaluationError when the file or its columns are not what the model takes.
    """
    import polars as pl

    try:
        rows = (
            pl.read_csv(file, infer_schema_length=None, try_parse_dates=True, null_values=["", "NA"])
            if file.suffix == ".csv"
            else pl.read_parquet(file)
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise EvaluationError(
            f"{file} cannot be read: {error}", fix="give a Parquet file, or a .csv with a header"
        ) from error
    registry = Registry(settings)
    with tempfile.TemporaryDirectory(prefix="evergreen-predict-") as folder:
        model = registry.folder(version.name, version.version, Path(folder) / "model")
        return looks.predict_with(settings, version.name, model, rows, str(file))
