"""A real MLflow registry on SQLite, made once, and real model folders of numpy; every test takes a model name of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from evergreen.database import Database
from evergreen.pack import Data, Pack
from evergreen.registry import lineage as parts
from evergreen.registry import promotion
from evergreen.registry.lineage import Code, Environment, Figure, Lineage, Training, Validation
from evergreen.registry.models import Registry
from evergreen.run import Hardware, Run, Verdict, Windows
from evergreen.settings import Settings

PROMOTE = Verdict(decision="promote", reasons=("better",))
LOADER = '''
"""Adds the weight of the carrier to distance x slope; an unknown carrier weighs nothing."""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Model:
    carriers: dict
    slope: float

    def predict(self, frame):
        weights = frame["carrier"].map(self.carriers).fillna(0.0).to_numpy(dtype="float64")
        return weights + self.slope * frame["distance"].fillna(0).to_numpy(dtype="float64")


def load(folder):
    carriers = json.loads((Path(folder) / "carriers.json").read_text())
    return Model(carriers, float(np.load(Path(folder) / "slope.npy", allow_pickle=False)))
'''
INPUTS = {"carrier": "string", "distance": "int", "temperature": "float", "weekend": "bool", "departure": "datetime"}


def model_folder(folder: Path, slope: float = 0.5) -> Path:
    """A model folder by the contract, with strings in its inputs."""
    folder.mkdir(parents=True)
    (folder / "loader.py").write_text(LOADER)
    (folder / "carriers.json").write_text(json.dumps({"AA": 1.0, "UA": 2.0}))
    np.save(folder / "slope.npy", slope)
    requirements = [f"numpy=={np.__version__}", f"pandas=={pd.__version__}"]
    (folder / "model.json").write_text(json.dumps({"task": "binary", "inputs": INPUTS, "requirements": requirements}))
    return folder


def rows() -> pd.DataFrame:
    """Two raw rows; the second has nothing but its carrier, which no vocabulary holds."""
    return pd.DataFrame(
        {
            "carrier": ["UA", "never seen"],
            "distance": [100.0, None],
            "temperature": [12.5, None],
            "weekend": [True, None],
            "departure": pd.to_datetime(["2013-04-01T06:00Z", None], utc=True),
        }
    )


def made_of(name: str, **changes: object) -> Lineage:
    """A whole lineage for `name`."""
    values = {
        "model": name,
        "version": None,
        "run_id": "manual__2013-04-01T00:00:00+00:00",
        "as_of": datetime(2013, 4, 1, tzinfo=UTC),
        "data_until": datetime(2013, 4, 1, tzinfo=UTC),
        "windows": Windows.ending(datetime(2013, 4, 1, tzinfo=UTC), Data(target="late", event_time="departure")),
        "reason": "a person asked",
        "snapshot": parts.Data(
            repository="/data",
            revision="a" * 40,
            tag=f"{name}/20130401T000000Z-0123abcd",
            hash="0123456789abcdef0123456789abcdef.dir",
            rows=28834,
            bytes=1_000_000,
            partitions=31,
        ),
        "validation": Validation(success=True, suite_hash="s" * 64, rows_checked=28834, rows_quarantined=3),
        "code": Code(revision="b" * 40, dirty=False, evergreen="0.1.0"),
        "environment": Environment(python="3.11.7", lock_hash="c" * 64, image=None),
        "hardware": Hardware(device="cpu", name="a processor"),
        "training": Training(params={"epochs": 5, "layers": [64, 32]}, seed=7, duration_s=1.5),
        "metrics": {"roc_auc": Figure(value=0.69, low=0.67, high=0.71)},
        "verdict": None,
    }
    return Lineage(**(values | changes))


def register(registry: Registry, name: str, folder: Path, *, key: str = "k1", **changes: object) -> tuple[int, str]:
    """Register `folder` with everything that a run gives."""
    values = {
        "key": key,
        "run_name": "0123456789ab",
        "lineage": made_of(name),
        "model_hash": "f" * 32 + ".dir",
        "metrics": {"roc_auc": 0.69},
        "curve": [{"step": step, "of": 2, "loss": 1 / step} for step in (1, 2)],
        "artifacts": {},
        "input_example": rows(),
        "tags": {},
        "description": "Will it be late?",
    }
    return registry.register(name, folder, **(values | changes))


def settings_at(home: Path) -> Settings:
    return Settings.from_env({"EVERGREEN_HOME": str(home)})


def run_of(name: str, run_id: str, settings: Settings) -> Run:
    """A run of a pack called `name`."""
    pack = Pack.model_validate(
        {
            "name": name,
            "folder": settings.home / name,
            "description": "Will it be late?",
            "owner": "flights@example.com",
            "source": {"kind": "parquet", "path": "rows/*.parquet"},
            "data": {"target": "late", "event_time": "departure"},
            "training": {"call": "model:train"},
            "gate": {"primary": {"metric": "roc_auc", "min": 0.5}},
        }
    )
    return Run(pack=pack, id=run_id, as_of=datetime(2013, 4, 1, tzinfo=UTC), reason="a test", settings=settings)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def registry(home) -> Registry:
    return Registry(settings_at(home))


@pytest.fixture(scope="session")
def client(registry):
    """What a stock MLflow client sees."""
    import mlflow

    registry.champion("nothing")  # makes the database
    return mlflow.MlflowClient(registry.uri, registry_uri=registry.uri)


@pytest.fixture(scope="session")
def given():
    """The functions above, for test modules that cannot import this file."""
    return SimpleNamespace(
        rows=rows, made_of=made_of, register=register, model_folder=model_folder, settings_at=settings_at, run_of=run_of
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    return model_folder(tmp_path / "trained")


@pytest.fixture(scope="session")
def run_trials():
    """Run `trials.py` in a process of its own, where children can be forked and killed; its answer."""

    def run(place: Path, races: int | str, *calls: str):
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("trials.py")), str(place), str(races), *calls],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def run_approvals(run_trials):
    """Approvals killed at these steps, or at every one; what came of them."""
    return lambda place, *steps: run_trials(place, "approval", *steps)


@pytest.fixture(scope="session")
def trials(run_trials, tmp_path_factory) -> dict:
    """What came of kills and races, few enough for every day."""
    calls = ("log_model_artifacts#1", "create_model_version#1", "set_terminated#1")
    return run_trials(tmp_path_factory.mktemp("trials"), 20, *calls)


@pytest.fixture(scope="session")
def model(registry, given, tmp_path_factory) -> str:
    """A model with three versions, none of them champion."""
    folder = given.model_folder(tmp_path_factory.mktemp("model") / "trained")
    for key in ("first", "second", "third"):
        given.register(registry, "promoted", folder, key=key)
    return "promoted"


@pytest.fixture
def database(tmp_path) -> Database:
    return Database(f"sqlite:///{tmp_path / 'events.db'}")


@pytest.fixture
def promote(database, registry, model, given, home):
    """Promote a version of `model`; the alias is off before and after the test."""

    def off() -> None:
        champion = registry.champion(model)
        if champion is not None:
            registry.drop_alias(model, "champion", champion.version)

    def promote(version: int, judged_against: int | None, verdict: Verdict = PROMOTE, run: str | None = None):
        of = given.run_of(model, run or f"run of {version}", given.settings_at(home))
        return promotion.promote(
            database, registry, run=of, version=version, judged_against=judged_against, verdict=verdict
        )

    off()
    yield promote
    off()
