"""How `ingest` looks at a source: what it reads again, and when there is too little or too old data to go on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from evergreen import columns
from evergreen import database as db
from evergreen.data import partitions, sources
from evergreen.data.store import Store
from evergreen.errors import SourceError, StaleDataError
from evergreen.keys import WATCH, note, on_the_clock
from evergreen.pack import PythonSource, duration_text
from evergreen.run import Manifest, PartitionFile, Ref, Run, Window, Windows, count, period_name, step
from evergreen.training import jobs
from evergreen.work import copy_python, finish_job, job_id_of, job_spec, manifest_of, work_folder
from evergreen.yaml_core import dump_on_one_line

if TYPE_CHECKING:
    import polars as pl


LOOKS = 3
"""How many looks of the monitor may be asked whether they count."""


AGAIN = "clear the run, ingest included, or start a new one"
"""The advice after rows were refused: `ingest` looks again, the stage that refused them alone does not."""


def look(run: Run) -> tuple[int, bool]:
    """The number of the look at the source that this run's rows come from, and whether those rows were accepted.

    It is 0, and one more after each look whose rows `validate` or `snapshot` failed on: nothing was accepted from that
    look, so a cleared run looks again. Rows are accepted when the run's `snapshot` succeeds, the monitor's when its
    `validate` does; from then on the number stays. A stage that was killed leaves no failure, so its retry keeps the
    look.
    """
    database = db.connect(run.settings.database_url)
    accepts = "validate" if run.id.startswith(WATCH) else "snapshot"
    number, failed = 0, False
    for event in database.events(run.pack.name, run_id=run.id, kind=("stage", "receipt", "failure")):
        stage = event.body["stage"]
        if event.kind == "stage" and stage == "ingest":
            latest = event.body["parts"]["inputs"].get("look", 0)
            number, failed = latest, failed and latest == number
        elif event.kind == "failure" and stage in ("validate", "snapshot"):
            failed = True
        elif event.kind != "failure" and stage == accepts:
            return number, True
    return number + failed, False


def source_of(run: Run) -> dict[str, Any]:
    """Return all that the rows depend on, for the key of `ingest`; it holds no secret.

    It has the source in the pack's words and where its connection leads now, the fields of `data` that decide how rows
    become partitions, and the pack's Python for a source that runs it.
    """
    pack = run.pack
    source = pack.source.model_dump(mode="json", exclude_none=True)
    if name := source.get("connection"):
        source["place"] = run.connect(name).place
    data = {"event_time": pack.data.event_time, "target": pack.data.target, "partition": pack.data.partition}
    code = pack.code_hash if isinstance(pack.source, PythonSource) else None
    return {"source": source, "data": data, "code": code}


def known_manifest(run: Run, source: str, store: Store) -> Manifest | None:
    """What the newest earlier look at the same source saw, if that look's as-of was not after this one's.

    Looks of runs that came to no snapshot do not count: what was refused may have been mended since. The monitor makes
    no snapshots; its looks count where its rows were found sound, and no label was missing that may come late. Of those
    only the newest few are asked: where labels take long, all the others would say the same.
    """
    database = db.connect(run.settings.database_url)
    if run.force:
        return None
    looks, seen = 0, set()
    for event in database.newest(run.pack.name, kind="stage", stage="ingest"):
        if event.run_id in seen:
            continue  # an earlier look of that run, whose rows were refused
        seen.add(event.run_id)
        inputs = event.body["parts"]["inputs"]
        if inputs["source"] != source or datetime.fromisoformat(inputs["as_of"]) > run.as_of:
            continue
        if str(event.run_id).startswith(WATCH) and (looks := looks + 1) > LOOKS:
            continue
        if _accepted(run, store, _results(database, event)):
            ref = Ref.model_validate(event.body["value"]["manifest"])
            if (manifest := _whole(store, ref)) is not None:
                return manifest
    return None


def _whole(store: Store, ref: Ref) -> Manifest | None:
    """A manifest whose partitions are there: pruned elsewhere with its rows, it may be left in this machine's cache."""
    manifest = manifest_of(store, ref) if store.verify(ref) else None
    return manifest if manifest is not None and store.holds(part.object for part in manifest.partitions) else None


def _accepted(run: Run, store: Store, results: list[db.Event]) -> bool:
    """Whether a look's run came to a snapshot, or was the monitor's and could have; by what came after the look."""
    by_stage = {event.body["stage"]: event for event in results}
    if "snapshot" in by_stage or "validate" not in by_stage or not str(results[0].run_id).startswith(WATCH):
        return "snapshot" in by_stage
    database = db.connect(run.settings.database_url)
    validated = database.latest(run.pack.name, kind="stage", key=by_stage["validate"].key)  # a receipt has its key
    assert validated is not None, "a receipt names a stage event"
    manifest = _whole(store, Ref.model_validate(validated.body["value"]["manifest"]))
    return manifest is not None and not any(map(_empty, _targets(run, store, manifest).values()))


