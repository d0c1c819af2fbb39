"""Where the rooms meet, 1: the seven stages of the chain, in order. Values in, value out; callable in a REPL.

Each stage is performed through `keys.perform`: looked up by its key, done only when it must be, recorded last. What a
stage does not cover: waiting, retrying and scheduling are Airflow's; showing is the CLI's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from evergreen import database as db
from evergreen import looks, reports
from evergreen.data import partitions, validation
from evergreen.data.store import Store
from evergreen.errors import StageError
from evergreen.evaluation import gate
from evergreen.evaluation.report import description
from evergreen.keys import WATCH, code_hash, note, perform, recorded
from evergreen.pack import CsvSource, GateRules, Pack
from evergreen.registry import approval, ledger, lineage, promotion
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import (
    Evaluated,
    Ingested,
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
    Windows,
    count,
    digest,
    period_name,
)
from evergreen.settings import Settings
from evergreen.stages import judging, reading, scoring
from evergreen.training import jobs
from evergreen.work import (
    checkpoint,
    container_of,
    copy_python,
    finish_job,
    job_id_of,
    job_spec,
    manifest_of,
    work_folder,
)

PACKAGE = Path(__file__).parents[1]


@recorded
def ingest(run: Run) -> Ingested:
    """Read the source up to as-of and put canonical partitions into the store.

    Reading a source is an observation, so the key holds the run and the number of its look. A run keeps the rows of its
    look once they are accepted; where `validate` or `snapshot` failed on them, a cleared run looks again. Partitions
    known from an earlier look at the same source are read again within `lookback` only.
    """
    pack, store = run.pack, Store(run.settings)
    number, accepted = reading.look(run)
    source = digest(reading.source_of(run))
    inputs: dict[str, Any] = {"run": run.id, "as_of": run.as_of.isoformat(), "source": source}
    if number:
        inputs["look"] = number

    def act() -> Ingested:
        reading.require_past(run)
        windows = Windows.ending(run.as_of, pack.data)
        known = reading.known_manifest(run, inputs["source"], store)
        manifest, late, unchanged = reading.observe(run, store, known, windows.whole)
        note_text = None
        until = reading.data_until(run, manifest)
        if until < run.as_of:
            # The source ends before as-of: the windows end where it ends, so they reach further back.
            windows = Windows.ending(until, pack.data)
            # A CSV declares no types. Its columns take those of the whole window, which is therefore read at once.
            before = known if isinstance(pack.source, CsvSource) else manifest
            manifest, late_before, unchanged = reading.observe(run, store, before, windows.whole)
            late = tuple(sorted({*late, *late_before}))
            note_text = f"the data ends at {until:%Y-%m-%d %H:%M}, before as-of {run.as_of:%Y-%m-%d %H:%M}"
        if not run.id.startswith(WATCH):  # the monitor trains nothing: it needs rows in its own windows alone
            reading.require_rows(run, manifest, windows)
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

    if accepted:
        note(
            run,
            "ingest",
            "progress",
            f"keeps the rows that this run accepted before; to look at the source again, start a new run: "
            f"evergreen run {pack.name}",
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


@recorded
def validate(run: Run, ingested: Ingested) -> Validated:
    """Run Great Expectations over what is new; set bad rows aside; stop the run when too much is wrong."""
    pack, store = run.pack, Store(run.settings)
    suite = validation.suite_hash(pack.expectations)

    def act() -> Validated:
        manifest = manifest_of(store, ingested.manifest)
        with work_folder(run) as folder:
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


@recorded
def snapshot(run: Run, ingested: Ingested, validated: Validated) -> Snapshot:
    """Name the clean partitions as an immutable DVC version; the run speaks of it from here on."""
    pack, store = run.pack, Store(run.settings)

    def act() -> Snapshot:
        manifest = manifest_of(store, validated.manifest)
        partitions.require_all_rows(
            f"{pack.name}: the snapshot", validated.rows_checked - validated.rows_quarantined, manifest.rows
        )
        reading.require_rows(run, manifest, ingested.windows)
        reading.require_target(run, store, manifest, ingested.windows)
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

    known = perform(
        run,
        "snapshot",
        result=Snapshot,
        inputs={"manifest": validated.manifest.hash, "windows": ingested.windows.model_dump(mode="json")},
        code=_code("data/store.py", "data/repository.py"),
        act=act,
        outputs=lambda value: [Ref(hash=value.hash, size=value.bytes)],
        intact=store.verify,
        exists=lambda value: store.tagged(value.tag) == value.revision,
    )
    # The tag is in the repository as it is set now. Where an earlier run found it is no part of the snapshot.
    return known.model_copy(update={"repository": run.settings.data_repository})


@recorded
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
    if container := container_of(run):
        parameters["image"] = container.image
    code = _code("training/*.py", "training/runtimes/*.py", "runner.py", pack=pack)
    inputs = {"data": snapshot.hash, "windows": snapshot.windows.model_dump(mode="json")}
    job_id = job_id_of(run, "train", {**parameters, **inputs, "code": code_hash(code)})
    spec = job_spec(run, "train", job_id, call=pack.training.call, columns=manifest.columns)

    def fill(folder: Path) -> None:
        copy_python(pack, folder)
        for name, window in (("train", snapshot.windows.train), ("validation", snapshot.windows.validation)):
            _lay_out(store, manifest.within(window), folder / name)

    def act() -> Trained:
        result = finish_job(run, "train", spec, fill)
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
            classes=result.classes,
            windows=snapshot.windows,
            snapshot=snapshot.hash,
            params=pack.training.params,
            seed=pack.training.seed,
            metrics=result.metrics,
            curve=curve,
            log=log,
            hardware=result.hardware,
            image=container.image if container else None,
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


@recorded
def evaluate(run: Run, snapshot: Snapshot, trained: Trained) -> Evaluated:
    """Score challenger and champion on the same held-out rows, each in a fresh process through its own model folder.

    The challenger's importance is measured, too; the champion's was when it was made. A champion that is this very model
    is not compared with itself.
    """
    pack, store = run.pack, Store(run.settings)
    registry = Registry(run.settings)
    champion = scoring.incumbent(run, registry, trained.model)
    holdout = snapshot.windows.holdout
    withheld = scoring.withheld_because(registry, champion, holdout)

    def act() -> Evaluated:
        parts = manifest_of(store, snapshot.manifest).within(holdout)
        models = {"challenger": trained.model}
        if champion is not None and withheld is None:
            models["champion"] = looks.model_of(champion)
        classes = {"challenger": _classes(run, store, snapshot, trained)}
        if champion is not None and "champion" in models:
            classes["champion"] = scoring.classes_of(run, store, registry, champion)
        sample = looks.sample(
            run,
            store,
            parts,
            trained.inputs,
            metric=pack.gate.primary.metric,
            classes=classes["challenger"],
            budget_s=looks.IMPORTANCE_S,
        )
        with work_folder(run) as folder:
            scored = looks.score(run, store, parts, models, {"challenger": [sample] if sample else []})
            rows = scoring.holdout_rows(store, parts, [pack.data.target, *pack.gate.columns])
            return scoring.compare(run, store, rows, scored, champion, trained, withheld, classes, folder)

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
            "fairness": [rule.model_dump(mode="json") for rule in pack.gate.fairness],
            "confidence": pack.gate.primary.confidence,
            "independent": pack.gate.primary.independent,
            "primary": pack.gate.primary.metric,
            "metrics": pack.gate.metrics(pack.data.task),
            "task": pack.data.task,
            **({"image": trained.image} if trained.image else {}),
        },
        code=_code("evaluation/*.py", "runner.py", "conversion.py"),
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


@recorded
def register(run: Run, validated: Validated, snapshot: Snapshot, trained: Trained, evaluated: Evaluated) -> Registered:
    """Create the MLflow version, with all that made it written on it; or find that this very model is there already."""
    pack, store = run.pack, Store(run.settings)
    registry = Registry(run.settings)
    version_key = digest({"model": trained.model.hash, "snapshot": snapshot.hash})

    def known() -> ModelVersion | None:
        champion = registry.champion(pack.name)
        if champion is not None and champion.model_hash == trained.model.hash:
            return champion
        return registry.find(pack.name, version_key)

    def as_before(version: ModelVersion) -> Registered:
        return Registered(
            model=pack.name,
            version=version.version,
            mlflow_run=version.run_id,
            model_hash=trained.model.hash,
            # A killed attempt of this very run may have registered it.
            new=version.tags.get("evergreen.run_id") == run.id,
        )

    def act() -> Registered:
        found = known()
        if found is not None and registry.has_files(found):
            return as_before(found)
        made_by = lineage.lineage(
            run=run,
            code=lineage.code(run.settings),
            environment=lineage.environment(run.settings),
            validated=validated,
            snapshot=snapshot,
            trained=trained,
            evaluated=evaluated,
        )
        with work_folder(run) as folder:
            store.checkout(trained.model, folder / "model")
            artifacts = {
                **_artifacts(store, pack, validated, snapshot, evaluated, trained, folder / "artifacts"),
                **_reference(run, store, snapshot, trained, evaluated, folder),
            }
            example = _example(store, snapshot, trained)
            if found is not None:  # somebody removed its files
                registry.restore(found, folder / "model", lineage=made_by, artifacts=artifacts, input_example=example)
                return as_before(found)
            version, mlflow_run = registry.register(
                pack.name,
                folder / "model",
                key=version_key,
                run_name=run.slug,
                lineage=made_by,
                model_hash=trained.model.hash,
                metrics={name: estimate.value for name, estimate in evaluated.challenger.metrics.items()},
                curve=_curve(store, trained.curve),
                artifacts=artifacts,
                input_example=example,
                tags={"evergreen.owner": pack.owner},
                description=pack.description,
            )
        return Registered(model=pack.name, version=version, mlflow_run=mlflow_run, model_hash=trained.model.hash)

    def exists(value: Registered) -> bool:
        version = known()
        return version is not None and version.version == value.version and registry.has_files(version)

    # The registry is no part of the key, for it may move; the registry of today is asked whether it has the version.
    return perform(
        run,
        "register",
        result=Registered,
        inputs={"model": trained.model.hash, "data": snapshot.hash},
        code=_code(
            "registry/models.py", "registry/entry.py", "registry/lineage.py", "monitoring/*.py", "conversion.py"
        ),
        act=act,
        outputs=lambda _value: [],
        intact=store.verify,
        exists=exists,
    )


@recorded
def promote(run: Run, evaluated: Evaluated, registered: Registered) -> Promoted:
    """Ask the gate, and move the alias when it says so. Its key holds the run: the registry is outside of us."""
    pack = run.pack
    database = db.connect(run.settings.database_url)
    registry = Registry(run.settings)

    def act() -> Promoted:
        waits = False
        promotion.settle(database, registry, pack.name, holder=run.id)
        champion = registry.champion(pack.name)
        previous = champion.version if champion else None
        mine = promotion.moved_by(database, run, registered.version)
        if mine is not None and mine.body["status"] == "done":  # by an attempt of this run that was killed since
            verdict = _verdict_of(run, database)
            previous, after = mine.body["previous"], mine.body["champion"]
            waits = approval.newest(database, pack.name, run.id, registered.version) is not None  # it may be answered
        elif champion is not None and champion.version == registered.version:
            verdict = Verdict(
                decision="promote",
                reasons=("nothing new to learn: the same data, code and parameters made it before",),
            )
            after = previous
        else:
            verdict = _verdict(run, database, evaluated, registered, champion)
            judged_against = _judged_against(evaluated, champion)
            report = reports.of_version(run.settings, pack.name, registered.version, pack.description)
            registry.describe(pack.name, registered.version, description(report))
            waits = _asks(verdict, pack.gate)
            if not waits:
                approval.rejudged(database, run, registered.version, verdict)
            door = approval.ask if waits else promotion.promote
            after = door(
                database,
                registry,
                run=run,
                version=registered.version,
                judged_against=judged_against,
                verdict=verdict,
            )
        if after == registered.version == ledger.champion(database, pack.name):  # long after, it need not be any more
            approval.retire(database, registry, run, after)
        if (mine := promotion.moved_by(database, run, registered.version)) is not None:
            checkpoint(run.settings, mine)
        for reason in verdict.reasons:
            note(run, "promote", "progress", reason)
        return Promoted(
            model=pack.name,
            version=registered.version,
            verdict=verdict,
            champion=after,
            previous=previous,
            waits=waits,
        )

    return perform(
        run,
        "promote",
        result=Promoted,
        inputs={"run": run.id, "version": registered.version, "evaluated": digest(evaluated)},
        parameters={"rules": pack.gate.model_dump(mode="json")},
        code=_code("evaluation/gate.py", "registry/promotion.py", "registry/approval.py"),
        act=act,
        outputs=lambda _value: [],
        intact=lambda _ref: True,
    )


def _verdict(
    run: Run, database: db.Database, evaluated: Evaluated, registered: Registered, champion: ModelVersion | None
) -> Verdict:
    """The gate's verdict, written down with all it saw before anything is done about it; a retry keeps it."""
    pack = run.pack
    rolled_back = promotion.rolled_back(database, pack.name, registered.version, registered.model_hash)
    saw = {
        "version": registered.version,
        "champion": champion.version if champion else None,
        "rules": pack.gate.model_dump(mode="json"),
        "policy": gate.policy_hash(pack.gate),
        "evaluated": evaluated.model_dump(mode="json"),
        "challenger_as_of": run.as_of.isoformat(),
        "champion_as_of": _as_of(champion).isoformat() if champion else None,
        "rolled_back": rolled_back,
    }
    before = database.latest(pack.name, kind="verdict", run_id=run.id)
    if before is not None and before.body["saw"] == saw:
        return Verdict.model_validate(before.body["verdict"])
    verdict = gate.decide(
        evaluated,
        pack.gate,
        challenger_as_of=run.as_of,
        champion_as_of=_as_of(champion) if champion else None,
        rolled_back=rolled_back,
    )
    database.append(pack.name, "verdict", {"saw": saw, "verdict": verdict.model_dump(mode="json")}, run_id=run.id)
    return verdict


