"""How `evaluate` scores two models on the same rows through their own folders, and compares them; and `predict`."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen import columns, looks
from evergreen import database as db
from evergreen.data import partitions
from evergreen.data.store import Store
from evergreen.errors import EvaluationError
from evergreen.pack import GateRules
from evergreen.registry import ledger, promotion
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import (
    Class,
    Difference,
    Evaluated,
    Evaluation,
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
    import numpy as np
    import polars as pl

    from evergreen.evaluation import metrics

Classes = tuple[Class, ...] | None
"""Of a multiclass model, in the order of its predictions; None for other targets."""


def incumbent(run: Run, registry: Registry, model: Ref) -> ModelVersion | None:
    """The champion that `model` is compared with: none where it is this very model.

    Where a killed attempt of this run has made it champion, the one before it, so that a retry compares the same two.
    """
    name = run.pack.name
    champion = registry.champion(name)
    if champion is not None:
        looks.model_of(champion)  # refuses one that Evergreen did not make: nothing tells which rows it has seen
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


def holdout_rows(
    store: Store, parts: Sequence[PartitionFile], names: Iterable[str]
) -> list[tuple[PartitionFile, pl.DataFrame]]:
    """The columns that figures are computed from, of each partition of the hold-out.

    Raises EvaluationError for a column that a rule names and the rows lack.
    """
    import polars as pl

    wanted = list(dict.fromkeys(names))
    for part in parts:
        there = pl.scan_parquet(store.path(part.object), glob=False).collect_schema()
        for name in wanted:
            if name not in there:
                raise EvaluationError(
                    f"gate: a rule is by {name!r}, and the hold-out rows have no such column",
                    fix=f"name one of: {', '.join(list(there)[:12])}",
                )
    rows = [(part, columns.read(store.path(part.object), wanted)) for part in parts]
    partitions.require_all_rows(
        "the hold-out", sum(part.rows for part in parts), sum(frame.height for _, frame in rows)
    )
    return rows


def classes_in(store: Store, snapshot: Snapshot, task: str, target: str) -> Classes:
    """The classes of a multiclass model that states none, made from this snapshot by an older Evergreen.

    They are the sorted values of the target in the training window.
    """
    import polars as pl

    if task != "multiclass":
        return None
    parts = manifest_of(store, snapshot.manifest).within(snapshot.windows.train)
    seen = pl.concat([columns.read(store.path(part.object), [target]) for part in parts])
    return tuple(sorted(columns.series(seen, target).unique().to_list()))


def classes_of(run: Run, store: Store, registry: Registry, champion: ModelVersion) -> Classes:
    """The champion's own classes, in the order of its predictions; None where the target has none.

    Its model folder states them. An older one does not: then what was registered with it says, or its snapshot.
    """
    task = run.pack.data.task
    if task != "multiclass":
        return None
    described = store.read_json(store.listing(looks.model_of(champion))["model.json"])
    if "classes" in described:
        return tuple(described["classes"])
    about = registry.artifact(champion.name, champion.version, looks.REFERENCE)
    if about is not None:
        return looks.Reference.model_validate_json(about).classes
    _, made_by = ledger.registered(db.connect(run.settings.database_url), champion.name, champion.version)
    return classes_in(store, Snapshot.model_validate(made_by["snapshot"]), task, run.pack.data.target)


def compare(
    run: Run,
    store: Store,
    rows: list[tuple[PartitionFile, pl.DataFrame]],
    scored: dict[str, looks.Scored],
    champion: ModelVersion | None,
    trained: Trained,
    withheld: str | None,
    classes: Mapping[str, Classes],
    folder: Path,
) -> Evaluated:
    """Figures, slices and differences from predictions that are there already.

    `classes`: model → its own, in the order of its predictions.
    """
    from evergreen.evaluation import plots  # numpy: every parse of a DAG would pay for it

    pack = run.pack
    heldout = HeldOut.of(pack.gate, pack.data.task, pack.data.target, rows)
    judged = {name: heldout.rows(of_it.predicted, classes[name]) for name, of_it in scored.items()}

    def evaluation(name: str, model: str, version: int | None, size: int) -> Evaluation:
        of_it = scored[name]
        return Evaluation(
            model=model,
            version=version,
            classes=classes[name],
            rows=len(heldout.truth),
            **heldout.figures(judged[name]),
            latency_p95_ms=of_it.result.metrics.get("latency_p95_ms"),
            size_bytes=size,
            predictions=of_it.predictions,
        )

    challenger = evaluation("challenger", trained.model.hash, None, trained.model.size)
    incumbent = None
    differences: tuple[Difference, ...] = ()
    if champion is not None and withheld is not None:
        incumbent = Evaluation(
            model=looks.model_of(champion).hash,
            version=champion.version,
            rows=len(heldout.truth),
            size_bytes=0,
            withheld=withheld,
        )
    elif champion is not None:
        model = looks.model_of(champion)
        size = sum(ref.size for ref in store.listing(model).values())
        incumbent = evaluation("champion", model.hash, champion.version, size)
        differences = heldout.differences(judged["challenger"], judged["champion"])
    drawn = folder / "plots"
    drawn.mkdir()
    titles = {"challenger": "challenger", "champion": f"champion, version {champion.version}" if champion else ""}
    plots.draw({titles[name]: each for name, each in judged.items()}, drawn)
    importance, note = next(iter(scored["challenger"].importance), looks.Measured((), None))
    if importance:
        plots.draw_importance(importance, pack.gate.primary.metric, drawn)
    figures = store.put(drawn)
    store.push([figures, *(each.predictions for each in scored.values())])
    return Evaluated(
        challenger=challenger,
        champion=incumbent,
        differences=differences,
        confidence=pack.gate.primary.confidence,
        primary=pack.gate.primary.metric,
        holdout=Window(start=rows[0][0].period, end=step(rows[-1][0].period, pack.data.partition)),
        plots=figures,
        importance=importance,
        importance_note=note,
    )


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The hold-out rows as the rules look at them: what is true, which partition, which groups."""

    rules: GateRules
    task: str
    truth: np.ndarray
    clusters: np.ndarray
    columns: dict[str, np.ndarray]

    @classmethod
    def of(
        cls,
        rules: GateRules,
        task: str,
        target: str,
        rows: list[tuple[PartitionFile, pl.DataFrame]],
    ) -> HeldOut:
        """From the columns that `holdout_rows` reads."""
        import numpy as np
        import polars as pl

        table = columns.stacked([frame for _, frame in rows])
        clusters = np.repeat(np.arange(len(rows)), [frame.height for _, frame in rows])
        groups = {
            by: columns.series(table, by).cast(pl.String).fill_null("(missing)").to_numpy() for by in rules.columns
        }
        return cls(rules, task, table[target].to_numpy(), clusters, groups)

    @property
    def _how(self) -> dict[str, Any]:
        return {"confidence": self.rules.primary.confidence, "independent": self.rules.primary.independent}

    def rows(self, predicted: np.ndarray, classes: Classes) -> metrics.Rows:
        """The rows as a model of these `classes` predicts them. Raises EvaluationError."""
        from evergreen.evaluation import metrics

        return metrics.Rows.of(self.task, self.truth, predicted, self.clusters, classes)

    def figures(self, rows: metrics.Rows) -> dict[str, Any]:
        """What an Evaluation says of a model's rows: metrics, slices and gaps."""
        from evergreen.evaluation import fairness, significance, slices

        return {
            "metrics": {
                metric: significance.estimate(rows, metric, **self._how) for metric in self.rules.metrics(self.task)
            },
            "slices": slices.estimates(self.rules, rows, columns=self.columns, **self._how),
            "gaps": fairness.gaps(self.rules, rows.truth, rows.predicted, columns=self.columns),
        }

    def differences(self, challenger: metrics.Rows, champion: metrics.Rows) -> tuple[Difference, ...]:
        """Challenger minus champion, overall and in each group that is judged."""
        from evergreen.evaluation import significance, slices

        overall = (
            Difference(
                metric=metric,
                rows=len(self.truth),
                estimate=significance.paired(challenger, champion, metric, **self._how),
            )
            for metric in self.rules.metrics(self.task)
        )
        return (*overall, *slices.differences(self.rules, challenger, champion, columns=self.columns, **self._how))


