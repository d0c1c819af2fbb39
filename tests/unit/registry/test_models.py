"""A version in MLflow: made once, whole, loadable by a stock client, and telling what made it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import pytest

from evergreen.errors import RegistryError
from evergreen.registry.models import Registry
from evergreen.run import Verdict
from evergreen.settings import Settings

PREDICT = """
import json, sys
sys.modules["evergreen"] = None  # any import of it fails from here on
import mlflow, pandas as pd
try:
    import evergreen
except ImportError:
    model = mlflow.pyfunc.load_model("models:/stock@champion")
rows = pd.DataFrame({"carrier": ["UA", "never seen"], "temperature": [12.5, None], "weekend": [True, None],
                     "departure": pd.to_datetime(["2013-04-01T06:00Z", None], utc=True)})
whole, missing = rows.assign(distance=[100, 200]), rows.assign(distance=[100, None])
print(json.dumps([list(model.predict(whole)), list(model.predict(missing))]))
"""


@pytest.fixture(scope="module")
def made(registry, client, given, tmp_path_factory):
    """One registered version: its value, its MLflow run, and the folder it was made from."""
    place = tmp_path_factory.mktemp("made")
    folder = given.model_folder(place / "trained")
    (place / "result.json").write_text("{}")
    (place / "plots").mkdir()
    (place / "plots" / "roc.png").write_bytes(b"png")
    number, run_id = given.register(
        registry,
        "made",
        folder,
        artifacts={"validation/result.json": place / "result.json", "plots": place / "plots"},
        tags={"evergreen.owner": "flights@example.com"},
    )
    return registry.version("made", number), client.get_run(run_id), folder


@pytest.fixture(scope="module")
def logged(registry, client, made) -> Path:
    """The version's files where MLflow keeps them."""
    return Path(client.get_model_version_download_uri("made", "1").removeprefix("file://"))


