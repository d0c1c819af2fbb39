"""Random small packs over random days end right, or in a refusal whose advice works; never in a crash or a difference.

A failure names its seed: `SEEDS=17:18 make prove ARGS=-x` plays that one pack again, and `SEEDS=300:1000 make prove` goes
on from there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.faults import reference, worlds
from tests.faults.conftest import perform_stage
from tests.faults.forked import forked_jobs
from tests.faults.worlds import FIRST, NAME, Row, World

from evergreen import keys
from evergreen.data.store import Store
from evergreen.errors import EvergreenError
from evergreen.loop.monitor import Watched, monitor
from evergreen.pack import load
from evergreen.registry.models import Registry
from evergreen.run import Run, Value
from evergreen.settings import Settings
from evergreen.stages import CHAIN
from evergreen.stages.scoring import predict
from evergreen.work import manifest_of

FIRST_SEED, END = (int(part) for part in os.environ.get("SEEDS", "0:1000").split(":"))

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jobs")]


@pytest.fixture(scope="module")
def jobs() -> Iterator[None]:
    with forked_jobs():
        yield


@pytest.mark.fault
@pytest.mark.parametrize("seed", range(40))
def test_a_pack(seed: int, tmp_path: Path) -> None:
    """Forty packs, always the same."""
    Life.of(worlds.world(seed), tmp_path).play()


@pytest.mark.prove
@pytest.mark.parametrize("seed", range(FIRST_SEED, END))
def test_a_pack_of_many(seed: int, tmp_path: Path) -> None:
    """A thousand packs, or those of the seeds that SEEDS names."""
    Life.of(worlds.world(seed), tmp_path).play()


@dataclass
class Life:
    """A world's pack in a home, what is known there, and what must be."""

    world: World
    pack: worlds.Pack
    root: Path
    memory: reference.Memory = field(default_factory=reference.Memory)
    champion: int | None = None
    versions: dict[int, reference.Expected] = field(default_factory=dict)

    @classmethod
    def of(cls, world: World, tmp_path: Path) -> Life:
        root = tmp_path / world.folder
        pack = worlds.Pack(world, root / "packs" / NAME, tmp_path / "lake")
        pack.write()
        return cls(world, pack, root)

    @property
    def settings(self) -> Settings:
        places = {"EVERGREEN_HOME": str(self.root / "home"), "EVERGREEN_PACKS": str(self.root / "packs")}
        return Settings.from_env(places).model_copy(update={"project": self.root})

    def play(self) -> None:
        """The story from the first run to the look of the monitor."""
        print(f"seed {self.world.seed}: {self.world}")  # noqa: T201  what a failure shows
        for number, as_of in enumerate(self.world.as_ofs):
            self.pack.fill(self.world.visible(as_of))
            self.right(self.run(f"run {number}", as_of), as_of)
        self.predicts()
        self.pack.fill(self.world.visible(self.world.looked))
        self.quiet(self.look(self.world.looked))

    # What Evergreen does.

    def begin(self, run_id: str, as_of: int, **more: Any) -> Run:
        return keys.begin(
            self.settings,
            load(self.settings.packs, NAME),
            run_id,
            as_of=FIRST + timedelta(days=as_of),
            scheduled=datetime(2024, 6, 1, tzinfo=UTC),
            reason="a test asked",
            **more,
        )

    def run(self, run_id: str, as_of: int) -> dict[str, Value]:
        """Perform the chain."""
        run, values = self.begin(run_id, as_of), {}
        for stage in CHAIN:
            perform_stage(run, stage, values)
        return values

    def look(self, as_of: int) -> Watched:
        """Have the monitor look, as its DAG's three tasks do."""
        run, values = self.begin("look", as_of, kind="watch"), {}
        with suppress(EvergreenError):
            for stage in ("ingest", "validate"):
                perform_stage(run, stage, values)
        return monitor(run, values.get("ingest"), values.get("validate"))

    # What is right.

    def right(self, values: dict[str, Any], as_of: int) -> None:
        """Hold what a run left to the reference, and remember it."""
        world, store = self.world, Store(self.settings)
        self.memory, end = reference.look(world, self.memory, world.visible(as_of), as_of, world.whole)
        want = reference.expected(world, self.memory.days, end, world.holdout)
        ingested, snapshot, evaluated = values["ingest"], values["snapshot"], values["evaluate"]
        for name in ("train", "validation", "holdout"):
            window, days = getattr(ingested.windows, name), getattr(want, name)
            assert (window.start, window.end) == (_midnight(days.start), _midnight(days.stop)), name
        parts = manifest_of(store, snapshot.manifest).partitions
        assert [part.period for part in parts] == [_midnight(day) for day in sorted(want.days)]
        for part, day in zip(parts, sorted(want.days), strict=True):
            frame = pl.read_parquet(store.path(part.object))
            assert _plain(frame.to_dicts()) == _plain(want.days[day]), f"day {day}"
        challenger = evaluated.challenger
        assert challenger.rows == len(want.predicted)
        _same(_predictions(store.path(challenger.predictions)), want.predicted)
        _same_figures({name: figure.value for name, figure in challenger.metrics.items()}, want.figures)
        difference = self._compared(evaluated, want)
        decision = reference.decision(world, want.figures[world.metric], difference)
        promoted = values["promote"]
        assert promoted.verdict.decision == decision or promoted.previous == promoted.version, promoted.verdict
        self.versions[promoted.version] = want
        if decision == "promote":
            self.champion = promoted.version
        champion = Registry(self.settings).champion(NAME)
        assert (champion.version if champion else None) == promoted.champion == self.champion

    def _compared(self, evaluated: Any, want: reference.Expected) -> tuple[float, float | None, float | None] | None:
        """Hold the champion's figures and the differences to the reference; return that of the primary metric."""
        if self.champion is None or evaluated.champion is None:
            assert evaluated.champion is None
            return None
        world, store = self.world, Store(self.settings)
        rows = want.rows(want.holdout)
        model = self.versions[self.champion].model
        predicted = model.predict(rows)
        _same(_predictions(store.path(evaluated.champion.predictions)), predicted)
        figures = reference.figures(world, [row[world.target] for row in rows], predicted, model.classes)
        _same_figures({name: figure.value for name, figure in evaluated.champion.metrics.items()}, figures)
        differences = {each.metric: each.estimate for each in evaluated.differences if each.by is None}
        _same_figures(
            {name: estimate.value for name, estimate in differences.items()},
            {name: want.figures[name] - figures[name] for name in figures},
        )
        primary = differences[world.metric]
        return primary.value, primary.low, primary.high

    def predicts(self) -> None:
        """The newest version predicts the same by every way in."""
        number, want = max(self.versions.items())
        rows = want.rows(want.holdout)[:20]
        registry = Registry(self.settings)
        version = registry.version(NAME, number)
        for way, frame in self._ways(rows, registry, version):
            _same(frame, want.predicted[: len(rows)], way)

    def _ways(self, rows: list[Row], registry: Registry, version: Any) -> Iterator[tuple[str, np.ndarray]]:
        import mlflow

        parquet, text = self.root / "asked.parquet", self.root / "asked.csv"
        self.pack.frame(rows).write_parquet(parquet)
        worlds.write_csv(text, rows)
        yield "parquet", predict(self.settings, version, parquet).to_numpy()
        yield "csv", predict(self.settings, version, text).to_numpy()
        if "dates" in worlds.STILL_OPEN:
            return
        mlflow.set_tracking_uri(registry.uri)
        model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version.version}")
        asked = self.pack.frame(rows).select(list(version_inputs(model))).to_pandas()
        for column in self.world.columns:  # as somebody hands them over who knows of nulls
            if column.shown in ("int", "id") and column.name in asked:
                asked[column.name] = [row[column.name] for row in rows]
                asked[column.name] = asked[column.name].astype("Int64")
        yield "pyfunc", np.asarray(model.predict(asked), dtype=float)

    def quiet(self, watched: Watched) -> None:
        """Where nothing moved, the monitor is quiet; without a champion it compares nothing."""
        assert (watched.kind or "not compared") == ("quiet" if self.champion else "not compared"), watched.reasons


def version_inputs(model: Any) -> list[str]:
    return [column.name for column in model.metadata.get_input_schema()]


def _midnight(day: int) -> datetime:
    return FIRST + timedelta(days=day)


def _predictions(file: Path) -> np.ndarray:
    return pl.read_parquet(file).to_numpy()


def _same(found: np.ndarray, wanted: np.ndarray, what: str = "predictions") -> None:
    wide = wanted if wanted.ndim == 2 else wanted[:, None]
    found = found if found.ndim == 2 else found[:, None]
    assert found.shape == wide.shape, what
    assert np.array_equal(found, wide), f"{what}: {np.abs(found - wide).max()} in {(found != wide).sum()} places"


def _same_figures(found: dict[str, float], wanted: dict[str, float]) -> None:
    wrong = {
        name: (found.get(name), figure)
        for name, figure in wanted.items()
        if not abs(found.get(name, np.nan) - figure) <= 1e-10
    }
    assert wrong == {}


def _plain(rows: list[Row]) -> list[Row]:
    """Rows as values that compare by what they say: a whole number is the same as int and as float; NaN is no value."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in sorted(row.items())}
        for row in rows
    ]
