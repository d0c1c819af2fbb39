"""Where the rooms meet, 1: the seven stages of the chain, in order. Values in, value out; callable in a REPL.

Each stage is performed through `keys.perform`: looked up by its key, done only when it must be, recorded last. What a
stage does not cover: waiting, retrying and scheduling are Airflow's; showing is the CLI's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evergreen import database as db
from evergreen.data import partitions, sources, validation
from evergreen.data.store import Store
from evergreen.errors import EvaluationError, RegistryError, SourceError, StageError, StaleDataError
from evergreen.evaluation import gate, plots, significance, slices
from evergreen.keys import code_hash, note, perform
from evergreen.pack import TASK_METRICS, Pack, PythonSource
from evergreen.registry import lineage, promotion
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import (
    Difference,
    Evaluated,
    Evaluation,
    Ingested,
    Manifest,
    PartitionFile,
    Promoted,
    Ref,
    Registered,
    Run,
    Snapshot,
    Trained,
    Validated,
    Value,
    Verdict,
    Window,
    Windows,
    count,
    digest,
    period_name,
    step,
)
from evergreen.settings import Settings
from evergreen.training import jobs

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

PACKAGE = Path(__file__).parent


def ingest(run: Run) -> Ingested:
    """Read the source up to as-of and put canonical partitions into the store.

    Reading a source is an observation: its key holds the run, so every run looks once, and only once. Partitions
    known from an earlier look at the same source are read again within `lookback` only.
    """
    pack, store = run.pack, Store(run.settings)
    source = {"source": pack.source.model_dump(mode="json"), "data": _reading(pack), "code": pack.code_hash}
    inputs = {"run": run.id, "as_of": run.as_of.isoformat(), "source": digest(source)}

    def act() -> Ingested:
        windows = Windows.ending(run.as_of, pack.data)
        known = _known_manifest(run, inputs["source"], store)
        manifest, late, unchanged = _observe(run, store, known, windows.whole)
        note_text = None
        until = _data_until(run, manifest)
        if until < run.as_of:
            # The source ends before as-of: the windows end where it ends, so they reach further back.
            windows = Windows.ending(until, pack.data)
            manifest, late_before, unchanged = _observe(run, store, manifest, windows.whole)
            late = tuple(sorted({*late, *late_before}))
            note_text = f"the data ends at {until:%Y-%m-%d %H:%M}, before as-of {run.as_of:%Y-%m-%d %H:%M}"
        _require_rows(run, manifest, windows)
        ref = store.put_json(manifest.model_dump(mode="json"))
        store.push([part.object for part in manifest.partitions] + [ref])
        return Ingested(
            manifest=ref,
            rows=manifest.rows,
            partitions=len(manifest.partitions),
            known=unchanged,
            late=late,
            data_until=until,
            windows=windows,
            note=note_text,
        )

    return perform(
        run,
        "ingest",
        result=Ingested,
        inputs=inputs,
        code=_code("data/sources.py", "data/partitions.py"),
        act=act,
        outputs=lambda value: _with_partitions(store, value.manifest),
        intact=store.verify,
    )


def validate(run: Run, ingested: Ingested) -> Validated:
    """Run Great Expectations over what is new; set bad rows aside; stop the run when too much is wrong."""
    pack, store = run.pack, Store(run.settings)
    suite = validation.suite_hash(pack.expectations)

    def act() -> Validated:
        manifest = manifest_of(store, ingested.manifest)
        with _work(run) as folder:
            outcome = validation.validate(pack, manifest, store, _known_records(run, suite, store), folder)
        if (error := outcome.error()) is not None:
            raise error
        return outcome.validated

    return perform(
        run,
        "validate",
        result=Validated,
        inputs={"manifest": ingested.manifest.hash},
        parameters={"suite": suite, "quarantine": pack.data.quarantine},
        code=_code("data/validation.py"),
        act=act,
        outputs=lambda value: [
            *_with_partitions(store, value.manifest),
            value.result,
            value.records,
            *([value.quarantine] if value.quarantine else []),
        ],
        intact=store.verify,
    )


def snapshot(run: Run, ingested: Ingested, validated: Validated) -> Snapshot:
    """Name the clean partitions as an immutable DVC version; the run speaks of it from here on."""
    pack, store = run.pack, Store(run.settings)

    def act() -> Snapshot:
        manifest = manifest_of(store, validated.manifest)
        files = {f"{period_name(part.period, manifest.partition)}.parquet": part.object for part in manifest.partitions}
        commit = store.commit(
            pack.dataset,
            files,
            tag_time=ingested.data_until,
            message=f"{pack.dataset} until {ingested.data_until:%Y-%m-%d %H:%M}: "
            f"{count(manifest.rows, 'row')} in {count(len(files), 'partition')}",
        )
        return Snapshot(
            dataset=pack.dataset,
            repository=run.settings.data_repository,
            revision=commit.revision,
            tag=commit.tag,
            hash=commit.hash,
            manifest=validated.manifest,
            rows=manifest.rows,
            bytes=manifest.bytes,
            partitions=len(files),
            windows=ingested.windows,
            data_until=ingested.data_until,
        )

    return perform(
        run,
        "snapshot",
        result=Snapshot,
        inputs={"manifest": validated.manifest.hash},
        parameters={"repository": run.settings.data_repository},
        code=_code("data/store.py"),
        act=act,
        outputs=lambda value: [Ref(hash=value.hash, size=value.bytes)],
        intact=store.verify,
    )


def train(run: Run, snapshot: Snapshot) -> Trained:
    """Start, or adopt, the training job for the snapshot, and wait for its model folder."""
    pack, store = run.pack, Store(run.settings)
    manifest = manifest_of(store, snapshot.manifest)
    parameters = {
        "call": pack.training.call,
        "params": pack.training.params,
        "seed": pack.training.seed,
        "gpus": pack.training.gpus,
        "target": pack.data.target,
        "event_time": pack.data.event_time,
        "task": pack.data.task,
    }
    code = _code("training/*.py", "training/runtimes/*.py", "runner.py", pack=pack)
    inputs = {"data": snapshot.hash, "windows": snapshot.windows.model_dump(mode="json")}
    job_id = _job_id(run, "train", {**parameters, **inputs, "code": code_hash(code)})
    spec = job_spec(run, "train", job_id, call=pack.training.call)

    def fill(folder: Path) -> None:
        copy_python(pack, folder)
        for name, window in (("train", snapshot.windows.train), ("validation", snapshot.windows.validation)):
            _lay_out(store, manifest.within(window), folder / name)

    def act() -> Trained:
        result = _finish_job(run, "train", spec, fill)
        folder = run.settings.jobs / spec.id
        model = store.put(folder / "output" / "model")
        curve = store.put(folder / "progress.jsonl") if (folder / "progress.jsonl").exists() else None
        log = store.put(folder / "log.txt")
        store.push([model, log, *([curve] if curve else [])])
        return Trained(
            job=spec.id,
            model=model,
            task=pack.data.task,
            inputs=result.inputs,
            requirements=result.requirements,
            windows=snapshot.windows,
            snapshot=snapshot.hash,
            params=pack.training.params,
            seed=pack.training.seed,
            metrics=result.metrics,
            curve=curve,
            log=log,
            hardware=result.hardware,
            duration_s=result.duration_s,
        )

    trained = perform(
        run,
        "train",
        result=Trained,
        inputs=inputs,
        parameters=parameters,
        code=code,
        act=act,
        outputs=lambda value: [value.model, value.log, *([value.curve] if value.curve else [])],
        intact=store.verify,
    )
    jobs.discard(run.settings, spec.id)
    return trained


def evaluate(run: Run, snapshot: Snapshot, trained: Trained) -> Evaluated:
    """Score challenger and champion on the same held-out rows, each in a fresh process through its own model folder.

    A champion that is this very model is not compared with itself.
    """
    pack, store = run.pack, Store(run.settings)
    registry = Registry(run.settings)
    champion = registry.champion(pack.name)
    if champion is not None and champion.model_hash == trained.model.hash:
        champion = None
    holdout = snapshot.windows.holdout
    withheld = _withheld(registry, champion, holdout)

    def act() -> Evaluated:
        rows = _holdout_rows(store, manifest_of(store, snapshot.manifest), holdout)
        models = {"challenger": trained.model}
        if champion is not None and withheld is None:
            models["champion"] = _model_of(champion)
        with _work(run) as folder:
            scored = _score(run, store, rows, models)
            classes = _classes(run, store, snapshot)
            return _compare(run, store, rows, scored, champion, trained, withheld, classes, folder)

    return perform(
        run,
        "evaluate",
        result=Evaluated,
        inputs={
            "model": trained.model.hash,
            "data": snapshot.hash,
            "holdout": holdout.model_dump(mode="json"),
            "champion": champion.model_hash if champion else None,
            "withheld": withheld,
        },
        parameters={
            "slices": [rule.model_dump(mode="json") for rule in pack.gate.slices],
            "confidence": pack.gate.primary.confidence,
            "task": pack.data.task,
        },
        code=_code("evaluation/*.py", "runner.py"),
        act=act,
        outputs=lambda value: [
            ref
            for ref in (
                value.challenger.predictions,
                value.champion.predictions if value.champion else None,
                value.plots,
            )
            if ref is not None
        ],
        intact=store.verify,
    )


def register(
    run: Run, ingested: Ingested, validated: Validated, snapshot: Snapshot, trained: Trained, evaluated: Evaluated
) -> Registered:
    """Create the MLflow version, with all that made it written on it; or find that this very model is there already."""
    pack, store = run.pack, Store(run.settings)
    registry = Registry(run.settings)
    version_key = digest({"model": trained.model.hash, "snapshot": snapshot.hash})

    def act() -> Registered:
        found = registry.find(pack.name, version_key)
        if found is not None:
            return Registered(
                model=pack.name,
                version=found.version,
                mlflow_run=found.run_id,
                model_hash=trained.model.hash,
                new=False,
            )
        made_by = lineage.lineage(
            run=run,
            code=lineage.code(run.settings),
            environment=lineage.environment(run.settings),
            validated=validated,
            snapshot=snapshot,
            trained=trained,
            evaluated=evaluated,
        )
        with _work(run) as folder:
            store.checkout(trained.model, folder / "model")
            version, mlflow_run = registry.register(
                pack.name,
                folder / "model",
                key=version_key,
                run_name=run.slug,
                lineage=made_by,
                model_hash=trained.model.hash,
                metrics={name: estimate.value for name, estimate in evaluated.challenger.metrics.items()},
                curve=_curve(store, trained.curve),
                artifacts=_artifacts(store, pack, validated, evaluated, trained, folder / "artifacts"),
                input_example=_example(store, snapshot, trained),
                tags={"evergreen.owner": pack.owner},
                description=pack.description,
            )
        return Registered(model=pack.name, version=version, mlflow_run=mlflow_run, model_hash=trained.model.hash)

    # The key holds the MLflow server, whose answer an earlier run's event cannot vouch for: see `intact`.
    registered = perform(
        run,
        "register",
        result=Registered,
        inputs={"model": trained.model.hash, "data": snapshot.hash, "registry": run.settings.mlflow_tracking_uri},
        code=_code("registry/models.py", "registry/entry.py", "registry/lineage.py"),
        act=act,
        outputs=lambda _value: [trained.model],
        intact=lambda _ref: registry.find(pack.name, version_key) is not None,
    )
    return registered


def promote(run: Run, snapshot: Snapshot, trained: Trained, evaluated: Evaluated, registered: Registered) -> Promoted:
    """Ask the gate, and move the alias when it says so. Its key holds the run: the registry is outside of us."""
    pack = run.pack
    database = db.connect(run.settings.database_url)
    registry = Registry(run.settings)

    def act() -> Promoted:
        promotion.settle(database, registry, pack.name)
        champion = registry.champion(pack.name)
        previous = champion.version if champion else None
        if champion is not None and champion.version == registered.version:
            verdict = Verdict(
                decision="promote",
                reasons=("nothing new to learn: the same data, code and parameters made it before",),
            )
            after: int | None = previous
        else:
            verdict = _verdict(run, database, evaluated, registered, champion)
            after = promotion.promote(
                database, registry, run=run, version=registered.version, judged_against=previous, verdict=verdict
            )
        return Promoted(model=pack.name, version=registered.version, verdict=verdict, champion=after, previous=previous)

    return perform(
        run,
        "promote",
        result=Promoted,
        inputs={"run": run.id, "version": registered.version, "evaluated": digest(evaluated)},
        parameters={"rules": pack.gate.model_dump(mode="json")},
        code=_code("evaluation/gate.py", "registry/promotion.py"),
        act=act,
        outputs=lambda _value: [],
        intact=lambda _ref: True,
    )


def _verdict(
    run: Run, database: db.Database, evaluated: Evaluated, registered: Registered, champion: ModelVersion | None
) -> Verdict:
    """The gate's verdict, written down with all it saw before anything is done about it; a retry keeps it."""
    pack = run.pack
    saw = {
        "version": registered.version,
        "champion": champion.version if champion else None,
        "rules": pack.gate.model_dump(mode="json"),
        "evaluated": evaluated.model_dump(mode="json"),
        "challenger_as_of": run.as_of.isoformat(),
        "champion_as_of": _as_of(champion).isoformat() if champion else None,
    }
    before = database.latest(pack.name, kind="verdict", run_id=run.id)
    if before is not None and before.body["saw"] == saw:
        return Verdict.model_validate(before.body["verdict"])
    verdict = gate.decide(
        evaluated,
        pack.gate,
        challenger_as_of=run.as_of,
        champion_as_of=_as_of(champion) if champion else None,
    )
    database.append(pack.name, "verdict", {"saw": saw, "verdict": verdict.model_dump(mode="json")}, run_id=run.id)
    return verdict