def _asks(verdict: Verdict, rules: GateRules) -> bool:
    """Whether a person has the last word."""
    return verdict.decision == "review" or (verdict.decision == "promote" and rules.promotion == "approval")


def _verdict_of(run: Run, database: db.Database) -> Verdict:
    """The verdict that a run has written down."""
    event = database.latest(run.pack.name, kind="verdict", run_id=run.id)
    assert event is not None, "a verdict is written down before it is acted on"
    return Verdict.model_validate(event.body["verdict"])


def _judged_against(evaluated: Evaluated, champion: ModelVersion | None) -> int | None:
    """The version whose figures the verdict rests on: the champion's number where it is the same model."""
    judged = evaluated.champion
    if judged is not None and champion is not None and judged.model == champion.model_hash:
        return champion.version
    return judged.version if judged is not None else None


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
    """The package's source files that a stage runs, the stages themselves among them; the pack's when it runs those."""
    files = [
        file
        for pattern in ("stages/*.py", "work.py", "looks.py", "columns.py", *patterns)
        for file in PACKAGE.glob(pattern)
    ]
    return tuple(sorted(files)) + (pack.python_files if pack else ())


def _with_partitions(store: Store, manifest: Ref) -> list[Ref]:
    """The manifest and every partition it names; the manifest alone when it cannot be read."""
    if not store.verify(manifest):
        return [manifest]
    return [manifest, *(part.object for part in manifest_of(store, manifest).partitions)]


