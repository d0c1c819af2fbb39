"""What the chain and the monitor both look at: a model's predictions for partitions, what it leans on, how they lie.

All are functions of bytes that are named by their hash: of a model and a partition. What this machine made of them is
kept in its cache, which may vanish; so a new day costs a day.
"""

from __future__ import annotations

import io
import json
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evergreen import columns
from evergreen.data.store import Store
from evergreen.database import Database
from evergreen.errors import EvaluationError, JobError, RegistryError, StoreError
from evergreen.monitoring.drift import Drift, compare
from evergreen.pack import Data, DriftRules
from evergreen.registry import ledger
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import (
    Class,
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
    classes: tuple[Class, ...] | None
    """Of a multiclass model: its own, in the order of its predictions."""
    usual: tuple[Drift, ...]
    """Windows of the snapshot beside the whole of it, back to back, the newest first: how far they stray anyway."""
    importance: tuple[Importance, ...] = ()
    """On the hold-out; none of a version that was registered before there was any."""
    importance_note: str | None = None
    """Why it is not known, or not of every column."""


PROFILE = "profile.bin"
REFERENCE = "profile.json"
"""The artifacts of a version that hold them."""
IMPORTANCE = 1
"""Of the way importance is measured: what a machine keeps by an earlier one is not used."""


def model_of(version: ModelVersion) -> Ref:
    """The version's model folder in the store."""
    if version.model_hash is None:
        name, number = version.name, version.version
        raise RegistryError(
            f"{name} version {number} is champion, and Evergreen did not make it: nothing tells which rows it has seen",
            fix=f"put the champion before it back: evergreen rollback {name} --why …; or, where there was none, take the "
            f"alias off it: mlflow.MlflowClient().delete_registered_model_alias({name!r}, 'champion')",
        )
    return Ref(hash=version.model_hash, size=0)


def fetch_model(
    settings: Settings, database: Database, registry: Registry, name: str, version: int, destination: Path
) -> tuple[Path, str]:
    """Copy a version's model folder from MLflow, and compare it with its `register` event before anybody runs its code.

    Returns the folder and its hash. Raises RegistryError where a file was altered, added or removed.
    """
    folder = registry.folder(name, version, destination)
    expected, _ = ledger.registered(database, name, version)
    actual = Store(settings).hash_of(folder)
    if actual != expected:
        raise RegistryError(
            f"{name} version {version}: its model folder in MLflow is {actual}, and was {expected} when it was registered",
            fix="find out who altered the artifacts, and use another version until they are restored",
        )
    return folder, actual


# Predictions.


@dataclass(frozen=True, eq=False)
class Scored:
    """What a model's job left."""

    predictions: Ref
    predicted: np.ndarray
    """(n,), or (n, k) of k classes."""
    result: jobs.JobResult
    importance: tuple[Measured, ...]
    """On each sample."""


def score(
    run: Run,
    store: Store,
    parts: Sequence[PartitionFile],
    models: dict[str, Ref],
    samples: Mapping[str, Sequence[Sample]],
) -> dict[str, Scored]:
    """Predictions of each model on the same rows without the target, and its importance on its samples; one job each.

    `samples`: model → samples.
    """
    handles = {name: _start(run, store, parts, model, samples.get(name, ())) for name, model in models.items()}
    scored = {}
    for name, model in models.items():
        asked, died = samples.get(name, ()), None
        try:
            try:
                result = jobs.wait(handles[name])
            except JobError as error:
                if not asked:
                    raise
                # Importance may be what it died of, and no run fails for want of importance: once more without.
                died = f"the job died that was to measure it: {error.what.partition('; log: ')[0]}"
                handles[name] = _start(run, store, parts, model, ())
                result = jobs.wait(handles[name])
        except EvaluationError:  # its folder stays, with its log; of the others nobody will ask for the predictions
            for other, handle in handles.items():
                if other != name:
                    jobs.discard(run.settings, handle.spec.id)
            raise
        output = handles[name].output
        measured = tuple(
            Measured((), _unknown(died))
            if died
            else _measured(run, sample, output / "samples" / f"{place:05d}.npy", result.notes.get(f"{place:05d}"))
            for place, sample in enumerate(asked)
        )
        file = output / "predictions.parquet"
        scored[name] = Scored(store.put(file), predictions_in(file), result, measured)
    for handle in handles.values():
        jobs.discard(run.settings, handle.spec.id)
    return scored


def _start(
    run: Run, store: Store, parts: Sequence[PartitionFile], model: Ref, samples: Sequence[Sample]
) -> jobs.Handle:
    """Start, or adopt, the job that scores a model. One partition is in memory at a time."""
    what = {
        "model": model.hash,
        "rows": [part.object.hash for part in parts],
        "samples": [sample.identity for sample in samples],
        "run": run.id,
    }

    def fill(folder: Path) -> None:
        target = run.pack.data.target
        store.checkout(model, folder / "model")
        (folder / "rows").mkdir(parents=True)
        for part in parts:
            rows = columns.read(store.path(part.object), without=[target])
            rows.write_parquet(folder / "rows" / f"{part.period:%Y%m%dT%H}.parquet")
        for place, sample in enumerate(samples):
            inputs = folder / "samples" / f"{place:05d}"
            inputs.mkdir(parents=True)
            sample.rows[[name for name in sample.rows.columns if name != target]].write_parquet(inputs / "rows.parquet")
            told = {"columns": sample.columns, "partners": sample.partners.tolist(), "budget_s": sample.budget_s}
            (inputs / "sample.json").write_text(json.dumps(told), encoding="utf-8")

    return jobs.start(run.settings, job_spec(run, "score", job_id_of(run, "score", what)), fill)


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
        return pl.read_parquet(handle.output / "predictions.parquet", glob=False)
    except EvaluationError as error:
        raise EvaluationError(f"{what}: {error.what}", fix=error.fix) from error
    finally:
        jobs.discard(settings, spec.id)


def predictions_in(file: Path) -> np.ndarray:
    """(n,) of one `prediction` column, or (n, k) of `prediction_0` … `prediction_k-1`."""
    import polars as pl

    frame = pl.read_parquet(file, glob=False)
    return frame.to_numpy()[:, 0] if frame.width == 1 else frame.to_numpy()


def predictions(
    run: Run, store: Store, model: Ref, parts: Sequence[PartitionFile], samples: Sequence[Sample] = ()
) -> tuple[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]], tuple[Measured, ...]]:
    """The model's predictions for each partition, by its identity, and its importance on each sample.

    What this machine does not know of the first, and the second, by one job.
    """
    import numpy as np

    folder = run.settings.cache / "predictions" / model.hash
    folder.mkdir(parents=True, exist_ok=True)
    files = {part.identity: folder / f"{part.identity}.npy" for part in parts}
    unknown = [part for part in parts if not files[part.identity].is_file()]
    measured: tuple[Measured, ...] = ()
    if unknown or samples:
        asked = unknown or list(parts[-1:])  # a job has rows
        scored = score(run, store, asked, {"champion": model}, {"champion": samples})["champion"]
        measured = scored.importance
        for part, predicted in zip(asked, _cut(scored.predicted, asked), strict=True):
            write_whole(files[part.identity], _npy(predicted))
    return {identity: np.load(file, allow_pickle=False) for identity, file in files.items()}, measured