CHAIN: dict[str, Callable[..., Value]] = {
    "ingest": ingest,
    "validate": validate,
    "snapshot": snapshot,
    "train": train,
    "evaluate": evaluate,
    "register": register,
    "promote": promote,
}
"""The stages in order. Each takes the run and, by type, values of earlier stages."""


def _code(*patterns: str, pack: Pack | None = None) -> tuple[Path, ...]:
    """The package's source files that a stage runs, and the pack's when it runs those."""
    files = [file for pattern in patterns for file in PACKAGE.glob(pattern)]
    return tuple(sorted(files)) + (pack.python_files if pack else ())


@contextmanager
def _work(run: Run) -> Iterator[Path]:
    """A folder for the length of a stage, on the disk of the jobs so that links work."""
    run.settings.jobs.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"stage-{run.slug}-", dir=run.settings.jobs))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def manifest_of(store: Store, ref: Ref) -> Manifest:
    """The manifest that `ref` is."""
    return Manifest.model_validate(store.read_json(ref))


def _with_partitions(store: Store, manifest: Ref) -> list[Ref]:
    """The manifest and every partition it names; the manifest alone when it cannot be read."""
    if not store.verify(manifest):
        return [manifest]
    return [manifest, *(part.object for part in manifest_of(store, manifest).partitions)]


