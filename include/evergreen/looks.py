"""What the chain and the monitor both look at: a model's predictions for partitions, what it leans on, how they lie.

All are functions of bytes that are named by their hash: of a model and a partition. What this machine made of them is
kept in its cache, which may vanish; so a new day costs a day.
"""

from __future__ import annotations

import io
import json
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen.data.store import Store
from evergreen.errors import EvaluationError, RegistryError, StoreError
from evergreen.monitoring.drift import PREDICTION, Drift, compare
from evergreen.pack import Data, DriftRules
from evergreen.registry.models import ModelVersion
from evergreen.run import (
    Estimate,
    Importance,
    Manifest,
    PartitionFile,
    Ref,
    Run,
    Value,
    Window,
    count,
    digest,
    floor,
    step,
)
from evergreen.settings import Settings
from evergreen.training import jobs
from evergreen.training.checkpoints import write_whole
from evergreen.work import job_id_of, job_spec

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    from evergreen.monitoring.profiles import ColumnProfile, Profile


class Reference(Value):
    """What a version was like when it was registered, beside the profile of all rows of its snapshot."""

    metric: str
    """The gate's primary metric, and its figure on the hold-out."""
    figure: Estimate
    classes: tuple[Any, ...] | None
    """Of a multiclass target, in the order of the predictions."""
    usual: tuple[Drift, ...]
    """Windows of the snapshot beside the whole of it, back to back, the newest first: how far they stray anyway."""
    importance: tuple[Importance, ...] = ()
    """On the hold-out; none of a version that was registered before there was any."""


PROFILE = "profile.bin"
REFERENCE = "profile.json"
"""The artifacts of a version that hold them."""
IMPORTANCE = 1
"""Of the way importance is measured: what a machine keeps by an earlier one is not used."""


def model_of(version: ModelVersion) -> Ref:
    """The version's model folder in the store."""
    if version.model_hash is None:
        raise RegistryError(
            f"{version.name} version {version.version} is champion, and Evergreen did not make it",
            fix="put the alias champion back on a version that `evergreen runs` lists",
        )
    return Ref(hash=version.model_hash, size=0)


# Predictions.


@dataclass(frozen=True, eq=False)
class Scored:
    """What a model's job left."""

    predictions: Ref
    predicted: np.ndarray
    """(n,), or (n, k) of k classes."""
    result: jobs.JobResult
    swapped: tuple[np.ndarray, ...]
    """Of each sample (1 + columns, n), or (1 + columns, n, k): as its rows are, then with one column of the partners'."""


def score(
    run: Run,
    store: Store,
    rows: list[tuple[PartitionFile, pl.DataFrame]],
    models: dict[str, Ref],
    ask: Mapping[str, Sequence[Sample]],
) -> dict[str, Scored]:
    """Predictions of each model on the same rows without the target, and on the samples that it is asked; one job each.

    `ask`: model → samples.
    """
    import numpy as np

    handles = {}
    for name, model in models.items():
        samples = ask.get(name, ())
        parts = {
            "model": model.hash,
            "rows": [part.object.hash for part, _ in rows],
            "samples": [sample.identity for sample in samples],
            "run": run.id,
        }
        spec = job_spec(run, "score", job_id_of(run, "score", parts))
        handles[name] = jobs.start(run.settings, spec, _fill_with(run.pack.data.target, store, model, rows, samples))
    scored = {}
    for name, handle in handles.items():
        try:
            result = jobs.wait(handle)
        except EvaluationError:  # its folder stays, with its log; of the others nobody will ask for the predictions
            for other in handles.values():
                if other is not handle:
                    jobs.discard(run.settings, other.spec.id)
            raise
        file = handle.output / "predictions.parquet"
        asked = sorted((handle.output / "samples").glob("*.npy"))
        swapped = tuple(np.load(each, allow_pickle=False) for each in asked)
        scored[name] = Scored(store.put(file), predictions_in(file), result, swapped)
    for handle in handles.values():
        jobs.discard(run.settings, handle.spec.id)
    return scored


def _fill_with(
    target: str,
    store: Store,
    model: Ref,
    rows: list[tuple[PartitionFile, pl.DataFrame]],
    samples: Sequence[Sample],
) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        store.checkout(model, folder / "model")
        (folder / "rows").mkdir(parents=True)
        for part, frame in rows:
            frame.drop(target).write_parquet(folder / "rows" / f"{part.period:%Y%m%dT%H}.parquet")
        for place, sample in enumerate(samples):
            asked = folder / "samples" / f"{place:05d}"
            asked.mkdir(parents=True)
            sample.rows.drop(target).write_parquet(asked / "rows.parquet")
            sample.partners.write_parquet(asked / "partners.parquet")

    return fill