def _cut(predicted: np.ndarray, parts: Sequence[PartitionFile]) -> list[np.ndarray]:
    """Predictions of partitions in a row, one by one."""
    import numpy as np

    return np.split(predicted, np.cumsum([part.rows for part in parts])[:-1])


def _npy(array: np.ndarray) -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


# Importance.


IMPORTANCE_S = 300.0
"""How long measuring importance on one sample may take when a model is evaluated. The monitor gives it twice as long, so
that it gets as far with what it compares."""


SAMPLE = 2
"""Of the files by which a job is told what to permute, and answers."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows by which importance is measured; all with labels."""

    identity: str
    """Of the partitions and columns that it follows from."""
    rows: pl.DataFrame
    columns: tuple[str, ...]
    """Those that are permuted, one at a time."""
    partners: np.ndarray
    """(n,) the place of the row whose value each row gets."""
    clusters: np.ndarray
    """(n,) the partition of each row."""
    metric: str
    classes: Sequence[Any] | None
    """Of a multiclass target, in the order of the model's predictions."""
    budget_s: float


class Measured(NamedTuple):
    """The importance of a model's columns on a sample."""

    importance: tuple[Importance, ...]
    """The greatest first; of those columns that were measured."""
    note: str | None
    """Why it is not known, or not of every column; None where nothing kept it from being measured."""


def sample(
    run: Run,
    store: Store,
    parts: Sequence[PartitionFile],
    inputs: Collection[str],
    *,
    metric: str,
    classes: Sequence[Any] | None,
    budget_s: float,
) -> Sample | None:
    """A sample of the rows of these partitions, permuted by those of `inputs` that they have; None where no row has a label."""
    import numpy as np
    import polars as pl

    from evergreen.evaluation import importance

    target = run.pack.data.target
    files = [store.path(part.object) for part in parts]
    there = [labelled(columns.series(columns.read(file, [target]), target)) for file in files]
    clusters = np.repeat(np.arange(len(there)), [len(each) for each in there])
    places = np.flatnonzero(np.concatenate(there)) if there else np.empty(0, dtype=int)
    if not len(places):
        return None
    places = places[importance.sample(clusters[places])]
    starts = np.cumsum([0, *(len(each) for each in there)])
    rows = columns.stacked(
        [pl.read_parquet(file, glob=False)[places[clusters[places] == n] - starts[n]] for n, file in enumerate(files)]
    )
    permuted = tuple(name for name in inputs if name in rows.columns)
    return Sample(
        identity=digest([SAMPLE, [part.identity for part in parts], permuted]),
        rows=rows,
        columns=permuted,
        partners=importance.partners(rows.height),
        clusters=clusters[places],
        metric=metric,
        classes=classes,
        budget_s=budget_s,
    )