def _reading(pack: Pack) -> dict[str, Any]:
    """What of `data` decides how rows become partitions."""
    return {"event_time": pack.data.event_time, "target": pack.data.target, "partition": pack.data.partition}


def _known_manifest(run: Run, source: str, store: Store) -> Manifest | None:
    """What the newest earlier look at the same source saw, if that look's as-of was not after this one's."""
    database = db.connect(run.settings.database_url)
    for event in database.events(run.pack.name, kind="stage", newest_first=True):
        parts = event.body["parts"]
        if event.body["stage"] != "ingest" or parts["inputs"]["source"] != source:
            continue
        if datetime.fromisoformat(parts["inputs"]["as_of"]) <= run.as_of and not run.force:
            ref = Ref.model_validate(event.body["value"]["manifest"])
            if store.verify(ref):
                return manifest_of(store, ref)
    return None


def _observe(
    run: Run, store: Store, known: Manifest | None, window: Window
) -> tuple[Manifest, tuple[datetime, ...], int]:
    """Read what is not known of `window`, and what may have late rows; → manifest, late periods, partitions unchanged."""
    data = run.pack.data
    to_read = partitions.to_read(known, window, data.partition, data.lookback)
    written: list[PartitionFile] = []
    columns: dict[str, str] = {}
    with _work(run) as folder:
        for index, part in enumerate(to_read):
            out = folder / f"partitions-{index}"
            read = partitions.write(
                _frames(run, part),
                window=part,
                partition=data.partition,
                event_time=data.event_time,
                target=data.target,
                folder=out,
                origin=f"pack {run.pack.name}: source {run.pack.source.kind}",
            )
            columns = columns or read.columns
            written += [
                PartitionFile(period=file.period, rows=file.rows, identity=file.identity, object=store.put(file.path))
                for file in read.files
            ]
    return partitions.merge(
        known, written, columns, to_read, window, dataset=run.pack.dataset, partition=data.partition
    )


