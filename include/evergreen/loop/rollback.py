"""The way back: a version that was champion before is champion again, once it is known to be what it was.

Three things are verified before anything moves: the model folder in MLflow and the one in the store have the hash that
the ledger has kept since the version was registered; and, scored again by a job of its own, the first rows of its
hold-out get the predictions that they got when it was evaluated. Nothing is asked of the pack, which may be what broke.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from evergreen import database as db
from evergreen import looks
from evergreen.data.store import Store
from evergreen.database import Database, Event
from evergreen.errors import RegistryError
from evergreen.registry import ledger, promotion
from evergreen.registry.models import Registry
from evergreen.run import Ref, Value, Window, count, sayable
from evergreen.settings import Settings
from evergreen.work import checkpoint, manifest_of

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

log = logging.getLogger("evergreen")

GOLDEN = 256
"""How many of the hold-out's first rows are scored again, at most: those of its first partition."""
TOLERANCE = 1e-6
"""How far a prediction may lie from what it was: batches of another size add up in another order."""


class Step(Value):
    """What was done on the way back, and how long it took."""

    name: str
    said: str
    seconds: float


class Restored(Value):
    """How a rollback, or a drill, ended."""

    model: str
    version: int
    """The champion now; of a drill, the version that it would be."""
    previous: int | None
    """The champion before."""
    why: str
    by: str
    at: datetime
    drill: bool
    steps: tuple[Step, ...]
    """None where this very rollback was done before."""
    seconds: float


def rollback(
    settings: Settings,
    pack: str,
    *,
    to: int | None = None,
    leave: int | None = None,
    why: str,
    by: str,
    run_id: str | None = None,
) -> Restored:
    """Make `to`, or else the champion before this one, champion again, when it is verified to be what it was.

    `leave` is the version that was found wanting, where that is not whichever is champion now.
    Asked again in the same words after any kill, it ends as an undisturbed call would: it goes back once. Raises
    RegistryError where there is nothing to go back to, or what there is is not what it was; the champion stays.
    """
    database, registry = db.connect(settings.database_url), Registry(settings)
    asked = {"to": to, "why": sayable(why), "by": sayable(by)}
    with _Check(settings, database, registry, pack) as check:
        with check.step("find") as said:
            if promotion.answered(database, pack, asked, run_id) is None:
                with suppress(RegistryError):
                    check.begin(_target(database, pack, leave or ledger.champion(database, pack), to))
            champion = promotion.settle(database, registry, pack, holder=run_id)
            leave = champion if leave is None else leave
            before = promotion.answered(database, pack, asked, run_id)
            if before is not None:
                checkpoint(settings, before)
                return _restored(before, ())
            version = _target(database, pack, leave, to)
            said.append(f"from version {leave} to version {version}" if leave else f"to version {version}")
        check.finish(version)
        with check.step("alias") as said:
            done = promotion.roll_back(
                database, registry, pack, version=version, leave=leave, asked=asked, run_id=run_id
            )
            said.append(f"version {version} is champion")
        with check.step("checkpoint") as said:
            checkpoint(settings, done)
            said.append(f"event {done.position} of the ledger is noted outside of it")
        return _restored(done, tuple(check.steps))


def drill(settings: Settings, pack: str, *, by: str) -> Restored:
    """Rehearse a rollback from start to end under the alias `drill`; where there was one champion only, with that.

    The alias is taken off again. Raises what `rollback` raises.
    """
    database, registry = db.connect(settings.database_url), Registry(settings)
    with _Check(settings, database, registry, pack) as check:
        with check.step("find") as said:
            champion = ledger.champion(database, pack)
            if champion is not None:
                check.begin(_before(database, pack, champion) or champion)
            leave = promotion.settle(database, registry, pack)
            if leave is None:
                raise RegistryError(
                    f"{pack} has no champion: there is nothing to rehearse", fix=f"evergreen run {pack}"
                )
            version = _before(database, pack, leave) or leave
            said.append(f"version {leave} is champion, version {version} is what a rollback would restore")
        check.finish(version)
        with check.step("alias") as said:
            asked = {"to": None, "why": "a drill", "by": by}
            done = promotion.roll_back(database, registry, pack, version=version, leave=leave, asked=asked, drill=True)
            said.append(f"the alias drill was put on version {version}")
        with check.step("checkpoint") as said:
            checkpoint(settings, done)
            said.append(f"event {done.position} of the ledger is noted outside of it")
        registry.drop_alias(pack, promotion.ALIASES[promotion.DRILL], version)
        return _restored(done, tuple(check.steps))