@pytest.fixture(scope="module")
def stock(registry, given, tmp_path_factory):
    """What a stock client without Evergreen answered for the champion, and its standard error."""
    folder = given.model_folder(tmp_path_factory.mktemp("stock") / "trained")
    number, _ = given.register(registry, "stock", folder)
    registry.set_alias("stock", "champion", number)
    done = subprocess.run(
        [sys.executable, "-I", "-c", PREDICT],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": registry.uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stock_client_predicts_raw_rows_without_evergreen(stock):
    """`mlflow.pyfunc.load_model` of the champion takes raw rows, strings included, where Evergreen is not there."""
    assert stock[0] == [52.0, 100.0]


def test_stock_client_predicts_rows_with_missing_integers(stock):
    """A column of integers is taken with and without missing values, though pandas changes its type."""
    assert stock[1] == [52.0, 0.0]


def test_loading_leaves_the_model_folder_as_it_was(stock, registry, tmp_path):
    """Loading a version writes no bytecode into its hashed folder."""
    found = registry.folder("stock", 1, tmp_path / "model")
    assert sorted(file.name for file in found.rglob("*")) == ["carriers.json", "loader.py", "model.json", "slope.npy"]


def test_version_and_run_are_named(made):
    """The MLflow run has the name of the Evergreen run."""
    assert made[1].info.run_name == "0123456789ab"


def test_version_is_complete(made):
    """The tag that proves a whole registration is there."""
    assert made[0].complete


def test_run_is_finished(made):
    """The MLflow run does not go on running."""
    assert made[1].info.status == "FINISHED"


def test_tags_of_the_run_tell_the_lineage(made):
    """Each part of the lineage can be searched for as a tag of the MLflow run."""
    tags = made[1].data.tags
    assert (tags["evergreen.snapshot.hash"], tags["evergreen.training.seed"]) == (
        "0123456789abcdef0123456789abcdef.dir",
        "7",
    )


def test_a_version_is_tagged_with_the_gist(made):
    """A list of versions stays readable: snapshot and as-of are there, the thirty other parts are not."""
    tags = made[0].tags
    assert (tags["evergreen.snapshot.tag"], "evergreen.as_of" in tags, "evergreen.training.seed" in tags) == (
        "made/20130401T000000Z-0123abcd",
        True,
        False,
    )


def test_lineage_comes_back_whole(registry, made, given):
    """The lineage read from the registry is the one that was given, and knows its version."""
    assert registry.lineage("made", 1) == given.made_of("made", version=1).model_dump(mode="json")


def test_dataset_has_the_dvc_hash_as_its_digest(made):
    """MLflow's dataset input is the snapshot, by its DVC tree hash."""
    assert made[1].inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef0123456789abcdef.dir"


def test_dataset_source_is_read_by_a_stock_client(made):
    """`mlflow.data.get_source` tells the snapshot's repository and tag."""
    source = mlflow.data.get_source(made[1].inputs.dataset_inputs[0]).to_dict()
    assert source["tags"]["mlflow.source.name"] == "/data@made/20130401T000000Z-0123abcd"


def test_params_and_seed_are_logged(made):
    """Training parameters are MLflow parameters; what is not text, as JSON."""
    assert made[1].data.params == {"epochs": "5", "layers": "[64, 32]", "seed": "7"}


def test_metrics_are_logged(made):
    """Evaluation figures are MLflow metrics."""
    assert made[1].data.metrics["roc_auc"] == 0.69


def test_curve_is_a_history(made, client):
    """The training curve is a metric's history, step by step."""
    history = client.get_metric_history(made[1].info.run_id, "training/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_artifacts_lie_where_they_were_put(made, client):
    """Files and folders given as artifacts are in the run under the names given."""
    run = made[1].info.run_id
    found = [file.path for place in (None, "validation", "plots") for file in client.list_artifacts(run, place)]
    assert found == ["lineage.json", "plots", "validation", "validation/result.json", "plots/roc.png"]


def test_signature_is_explicit(logged):
    """The signature names the raw columns, and leaves their types to the version's own conversion."""
    signature = mlflow.models.Model.load(str(logged)).signature
    assert [(column.name, str(column.type)) for column in signature.inputs][:3] == [
        ("carrier", "Any"),
        ("distance", "Any"),
        ("temperature", "Any"),
    ]


def test_metadata_keeps_the_declared_types(logged):
    """What a column really is stands in the model's metadata."""
    assert mlflow.models.Model.load(str(logged)).metadata["inputs"]["distance"] == "int"


def test_requirements_are_pinned_and_not_inferred(logged):
    """The version needs MLflow and what model.json names, each pinned, and nothing else."""
    names = [line.partition("==")[::2] for line in (logged / "requirements.txt").read_text().split()]
    assert [(name, bool(version)) for name, version in names] == [("mlflow", True), ("numpy", True), ("pandas", True)]


def test_input_example_is_kept(logged):
    """The raw rows given as an example are with the version."""
    assert json.loads((logged / "input_example.json").read_text())["data"][0][:2] == ["UA", 100.0]


def test_nothing_is_pickled(logged):
    """No file of a version is a pickle, and MLflow is told of none."""
    files = [file for file in logged.rglob("*") if file.is_file()]
    pickled = [
        file.name for file in files if file.suffix in (".pkl", ".pickle", ".joblib") or file.read_bytes()[:1] == b"\x80"
    ]
    assert (pickled, "python_model:" in (logged / "MLmodel").read_text()) == ([], False)


def test_model_folder_comes_back_byte_for_byte(registry, made, tmp_path):
    """The folder fetched from the registry is the folder that was registered."""
    found = registry.folder("made", 1, tmp_path / "model")
    assert {file.name: file.read_bytes() for file in found.iterdir()} == {
        file.name: file.read_bytes() for file in made[2].iterdir()
    }


def test_same_key_makes_one_version(registry, client, folder, given):
    """Registering again for the same key finds the version that is there."""
    first = given.register(registry, "twice", folder)
    again = given.register(registry, "twice", folder)
    runs = client.search_runs([client.get_experiment_by_name("twice").experiment_id])
    assert (first == again, len(registry.versions("twice")), len(runs)) == (True, 1, 1)


def test_other_key_makes_another_version(registry, folder, given):
    """A new key is a new version of the same model."""
    given.register(registry, "other", folder, key="k1")
    given.register(registry, "other", folder, key="k2")
    assert [version.version for version in registry.versions("other")] == [1, 2]


def test_version_is_found_by_its_key(registry, made):
    """A registration can be looked up by the key that made it."""
    assert (registry.find("made", "k1"), registry.find("made", "no such key"), registry.find("nothing", "k1")) == (
        made[0],
        None,
        None,
    )


def test_a_pruned_version_tells_what_made_it_and_why_its_files_are_gone(registry, client, folder, given, tmp_path):
    """Its lineage stays, with its parameters and figures; done again, nothing changes; for its key there is a new one."""
    (tmp_path / "notes.txt").write_text("words")
    number, run_id = given.register(
        registry, "pruned", folder, key="k1", artifacts={"notes.txt": tmp_path / "notes.txt"}
    )
    before = registry.lineage("pruned", number)
    for _ in range(2):
        registry.prune("pruned", number, "2026-01-01, by a rule")
        found = registry.version("pruned", number)
        assert (found.pruned, found.complete) == ("2026-01-01, by a rule", True)
        assert registry.lineage("pruned", number) == before
        assert [file.path for file in client.list_artifacts(run_id)] == ["lineage.json"]
        assert client.get_run(run_id).data.params
    with pytest.raises(RegistryError, match="pruned version 1 has no files any more: 2026-01-01, by a rule"):
        registry.folder("pruned", number, tmp_path / "model")
    assert registry.find("pruned", "k1") is None
    again, _ = given.register(registry, "pruned", folder, key="k1")
    assert (again, registry.lineage("pruned", number)) == (2, before)
    assert client.get_run(run_id).info.lifecycle_stage == "active"


@pytest.fixture
def server(tmp_path):
    """The address of a real MLflow server that keeps the artifacts itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination",
        str(tmp_path / "kept"),
    ]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen([*command, *places], stdout=log, stderr=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    yield uri
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_server_holds_a_version_like_a_database(server, given, folder, tmp_path):
    """Through an MLflow server a version is registered, promoted, fetched and asked for its lineage all the same."""
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path), "EVERGREEN_MLFLOW_TRACKING_URI": server})
    registry = Registry(settings)
    number, _ = given.register(registry, "served", folder)
    registry.set_alias("served", "champion", number)
    registry.judge("served", number, Verdict(decision="promote", reasons=("better",)))
    champion = registry.champion("served")
    fetched = registry.folder("served", number, tmp_path / "model")
    assert (
        champion.complete,
        registry.lineage("served", number)["verdict"]["decision"],
        (fetched / "slope.npy").read_bytes(),
    ) == (
        True,
        "promote",
        (folder / "slope.npy").read_bytes(),
    )
    registry.prune("served", number, "a test")
    assert [file.name for file in (tmp_path / "kept").rglob("*") if file.is_file()] == ["lineage.json"]
    assert registry.lineage("served", number)["verdict"]["decision"] == "promote"


@pytest.mark.slow
@pytest.mark.fault
def test_killed_registration_ends_with_one_version(trials):
    """Killed after the upload, the version or the end, then tried again: one complete version, no leftovers."""
    whole = {
        "killed": True,
        "versions": [[1, True]],
        "lineage": 1,
        "runs": ["FINISHED"],
        "same_run": True,
        "logged_models": 1,
    }
    assert [{**trial, "call": None} for trial in trials["register"]] == [{**whole, "call": None}] * 3


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_registration_killed_after_every_call_ends_with_one_version(run_trials, tmp_path):
    """Killed after any call of MLflow's client at all, then tried again: one complete version, no leftovers."""
    trials = run_trials(tmp_path, 1)["register"]
    whole = {
        "killed": True,
        "versions": [[1, True]],
        "lineage": 1,
        "runs": ["FINISHED"],
        "same_run": True,
        "logged_models": 1,
    }
    assert [{**trial, "call": None} for trial in trials] == [{**whole, "call": None}] * max(15, len(trials))


def test_failed_registration_leaves_nothing(registry, client, folder, given):
    """A folder that is no model folder makes an error, and neither a run nor a version."""
    (folder / "model.json").unlink()
    with pytest.raises(RegistryError, match=r"cannot register broken: .*model\.json"):
        given.register(registry, "broken", folder)
    runs = client.search_runs([client.get_experiment_by_name("broken").experiment_id])
    assert (runs, registry.versions("broken")) == ([], [])


def test_long_parameter_is_not_cut(registry, client, folder, given):
    """A parameter too long for MLflow names the artifact that holds it whole."""
    lineage = given.made_of("long")
    training = lineage.training.model_copy(update={"params": {"columns": "x" * 10_000}})
    _, run_id = given.register(registry, "long", folder, lineage=lineage.model_copy(update={"training": training}))
    shown = client.get_run(run_id).data.params["columns"]
    assert (shown, len(registry.lineage("long", 1)["training"]["params"]["columns"])) == (
        "in the artifact lineage.json",
        10_000,
    )


def test_parameter_name_that_mlflow_refuses_is_logged(registry, client, folder, given):
    """An odd parameter name cannot stop a registration."""
    lineage = given.made_of("odd")
    training = lineage.training.model_copy(update={"params": {"<odd>": 1}})
    _, run_id = given.register(registry, "odd", folder, lineage=lineage.model_copy(update={"training": training}))
    assert "1" in client.get_run(run_id).data.params.values()


def test_alias_names_its_version(registry, made):
    """A version is read by alias, and says which aliases are on it."""
    registry.set_alias("made", "challenger", 1)
    found = registry.version("made", "challenger")
    registry.drop_alias("made", "challenger", 1)
    assert (found.version, found.aliases, registry.version("made", "1").aliases) == (1, ("challenger",), ())


def test_no_champion_is_none(registry, made):
    """Neither a model without the alias nor a name without a model has a champion."""
    assert (registry.champion("made"), registry.champion("nothing")) == (None, None)


def test_unknown_model_suggests_the_nearest(registry, made):
    """A mistyped model is answered with the one that was meant."""
    with pytest.raises(RegistryError, match="there is no model 'mad'\n  fix: did you mean 'made'"):
        registry.version("mad", 1)


def test_unknown_version_says_what_there_is(registry, made):
    """A version that does not exist is answered with those that do."""
    with pytest.raises(RegistryError, match=r"made has no version or alias '9'\n  fix: aliases: .*; versions: 1$"):
        registry.version("made", 9)


def test_unknown_alias_says_what_there_is(registry, made):
    """An alias that does not exist is answered with what does."""
    with pytest.raises(RegistryError, match="made has no version or alias 'champ'"):
        registry.version("made", "champ")


@pytest.mark.parametrize(
    "uri",
    ["http://127.0.0.1:9", "sqlite:////proc/nowhere/mlflow.db", "sqlite:////dev/null/mlflow.db", "nonsense:///x"],
)
def test_unreachable_registry_is_said_within_seconds(uri, tmp_path, registry):
    """A server that refuses and a database that cannot be made are errors that name the URI, not minutes of retries."""
    registry.champion("nothing")  # MLflow is imported
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path), "EVERGREEN_MLFLOW_TRACKING_URI": uri})
    start = time.monotonic()
    with pytest.raises(RegistryError, match=uri):
        Registry(settings).champion("x")
    assert time.monotonic() - start < 10


def test_password_is_not_shown(tmp_path):
    """An error names the registry without its password."""
    uri = "http://user:secret@127.0.0.1:9"
    settings = Settings.from_env({"EVERGREEN_HOME": str(tmp_path), "EVERGREEN_MLFLOW_TRACKING_URI": uri})
    with pytest.raises(RegistryError) as caught:
        Registry(settings).champion("x")
    assert ("secret" in str(caught.value), "user:***@127.0.0.1:9" in str(caught.value)) == (False, True)


def test_version_of_others_has_no_lineage(registry, client, made):
    """A version registered by hand is told apart, not guessed about."""
    client.create_registered_model("foreign")
    client.create_model_version("foreign", client.get_model_version_download_uri("made", "1"))
    with pytest.raises(RegistryError, match="foreign version 1 was not registered by Evergreen"):
        registry.lineage("foreign", 1)


def test_new_database_is_whole_or_absent(home, registry, client):
    """Nothing of the making of MLflow's database is left beside it."""
    assert [path.name for path in home.iterdir() if path.name.startswith(".evergreen")] == []


def test_importing_the_module_imports_no_mlflow():
    """The registry's modules cost no MLflow until they are used."""
    code = "import sys, evergreen.registry.models, evergreen.registry.promotion; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