def _frames(run: Run, window: Window) -> Iterator[pl.DataFrame]:
    """The source's rows within `window`; a Python source is read by a job of its own."""
    pack = run.pack
    if not isinstance(pack.source, PythonSource):
        yield from sources.open_source(pack.source, pack.folder).read(window, pack.data.event_time)
        return
    job_id = _job_id(run, "read", {"run": run.id, "window": window.model_dump(mode="json"), "code": pack.code_hash})
    spec = job_spec(run, "read", job_id, call=pack.source.call, window=window)
    _finish_job(run, "ingest", spec, lambda folder: copy_python(pack, folder))
    yield from sources.frames(run.settings.jobs / spec.id / "output" / "frames")
    jobs.discard(run.settings, spec.id)


def _data_until(run: Run, manifest: Manifest) -> datetime:
    """The end of the last period with rows. Raises when there is none, or when it is too old."""
    pack = run.pack
    if not manifest.partitions:
        window = Windows.ending(run.as_of, pack.data).whole
        raise SourceError(
            f"pack {pack.name}: the source has no rows in {window}, the window before as-of",
            fix="check source and event_time in pack.yaml, or give another --as-of",
        )
    until = step(manifest.partitions[-1].period, pack.data.partition)
    if run.as_of - until > pack.data.max_staleness:
        age = run.as_of - until
        raise StaleDataError(
            f"pack {pack.name}: the newest data ends at {until:%Y-%m-%d %H:%M}, {age.days} days before as-of "
            f"{run.as_of:%Y-%m-%d %H:%M}; data.max_staleness is {pack.data.max_staleness.days} days",
            fix="bring newer data, give an earlier --as-of, or raise data.max_staleness in pack.yaml",
        )
    return min(until, run.as_of)


