"""A small real pack in a home of its own, and the chain performed on it stage by stage, as its Airflow tasks do."""

from __future__ import annotations

import json
import subprocess
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml

from evergreen import database as db
from evergreen import keys
from evergreen.database import Database, Event
from evergreen.errors import EvergreenError
from evergreen.history import history_of
from evergreen.pack import Pack, load
from evergreen.registry.models import ModelVersion, Registry
from evergreen.run import Promoted, Ref, Run, Value
from evergreen.settings import Settings
from evergreen.stages import CHAIN

NAME = "tide"
FIRST = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = 12
AS_OF = FIRST + timedelta(days=DAYS)
SCHEDULED = datetime(2024, 2, 1, tzinfo=UTC)
"""Stands in for an as-of that was not asked for; before any home is made, so no clock turns it."""

MORE = 9
"""Days that come after the champion's, where it is watched: three windows."""
LATER = AS_OF + timedelta(days=MORE)
RULES = {"drift": {"window": "3d", "performance": {"drop": 0.1}}}

PACK = {
    "description": "Will the water reach the road?",
    "owner": "tide@example.com",
    "source": {"kind": "parquet", "path": "rows/*.parquet"},
    "data": {
        "target": "flooded",
        "event_time": "seen_at",
        "lookback": 2,
        "train": "6d",
        "validation": "2d",
        "holdout": "3d",
        "max_staleness": "5d",
    },
    "training": {"call": "model:train", "params": {"steps": 40}, "gpus": 0, "timeout": "2m"},
    "gate": {"primary": {"metric": "roc_auc", "min": 0.6, "margin": 0.2}},
}
MODEL = '''
"""Logistic regression by gradient descent in plain numpy: the same rows give the same weights, to the byte."""
import json

import numpy as np

LOADER = """
import json
from pathlib import Path
import numpy as np

class Model:
    def __init__(self, weights):
        self.weights = np.array(weights)

    def predict(self, frame):
        x = np.column_stack([np.ones(len(frame)), frame[["height", "wind"]].to_numpy(dtype="float64")])
        return 1 / (1 + np.exp(-x @ self.weights))

def load(folder):
    return Model(json.loads((Path(folder) / "weights.json").read_text()))
"""


def train(data, job):
    print("training begins")
    columns = ["height", "wind"]
    x = np.column_stack([np.ones(data.train.height), data.train[columns].to_numpy()])
    y = data.train[data.target].to_numpy()
    weights = np.zeros(3)
    for step in range(1, job.params["steps"] + 1):
        p = 1 / (1 + np.exp(-x @ weights))
        weights -= x.T @ (p - y) / len(y)
        job.progress(step, job.params["steps"], loss=float(np.mean((p - y) ** 2)))
    (job.model_dir / "weights.json").write_text(json.dumps([round(w, 6) for w in weights.tolist()]))
    (job.model_dir / "loader.py").write_text(LOADER)
    job.describe(inputs=columns, requirements=["numpy", "pandas"])
'''