def labelled(target: pl.Series) -> np.ndarray:
    """(n,) whether the label is there."""
    known = target.is_not_null() & target.is_not_nan() if target.dtype.is_float() else target.is_not_null()
    return known.to_numpy()


def _measured(run: Run, sample: Sample, file: Path, note: str | None) -> Measured:
    """The importance that follows from a job's predictions for a sample, which are read one column at a time."""
    import numpy as np

    from evergreen.evaluation.importance import importance

    data = run.pack.data
    with file.open("rb") as stream:

        def shuffled() -> Iterator[tuple[str, np.ndarray]]:
            for name in sample.columns:
                try:
                    predicted = np.load(stream, allow_pickle=False)
                except EOFError:  # the job stopped here, and its note says why
                    return
                if predicted.size:
                    yield name, predicted

        try:
            found = importance(
                data.task,
                sample.metric,
                sample.rows[data.target].to_numpy(),
                np.load(stream, allow_pickle=False),
                shuffled(),
                sample.clusters,
                confidence=run.pack.gate.primary.confidence,
                classes=sample.classes,
            )
        except EOFError:
            found = ()
        except EvaluationError as error:
            return Measured((), _unknown(error.what))
    if note is None:
        return Measured(found, None)
    if not found:
        return Measured((), _unknown(note))
    known = f"{len(found):,} of {count(len(sample.columns), 'column')}".replace(",", " ")
    return Measured(found, f"importance is known of {known}: {note}")


def _unknown(why: str) -> str:
    return f"importance is not known: {why}"


def importance_file(run: Run, model: Ref, parts: Sequence[PartitionFile], metric: str) -> Path:
    """Where this machine keeps the model's importance in these partitions together."""
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
        profile = _of_partition(run, store, part)
        if part.identity in predicted:
            profile = replace(profile, predictions=_of_predictions(predicted[part.identity], classes))
        parts.append(profile)
    if not parts:
        none = {name: profiles.ColumnProfile(name, "null", rows=0, missing=0) for name in sorted(manifest.columns)}
        return profiles.Profile(columns=none, rows=0, start=window.start, end=window.end)
    return replace(profiles.merge(parts), start=window.start, end=window.end)


def _of_partition(run: Run, store: Store, part: PartitionFile) -> Profile:
    import polars as pl

    from evergreen.monitoring import profiles

    file = run.settings.cache / "profiles" / f"{part.identity}.{profiles.VERSION}"
    try:
        return profiles.Profile.from_file(file)
    except (FileNotFoundError, StoreError):
        end = step(part.period, run.pack.data.partition)
        found = profiles.profile(pl.read_parquet(store.path(part.object), glob=False), part.period, end)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, found.to_bytes())
        return found


def _of_predictions(predicted: np.ndarray, classes: Sequence[Any] | None) -> ColumnProfile:
    """Of classes, the likeliest of each row: a category."""
    import polars as pl

    from evergreen.monitoring import profiles

    values = pl.Series(predicted) if predicted.ndim == 1 else _likeliest(predicted, classes)
    return profiles.column_profile(values.rename(profiles.PREDICTIONS))


def _likeliest(predicted: np.ndarray, classes: Sequence[Any] | None) -> pl.Series:
    import polars as pl

    names = [str(name) for name in (classes if classes is not None else range(predicted.shape[1]))]
    return pl.Series([names[place] for place in predicted.argmax(axis=1)], dtype=pl.String)


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
    importance_note: str | None,
    classes: Sequence[Any] | None,
) -> tuple[Profile, Reference]:
    """The profile of all rows, with the predictions of the hold-out's; and how far its windows stray from it."""
    data = run.pack.data
    rules = run.pack.triggers.drift or DriftRules()
    parts = manifest.within(holdout)
    known = {part.identity: found for part, found in zip(parts, _cut(predicted, parts), strict=True)}
    reference = profile_of(run, store, whole, manifest, known, classes)
    usual = [
        compare(reference, profile_of(run, store, window, manifest, known, classes), rules, data, classes=classes)
        for window in windows_back(whole.end, rules, data, whole.start)
    ]
    about = Reference(
        metric=metric,
        figure=figure,
        classes=tuple(classes) if classes else None,
        usual=tuple(usual),
        importance=importance,
        importance_note=importance_note,
    )
    return reference, about