def _require_rows(run: Run, manifest: Manifest, windows: Windows) -> None:
    for name in ("train", "validation", "holdout"):
        window: Window = getattr(windows, name)
        if not manifest.within(window):
            raise SourceError(
                f"pack {run.pack.name}: the {name} window {window} is empty; the source has rows in "
                f"{count(len(manifest.partitions), 'partition')}, the first at {manifest.partitions[0].period:%Y-%m-%d}",
                fix=f"give a later --as-of, or shorten data.{name} or data.train in pack.yaml",
            )


def _known_records(run: Run, suite: str, store: Store) -> dict[str, Any]:
    """What the newest validation under the same suite found, by partition identity; empty when there is none."""
    database = db.connect(run.settings.database_url)
    for event in database.events(run.pack.name, kind="stage", newest_first=True):
        if event.body["stage"] == "validate" and event.body["parts"]["parameters"]["suite"] == suite:
            ref = Ref.model_validate(event.body["value"]["records"])
            if not run.force and store.verify(ref):
                return validation.records(store.read_json(ref))
            break
    return {}


def _job_id(run: Run, kind: str, parts: dict[str, Any]) -> str:
    """A job's id follows from what it does, so that a retry finds it. A forced run's jobs are its own."""
    own = {"force": run.id} if run.force else {}
    return f"{kind}-{run.pack.name}-{digest({**parts, **own})[:16]}"


def job_spec(run: Run, kind: Literal["read", "train", "score"], job_id: str, **more: Any) -> jobs.JobSpec:
    """What a job of this run's pack is told."""
    pack = run.pack
    return jobs.JobSpec(
        id=job_id,
        kind=kind,
        pack=pack.name,
        target=pack.data.target,
        event_time=pack.data.event_time,
        task=pack.data.task,
        params=pack.training.params,
        seed=pack.training.seed,
        gpus=pack.training.gpus,
        timeout_s=pack.training.timeout.total_seconds(),
        **more,
    )