def _results(database: db.Database, of: db.Event) -> list[db.Event]:
    """The values and receipts that the stages of an event's run left after it."""
    events = database.events(of.pack, run_id=of.run_id, kind=("stage", "receipt"))
    return [event for event in events if event.position > of.position]


def observe(
    run: Run, store: Store, known: Manifest | None, window: Window
) -> tuple[Manifest, tuple[datetime, ...], int]:
    """Read what is not known of `window`, and what may have late rows; → manifest, late periods, partitions unchanged."""
    data = run.pack.data
    to_read = partitions.to_read(known, window, data.partition, data.lookback)
    covered = known.covered if known else None
    if fresh := [part for part in to_read if covered is None or part.start < covered.start or covered.end < part.end]:
        note(run, "ingest", "progress", f"reading what is new up to {fresh[-1].end:%Y-%m-%d %H:%M}")
    written: list[PartitionFile] = []
    columns: dict[str, str] = {}
    rounded: dict[str, partitions.Inexact] = {}
    with work_folder(run) as folder:
        for index, part in enumerate(to_read):
            out = folder / f"partitions-{index}"
            with closing(frames(run, part, known.columns if known else {})) as rows:
                read = partitions.write(
                    rows,
                    window=part,
                    partition=data.partition,
                    event_time=data.event_time,
                    target=data.target,
                    folder=out,
                    origin=f"pack {run.pack.name}: source {run.pack.source.kind}",
                )
            columns = partitions.agree(
                columns, read.columns, f"pack {run.pack.name}: the source from {part.start:%Y-%m-%d}"
            )
            rounded |= read.inexact
            written += [
                PartitionFile(period=file.period, rows=file.rows, identity=file.identity, object=store.put(file.path))
                for file in read.files
            ]
    merged = partitions.merge(
        known, written, columns, to_read, window, dataset=run.pack.dataset, partition=data.partition
    )
    partitions.require_exact(merged[0].columns, rounded | _rounded_from_now_on(run, store, known, merged[0]))
    return merged


def _rounded_from_now_on(
    run: Run, store: Store, known: Manifest | None, merged: Manifest
) -> dict[str, partitions.Inexact]:
    """Of each column that was int and becomes float with what was read now, a known whole number that float64 rounds."""
    import polars as pl

    before = known.columns if known else {}
    widened = [name for name, kind in merged.columns.items() if kind == "float" and before.get(name) == "int"]
    rounded: dict[str, partitions.Inexact] = {}
    for part in merged.partitions if widened else ():
        frame = columns.read(store.path(part.object), widened)
        where = f"pack {run.pack.name}: {period_name(part.period, merged.partition)}"
        for name in widened:
            if frame[name].dtype == pl.Int64 and (value := partitions.inexact(columns.series(frame, name))) is not None:
                rounded.setdefault(name, partitions.Inexact(where, value))
    return rounded


def frames(run: Run, window: Window, known: Mapping[str, str]) -> Generator[pl.DataFrame, None, None]:
    """The source's rows within `window`; a Python source is read by a job of its own. `known`: types of earlier readings."""
    pack = run.pack
    if not isinstance(pack.source, PythonSource):
        source = sources.open_source(pack.source, pack.folder, run.connect, known)
        yield from source.read(window, pack.data.event_time)
        return
    job_id = job_id_of(run, "read", {"run": run.id, "window": window.model_dump(mode="json"), "code": pack.code_hash})
    spec = job_spec(run, "read", job_id, call=pack.source.call, window=window)
    result = finish_job(run, "ingest", spec, lambda folder: copy_python(pack, folder))
    rows = 0
    try:
        for frame in sources.frames(run.settings.jobs / spec.id / "output" / "frames"):
            rows += frame.height
            yield frame
        partitions.require_all_rows(f"pack {pack.name}: the frames of {spec.id}", int(result.metrics["rows"]), rows)
    finally:  # also where the rows are refused: a later attempt must not adopt this job, but read again
        jobs.discard(run.settings, spec.id)


def data_until(run: Run, manifest: Manifest) -> datetime:
    """The end of the last period with rows. Raises when there is none, or when it is too old."""
    pack = run.pack
    if not manifest.partitions:
        window = Windows.ending(run.as_of, pack.data).whole
        what = f"pack {pack.name}: the source has no rows in {window}, the window before as-of"
        seen = _seen_until(run)
        if seen is not None and seen <= window.start:
            raise StaleDataError(f"{what}; the newest that a run saw {_age(run, seen)}", fix=NEWER)
        raise SourceError(what, fix="check source and event_time in pack.yaml, or give another --as-of")
    until = step(manifest.partitions[-1].period, pack.data.partition)
    if run.as_of - until > pack.data.max_staleness:
        raise StaleDataError(f"pack {pack.name}: the newest data {_age(run, until)}", fix=NEWER)
    return min(until, run.as_of)


