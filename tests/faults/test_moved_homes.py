"""A home with a champion that is moved or copied: all of it works at the new place, and the original is left alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.tracking._tracking_service import utils

from evergreen import home as places
from evergreen.cli.runs import version_named
from evergreen.loop import prune
from evergreen.loop import rollback as back
from evergreen.registry import ledger
from evergreen.work import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.fault]

BIN = Path(sys.executable).parent
SHARED = ["validate", "snapshot", "train", "evaluate", "register"]


def content_of(folder: Path) -> dict[str, str]:
    """The sha256 of each file under `folder`; of a database its rows, which a reader's journal does not change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".db-wal", ".db-shm")) or not path.is_file():
            continue
        if path.suffix == ".db":
            with sqlite3.connect(path) as database:
                found[str(path)] = hashlib.sha256("\n".join(database.iterdump()).encode()).hexdigest()
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def original(home):
    """A home with two champions, one after the other."""
    home.write_day(12)
    home.write(gate={"primary": {"metric": "roc_auc", "min": 0.5, "margin": 0.5}})
    home.perform("second", as_of=datetime(2024, 1, 14, tzinfo=UTC))
    assert home.champion.version == 2
    return home


@pytest.fixture(params=["copied", "moved", "moved by an earlier version"])
def elsewhere(request, original, tmp_path):
    """The home with its packs at another place; `original` is gone, or must stay as it is."""
    root, kept = original.settings.home.parent, tmp_path / "kept"
    shutil.copytree(root, tmp_path / "new", symlinks=True)
    if request.param.endswith("an earlier version"):
        (tmp_path / "new" / "home" / places.MARKER).unlink()
        (tmp_path / "new" / "home" / "data" / ".dvc" / "config.local").unlink()
    before = content_of(root)
    utils._artifact_repos_cache.clear()  # by run id: a process of MLflow's knows one home only
    if request.param != "copied":
        root.rename(kept)
    yield type(original).at(tmp_path / "new")
    if request.param != "copied":
        assert not root.exists()
        kept.rename(root)
    assert content_of(root) == before


def test_everything_works_at_the_new_place(original, elsewhere, tmp_path):
    """Lineage, receipts, a new run, rollback, drill, the ledger, and stock MLflow and DVC."""
    new = elsewhere.settings.home
    registry, version = version_named(elsewhere.settings, "tide@champion")
    assert registry.lineage("tide", 2)["snapshot"]["repository"] == str(new / "data")
    assert (version.version, registry.artifact("tide", 1, "profile.bin") is not None) == (2, True)
    elsewhere.perform("again", as_of=datetime(2024, 1, 14, tzinfo=UTC))
    assert {*SHARED} - {*elsewhere.stages("receipt", "again")} <= {"evaluate"}  # with itself it was not compared before
    assert len(registry.versions("tide")) == 2
    elsewhere.write_day(13)
    elsewhere.perform("third", as_of=datetime(2024, 1, 15, tzinfo=UTC))
    assert len(registry.versions("tide")) == 3
    assert back.rollback(elsewhere.settings, "tide", to=1, why="a test", by="me").version == 1
    assert back.drill(elsewhere.settings, "tide", by="me").drill
    verified = ledger.verify(elsewhere.database, "tide", checkpoints(elsewhere.settings, "tide"))
    assert verified.holds
    assert places.whereabouts(elsewhere.settings).kind == "here"
    assert str(original.settings.home) not in stock_mlflow(registry.uri, tmp_path)
    tags = [line for line in elsewhere.git("tag") if line.startswith("tide/")]
    for tag in tags:  # those from before the move name the old store
        subprocess.run(
            [BIN / "dvc", "get", new / "data", "tide", "--rev", tag, "--out", tmp_path / "rows" / tag],
            check=True,
            capture_output=True,
        )
        assert any((tmp_path / "rows" / tag).iterdir())


def stock_mlflow(uri: str, folder: Path) -> str:
    """Load and ask version 1 as any MLflow client does, in a process that does not know Evergreen; all places it sees."""
    script = f"""
import json, mlflow
mlflow.set_tracking_uri({uri!r})
client = mlflow.MlflowClient()
version = client.get_model_version("tide", "1")
run = client.get_run(version.run_id)
mlflow.pyfunc.load_model("models:/tide/1")
mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path="lineage.json", dst_path={str(folder)!r})
print(json.dumps([version.source, run.info.artifact_uri, run.data.tags, [i.dataset.source for i in run.inputs.dataset_inputs]]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=folder)
    return json.dumps(json.loads(done.stdout.splitlines()[-1]))


def test_pruning_a_copy_removes_nothing_of_the_original(original, tmp_path):
    """What the copy lets go of goes from the copy alone."""
    root = original.settings.home.parent
    shutil.copytree(root, tmp_path / "new", symlinks=True)
    copy = type(original).at(tmp_path / "new")
    before = content_of(root)
    copy.write(retention="1d", gate={"limits": [{"metric": "roc_auc", "min": 0.9999}]})
    copy.write_day(13)
    copy.perform("rejected", as_of=datetime(2024, 1, 15, tzinfo=UTC))
    copy.write(retention="1d")
    copy.write_day(14)
    copy.perform("newest", as_of=datetime(2024, 1, 16, tzinfo=UTC))
    pruned = prune.prune(copy.settings, "tide", now=datetime.now(UTC) + timedelta(days=9))
    assert pruned.objects > 0
    assert content_of(root) == before