def copy_python(pack: Pack, folder: Path) -> None:
    """The pack's Python, for a job to import."""
    target = folder / "pack"
    target.mkdir(parents=True)
    for file in pack.python_files:
        shutil.copyfile(file, target / file.name)


def _lay_out(store: Store, parts: Iterable[PartitionFile], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        store.checkout(part.object, folder / f"{part.period:%Y%m%dT%H}.parquet")


def _finish_job(run: Run, stage: str, spec: jobs.JobSpec, fill: Callable[[Path], None]) -> jobs.JobResult:
    """Start or adopt the job, wait for it, and tell how it gets on."""

    def tell(progress: jobs.Progress) -> None:
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(progress.metrics.items())[:4])
        left = f"  {progress.eta_s:.0f} s left" if progress.eta_s is not None else ""
        note(
            run, stage, "progress", f"step {progress.step} of {progress.of}  {shown}{left}", fraction=progress.fraction
        )

    return jobs.wait(jobs.start(run.settings, spec, fill), tell)


def _withheld(registry: Registry, champion: ModelVersion | None, holdout: Window) -> str | None:
    """Why the champion's figures would not be honest: law 5, no model is scored on rows it has seen."""
    if champion is None:
        return None
    windows = Windows.model_validate(registry.lineage(champion.name, champion.version)["windows"])
    seen = Window(start=windows.train.start, end=windows.validation.end)
    if not seen.overlaps(holdout):
        return None
    return f"version {champion.version} was made with rows of {seen}, which overlaps the hold-out {holdout}"


def _model_of(champion: ModelVersion) -> Ref:
    """The champion's model folder in the store."""
    if champion.model_hash is None:
        raise RegistryError(
            f"{champion.name} version {champion.version} is champion, and Evergreen did not make it",
            fix="put the alias champion back on a version that `evergreen runs` lists",
        )
    return Ref(hash=champion.model_hash, size=0)


def _as_of(champion: ModelVersion) -> datetime:
    return datetime.fromisoformat(champion.tags["evergreen.as_of"])


def _holdout_rows(store: Store, manifest: Manifest, holdout: Window) -> list[tuple[PartitionFile, pl.DataFrame]]:
    import polars as pl

    return [(part, pl.read_parquet(store.path(part.object))) for part in manifest.within(holdout)]