def _known_records(run: Run, suite: str, store: Store) -> dict[str, Any]:
    """What the newest validation under the same suite found, by partition identity; empty when there is none."""
    database = db.connect(run.settings.database_url)
    for event in database.newest(run.pack.name, kind="stage", stage="validate"):
        if event.body["parts"]["parameters"]["suite"] == suite:
            ref = Ref.model_validate(event.body["value"]["records"])
            if not run.force and store.verify(ref):
                return validation.records(store.read_json(ref))
            break
    return {}


def _lay_out(store: Store, parts: Iterable[PartitionFile], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        store.checkout(part.object, folder / f"{part.period:%Y%m%dT%H}.parquet")


def _as_of(champion: ModelVersion) -> datetime:
    return datetime.fromisoformat(champion.tags["evergreen.as_of"])


def _artifacts(
    store: Store,
    pack: Pack,
    validated: Validated,
    snapshot: Snapshot,
    evaluated: Evaluated,
    trained: Trained,
    folder: Path,
) -> dict[str, Path]:
    """What goes with the version beside the model: what made it, and what the gate was given."""
    folder.mkdir()
    inputs = json.dumps(judging.inputs_of(snapshot, evaluated), indent=2)
    (folder / "gate_inputs.json").write_text(inputs, encoding="utf-8")
    if evaluated.challenger.slices:
        judging.groups_of(evaluated).write_csv(folder / "groups.csv")
    store.checkout(validated.result, folder / "validation.json")
    store.checkout(trained.log, folder / "training.log")
    (folder / "evaluation.json").write_text(evaluated.model_dump_json(indent=2), encoding="utf-8")
    if evaluated.importance or evaluated.importance_note:
        told = [each.model_dump(mode="json") for each in evaluated.importance]
        found = {"metric": evaluated.primary, "holdout": evaluated.holdout.model_dump(mode="json"), "columns": told}
        found |= {"note": evaluated.importance_note} if evaluated.importance_note else {}
        (folder / "importance.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    (folder / "model_card.md").write_text(pack.card, encoding="utf-8")
    files = {file.name: file for file in sorted(folder.iterdir())}
    if evaluated.plots is not None:
        store.checkout(evaluated.plots, folder / "plots")
        files["plots"] = folder / "plots"
    return files


def _classes(run: Run, store: Store, snapshot: Snapshot, trained: Trained) -> scoring.Classes:
    """The challenger's classes."""
    data = run.pack.data
    return trained.classes or scoring.classes_in(store, snapshot, data.task, data.target)


def _reference(
    run: Run, store: Store, snapshot: Snapshot, trained: Trained, evaluated: Evaluated, folder: Path
) -> dict[str, Path]:
    """What the monitor will compare with: the profile of the rows, and of the predictions for the hold-out's."""
    scored = evaluated.challenger
    assert scored.predictions is not None, "a challenger is never withheld"
    profile, about = looks.reference_of(
        run,
        store,
        manifest_of(store, snapshot.manifest),
        snapshot.windows.whole,
        evaluated.holdout,
        looks.predictions_in(store.path(scored.predictions)),
        metric=evaluated.primary,
        figure=scored.metrics[evaluated.primary],
        importance=evaluated.importance,
        importance_note=evaluated.importance_note,
        classes=_classes(run, store, snapshot, trained),
    )
    (folder / looks.PROFILE).write_bytes(profile.to_bytes())
    (folder / looks.REFERENCE).write_text(about.model_dump_json(), encoding="utf-8")
    return {name: folder / name for name in (looks.PROFILE, looks.REFERENCE)}


def _curve(store: Store, ref: Ref | None) -> list[dict[str, Any]]:
    """The training curve: a `step` and its metrics in each entry."""
    lines = [json.loads(line) for line in store.read_bytes(ref).splitlines()] if ref else []
    return [{**line["metrics"], "step": line["step"]} for line in lines]


def _example(store: Store, snapshot: Snapshot, trained: Trained) -> Any:
    """Five raw rows as a pandas frame: the version's input example."""
    import polars as pl

    first = manifest_of(store, snapshot.manifest).partitions[0]
    rows = pl.read_parquet(store.path(first.object), glob=False).head(5)[list(trained.inputs)]
    return rows.to_arrow().to_pandas(integer_object_nulls=True)  # an integer beside a missing one stays exact


def build_docs(settings: Settings, pack: Pack, folder: Path) -> Path:
    """Great Expectations' Data Docs of the pack's last validation; → its index.html."""
    event = db.connect(settings.database_url).latest(pack.name, kind="stage", stage="validate")
    if event is None:
        raise StageError(f"pack {pack.name} has not been validated yet", fix=f"evergreen run {pack.name}")
    value = Validated.model_validate(event.body["value"])
    return validation.docs(pack, Store(settings).read_json(value.result), folder)