def predict(settings: Settings, version: ModelVersion, file: Path) -> pl.DataFrame:
    """Predictions of a registered version for the raw rows of `file`, Parquet or CSV, by a job; columns as a job's.

    Raises EvaluationError when the file or its columns are not what the model takes, and RegistryError when the model
    folder is not the one that was registered.
    """
    rows = rows_of(file)
    database, registry = db.connect(settings.database_url), Registry(settings)
    with tempfile.TemporaryDirectory(prefix="evergreen-predict-") as folder:
        target = Path(folder) / "model"
        model, _ = looks.fetch_model(settings, database, registry, version.name, version.version, target)
        return looks.predict_with(settings, version.name, model, rows, str(file))


def rows_of(file: Path) -> pl.DataFrame:
    """Read the raw rows of a Parquet or CSV file; of a CSV all as text, since the model declares what each column is.

    Raises EvaluationError.
    """
    import polars as pl

    try:
        if file.suffix == ".csv":
            rows = pl.read_csv(file, infer_schema=False, glob=False, null_values=["", "NA"])
            with file.open(encoding="utf-8-sig", newline="") as opened:
                header = next((row for row in csv.reader(opened) if row), [])
            # polars leaves the quotes of a name doubled.
            return rows.rename(dict(zip(rows.columns, header, strict=False)) if len(set(header)) == rows.width else {})
        return pl.read_parquet(file, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise EvaluationError(
            f"{file} cannot be read: {error}", fix="give a Parquet file, or a .csv with a header"
        ) from error