def predict_with(settings: Settings, name: str, model: Path, rows: pl.DataFrame, what: str) -> pl.DataFrame:
    """Predictions of a model folder of `name` for raw rows, by a job of its own; columns as a job's.

    Asks for nothing of the pack, which may be broken or gone. Raises EvaluationError, which calls the rows `what`.
    """
    import polars as pl

    described = json.loads((model / "model.json").read_text(encoding="utf-8"))
    missing = sorted(set(described["inputs"]) - set(rows.columns))
    if missing:
        raise EvaluationError(
            f"{what} lacks {count(len(missing), 'column')} that {name} takes: {', '.join(missing[:5])}",
            fix=f"it takes: {', '.join(described['inputs'])}",
        )
    spec = jobs.JobSpec(
        id=f"predict-{name}-{uuid.uuid4().hex[:16]}",
        kind="score",
        pack=name,
        target="",
        event_time="",
        task=described["task"],
        timeout_s=3600.0,
    )

    def fill(target: Path) -> None:
        shutil.copytree(model, target / "model")
        (target / "rows").mkdir()
        rows.write_parquet(target / "rows" / "rows.parquet")

    handle = jobs.start(settings, spec, fill)
    try:
        jobs.wait(handle)
        return pl.read_parquet(handle.output / "predictions.parquet")
    finally:
        jobs.discard(settings, spec.id)


def predictions_in(file: Path) -> np.ndarray:
    """(n,) of one `prediction` column, or (n, k) of `prediction_0` … `prediction_k-1`."""
    import polars as pl

    frame = pl.read_parquet(file)
    return frame.to_numpy()[:, 0] if frame.width == 1 else frame.to_numpy()


def predictions(
    run: Run, store: Store, model: Ref, parts: Sequence[PartitionFile], samples: Sequence[Sample] = ()
) -> tuple[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]], tuple[np.ndarray, ...]]:
    """The model's predictions for each partition, by its identity, and what `Scored.swapped` has of the samples.

    What this machine does not know of the first, and the second, by one job.
    """
    import numpy as np
    import polars as pl

    folder = run.settings.cache / "predictions" / model.hash
    folder.mkdir(parents=True, exist_ok=True)
    files = {part.identity: folder / f"{part.identity}.npy" for part in parts}
    unknown = [part for part in parts if not files[part.identity].is_file()]
    swapped: tuple[np.ndarray, ...] = ()
    if unknown or samples:
        asked = unknown or list(parts[-1:])  # a job has rows
        rows = [(part, pl.read_parquet(store.path(part.object))) for part in asked]
        scored = score(run, store, rows, {"champion": model}, {"champion": samples})["champion"]
        swapped = scored.swapped
        for part, found in zip(asked, _cut(scored.predicted, asked), strict=True):
            write_whole(files[part.identity], _npy(found))
    return {identity: np.load(file, allow_pickle=False) for identity, file in files.items()}, swapped


def _cut(predicted: np.ndarray, parts: Sequence[PartitionFile]) -> list[np.ndarray]:
    """Predictions of partitions in a row, one by one."""
    import numpy as np

    return np.split(predicted, np.cumsum([part.rows for part in parts])[:-1])


def _npy(array: np.ndarray) -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