def _target(database: Database, pack: str, champion: int | None, to: int | None) -> int:
    """The version to go back to, by the ledger. Raises RegistryError."""
    if to is None:
        found = _before(database, pack, champion)
        if found is None:
            named = f"version {champion}" if champion else "now"
            raise RegistryError(
                f"{pack} had no champion before {named} that was not rolled back from: there is nothing to go back to",
                fix=f"evergreen history {pack} lists them; --to VERSION chooses one",
            )
        return found
    if to == champion:
        raise RegistryError(f"{pack} version {to} is champion already", fix=f"evergreen history {pack}")
    if to not in {reign.version for reign in ledger.reigns(database, pack)}:
        raise RegistryError(
            f"{pack} version {to} has never been champion: a rollback goes back, it promotes nothing",
            fix=f"evergreen history {pack} lists the versions that were; a new one comes in by {pack}__train",
        )
    return to


def _before(database: Database, pack: str, champion: int | None) -> int | None:
    """The newest version that was champion before `champion` came, and was not rolled back from."""
    return ledger.before(ledger.reigns(database, pack), champion, promotion.left(database, pack))


class _Check:
    """Holds a version to what it was when it was registered, and times that.

    Its predictions are made by a job, as soon as the ledger says which version it is about, while MLflow is imported.
    """

    def __init__(self, settings: Settings, database: Database, registry: Registry, pack: str) -> None:
        self.settings, self.database, self.registry, self.pack = settings, database, registry, pack
        self.steps: list[Step] = []
        self._version: int | None = None
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """A step; what is put into the list is what it says when it has ended."""
        said: list[str] = []
        began = time.monotonic()
        yield said
        self.steps.append(Step(name=name, said="; ".join(said), seconds=round(time.monotonic() - began, 3)))
        log.info("%s: %s", name, self.steps[-1].said)

    def begin(self, version: int) -> None:
        """Begin to predict with `version`, unless that has begun."""
        if version != self._version:
            self._version, self._predicted = version, self._pool.submit(self._predict, version)

    def finish(self, version: int) -> None:
        """Raise RegistryError unless `version` is what it was, and does what it did."""
        self.begin(version)
        pack, settings = self.pack, self.settings
        with self.step("bytes") as said, tempfile.TemporaryDirectory(prefix="evergreen-rollback-") as room:
            _, sha = looks.fetch_model(settings, self.database, self.registry, pack, version, Path(room) / "model")
            said.append(f"the model folder in MLflow is {sha[:12]}, as registered")
        with self.step("predictions") as said:
            rows, away = self._predicted.result()
            if not away <= TOLERANCE:
                raise RegistryError(
                    f"{pack} version {version} does not predict what it did: {count(rows, 'row')} of its hold-out, "
                    f"up to {away:.3g} away, {TOLERANCE:g} allowed",
                    fix="its bytes are as registered: compare the packages in `evergreen lineage` with those installed",
                )
            said.append(f"from the same bytes in the store, {count(rows, 'row')} get the predictions that they got")

    def _predict(self, version: int) -> tuple[int, float]:
        """How many rows were predicted again, with the model folder in the store, and how far that is from what it was."""
        store = Store(self.settings)
        sha, values = ledger.registered(self.database, self.pack, version)
        if not store.verify(Ref(hash=sha, size=0)):
            raise RegistryError(
                f"{self.pack} version {version}: its model folder {sha} is not to be had intact from the store",
                fix="restore the store's remote from a copy, or go back to another version with --to",
            )
        rows, expected = _golden(store, values)
        with tempfile.TemporaryDirectory(prefix="evergreen-rollback-") as room:
            store.checkout(Ref(hash=sha, size=0), Path(room) / "model")
            found = looks.predict_with(self.settings, self.pack, Path(room) / "model", rows, "the golden batch")
        return rows.height, _furthest(found, expected)


def _golden(store: Store, values: dict[str, dict[str, Any]]) -> tuple[pl.DataFrame, np.ndarray]:
    """The first rows of a version's hold-out, and its predictions for them when it was evaluated."""
    import polars as pl

    evaluated = values["evaluate"]
    manifest = manifest_of(store, Ref.model_validate(values["snapshot"]["manifest"]))
    first = manifest.within(Window.model_validate(evaluated["holdout"]))[0]
    rows = pl.read_parquet(store.path(first.object), glob=False).head(GOLDEN)
    predictions = Ref.model_validate(evaluated["challenger"]["predictions"])
    return rows, looks.predictions_in(store.path(predictions))[: rows.height]


def _furthest(found: pl.DataFrame, expected: np.ndarray) -> float:
    """The largest distance between a prediction and what it was; NaN where one is NaN."""
    import numpy as np

    return float(np.max(np.abs(found.to_numpy() - expected.reshape(found.shape))))


def _restored(done: Event, steps: tuple[Step, ...]) -> Restored:
    body = done.body
    return Restored(
        model=done.pack,
        version=body["version"],
        previous=body["previous"],
        why=body["asked"]["why"],
        by=body["asked"]["by"],
        at=done.at,
        drill=done.kind == promotion.DRILL,
        steps=steps,
        seconds=round(sum(step.seconds for step in steps), 3),
    )
