"""What people do to MLflow by hand: each command names what is wrong, and its fix, done as it says, works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from evergreen.errors import RegistryError
from evergreen.loop import rollback as back
from evergreen.reports import of_version
from evergreen.stages import scoring

pytestmark = [pytest.mark.slow, pytest.mark.fault]

BIN = Path(sys.executable).parent
THEN, NOW = datetime(2024, 1, 13, tzinfo=UTC), datetime(2024, 1, 14, tzinfo=UTC)


@pytest.fixture(scope="module")
def made(home):
    """A home whose versions 1 and 2 were champion, one after the other."""
    home.write_day(12)
    home.write(gate={"primary": {"metric": "roc_auc", "min": 0.5, "margin": 0.5}})
    home.perform("second", as_of=NOW)
    assert home.champion.version == 2
    return home


@pytest.fixture
def tide(made, tmp_path):
    """A copy of it, for one test to break."""
    shutil.copytree(made.settings.home.parent, tmp_path / "root", symlinks=True)
    return type(made).at(tmp_path / "root")


@pytest.fixture
def client(tide):
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # by run id: a process of MLflow's knows one home only
    tide.registry.champion("tide")  # makes the copy speak of its own place
    return tide.registry._client


def rollback(home, **asked):
    return back.rollback(home.settings, "tide", why="a test", by="me", **asked).version


def predict(home, ref="champion"):
    rows = home.settings.home / "rows.parquet"
    pl.read_parquet(home.file(11)).drop("flooded").head(5).write_parquet(rows)
    return scoring.predict(home.settings, home.registry.version("tide", ref), rows).height


def artifacts_of(client, version):
    """The folders of a version's run and of its model."""
    run = client.get_run(client.get_model_version("tide", str(version)).run_id)
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    return [Path(place.removeprefix("file://")) for place in (run.info.artifact_uri, model.artifact_location)]


def make_elsewhere(client, tmp_path):
    """Version 3, which somebody made with MLflow alone, is champion."""
    made = client.create_model_version("tide", source=tmp_path.as_uri())
    client.set_registered_model_alias("tide", "champion", made.version)


def test_a_champion_made_elsewhere_is_named_and_taken_back(tide, client, tmp_path):
    """Run, prediction and lineage say that Evergreen did not make it; the rollback of the fix works."""
    make_elsewhere(client, tmp_path)
    with pytest.raises(
        RegistryError, match=r"version 3 is champion, and Evergreen did not make it(.|\n)*evergreen rollback"
    ):
        tide.perform("against it", as_of=NOW, force=True)
    for ask in (lambda: tide.registry.lineage("tide", 3), lambda: predict(tide)):
        with pytest.raises(RegistryError, match=r"version 3 was not registered by Evergreen(.|\n)*evergreen runs tide"):
            ask()
    assert rollback(tide) == 2
    assert tide.perform("against it", as_of=NOW, force=True)["promote"].champion == 2


def test_a_first_champion_made_elsewhere_is_taken_off(tide, client, tmp_path):
    """Where no champion came before it, the alias is taken off as the fix says, and the next run makes a champion."""
    for version in (1, 2):
        client.delete_model_version("tide", str(version))
    make_elsewhere(client, tmp_path)
    with pytest.raises(RegistryError) as caught:
        tide.perform("against it", as_of=NOW, force=True)
    call = re.search(r"mlflow\.MlflowClient\(\)(\.delete_registered_model_alias\(.*\))", caught.value.fix)
    assert call is not None
    eval(f"client{call[1]}", {"client": client})
    assert tide.perform("against it", as_of=NOW, force=True)["promote"].champion == 4


@pytest.mark.parametrize("which", ["the run's", "the model's", "all"])
def test_removed_files_are_named_and_logged_again(tide, client, which):
    """Without its files a version keeps its lineage; a run as of the same time, as the fix says, logs them again."""
    folders = artifacts_of(client, 2)
    before = tide.registry.lineage("tide", 2)
    for folder in {"the run's": folders[:1], "the model's": folders[1:], "all": folders}[which]:
        shutil.rmtree(folder)
    assert tide.registry.lineage("tide", 2) == before
    if which != "the run's":
        with pytest.raises(RegistryError, match=r"files of tide version 2 were removed(.|\n)*--as-of 2024-01-14T00:00"):
            predict(tide)
    if which != "the model's":
        with pytest.raises(RegistryError, match=r"files of tide version 2 were removed(.|\n)*evergreen rollback tide"):
            tide.registry.artifact("tide", 2, "profile.bin")
    assert of_version(tide.settings, "tide", 2, "").version == 2
    values = tide.perform("again", as_of=NOW)
    assert (values["register"].version, values["register"].new) == (2, False)
    assert predict(tide) == 5
    assert tide.registry.lineage("tide", 2) == before
    assert tide.registry.artifact("tide", 2, "profile.bin") is not None
    assert rollback(tide) == 1
    assert rollback(tide, to=2) == 2


def test_a_run_does_not_need_the_champions_files_in_mlflow(tide, client):
    """It is compared by what the store has of it; the next champion has all its files."""
    for folder in artifacts_of(client, 2):
        shutil.rmtree(folder)
    tide.write_day(13)
    tide.recovers("after the loss", as_of=datetime(2024, 1, 15, tzinfo=UTC))
    assert predict(tide) == 5


def test_removed_tags_are_read_from_the_mlflow_run(tide, client):
    """A version without its own tags is still known as what it is."""
    for tag in client.get_model_version("tide", "2").tags:
        if tag.startswith("evergreen.") and tag != "evergreen.complete":
            client.delete_model_version_tag("tide", "2", tag)
    assert tide.champion.model_hash is not None
    assert predict(tide) == 5
    tide.write_day(13)
    tide.recovers("without tags", as_of=datetime(2024, 1, 15, tzinfo=UTC))
    assert rollback(tide, to=2) == 2


def test_a_deleted_mlflow_run_is_no_obstacle_until_it_is_removed_for_good(tide, client):
    """Deleted, it can be restored. Once MLflow has removed it, the error names it, and another version is champion."""
    run_id = client.get_model_version("tide", "2").run_id
    client.delete_run(run_id)
    assert predict(tide) == 5
    subprocess.run(
        [BIN / "mlflow", "gc", "--backend-store-uri", tide.registry.uri, "--run-ids", run_id],
        check=True,
        capture_output=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": tide.registry.uri},
    )
    with pytest.raises(
        RegistryError, match=rf"MLflow run {run_id} was deleted(.|\n)*evergreen rollback MODEL --to VERSION"
    ):
        tide.registry.lineage("tide", 2)
    assert rollback(tide, to=1) == 1
    assert predict(tide) == 5


def test_an_alias_taken_off_is_put_back(tide, client):
    """Commands about the champion say how; the rollback of the fix puts it back."""
    client.delete_registered_model_alias("tide", "champion")
    with pytest.raises(RegistryError, match=r"no version or alias 'champion'(.|\n)*evergreen rollback tide"):
        predict(tide)
    assert rollback(tide) == 2
    assert predict(tide) == 5


def test_a_deleted_model_is_made_again(tide, client):
    """The error says that a run makes it again; it does, and the ledger goes on."""
    client.delete_registered_model("tide")
    with pytest.raises(RegistryError, match=r"there is no model 'tide'(.|\n)*evergreen run tide makes it again"):
        predict(tide)
    values = tide.perform("made again", as_of=NOW)
    assert values["promote"].champion == 1
    assert predict(tide) == 5
