"""A stage is a function of its key (law 1): the one look-up behind retries, receipts, adoption and reproduction.

`key = sha256(stage, inputs, code it runs, parameters, environment)`. The stage's value is an event, its files are
objects of the store, and the event is written last: killed at any instruction and performed again, a stage ends as
an undisturbed one would. What an earlier run did is never taken on trust: its outputs are verified again first.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from pydantic import ValidationError

from evergreen import database as db
from evergreen import home
from evergreen.database import Database, Event
from evergreen.errors import EvergreenError, LeaseHeldError, one_screen
from evergreen.pack import Pack
from evergreen.run import Connect, Ref, Run, Value, digest, floor, no_connections
from evergreen.settings import Settings

log = logging.getLogger("evergreen")

V = TypeVar("V", bound=Value)
P = ParamSpec("P")

WATCH = "watch__"
"""The id of a run of the monitor begins with this."""

LOOK_WAIT_S = 60.0
"""How long a look waits for the pack to be free: twice a dead one's lease. Another look comes by its own schedule."""

State = Literal["running", "waiting", "progress", "done", "skipped", "failed"]


@dataclass(frozen=True)
class Note:
    """What is said of a stage while it goes on; attached to log records as `evergreen_note` for whoever shows it live."""

    run_id: str
    stage: str
    state: State
    text: str = ""
    seconds: float | None = None
    fraction: float | None = None


def note(run: Run, stage: str, state: State, text: str = "", **more: float | None) -> None:
    """Say how `stage` is getting on: a line in the log, and a Note for the live view."""
    said = Note(run_id=run.id, stage=stage, state=state, text=text, **more)
    level = logging.ERROR if state == "failed" else logging.INFO
    log.log(level, "%s %s%s", stage, state, f": {text}" if text else "", extra={"evergreen_note": said})


def code_hash(paths: tuple[Path, ...]) -> str:
    """Return the sha256 of the names and bytes of the source files that a stage runs, as they are now.

    The files are in order of their content. Their folders are no part of it: package and packs may lie anywhere.
    """
    content = hashlib.sha256()
    for name, text in sorted((path.name, path.read_bytes()) for path in paths):
        content.update(name.encode() + b"\0" + text + b"\0")
    return content.hexdigest()


@functools.cache
def lock_hash(project: Path) -> str | None:
    """sha256 of the lock file, which says every package; None where the project has none."""
    lock = project / "requirements.txt"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None


def environment(settings: Settings) -> dict[str, str | None]:
    """What a stage's packages and interpreter are known by."""
    return {"python": platform.python_version(), "lock": lock_hash(settings.project), "image": settings.image}


def begin(
    settings: Settings,
    pack: Pack,
    run_id: str,
    *,
    as_of: datetime | None,
    scheduled: datetime,
    reason: str,
    force: bool = False,
    kind: Literal["run", "watch"] = "run",
    connect: Connect = no_connections,
) -> Run:
    """The run `run_id` of `pack`. Its as-of is fixed by the first call and kept by every later one.

    A `watch` trains nothing, so that nobody counts it as a run; its id is its own, `watch__<run_id>`, as Airflow's are
    unique within one DAG only.

    `as_of` is what was asked for; `scheduled` stands in for it: the logical date, or the instant after which the run
    may start. Instants since the home was made go through the pack's clock; the end of the last complete partition
    before the result is the run's as-of.
    """
    home.adopt(settings)
    database = db.connect(settings.database_url)
    run_id = f"{WATCH}{run_id}" if kind == "watch" else run_id
    if not (found := database.events(pack.name, kind=kind, run_id=run_id, limit=1)):
        instant = on_the_clock(pack, as_of or scheduled, database.made_at())
        body = {"as_of": floor(instant, pack.data.partition).isoformat(), "reason": reason, "force": force}
        database.append(pack.name, kind, body, run_id=run_id)
        found = database.events(pack.name, kind=kind, run_id=run_id, limit=1)  # another process may have been first
    event = found[0]
    return Run(
        pack=pack,
        id=run_id,
        as_of=datetime.fromisoformat(event.body["as_of"]),
        reason=event.body["reason"],
        force=event.body["force"],
        settings=settings,
        connect=connect,
    )


def on_the_clock(pack: Pack, instant: datetime, made_at: datetime) -> datetime:
    """`instant` on the pack's clock: `start + (instant - made_at) × speed`; instants before `made_at` as they are."""
    return pack.clock.at(instant, made_at) if pack.clock else instant