def _score(
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
        spec = job_spec(run, "score", _job_id(run, "score", parts))
        handles[name] = jobs.start(run.settings, spec, fill_with(model))
    scored = {}
    for name, handle in handles.items():
        result = jobs.wait(handle)
        file = handle.output / "predictions.parquet"
        ref = store.put(file)
        scored[name] = (ref, predictions_in(file), result)
    store.push([ref for ref, _, _ in scored.values()])
    for handle in handles.values():
        jobs.discard(run.settings, handle.spec.id)
    return scored


def _classes(run: Run, store: Store, snapshot: Snapshot) -> list[Any] | None:
    """The classes of a multiclass target, sorted: those of the training window, in the order of the predictions."""
    import polars as pl

    data = run.pack.data
    if data.task != "multiclass":
        return None
    parts = manifest_of(store, snapshot.manifest).within(snapshot.windows.train)
    seen = pl.concat([pl.read_parquet(store.path(part.object), columns=[data.target]) for part in parts])
    return sorted(seen[data.target].unique().to_list())


def predictions_in(file: Path) -> np.ndarray:
    """(n,) of one `prediction` column, or (n, k) of `prediction_0` … `prediction_k-1`."""
    import polars as pl

    frame = pl.read_parquet(file)
    return frame.to_numpy()[:, 0] if frame.width == 1 else frame.to_numpy()


def _compare(
    run: Run,
    store: Store,
    rows: list[tuple[PartitionFile, pl.DataFrame]],
    scored: dict[str, tuple[Ref, np.ndarray, jobs.JobResult]],
    champion: ModelVersion | None,
    trained: Trained,
    withheld: str | None,
    classes: list[Any] | None,
    folder: Path,
) -> Evaluated:
    """Figures, slices and differences from predictions that are there already."""
    import numpy as np
    import polars as pl

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
        ref, predicted, result = scored[name]
        return Evaluation(
            model=model,
            version=version,
            rows=table.height,
            metrics=significance.intervals(task, truth, predicted, **how),
            slices=slices.estimates(pack.gate, task, truth, predicted, columns=groups, **how),
            latency_p95_ms=result.metrics.get("latency_p95_ms"),
            size_bytes=size,
            predictions=ref,
        )

    challenger = evaluation("challenger", trained.model.hash, None, trained.model.size)
    incumbent = None
    differences: tuple[Any, ...] = ()
    if champion is not None and withheld is not None:
        incumbent = Evaluation(
            model=_model_of(champion).hash, version=champion.version, rows=table.height, size_bytes=0, withheld=withheld
        )
    elif champion is not None:
        model = _model_of(champion)
        size = sum(ref.size for ref in store.listing(model).values())
        incumbent = evaluation("champion", model.hash, champion.version, size)
        pair = (scored["challenger"][1], scored["champion"][1])
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
    plots.draw(task, truth, {name: predicted for name, (_, predicted, _) in scored.items()}, drawn)
    figures = store.put(drawn)
    store.push([figures])
    return Evaluated(
        challenger=challenger,
        champion=incumbent,
        differences=differences,
        confidence=pack.gate.primary.confidence,
        holdout=Window(start=rows[0][0].period, end=step(rows[-1][0].period, pack.data.partition)),
        plots=figures,
    )


def _artifacts(
    store: Store, pack: Pack, validated: Validated, evaluated: Evaluated, trained: Trained, folder: Path
) -> dict[str, Path]:
    """What goes with the version beside the model: GX's result, the evaluation, the log, the model card, the figures."""
    folder.mkdir()
    store.checkout(validated.result, folder / "validation.json")
    store.checkout(trained.log, folder / "training.log")
    (folder / "evaluation.json").write_text(evaluated.model_dump_json(indent=2), encoding="utf-8")
    (folder / "model_card.md").write_text(pack.card, encoding="utf-8")
    found = {file.name: file for file in sorted(folder.iterdir())}
    if evaluated.plots is not None:
        store.checkout(evaluated.plots, folder / "plots")
        found["plots"] = folder / "plots"
    return found


def _curve(store: Store, ref: Ref | None) -> list[dict[str, Any]]:
    """The training curve: a `step` and its metrics in each entry."""
    lines = [json.loads(line) for line in store.read_bytes(ref).splitlines()] if ref else []
    return [{"step": line["step"], **line["metrics"]} for line in lines]


def _example(store: Store, snapshot: Snapshot, trained: Trained) -> Any:
    """Five raw rows as a pandas frame: the version's input example."""
    import polars as pl

    first = manifest_of(store, snapshot.manifest).partitions[0]
    return pl.read_parquet(store.path(first.object)).head(5).select(list(trained.inputs)).to_pandas()


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
        described = json.loads((model / "model.json").read_text(encoding="utf-8"))
        missing = sorted(set(described["inputs"]) - set(rows.columns))
        if missing:
            raise EvaluationError(
                f"{file} lacks {count(len(missing), 'column')} that {version.name} takes: {', '.join(missing[:5])}",
                fix=f"it takes: {', '.join(described['inputs'])}",
            )
        spec = jobs.JobSpec(
            id=f"predict-{version.name}-{digest([str(file), version.version, os.getpid(), time.time_ns()])[:16]}",
            kind="score",
            pack=version.name,
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


def build_docs(settings: Settings, pack: Pack, folder: Path) -> Path:
    """Great Expectations' Data Docs of the pack's last validation; → its index.html."""
    event = next(
        (
            event
            for event in db.connect(settings.database_url).events(pack.name, kind="stage", newest_first=True)
            if event.body["stage"] == "validate"
        ),
        None,
    )
    if event is None:
        raise StageError(f"pack {pack.name} has not been validated yet", fix=f"evergreen run {pack.name}")
    value = Validated.model_validate(event.body["value"])
    return validation.docs(pack, Store(settings).read_json(value.result), folder)