def day(number: int, rows: int = 100) -> pl.DataFrame:
    """The rows of day `number`, the first being 0: its own, whatever other days there are."""
    chance = np.random.default_rng(number)
    height, wind = chance.normal(size=rows), chance.normal(size=rows)
    start = FIRST + timedelta(days=number)
    return pl.DataFrame(
        {
            "seen_at": [start + timedelta(seconds=86400 * n // rows) for n in range(rows)],
            "height": height,
            "wind": wind,
            "station": chance.choice(["north", "south"], size=rows),
            "flooded": (1.5 * height + wind + chance.normal(size=rows) > 0.5).astype("int64"),
        }
    )


def new_truth(rows: pl.DataFrame) -> pl.DataFrame:
    """A target that has nothing to do with the rows any more, so that the champion knows nothing."""
    chance = np.random.default_rng(rows.height)
    return rows.with_columns(flooded=pl.Series((chance.normal(size=rows.height) > 0.5).astype("int64")))


HALF_BLIND = "weights.tolist()", "(weights * [1, 0, 1]).tolist()"
"""Turns the model into one that does not look at what matters most."""
LENIENT = {"primary": {"metric": "roc_auc", "min": 0.5, "margin": 0.5}}
"""A gate that lets it pass."""
PROBATION = {"probation": "9d", "drop": 0.05}


def fallen(home: Home) -> None:
    """Make a champion in `home`, and a day later a worse one, which its gate lets pass: on probation, and watched."""
    home.write(gate=LENIENT, rollback=PROBATION, triggers=RULES)
    home.perform("good", as_of=AS_OF - timedelta(days=1))
    home.write_model(*HALF_BLIND)
    values = home.perform("worse")
    promoted = values["promote"]
    assert isinstance(promoted, Promoted)
    assert (promoted.champion, promoted.previous) == (2, 1)


@dataclass(frozen=True)
class Home:
    """A home with the pack in it."""

    settings: Settings

    @classmethod
    def at(cls, root: Path, **places: str | Path) -> Home:
        """The home under `root`; `places` are fields of Settings."""
        known = Settings.from_env({"EVERGREEN_HOME": str(root / "home"), "EVERGREEN_PACKS": str(root / "packs")})
        return cls(known.model_copy(update={"project": root, **places}))

    @classmethod
    def make(cls, root: Path, *, days: Iterable[int] = range(DAYS), **places: str | Path) -> Home:
        """A new home under `root` whose source has `days`."""
        home = cls.at(root, **places)
        home.rows.mkdir(parents=True)
        home.write()
        home.write_model()
        for number in days:
            home.write_day(number)
        return home

    # What the pack's author and the world write.

    @property
    def folder(self) -> Path:
        return self.settings.packs / NAME

    @property
    def rows(self) -> Path:
        return self.folder / "rows"

    def write(self, **changes: Any) -> None:
        """`pack.yaml`, with the given keys changed; those of a mapping one by one."""
        content = {**PACK}
        for key, value in changes.items():
            content[key] = {**PACK.get(key, {}), **value} if isinstance(value, dict) and key != "source" else value
        (self.folder / "pack.yaml").write_text(yaml.safe_dump(content, sort_keys=False))

    def write_model(self, old: str = "", new: str = "") -> None:
        """`model.py`, with the text `old` in it replaced by `new`."""
        assert old in MODEL
        (self.folder / "model.py").write_text(MODEL.replace(old, new) if old else MODEL)

    def file(self, number: int) -> Path:
        return self.rows / f"{number:03}.parquet"

    def write_day(self, number: int, turn: Callable[[pl.DataFrame], pl.DataFrame] = lambda rows: rows) -> None:
        """The rows of a day, turned into what the test is about."""
        turn(day(number)).write_parquet(self.file(number))

    # The chain.

    @property
    def pack(self) -> Pack:
        return load(self.settings.packs, NAME)

    def begin(self, run_id: str, *, as_of: datetime | None = AS_OF, force: bool = False) -> Run:
        return keys.begin(
            self.settings, self.pack, run_id, as_of=as_of, scheduled=SCHEDULED, reason="a test asked", force=force
        )

    def perform(
        self, run_id: str, *, until: str = "promote", after: dict[str, Value] | None = None, **asked: Any
    ) -> dict[str, Value]:
        """The values of the stages up to `until`, for a new run or a retried one; from where `after` ends, if given."""
        run = self.begin(run_id, **asked)
        values = dict(after or {})
        for stage in CHAIN:
            if stage not in values:
                perform_stage(run, stage, values)
            if stage == until:
                break
        return values

    # What a run leaves.

    @property
    def database(self) -> Database:
        return db.connect(self.settings.database_url)

    @property
    def registry(self) -> Registry:
        return Registry(self.settings)

    def events(self, kind: str, run_id: str | None = None) -> list[Event]:
        return self.database.events(NAME, kind=kind, run_id=run_id)

    def stages(self, kind: str, run_id: str | None = None) -> list[str]:
        """The stages that events of this kind are about, in their order."""
        return [event.body["stage"] for event in self.events(kind, run_id)]

    def git(self, *arguments: str) -> list[str]:
        """Lines that git says of the snapshot repository; none where there is no repository."""
        repository = Path(self.settings.data_repository)
        if not repository.exists():
            return []
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[:-1]

    @property
    def champion(self) -> ModelVersion | None:
        return self.registry.champion(NAME)

    def visible(self) -> dict[str, Any]:
        """All that somebody outside of the chain can see of it; equal before and after where nothing came of a run."""
        client = self.registry._client
        experiments = [found.experiment_id for found in client.search_experiments()]
        runs = client.search_runs(experiments)
        return {
            "champion": self.champion,
            "versions": self.registry.versions(NAME),
            "mlflow runs": sorted(run.info.run_id for run in runs),
            "logged models": sorted(model.model_id for model in client.search_logged_models(experiments)),
            "unfinished runs": [run.info.run_id for run in runs if run.info.status == "RUNNING"],
            "tags": self.git("tag"),
            "commits": self.git("rev-list", "--branches"),
        }

    def leftovers(self) -> list[str]:
        """What lies in the folder of the jobs, but the lock that processes of this machine hold in turn.

        Nor is a prediction for somebody who was killed while he waited: each has a name of its own, which no retry knows,
        so that two people may predict at once; it ends by itself, and is swept after its days.
        """
        found = (path.name for path in self.settings.jobs.glob("*"))
        return sorted(name for name in found if name != f".{NAME}.lock" and not name.startswith("predict-"))

    def processes(self) -> list[int]:
        """Processes that were started on a folder of this home and live."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.startswith(str(self.settings.home).encode()) for word in words):
                found.append(int(place.name))
        return found

    def objects(self, ref: Ref) -> list[Path]:
        """Where an object lies, in the cache and in the remote."""
        places = (self.settings.cache, Path(self.settings.data_remote))
        return [place / "files" / "md5" / ref.hash[:2] / ref.hash[2:] for place in places]

    def refuses(
        self, error: type[EvergreenError], run_id: str, *, says: Iterable[str], left: str | None = None, **asked: Any
    ) -> None:
        """Hold a run to what bad input and bad luck get.

        It ends in this `error`, whose text fits on a screen and says all of `says`; the failure is an event; nobody
        outside sees anything of the run, and nothing is left where jobs work but, where named, the folder of the job
        that failed and has the log.
        """
        before, jobs = self.visible(), self.leftovers()
        with pytest.raises(error) as caught:
            self.perform(run_id, **asked)
        assert type(caught.value) is error
        text = str(caught.value)
        assert [words for words in says if words not in text] == [], text
        assert len(text.splitlines()) <= 20
        failure = self.events("failure", run_id)[-1].body
        assert (failure["error"], failure["what"], failure["fix"]) == (
            error.__name__,
            caught.value.what,
            caught.value.fix,
        )
        assert history_of(self.database, run_id)["outcome"] == "failed"
        assert self.database.first_bad(NAME) is None
        assert self.visible() == before
        new = [name for name in self.leftovers() if name not in jobs]
        assert [name.split("-")[0] for name in new] == ([left] if left else [])
        assert self.processes() == []

    def recovers(self, run_id: str, **asked: Any) -> dict[str, Value]:
        """Hold the run after the mending to a good end: its version is champion, complete, and nothing is half-done."""
        values = self.perform(run_id, **asked)
        promoted = values["promote"]
        assert isinstance(promoted, Promoted)
        assert promoted.verdict.decision == "promote", promoted.verdict
        seen = self.visible()
        assert self.champion is not None
        assert (self.champion.version, self.champion.complete) == (promoted.version, True)
        assert seen["unfinished runs"] == []
        assert len(seen["mlflow runs"]) == len(seen["versions"]) == len(seen["logged models"])
        assert self.database.first_bad(NAME) is None
        return values


def perform_stage(run: Run, stage: str, values: dict[str, Value]) -> None:
    """Perform `stage` with the values it takes, and add its own: by name and through JSON, as tasks hand them on."""
    hints = typing.get_type_hints(CHAIN[stage])
    takes = {name: kind for name, kind in hints.items() if name not in ("run", "return")}
    names = {"ingested": "ingest", "validated": "validate", "snapshot": "snapshot", "trained": "train"}
    names |= {"evaluated": "evaluate", "registered": "register"}
    given = {
        name: kind.model_validate(json.loads(values[names[name]].model_dump_json())) for name, kind in takes.items()
    }
    values[stage] = CHAIN[stage](run, **given)


def reject(home: Home) -> None:
    """Runs one, two and three, whose retention is 90 days: a champion, a version that the gate rejects, a champion."""
    for number in (DAYS, DAYS + 1):
        home.write_day(number)
    home.write(retention="90d")
    home.perform("one")
    home.write(retention="90d", gate={"limits": [{"metric": "roc_auc", "min": 0.9999}]})
    home.perform("two", as_of=AS_OF + timedelta(days=1))
    home.write(retention="90d")
    home.perform("three", as_of=AS_OF + timedelta(days=2))


@pytest.fixture(scope="module")
def places() -> dict[str, str]:
    """Fields of the home's Settings that a module wants elsewhere."""
    return {}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, places: dict[str, str]) -> Home:
    """A home with a champion, made by the run `first`; shared by a module's tests, each of which mends what it breaks."""
    made = Home.make(tmp_path_factory.mktemp("root"), **places)
    made.perform("first")
    return made


@pytest.fixture
def kept(home: Home) -> Iterator[None]:
    """The pack's folder, its source's files included, is after the test what it was before."""
    before = {file: file.read_bytes() for file in home.folder.rglob("*") if file.is_file()}
    yield
    for file in home.folder.rglob("*"):
        if file.is_file() and file not in before:
            file.unlink()
    for file, content in before.items():
        file.write_bytes(content)