def perform(
    run: Run,
    stage: str,
    *,
    result: type[V],
    inputs: Mapping[str, Any],
    code: tuple[Path, ...],
    act: Callable[[], V],
    outputs: Callable[[V], Iterable[Ref]],
    intact: Callable[[Ref], bool],
    exists: Callable[[V], bool] = lambda _value: True,
    parameters: Mapping[str, Any] | None = None,
    kind: Literal["stage", "drift"] = "stage",
) -> V:
    """The value of `stage` for `run`: looked up by its key when it was performed before, else made by `act()`.

    `outputs` names the objects that the value refers to; `intact` verifies one. `exists` verifies what a value names
    outside of the store: a git tag, an MLflow version. `kind` is the event's. One stage of a pack
    acts at a time, by a lease that the retry of a killed attempt takes over; a run waits for it as long as a training may
    take, a look of the monitor for a minute. Raises LeaseHeldError.
    """
    database = db.connect(run.settings.database_url)
    parts = {
        "stage": stage,
        "inputs": dict(inputs),
        "parameters": dict(parameters or {}),
        "code": code_hash(code),
        "environment": environment(run.settings),
    }
    key = digest(parts)
    began = time.monotonic()
    wait_s = LOOK_WAIT_S if run.id.startswith(WATCH) else run.pack.training.timeout.total_seconds()
    note(run, stage, "running")

    def waits(holder: str) -> None:
        note(run, stage, "waiting", f"waits for {holder}: one stage of {run.pack.name} acts at a time")

    lease = database.lease(f"stage:{run.pack.name}", run.id, wait_s=wait_s, waits=waits)
    with _alone_here(run, wait_s, waits), lease:
        before = database.latest(run.pack.name, kind=kind, key=key)
        if before is not None and (before.run_id == run.id or not run.force):
            known = _value(result, before)
            if known is not None and all(intact(ref) for ref in outputs(known)) and exists(known):
                seconds = time.monotonic() - began
                return _receipt(database, run, stage, key, before, known, seconds)
            note(run, stage, "progress", f"what {before.run_id} left is missing or altered: done again")
        value = act()
        seconds = time.monotonic() - began
        body = {
            "stage": stage,
            "parts": parts,
            "value": value.model_dump(mode="json"),
            "summary": summary(value),
            "seconds": round(seconds, 3),
        }
        database.append(run.pack.name, kind, body, run_id=run.id, key=key)
    note(run, stage, "done", summary(value), seconds=seconds)
    return value


def recorded(stage: Callable[Concatenate[Run, P], V]) -> Callable[Concatenate[Run, P], V]:
    """A stage whose failure is an event before it is raised, wherever in the stage it happens."""

    @functools.wraps(stage)
    def performed(run: Run, /, *values: P.args, **named: P.kwargs) -> V:
        try:
            return stage(run, *values, **named)
        except Exception as error:
            _record_failure(run, stage.__name__, error)
            raise

    return performed


@contextmanager
def _alone_here(run: Run, wait_s: float, waits: Callable[[str], None] = lambda _holder: None) -> Iterator[None]:
    """Held by one process of this machine at a time for each pack, and free the moment that process dies.

    The lease is a run's, so that the retry of a killed attempt need not wait until it ends; this keeps a retry from
    taking the lease of an attempt that lives. After a moment `waits` is called with the run that holds it.
    """
    run.settings.jobs.mkdir(parents=True, exist_ok=True)
    began, waiting = time.monotonic(), False
    with (run.settings.jobs / f".{run.pack.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited_s = time.monotonic() - began
                if waited_s >= wait_s or (waited_s > db.PATIENCE_S and not waiting):
                    holder = db.connect(run.settings.database_url).holder(f"stage:{run.pack.name}") or "another run"
                    waits(holder)
                    waiting = True
                if waited_s >= wait_s:
                    raise LeaseHeldError(
                        f"pack {run.pack.name}: {holder} is acting, in a process of this machine that holds {file.name}",
                        fix=f"wait until it has finished, or end it: `fuser {file.name}` names it",
                    ) from None
                time.sleep(0.05)
        yield


def summary(value: Value) -> str:
    """One line on a stage's value."""
    return str(value.summary()) if hasattr(value, "summary") else ""


def _value(result: type[V], event: Event) -> V | None:
    """The value in an event; None when an older Evergreen wrote it in a shape that is no longer known."""
    try:
        return result.model_validate(event.body["value"])
    except ValidationError:
        return None


def _receipt(database: Database, run: Run, stage: str, key: str, before: Event, value: V, seconds: float) -> V:
    """Record why the stage was skipped; a retry of the same run needs no receipt."""
    if before.run_id != run.id:
        body = {"stage": stage, "of": before.run_id, "verified": True, "seconds": round(seconds, 3)}
        database.append(run.pack.name, "receipt", body, run_id=run.id, key=key)
    note(run, stage, "skipped", f"{summary(value)} (as in {before.run_id})", seconds=seconds)
    return value


def _record_failure(run: Run, stage: str, error: Exception) -> None:
    what = error.what if isinstance(error, EvergreenError) else one_screen(str(error))
    fix = error.fix if isinstance(error, EvergreenError) else None
    note(run, stage, "failed", what)
    body = {"stage": stage, "error": type(error).__name__, "what": what, "fix": fix}
    try:
        db.connect(run.settings.database_url).append(run.pack.name, "failure", body, run_id=run.id)
    except Exception:  # whatever keeps the record from being written must not hide the failure itself
        log.exception("the failure of %s could not be recorded", stage)