# What a model leans on.


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows on which a model is asked what it leans on, and their partners; all with labels."""

    identity: str
    """Of the partitions and columns that it follows from."""
    rows: pl.DataFrame
    partners: pl.DataFrame
    """The columns that take part."""
    clusters: np.ndarray
    """(n,) the partition of each row."""


def sample(rows: Sequence[tuple[PartitionFile, pl.DataFrame]], target: str, columns: Collection[str]) -> Sample | None:
    """The rows of these partitions that are asked; None where no row has a label."""
    import numpy as np
    import polars as pl

    from evergreen.evaluation import importance

    table = pl.concat([frame for _, frame in rows], how="vertical_relaxed")
    clusters = np.repeat(np.arange(len(rows)), [frame.height for _, frame in rows])
    places = np.flatnonzero(labelled(table[target]))
    if not len(places):
        return None
    places = places[importance.sample(clusters[places])]
    asked = table[places]
    taken = [name for name in columns if name in table.columns]
    return Sample(
        identity=digest([[part.identity for part, _ in rows], taken]),
        rows=asked,
        partners=importance.partners(asked.select(taken)),
        clusters=clusters[places],
    )


def labelled(target: pl.Series) -> np.ndarray:
    """(n,) whether the label is there."""
    known = target.is_not_null() & target.is_not_nan() if target.dtype.is_float() else target.is_not_null()
    return known.to_numpy()


def importance_of(
    run: Run, asked: Sample, swapped: np.ndarray, metric: str, classes: Sequence[Any] | None
) -> tuple[Importance, ...]:
    """What the model leans on, from its predictions for a sample (`Scored.swapped`); the greatest first."""
    from evergreen.evaluation.importance import importance

    data = run.pack.data
    return importance(
        data.task,
        metric,
        asked.rows[data.target].to_numpy(),
        swapped[0],
        dict(zip(asked.partners.columns, swapped[1:], strict=True)),
        asked.clusters,
        confidence=run.pack.gate.primary.confidence,
        classes=classes,
    )


def importance_file(run: Run, model: Ref, parts: Sequence[PartitionFile], metric: str) -> Path:
    """Where this machine keeps what the model leans on in these partitions together."""
    about = [IMPORTANCE, metric, run.pack.gate.primary.confidence, [part.identity for part in parts]]
    return run.settings.cache / "importance" / model.hash / f"{digest(about)}.json"


def kept_importance(file: Path) -> tuple[Importance, ...] | None:
    """What is kept there; None where nothing is."""
    try:
        return tuple(Importance.model_validate(each) for each in json.loads(file.read_bytes()))
    except FileNotFoundError:
        return None


def keep_importance(file: Path, found: tuple[Importance, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps([each.model_dump() for each in found]).encode())


# Profiles.


def profile_of(
    run: Run,
    store: Store,
    window: Window,
    manifest: Manifest,
    predicted: Mapping[str, np.ndarray],
    classes: Sequence[Any] | None = None,
) -> Profile:
    """The profile of a window: its partitions' merged, with the predictions of those in `predicted`."""
    from evergreen.monitoring import profiles

    parts = []
    for part in manifest.within(window):
        found = _of_partition(run, store, part)
        if part.identity in predicted:
            column = _of_predictions(predicted[part.identity], classes)
            found = replace(found, columns={**found.columns, PREDICTION: column})
        parts.append(found)
    if not parts:
        none = {name: profiles.ColumnProfile(name, "null", rows=0, missing=0) for name in sorted(manifest.columns)}
        return profiles.Profile(columns=none, rows=0, start=window.start, end=window.end)
    return replace(profiles.merge(parts), start=window.start, end=window.end)


def _of_partition(run: Run, store: Store, part: PartitionFile) -> Profile:
    import polars as pl

    from evergreen.monitoring import profiles

    file = run.settings.cache / "profiles" / f"{part.identity}.{profiles.VERSION}"
    try:
        return profiles.Profile.from_bytes(file.read_bytes())
    except (FileNotFoundError, StoreError):
        end = step(part.period, run.pack.data.partition)
        found = profiles.profile(pl.read_parquet(store.path(part.object)), part.period, end)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, found.to_bytes())
        return found


def _of_predictions(predicted: np.ndarray, classes: Sequence[Any] | None) -> ColumnProfile:
    """Of classes, the likeliest of each row: a category."""
    import polars as pl

    from evergreen.monitoring import profiles

    values = pl.Series(PREDICTION, predicted) if predicted.ndim == 1 else _likeliest(predicted, classes)
    now = datetime.now(UTC)
    return profiles.profile(values.to_frame(), now, now).columns[PREDICTION]


def _likeliest(predicted: np.ndarray, classes: Sequence[Any] | None) -> pl.Series:
    import polars as pl

    names = [str(name) for name in (classes if classes is not None else range(predicted.shape[1]))]
    return pl.Series(PREDICTION, [names[place] for place in predicted.argmax(axis=1)], dtype=pl.String)


# What a version is compared with.


def windows_back(end: datetime, rules: DriftRules, data: Data, start: datetime) -> list[Window]:
    """Windows of the length that the monitor looks at, back to back, the newest first, none before `start`."""
    found = []
    while (begin := floor(end - rules.window, data.partition)) >= start:
        found.append(Window(start=begin, end=end))
        end = begin
    return found


def reference_of(
    run: Run,
    store: Store,
    manifest: Manifest,
    whole: Window,
    holdout: Window,
    predicted: np.ndarray,
    *,
    metric: str,
    figure: Estimate,
    importance: tuple[Importance, ...],
    classes: Sequence[Any] | None,
) -> tuple[Profile, Reference]:
    """The profile of all rows, with the predictions of the hold-out's; and how far its windows stray from it."""
    data = run.pack.data
    rules = run.pack.triggers.drift or DriftRules()
    parts = manifest.within(holdout)
    known = {part.identity: found for part, found in zip(parts, _cut(predicted, parts), strict=True)}
    reference = profile_of(run, store, whole, manifest, known, classes)
    usual = [
        compare(reference, profile_of(run, store, window, manifest, known, classes), rules, data)
        for window in windows_back(whole.end, rules, data, whole.start)
    ]
    about = Reference(
        metric=metric,
        figure=figure,
        classes=tuple(classes) if classes else None,
        usual=tuple(usual),
        importance=importance,
    )
    return reference, about
