"""Random small packs over random days end right, or in a refusal whose advice works; never in a crash or a difference.

A failure names its seed: `SEEDS=17:18 make prove ARGS=-x` plays that one pack again, and `SEEDS=300:1000 make prove` goes
on from there.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from fastapi.testclient import TestClient
from mlflow.tracking._tracking_service import utils as tracking
from tests.faults import reference, worlds
from tests.faults.conftest import perform_stage
from tests.faults.forked import forked_jobs
from tests.faults.troubles import TROUBLES, Trouble
from tests.faults.worlds import FIRST, NAME, Row, World

from evergreen import keys
from evergreen.data.store import Store
from evergreen.errors import EvergreenError
from evergreen.loop import Start, admit
from evergreen.loop.monitor import Watched, monitor
from evergreen.pack import load
from evergreen.registry.models import Registry
from evergreen.run import Run, Value
from evergreen.settings import Settings
from evergreen.stages import CHAIN
from evergreen.stages.scoring import predict
from evergreen.triggers import senders, webhook
from evergreen.work import manifest_of

FIRST_SEED, END = (int(part) for part in os.environ.get("SEEDS", "0:1000").split(":"))

PROJECT = Path(__file__).parents[2]
PARTS = ("train", "validation", "holdout")
ALERT = {
    "status": "firing",
    "labels": {"alertname": "Drift"},
    "annotations": {"summary": "PSI is high"},
    "startsAt": "2024-01-10T10:00:00Z",
    "fingerprint": "aa",
}
TOGETHER = """
import sys
from datetime import datetime
from evergreen import keys
from evergreen.pack import load
from evergreen.settings import Settings
from tests.faults.conftest import perform_stage
from evergreen.stages import CHAIN

settings, at = Settings.model_validate_json(sys.argv[1]), datetime.fromisoformat(sys.argv[3])
pack = load(settings.packs, "net")
run, values = keys.begin(settings, pack, sys.argv[2], as_of=at, scheduled=at, reason="a test asked"), {}
for stage in CHAIN:
    perform_stage(run, stage, values)