NEWER = "bring newer data, give an earlier --as-of, or raise data.max_staleness in pack.yaml"


def _age(run: Run, until: datetime) -> str:
    return (
        f"ends at {until:%Y-%m-%d %H:%M}, {(run.as_of - until).days} days before as-of {run.as_of:%Y-%m-%d %H:%M}; "
        f"data.max_staleness is {run.pack.data.max_staleness.days} days"
    )


def _seen_until(run: Run) -> datetime | None:
    """Where the data ended when a run last looked; None when none has."""
    look = db.connect(run.settings.database_url).latest(run.pack.name, kind="stage", stage="ingest")
    return datetime.fromisoformat(look.body["value"]["data_until"]) if look is not None else None


def require_past(run: Run) -> None:
    """Raise SourceError for an as-of that is still to come, on the pack's clock too.

    Its last partition would not be complete; and time only moves forward: what it made could be replaced by nothing until
    then.
    """
    now = datetime.now(UTC)
    there = on_the_clock(run.pack, now, db.connect(run.settings.database_url).made_at())
    if run.as_of > max(now, there):
        raise SourceError(
            f"pack {run.pack.name}: as-of {run.as_of:%Y-%m-%d %H:%M} is in the future; it is {now:%Y-%m-%d %H:%M} UTC",
            fix="give an --as-of that has passed, or none",
        )


def require_rows(run: Run, manifest: Manifest, windows: Windows) -> None:
    """Raise SourceError for a window of a training without rows, and StageError for rows that lie in no window."""
    data = run.pack.data
    kept = 0
    for name in ("train", "validation", "holdout"):
        window: Window = getattr(windows, name)
        parts = manifest.within(window)
        kept += sum(part.rows for part in parts)
        if parts:
            continue
        first = manifest.partitions[0].period if manifest.partitions else window.end
        earlier = [part.period for part in manifest.partitions if part.period < window.start]
        if earlier:
            longer = duration_text(window.end - earlier[-1])
            fix = f"write {name}: {longer} under data in pack.yaml: it reaches back to {earlier[-1]:%Y-%m-%d %H:%M}, which has rows"
        else:
            fix = (
                f"shorten data.validation or data.holdout, so that rows since {first:%Y-%m-%d %H:%M} are left to train on; "
                f"where the source has older rows, make data.{name} longer; or wait for more rows"
            )
        raise SourceError(
            f"pack {run.pack.name}: the {name} window {window} is empty (data.{name} is {duration_text(getattr(data, name))}); "
            f"there are rows in {count(len(manifest.partitions), 'partition')}, the first at {first:%Y-%m-%d %H:%M}",
            fix=fix,
        )
    partitions.require_all_rows(f"pack {run.pack.name}: the windows", manifest.rows, kept)


def require_target(run: Run, store: Store, manifest: Manifest, windows: Windows) -> None:
    """Raise SourceError for rows without a target, and for a window to learn from or judge on that has one class."""
    pack, target = run.pack, run.pack.data.target
    values = _targets(run, store, manifest)
    if missing := {period: rows for period, column in values.items() if (rows := _empty(column))}:
        raise SourceError(
            f"pack {pack.name}: the target {target!r} is empty in {count(sum(missing.values()), 'row')} of {manifest.rows}, "
            f"the first in {period_name(min(missing), manifest.partition)}",
            fix=f"fill it in the source or leave those rows out; expect_column_values_to_not_be_null: {dump_on_one_line({'column': target})} "
            f"under expectations in pack.yaml sets a few aside; then {AGAIN}",
        )
    if pack.data.task == "regression":
        return
    for name in ("train", "holdout"):
        window: Window = getattr(windows, name)
        classes = {value for part in manifest.within(window) for value in values[part.period].unique()}
        if len(classes) == 1:
            raise SourceError(
                f"pack {pack.name}: the target {target!r} is {classes.pop()!r} in every row of the {name} window {window}",
                fix=f"see what the source holds for these days, or make data.{name} longer in pack.yaml; then {AGAIN}",
            )


def _targets(run: Run, store: Store, manifest: Manifest) -> dict[datetime, pl.Series]:
    """The target's values, by period."""
    target = run.pack.data.target
    return {
        part.period: columns.series(columns.read(store.path(part.object), [target]), target)
        for part in manifest.partitions
    }


def _empty(column: pl.Series) -> int:
    """In how many rows there is no value."""
    return int((column.is_null() | column.is_nan() if column.dtype.is_float() else column.is_null()).sum())
