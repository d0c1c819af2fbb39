"""What the chain and the monitor both look at: a model's predictions for partitions, and how partitions lie.

Both are functions of bytes that are named by their hash: of a model and a partition. What this machine made of them is
kept in its cache, which may vanish; so a new day costs a day.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen.data.store import Store
from evergreen.errors import EvaluationError, RegistryError, StoreError
from evergreen.monitoring.drift import PREDICTION, Drift, compare
from evergreen.pack import Data, DriftRules
from evergreen.registry.models import ModelVersion
from evergreen.run import Estimate, Manifest, PartitionFile, Ref, Run, Value, Window, floor, step
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


PROFILE = "profile.bin"
REFERENCE = "profile.json"
"""The artifacts of a version that hold them."""


def model_of(version: ModelVersion) -> Ref:
    """The version's model folder in the store."""
    if version.model_hash is None:
        raise RegistryError(
            f"{version.name} version {version.version} is champion, and Evergreen did not make it",
            fix="put the alias champion back on a version that `evergreen runs` lists",
        )
    return Ref(hash=version.model_hash, size=0)


# Predictions.


def score(
    run: Run, store: Store, rows: list[tuple[PartitionFile, pl.DataFrame]], models: dict[str, Ref]
) -> dict[str, tuple[Ref, np.ndarray, jobs.JobResult]]:
    """Predictions of each model on the same rows without the target: one job each, side by side."""
    pack = run.pack
    handles = {}

    def fill_with(model: Ref) -> Callable[[Path], None]:
        def fill(folder: Path) -> None:
            store.checkout(model, folder / "model")
            (folder / "rows").mkdir(parents=True)
            for part, frame in rows:
                frame.drop(pack.data.target).write_parquet(folder / "rows" / f"{part.period:%Y%m%dT%H}.parquet")

        return fill

    for name, model in models.items():
        parts = {"model": model.hash, "rows": [part.object.hash for part, _ in rows], "run": run.id}
        spec = job_spec(run, "score", job_id_of(run, "score", parts))
        handles[name] = jobs.start(run.settings, spec, fill_with(model))
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
        ref = store.put(file)
        scored[name] = (ref, predictions_in(file), result)
    store.push([ref for ref, _, _ in scored.values()])
    for handle in handles.values():
        jobs.discard(run.settings, handle.spec.id)
    return scored


def predictions_in(file: Path) -> np.ndarray:
    """(n,) of one `prediction` column, or (n, k) of `prediction_0` … `prediction_k-1`."""
    import polars as pl

    frame = pl.read_parquet(file)
    return frame.to_numpy()[:, 0] if frame.width == 1 else frame.to_numpy()


def predictions(
    run: Run, store: Store, model: Ref, parts: Sequence[PartitionFile]
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    """The model's predictions for each partition, by its identity: what this machine does not know, by one job."""
    import numpy as np
    import polars as pl

    folder = run.settings.cache / "predictions" / model.hash
    folder.mkdir(parents=True, exist_ok=True)
    files = {part.identity: folder / f"{part.identity}.npy" for part in parts}
    unknown = [part for part in parts if not files[part.identity].is_file()]
    if unknown:
        rows = [(part, pl.read_parquet(store.path(part.object))) for part in unknown]
        _, predicted, _ = score(run, store, rows, {"champion": model})["champion"]
        for part, found in zip(unknown, _cut(predicted, unknown), strict=True):
            write_whole(files[part.identity], _npy(found))
    return {identity: np.load(file, allow_pickle=False) for identity, file in files.items()}


def _cut(predicted: np.ndarray, parts: Sequence[PartitionFile]) -> list[np.ndarray]:
    """Predictions of partitions in a row, one by one."""
    import numpy as np

    return np.split(predicted, np.cumsum([part.rows for part in parts])[:-1])


def _npy(array: np.ndarray) -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


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
    about = Reference(metric=metric, figure=figure, classes=tuple(classes) if classes else None, usual=tuple(usual))
    return reference, about