"""
"""Performs the chain in a process of its own: places, run, as-of."""


class Idle:
    """A scheduler that runs nothing."""

    def is_paused(self, _pack: str) -> bool:
        return False

    def run_exists(self, _pack: str, _run_id: str) -> bool:
        return False


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
    """Where everything lies."""
    home: Path
    memory: reference.Memory = field(default_factory=reference.Memory)
    champion: int | None = None
    versions: dict[int, reference.Expected] = field(default_factory=dict)
    edits: dict[int, list[Row]] = field(default_factory=dict)
    """Day → its rows, where the source does not hold what it should."""
    lengths: dict[str, int] = field(default_factory=dict)
    """How many days each window has."""
    moved: bool = False
    """Whether the rows of the champion's time were not like one another."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of whoever posts alerts."""
    left: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """A home that was copied → what is in it, which stays as it is."""

    @classmethod
    def of(cls, world: World, tmp_path: Path) -> Life:
        root = tmp_path / world.folder
        pack = worlds.Pack(world, root / "packs" / NAME, tmp_path / "lake")
        pack.expectations += [
            {"expect_column_values_to_be_unique": {"column": column.name}}
            for column in world.columns
            if column.kind == "id"
        ]
        pack.write()
        home = (tmp_path if "?" in world.folder else root) / "home"  # a home with ? in its path is refused
        return cls(world, pack, root, home, lengths={name: getattr(world, name) for name in PARTS})

    @property
    def settings(self) -> Settings:
        places = {"EVERGREEN_HOME": str(self.home), "EVERGREEN_PACKS": str(self.root / "packs")}
        return Settings.from_env(places).model_copy(update={"project": self.root})

    def source(self, as_of: int) -> dict[int, list[Row]]:
        """Day → rows, as the source holds them when a run as of that day begins."""
        return {day: rows for day, rows in {**self.world.visible(as_of), **self.edits}.items() if rows}

    def play(self) -> None:
        """The story from the first run to the look of the monitor."""
        world = self.world
        print(f"seed {world.seed}: {world}")  # noqa: T201  what a failure shows
        for number, as_of in enumerate(world.as_ofs):
            self.happens(world.incidents.get(number), as_of)
            self.pack.fill(self.source(as_of))
            if world.everything_else:
                self.change_what_no_run_needs(as_of)
            run_id = f"run {number}"
            if world.trouble is not None and world.troubled == number:
                trouble = TROUBLES[world.trouble]
                trouble.plant(self, as_of)
                fix = self.refused(run_id, as_of, trouble)
                trouble.mend(self, as_of, fix)
                run_id += "" if world.cleared else ", mended"
            self.right(self.run(run_id, as_of), as_of)
        if world.alerts:
            self.fires()
        self.happens(world.incidents.get(len(world.as_ofs)), world.as_ofs[-1])
        self.predicts()
        self.pack.fill(self.source(world.looked))
        self.noticed(self.look(world.looked))
        if world.alerts:
            self.confirmed()
        for home, before in self.left.items():
            assert _listing(home) == before, "the original of a copied home"

    # What happens to the home.

    def happens(self, incident: str | None, as_of: int) -> None:
        home = self.home
        tracking._artifact_repos_cache.clear()  # a home never moves while one of its processes runs: MLflow remembers places
        if incident == "home moved":
            self.home = home.with_name("another home")
            shutil.move(home, self.home)
        elif incident == "all moved":
            root = self.pack.lake.parent / "elsewhere" / "here"
            root.parent.mkdir()
            shutil.move(self.root, root)
            if home.is_relative_to(self.root):
                self.home = root / home.name
            self.root, self.pack.folder = root, root / "packs" / NAME
        elif incident == "home copied":
            self.home = home.with_name("a copy")
            shutil.copytree(home, self.home)
            self.left[home] = _listing(home)
        elif incident == "checked out":
            _git(home / "data", "checkout", "--quiet", NAME)
        elif incident == "two at once":
            self.pack.fill(self.source(as_of))
            self.two_at_once(as_of)

    def two_at_once(self, as_of: int) -> None:
        """Two processes perform the first runs of the pack; both end well."""
        places = self.settings.model_dump_json()
        commands = [[sys.executable, "-c", TOGETHER, places, f"run {n}", str(_midnight(as_of))] for n in ("0", "x")]
        both = [subprocess.Popen(command, stderr=subprocess.PIPE, cwd=PROJECT) for command in commands]
        ends = [(process.communicate()[1].decode(), process.returncode) for process in both]
        assert [(words[-2000:], status) for words, status in ends if status] == []

    def change_what_no_run_needs(self, as_of: int) -> None:
        """Give a file of days that no window reaches other columns."""
        day = as_of - sum(self.lengths.values()) - 2
        file = self.pack.file(day)
        if not file.exists():
            return
        if file.suffix == ".csv":
            pl.read_csv(file, infer_schema=False, glob=False).with_columns(pl.lit("x").alias("not yet")).write_csv(file)
        else:
            pl.read_parquet(file, glob=False).with_columns(pl.lit("x").alias("not yet")).write_parquet(file)

    def refused(self, run_id: str, as_of: int, trouble: Trouble) -> str:
        """Hold a run to a refusal that fits on a screen and gives the advice; return that."""
        with pytest.raises(EvergreenError) as caught:
            self.run(run_id, as_of)
        assert type(caught.value).__name__ == trouble.error, caught.value
        assert re.search(trouble.advice, caught.value.fix), caught.value.fix
        assert len(str(caught.value).splitlines()) <= 20
        assert len(str(caught.value)) <= 4000
        champion = Registry(self.settings).champion(NAME)
        assert (champion.version if champion else None) == self.champion
        return caught.value.fix

    def fires(self) -> None:
        """Somebody posts a group of alerts, one of which nobody can write down; the others are kept."""
        token = senders.add(self.settings.senders, "am", "bearer")
        self.headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
        bad = {**ALERT, "fingerprint": "bb", "annotations": {"summary": "a bell \x07 rings"}}
        response = self.post([ALERT, bad])
        assert response.status_code == 202, response.text
        assert self.admitted() == []

    def confirmed(self) -> None:
        """The alert keeps firing: that confirms it, and a run is to start."""
        starts: list[Start] = []
        deadline = time.monotonic() + 30
        while not starts:  # on a slow machine the first hearing is past its 99 windows by now, so two more are needed
            assert time.monotonic() < deadline, "an alert that keeps firing was not confirmed"
            response = self.post([ALERT])
            assert response.status_code == 202, response.text
            starts = self.admitted()
        assert [start.pack for start in starts] == [NAME]

    def post(self, alerts: list[dict[str, Any]]) -> Any:
        body = {"version": "4", "status": "firing", "groupKey": "g", "alerts": alerts}
        client = TestClient(webhook.make_app(self.settings, lambda: None))
        return client.post(f"/alerts/{NAME}", json=body, headers=self.headers)

    def admitted(self) -> list[Start]:
        return admit(self.settings, Idle())

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
        whole = sum(self.lengths.values())
        self.memory, end = reference.look(world, self.memory, self.source(as_of), as_of, whole)
        want = reference.expected(world, self.clean(self.memory.days), end, self.lengths)
        ingested, snapshot, evaluated = values["ingest"], values["snapshot"], values["evaluate"]
        for name in ("train", "validation", "holdout"):
            window, days = getattr(ingested.windows, name), getattr(want, name)
            assert (window.start, window.end) == (_midnight(days.start), _midnight(days.stop)), name
        parts = manifest_of(store, snapshot.manifest).partitions
        assert [part.period for part in parts] == [_midnight(day) for day in sorted(want.days)]
        for part, day in zip(parts, sorted(want.days), strict=True):
            frame = pl.read_parquet(store.path(part.object), glob=False)
            _same_rows(frame.to_dicts(), want.days[day], f"day {day}")
        challenger = evaluated.challenger
        assert challenger.rows == len(want.predicted)
        _same(_predictions(store.path(challenger.predictions)), want.predicted)
        _same_figures({name: figure.value for name, figure in challenger.metrics.items()}, want.figures)
        promoted = values["promote"]
        if self.champion == promoted.version:  # nothing new was learned
            assert promoted.previous == self.champion
        else:
            difference = self._compared(evaluated, want)
            decision = reference.decision(world, want.figures[world.metric], difference)
            assert promoted.verdict.decision == decision, promoted.verdict
            if decision == "promote":
                self.champion = promoted.version
        self.versions[promoted.version] = want
        if world.seed % 8 == 0:
            self.fetched(snapshot, want, self.root / f"fetched as of {as_of}")
        champion = Registry(self.settings).champion(NAME)
        assert (champion.version if champion else None) == promoted.champion == self.champion

    def clean(self, days: dict[int, list[Row]]) -> dict[int, list[Row]]:
        """The rows that the expectations let pass."""
        rules = [rule.get("expect_column_values_to_not_be_null") for rule in self.pack.expectations]
        names = [rule["column"] for rule in rules if rule]
        kept = {
            day: [row for row in rows if all(row[name] is not None for name in names)] for day, rows in days.items()
        }
        return {day: rows for day, rows in kept.items() if rows}

    def _compared(self, evaluated: Any, want: reference.Expected) -> tuple[float, float | None, float | None] | None:
        """Hold the champion's figures and the differences to the reference; return that of the primary metric."""
        if self.champion is None or evaluated.champion is None:
            assert evaluated.champion is None
            assert self.champion is None
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
        mlflow.set_tracking_uri(registry.uri)
        try:
            model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version.version}")
        finally:
            mlflow.set_tracking_uri(None)  # it set an environment variable, by which later tests would find this home
        asked = self.pack.frame(rows).to_pandas()[version_inputs(model)]
        for column in self.world.columns:  # as somebody hands them over who knows of nulls
            if column.shown in ("int", "id") and column.name in asked:
                asked[column.name] = pd.array([row[column.name] for row in rows], dtype="Int64")
        yield "pyfunc", np.asarray(model.predict(asked), dtype=float)

    def fetched(self, snapshot: Any, want: reference.Expected, folder: Path) -> None:
        """Stock `dvc get` brings the snapshot's rows into the folder."""
        dvc = Path(sys.executable).parent / "dvc"
        command = [dvc, "get", "--quiet", self.settings.data_repository, NAME, "--rev", snapshot.tag, "-o", folder]
        subprocess.run(command, check=True)
        rows = [row for file in sorted(folder.iterdir()) for row in pl.read_parquet(file, glob=False).to_dicts()]
        _same_rows(rows, [row for day in sorted(want.days) for row in want.days[day]], "dvc get")

    def noticed(self, watched: Watched) -> None:
        """The monitor is quiet where nothing moved, and sees what did; without a champion it compares nothing."""
        world, kind = self.world, watched.kind or "not compared"
        if self.champion is None:
            assert kind == "not compared"
            return
        change = next((day for day in (world.arrives, world.retires, world.shifts) if day is not None), None)
        end = self.versions[self.champion].holdout.stop
        if change is None and not self.moved:
            assert kind == "quiet", watched.reasons
        elif change is not None and end <= change <= world.looked - 2 * world.window:
            assert kind in ("shift", "withstood"), watched.reasons
        else:
            assert kind != "not compared", watched.reasons


def version_inputs(model: Any) -> list[str]:
    return [column.name for column in model.metadata.get_input_schema()]


def _listing(folder: Path) -> dict[str, Any]:
    """Every file of a folder, and when it was last written."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def _git(repository: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", repository, *arguments], check=True)


def _midnight(day: int) -> datetime:
    return FIRST + timedelta(days=day)


def _predictions(file: Path) -> np.ndarray:
    return pl.read_parquet(file, glob=False).to_numpy()


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


def _same_rows(found: list[Row], wanted: list[Row], what: str) -> None:
    differ = [(a, b) for a, b in zip(_plain(found), _plain(wanted), strict=False) if a != b]
    assert (len(found), differ[:1]) == (len(wanted), []), f"{what}: {len(found)} for {len(wanted)}, {differ[:1]}"


def _plain(rows: list[Row]) -> list[Row]:
    """Rows as values that compare by what they say: a whole number is the same as int and as float; NaN is no value."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in sorted(row.items())}
        for row in rows
    ]
